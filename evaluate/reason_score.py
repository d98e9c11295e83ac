"""ReasonScore (arXiv 2503.18878, section 3.2): which features fire at words of reasoning, for all features in one pass.

    score_i = μ⁺_i / Σ_j μ⁺_j · H_i^α  −  μ⁻_i / Σ_j μ⁻_j

μ⁺ and μ⁻ are mean activations inside the words' windows and outside; H is the entropy, over words, of the
word's share p of the feature's per-word means, divided by log of the number of words. Activations are scaled by
‖W_dec,i‖ and given in units of the stored activations.

All sums are masks times activations: one product of (words + 2, rows) by (rows, d_sae) a batch, accumulated in
float64. The paper's code reads the text once for every 48 features, 1,366 passes of the model.

Shape suffixes: B rows of a batch, C contexts, S positions, D d_in, F d_sae, W words, G = words + 2.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluate.config import ReasonScoreConfig
from evaluate.downstream import left_out
from evaluate.fidelity import Fidelity
from evaluate.subject import Subject
from evaluate.words import Groups, find_words, overrepresented, word_groups
from harvest.files import UserError, replacing
from train.checkpoint import SavedSae
from train.exclusion import kept_rows

LISTED = 200  # features in metrics.json
CONTEXTS_AT_ONCE = 8  # of a forward pass of the model
TEXT_CONTEXTS = 1000  # that suggested words are counted in

DEFINITIONS = {
    "contexts": "contexts of the chosen sources that were read, held-out ones first [contexts]",
    "contexts_of_training": "of these, contexts that the SAE was trained on [contexts]",
    "rows_inside, rows_outside": "rows counted in the window of any word, and all others [rows]",
    "threshold": "the settings' quantile of all features' scores",
    "selected_features": "features above it [features]",
    "curve": "rank and score, for the chart",
    "score": "ReasonScore: mean_inside_i / sum_j mean_inside_j * entropy_i^alpha - mean_outside_i / sum_j "
    "mean_outside_j (arXiv 2503.18878) [no unit]",
    "rank": "place by score; 1 is the highest",
    "selected": "whether the score is above the settings' quantile of all features' scores (linear interpolation)",
    "entropy": "entropy of the words' shares of the feature's word_means, divided by log(words found) [0 to 1]",
    "mean_inside": "mean activation on rows in the window of any word, times the decoder row's norm [units of the "
    "stored activations]",
    "mean_outside": "the same on all other rows; rows that training leaves out and ignored tokens count in neither",
    "word_means": "the same on rows in the windows of one word",
    "matches": "how often a word stands in the text read",
    "rows_from": "store: stored activations; model: one forward pass",
    "model_passes": "forward passes of the text, for all features (the paper's code: 1,366)",
    "suggested_words": "words that are typical of the chosen sources against the others: z-score of log-odds with a "
    "Dirichlet prior (Monroe et al. 2008), and their number in a million words",
}


class Rows(NamedTuple):
    """A batch of rows and where each stands."""

    acts_BD: Tensor  # bfloat16, as stored
    inside_WB: np.ndarray  # bool: in the window of each word
    counted_B: np.ndarray  # bool: neither ignored nor left out
    matches_W: np.ndarray  # int64: matches of each word that were not counted with a batch before


class Sums(NamedTuple):
    """Over rows in each word's windows, in any of them, in none."""

    of_acts_GF: np.ndarray  # float64, in the SAE's own units
    rows_G: np.ndarray  # int64
    matches_W: np.ndarray  # int64


class ReasonScore(NamedTuple):
    """What `reason_score` gives for each of F features, and each of W words."""

    score_F: np.ndarray  # float64, as all
    entropy_F: np.ndarray
    mean_inside_F: np.ndarray
    mean_outside_F: np.ndarray
    word_means_WF: np.ndarray


@torch.inference_mode()
def accumulate(saved: SavedSae, batches: Iterator[Rows], words: int) -> Sums:
    """One pass over rows, in memory that does not grow with them."""
    device = saved.sae.W_dec.device
    sums_GF = torch.zeros(words + 2, saved.sae.d_sae, dtype=torch.float64, device=device)
    rows_G, matches_W = np.zeros(words + 2, np.int64), np.zeros(words, np.int64)
    for batch in batches:
        counted_B = torch.from_numpy(batch.counted_B).to(batch.acts_BD.device)
        inside_WB = batch.inside_WB[:, batch.counted_B]
        any_1B = inside_WB.any(0, keepdims=True)
        mask_GB = np.concatenate([inside_WB, any_1B, ~any_1B])
        acts_BD = batch.acts_BD[counted_B].to(device).float()
        f_BF = saved.sae.encode(acts_BD)
        sums_GF += torch.from_numpy(mask_GB).to(device, torch.float32) @ f_BF
        rows_G += mask_GB.sum(1)
        matches_W += batch.matches_W
    return Sums(sums_GF.cpu().numpy(), rows_G, matches_W)


