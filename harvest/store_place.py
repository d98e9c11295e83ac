"""Which files a harvest's store is: in its run directory, or in the bucket where it was begun."""

from pathlib import Path

from harvest.config import HarvestRuntime
from harvest.files import UserError, read_json
from harvest.remote_files import RemoteFiles
from harvest.store_files import Files, LocalFiles


def files_of(directory: Path, runtime: HarvestRuntime | None = None) -> Files:
    """The store's files of a harvest's run directory, in the place where it was begun.

    Raises UserError when settings name another place, and for what `remote_files` refuses.
    """
    begun = directory / "begun.json"
    place = read_json(begun).get("store") if begun.exists() else None
    wanted = runtime.store_at(directory.name) if runtime else None
    if wanted and wanted["url"] != (place or {}).get("url"):
        raise UserError(
            f"harvest.runtime.store: {wanted['url']}: this harvest was begun in "
            f"{place['url'] if place else directory}; go on there, or start anew with --force"
        )
    place = wanted or place
    if not place:
        return LocalFiles(directory / "store")
    return RemoteFiles(place["url"], place["allow_http"])
