"""ReasonScore (arXiv 2503.18878, section 3.2): which features fire at words of reasoning, for all features in one pass.

    score_i = μ⁺_i / Σ_j μ⁺_j · H_i^α  −  μ⁻_i / Σ_j μ⁻_j

μ⁺ and μ⁻ are mean activations inside the words' windows and outside; H is the entropy, over words, of the
word's share p of the feature's per-word means, divided by log of the number of words. Activations are scaled by
‖W_dec,i‖ and given in units of the stored activations.

All sums are masks times activations: one product of (words + 2, rows) by (rows, d_sae) a batch, accumulated in
float64. The paper's code reads the text once for every 48 features, 1,366 passes of the model.

Shape suffixes: B rows of a batch, C contexts, S positions, F d_sae, W words, G = words + 2.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluate.config import ReasonScoreConfig
from evaluate.figures import Section, figures_of
from evaluate.subject import Encoded, Subject, feed
from evaluate.words import find_words, overrepresented, word_groups
from harvest.activation_rows import RowBatch, model_rows, stored_rows
from harvest.files import replacing
from train.checkpoint import SavedSae

LISTED = 200  # features in metrics.json
CONTEXTS_AT_ONCE = 8  # of a forward pass of the model
TEXT_CONTEXTS = 1000  # that suggested words are counted in


class Sums(NamedTuple):
    """Over rows in each word's windows, in any of them, in none."""

    of_acts_GF: np.ndarray  # float64, in the SAE's own units
    rows_G: np.ndarray  # int64


class ReasonScore(NamedTuple):
    """What `reason_score` gives for each of F features, and each of W words."""

    score_F: np.ndarray  # float64, as all
    entropy_F: np.ndarray
    mean_inside_F: np.ndarray
    mean_outside_F: np.ndarray
    word_means_WF: np.ndarray


class WordSums:
    """Reads rows, in memory that does not grow with them; its result is `Sums`."""

    def __init__(
        self,
        saved: SavedSae,
        words: int,
        place: Callable[[RowBatch], tuple[np.ndarray, np.ndarray]],
        piece_rows: int,
    ) -> None:
        """`place` gives for a batch: in the window of each word, bool (W, B), and counted at all, bool (B,).

        `piece_rows` are those of one product: float32 sums over a store's chunk, float64 from there on.
        """
        self.place, self.piece_rows = place, piece_rows
        size = (words + 2, saved.sae.d_sae)
        self.sums_GF = torch.zeros(size, dtype=torch.float64, device=saved.sae.W_dec.device)
        self.rows_G = np.zeros(words + 2, np.int64)

    def add(self, batch: Encoded) -> None:
        """Count the rows of a batch."""
        all_WB, every_B = self.place(batch.rows)
        for start in range(0, batch.rows.size, self.piece_rows):
            here = slice(start, start + self.piece_rows)
            counted_B = every_B[here]
            inside_WB = all_WB[:, here][:, counted_B]
            any_1B = inside_WB.any(0, keepdims=True)
            mask_GB = np.concatenate([inside_WB, any_1B, ~any_1B])
            f_BF = batch.f_BF[here][torch.from_numpy(counted_B).to(batch.f_BF.device)]
            self.sums_GF += torch.from_numpy(mask_GB).to(f_BF) @ f_BF
            self.rows_G += mask_GB.sum(1)

    def result(self) -> Sums:
        """The sums of all rows that were added."""
        return Sums(self.sums_GF.cpu().numpy(), self.rows_G)


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


def sources_read(config: ReasonScoreConfig | None, sources: Sequence[str]) -> list[int]:
    """Indices of the sources whose contexts are read: those of reasoning; all where nothing says which."""
    chosen = config.sources if config else ()
    return [n for n, name in enumerate(sources) if not chosen or name in chosen]


