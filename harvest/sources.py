"""Where text comes from: local JSON Lines and parquet, or data sets of the hub, opened by `datasets`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harvest.config import Source
from harvest.files import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".parquet")


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


def open_source(source: Source, commit: str | None, offline: bool) -> "Dataset":
    """All rows of a source. `commit` pins a hub data set; local ones have none.

    Raises UserError that names the setting when the data cannot be had or read.
    """
    import datasets
    from datasets import config as datasets_config
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    datasets.disable_progress_bars()
    where = f"sample.sources ({source.name}).path: {source.path!r}"
    files = local_files(source.path)
    if files:
        kinds = {"parquet" if path.suffix == ".parquet" else "json" for path in files}
        if len(kinds) > 1:
            raise UserError(f"{where}: JSON and parquet files side by side; point at one of them")
        builder, options = kinds.pop(), {"data_files": [str(path) for path in files], "split": "train"}
    else:
        builder, options = source.path, {"name": source.subset, "revision": commit, "split": source.split}
        if offline:
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
    except (ConnectionError, TimeoutError) as error:
        raise UserError(f"{where}: the hub cannot be reached and its cache lacks it: {_first_line(error)}") from None
    except (DatasetGenerationError, FileNotFoundError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{where}: cannot be read as {builder}: {_first_line(cause)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
