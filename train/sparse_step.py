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

Shape suffixes: B rows of a batch, D d_in, F d_sae, L nested prefixes, N non-zeros.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from harvest.device import is_ampere
from train.nonzeros import PLAIN, ByRow, Entries, Operations, Rule, by_feature, offsets, rows_of, weight_of
from train.parallel import SINGLE, FeatureRanks
from train.sae import Dead, Sae
from train.selection import largest
from train.step import Kernel, Reconstruction, StepResult, Tensors, result

# Rows of one encoder product on the CPU. The block is read again right after it is written, which wants
# it in cache (19 MB at d_sae 9216); fewer rows make the product itself slower.
BLOCK_ROWS = 512


def sparse_step(
    sae: Sae,
    x_BD: Tensor,
    coefficients: Mapping[str, float],
    compute_dtype: torch.dtype,
    ranks: FeatureRanks = SINGLE,
    operands: Tensors | None = None,
    dead: Dead | None = None,
    operations: Operations | None = None,
) -> StepResult:
    """Gradients and figures of one batch of stored rows (B, D); `autograd_step` up to rounding.

    compute_dtype is that of the encoder product and, on CUDA, of all gathered operands; sums and results
    are float32. operations is for tests: by default the device of x decides. Others as of `autograd_step`.
    Raises ValueError at 2³¹ or more non-zeros.
    """
    ops = operations or operations_for(x_BD.device)
    x_BD, weights, B = sae.scaled(x_BD), operands or sae.parameters, len(x_BD)
    W_dec = _decoder(sae, weights, compute_dtype, ops)
    source = Source(weights["W_enc"], sae.b_enc, x_BD, compute_dtype, ops)
    rule = sae.batch_rule()
    entries, smallest = source.active(rule, sae.first_feature, ranks)
    active, near = sae.split(entries)
    leveled, error_LBD = residuals(active, sae, W_dec, x_BD, ops, ranks)
    error_BD = error_LBD[-1]
    # What pulls at a feature is the error of every prefix that it is in.
    pull_BD = error_BD if len(error_LBD) == 1 else error_LBD.flip(0).cumsum(0).flip(0).flatten(0, 1)
    pull, x = pull_BD.to(W_dec.dtype), x_BD.to(W_dec.dtype)

    price = Price(sae.W_dec, sae.W_dec.norm(dim=1), coefficients["l1"] / B) if "l1" in sae.parts else None
    found = feature_gradients(leveled, pull, x, W_dec, ops, 2 / B, price)
    gradients = found.gradients | {"b_dec": pull_BD[:B].sum(0).mul_(2 / B)}
    terms: dict[str, Tensor] = {}
    if price and found.f_sum_F is not None:
        terms["l1"] = found.f_sum_F @ price.norm_F / B
    if len(error_LBD) > 1:
        terms["inner"] = error_LBD[:-1].square().sum(2).mean(1).sum()
    if near:
        l0_B = ranks.sum(active.offset_B.diff().float())
        dots_N = ops.row_dots(near, pull, W_dec).mul_(2 / B)
        terms |= {name: term_B.mean() for name, term_B in sae.l0_terms(l0_B).items()}
        gradients |= sae.threshold_gradients(near, dots_N, l0_B, coefficients)
    if dead and (auxiliary := sae.auxiliary(dead.total)):
        factor = 2 / B * auxiliary.scale * coefficients["aux"]
        of_dead = Rule(largest=auxiliary.k, weight_F=weight_of(rule)[dead.feature_K])
        error_B, added = _revival(sae, source, W_dec, error_BD, dead, of_dead, factor, ranks)
        terms["aux"] = auxiliary.scale * error_B.mean()
        for name, gradient in added.items():
            gradients[name].index_add_(1 if name == "W_enc" else 0, dead.feature_K, gradient)
    return result(x_BD, error_BD, gradients, terms, found.count_F)._replace(smallest=smallest)


def sparse_reconstruction(
    sae: Sae,
    x_BD: Tensor,
    compute_dtype: torch.dtype,
    ranks: FeatureRanks = SINGLE,
    operands: Tensors | None = None,
) -> Reconstruction:
    """`autograd_reconstruction` from the non-zeros: stored rows (B, D) rebuilt, without gradients."""
    ops = operations_for(x_BD.device)
    x_BD, weights = sae.scaled(x_BD), operands or sae.parameters
    source = Source(weights["W_enc"], sae.b_enc, x_BD, compute_dtype, ops)
    active = source.active(sae.reading_rule(), sae.first_feature, ranks)[0]
    error_LBD = residuals(active, sae, _decoder(sae, weights, compute_dtype, ops), x_BD, ops, ranks)[1]
    l0_B = active.offset_B.diff()
    terms = {"mse": error_LBD[-1].square().sum(1), **sae.l0_terms(ranks.sum(l0_B.float()))}
    if "l1" in sae.parts:
        l1_N = active.f_N * sae.W_dec.norm(dim=1)[active.feature_N]
        terms["l1"] = torch.segment_reduce(l1_N, "sum", offsets=active.offset_B)
    if len(error_LBD) > 1:
        terms["inner"] = error_LBD[:-1].square().sum(2).sum(0)
    return Reconstruction(error_LBD[-1], terms, l0_B)


