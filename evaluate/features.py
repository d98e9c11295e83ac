"""What chosen features do on the held-out rows: one pass over the store, no pass of the model.

Rows are shuffled within their shard; their provenance puts them back into contexts, and a shard holds whole
contexts. Of each feature are kept: counts and sums by source, a histogram, the tokens that it fires on, the
excerpts around its highest peaks, and a random sample of the tokens that it fires on. Rows that training leaves out
do not count. Memory: a shard's activations of the chosen features (shard_rows × K float32), and what is kept.

Shape suffixes: C contexts of a shard, S positions, F d_sae, K chosen features, G sources, N excerpts, T tokens of one,
B rows of a batch or bins of a histogram, D d_in.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from evaluate.config import FeaturesConfig
from harvest.activation_store import ActivationStore
from harvest.files import UserError
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import kept_rows

LEFT_OUT = -1.0  # stands for the activation of a row that training leaves out; activations are never negative
BINS = 64
SAMPLED = 64  # tokens that a feature fires on, drawn at random, of which the quarters' examples are taken
SPARE = 3  # strongest excerpts kept for each that is shown: the same text may occur many times


class ShardActivity(NamedTuple):
    """Chosen features on one shard's contexts, in reading order."""

    first_context: int
    acts_CSK: np.ndarray  # float32; LEFT_OUT where the row is left out
    token_CS: np.ndarray
    source_C: np.ndarray


class Excerpts(NamedTuple):
    """Windows of contexts around an active token, those of a feature together, best key first."""

    feature_N: np.ndarray  # index into the chosen features
    key_N: np.ndarray
    context_N: np.ndarray  # number within the held-out split
    source_N: np.ndarray
    position_N: np.ndarray  # of the active token, within the context
    start_N: np.ndarray  # of the window, within the context
    token_NT: np.ndarray
    acts_NT: np.ndarray

    def of(self, feature: int) -> "Excerpts":
        """Those of one feature, an index into the chosen ones."""
        here = slice(*np.searchsorted(self.feature_N, [feature, feature + 1]))
        return Excerpts(*(values[here] for values in self))

    @property
    def value_N(self) -> np.ndarray:
        """Activation at the active token, float32 (N,)."""
        return np.take_along_axis(self.acts_NT, (self.position_N - self.start_N)[:, None], 1)[:, 0]


class TokenCounts(NamedTuple):
    """How often each feature fires on each token; sorted by feature, then token."""

    feature_N: np.ndarray
    token_N: np.ndarray
    count_N: np.ndarray
    sum_N: np.ndarray  # of activations


class Activity(NamedTuple):
    """All that the pages show of the held-out rows."""

    rows_G: np.ndarray  # rows counted, by source
    active_GK: np.ndarray  # rows in which a feature fires
    sum_GK: np.ndarray  # of activations
    max_GK: np.ndarray
    histogram_KB: np.ndarray  # active rows in BINS equal bins from 0 to top_K
    top_K: np.ndarray
    tokens: TokenCounts
    strongest: Excerpts
    sampled: Excerpts


def choose_features(config: FeaturesConfig, density_F: np.ndarray, score_F: np.ndarray | None) -> np.ndarray:
    """Features that get a page, int64 (K,): those asked for, the best ranked, and a random part of the living.

    Ranked by ReasonScore; where there is none, all are drawn at random. Raises UserError for a number out of range.
    """
    wrong = [number for number in config.include if number >= len(density_F)]
    if wrong:
        raise UserError(
            f"evaluate.features.include: {wrong[0]}: the SAE has {len(density_F):,} features, 0 to {len(density_F) - 1}"
        )
    scored = score_F is not None
    ranking = np.where(density_F > 0, np.nan_to_num(score_F, nan=-np.inf) if scored else 0, -np.inf)
    living = int((density_F > 0).sum())
    ranked = np.argsort(-ranking, kind="stable")[:living]
    drawn = np.random.default_rng(config.seed).permutation(ranked)
    ranked_count = config.count - round(config.count * config.random_share) if scored else 0
    wanted = [*config.include, *ranked[:ranked_count].tolist(), *drawn.tolist()]
    return np.array(list(dict.fromkeys(wanted))[: max(config.count, len(set(config.include)))], np.int64)