class Scoring:
    """ReasonScore of one SAE: `sums` read the held-out rows; the training rows that the settings ask for follow."""

    def __init__(self, subject: Subject, config: ReasonScoreConfig) -> None:
        self.subject, self.config = subject, config
        contexts = subject.contexts
        self.chosen = sources_read(config, contexts.sources)
        heldout, train = (contexts.count(split) for split in ("holdout", "train"))
        count = heldout if config.contexts is None else min(config.contexts, heldout + train)
        if config.contexts and count < config.contexts:
            asked = f"({config.contexts:,} asked for)"
            print(f"evaluate.reason_score: {count:,} contexts, all that there are {asked}", flush=True)
        self.wanted = {"holdout": min(count, heldout), "train": max(0, count - heldout)}  # from the first on
        self.seen = {split: np.zeros(number, bool) for split, number in self.wanted.items()}
        self.words = word_groups(config.words, subject.tokenizer())
        self.matches_W = np.zeros(len(self.words), np.int64)
        self.sums = WordSums(subject.saved, len(self.words), self.place, subject.store.geometry.chunk_rows)

    def place(self, rows: RowBatch) -> tuple[np.ndarray, np.ndarray]:
        """In the window of each word, bool (W, B), and counted, bool (B,). A context's matches are counted once."""
        first, last = int(rows.context.min()), int(rows.context.max())
        tokens_CS = self.subject.contexts.read(rows.split, "tokens", first, last - first + 1)
        found = find_words(tokens_CS, self.words, self.config.window)
        wanted_B = np.isin(rows.source, self.chosen) & (rows.context < self.wanted[rows.split])
        here = np.unique(rows.context[wanted_B])
        new = here[~self.seen[rows.split][here]]
        self.matches_W += found.matches_WC[:, new - first].sum(1)
        self.seen[rows.split][new] = True
        counted_B = wanted_B & rows.kept & ~np.isin(rows.token, self.config.ignored_token_ids)
        return found.inside_WCS[:, rows.context - first, rows.position], counted_B

    def _read_training(self) -> bool:
        """Read the training rows that are wanted; whether the model had to give them, as the store lacks some."""
        subject, count = self.subject, self.wanted["train"]
        if not count:
            return False
        contexts, g = subject.contexts, subject.store.geometry
        shards = range(-(-count // g.shard_contexts))
        is_stored = set(shards) <= subject.store.complete_shards("train")
        if is_stored:
            rows = stored_rows(
                subject.store, "train", subject.rules, subject.config.batch_rows, contexts=contexts, shards=shards
            )
        else:
            numbers = np.flatnonzero(np.isin(contexts.read("train", "source", 0, count), self.chosen))
            rows = model_rows(subject.model(), contexts, "train", subject.rules, numbers, CONTEXTS_AT_ONCE)
        feed(subject.saved, subject.counted(rows, "reason score", count * g.context_size), [self.sums])
        return not is_stored

    def section(self) -> Section:
        """Scores of all features go to `reason_score-<hook>.npz`; the best of them are listed."""
        by_model = self._read_training()
        sums = self.sums.result()
        counts = {split: int(seen_C.sum()) for split, seen_C in self.seen.items()}
        absent = [word for word, rows in zip(self.words, sums.rows_G, strict=False) if not rows]
        figures: dict[str, Any] = {
            "contexts": sum(counts.values()),
            "contexts_of_training": counts["train"],
            "rows_inside": int(sums.rows_G[-2]),
            "rows_outside": int(sums.rows_G[-1]),
            "model_passes": int(by_model),
        }
        lists: dict[str, Any] = {
            "sources": [self.subject.contexts.sources[number] for number in self.chosen],
            "rows_from": "model" if by_model else "store",
            "alpha": self.config.alpha,
            "window": list(self.config.window),
            "words": [
                {"word": word, "matches": int(matches), "rows": int(rows)}
                for word, matches, rows in zip(self.words, self.matches_W, sums.rows_G, strict=False)
            ],
            "absent_words": absent,
            "suggested_words": self._suggested(),
        }
        if absent:
            said = f"evaluate.reason_score.words: not in the text read, so left out: {', '.join(absent)}"
            print(said, file=sys.stderr)
        if figures["rows_inside"]:
            self._score(sums, figures, lists)
        else:
            lists["message"] = (
                f"none of the words {', '.join(self.words)} occurs in the text read, so there is no score; "
                "set evaluate.reason_score.words to words that do (suggested_words)"
            )
        return Section(figures_of("reason_score", figures), lists)

    def _score(self, sums: Sums, figures: dict[str, Any], lists: dict[str, Any]) -> None:
        saved, config = self.subject.saved, self.config
        keep_G = [*(present := np.flatnonzero(sums.rows_G[:-2])), -2, -1]
        unit_F = saved.sae.W_dec.double().norm(dim=1).cpu().numpy() / saved.statistics.scale
        found = reason_score(Sums(sums.of_acts_GF[keep_G], sums.rows_G[keep_G]), unit_F, config.alpha)
        words = list(self.words)
        names = [words[i] for i in present]
        with replacing(self.subject.file("reason_score", ".npz")) as partial, partial.open("wb") as file:
            arrays = {name[: name.rindex("_")]: values for name, values in found._asdict().items()}
            np.savez(file, words=np.array(names), **arrays)
        score_F = found.score_F
        order = np.argsort(-score_F, kind="stable")
        figures["threshold"] = threshold = float(np.quantile(score_F, config.quantile))
        figures["selected_features"] = int((score_F > threshold).sum())
        ranks = np.unique(np.geomspace(1, len(order), 120).astype(int))
        lists["quantile"] = config.quantile
        lists["curve"] = [[int(rank), float(score_F[order[rank - 1]])] for rank in ranks]
        lists["top"] = [
            {
                "rank": rank,
                "feature": int(i),
                "score": float(score_F[i]),
                "selected": bool(score_F[i] > threshold),
                "entropy": float(found.entropy_F[i]),
                "mean_inside": float(found.mean_inside_F[i]),
                "mean_outside": float(found.mean_outside_F[i]),
                "word_means": dict(zip(names, found.word_means_WF[:, i].tolist(), strict=True)),
            }
            for rank, i in enumerate(order[:LISTED], 1)
        ]

    def _suggested(self) -> list[dict[str, Any]]:
        """Words typical of the chosen sources' held-out text; none where all sources are chosen."""
        contexts = self.subject.contexts
        if len(self.chosen) == len(contexts.sources):
            return []
        count = min(TEXT_CONTEXTS, contexts.count("holdout"))
        tokens = contexts.read("holdout", "tokens", 0, count).tolist()
        is_chosen = np.isin(contexts.read("holdout", "source", 0, count), self.chosen)
        sides: dict[bool, list[str]] = {True: [], False: []}
        for text, chosen in zip(self.subject.tokenizer().whole.decode_batch(tokens), is_chosen, strict=True):
            sides[bool(chosen)].append(text)
        return overrepresented(sides[True], sides[False])
