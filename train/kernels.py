"""Triton kernels for CUDA: the gathers of `train.nonzeros` (`PLAIN` there has their plain twins), and Adam.

Needs triton, so only the CUDA path imports this module. Configurations are fixed: autotuning would pick
other summation orders in other runs. Sums are float32 and none is shared between programs, so there are
no atomics and equal inputs give equal bytes. Rows and features of any length are walked in tiles; only
the last tile of each is masked.

`extract` counts before it writes, and its arrays are as long as the count: nothing can overflow. The
price is one wait of the host for that number, in every step.

Shape suffixes: B rows of a batch, D d_in, F d_sae, N non-zeros, T tiles of a row. Offsets into (B, F), (F, D) and
(D, F) are int64: 4096 × 524,288 passes 2³¹.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# Triton turns the numbers given for tl.constexpr parameters into constants itself.

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.nonzeros import POSITIVE, SMALLEST, ByFeature, ByRow, Entries, Operations, Rule, weight_of
from train.nonzeros import extract as plain_extract
from train.step import Tensors

AdamNumbers = tuple[float, tuple[float, float], int, Tensor, float]  # `train.adam.Update`, which imports this module

EXTRACT_TILE = 1024  # pre-activations of one program; a prefix sum over more costs more than the reading
MOST_GROUPS = 8192  # of a row, whose maxima one program holds
D_TILE = 1024  # columns of a gathered row
N_TILE = 4  # gathered rows in flight: an average feature of a wide SAE has about five entries in a batch
ADAM_TILE = 1024  # weights of one program
F_TILE = 8  # features that one program of encoder_sums writes side by side: 32 bytes, a full sector


def extract(pre_BF: Tensor, b_enc: Tensor, rule: Rule = POSITIVE, least: Tensor | None = None) -> Entries:
    """`train.nonzeros.extract`, shapes as there."""
    B, F = pre_BF.shape
    if not F:  # a rank without dead features
        return plain_extract(pre_BF, b_enc, rule, least)
    tiles = triton.cdiv(F, EXTRACT_TILE)
    count_BT = torch.empty(B, tiles, dtype=torch.int32, device=pre_BF.device)
    if rule.largest and least is None:
        least = least_of_rows(pre_BF, b_enc, weight_of(rule), rule.largest)
    # Where a tensor is not needed, another one stands in for its address.
    least_B = b_enc if least is None else least.clamp_min(SMALLEST).expand(B).contiguous()
    above_F, weight_F = (b_enc if given is None else given for given in (rule.above_F, rule.weight_F))
    which = {"ABOVE": rule.above_F is not None, "LEAST": least is not None, "TILE": EXTRACT_TILE}
    what = (pre_BF, b_enc, above_F, weight_F, least_B)
    count_kernel[(B, tiles)](*what, count_BT, F, **which)
    end_BT, count_B = count_BT.view(-1).cumsum(0), count_BT.sum(1)
    if rule.largest:
        numbers = torch.stack([end_BT[-1], count_B.clamp_max(rule.largest).sum(), count_B.amax()])
        N, kept, longest = numbers.tolist()
        kept = N if rule.of_batch else kept
    else:
        N, longest = int(end_BT[-1]), 0
        kept = N
    feature_N = torch.empty(N, dtype=torch.int32, device=pre_BF.device)
    f_N = torch.empty(N, dtype=torch.float32, device=pre_BF.device)
    extract_kernel[(B, tiles)](*what, count_BT, end_BT, feature_N, f_N, F, **which)
    return Entries(count_B, feature_N, f_N, kept, longest)


def least_of_rows(pre_BF: Tensor, b_enc: Tensor, weight_F: Tensor, k: int) -> Tensor:
    """`train.nonzeros.least_of_rows` (B,), with other groups."""
    B, F = pre_BF.shape
    groups = min(triton.next_power_of_2(max(16 * k, 1024)), MOST_GROUPS)
    if k > groups:
        return torch.zeros(B, device=pre_BF.device)
    least_B = torch.empty(B, dtype=torch.float32, device=pre_BF.device)
    least_kernel[(B,)](pre_BF, b_enc, weight_F, least_B, F, k, GROUPS=groups)
    return least_B


def residual(active: ByRow, W_dec: Tensor, b_dec: Tensor, x_BD: Tensor) -> Tensor:
    """x̂ − x (B, D), float32."""
    B, D = x_BD.shape
    error_BD = torch.empty_like(x_BD)
    d_tile = D_TILE // 2  # rows have many entries, so narrow tiles fill the GPU
    grid = (B, triton.cdiv(D, d_tile))
    residual_kernel[grid](*active, W_dec, b_dec, x_BD, error_BD, D, D_TILE=d_tile, N_TILE=N_TILE)
    return error_BD


def row_dots(active: ByRow, error_BD: Tensor, W_dec: Tensor) -> Tensor:
    """e_b · W_dec,i for each entry (b, i), float32 (N,)."""
    B, D = error_BD.shape
    dot_N = torch.empty_like(active.f_N)
    row_dots_kernel[(B,)](active.offset_B, active.feature_N, error_BD, W_dec, dot_N, D, D_TILE=D_TILE, N_TILE=N_TILE)
    return dot_N


def decoder_sums(
    by: ByFeature, f_N: Tensor, error_BD: Tensor, W_dec: Tensor | None = None, scale_F: Tensor | None = None
) -> Tensor:
    """Σ_b f_bi e_b + scale_i W_dec,i for each feature i (F, D), float32; f_N in the order of `by`."""
    F, D = len(by.offset_F) - 1, error_BD.shape[1]
    sum_FD = torch.empty(F, D, dtype=torch.float32, device=error_BD.device)
    scaled = scale_F is not None
    scale = (W_dec, scale_F) if scaled else (sum_FD, sum_FD)
    grid = (F, triton.cdiv(D, D_TILE))
    decoder_sums_kernel[grid](
        by.offset_F, by.row_N, f_N, error_BD, *scale, sum_FD, D, SCALED=scaled, D_TILE=D_TILE, N_TILE=N_TILE
    )
    return sum_FD


def encoder_sums(by: ByFeature, df_N: Tensor, x_BD: Tensor) -> Tensor:
    """Σ_b df_bi x_b for each feature i, as columns (D, F), contiguous float32; df_N in the order of `by`."""
    D, F = x_BD.shape[1], len(by.offset_F) - 1
    sum_DF = torch.empty(D, F, dtype=torch.float32, device=x_BD.device)
    d_tile = D_TILE // 4  # a program holds d_tile × F_TILE sums
    grid = (triton.cdiv(F, F_TILE), triton.cdiv(D, d_tile))
    encoder_sums_kernel[grid](
        by.offset_F, by.row_N, df_N, x_BD, sum_DF, D, F, D_TILE=d_tile, N_TILE=N_TILE, F_TILE=F_TILE
    )
    return sum_DF


def adam_update(
    parameters: Tensors,
    gradients: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    operands: Tensors,
    numbers: AdamNumbers,
) -> None:
    """`train.adam.plain_update` with one reading of every tensor; gradients stay as they are (shapes as there)."""
    lr, (beta1, beta2), step, divisor, eps = numbers
    corrections = 1 - beta1**step, (1 - beta2**step) ** 0.5
    rests = 1 - beta1, 1 - beta2  # from float64: 1 - 0.999 in float32 is off by 1.3e-5
    for name, weight in parameters.items():
        grid = (triton.cdiv(weight.numel(), ADAM_TILE),)
        adam_kernel[grid](
            weight, gradients[name], exp_avg[name], exp_avg_sq[name], operands[name],
            divisor, weight.numel(), lr, beta1, beta2, *rests, *corrections, eps,
            COPY=operands[name] is not weight, TILE=ADAM_TILE,
        )  # fmt: skip


TRITON = Operations(extract, least_of_rows, residual, row_dots, decoder_sums, encoder_sums)


@triton.jit
def activations(
    pre, bias, above, weight, least, row, column, F, ABOVE: tl.constexpr, LEAST: tl.constexpr
):  # fmt: skip
    """z and whether it counts as active, in one tile of a row. A NaN counts: it has to reach the loss."""
    inside = column < F
    z = tl.load(pre + row.to(tl.int64) * F + column, mask=inside, other=0.0).to(tl.float32)
    z += tl.load(bias + column, mask=inside, other=0.0)
    if LEAST:
        score = z * tl.load(weight + column, mask=inside, other=0.0)
        active = (score >= tl.load(least + row)) | (score != score)
    elif ABOVE:
        active = (z > tl.load(above + column, mask=inside, other=0.0)) | (z != z)
    else:
        active = (z > 0) | (z != z)
    return z, (inside & active).to(tl.int32)


@triton.jit
def count_kernel(
    pre, bias, above, weight, least, count, F, ABOVE: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """A program a row and tile of columns: its active features."""
    row, tile = tl.program_id(0), tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    _, active = activations(pre, bias, above, weight, least, row, column, F, ABOVE, LEAST)
    tl.store(count + row * tl.num_programs(1) + tile, tl.sum(active, 0))


@triton.jit
def extract_kernel(
    pre, bias, above, weight, least, count, end, feature, value, F,
    ABOVE: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program a row and tile of columns: its active features and their z, up to the place `end`."""
    row, tile = tl.program_id(0), tl.program_id(1)
    at = row * tl.num_programs(1) + tile
    found = tl.load(count + at)
    if found > 0:
        column = tile * TILE + tl.arange(0, TILE)
        z, active = activations(pre, bias, above, weight, least, row, column, F, ABOVE, LEAST)
        place = tl.load(end + at) - found + tl.cumsum(active, 0) - active
        tl.store(feature + place, column, mask=active != 0)
        tl.store(value + place, z, mask=active != 0)


