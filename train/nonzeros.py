"""The non-zeros of a batch's features, and the gathers over them that a sparse step is made of, in plain torch.

`train.kernels.TRITON` is the CUDA twin of `PLAIN`. On a CPU operands are float32: caches bound these gathers, so a
smaller product type gains nothing. Every sum has one owner and a fixed order.

Shape suffixes: B rows of a batch, D d_in, F d_sae, G groups of a row, N non-zeros.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

SMALLEST = torch.finfo(torch.float32).tiny  # of a score that counts as positive


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


class Rule(NamedTuple):
    """What makes an entry active: z is above a threshold, and with `largest` z·weight is among the largest."""

    above_F: Tensor | None = None  # None: above 0
    largest: int = 0  # so many positive entries of each row; 0: all
    of_batch: bool = False  # so many times the rows, of the whole batch
    weight_F: Tensor | None = None  # float32; None: 1


POSITIVE = Rule()


def weight_of(rule: Rule) -> Tensor:
    """Weights of scores (F,) of a rule that compares them."""
    assert rule.weight_F is not None
    return rule.weight_F


class Entries(NamedTuple):
    """Entries of a block of rows, by row and ascending feature."""

    count_B: Tensor  # of each row, an integer
    feature_N: Tensor  # int32 (N,)
    f_N: Tensor  # z, float32 (N,)
    kept: int  # how many the rule keeps, where all features are here; of a rule of the batch: how many reach `least`
    longest: int  # the largest of count_B, for such a rule


class Operations(NamedTuple):
    """What the step asks of a device: `PLAIN` below states each."""

    extract: Callable[..., Entries]
    least_of_rows: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    residual: Callable[[ByRow, Tensor, Tensor, Tensor], Tensor]
    row_dots: Callable[[ByRow, Tensor, Tensor], Tensor]
    decoder_sums: Callable[..., Tensor]
    encoder_sums: Callable[[ByFeature, Tensor, Tensor], Tensor]


def offsets(count_B: Tensor) -> Tensor:
    """Where each row's entries begin, and where the last one's end: int32 (B + 1,), of rows with so many (B,)."""
    offset_B = torch.zeros(len(count_B) + 1, dtype=torch.int32, device=count_B.device)
    offset_B[1:] = count_B.cumsum(0)
    return offset_B


def rows_of(count_B: Tensor, N: int) -> Tensor:
    """The row of each of N entries, int32 (N,), of rows with so many (B,); does not wait for a device."""
    row_B = torch.arange(len(count_B), dtype=torch.int32, device=count_B.device)
    return row_B.repeat_interleave(count_B, output_size=N)


def masked(entries: ByRow, keep_N: Tensor) -> ByRow:
    """Those entries for which keep_N (N,), bool, is set."""
    before_N = offsets(keep_N)
    return ByRow(before_N[entries.offset_B], entries.feature_N[keep_N], entries.f_N[keep_N])


def by_feature(active: ByRow, d_sae: int) -> ByFeature:
    """The transpose of the pattern; the sort is stable, so rows ascend within a feature."""
    device = active.feature_N.device
    feature_N, order_N = torch.sort(active.feature_N, stable=True)
    features = torch.arange(d_sae + 1, dtype=torch.int32, device=device)
    row_N = rows_of(active.offset_B.diff(), len(order_N))
    return ByFeature(torch.searchsorted(feature_N, features, out_int32=True), row_N[order_N], order_N)


SLACK = 1e-5  # more than scores differ by how they are rounded
GROUP = 16  # entries of a group; fewer make a bound closer and dearer


def least_of_rows(pre_BF: Tensor, b_enc: Tensor, weight_F: Tensor, k: int) -> Tensor:
    """A number of each row that k of its scores (pre + b_enc)·weight reach, or 0 (B,).

    It is the k-th largest of the maxima of groups, so it is at most the k-th largest score, and near it.
    """
    return _least(_scores(pre_BF, b_enc, weight_F), k) * (1 - SLACK)


def _scores(pre_BF: Tensor, b_enc: Tensor, weight_F: Tensor) -> Tensor:
    # In one pass, which rounds otherwise than (pre + b_enc) · weight.
    return torch.addcmul(b_enc * weight_F, pre_BF.float(), weight_F)


def _least(score_BF: Tensor, k: int) -> Tensor:
    B, F = score_BF.shape
    groups = F // GROUP
    if k > F:
        return score_BF.new_zeros(B)
    grouped_BG = score_BF[:, : groups * GROUP].view(B, GROUP, groups).amax(1) if groups >= k else score_BF
    # A NaN is above all, as for `train.selection`: as a bound it would let every entry through.
    return (
        grouped_BG.nan_to_num(nan=torch.inf, posinf=torch.inf).topk(k, dim=1, sorted=False).values.amin(1).clamp_min(0)
    )


def extract(pre_BF: Tensor, b_enc: Tensor, rule: Rule = POSITIVE, least: Tensor | None = None) -> Entries:
    """Entries above the rule's threshold, with z = pre + b_enc.

    Of a rule with `largest`: the positive ones whose score is at least `least` (0-d, or of each row; by default
    `least_of_rows`), and perhaps some just below it.
    """
    B, F = pre_BF.shape
    # Not `pre > -b`: a NaN has to reach the loss, where the trainer looks for it.
    if rule.largest and (least is None or least.dim()):
        score_BF = _scores(pre_BF, b_enc, weight_of(rule))
        least = _least(score_BF, rule.largest) if least is None else least
        active_BF = (score_BF < (least * (1 - SLACK)).clamp_min(SMALLEST).unsqueeze(1)).logical_not_()
    else:
        at_F = least.clamp_min(SMALLEST) * (1 - SLACK) / weight_of(rule) if least is not None else rule.above_F
        active_BF = (pre_BF <= (-b_enc if at_F is None else at_F - b_enc)).logical_not_()
    place_N = active_BF.view(-1).nonzero().squeeze(1)
    row_N = place_N // F
    feature_N = place_N - row_N * F
    f_N = pre_BF.view(-1)[place_N].float() + b_enc[feature_N]
    count_B = torch.bincount(row_N, minlength=B)
    if not rule.largest:
        return Entries(count_B, feature_N.int(), f_N, len(f_N), 0)
    if rule.of_batch and least is not None:
        reach = int(((f_N * weight_of(rule)[feature_N]) < least).logical_not_().sum())
        return Entries(count_B, feature_N.int(), f_N, reach, int(count_B.max()))
    return Entries(count_B, feature_N.int(), f_N, int(count_B.clamp_max(rule.largest).sum()), int(count_B.max()))


def residual(active: ByRow, W_dec: Tensor, b_dec: Tensor, x_BD: Tensor) -> Tensor:
    """x̂ − x (B, D), float32."""
    return bag_sums(active.offset_B, active.feature_N, active.f_N, W_dec).add_(b_dec).sub_(x_BD)


def row_dots(active: ByRow, error_BD: Tensor, W_dec: Tensor) -> Tensor:
    """e_b · W_dec,i for each entry (b, i), float32 (N,)."""
    return torch.sparse.sampled_addmm(csr(active, len(W_dec)), error_BD, W_dec.t(), beta=0.0).values()


def csr(active: ByRow, d_sae: int) -> Tensor:
    """The entries as torch's sparse matrix (B, d_sae)."""
    with warnings.catch_warnings():  # it warns of its age and, on some versions, of the checks that are left out here
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support is in beta|invariant checks are)")
        shape = (len(active.offset_B) - 1, d_sae)
        return torch.sparse_csr_tensor(*active, size=shape, check_invariants=False)


