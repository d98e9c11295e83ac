"""Activations that somebody else has written: .npy, .safetensors, .pt, a data set of `datasets` on disk.

Everything is mapped, nothing is loaded before it is read, and a header's word is held against the file's
size. Files are strangers': no pickled code is run, whatever the suffix.
"""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harvest.files import UserError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_PICKLE_BYTES = 64 << 20  # of a .pt file's table of tensors, without their values
UNNAMED = ""  # the array of a file that names none


class Array(NamedTuple):
    """An array in a file: `read` gives its entries from one index to another along the first axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str where torch has no such type
    read: Callable[[int, int], Tensor]

    @property
    def is_float(self) -> bool:
        """Of a type that activations may have."""
        return self.dtype in FLOATS

    @property
    def is_integer(self) -> bool:
        """Of whole numbers, as token ids are."""
        return isinstance(self.dtype, torch.dtype) and not (self.dtype.is_floating_point or self.dtype.is_complex)


def open_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a file by name; a lone one without a name is `UNNAMED`.

    Raises UserError for a file that is empty, damaged, shorter than its header says, or holds code.
    """
    opener = _open_data_set if path.is_dir() else OPENERS[path.suffix]
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: empty; leave it out, or write it again")
    try:
        return opener(path)
    except UserError:
        raise
    except Exception as error:  # readers of damaged or hostile bytes raise whatever they stumble over
        if isinstance(error, PermissionError):
            raise
        first = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{path}: damaged, or cut short ({type(error).__name__}: {first}); write it again") from None


def _open_npy(path: Path) -> dict[str, Array]:
    # "c" never writes to the file; torch warns of arrays that are read only.
    with np.errstate(over="raise"):  # of the size that a header announces
        mapped = np.lib.format.open_memmap(path, mode="c")
    size, wanted = path.stat().st_size, int(mapped.offset) + mapped.nbytes
    if size != wanted:
        raise UserError(f"{path}: {size:,} bytes, its header speaks of {wanted:,}; it was cut short or damaged")
    if not mapped.flags.c_contiguous:
        raise UserError(f"{path}: its columns lie end to end (fortran_order); save np.ascontiguousarray of it")
    if mapped.dtype == np.dtype("V2"):  # what numpy makes of ml_dtypes' bfloat16
        bits = mapped.view(np.uint16)
        return {
            UNNAMED: Array(bits.shape, torch.bfloat16, lambda a, b: torch.from_numpy(bits[a:b]).view(torch.bfloat16))
        }
    try:
        dtype: torch.dtype | str = torch.from_numpy(np.empty(0, mapped.dtype)).dtype
    except (TypeError, ValueError):
        dtype = str(mapped.dtype)
    return {UNNAMED: Array(mapped.shape, dtype, lambda a, b: torch.from_numpy(mapped[a:b]))}


def _open_safetensors(path: Path) -> dict[str, Array]:
    from safetensors import safe_open

    opened: Any = safe_open(path, "pt")  # checks its header against the file's size

    def array(name: str) -> Array:
        part = opened.get_slice(name)
        shape = tuple(part.get_shape())
        dtype = part[0:0].dtype if shape else "scalar"
        return Array(shape, dtype, lambda a, b: part[a:b])

    return {name: array(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)


def _open_pt(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        raise UserError(
            f"{path}: cut short, or written by a torch before 1.6; load it there and torch.save it again"
        ) from None
    packed = [m for m in members if m.compress_type != zipfile.ZIP_STORED or m.file_size > path.stat().st_size]
    if packed or any(m.file_size > MAX_PICKLE_BYTES for m in members if m.filename.endswith("data.pkl")):
        raise UserError(f"{path}: not as torch.save writes it (compressed, or sizes that do not fit the file's)")
    try:
        loaded: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors (classes or code, which are never run); save a tensor or a dict of them"
        ) from None
    if isinstance(loaded, Tensor):
        loaded = {UNNAMED: loaded}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}; save a tensor, or a dict of tensors")
    return {str(name): _tensor(path, name, t.detach()) for name, t in loaded.items() if isinstance(t, Tensor)}


def _tensor(path: Path, name: Any, tensor: Tensor) -> Array:
    size = tensor.numel() * tensor.element_size()
    if tensor.layout != torch.strided or not tensor.is_contiguous() or size > path.stat().st_size:
        raise UserError(
            f"{path}: {name!r} of shape {tuple(tensor.shape)}: {size:,} bytes that are not laid out in the file one by "
            "one (sparse, expanded or transposed); save its .to_dense().clone().contiguous()"
        )
    return Array(tuple(tensor.shape), tensor.dtype, lambda a, b: tensor[a:b])


def _open_data_set(path: Path) -> dict[str, Array]:
    """Columns of fixed shape of a folder that `save_to_disk` wrote, as SAELens' cache_activations_runner does."""
    import datasets

    datasets.disable_progress_bars()
    data: Any = datasets.load_from_disk(str(path))
    numbers = data.with_format("torch")

    def array(name: str, feature: Any) -> Array | None:
        shape: list[int] = []
        while (length := getattr(feature, "length", None)) is not None and length >= 0:
            shape.append(length)
            feature = feature.feature
        if hasattr(feature, "shape"):  # Array2D, Array3D, ...
            shape += feature.shape
        dtype = getattr(feature, "dtype", None)
        if not isinstance(dtype, str) or not hasattr(torch, dtype) or "list" in dtype:
            return None
        target = getattr(torch, dtype)

        def read(start: int, stop: int) -> Tensor:
            return torch.as_tensor(numbers.select_columns([name])[start:stop][name]).to(target)

        return Array((len(data), *shape), target, read)

    found = {name: array(name, feature) for name, feature in data.features.items()}
    return {name: value for name, value in found.items() if value}


OPENERS: dict[str, Callable[[Path], dict[str, Array]]] = {
    ".npy": _open_npy,
    ".safetensors": _open_safetensors,
    ".pt": _open_pt,
    ".pth": _open_pt,
}
