"""Checkpoints, each a new folder whose marker comes last, and the folder of a finished SAE.

checkpoints/00000200/tensors.safetensors   weights, Adam's moments, rows since each feature fired
checkpoints/00000200/checkpoint.json       step, position, best loss, length of metrics.jsonl; the marker
sae_weights.safetensors, sae.json          an SAE: its weights speak of scaled rows (sae.json: scale)
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from harvest.files import UserError, file_crc32c, read_json, replacing, write_sealed
from train.dataloader import Position
from train.exclusion import InputStatistics
from train.kinds import sae_class
from train.sae import Sae
from train.start_files import WEIGHTS, train_run

MARKER, TENSORS = "checkpoint.json", "tensors.safetensors"
ABOUT = "sae.json"  # beside WEIGHTS
CHECKSUM = "tensors_crc32c"  # of the file of tensors, in the JSON file beside it


class Checkpoint(NamedTuple):
    """What a resume needs beside the tensors."""

    step: int
    position: Position
    best_loss: float | None
    metrics_bytes: int
    kernel: dict[str, Any]
    statistics: InputStatistics
    losses: Sequence[float] = ()  # the last logged ones, that a spike is measured against
    metrics_crc32c: int | None = None  # of metrics.jsonl up to metrics_bytes
    fingerprint: str | None = None  # of the run, where it is one of the pipeline's


class SavedSae(NamedTuple):
    """An SAE of a folder and what sae.json says of it."""

    sae: Sae
    hook: str
    statistics: InputStatistics
    about: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, tensors: dict[str, Tensor], keep_last: int) -> None:
    """Write a checkpoint, then drop all but the newest `keep_last`.

    Shapes of `tensors` as in `Trainer.tensors`. Raises OSError, which names the file, when the disk is full.
    """
    new = folder / f"{checkpoint.step:08d}"
    if (new / MARKER).exists():  # Ctrl-C right after it was due, or before this SAE's turn in a sweep: the same bytes
        return
    for path in folder.glob("[0-9]*"):  # half written, or half deleted, when a process was killed
        if not (path / MARKER).exists():
            shutil.rmtree(path, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _save_tensors(new / TENSORS, tensors)
        about = checkpoint._asdict() | {"statistics": checkpoint.statistics._asdict()}
        about |= {"position": checkpoint.position._asdict(), CHECKSUM: file_crc32c(new / TENSORS)}
        write_sealed(new / MARKER, about)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # a full disk must not keep half a checkpoint
        raise
    for old in _complete(folder)[:-keep_last]:
        (old / MARKER).unlink()
        shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """The newest complete checkpoint and its tensors (shapes as in `Trainer.tensors`); None when there is none.

    Raises UserError when it is damaged, and names the one before it.
    """
    complete = _complete(folder)
    if not complete:
        return None
    path = complete[-1]
    before = f"the one before it, {complete[-2].name}" if len(complete) > 1 else "the start"
    try:
        about = read_json(path / MARKER)
    except UserError as error:
        raise UserError(f"{error}; or delete {path} to resume from {before}") from None
    _check_run(path / MARKER, about)
    try:
        tensors = _load_tensors(path / TENSORS, about)
        fields = {name: about[name] for name in Checkpoint._fields if name in about}
        fields |= {"position": Position(**about["position"]), "statistics": InputStatistics(**about["statistics"])}
        checkpoint = Checkpoint(**fields)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete this folder to resume from {before}") from None
    return checkpoint, tensors


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"[0-9]*/{MARKER}"))


def save_sae(folder: Path, sae: Sae, hook: str, statistics: InputStatistics, about: dict[str, Any]) -> None:
    """Write an SAE's weights, then sae.json."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_tensors(folder / WEIGHTS, {name: weight.cpu() for name, weight in sae.parameters.items()})
    shape = {"d_in": sae.d_in, "d_sae": sae.d_sae, "hook_name": hook, CHECKSUM: file_crc32c(folder / WEIGHTS)}
    write_sealed(folder / ABOUT, about | shape | statistics._asdict())


def run_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the training run in whose directory a folder lies; None where it lies elsewhere.

    Raises UserError where begun.json of the run is damaged.
    """
    run = train_run(folder)
    return run.begun.get("fingerprint") if run else None


def _check_run(path: Path, about: dict[str, Any]) -> None:
    """Raise UserError for a file of one run that lies in the directory of another."""
    of, here = about.get("fingerprint"), run_fingerprint(path.parent)
    if of and here and of != here:
        raise UserError(
            f"{path}: belongs to the training run {of}, and lies in the directory of {here}; restore this run's own, "
            "or `python -m pipeline train --force` makes it anew"
        )


def _load_tensors(path: Path, about: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, those that `about` was written for."""
    if CHECKSUM in about and file_crc32c(path) != about[CHECKSUM]:
        raise OSError("its bytes have changed since they were written (crc32c)")
    return safetensors.torch.load_file(path)


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as partial:
        try:
            safetensors.torch.save_file(tensors, partial)
        except safetensors.SafetensorError as error:
            # A full disk comes as text: "I/O error: No space left on device (os error 28)".
            system = re.search(r"os error (\d+)", str(error))
            if not system:
                raise
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(path)) from None


def load_sae(folder: Path) -> SavedSae:
    """The SAE of a folder.

    Raises UserError for files that are missing, damaged, those of another run than the one in whose directory they
    lie, or of shapes that do not fit each other.
    """
    if not (folder / ABOUT).exists():
        raise UserError(
            f"{folder / ABOUT}: not there; an SAE's folder is runs/train/<fingerprint>/<hook>, or best/ in it"
        )
    about = read_json(folder / ABOUT)
    _check_run(folder / ABOUT, about)
    path, kind = folder / WEIGHTS, str(about.get("architecture", "standard"))
    try:
        of_kind = sae_class(kind)
    except KeyError:
        raise UserError(f"{folder / ABOUT}: architecture: {kind!r}: no kind of SAE that is known here") from None
    try:
        tensors = _load_tensors(path, about)
        parameters = {name: tensors[name] for name in of_kind.dims}
        statistics = InputStatistics(**{name: about[name] for name in InputStatistics._fields})
        d_in, d_sae, hook = about["d_in"], about["d_sae"], about["hook_name"]
        sae = of_kind(parameters, statistics.scale, **{name: about[name] for name in of_kind.rule})
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path}: damaged, or not an SAE of ours ({error})") from None
    for name, shape in of_kind.shapes(d_in, d_sae).items():
        tensor = parameters[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise UserError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}; float32 {shape} expected")
    return SavedSae(sae, hook, statistics, about)
