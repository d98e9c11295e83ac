"""Where text comes from: local JSON Lines and parquet, or data sets of the hub, opened by `datasets`.

And where activations are that need no harvest: files of arrays, or a folder that `datasets` saved.
"""

import glob
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harvest.config import IngestConfig, Source
from harvest.files import UserError
from harvest.hub import hub_answers

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".parquet")
ARRAY_SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")


def local_files(path: str) -> list[Path]:
    """Data files of a local source: a file, a folder's, or a glob's, sorted; empty for anything else."""
    root = Path(path)
    if root.is_file():
        return [root] if root.suffix in SUFFIXES else []
    found: Iterator[Path] = root.rglob("*") if root.is_dir() else Path(root.anchor).glob(path.removeprefix(root.anchor))
    return sorted(p for p in found if p.is_file() and p.suffix in SUFFIXES)


def looks_local(name: str) -> bool:
    """A path rather than a hub id, which is `owner/name`."""
    return not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "assets/", "data/"))


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub cannot be reached or refuses, its HTTP library's own errors too."""
    # httpx or httpx2, by the version of huggingface_hub; no connection is an error of theirs, not an OSError.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError, OSError, ValueError, RuntimeError


def open_source(source: Source, commit: str | None, offline: bool) -> "Dataset":
    """All rows of a source. `commit` pins a hub data set; local ones have none.

    Raises UserError that names the setting when the data cannot be had or read.
    """
    import datasets
    from datasets import config as datasets_config
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises
    where = f"sample.sources ({source.name}).path: {source.path!r}"
    files = local_files(source.path)
    if files:
        kinds = {"parquet" if path.suffix == ".parquet" else "json" for path in files}
        if len(kinds) > 1:
            raise UserError(f"{where}: JSON and parquet files side by side; point at one of them")
        names = [glob.escape(str(path.absolute())) for path in files]  # `datasets` takes them for patterns
        builder, options = kinds.pop(), {"data_files": names, "split": "train"}
    else:
        builder, options = source.path, {"name": source.subset, "revision": commit, "split": source.split}
        if offline or not hub_answers():
            datasets_config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(builder, **options)
    except DatasetNotFoundError as error:
        if "gated" in str(error).lower():
            raise UserError(
                f"{where}: a gated data set: accept its terms at https://huggingface.co/datasets/{source.path}, "
                "then `hf auth login` or set HF_TOKEN"
            ) from None
        raise UserError(f"{where}: not on the hub at this revision, or private: {_first_line(error)}") from None
    except StopIteration:  # what `datasets` raises for files without a row
        raise UserError(f"{where}: holds no row") from None
    except (ConnectionError, TimeoutError):
        setting = "sample.runtime.offline is set" if offline else "the hub does not answer"
        raise UserError(
            f"{where}: not in the local cache, and {setting}; go online once, or point at local .jsonl or "
            ".parquet files of the same columns"
        ) from None
    except (DatasetGenerationError, FileNotFoundError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{where}: cannot be read as {builder}: {_first_line(cause)}") from None
    except Exception as error:
        if files or (isinstance(error, OSError) and error.errno):  # ours, or the disk's
            raise
        # The hub's client raises what its HTTP library does, which is none of Python's own errors.
        raise UserError(
            f"{where}: the hub failed to give it ({type(error).__name__}: {_first_line(error)}); the same command "
            "again goes on with what was fetched"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def ingest_files(config: IngestConfig) -> tuple[list[Path], list[Path]]:
    """Files (or a folder of `datasets`) of activations, and those of token ids, in order of their names.

    Raises UserError when there are none.
    """
    token_ids = _array_files("ingest.token_ids", config.token_ids) if config.token_ids else []
    inside = {path.resolve() for path in token_ids}
    activations = [path for path in _array_files("ingest.path", config.path) if path.resolve() not in inside]
    if not activations:
        raise UserError(f"ingest.path: {config.path!r}: holds nothing but the files of ingest.token_ids")
    return activations, token_ids


def files_within(path: Path) -> list[Path]:
    """The file itself; of a folder of `datasets`, the files that hold it."""
    return [path] if path.is_file() else sorted([*path.glob("*.arrow"), *path.glob("*.json")])


def _array_files(setting: str, name: str) -> list[Path]:
    root = Path(name)
    if not root.exists():
        raise UserError(f"{setting}: {name!r}: no such file or folder")
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        return [root]
    found = [root] if root.is_file() else sorted(path for path in root.iterdir() if path.is_file())
    arrays = [path for path in found if path.suffix in ARRAY_SUFFIXES]
    if not arrays:
        inner = " (a folder of several data sets: name one of them)" if (root / "dataset_dict.json").exists() else ""
        raise UserError(f"{setting}: {name!r}: no {', '.join(ARRAY_SUFFIXES)} file, and no saved data set{inner}")
    return arrays
