"""The folder that an export fills: what is in it, and that it is still what was exported."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harvest.files import UserError, file_crc32c, fsync_path, partial_name, read_json, write_sealed

MARKER, CARD = "export.json", "README.md"


@contextmanager
def new_export(folder: Path, about: dict[str, Any], force: bool) -> Iterator[Path]:
    """A partial folder to fill, which becomes `folder` when all is written; export.json holds `about` and its files.

    Raises UserError where `folder` holds anything: what the export did not write is never touched, an export only with
    `force`.
    """
    _check_free(folder, force)
    partial, old = partial_name(folder), folder.with_name(f".{folder.name}.old")
    for path in (partial, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        sums = {n: {"bytes": (partial / n).stat().st_size, "crc32c": file_crc32c(partial / n)} for n in _files(partial)}
        write_sealed(partial / MARKER, {"schema": 1, **about, "files": sums})
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync_path(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_marker(folder: Path) -> dict[str, Any]:
    """export.json of an export; its `files` have sizes and checksums, but for those of earlier versions, a list.

    Raises UserError for any other folder.
    """
    if not (folder / MARKER).exists():
        raise UserError(f"{folder}: not an export of this project (it has no {MARKER})")
    marker = read_json(folder / MARKER)
    if marker.get("schema") != 1 or not isinstance(marker.get("files"), list | dict):
        raise UserError(f"{folder / MARKER}: not the marker of an export of this project")
    return marker


def check_exported(folder: Path, marker: dict[str, Any]) -> None:
    """Hold the files of an export against its marker; the model card may have been edited.

    Raises UserError that names the first that is not what was exported, and for an export without checksums.
    """
    if not isinstance(marker["files"], dict):
        raise UserError(f"{folder / MARKER}: of an earlier version, without checksums; export anew with --force")
    for name, entry in marker["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: not a file of the export ({name}); export anew with --force")
        sizes = {"bytes": path.stat().st_size, "crc32c": file_crc32c(path)}
        if sizes != entry and (name != CARD or not sizes["bytes"]):
            raise UserError(f"{path}: has changed since it was exported (crc32c); export anew with --force")


def _check_free(folder: Path, force: bool) -> None:
    if folder.is_symlink() or folder.is_file():
        kind = "a link" if folder.is_symlink() else "a file"
        raise UserError(f"{folder}: is {kind}; choose the folder itself, or another one, with --to")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        marker = read_marker(folder)
    except UserError as error:
        raise UserError(f"{error}; nothing was written. Choose another folder with --to") from None
    if strange := sorted(set(_files(folder)) - {*marker["files"], MARKER}):
        raise UserError(f"{folder}: holds {strange[0]}, which is not of the export; choose another folder with --to")
    if not force:
        raise UserError(
            f"{folder}: holds an export already; --force writes it anew (a README.md that was edited is lost), "
            "--to chooses another folder"
        )


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
