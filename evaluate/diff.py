"""Model diffing: how often the same features fire on two kinds of text, or under two models on the same text.

A feature that fires under one and not under the other is what has changed between them (arXiv 2503.18878 finds its
reasoning features so). Two sources of text need one model, and their rates come from the stored rows. For
two models both read the same held-out contexts here, and a row counts for neither where one would leave it out.

Shape suffixes: N rates or points, F d_sae.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from evaluate.config import DiffConfig
from evaluate.figures import Section, figures_of
from evaluate.steering import check_fit
from evaluate.subject import Subject
from harvest.activation_rows import model_rows, together
from harvest.config import ModelConfig
from harvest.device import resolve_dtype
from harvest.files import UserError, replacing
from harvest.language_model import load_model
from harvest.tokenizer import load_tokenizer

CELLS = 48  # of each axis of the chart
FLOOR = -6.0  # log10 of the least rate on the chart; features that do not fire stand in its first cell
LISTED = 50


class Rates(NamedTuple):
    """Firing rates of all features on one side."""

    name: str
    rows: int
    rate_F: np.ndarray


def analyse(subject: Subject, by_group: dict[str, tuple[int, np.ndarray]]) -> Section | None:
    """Comparisons of sources and of models; their rates go to `diff-<hook>.npz`. None where there are none.

    `by_group` has the kept rows of each source, and each feature's density there, (F,).

    Raises UserError for a second model that does not fit.
    """
    config, known = subject.config.diff, subject.contexts.sources
    if config is None:
        return None
    pairs: dict[str, tuple[Rates, Rates]] = {}
    more: dict[str, Any] = {}
    names = config.sources or (tuple(known[:2]) if len(known) > 1 else ())
    if names:
        a, b = (Rates(name, *by_group[name]) for name in names)
        pairs["sources"] = (a, b)
    if config.model:
        a, b, more["renamed_tokens"] = compare_models(subject, config, config.model)
        pairs["models"] = (a, b)
    if not pairs:
        return None
    arrays = {f"{kind}_{side}": r.rate_F for kind, pair in pairs.items() for side, r in zip("ab", pair, strict=True)}
    with replacing(subject.file("diff", ".npz")) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    section = Section([], {})
    for kind, pair in pairs.items():
        figures, section.lists[kind] = compare(*pair, config.present, config.absent)
        section.figures.extend(figures_of("diff", figures, rows=kind))
    if config.model:
        section.lists["models"] |= more
    return section


def compare(a: Rates, b: Rates, present: float, absent: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and lists of two sides; definitions.toml says what each is."""
    both_F = (a.rate_F > 0) & (b.rate_F > 0)
    logs = np.log10([a.rate_F[both_F], b.rate_F[both_F]])
    varied = both_F.sum() > 1 and (logs.std(1) > 0).all()
    figures: dict[str, Any] = {
        "rows_a": a.rows,
        "rows_b": b.rows,
        "fire_on_both": int(both_F.sum()),
        "correlation": float(np.corrcoef(logs)[0, 1]) if varied else None,
    }
    lists: dict[str, Any] = {"a": a.name, "b": b.name, "present": present, "absent": absent}
    for side, here_F, there_F in (("a", a.rate_F, b.rate_F), ("b", b.rate_F, a.rate_F)):
        only = np.flatnonzero((here_F >= present) & (there_F < absent))
        best = only[np.argsort(-here_F[only], kind="stable")][:LISTED]
        figures[f"only_{side}"] = len(only)
        lists[f"only_{side}_features"] = [
            {"feature": int(i), "rate": float(here_F[i]), "rate_there": float(there_F[i])} for i in best
        ]
    fires_F = (a.rate_F > 0) | (b.rate_F > 0)
    lists["cells"] = density_cells(a.rate_F[fires_F], b.rate_F[fires_F])
    return figures, lists


def density_cells(x_N: np.ndarray, y_N: np.ndarray) -> list[tuple[int, int, int]]:
    """Column, row and count of the cells of a chart with log axes from FLOOR to 0, which hold points (x, y)."""
    cells, counts = np.unique(np.stack([_cell(x_N), _cell(y_N)], 1), axis=0, return_counts=True)
    return [(int(i), int(j), int(n)) for (i, j), n in zip(cells, counts, strict=True)]


def _cell(rate_N: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        place_N = (np.log10(rate_N) - FLOOR) / -FLOOR * (CELLS - 1)
    return 1 + np.clip(place_N, -1, CELLS - 2).astype(int)


@torch.inference_mode()
def compare_models(subject: Subject, config: DiffConfig, second: ModelConfig) -> tuple[Rates, Rates, list[int]]:
    """Rates under the run's model and a second one on the first held-out contexts, and the renamed tokens.

    Raises UserError for a second model of another tokenizer, width or module tree.
    """
    offline, saved, down = subject.config.runtime.offline, subject.saved, subject.config.downstream
    other_tokenizer = load_tokenizer(second, second.revision, offline).whole
    renamed = renamed_tokens(subject.tokenizer().whole, other_tokenizer, second.name)
    dtype = resolve_dtype(down.compute_dtype if down else "auto", subject.device)
    other = load_model(second, second.revision, [saved.hook], dtype, subject.device, offline=offline)
    check_fit(other, saved, f"evaluate.diff.model.name: {second.name!r}")
    numbers = np.arange(min(config.contexts, subject.contexts.count("holdout")))
    sides = [
        model_rows(model, subject.contexts, "holdout", subject.rules, numbers, config.batch_contexts)
        for model in (subject.model(), other)
    ]
    rows, fired_2F = 0, torch.zeros(2, saved.sae.d_sae, dtype=torch.int64, device=subject.device)
    first = subject.counted(sides[0], "diff", len(numbers) * subject.store.geometry.context_size)
    for pair in together(first, sides[1]):
        kept = pair[0].kept & ~np.isin(pair[0].token, renamed)
        for side, batch in enumerate(pair):
            fired_2F[side] += (saved.sae.encode(batch.at(kept).acts[saved.hook]) > 0).sum(0)
        rows += int(kept.sum())
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
