"""Which entries of a batch are active: those above a threshold, or the k largest of each row or of the whole batch.

The k largest are found exactly. Entries are ordered by score, then the lower feature, then the lower row, as one int64
key: no two are equal, so every device, block size and number of ranks chooses the same ones. Ranks exchange the keys
of their own k largest, never pre-activations.

Shape suffixes: B rows of a batch, F d_sae, N entries, K largest keys, R ranks.
"""

import torch
from torch import Tensor

from train.nonzeros import ByRow, Entries, Rule, offsets, rows_of, weight_of
from train.parallel import FeatureRanks

TIE_BITS = 32  # of a key, below the 31 of a positive score


def largest(entries: Entries, rule: Rule, first_feature: int, ranks: FeatureRanks) -> tuple[ByRow, Tensor]:
    """The entries that a rule with `largest` takes, and the smallest score among them: 0-d, 0 where all are taken.

    `entries` has, of this rank's features, the largest of every row or of the whole batch, and some more. Raises
    ValueError for a batch whose entries have more places than a key can tell apart.
    """
    B, N = len(entries.count_B), len(entries.f_N)
    row_N = rows_of(entries.count_B, N).long()
    key_N = keys(entries, row_N, rule, first_feature)
    mine_K = (
        _largest_of_batch(key_N, rule.largest * B) if rule.of_batch else _largest_of_rows(entries, row_N, key_N, rule)
    )
    least = mine_K.amin(-1)
    if ranks.size > 1:
        of_ranks_RK = ranks.each(mine_K.flatten()).view(ranks.size, *mine_K.shape)
        least = of_ranks_RK.movedim(0, -2).flatten(-2).topk(mine_K.shape[-1], sorted=False).values.amin(-1)
    keep_N = key_N >= (least if rule.of_batch else least[row_N])
    ends_N = keep_N.cumsum(0)
    kept = int(ends_N[-1]) if ranks.size > 1 and N else entries.kept
    # Not nonzero(): it would wait for the device. What is not kept goes to the place after the last.
    place_N = torch.where(keep_N, ends_N - 1, kept)
    index_N = torch.empty(kept + 1, dtype=torch.int64, device=key_N.device)
    index_N = index_N.scatter_(0, place_N, torch.arange(N, device=key_N.device))[:kept]
    before_N = torch.nn.functional.pad(ends_N, (1, 0))
    active = ByRow(before_N[offsets(entries.count_B)].int(), entries.feature_N[index_N], entries.f_N[index_N])
    return active, (least.amin() >> TIE_BITS).int().view(torch.float32)


def keys(entries: Entries, row_N: Tensor, rule: Rule, first_feature: int) -> Tensor:
    """A positive number for each entry, int64 (N,): the larger, the sooner it is taken.

    Raises ValueError where there are more places than tell entries apart.
    """
    weight_F = weight_of(rule)
    B, F = len(entries.count_B), len(weight_F)
    feature_N = entries.feature_N.long()
    tie_N = first_feature + feature_N
    if rule.of_batch:
        tie_N = tie_N * B + row_N
        if (first_feature + F) * B > 2**TIE_BITS:
            raise ValueError(
                f"{B:,} rows times {first_feature + F:,} features are above 2^{TIE_BITS}: use a smaller batch"
            )
    score_N = entries.f_N * weight_F[feature_N]
    bits_N = score_N.view(torch.int32).long() & 0x7FFFFFFF  # a NaN is above all: it has to reach the loss
    return (bits_N << TIE_BITS) + (2**TIE_BITS - 1 - tie_N)


def _largest_of_batch(key_N: Tensor, count: int) -> Tensor:
    """(count,), unsorted; zeros where there are fewer."""
    if len(key_N) <= count:
        return torch.nn.functional.pad(key_N, (0, count - len(key_N)))
    return key_N.topk(count, sorted=False).values


def _largest_of_rows(entries: Entries, row_N: Tensor, key_N: Tensor, rule: Rule) -> Tensor:
    """(B, rule.largest), unsorted; zeros where there are fewer."""
    B, count_B = len(entries.count_B), entries.count_B
    start_N = (count_B.cumsum(0) - count_B)[row_N]
    key_BK = key_N.new_zeros(B, max(entries.longest, rule.largest))
    key_BK[row_N, torch.arange(len(key_N), device=key_N.device) - start_N] = key_N
    return key_BK.topk(rule.largest, dim=1, sorted=False).values


def largest_dense(score_BF: Tensor, count: int, of_batch: bool) -> Tensor:
    """The same choice among the positive entries of a whole matrix, bool (B, F): the plain twin of `largest`."""
    if of_batch:  # in the order of ties: by feature, then by row
        return largest_dense(score_BF.t().reshape(1, -1), count * len(score_BF), False).view(score_BF.t().shape).t()
    score_BF = score_BF.detach().float().nan_to_num(nan=torch.inf)
    least_B1 = score_BF.topk(min(count, score_BF.shape[1]), dim=1).values[:, -1:]
    above_BF, equal_BF = score_BF > least_B1, score_BF == least_B1
    left_B1 = count - above_BF.sum(1, keepdim=True)
    return (above_BF | (equal_BF & (equal_BF.cumsum(1) <= left_B1))) & (score_BF > 0)
