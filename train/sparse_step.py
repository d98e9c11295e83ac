"""The step of `train.dense_step` from the non-zeros only: one dense product instead of five, the same gradients.

ReLU leaves some 30 to 300 of thousands of features active in a row, and the gradient of every weight is
a sum over those active entries alone. So only the encoder product is dense; its positive entries become
a CSR matrix, and decode, residual, df, dW_dec and dW_enc gather rows of W_dec, x and the residual.
Nothing is approximated or dropped, and nothing is padded to the longest row.

Time grows with L0, so `dense_step` is faster while L0 is high. Memory: one block of pre-activations and
some 40 bytes a non-zero, never a (B, F) or (N, D) array on the CPU. Every sum has one owner and a fixed
order (no atomics): equal inputs and threads give equal bytes.

On CUDA (from Ampere on) the gathers are the Triton kernels of `train.kernels`, from operands in
compute_dtype, elsewhere the plain functions of `train.nonzeros`, in float32.

Shape suffixes: B rows of a batch, D d_in, F d_sae, N non-zeros.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from harvest.device import is_ampere
from train.nonzeros import PLAIN, ByRow, Operations, by_feature
from train.sae import Sae
from train.step import Reconstruction, StepResult, SumOverRanks, Tensors, result

# Rows of one encoder product on the CPU. The block is read again right after it is written, which wants
# it in cache (19 MB at d_sae 9216); fewer rows make the product itself slower.
BLOCK_ROWS = 512


def sparse_step(
    sae: Sae,
    x_BD: Tensor,
    coefficients: Mapping[str, float],
    compute_dtype: torch.dtype,
    sum_over_ranks: SumOverRanks | None = None,
    operands: Tensors | None = None,
    operations: Operations | None = None,
) -> StepResult:
    """Gradients and figures of one batch of stored rows (B, D); `dense_step` up to rounding.

    compute_dtype is that of the encoder product and, on CUDA, of all gathered operands; sums and results
    are float32. operations is for tests: by default the device of x decides. Others as of `autograd_step`.
    Raises ValueError at 2³¹ or more non-zeros.
    """
    ops = operations or operations_for(x_BD.device)
    x_BD, weights, l1_coefficient = sae.scaled(x_BD), operands or sae.parameters, coefficients["l1"]
    B, norm_F, W_dec = x_BD.shape[0], sae.W_dec.norm(dim=1), _decoder(sae, weights, compute_dtype, ops)
    active = active_features(weights["W_enc"], sae.b_enc, x_BD, compute_dtype, ops)
    error_BD = residual(active, W_dec, sae.b_dec, x_BD, ops, sum_over_ranks)
    error = error_BD.to(W_dec.dtype)
    df_N = ops.row_dots(active, error, W_dec).mul_(2 / B)
    df_N.add_(norm_F[active.feature_N], alpha=l1_coefficient / B)

    by = by_feature(active, sae.d_sae)
    f_N, df_N = active.f_N[by.order_N], df_N[by.order_N]
    f_sum_F = torch.segment_reduce(f_N, "sum", offsets=by.offset_F)
    l1_scale_F = f_sum_F / norm_F.clamp_min(1e-30) * (l1_coefficient / B)
    gradients = {
        "W_enc": ops.encoder_sums(by, df_N, x_BD.to(W_dec.dtype)),
        "b_enc": torch.segment_reduce(df_N, "sum", offsets=by.offset_F),
        "W_dec": ops.decoder_sums(by, f_N.mul_(2 / B), error, sae.W_dec, l1_scale_F),
        "b_dec": error_BD.sum(0).mul_(2 / B),
    }
    return result(x_BD, error_BD, gradients, {"l1": f_sum_F @ norm_F / B}, by.offset_F.diff())


def sparse_reconstruction(
    sae: Sae,
    x_BD: Tensor,
    compute_dtype: torch.dtype,
    sum_over_ranks: SumOverRanks | None = None,
    operands: Tensors | None = None,
) -> Reconstruction:
    """`dense_reconstruction` from the non-zeros: stored rows (B, D) rebuilt, without gradients."""
    ops = operations_for(x_BD.device)
    x_BD, weights = sae.scaled(x_BD), operands or sae.parameters
    active = active_features(weights["W_enc"], sae.b_enc, x_BD, compute_dtype, ops)
    W_dec = _decoder(sae, weights, compute_dtype, ops)
    error_BD = residual(active, W_dec, sae.b_dec, x_BD, ops, sum_over_ranks)
    l1_N = active.f_N * sae.W_dec.norm(dim=1)[active.feature_N]
    l1_B = torch.segment_reduce(l1_N, "sum", offsets=active.offset_B)
    return Reconstruction(error_BD, {"mse": error_BD.square().sum(1), "l1": l1_B}, active.offset_B.diff())


def _decoder(sae: Sae, weights: Tensors, compute_dtype: torch.dtype, ops: Operations) -> Tensor:
    # In compute_dtype on CUDA, else in float32.
    return sae.W_dec if ops is PLAIN else weights["W_dec"].to(compute_dtype)


def residual(
    active: ByRow, W_dec: Tensor, b_dec: Tensor, x_BD: Tensor, ops: Operations, sum_over_ranks: SumOverRanks | None
) -> Tensor:
    """x̂ − x (B, D), float32, of all ranks' features."""
    if not sum_over_ranks:
        return ops.residual(active, W_dec, b_dec, x_BD)
    x_hat_BD = sum_over_ranks(ops.residual(active, W_dec, torch.zeros_like(b_dec), torch.zeros_like(x_BD)))
    return x_hat_BD.add_(b_dec).sub_(x_BD)


def operations_for(device: torch.device) -> Operations:
    """The Triton kernels on CUDA from Ampere on, plain torch elsewhere (where triton need not be installed)."""
    if not is_ampere(device):
        return PLAIN
    from train.kernels import TRITON

    return TRITON


def active_features(W_enc: Tensor, b_enc: Tensor, x_BD: Tensor, compute_dtype: torch.dtype, ops: Operations) -> ByRow:
    """The positive entries of ReLU(x W_enc + b_enc), shapes as in `Sae`, of scaled rows; product in compute_dtype.

    Raises ValueError at 2³¹ or more of them: the places in them are int32.
    """
    B = x_BD.shape[0]
    # The kernels need no cache-sized blocks, and the host waits for each block's count.
    rows = min(B, BLOCK_ROWS) if ops is PLAIN else B
    W_enc, x_BD = W_enc.to(compute_dtype), x_BD.to(compute_dtype)
    # One block for all products: fresh pages for each cost the CPU more than the extraction does.
    block = torch.empty(rows, len(b_enc), dtype=compute_dtype, device=x_BD.device)
    parts = [ops.extract(torch.mm(x, W_enc, out=block[: len(x)]), b_enc) for x in x_BD.split(rows)]
    count_B, feature_N, f_N = (torch.cat(part) for part in zip(*parts, strict=True))
    if len(f_N) >= 2**31:
        raise ValueError(f"{len(f_N)} non-zeros in one batch: use the dense step, or a smaller batch")
    offset_B = torch.zeros(B + 1, dtype=torch.int32, device=x_BD.device)
    offset_B[1:] = count_B.cumsum(0)
    return ByRow(offset_B, feature_N, f_N)
