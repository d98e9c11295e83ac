"""Windows of held-out text in which features fire, and others in which they are silent: examples of their activity.

Contexts are cut into windows of T tokens that do not overlap. The first half of each group's contexts (a source, or a
stratum of one) is for explaining a feature, the second for testing what was said of it. All activations of the chosen
features are read from the store once, so a silent window is one in which a feature fires at no row, be it one that
training leaves out; an active window is one in which it fires at a row that counts.

Memory: 21 bytes for each non-zero of the chosen features, on at most `ROWS` rows.

Shape suffixes: C contexts, S positions, T tokens of a window, W windows, N non-zeros, K features, B rows, D d_in.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from evaluate.activity import Activity
from evaluate.feature_views import ALIKE, QUARTERS
from evaluate.subject import Subject
from harvest.activation_rows import stored_rows

ROWS = 1 << 21  # of the held-out split that are read, whole shards from the first on
TOKENS = 10  # a feature's most frequent ones, which make a silent window a hard example
LEAST = 4  # windows of each kind that a test needs


class Firing(NamedTuple):
    """The non-zeros of one feature, in reading order."""

    place_N: np.ndarray  # context x S + position, ascending
    value_N: np.ndarray
    kept_N: np.ndarray  # bool: rows that count


class Example(NamedTuple):
    """One window."""

    context: int
    start: int
    token_T: np.ndarray
    acts_T: np.ndarray  # 0 where a row does not count
    silent_T: np.ndarray  # bool: the feature is silent there, whether the row counts or not
    quarter: int = -1  # of the feature's activations, 0 is the highest; -1: silent


class Examples(NamedTuple):
    """Those of one feature. `missing` says why there are none."""

    explaining: list[Example]  # the strongest first
    active: list[Example]  # for testing, as are the silent ones
    silent: list[Example]
    hard: int  # of the silent ones, those with a token at which the feature fires elsewhere
    missing: str = ""


class Wanted(NamedTuple):
    """How many examples of each kind."""

    strongest: int
    samples: int  # of each quarter
    tests: int
    hard_share: float
    seed: int


class Text:
    """The held-out contexts that are read, cut into windows."""

    def __init__(self, activity: Activity, contexts: int, tokens: int) -> None:
        self.tokens_CS, group_C = activity["tokens"][:contexts], activity["group"][:contexts]
        self.size = self.tokens_CS.shape[1]
        self.tokens = min(tokens, self.size)
        self.per_context = self.size // self.tokens
        cut_CS = self.tokens_CS[:, : self.per_context * self.tokens]
        self.token_WT = cut_CS.reshape(-1, self.tokens)
        testing_C = np.zeros(contexts, bool)
        for group in np.unique(group_C):
            of_group = np.flatnonzero(group_C == group)
            testing_C[of_group[(len(of_group) + 1) // 2 :]] = True
        self.testing_W = np.repeat(testing_C, self.per_context)

    def windows(self, place_N: np.ndarray) -> np.ndarray:
        """The window of each place, (N,); -1 for tokens at the end of a context that fill no window."""
        context_N, position_N = np.divmod(place_N, self.size)
        inside_N = position_N // self.tokens
        return np.where(inside_N < self.per_context, context_N * self.per_context + inside_N, -1)

    def example(self, firing: Firing, window: int, quarter: int = -1) -> Example:
        """A window as an example of a feature."""
        context, inside = divmod(int(window), self.per_context)
        start = inside * self.tokens
        first = context * self.size + start
        here = slice(*np.searchsorted(firing.place_N, [first, first + self.tokens]))
        at_N, kept_N = firing.place_N[here] - first, firing.kept_N[here]
        acts_T, silent_T = np.zeros(self.tokens, np.float32), np.ones(self.tokens, bool)
        silent_T[at_N] = False
        acts_T[at_N[kept_N]] = firing.value_N[here][kept_N]
        return Example(context, start, self.token_WT[window], acts_T, silent_T, quarter)


@torch.inference_mode()
def read_firings(subject: Subject, features: Sequence[int]) -> tuple[list[Firing], int]:
    """The non-zeros of each feature, and the number of contexts that were read for them."""
    saved, g = subject.saved, subject.store.geometry
    shards = range(min(g.holdout_shards, max(1, ROWS // g.shard_rows)))
    rows = stored_rows(
        subject.store,
        "holdout",
        subject.rules,
        subject.config.batch_rows,
        contexts=subject.contexts,
        shards=shards,
    )
    found: list[tuple[np.ndarray, ...]] = []
    for batch in rows:
        x_BD = batch.acts[saved.hook].to(saved.sae.W_dec.device).float()
        f_BK = saved.sae.columns(x_BD, features)
        row_N, of_N = (each.cpu().numpy() for each in f_BK.nonzero(as_tuple=True))
        place_N = batch.context[row_N] * g.context_size + batch.position[row_N]
        found.append((of_N.astype(np.int32), place_N, f_BK.cpu().numpy()[row_N, of_N], batch.kept[row_N]))
    of_N, place_N, value_N, kept_N = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((place_N, of_N))
    bounds = np.searchsorted(of_N[order], np.arange(len(features) + 1))
    parts = (order[first:end] for first, end in pairwise(bounds))
    return [Firing(place_N[at], value_N[at], kept_N[at]) for at in parts], len(shards) * g.shard_contexts


def choose_examples(feature: int, firing: Firing, text: Text, wanted: Wanted) -> Examples:
    """The examples of a feature, drawn by the seed and its number alone."""
    rng = np.random.default_rng([wanted.seed, feature])
    window_N = text.windows(firing.place_N)
    inside_N = window_N >= 0
    peak_W, fires_W = np.zeros(len(text.token_WT), np.float32), np.zeros(len(text.token_WT), bool)
    fires_W[window_N[inside_N]] = True
    counted_N = inside_N & firing.kept_N
    np.maximum.at(peak_W, window_N[counted_N], firing.value_N[counted_N])
    explaining, testing = (_by_peak(np.flatnonzero((peak_W > 0) & half_W), peak_W) for half_W in _halves(text))
    silent = np.flatnonzero(~fires_W & text.testing_W)
    if missing := _missing(len(explaining), len(testing), len(silent)):
        return Examples([], [], [], 0, missing)
    tests = min(wanted.tests, len(testing), len(silent))
    active = [
        (window, quarter)
        for quarter, part in enumerate(np.array_split(testing, len(QUARTERS)))
        for window in rng.permutation(part)[: tests // 4 + (quarter < tests % 4)]
    ]
    own = counted_N & ~text.testing_W[window_N]
    tokens, counts = np.unique(text.tokens_CS.reshape(-1)[firing.place_N[own]], return_counts=True)
    frequent = tokens[np.argsort(-counts, kind="stable")[:TOKENS]]
    is_hard = np.isin(text.token_WT[silent], frequent).any(1)
    hard = rng.permutation(silent[is_hard])[: round(wanted.hard_share * len(active))]
    easy = rng.permutation(np.setdiff1d(silent, hard))[: len(active) - len(hard)]
    return Examples(
        [text.example(firing, window) for window in _for_explaining(explaining, peak_W, firing, text, wanted)],
        [text.example(firing, window, quarter) for window, quarter in active],
        [text.example(firing, window) for window in (*hard, *easy)],
        len(hard),
    )


def _halves(text: Text) -> tuple[np.ndarray, np.ndarray]:
    return ~text.testing_W, text.testing_W


def _by_peak(windows: np.ndarray, peak_W: np.ndarray) -> np.ndarray:
    return windows[np.argsort(-peak_W[windows], kind="stable")]


def _missing(explaining: int, testing: int, silent: int) -> str:
    """Why there are too few windows; empty where there are enough."""
    if not explaining + testing:
        return "fires on no held-out row"
    if not explaining:
        return "fires in no context of the explaining half"
    if testing < LEAST:
        return f"fires in {testing} windows of the testing half; a test needs {LEAST}"
    return f"is silent in {silent} windows of the testing half; a test needs {LEAST}" if silent < LEAST else ""


def _for_explaining(windows: np.ndarray, peak_W: np.ndarray, firing: Firing, text: Text, wanted: Wanted) -> list[int]:
    """The strongest windows with different text, then some of each quarter of the rest."""
    seen: set[tuple[int, ...]] = set()
    strongest: list[int] = []
    for window in windows.tolist():
        example = text.example(firing, window)
        end = int(example.acts_T.argmax()) + 1
        words = tuple(example.token_T[max(0, end - ALIKE) : end].tolist())
        if words not in seen and len(strongest) < wanted.strongest:
            seen.add(words)
            strongest.append(window)
    rest = np.setdiff1d(windows, strongest)
    sampled: list[int] = []
    for part in np.array_split(_by_peak(rest, peak_W), len(QUARTERS)):
        picked = np.unique(np.linspace(0, len(part) - 1, min(wanted.samples, len(part))).astype(int))
        sampled += part[picked].tolist()
    return [*strongest, *sampled]
