"""`pipeline verify`: every byte that the stages of some settings left, held against the checksums of each."""

from collections.abc import Callable, Sequence
from pathlib import Path

from harvest import verify as store_verification
from harvest.files import UserError, is_locked, locked
from harvest.store_files import files_of
from pipeline.inventory import RECORD, changed_files, damaged_files
from pipeline.manifest import BEGUN, MANIFEST, DamagedManifestError, is_complete, read_manifest, said, way_out
from pipeline.stages import AnyRuns


def store_digest(runs: AnyRuns) -> str:
    """One sha256 of all files of the harvest's store. Raises UserError where there is none."""
    return store_verification.digest(files_of(runs.directory("harvest")))


def verify(sweep: Sequence[AnyRuns], say: Callable[[str], None]) -> None:
    """Read what every stage left, the store's rows last.

    Of a bad shard the record is taken away, and the harvest's manifest with it, so that the next harvest makes just
    that anew. Raises UserError that names what is bad, and where there is nothing to read.
    """
    every = {runs.directory(stage): stage for runs in sweep for stage in runs.stages}
    bad, read = [], 0
    for directory, stage in every.items():
        if stage == "harvest" or not is_complete(directory):
            continue
        read += 1
        found = _bad_files(directory)
        bad += [*found, *([f"{stage}: restore it, or {way_out(stage)}"] if found else [])]
        if not found:
            say(f"{directory}: every file is as it was written")
    harvest = sweep[0].directory("harvest")
    if (harvest / BEGUN).exists() or is_locked(harvest, "harvest") or not read:
        found = _bad_store(harvest)
        bad += found
        if not found:
            say(f"{harvest}: every byte that is there is as it was written")
    if bad:
        raise UserError("\n".join(bad))


def _bad_files(directory: Path) -> list[str]:
    """A line for each file of a complete stage that is missing or damaged."""
    try:
        return [said(directory, [name]) for name in damaged_files(directory, read_manifest(directory))]
    except UserError as error:
        return [str(error)]


def _bad_store(directory: Path) -> list[str]:
    """A line for each bad thing of a store, and the way out; what is bad no longer counts."""
    files = files_of(directory)
    with locked(directory, "harvest"):
        complete, manifest, listed = is_complete(directory), [], {}
        try:
            listed = read_manifest(directory) if complete else {}
        except DamagedManifestError as error:
            manifest = [str(error)]
        changed = changed_files(directory, listed)
        # Records are whole in themselves, but may be those of another run. Earlier manifests list none.
        records = [match[1] for name in changed if (match := RECORD.fullmatch(name))]
        for name in records:
            if isinstance(listed["files"][f"store/{name}"], dict) and (directory / "store" / name).is_file():
                files.delete(name)
        inside = [n.removeprefix("store/") for n in changed if n.startswith("store/") and n.endswith("/zarr.json")]
        metadata, shards = store_verification.verify(files, inside, complete=complete)
        if not manifest and not metadata and not shards:
            return []
        (directory / MANIFEST).unlink(missing_ok=True)
        out = "`make harvest` writes it anew"
        if metadata:
            out = "`make harvest` writes these files anew; then `make verify` reads the shards"
        elif shards:
            out = f"{len(shards)} bad shards are marked; `make harvest` redoes just these"
        return [*manifest, *metadata, *shards, out]
