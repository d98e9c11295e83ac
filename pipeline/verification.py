"""`pipeline verify`: every byte of the results of some settings' stages, compared with the checksums of each."""

from collections.abc import Callable, Sequence

from harvest import verify as store_verification
from harvest.files import UserError, locked
from harvest.stage_directory import MANIFEST, RECORD, DamagedManifestError, Run
from harvest.store_files import files_of
from pipeline.stages import Runs, made_later


def verify(sweep: Sequence[Runs], say: Callable[[str], None], sample: int | None = None) -> None:
    """Read what every stage left, explanations and benchmarks of these evaluations under any settings too, and the
    store's rows last; of these all, or `sample` shards.

    Of a bad shard the record is deleted, and the harvest's manifest with it, so that the next harvest makes just
    that anew. Raises UserError that names what is bad, and where there is nothing to read.
    """
    every = {run.path: run for runs in sweep for run in map(runs.of, runs.stages)}
    every |= {run.path: run for runs in sweep for run in made_later(runs.of("evaluate"))}
    complete = [run for run in every.values() if run.is_complete and run.stage != "harvest"]
    bad: list[str] = []
    for run in complete:
        if found := _bad_files(run):
            bad += [*found, f"{run.stage}: restore it, or {run.way_out}"]
        else:
            say(f"{run.path}: every file is as it was written")
    harvest = sweep[0].of("harvest")
    if harvest.is_begun or harvest.is_running or not complete:
        if found := _bad_store(harvest, sample):
            bad += found
        else:
            which = "every byte that is there" if sample is None else "every byte that was read"
            say(f"{harvest.path}: {which} is as it was written")
    if bad:
        raise UserError("\n".join(bad))


def _bad_files(run: Run) -> list[str]:
    """A line for each file of a complete stage that is missing or damaged."""
    try:
        return [run.said([name]) for name in run.damaged()]
    except UserError as error:
        return [str(error)]


def _bad_store(run: Run, sample: int | None) -> list[str]:
    """A line for each bad thing of a store, and the way out; what is bad no longer counts."""
    files = files_of(run.path)
    with locked(run.path, "harvest"):
        complete, changed, manifest = run.is_complete, [], []
        try:
            changed = run.changed() if complete else []
        except DamagedManifestError as error:
            manifest = [str(error)]
        for name in changed:  # records are whole in themselves, but may be those of another run
            listed = run.manifest["files"][name]
            if (match := RECORD.fullmatch(name)) and isinstance(listed, dict) and (run.path / name).is_file():
                files.delete(match[1])
        inside = [n.removeprefix("store/") for n in changed if n.startswith("store/") and n.endswith("/zarr.json")]
        metadata, shards = store_verification.verify(
            files, inside, complete=complete, memory=run.path / "verify.json", sample=sample
        )
        if not manifest and not metadata and not shards:
            return []
        (run.path / MANIFEST).unlink(missing_ok=True)
        out = "`make harvest` writes it anew"
        if metadata:
            out = "`make harvest` writes these files anew; then `make verify` reads the shards"
        elif shards:
            out = f"{len(shards)} bad shards are marked; `make harvest` redoes just these"
        return [*manifest, *metadata, *shards, out]
