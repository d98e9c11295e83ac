"""A stage's directory, `<runs>/<stage>/<fingerprint>`, opened by whoever reads or writes it.

begun.json     written first: settings, fingerprint, inputs, numerics; a directory without it is not ours
manifest.json  written last, by an atomic rename: the same, with wall time, versions and summary; the stage is complete

The manifest lists every result with its size and checksum, but for those that another file vouches for: rows (the
record of their shard) and chunks of contexts (checksums.json). Checkpoints and logs of trackers are not results.
Nothing here imports torch or zarr.
"""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harvest.contexts import damaged_chunks, missing_chunks
from harvest.files import UserError, file_crc32c, is_locked, locked, read_json, write_sealed
from harvest.row_files import missing_rows
from harvest.workers import SHARED, wait_until

BEGUN, MANIFEST = "begun.json", "manifest.json"
FINGERPRINT = re.compile(r"[0-9a-f]{12}")  # name of a directory
STARTS_OVER = ("evaluate",)  # stages that keep nothing of an interrupted run
# Stages whose result is made anew where it is not whole: in minutes, or from the answers that they keep.
MADE_ANEW = (*STARTS_OVER, "explain", "benchmark")
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "zarr", "numpy", "safetensors")
SMALL_BYTES = 16 << 20  # `status` reads files up to this size; of a larger one it looks at the size
NO_RESULTS = (MANIFEST, "progress.json", "stream.json", "verify.json")
STREAMED = "store/train/shards"  # records that change as a stream deletes what was read
RECORD = re.compile(r"store/((?:train|holdout)/shards/\d{5,}\.json)")
PASSED_OVER = {"sample": ("scratch",), "train": ("*/checkpoints", "*/tensorboard")}
MISSING: dict[str, Callable[[Path], list[str]]] = {"sample": missing_chunks, "harvest": missing_rows}
DAMAGED: dict[str, Callable[[Path], list[str]]] = {"sample": damaged_chunks}  # harvest/verify.py reads rows


class DamagedManifestError(UserError):
    """A manifest that cannot be believed."""