@triton.jit
def least_kernel(pre, bias, weight, least, F, k, GROUPS: tl.constexpr):
    """A program a row: the k-th largest of its groups' maxima, bit by bit, as positive floats order like integers."""
    row = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    best = tl.zeros([GROUPS], tl.float32)
    for first in range(0, F, GROUPS):
        column = first + group
        inside = column < F
        z = tl.load(pre + row.to(tl.int64) * F + column, mask=inside, other=0.0).to(tl.float32)
        z += tl.load(bias + column, mask=inside, other=0.0)
        best = tl.maximum(best, z * tl.load(weight + column, mask=inside, other=0.0))
    bits = best.to(tl.int32, bitcast=True)
    found = 0
    for place in range(31):
        tried = found | (1 << (30 - place))
        found = tl.where(tl.sum((bits >= tried).to(tl.int32), 0) >= k, tried, found)
    tl.store(least + row, found.to(tl.float32, bitcast=True))


@triton.jit
def gathered(index, weight, table, begin, end, d, D, D_TILE: tl.constexpr, N_TILE: tl.constexpr):
    """Σ weight_n · table[index_n, d] over the entries begin to end, for one tile of columns d."""
    total = tl.zeros([D_TILE], tl.float32)
    for start in range(begin, end, N_TILE):
        for n in tl.static_range(N_TILE):  # one row a load: a tile of rows would be summed across threads
            inside = end > start + n
            i = tl.load(index + start + n, mask=inside, other=0).to(tl.int64)
            w = tl.load(weight + start + n, mask=inside, other=0.0)
            columns = tl.where(inside, D, 0)  # the interpreter cannot combine masks of a scalar and a vector
            total += w * tl.load(table + i * D + d, mask=d < columns, other=0.0).to(tl.float32)
    return total