SPARSE = Kernel(sparse_step, sparse_reconstruction)


class Price(NamedTuple):
    """The penalty coefficient · Σ f_i ‖W_dec,i‖ of a row."""

    W_dec: Tensor  # float32
    norm_F: Tensor
    coefficient: float


class FeatureGradients(NamedTuple):
    """What active entries give the weights of their features."""

    gradients: dict[str, Tensor]  # W_enc, b_enc, W_dec
    count_F: Tensor  # rows in which a feature is active
    f_sum_F: Tensor | None  # with a price


def feature_gradients(
    active: ByRow, pull: Tensor, x: Tensor, W_dec: Tensor, ops: Operations, factor: float, price: Price | None = None
) -> FeatureGradients:
    """Gradients of factor/2 · Σ ‖error‖² and of the price, from the errors `pull` (rows of `active`, D).

    x (B, D) are scaled rows, as many or repeated by those of `active`; W_dec (F, D).
    """
    df_N = ops.row_dots(active, pull, W_dec).mul_(factor)
    if price:
        df_N.add_(price.norm_F[active.feature_N], alpha=price.coefficient)
    by = by_feature(active, len(W_dec))
    f_N, df_N = active.f_N[by.order_N], df_N[by.order_N]
    f_sum_F = scale_F = None
    if price:
        f_sum_F = torch.segment_reduce(f_N, "sum", offsets=by.offset_F)
        scale_F = f_sum_F / price.norm_F.clamp_min(1e-30) * price.coefficient
    of_x = by if len(pull) == len(x) else by._replace(row_N=by.row_N % len(x))
    gradients = {
        "W_enc": ops.encoder_sums(of_x, df_N, x),
        "b_enc": torch.segment_reduce(df_N, "sum", offsets=by.offset_F),
        "W_dec": ops.decoder_sums(by, f_N.mul_(factor), pull, price.W_dec if price else None, scale_F),
    }
    return FeatureGradients(gradients, by.offset_F.diff(), f_sum_F)


def _revival(
    sae: Sae,
    source: "Source",
    W_dec: Tensor,
    error_BD: Tensor,
    dead: Dead,
    rule: Rule,
    factor: float,
    ranks: FeatureRanks,
) -> tuple[Tensor, dict[str, Tensor]]:
    """‖ê − (x − x̂)‖² of each row (B,), and the gradients of the dead features."""
    W_dec, ops = W_dec[dead.feature_K], source.ops
    of_dead = source._replace(W_enc=source.W_enc[:, dead.feature_K], b_enc=source.b_enc[dead.feature_K])
    active = of_dead.active(rule, sae.first_feature, ranks)[0]
    left_BD = _sum(active, W_dec, torch.zeros_like(sae.b_dec), -error_BD, ops, ranks)
    found = feature_gradients(active, left_BD.to(W_dec.dtype), source.x_BD.to(W_dec.dtype), W_dec, ops, factor)
    return left_BD.square().sum(1), found.gradients


def residuals(
    active: ByRow, sae: Sae, W_dec: Tensor, x_BD: Tensor, ops: Operations, ranks: FeatureRanks
) -> tuple[ByRow, Tensor]:
    """x̂ − x (L, B, D), float32, of each nested prefix of all ranks' features, and the entries with a row for each.

    An entry is in the first prefix that has it: row l·B + b of the entries that are returned.
    """
    if len(sae.levels) == 1:
        return active, _sum(active, W_dec, sae.b_dec, x_BD, ops, ranks).unsqueeze(0)
    L, B = len(sae.levels), len(x_BD)
    ends = torch.tensor(sae.levels, device=x_BD.device) - sae.first_feature
    row_N = rows_of(active.offset_B.diff(), len(active.f_N))
    level_N = torch.bucketize(active.feature_N, ends, right=True)
    row_N, order_N = torch.sort(level_N * B + row_N, stable=True)
    offset = torch.searchsorted(row_N, torch.arange(L * B + 1, device=x_BD.device), out_int32=True)
    leveled = ByRow(offset, active.feature_N[order_N], active.f_N[order_N])
    zeros = torch.zeros(L * B, x_BD.shape[1], device=x_BD.device)
    part_LBD = ranks.sum(ops.residual(leveled, W_dec, torch.zeros_like(sae.b_dec), zeros)).view(L, B, -1)
    return leveled, part_LBD.cumsum(0).add_(sae.b_dec).sub_(x_BD)