class Run:
    """One run of a stage, finished or not; every property is read from its files at that moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stage = path.parent.name

    @property
    def is_begun(self) -> bool:
        """Whether it was started."""
        return (self.path / BEGUN).exists()

    @property
    def is_complete(self) -> bool:
        """Whether it was finished."""
        return (self.path / MANIFEST).exists()

    @property
    def is_running(self) -> bool:
        """Whether a process works on it now."""
        return is_locked(self.path, self.stage)

    @property
    def begun(self) -> dict[str, Any]:
        """What begun.json says. Raises UserError when it is missing or damaged."""
        return read_json(self.path / BEGUN)

    @property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says.

        Raises DamagedManifestError when it is missing or damaged, UserError when it belongs to another run.
        """
        path = self.path / MANIFEST
        try:
            manifest = read_json(path)
        except UserError as error:
            raise DamagedManifestError(str(error)) from None
        if FINGERPRINT.fullmatch(self.path.name) and manifest.get("fingerprint") != self.path.name:
            raise UserError(f"{path}: {_of_another(manifest)}")
        return manifest

    @property
    def record(self) -> dict[str, Any]:
        """The manifest of a complete run, else begun.json. Raises UserError as these do."""
        return self.manifest if self.is_complete else self.begun

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that its result depends on."""
        return self.record["settings"]

    @property
    def inputs(self) -> dict[str, Any]:
        """Model, text or activations by hash of content, or by commit of the hub."""
        return self.record["inputs"]

    @property
    def numerics(self) -> dict[str, Any]:
        """Device, precision and libraries, which decide last bits."""
        return self.record["numerics"]

    @property
    def upstreams(self) -> list["Run"]:
        """The runs that it reads, beside it in the folder of runs; a directory may have been pruned since."""
        return upstreams(self.record, self.path.parents[1])

    @property
    def summary(self) -> dict[str, Any]:
        """The main figures of a complete run."""
        return self.manifest["summary"]

    @property
    def store_url(self) -> str | None:
        """Where a harvest's store lies, if not in the directory."""
        try:
            return (self.begun.get("store") or {}).get("url")
        except UserError:
            return None  # not begun, or damaged: then nothing says where it is

    def begin(self, identity: dict[str, Any], numerics: dict[str, Any], *, allow_mixed: bool) -> None:
        """Mark the directory as begun, or check that it can be resumed here.

        Raises UserError when it was begun under other numerics and `allow_mixed` is not set.
        """
        if not self.is_begun or (self.stage in MADE_ANEW and self.stage not in SHARED):
            begun = {**identity, "numerics": numerics, "begun": time.time(), "mixed_with": []}
            write_sealed(self.path / BEGUN, begun)
        else:
            self._compare(numerics, allow_mixed)

    def join(self, numerics: dict[str, Any], *, allow_mixed: bool, seconds: float) -> None:
        """What a worker beside the first does in place of `begin`: wait for that one's, and compare numerics.

        Raises UserError when there is none after so many seconds, and as `begin` does.
        """
        wait_until((self.path / BEGUN).exists, seconds, f"{self.path}: worker 0 has not begun it", self.stage)
        self._compare(numerics, allow_mixed)

    def _compare(self, numerics: dict[str, Any], allow_mixed: bool) -> None:
        with locked(self.path, "begun"):  # workers record theirs at the same time
            begun = self.begun
            if begun.get("fingerprint") != self.path.name:
                raise UserError(f"{self.path / BEGUN}: {_of_another(begun)}, or add --force to start anew here")
            before: dict[str, Any] = begun.get("numerics") or {}
            mixed = begun.get("mixed_with", [])
            changed = [key for key in sorted({*before, *numerics}) if before.get(key) != numerics.get(key)]
            if not changed or numerics in mixed:
                return
            if not allow_mixed:
                listed = "; ".join(f"{key}: {before.get(key)} then, {numerics.get(key)} now" for key in changed)
                raise UserError(
                    f"{self.path}: was begun under other numerics ({listed}), so the rest would differ in "
                    "its last bits; add --allow-mixed to go on all the same, or --force to start anew"
                )
            write_sealed(self.path / BEGUN, {**begun, "mixed_with": [*mixed, numerics]})

    def finish(self, summary: dict[str, Any]) -> None:
        """Write manifest.json: from here on the stage is complete."""
        begun, now = self.begun, time.time()
        manifest = {
            **begun,
            "finished": now,
            "wall_seconds": round(now - begun["begun"], 1),
            "versions": {"reasoning-sae": _commit(), "python": platform.python_version()}
            | {name: version(name) for name in LIBRARIES},
            "files": {
                str(path.relative_to(self.path)): {"bytes": path.stat().st_size, "crc32c": file_crc32c(path)}
                for path in self._results()
            },
            "summary": summary,
        }
        if self.stage in MADE_ANEW:
            manifest["weights"] = self._weights()
        write_sealed(self.path / MANIFEST, manifest)

    def _weights(self) -> dict[str, int] | None:
        """crc32c of each file of weights that it reads; None where no complete training run can be read."""
        run: Run = self
        try:
            while run.stage != "train":
                run = run.upstreams[0]
            files = run.manifest["files"]
            return {n: entry["crc32c"] for n, entry in files.items() if n.endswith(".safetensors")} or None
        except (UserError, LookupError, AttributeError, TypeError):  # pruned, unfinished, or of an earlier version
            return None

    @property
    def is_of_other_weights(self) -> bool:
        """Whether what it was made from was trained anew since, by other code or numerics, with other weights.

        Raises UserError as `manifest` does.
        """
        made_from = self.manifest.get("weights")
        return made_from is not None and self._weights() not in (None, made_from)

    def _results(self) -> list[Path]:
        passed = {folder for pattern in PASSED_OVER.get(self.stage, ()) for folder in self.path.glob(pattern)}
        if (self.path / "stream.json").exists():
            passed.add(self.path / STREAMED)
        found = []
        for folder, inner, names in os.walk(self.path):
            here = Path(folder)
            inner[:] = [name for name in inner if here / name not in passed and not _holds_chunks(here, name)]
            found += [here / name for name in names if here != self.path or name not in NO_RESULTS]
        return sorted(p for p in found if not p.name.startswith(".") and p.is_file() and not p.is_symlink())

    def changed(self, largest: int | None = None, only: str | None = None) -> list[str]:
        """Names of listed files (or of `only` this one) that are missing or not as they were written.

        Of files of more than `largest` bytes only the size is looked at. Raises UserError as `manifest` does.
        """
        listed = self.manifest.get("files")
        entries = listed if isinstance(listed, dict) else {}
        names = [n for n in entries if only in (None, n) and not Path(n).is_absolute() and ".." not in Path(n).parts]
        if (self.path / "stream.json").exists():  # training marks what it has read
            names = [name for name in names if not name.startswith(f"{STREAMED}/")]
        return [name for name in names if not _is_as_listed(self.path / name, entries[name], largest)]

    def missing(self) -> list[str]:
        """What a look of milliseconds finds missing or changed; it reads the small files alone."""
        look = MISSING.get(self.stage)
        return self.changed(SMALL_BYTES) + (look(self.path) if look else [])

    def damaged(self) -> list[str]:
        """What reading every byte finds missing or changed, rows of a store excepted."""
        read = DAMAGED.get(self.stage)
        return self.changed() + (read(self.path) if read else [])

    def check(self, *, read: bool = True) -> None:
        """Compare the listed files with the manifest; without `read`, as `missing` does.

        Rows and contexts are held against their own checksums when they are read. Raises UserError that names a
        file and the way out.
        """
        try:
            changed = self.changed() if read else self.missing()
        except DamagedManifestError as error:
            keeps = "makes it anew" if self.stage in ("sample", *MADE_ANEW) else "keeps what is whole"
            raise UserError(f"{error}: delete it and run {self.stage} again, which {keeps}") from None
        if read:  # readers know what to do about shards that are not there
            changed = [name for name in changed if not RECORD.fullmatch(name) or (self.path / name).exists()]
        if changed:
            raise UserError(f"{self.said(changed)}; restore it, or {self.way_out}")

    def said(self, changed: Sequence[str]) -> str:
        """Changed files in a few words: the first, and how many more."""
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return f"{self.path / changed[0]}: missing, or changed since the stage ended{more}"

    @property
    def way_out(self) -> str:
        """The command that makes anew what is missing or damaged."""
        return {
            "harvest": "`make verify`, then `make harvest` writes just that anew",
            "evaluate": "`make eval` makes all of it anew",
            **{name: f"`make {name}` makes it anew, from the answers that it has" for name in ("explain", "benchmark")},
        }.get(self.stage, f"`python -m pipeline {self.stage} --force` makes them anew")


def upstreams(record: dict[str, Any], root: Path) -> list[Run]:
    """The runs below `root` that a begun.json or manifest names; those of earlier versions name one as `upstream`."""
    named = record.get("upstreams") or [record.get("upstream")]
    return [Run(root / Path(name).parent.name / Path(name).name) for name in named if isinstance(name, str)]


def _of_another(record: dict[str, Any]) -> str:
    return f"is that of the run {record.get('fingerprint')}; move that run back to the directory of its name"


def _is_as_listed(path: Path, entry: Any, largest: int | None) -> bool:
    if not path.is_file():
        return False
    if isinstance(entry, int):  # of an earlier version
        return file_crc32c(path) == entry
    if not isinstance(entry, dict) or (size := path.stat().st_size) != entry.get("bytes"):
        return False
    return (largest is not None and size > largest) or file_crc32c(path) == entry.get("crc32c")


def _holds_chunks(array: Path, name: str) -> bool:
    """Whether a folder holds the chunks of a Zarr array; a hook may be called c as well, and has its own zarr.json."""
    return name.startswith(".") or (
        name == "c" and (array / "zarr.json").exists() and not (array / name / "zarr.json").exists()
    )


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