@triton.jit
def residual_kernel(offset, feature, value, W_dec, b_dec, x, error, D, D_TILE: tl.constexpr, N_TILE: tl.constexpr):
    """A program a row and tile of columns: x̂ − x."""
    row = tl.program_id(0)
    d = tl.program_id(1) * D_TILE + tl.arange(0, D_TILE)
    begin, end = tl.load(offset + row), tl.load(offset + row + 1)
    total = gathered(feature, value, W_dec, begin, end, d, D, D_TILE, N_TILE)
    at = row.to(tl.int64) * D + d
    total += tl.load(b_dec + d, mask=d < D, other=0.0) - tl.load(x + at, mask=d < D, other=0.0)
    tl.store(error + at, total, mask=d < D)


@triton.jit
def row_dots_kernel(offset, feature, error, W_dec, dot, D, D_TILE: tl.constexpr, N_TILE: tl.constexpr):
    """A program a row: error · W_dec,i for its entries."""
    row = tl.program_id(0)
    begin, end = tl.load(offset + row), tl.load(offset + row + 1)
    for start in range(begin, end, N_TILE):
        n = start + tl.arange(0, N_TILE)
        i = tl.load(feature + n, mask=n < end, other=0).to(tl.int64)
        products = tl.zeros([N_TILE, D_TILE], tl.float32)
        for first in range(0, D, D_TILE):
            d = first + tl.arange(0, D_TILE)
            e = tl.load(error + row.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
            inside = (n < end)[:, None] & (d < D)[None, :]
            w = tl.load(W_dec + i[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            products += w * e[None, :]
        tl.store(dot + n, tl.sum(products, 1), mask=n < end)


@triton.jit
def decoder_sums_kernel(
    offset, index, weight, error, W_dec, scale, out, D,
    SCALED: tl.constexpr, D_TILE: tl.constexpr, N_TILE: tl.constexpr,
):  # fmt: skip
    """A program a feature and tile of columns: Σ_b f_bi e_b + scale_i W_dec,i."""
    feature = tl.program_id(0)
    d = tl.program_id(1) * D_TILE + tl.arange(0, D_TILE)
    begin, end = tl.load(offset + feature), tl.load(offset + feature + 1)
    total = gathered(index, weight, error, begin, end, d, D, D_TILE, N_TILE)
    at = feature.to(tl.int64) * D + d
    if SCALED:
        total += tl.load(scale + feature) * tl.load(W_dec + at, mask=d < D, other=0.0)
    tl.store(out + at, total, mask=d < D)


@triton.jit
def encoder_sums_kernel(
    offset, index, weight, x, out, D, F, D_TILE: tl.constexpr, N_TILE: tl.constexpr, F_TILE: tl.constexpr
):
    """A program a tile of features and one of columns: the features' sums grow side by side, as (D, F) has them."""
    feature = tl.program_id(0) * F_TILE + tl.arange(0, F_TILE)
    d = tl.program_id(1) * D_TILE + tl.arange(0, D_TILE)
    begin = tl.load(offset + feature, mask=feature < F, other=0)
    count = tl.load(offset + feature + 1, mask=feature < F, other=0) - begin
    tile = tl.zeros([D_TILE, F_TILE], tl.float32)
    for start in range(0, tl.max(count, 0), N_TILE):
        for n in tl.static_range(N_TILE):
            inside = count > start + n
            i = tl.load(index + begin + start + n, mask=inside, other=0).to(tl.int64)
            w = tl.load(weight + begin + start + n, mask=inside, other=0.0)
            at = i[None, :] * D + d[:, None]
            tile += w[None, :] * tl.load(x + at, mask=inside[None, :] & (d < D)[:, None], other=0.0).to(tl.float32)
    at = d.to(tl.int64)[:, None] * F + feature[None, :]
    tl.store(out + at, tile, mask=(d < D)[:, None] & (feature < F)[None, :])


@triton.jit
def adam_kernel(
    weight, gradient, exp_avg, exp_avg_sq, operand, divisor, size,
    lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, COPY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program a tile of one tensor: its moments, weights and, with COPY, the operand."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    by = tl.load(divisor)
    inside = at < tl.where(tl.abs(by) < float("inf"), size, 0)  # nothing is written where it is a NaN or infinite
    g = tl.load(gradient + at, mask=inside, other=0.0) / by
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    w = tl.load(weight + at, mask=inside, other=0.0)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    w -= lr / correction1 * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(weight + at, w, mask=inside)
    if COPY:
        tl.store(operand + at, w.to(operand.dtype.element_ty), mask=inside)
