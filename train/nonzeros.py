"""The non-zeros of a batch's features, and the gathers over them that a sparse step is made of, in plain torch.

`train.kernels.TRITON` is the CUDA twin of `PLAIN`. On a CPU operands are float32: caches bound these gathers, so a
smaller product type gains nothing. Every sum has one owner and a fixed order.

Shape suffixes: B rows of a batch, D d_in, F d_sae, N non-zeros.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class ByRow(NamedTuple):
    """Active features in CSR: row b owns entries offset_B[b] to offset_B[b + 1], by ascending feature."""

    offset_B: Tensor  # int32 (B + 1,)
    feature_N: Tensor  # int32 (N,)
    f_N: Tensor  # float32 (N,), positive


class ByFeature(NamedTuple):
    """The same entries in CSC: feature i owns entries offset_F[i] to offset_F[i + 1], by ascending row."""

    offset_F: Tensor  # int32 (F + 1,)
    row_N: Tensor  # int32 (N,)
    order_N: Tensor  # int64 (N,), the entry's place in ByRow


class Operations(NamedTuple):
    """What the step asks of a device: `PLAIN` below states each."""

    extract: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    residual: Callable[[ByRow, Tensor, Tensor, Tensor], Tensor]
    row_dots: Callable[[ByRow, Tensor, Tensor], Tensor]
    decoder_sums: Callable[[ByFeature, Tensor, Tensor, Tensor, Tensor], Tensor]
    encoder_sums: Callable[[ByFeature, Tensor, Tensor], Tensor]


def by_feature(active: ByRow, d_sae: int) -> ByFeature:
    """The transpose of the pattern; the sort is stable, so rows ascend within a feature."""
    device = active.feature_N.device
    feature_N, order_N = torch.sort(active.feature_N, stable=True)
    features = torch.arange(d_sae + 1, dtype=torch.int32, device=device)
    rows = torch.arange(len(active.offset_B) - 1, dtype=torch.int32, device=device)
    row_N = rows.repeat_interleave(active.offset_B.diff(), output_size=len(order_N))
    return ByFeature(torch.searchsorted(feature_N, features, out_int32=True), row_N[order_N], order_N)


def extract(pre_BF: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ReLU(pre + b_enc): the positive entries of each row (B,), their features int32 and values (N,)."""
    F = pre_BF.shape[1]
    # Not `pre > -b`: a NaN has to reach the loss, where the trainer looks for it.
    active_BF = (pre_BF <= -b_enc).logical_not_()
    place_N = active_BF.view(-1).nonzero().squeeze(1)
    row_N = place_N // F
    feature_N = place_N - row_N * F
    f_N = pre_BF.view(-1)[place_N].float() + b_enc[feature_N]
    return torch.bincount(row_N, minlength=len(pre_BF)), feature_N.int(), f_N


def residual(active: ByRow, W_dec: Tensor, b_dec: Tensor, x_BD: Tensor) -> Tensor:
    """x̂ − x (B, D), float32."""
    return bag_sums(active.offset_B, active.feature_N, active.f_N, W_dec).add_(b_dec).sub_(x_BD)


def row_dots(active: ByRow, error_BD: Tensor, W_dec: Tensor) -> Tensor:
    """e_b · W_dec,i for each entry (b, i), float32 (N,)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        shape = (len(error_BD), len(W_dec))
        pattern = torch.sparse_csr_tensor(*active, size=shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, error_BD, W_dec.t(), beta=0.0).values()


def decoder_sums(by: ByFeature, f_N: Tensor, error_BD: Tensor, W_dec: Tensor, scale_F: Tensor) -> Tensor:
    """Σ_b f_bi e_b + scale_i W_dec,i for each feature i (F, D), float32; f_N in the order of `by`."""
    return bag_sums(by.offset_F, by.row_N, f_N, error_BD).addcmul_(W_dec, scale_F.unsqueeze(1))


def encoder_sums(by: ByFeature, df_N: Tensor, x_BD: Tensor) -> Tensor:
    """Σ_b df_bi x_b for each feature i, as columns (D, F), contiguous float32; df_N in the order of `by`."""
    return bag_sums(by.offset_F, by.row_N, df_N, x_BD).t().contiguous()


def bag_sums(offset: Tensor, index_N: Tensor, weight_N: Tensor, table: Tensor) -> Tensor:
    """Weighted sums of rows of a table (rows, D), one for each span of offsets, (spans, D).

    Two to three times as fast as MKL's sparse product.
    """
    return embedding_bag(index_N, table, offset, mode="sum", per_sample_weights=weight_N, include_last_offset=True)


PLAIN = Operations(extract, residual, row_dots, decoder_sums, encoder_sums)