def decoder_sums(
    by: ByFeature, f_N: Tensor, error_BD: Tensor, W_dec: Tensor | None = None, scale_F: Tensor | None = None
) -> Tensor:
    """Σ_b f_bi e_b + scale_i W_dec,i for each feature i (F, D), float32; f_N in the order of `by`."""
    sums_FD = bag_sums(by.offset_F, by.row_N, f_N, error_BD)
    return sums_FD if W_dec is None or scale_F is None else sums_FD.addcmul_(W_dec, scale_F.unsqueeze(1))


def encoder_sums(by: ByFeature, df_N: Tensor, x_BD: Tensor) -> Tensor:
    """Σ_b df_bi x_b for each feature i, as columns (D, F), contiguous float32; df_N in the order of `by`."""
    return bag_sums(by.offset_F, by.row_N, df_N, x_BD).t().contiguous()


def bag_sums(offset: Tensor, index_N: Tensor, weight_N: Tensor, table: Tensor) -> Tensor:
    """Weighted sums of rows of a table (rows, D), one for each span of offsets, (spans, D).

    Two to three times as fast as MKL's sparse product.
    """
    return embedding_bag(index_N, table, offset, mode="sum", per_sample_weights=weight_N, include_last_offset=True)


PLAIN = Operations(extract, least_of_rows, residual, row_dots, decoder_sums, encoder_sums)
