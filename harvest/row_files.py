"""The files of a store's rows, looked at without zarr and torch: which are missing or of another size."""

import os
from pathlib import Path
from typing import Any

from harvest.files import UserError, read_json

MANY = 1000  # shards; of more, the sizes of their files are left to `make verify`


def missing_rows(directory: Path) -> list[str]:
    """Files of a harvest's recorded shards that are missing or of another size, relative to its directory.

    A stream's are left out, as it deletes them; a store in a bucket has none here.
    """
    store, found = directory / "store", []
    if (directory / "stream.json").exists():
        return []
    for split in ("train", "holdout"):
        records = sorted((store / split / "shards").glob("*.json"))
        if len(records) > MANY:
            for chunks in (store / split).glob("*/*/c"):
                there = set(os.listdir(chunks))
                shards = (str(int(record.stem)) for record in records if record.stem.isdigit())
                found += [f"store/{chunks.relative_to(store)}/{shard}" for shard in shards if shard not in there]
            continue
        for record in records:
            try:
                files: Any = read_json(record).get("files")
            except UserError:
                continue  # the manifest says so
            for name, file in files.items() if isinstance(files, dict) else ():
                path = store / name
                if not path.is_file() or path.stat().st_size != file.get("bytes"):
                    found.append(f"store/{name}")
    return found
