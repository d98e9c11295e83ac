"""Where the SAE lies that a training starts from (train.start_from). Nothing here imports torch."""

from pathlib import Path
from typing import NamedTuple

from harvest.files import UserError
from harvest.source_files import is_local
from harvest.stage_directory import Run
from train.config import StartFrom

WEIGHTS = "sae_weights.safetensors"
KINDS = {"sae.json": "ours", "cfg.json": "SAELens"}  # what says that a folder holds an SAE, and whose
LEVELS = 4  # of a train directory: itself, the folder of a hook, `checkpoints` in it, one of these


class StartFiles(NamedTuple):
    """Local SAEs, all of one origin: one, or one for each hook."""

    about: str  # name of the file beside the weights: a key of KINDS
    folders: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        """All that is read of them."""
        return [folder / name for folder in self.folders for name in (self.about, WEIGHTS)]


def is_on_hub(start: StartFrom) -> bool:
    """Whether it is a hub id: what exists is never taken for one."""
    return not is_local(start.path)


def saelens_files(folder: str) -> tuple[str, ...]:
    """What is read of a SAELens folder, relative to where the folder is."""
    return tuple(f"{folder}/{name}".lstrip("/") for name in ("cfg.json", WEIGHTS))


def find_start(start: StartFrom) -> StartFiles:
    """The SAEs of a local folder.

    Raises UserError where there is none, where files are missing, and for a training run that is not finished.
    """
    folder, setting = Path(start.path, start.file), f"train.start_from: {start.path!r}"
    if not folder.is_dir():
        raise UserError(f"{setting}: there is no folder {folder}")
    run = train_run(folder)
    if run and not run.is_complete:
        raise UserError(
            f"{setting}: its training run {run.path} is not finished; run `make train` with its CONFIG and SET first"
        )
    for about in KINDS:
        inside = [path.parent for path in sorted(folder.glob(f"*/{about}"))]
        if folders := [folder] if (folder / about).exists() else inside:
            found = StartFiles(about, tuple(folders))
            if missing := [path for path in found.files if not path.is_file()]:
                raise UserError(f"{setting}: there is no file {missing[0]}; restore it, or name another SAE")
            return found
    raise UserError(
        f"{setting}: holds no SAE; name a train directory, the folder of an SAE in it (with sae.json), or one of "
        "SAELens (with cfg.json)"
    )


def train_run(folder: Path) -> Run | None:
    """The training run in whose directory an SAE's folder lies, or which it is.

    Raises UserError where begun.json of the run is damaged.
    """
    here = folder.absolute()
    for path in (here, *here.parents)[:LEVELS]:
        if (run := Run(path)).is_begun:
            return run if run.begun.get("stage") == "train" else None
    return None
