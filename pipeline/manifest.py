"""The two files that say what a run directory is.

begun.json     written when a stage starts: settings, fingerprint, inputs, numerics; a directory without
               it is not ours
manifest.json  written last, by an atomic rename: the same, with wall time, versions and summary figures;
               its presence means that the stage is complete
"""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harvest.files import UserError, file_crc32c, locked, read_json, write_sealed
from harvest.workers import wait_until

BEGUN, MANIFEST = "begun.json", "manifest.json"
STARTS_OVER = ("evaluate",)  # stages that keep nothing of an interrupted run
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "zarr", "numpy", "safetensors")


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
        "files": {str(path.relative_to(directory)): file_crc32c(path) for path in _described(directory)},
        "summary": summary,
    }
    write_sealed(directory / MANIFEST, manifest)


def changed_files(directory: Path) -> list[str]:
    """Files of a complete stage without a checksum of their own that are not as its manifest has them, by name.

    Raises UserError when the manifest is damaged.
    """
    described = read_json(directory / MANIFEST).get("files")
    if not isinstance(described, dict):
        return []
    inside = [name for name in described if not Path(name).is_absolute() and ".." not in Path(name).parts]
    paths = {name: directory / name for name in inside}
    return [n for n, path in paths.items() if not path.is_file() or file_crc32c(path) != described[n]]


def check_files(directory: Path) -> None:
    """Hold a complete stage's files that carry no checksum of their own against its manifest.

    Raises UserError that names the file.
    """
    stage = directory.parent.name
    try:
        changed = changed_files(directory)
    except UserError as error:
        keeps = "makes it anew" if stage == "sample" else "keeps what is whole"
        raise UserError(f"{error}: delete it and run {stage} again, which {keeps}") from None
    if changed:
        mend = (
            "`make verify`, then `make harvest` writes just that anew"
            if stage == "harvest"
            else f"`python -m pipeline {stage} --force` makes them anew"
        )
        raise UserError(
            f"{directory / changed[0]}: missing, or changed since the stage ended (crc32c); restore it, or {mend}"
        )


def _described(directory: Path) -> list[Path]:
    """Metadata of Zarr, and the lines that training logged: what no reader could tell from what was written."""
    found = [*directory.glob("*/metrics.jsonl"), *directory.glob("checksums.json")]
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = [name for name in subfolders if name not in ("c", "shards", "checkpoints", "features")]
        found += [Path(folder, name) for name in names if name == "zarr.json"]
    return sorted(found)


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