@torch.no_grad()
def heldout_activity(
    store: ActivationStore,
    saved: SavedSae,
    exclude: ExcludeConfig,
    context_source: np.ndarray,
    chosen_K: np.ndarray,
) -> Iterator[ShardActivity]:
    """The chosen features on each held-out shard; the SAE may be on any device.

    `context_source` is (held-out contexts,): the group that each is counted for. Raises UserError where provenance does
    not make whole contexts, and as the store does.
    """
    g = store.geometry
    device = saved.sae.W_enc.device
    for shard in range(g.holdout_shards):
        first = shard * g.shard_contexts
        context = store.read_provenance("holdout", "context", shard).astype(np.int64) - first
        place = context * g.context_size + store.read_provenance("holdout", "position", shard)
        if not np.array_equal(np.sort(place), np.arange(g.shard_rows)):
            raise UserError(f"{store.path}: the provenance of held-out shard {shard} does not make whole contexts")
        acts = np.empty((g.shard_rows, len(chosen_K)), np.float32)
        for chunk in range(g.chunks_per_shard):
            rows = store.read_chunk("holdout", saved.hook, shard * g.chunks_per_shard + chunk)
            x_BD = torch.from_numpy(rows).view(torch.bfloat16).to(device)
            here = place[chunk * g.chunk_rows : (chunk + 1) * g.chunk_rows]
            acts[here] = saved.sae.columns(x_BD, chosen_K).cpu().numpy()
        kept = kept_rows(store, "holdout", saved.hook, shard, exclude, saved.statistics.norm_limit)
        acts[place[~kept]] = LEFT_OUT
        token = np.empty(g.shard_rows, np.uint32)
        token[place] = store.read_provenance("holdout", "token_id", shard)
        yield ShardActivity(
            first,
            acts.reshape(g.shard_contexts, g.context_size, -1),
            token.reshape(g.shard_contexts, g.context_size),
            context_source[first : first + g.shard_contexts],
        )


def activity(shards: Iterator[ShardActivity], features: int, sources: int, config: FeaturesConfig) -> Activity:
    """Gather what the pages show of `features` chosen features, from the shards in order."""
    rows_G, active_GK = np.zeros(sources, np.int64), np.zeros((sources, features), np.int64)
    sum_GK, max_GK = np.zeros((sources, features)), np.zeros((sources, features), np.float32)
    histogram_KB, top_K = np.zeros((features, BINS), np.int64), np.zeros(features, np.float32)
    tokens: list[TokenCounts] = []
    strongest: list[Excerpts] = []
    sampled: list[Excerpts] = []
    rng = np.random.default_rng(config.seed)
    for shard in shards:
        acts_CSK, source_C = shard.acts_CSK, shard.source_C
        peak_CK, at_CK = acts_CSK.max(1), acts_CSK.argmax(1)
        np.add.at(rows_G, source_C, (acts_CSK[:, :, 0] != LEFT_OUT).sum(1))
        np.add.at(active_GK, source_C, (acts_CSK > 0).sum(1))
        np.add.at(sum_GK, source_C, acts_CSK.clip(0).sum(1, dtype=np.float64))
        np.maximum.at(max_GK, source_C, peak_CK)

        context_N, feature_N = np.nonzero(peak_CK > 0)
        where = (feature_N, context_N, at_CK[context_N, feature_N])
        keys_N = -peak_CK[context_N, feature_N]
        strongest = [_best([*strongest, _excerpts(shard, keys_N, where, config.tokens)], config.contexts * SPARE)]

        context_N, position_N, feature_N = np.nonzero(acts_CSK > 0)
        acts_N = acts_CSK[context_N, position_N, feature_N]
        keys_N = rng.random(len(acts_N))
        first = _first(feature_N, keys_N, SAMPLED)  # most of an often active feature's tokens need no excerpt
        where = (feature_N[first], context_N[first], position_N[first])
        sampled = [_best([*sampled, _excerpts(shard, keys_N[first], where, config.tokens)], SAMPLED)]

        _widen(histogram_KB, top_K, peak_CK.max(0))
        bin_N = np.minimum((acts_N / top_K[feature_N] * BINS).astype(np.int64), BINS - 1)
        histogram_KB += np.bincount(feature_N * BINS + bin_N, minlength=features * BINS).reshape(features, BINS)
        seen = TokenCounts(feature_N, shard.token_CS[context_N, position_N], np.ones_like(feature_N), acts_N)
        tokens = [_counted([*tokens, seen])]
    return Activity(rows_G, active_GK, sum_GK, max_GK, histogram_KB, top_K, tokens[0], strongest[0], sampled[0])


