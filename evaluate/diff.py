"""Model diffing: how often the same features fire on two kinds of text, or under two models on the same text.

A feature that fires under one and not under the other is what has changed between them (arXiv 2503.18878 finds its
reasoning features so). Two sources of text need one model, and their rates come from the stored rows. For
two models both read the same held-out contexts here, and a row counts for neither where one would leave it out.

Shape suffixes: C contexts, B those of a batch, S positions, N rows, D d_in, F d_sae.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from evaluate.config import DiffConfig
from evaluate.downstream import left_out
from evaluate.fidelity import Fidelity
from evaluate.steering import check_fit
from evaluate.subject import Subject
from harvest.config import ModelConfig
from harvest.device import resolve_dtype
from harvest.files import UserError, replacing
from harvest.language_model import load_model
from harvest.tokenizer import load_tokenizer

CELLS = 48  # of each axis of the chart
FLOOR = -6.0  # log10 of the least rate on the chart; features that do not fire stand in its first cell
LISTED = 50

DEFINITIONS = {
    "a, b": "what is compared: two sources of text under the model, or the model and a second one on the same contexts",
    "rows_a, rows_b": "held-out rows counted on each side; those that training leaves out are not, and for two models "
    "those that it would leave out under either",
    "rate": "part of the counted rows in which a feature fires; rates of all features are in diff-<hook>.npz",
    "fire_on_both": "features with a rate above 0 on both sides [features]",
    "present, absent": "the thresholds of only_a and only_b [part of the rows]",
    "cells": "column, row and number of features of each cell of the chart",
    "correlation": "Pearson's, of log10 of the rates of the features that fire on both sides",
    "only_a": "features with a rate of at least `present` in a and below `absent` in b; only_b the other way round",
    "only_a_features": f"of these the {LISTED} with the highest rates",
    "renamed_tokens": "tokens (markers) that the second tokenizer names otherwise; their rows are not counted",
}


class Rates(NamedTuple):
    """Firing rates of all features on one side."""

    name: str
    rows: int
    rate_F: np.ndarray


def analyse(subject: Subject, heldout: Fidelity) -> dict[str, Any] | None:
    """Comparisons by kind ("sources", "models"); their rates go to `diff-<hook>.npz`. None where there is nothing
    to compare.

    Raises UserError for a second model that does not fit.
    """
    config = subject.config.diff
    if config is None:
        return None
    pairs: dict[str, tuple[Rates, Rates]] = {}
    more: dict[str, Any] = {}
    names = _chosen_sources(config, subject.contexts.sources)
    if names:
        a, b = (Rates(name, *heldout.by_group[name]) for name in names)
        pairs["sources"] = (a, b)
    if config.model:
        *models, more["renamed_tokens"] = compare_models(subject, config, config.model)
        pairs["models"] = (models[0], models[1])
    if not pairs:
        return None
    arrays = {f"{kind}_{side}": r.rate_F for kind, pair in pairs.items() for side, r in zip("ab", pair, strict=True)}
    with replacing(subject.file("diff", ".npz")) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    out = {kind: compare(*pair, config.present, config.absent) for kind, pair in pairs.items()}
    if "models" in out:
        out["models"] |= more
    return out


def compare(a: Rates, b: Rates, present: float, absent: float) -> dict[str, Any]:
    """Figures of two sides; see DEFINITIONS."""
    both_F = (a.rate_F > 0) & (b.rate_F > 0)
    logs = np.log10([a.rate_F[both_F], b.rate_F[both_F]])
    varied = both_F.sum() > 1 and (logs.std(1) > 0).all()
    out: dict[str, Any] = {
        "a": a.name,
        "b": b.name,
        "rows_a": a.rows,
        "rows_b": b.rows,
        "present": present,
        "absent": absent,
        "fire_on_both": int(both_F.sum()),
        "correlation": float(np.corrcoef(logs)[0, 1]) if varied else None,
    }
    for side, here_F, there_F in (("a", a.rate_F, b.rate_F), ("b", b.rate_F, a.rate_F)):
        only = np.flatnonzero((here_F >= present) & (there_F < absent))
        best = only[np.argsort(-here_F[only], kind="stable")][:LISTED]
        out[f"only_{side}"] = len(only)
        out[f"only_{side}_features"] = [
            {"feature": int(i), "rate": float(here_F[i]), "rate_there": float(there_F[i])} for i in best
        ]
    fires_F = (a.rate_F > 0) | (b.rate_F > 0)
    x, y = _cell(a.rate_F[fires_F]), _cell(b.rate_F[fires_F])
    cells, counts = np.unique(np.stack([x, y], 1), axis=0, return_counts=True)
    out["cells"] = [[int(i), int(j), int(n)] for (i, j), n in zip(cells, counts, strict=True)]
    return out


def _cell(rate_N: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        place_N = (np.log10(rate_N) - FLOOR) / -FLOOR * (CELLS - 1)
    return 1 + np.clip(place_N, -1, CELLS - 2).astype(int)


def _chosen_sources(config: DiffConfig, known: list[str]) -> tuple[str, ...]:
    if config.sources is None:
        return tuple(known[:2]) if len(known) > 1 else ()
    return config.sources


@torch.inference_mode()
def compare_models(subject: Subject, config: DiffConfig, second: ModelConfig) -> tuple[Rates, Rates, list[int]]:
    """Rates under the run's model and a second one on the first held-out contexts, and the renamed tokens.

    Raises UserError for a second model of another tokenizer, width or module tree.
    """
    offline = subject.config.runtime.offline
    saved, sae = subject.saved, subject.saved.sae
    other_tokenizer = load_tokenizer(second, second.revision, offline).whole
    renamed = renamed_tokens(subject.tokenizer().whole, other_tokenizer, second.name)
    down = subject.config.downstream
    dtype = resolve_dtype(down.compute_dtype if down else "auto", subject.device)
    other = load_model(second, second.revision, [saved.hook], dtype, subject.device, offline=offline)
    check_fit(other, saved, f"evaluate.diff.model.name: {second.name!r}")
    count = min(config.contexts, len(subject.context_source))
    tokens_CS = subject.contexts.read("holdout", "tokens", 0, count)
    rows, fired_2F = 0, torch.zeros(2, sae.d_sae, dtype=torch.int64, device=subject.device)
    limit = saved.statistics.norm_limit
    with subject.progress("diff", tokens_CS.size, "tokens") as progress:
        for start in range(0, count, config.batch_contexts):
            ids_BS = torch.from_numpy(tokens_CS[start : start + config.batch_contexts].astype(np.int64))
            ids_BS = ids_BS.to(subject.device)
            left_BS = torch.isin(ids_BS, torch.tensor(renamed, device=ids_BS.device, dtype=ids_BS.dtype))
            both: list[Tensor] = []
            for model in (subject.model(), other):
                acts_BSD = model.activations(ids_BS)[saved.hook].bfloat16().float()  # as the store holds them
                left_BS |= left_out(acts_BSD.norm(dim=2), ids_BS, subject.exclude, limit)
                both.append(acts_BSD)
            for side, acts_BSD in enumerate(both):
                f_NF = sae.encode(acts_BSD[~left_BS])
                fired_2F[side] += (f_NF > 0).sum(0)
            rows += int((~left_BS).sum())
            progress.advance(ids_BS.numel())
    rate_2F = fired_2F.cpu().numpy() / max(1, rows)
    return Rates("this model", rows, rate_2F[0]), Rates(second.name, rows, rate_2F[1]), renamed


def renamed_tokens(here: Tokenizer, there: Tokenizer, name: str) -> list[int]:
    """Ids of added tokens that two tokenizers of one vocabulary name differently, as Llama's and R1's do.

    Raises UserError where an ordinary token differs: the ids would mean another text.
    """
    texts = [{i: text for text, i in tokenizer.get_vocab().items()} for tokenizer in (here, there)]
    added = {*here.get_added_tokens_decoder(), *there.get_added_tokens_decoder()}
    differing = sorted(i for i in {*texts[0], *texts[1]} if texts[0].get(i) != texts[1].get(i))
    ordinary = [i for i in differing if i not in added]
    if ordinary:
        first = ordinary[0]
        raise UserError(
            f"evaluate.diff.model.name: {name!r}: its tokenizer is another one: {len(ordinary):,} tokens differ, the "
            f"first is {first}, {texts[0].get(first)!r} here and {texts[1].get(first)!r} there; the two models must "
            "read the same token ids"
        )
    return differing
