"""The forms in which a store holds rows: which arrays, and how rows of bfloat16 become those and come back.

    bf16        acts: their bits
    bf16-zstd   acts: their bits, compressed (blosc: bytes shuffled, then zstd), for disks behind a network
    int8        acts_q and acts_scale: a block of 64 values of a row is q x scale, q int8, scale float16

Every form has a NaN for fill value in the array that guards it, so that a chunk which is not there is no row.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from harvest.files import UserError

FORMS = ("bf16", "bf16-zstd", "int8")
FILL = 0x7FC0  # bfloat16 NaN
BLOCK = 64  # values that share a scale
_PASS = 1 << 16  # values dequantized at a time: they stay in the processor's cache
_LARGEST = 127


class RowArray(NamedTuple):
    """A two-dimensional array of a hook: a row of it for each row of activations."""

    dtype: str
    columns: int
    fill: float
    compressed: bool = False


def row_arrays(form: str, d_in: int) -> Mapping[str, RowArray]:
    """The arrays of a hook by name."""
    if form == "int8":
        return {
            "acts_q": RowArray("int8", d_in, 0),
            "acts_scale": RowArray("float16", -(-d_in // BLOCK), float("nan")),
        }
    return {"acts": RowArray("uint16", d_in, FILL, compressed=form == "bf16-zstd")}


def as_stored(form: str, bits: np.ndarray) -> tuple[np.ndarray, ...]:
    """bfloat16 bits, uint16 (rows, d_in) -> a value for each of `row_arrays`, in its order.

    Raises UserError as `quantized` does.
    """
    return quantized(bits) if form == "int8" else (bits,)


def room(form: str, out: np.ndarray) -> tuple[np.ndarray, ...]:
    """Memory to read each of `row_arrays` into, for rows that end up in `out`, uint16 (rows, d_in)."""
    if form != "int8":
        return (out,)
    return tuple(np.empty((len(out), array.columns), array.dtype) for array in row_arrays(form, out.shape[1]).values())


def from_stored(form: str, parts: tuple[np.ndarray, ...], out: np.ndarray) -> None:
    """What was read into `room` -> bfloat16 bits, uint16 (rows, d_in), in `out`."""
    if form == "int8":
        q, scale = parts
        dequantize(q, scale, out)


def quantized(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 bits (rows, d_in) -> q int8 (rows, d_in) and scale float16 (rows, blocks).

    scale = largest magnitude of the block / 127, q = x / scale rounded to the nearest. Raises UserError for
    values that a float16 scale cannot reach.
    """
    rows, d_in = bits.shape
    q = np.empty((rows, d_in), np.int8)
    scale = np.empty((rows, -(-d_in // BLOCK)), np.float16)
    for first in range(0, rows, max(1, _PASS // d_in)):
        here = slice(first, first + max(1, _PASS // d_in))
        x = np.zeros((len(bits[here]), scale.shape[1] * BLOCK), np.float32)
        x[:, :d_in] = (bits[here].astype(np.uint32) << 16).view(np.float32)
        x = x.reshape(len(x), -1, BLOCK)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            scale[here] = np.abs(x).max(2) / _LARGEST
            x /= scale[here, :, None]
        if np.isinf(scale[here]).any():
            raise UserError(
                "harvest.stored (or ingest.stored): int8: activations above 8 million do not fit its scales; use bf16"
            )
        x = np.nan_to_num(x, copy=False, nan=0).clip(-_LARGEST, _LARGEST)
        q[here] = np.rint(x).reshape(len(x), -1)[:, :d_in]
    return q, scale


def dequantize(q: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """q int8 (rows, d_in) x scale float16 (rows, blocks) -> bfloat16 bits, rounded to even, into `out`.

    A NaN scale gives NaNs.
    """
    d_in = q.shape[1]
    for first in range(0, len(q), max(1, _PASS // d_in)):
        here = slice(first, first + max(1, _PASS // d_in))
        scales = np.repeat(scale[here].astype(np.float32), BLOCK, 1)[:, :d_in]
        bits = np.multiply(q[here], scales, dtype=np.float32).view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        np.right_shift(rounded, 16, out=out[here], casting="unsafe")
