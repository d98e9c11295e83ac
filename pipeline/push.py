"""`pipeline push`: an export, and what was measured of it, to a repository of the hub.

Nothing leaves the machine without `yes`. Feature pages and the report hold text of the data sets: they are left
out unless every source is known to be open, or the caller says so. The token is that of `hf auth login` or
HF_TOKEN; it is passed on and never written.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from harvest.files import UserError
from harvest.sources import hub_errors
from pipeline.export import export_name
from pipeline.inventory import changed_files
from pipeline.manifest import METRICS, is_complete, read_manifest, read_metrics, said, way_out
from pipeline.stages import Runs
from pipeline.terms import source_terms

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WITHOUT_TEXT = (METRICS,)  # of an evaluate directory


class Push(NamedTuple):
    """What would be pushed: place in the repository → file; and what is left out, with the reason."""

    files: dict[str, Path]
    left_out: list[str]


def plan_push(sweep: Sequence[Runs], folder: Path | None, with_text: bool) -> Push:
    """The files of an export and of the evaluations of its runs.

    Raises UserError for a folder that is no export of ours, and for a file that is not what was exported or measured.
    """
    from train.export import MARKER, check_exported, read_marker

    folder = folder or sweep[0].root / "export" / export_name(sweep)
    if not folder.is_dir():
        raise UserError(f"push: {folder}: there is no export; run `make export` with the same CONFIG and SET first")
    marker = read_marker(folder)
    exported = {(sae.get("train"), sae.get("which_sae")) for sae in marker.get("saes", [])}
    if exported != {(runs.fingerprints["train"], runs.config.evaluate.sae) for runs in sweep}:
        raise UserError(f"push: {folder}: was exported from other settings; export anew, or give those settings")
    check_exported(folder, marker)
    files = {name: folder / name for name in sorted([*marker["files"], MARKER])}
    closed = [
        f"{source.name} ({term.note})"
        for source in sweep[0].config.sample.sources
        if not (term := source_terms(source.path)).free
    ]
    left_out = []
    for runs in sweep:
        directory = runs.directory("evaluate")
        if not is_complete(directory):
            continue
        listed = _measured(directory)
        place = f"evaluation/{directory.name}"
        files |= {f"{place}/{name}": directory / name for name in WITHOUT_TEXT}
        texts = [path for path in listed if path.suffix == ".html"]
        if closed and not with_text:
            left_out.append(
                f"{len(texts)} pages with text of {', '.join(closed)} in {directory}; --with-text pushes them"
            )
        else:
            files |= {f"{place}/{path.relative_to(directory)}": path for path in texts}
    return Push(files, left_out)


def _measured(directory: Path) -> list[Path]:
    """What an evaluation left.

    Raises UserError where a file is missing or changed, or that of another run.
    """
    read_metrics(directory)
    manifest = read_manifest(directory)
    if changed := changed_files(directory, manifest):
        raise UserError(f"{said(directory, changed)}; restore it, or {way_out('evaluate')}")
    if listed := manifest.get("files"):
        return sorted(directory / name for name in listed)
    return [path for path in sorted(directory.rglob("*.html")) if not path.is_symlink()]  # of an earlier version


def push(repository: str, planned: Push, *, public: bool, yes: bool, say: Callable[[str], None]) -> None:
    """Show what would be pushed, and push it as one commit where `yes` is set.

    A repository that is not there is made, private unless `public`. Raises UserError where nobody is logged in,
    the token may not write, or the hub cannot be reached.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"push: {repository!r}: a repository of the hub is OWNER/NAME")
    for place, path in planned.files.items():
        say(f"{path.stat().st_size:>15,}  {place}")
    for line in planned.left_out:
        say(f"left out: {line}")
    if not yes:
        say(f"nothing was pushed to {repository}; --yes pushes these {len(planned.files)} files")
        return
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not get_token():
        raise UserError("push: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN")
    operations = [CommitOperationAdd(place, str(path)) for place, path in planned.files.items()]
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Push sparse autoencoders and their figures")
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = {401: "the token is not valid", 403: "the token may not write there"}.get(status, f"status {status}")
        raise UserError(f"push: {repository}: the hub refuses: {why}; check `hf auth whoami` and the token") from None
    except hub_errors() as error:
        detail = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"push: {repository}: the hub cannot be reached, or takes no such name ({detail})") from None
    say(str(commit.commit_url))