def _excerpts(
    shard: ShardActivity, key_N: np.ndarray, where: tuple[np.ndarray, np.ndarray, np.ndarray], tokens: int
) -> Excerpts:
    """Windows of `tokens` tokens around (feature, context, position); three quarters lie before: models look back."""
    feature_N, context_N, position_N = where
    size = shard.token_CS.shape[1]
    tokens = min(tokens, size)
    start_N = np.clip(position_N - tokens * 3 // 4, 0, size - tokens)
    window_NT = start_N[:, None] + np.arange(tokens)
    return Excerpts(
        feature_N,
        key_N,
        context_N + shard.first_context,
        shard.source_C[context_N],
        position_N,
        start_N,
        shard.token_CS[context_N[:, None], window_NT],
        shard.acts_CSK[context_N[:, None], window_NT, feature_N[:, None]],
    )


def _first(feature_N: np.ndarray, key_N: np.ndarray, limit: int) -> np.ndarray:
    """Indices of the `limit` least keys of each feature, by feature, then key; of equal keys the first comes first."""
    order = np.lexsort((key_N, feature_N))
    sorted_N = feature_N[order]
    rank_N = np.arange(len(order)) - np.searchsorted(sorted_N, sorted_N)
    return order[rank_N < limit]


def _best(parts: list[Excerpts], limit: int) -> Excerpts:
    joined = Excerpts(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    first = _first(joined.feature_N, joined.key_N, limit)
    return Excerpts(*(values[first] for values in joined))


def _widen(histogram_KB: np.ndarray, top_K: np.ndarray, peak_K: np.ndarray) -> None:
    """Double the range of histograms until it holds the peaks; pairs of bins become one, so that counts stay exact."""
    new = (top_K == 0) & (peak_K > 0)
    top_K[new] = np.exp2(np.ceil(np.log2(peak_K[new])))
    while (small := peak_K > top_K).any():
        pairs = histogram_KB[small].reshape(-1, BINS // 2, 2).sum(2)
        histogram_KB[small] = np.concatenate([pairs, np.zeros_like(pairs)], 1)
        top_K[small] *= 2


def _counted(parts: list[TokenCounts]) -> TokenCounts:
    feature_N, token_N, count_N, sum_N = (np.concatenate(values) for values in zip(*parts, strict=True))
    pair_N, index_N = np.unique(feature_N.astype(np.int64) << 32 | token_N, return_inverse=True)
    counts, sums = (np.bincount(index_N, weights, len(pair_N)) for weights in (count_N, sum_N))
    return TokenCounts(pair_N >> 32, pair_N & 0xFFFFFFFF, counts.astype(np.int64), sums)


@torch.no_grad()
def nearest_features(W_dec: torch.Tensor, chosen_K: np.ndarray, count: int = 8) -> list[list[tuple[int, float]]]:
    """Of each chosen feature, the others with the highest cosine of decoder rows (d_sae, d_in), highest first."""
    unit_FD = torch.nn.functional.normalize(W_dec, dim=1)
    found = []
    for part_K in torch.from_numpy(chosen_K).to(W_dec.device).split(64):
        cosine_KF = unit_FD[part_K] @ unit_FD.T
        cosine_KF[torch.arange(len(part_K), device=part_K.device), part_K] = -2  # itself
        best = cosine_KF.topk(min(count, len(W_dec) - 1))
        found += [
            list(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return found
