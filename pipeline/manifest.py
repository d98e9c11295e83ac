"""The two files that say what a run directory is.

begun.json     written when a stage starts: settings, fingerprint, inputs, numerics; a directory without
               it is not ours
manifest.json  written last, by an atomic rename: the same, with wall time, versions and summary figures;
               its presence means that the stage is complete
"""

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harvest.files import UserError, locked, read_json, write_sealed
from harvest.workers import wait_until
from pipeline.inventory import RECORD, changed_files, inventory, missing_files

BEGUN, MANIFEST, METRICS = "begun.json", "manifest.json", "metrics.json"
FINGERPRINT = re.compile(r"[0-9a-f]{12}")  # name of a run directory
STARTS_OVER = ("evaluate",)  # stages that keep nothing of an interrupted run
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "zarr", "numpy", "safetensors")


class DamagedManifestError(UserError):
    """A manifest that is there and cannot be believed."""


def is_complete(directory: Path) -> bool:
    """Whether the stage of a run directory was finished."""
    return (directory / MANIFEST).exists()


def remote_store(directory: Path) -> str | None:
    """URL of a harvest's store, where it is not in the directory."""
    try:
        return (read_json(directory / BEGUN).get("store") or {}).get("url")
    except UserError:
        return None  # not begun, or damaged: then nothing says where it is


def begin(directory: Path, identity: dict[str, Any], numerics: dict[str, Any], allow_mixed: bool) -> None:
    """Mark a directory as begun, or check that it can be resumed here.

    Raises UserError when it was begun under other numerics and `allow_mixed` is not set.
    """
    path = directory / BEGUN
    if not path.exists() or identity["stage"] in STARTS_OVER:
        write_sealed(path, {**identity, "numerics": numerics, "begun": time.time(), "mixed_with": []})
        return
    _compare(directory, numerics, allow_mixed)


def join(directory: Path, numerics: dict[str, Any], *, allow_mixed: bool, seconds: float) -> None:
    """What a worker beside the first does in place of `begin`: wait for that one's, and compare numerics.

    Raises UserError when there is none after so many seconds, and as `begin` does.
    """
    wait_until((directory / BEGUN).exists, seconds, f"{directory}: worker 0 has not begun it")
    _compare(directory, numerics, allow_mixed)


def _compare(directory: Path, numerics: dict[str, Any], allow_mixed: bool) -> None:
    with locked(directory, "begun"):  # workers record theirs at the same time
        begun = read_json(directory / BEGUN)
        if begun.get("fingerprint") != directory.name:
            raise UserError(
                f"{directory / BEGUN}: is that of the run {begun.get('fingerprint')}; move that run back to the "
                "directory of its name, or add --force to start anew here"
            )
        before: dict[str, Any] = begun.get("numerics") or {}
        if before == numerics or numerics in begun.get("mixed_with", []):
            return
        if not allow_mixed:
            changed = [
                f"{key}: {before.get(key)} then, {numerics.get(key)} now"
                for key in sorted({*before, *numerics})
                if before.get(key) != numerics.get(key)
            ]
            raise UserError(
                f"{directory}: was begun under other numerics ({'; '.join(changed)}), so the rest would differ in "
                "its last bits; add --allow-mixed to go on all the same, or --force to start anew"
            )
        write_sealed(directory / BEGUN, {**begun, "mixed_with": [*begun.get("mixed_with", []), numerics]})


def finish(directory: Path, summary: dict[str, Any]) -> None:
    """Write manifest.json: from here on the stage is complete."""
    begun = read_json(directory / BEGUN)
    manifest = {
        **begun,
        "finished": time.time(),
        "wall_seconds": round(time.time() - begun["begun"], 1),
        "versions": {"reasoning-sae": _commit(), "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        "files": inventory(directory, begun["stage"]),
        "summary": summary,
    }
    write_sealed(directory / MANIFEST, manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete stage.

    Raises DamagedManifestError when it is damaged, and UserError when it is that of another run.
    """
    path = directory / MANIFEST
    try:
        manifest = read_json(path)
    except UserError as error:
        raise DamagedManifestError(str(error)) from None
    found = manifest.get("fingerprint")
    if FINGERPRINT.fullmatch(directory.name) and found != directory.name:
        raise UserError(f"{path}: is that of the run {found}; move that run back to the directory of its name")
    return manifest


def check_files(directory: Path, *, read: bool = True) -> None:
    """Hold what a complete stage left against its manifest; without `read`, by a look that takes milliseconds.

    Rows and contexts are held against their own checksums when they are read.
    Raises UserError that names the file.
    """
    stage = directory.parent.name
    try:
        changed = (changed_files if read else missing_files)(directory, read_manifest(directory))
        if read:  # readers know what to do about shards that are not there
            changed = [name for name in changed if not RECORD.fullmatch(name) or (directory / name).exists()]
    except DamagedManifestError as error:
        keeps = "makes it anew" if stage in ("sample", "evaluate") else "keeps what is whole"
        raise UserError(f"{error}: delete it and run {stage} again, which {keeps}") from None
    if changed:
        raise UserError(f"{said(directory, changed)}; restore it, or {way_out(stage)}")


def said(directory: Path, changed: Sequence[str]) -> str:
    """A stage's changed files in a few words: the first, and how many there are."""
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return f"{directory / changed[0]}: missing, or changed since the stage ended{more}"


def way_out(stage: str) -> str:
    """What makes anew what is missing or damaged of a stage."""
    return {
        "harvest": "`make verify`, then `make harvest` writes just that anew",
        "evaluate": "`make eval` makes all of it anew",
    }.get(stage, f"`python -m pipeline {stage} --force` makes them anew")


def read_metrics(directory: Path) -> dict[str, Any]:
    """metrics.json of a complete evaluation.

    Raises UserError when it is damaged, or that of another run.
    """
    manifest, path = read_manifest(directory), directory / METRICS
    listed = manifest.get("files", {}).get(METRICS)
    if listed and changed_files(directory, {"files": {METRICS: listed}}):
        raise UserError(f"{said(directory, [METRICS])}; restore it, or {way_out('evaluate')}")
    metrics = read_json(path)
    run, trained = metrics.get("fingerprint"), metrics.get("inputs", {}).get("train")
    if run not in (None, manifest["fingerprint"]) or trained != Path(str(manifest["upstream"])).name:
        raise UserError(
            f"{path}: holds the figures of another run ({run or trained}), not of {manifest['fingerprint']}; restore "
            f"it, or {way_out('evaluate')}"
        )
    return metrics


def _commit() -> str:
    """This code's git commit, "-dirty" where files differ; "unknown" outside a clone."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return out.stdout.strip()