def reason_score(sums: Sums, unit_F: np.ndarray, alpha: float) -> ReasonScore:
    """Scores from sums. `unit_F` turns activations into what is compared; words without rows are not in `sums`."""
    means_GF = sums.of_acts_GF * unit_F / np.maximum(sums.rows_G, 1)[:, None]
    *word_means, inside_F, outside_F = means_GF
    word_means_WF = np.array(word_means)
    entropy_F = np.ones_like(inside_F)
    if len(word_means_WF) > 1:
        total_F = word_means_WF.sum(0)
        p_WF = np.divide(word_means_WF, total_F, out=np.zeros_like(word_means_WF), where=total_F > 0)
        log_p_WF = np.log(p_WF, out=np.zeros_like(p_WF), where=p_WF > 0)
        entropy_F = -(p_WF * log_p_WF).sum(0) / math.log(len(p_WF))
        entropy_F = np.clip(entropy_F, 0, 1)  # rounding
    share_inside_F, share_outside_F = (mean_F / (mean_F.sum() or 1) for mean_F in (inside_F, outside_F))
    score_F = share_inside_F * entropy_F**alpha - share_outside_F
    return ReasonScore(score_F, entropy_F, inside_F, outside_F, word_means_WF)


def analyse(subject: Subject, _heldout: Fidelity) -> dict[str, Any] | None:
    """Scores of all features in `reason_score-<hook>.npz`, the best of them as figures.

    None where the setting is null.
    """
    config = subject.config.reason_score
    if config is None:
        return None
    groups = word_groups(config.words, subject.tokenizer())
    chosen = _chosen_sources(config, subject.contexts.sources)
    wanted = _wanted_contexts(config, subject)
    from_store = all(
        set(range(-(-count // subject.store.geometry.shard_contexts))) <= subject.store.complete_shards(split)
        for split, count in wanted.items()
    )
    read = _stored_rows if from_store else _computed_rows
    tokens = sum(wanted.values()) * subject.store.geometry.context_size
    with subject.progress("reason score", tokens, "tokens") as progress:

        def counted() -> Iterator[Rows]:
            for split, count in wanted.items():
                for batch in read(subject, config, groups, chosen, split, count):
                    yield batch
                    progress.advance(len(batch.acts_BD))

        sums = accumulate(subject.saved, counted(), len(groups))
    counts = {
        split: int(np.isin(subject.contexts.read(split, "source", 0, count), chosen).sum()) if count else 0
        for split, count in wanted.items()
    }
    section: dict[str, Any] = {
        "contexts": sum(counts.values()),
        "contexts_of_training": counts["train"],
        "sources": [subject.contexts.sources[number] for number in chosen],
        "rows_from": "store" if from_store else "model",
        "model_passes": 0 if from_store else 1,
        "alpha": config.alpha,
        "window": list(config.window),
        "words": [
            {"word": word, "matches": int(matches), "rows": int(rows)}
            for word, matches, rows in zip(groups, sums.matches_W, sums.rows_G, strict=False)
        ],
        "rows_inside": int(sums.rows_G[-2]),
        "rows_outside": int(sums.rows_G[-1]),
        "absent_words": [word for word, rows in zip(groups, sums.rows_G, strict=False) if not rows],
        "suggested_words": _suggested(subject, chosen),
    }
    if section["absent_words"]:
        print(
            f"evaluate.reason_score.words: not in the text read, so left out: {', '.join(section['absent_words'])}",
            file=sys.stderr,
        )
    if not sums.rows_G[-2]:
        section["message"] = (
            f"none of the words {', '.join(groups)} stands in the text read, so there is no score; "
            "set evaluate.reason_score.words to words that do (suggested_words)"
        )
        return section
    return section | _scored(subject, config, list(groups), sums)


def _scored(subject: Subject, config: ReasonScoreConfig, words: list[str], sums: Sums) -> dict[str, Any]:
    present = np.flatnonzero(sums.rows_G[:-2])
    keep_G = [*present, -2, -1]
    norm_F = subject.saved.sae.W_dec.double().norm(dim=1).cpu().numpy()
    found = reason_score(
        Sums(sums.of_acts_GF[keep_G], sums.rows_G[keep_G], sums.matches_W),
        norm_F / subject.saved.statistics.scale,
        config.alpha,
    )
    names = [words[i] for i in present]
    with replacing(subject.file("reason_score", ".npz")) as partial, partial.open("wb") as file:
        arrays = {name[: name.rindex("_")]: values for name, values in found._asdict().items()}
        np.savez(file, words=np.array(names), **arrays)
    order = np.argsort(-found.score_F, kind="stable")
    threshold = float(np.quantile(found.score_F, config.quantile))
    ranks = np.unique(np.geomspace(1, len(order), 120).astype(int))
    return {
        "quantile": config.quantile,
        "threshold": threshold,
        "selected_features": int((found.score_F > threshold).sum()),
        "curve": [[int(rank), float(found.score_F[order[rank - 1]])] for rank in ranks],
        "top": [
            {
                "rank": rank,
                "feature": int(i),
                "score": float(found.score_F[i]),
                "selected": bool(found.score_F[i] > threshold),
                "entropy": float(found.entropy_F[i]),
                "mean_inside": float(found.mean_inside_F[i]),
                "mean_outside": float(found.mean_outside_F[i]),
                "word_means": dict(zip(names, found.word_means_WF[:, i].tolist(), strict=True)),
            }
            for rank, i in enumerate(order[:LISTED], 1)
        ],
    }


def _chosen_sources(config: ReasonScoreConfig, known: list[str]) -> list[int]:
    return [number for number, name in enumerate(known) if not config.sources or name in config.sources]


def _wanted_contexts(config: ReasonScoreConfig, subject: Subject) -> dict[str, int]:
    """Contexts of each split, from the first on."""
    heldout, train = (subject.contexts.count(split) for split in ("holdout", "train"))
    count = heldout if config.contexts is None else min(config.contexts, heldout + train)
    if config.contexts and count < config.contexts:
        print(
            f"evaluate.reason_score: {count:,} contexts, all that there are ({config.contexts:,} asked for)", flush=True
        )
    return {"holdout": min(count, heldout), "train": max(0, count - heldout)}


def _stored_rows(
    subject: Subject, config: ReasonScoreConfig, groups: Groups, chosen: list[int], split: str, count: int
) -> Iterator[Rows]:
    """Rows of the first `count` contexts in stored order, a chunk at a time."""
    store, g = subject.store, subject.store.geometry
    for shard in range(-(-count // g.shard_contexts)):
        first = shard * g.shard_contexts
        tokens_CS = subject.contexts.read(split, "tokens", first, g.shard_contexts)
        source_C = subject.contexts.read(split, "source", first, g.shard_contexts)
        wanted_C = np.isin(source_C, chosen) & (first + np.arange(g.shard_contexts) < count)
        found = find_words(tokens_CS[wanted_C], groups, config.window)
        inside_WCS = np.zeros((len(groups), *tokens_CS.shape), bool)
        inside_WCS[:, wanted_C] = found.inside_WCS
        context = store.read_provenance(split, "context", shard).astype(np.int64) - first
        position = store.read_provenance(split, "position", shard)
        token = store.read_provenance(split, "token_id", shard)
        if context.min() < 0 or context.max() >= len(tokens_CS) or (tokens_CS[context, position] != token).any():
            raise UserError(f"{store.path}: its {split} shard {shard} was not made from {subject.contexts.path}")
        counted = kept_rows(
            store, split, subject.saved.hook, shard, subject.exclude, subject.saved.statistics.norm_limit
        )
        counted &= wanted_C[context] & ~np.isin(token, config.ignored_token_ids)
        matches_W = found.matches_W
        for chunk in range(g.chunks_per_shard):
            rows = slice(chunk * g.chunk_rows, (chunk + 1) * g.chunk_rows)
            acts = store.read_chunk(split, subject.saved.hook, shard * g.chunks_per_shard + chunk)
            inside_WB = inside_WCS[:, context[rows], position[rows]]
            yield Rows(torch.from_numpy(acts).view(torch.bfloat16), inside_WB, counted[rows], matches_W)
            matches_W = np.zeros_like(matches_W)


def _computed_rows(
    subject: Subject, config: ReasonScoreConfig, groups: Groups, chosen: list[int], split: str, count: int
) -> Iterator[Rows]:
    """The same rows, in order of contexts, from the model."""
    model, hook = subject.model(), subject.saved.hook
    for first in range(0, count, CONTEXTS_AT_ONCE):
        size = min(CONTEXTS_AT_ONCE, count - first)
        wanted_C = np.isin(subject.contexts.read(split, "source", first, size), chosen)
        tokens_CS = subject.contexts.read(split, "tokens", first, size)[wanted_C]
        if not len(tokens_CS):
            continue
        found = find_words(tokens_CS, groups, config.window)
        ids_CS = torch.from_numpy(tokens_CS.astype(np.int64)).to(subject.device)
        acts_CSD = model.activations(ids_CS)[hook].bfloat16()
        left_CS = left_out(acts_CSD.float().norm(dim=2), ids_CS, subject.exclude, subject.saved.statistics.norm_limit)
        counted_CS = ~left_CS.cpu().numpy() & ~np.isin(tokens_CS, config.ignored_token_ids)
        inside_WB = found.inside_WCS.reshape(len(groups), -1)
        yield Rows(acts_CSD.flatten(0, 1), inside_WB, counted_CS.reshape(-1), found.matches_W)


def _suggested(subject: Subject, chosen: list[int]) -> list[dict[str, Any]]:
    """Words typical of the chosen sources' held-out text; none where all sources are chosen."""
    if len(chosen) == len(subject.contexts.sources):
        return []
    count = min(TEXT_CONTEXTS, len(subject.context_source))
    texts = subject.tokenizer().whole.decode_batch(subject.contexts.read("holdout", "tokens", 0, count).tolist())
    is_chosen = np.isin(subject.context_source[:count], chosen)
    here, elsewhere = ([text for text, c in zip(texts, is_chosen, strict=True) if c == side] for side in (True, False))
    return overrepresented(here, elsewhere)
