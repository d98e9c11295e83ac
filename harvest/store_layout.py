"""Shape of a store: its splits, hooks, shards and chunks, and the Zarr arrays that follow from them."""

from typing import NamedTuple

from harvest.array_files import StoredArray
from harvest.files import UserError
from harvest.stored_forms import row_arrays

SPLITS: tuple[str, ...] = ("train", "holdout")
PROVENANCE = {"token_id": "uint32", "context": "uint32", "position": "uint16"}


class Geometry(NamedTuple):
    """Shapes of a store, fixed before the first row is written."""

    hooks: tuple[str, ...]
    d_in: int
    context_size: int  # tokens
    shard_contexts: int
    chunk_rows: int
    train_shards: int
    holdout_shards: int
    stored: str = "bf16"  # form of the rows (harvest/stored_forms.py)

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return self.shard_contexts * self.context_size

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a shard."""
        return self.shard_rows // self.chunk_rows

    def shards(self, split: str) -> int:
        """Shards of a split, "train" or "holdout"."""
        return self.train_shards if split == "train" else self.holdout_shards


def slug(hook: str) -> str:
    """Folder name of a hook: its letters, digits, dots and dashes; never one that leaves its folder.

    Raises UserError for a hook of which no name is left, or one that the store needs itself.
    """
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in hook).strip(".")
    if not name or name.startswith("__") or name in ("row", "shards") or len(name) > 200:
        raise UserError(f"harvest.hooks: {hook!r} cannot be a folder's name")
    return name


def stored_arrays(g: Geometry, split: str) -> dict[str, StoredArray]:
    """All arrays of a split by their path in it, in the order in which a shard's files are written.

    Raises UserError for hooks that would share a folder.
    """
    rows = g.shards(split) * g.shard_rows
    out = {}

    def add(name: str, dtype: str, fill: float) -> None:
        out[name] = StoredArray(f"{split}/{name}", dtype, fill, rows, None, g.shard_rows, g.shard_rows)

    for hook in g.hooks:
        for name, form in row_arrays(g.stored, g.d_in).items():
            path = f"{slug(hook)}/{name}"
            if path in out:
                raise UserError(f"harvest.hooks: {hook!r}: another hook has the same folder, {slug(hook)}")
            out[path] = StoredArray(
                f"{split}/{path}",
                form.dtype,
                form.fill,
                rows,
                form.columns,
                g.shard_rows,
                g.chunk_rows,
                form.compressed,
            )
        add(f"{slug(hook)}/norm", "float32", float("nan"))
    for name, dtype in PROVENANCE.items():
        add(f"row/{name}", dtype, 0)
    return out
