"""Which files a local source is: a file, a folder's, or a glob's; which of them its split takes; which hold no data."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from harvest.config import Source
from harvest.files import UserError, read_json

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")  # of JSON
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # of `datasets.save_to_disk`, with the names of its files
NO_DATA = (SAVED, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json", "sae_lens.json")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
RUNS_MEMORY = ".inputs.json"  # of a folder of runs; hidden, and so passed over and named


class LocalFiles(NamedTuple):
    """The data files of a source, in order of their paths, and what lies beside them and holds no data."""

    files: list[Path]
    passed_over: list[Path]


def kind_of(path: Path) -> str | None:
    """What a file's name says it holds: json, parquet or arrow; None for anything else."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return "json" if KINDS.get(suffixes[0]) == "json" else None
    return KINDS.get(suffixes[-1]) if suffixes else None


def looks_local(name: str) -> bool:
    """A path rather than a hub id, which is `owner/name`."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "assets/", "data/"))
    return not is_id or kind_of(Path(name)) is not None


def is_local(name: str) -> bool:
    """Whether a source is files of this machine: what exists is never taken for a hub id."""
    return looks_local(name) or Path(name).expanduser().exists()


def find_files(source: Source, setting: str) -> LocalFiles:
    """The files of a local source, of its split if they are of several; `setting` is its place in the settings.

    Raises UserError when there are none, or when it is not clear which are meant.
    """
    where = f"{setting}.path: {source.path!r}"
    for name in ("subset", "revision"):
        if (value := getattr(source, name)) is not None:
            raise UserError(
                f"{setting}.{name}: {value!r}: is for data sets of the hub, and path is local; leave it out, "
                f"or set {setting}.{name}=null"
            )
    root = Path(source.path).expanduser()
    found = LocalFiles([root] if kind_of(root) else [], []) if root.is_file() else _below(root)
    if not found.files and root.is_file():
        raise UserError(
            f"{where}: neither .jsonl, .json (or one of them as .gz, .zst, .bz2, .xz), .parquet nor .arrow; plain text "
            'goes into a .jsonl file, one {"text": "..."} a line, with rows: text'
        )
    if not found.files:
        raise UserError(f"{where}: no .jsonl, .json, .parquet or .arrow file there")
    kinds = {kind_of(path): path.name for path in found.files}
    if len(kinds) > 1:
        what, names = " and ".join(map(str, kinds)), " and ".join(kinds.values())
        raise UserError(f"{where}: {what} files side by side ({names}); point at one kind of them")
    return LocalFiles(_of_split(source, root, found.files, setting), found.passed_over)


def nearest_hint(name: str, also: list[str]) -> str:
    """What a missing path may have meant, as the end of a sentence; `also` may be meant too."""
    path = Path(name).expanduser()
    if not name or path.exists():
        return ""
    if path.is_symlink():
        return "; it is a link to a file that is not there"
    beside = [str(path) for path in Path(name).parent.glob("*")]
    close = difflib.get_close_matches(name, [*also, *beside], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _below(root: Path) -> LocalFiles:
    """Data files of a folder, or of a pattern."""
    fixed = _fixed(root)
    if root.is_dir():
        found: Iterator[Path] = _walked(root)
    else:
        found = fixed.glob(str(root.relative_to(fixed))) if root != fixed else iter(())
    paths = sorted(path for path in found if path.is_file())
    saved = {folder: _saved_names(folder) for folder in {path.parent for path in paths}}
    files, passed_over = [], []
    for path in paths:
        kind, names = kind_of(path), saved[path.parent]
        if not kind or (names and path.name in NO_DATA):
            continue
        hidden = any(part.startswith(".") for part in path.relative_to(fixed).parts)
        leftover = path.name in NO_DATA or re.fullmatch(r"cache-.*\.arrow", path.name)
        is_data = path.name in names if names else not hidden and not leftover
        (files if is_data else passed_over).append(path)
    return LocalFiles(files, passed_over)


def _walked(root: Path) -> Iterator[Path]:
    """All files below a folder, also behind links to folders, each folder once."""
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:
            subfolders.clear()
            continue
        seen.add(here)
        if RUNS_MEMORY in names:  # our own results: new files at every start
            subfolders.clear()
            names = [RUNS_MEMORY]
        yield from (Path(folder, name) for name in names)


def _fixed(root: Path) -> Path:
    """The part of a pattern without wildcards; a folder that exists is taken as it is."""
    if root.is_dir():
        return root
    parts = list(root.parts)
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return Path(*parts[:first])


def _saved_names(folder: Path) -> set[str]:
    """Names of the files of a data set that `datasets` saved in a folder; none where it saved nothing."""
    try:
        names = {entry["filename"] for entry in read_json(folder / SAVED)["_data_files"]}
    except (UserError, KeyError, TypeError):
        return set()
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise UserError(f"{folder / SAVED} names {missing[0]}, which is not there; the folder is half copied")
    return names


def _of_split(source: Source, root: Path, files: list[Path], setting: str) -> list[Path]:
    """The files that a source's split takes."""
    fixed = root.parent if root.is_file() else _fixed(root)
    split_of = {path: _split_of(path, fixed) for path in files}
    named = sorted({split for split in split_of.values() if split})
    if "split" not in source.model_fields_set:
        if len(named) > 1:
            raise UserError(
                f"{setting}.split: {source.path!r} has files of the splits {', '.join(named[:-1])} and {named[-1]}; "
                f"name the one to read, or several as {'+'.join(named[:2])}"
            )
        if named and named != ["train"] and None in split_of.values():
            other = next(path for path, split in split_of.items() if split is None)
            raise UserError(
                f"{setting}.split: {source.path!r} has files of the split {named[0]} beside others ({other.name}); set "
                f"split: {named[0]}, or point path at the files that you mean"
            )
        return files
    asked = {typed: typed if typed in named else SPLITS.get(typed, typed) for typed in source.split.split("+")}
    if missing := [typed for typed, name in asked.items() if name not in named]:
        there = f"there are {', '.join(named)}" if named else "the files are of no split; leave it out"
        raise UserError(f"{setting}.split: {missing[0]!r}: {source.path!r} has no such files; {there}")
    return [path for path in files if split_of[path] in asked.values()]


def _split_of(path: Path, root: Path) -> str | None:
    """The split that a file's folders or its name give; None where they give none."""
    if (root / SAVED_SPLITS).is_file():
        return path.relative_to(root).parts[0]
    for part in path.relative_to(root).parts:
        words = re.split(r"[^a-z]+", part.lower())
        if split := next((SPLITS[word] for word in words if word in SPLITS), None):
            return split
    return None