def _sum(active: ByRow, W_dec: Tensor, b_dec: Tensor, x_BD: Tensor, ops: Operations, ranks: FeatureRanks) -> Tensor:
    """x̂ − x (B, D), float32, of all ranks' features."""
    if ranks.size == 1:
        return ops.residual(active, W_dec, b_dec, x_BD)
    x_hat_BD = ranks.sum(ops.residual(active, W_dec, torch.zeros_like(b_dec), torch.zeros_like(x_BD)))
    return x_hat_BD.add_(b_dec).sub_(x_BD)


def _decoder(sae: Sae, weights: Tensors, compute_dtype: torch.dtype, ops: Operations) -> Tensor:
    # In compute_dtype on CUDA, else in float32.
    return sae.W_dec if ops is PLAIN else weights["W_dec"].to(compute_dtype)


def operations_for(device: torch.device) -> Operations:
    """The Triton kernels on CUDA from Ampere on, plain torch elsewhere (where triton need not be installed)."""
    if not is_ampere(device):
        return PLAIN
    from train.kernels import TRITON

    return TRITON


class Source(NamedTuple):
    """What pre-activations are made of."""

    W_enc: Tensor
    b_enc: Tensor
    x_BD: Tensor  # scaled rows
    compute_dtype: torch.dtype  # of the product
    ops: Operations

    def active(self, rule: Rule, first_feature: int, ranks: FeatureRanks) -> tuple[ByRow, Tensor | None]:
        """The entries that the rule takes, and the smallest score among them (0-d) if it chooses by score.

        Raises ValueError at 2³¹ or more of them: the places in them are int32.
        """
        if not rule.largest:
            entries = self.entries(rule)
            return ByRow(offsets(entries.count_B), entries.feature_N, entries.f_N), None
        entries = self.entries(rule, ranks)
        if rule.of_batch:
            wanted = rule.largest * len(self.x_BD)
            found = int(ranks.sum(torch.tensor(entries.kept))) if ranks.size > 1 else entries.kept
            if found < wanted:  # the bound was too high, or fewer are positive
                entries = self.entries(rule, ranks, torch.zeros((), device=self.x_BD.device))
            entries = entries._replace(kept=min(len(entries.f_N), wanted))
        return largest(entries, rule, first_feature, ranks)

    def entries(self, rule: Rule, ranks: FeatureRanks = SINGLE, least: Tensor | None = None) -> Entries:
        """Candidates of the rule; of one that chooses from the batch, those whose score is at least `least` (0-d).

        Raises ValueError at 2³¹ or more of them.
        """
        B = len(self.x_BD)
        # The kernels need no cache-sized blocks, and the host waits for each block's count.
        rows = min(B, BLOCK_ROWS) if self.ops is PLAIN else B
        W_enc, x_BD = self.W_enc.to(self.compute_dtype), self.x_BD.to(self.compute_dtype)
        # One block for all products: fresh pages for each cost the CPU more than the extraction does.
        block = torch.empty(rows, len(self.b_enc), dtype=self.compute_dtype, device=x_BD.device)
        parts: list[Entries] = []
        for x in x_BD.split(rows):
            pre = torch.mm(x, W_enc, out=block[: len(x)])
            if rule.of_batch and least is None:
                # Half of these rows have twice their share of entries above it. Other rows are like them; if not, too
                # few are found, and that is seen.
                share = -(-2 * rule.largest // ranks.size)
                mine = self.ops.least_of_rows(pre, self.b_enc, weight_of(rule), share).median()
                least = ranks.each(mine.unsqueeze(0)).amin()
            parts.append(self.ops.extract(pre, self.b_enc, rule, least))
        count_B, feature_N, f_N = (torch.cat([getattr(part, name) for part in parts]) for name in Entries._fields[:3])
        if len(f_N) >= 2**31:
            raise ValueError(f"{len(f_N)} non-zeros in one batch: use the dense step, or a smaller batch")
        return Entries(count_B, feature_N, f_N, sum(part.kept for part in parts), max(part.longest for part in parts))


def active_features(W_enc: Tensor, b_enc: Tensor, x_BD: Tensor, compute_dtype: torch.dtype, ops: Operations) -> ByRow:
    """The positive entries of ReLU(x W_enc + b_enc), shapes as in `Sae`, of scaled rows; product in compute_dtype."""
    return Source(W_enc, b_enc, x_BD, compute_dtype, ops).active(Rule(), 0, SINGLE)[0]
