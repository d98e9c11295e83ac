"""A table of all features of an SAE: what is known of each, and finding those that fit.

Two figures are made here. `reasoning_share` is r / (r + o), r and o a feature's mean activation over the kept held-out
rows of the sources of reasoning and of the others: 1 for a feature that fires in reasoning alone, 0.5 for one that
does not care, however much text of each kind there is. `match` says how well a feature fits a token: where it was
asked what it fires on, the F1 score of the feature as a detector of the token, 2·a / (t + n), of a active rows with
the token, t active rows and n rows with the token; where it was asked what it promotes, the token's logit, as on the
feature's page.

Promoting are the hundred features of the largest logits. To be among the ten tokens that a feature promotes most would
be another rule, which few tokens pass: of 256 features of SmolLM2's default SAE, ten tokens each, there are only 240.

Shape suffixes: F d_sae, G groups of contexts, T tokens that a feature fires on, V vocabulary.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from evaluate.feature_views import CHIPS, Site, ranks, visible
from evaluate.spellings import spellings
from harvest.files import UserError

PROMOTING = 100  # features that are said to promote a token
WORDS = 3  # tokens that a feature fires on, in a line of a text's features
ONLY = 0.95  # of a feature's mean activation over sources, from which on it is said to fire in one alone
ASCENDING = ("number", "rank", "label", "verdict")  # as one reads them; the largest of the others come first
SORTS = (*ASCENDING, "density", "max", "score", "explained", "reasoning_share", "match")
Logits = Callable[[Sequence[int]], np.ndarray]  # of tokens: what each feature adds to their logits, (F, tokens)


class FindQuery(NamedTuple):
    """What is looked for; empty strings and None ask for nothing. All that is asked for must hold."""

    q: str = ""  # a feature's number, else a part of its label or a token that it fires on
    token: str = ""  # that it fires on
    promotes: str = ""  # a token that few features promote more
    label: str = ""  # a part of it
    source: str = ""  # that it fires in alone (ONLY)
    verdict: str = ""  # of token injection
    min_density: float | None = None
    max_density: float | None = None
    min_score: float | None = None
    sort: str = ""  # one of SORTS; by default match, score or density, the first that there is
    order: str = ""  # "asc" or "desc"; by default as one reads the column
    offset: int = 0
    limit: int = 50


class Found(NamedTuple):
    """A page of what was found."""

    total: int
    features: list[dict[str, Any]]


class FeatureTable:
    """What is known of all features; nothing changes once it is made."""

    def __init__(self, site: Site, reasoning: Sequence[str], logits: Logits, vocabulary: int) -> None:
        """`reasoning` are the sources of reasoning, `vocabulary` is the number of tokens. `logits` raises UserError
        where the model's end is not known."""
        self.site, self.logits, self.vocabulary = site, logits, vocabulary
        activity, scored, identity = site.activity, site.scored, site.identity
        self.d_sae = activity["active"].shape[1]
        self.density_F = activity["active"].sum(0) / max(1, activity["rows"].sum())
        self.max_F = activity["max"].max(0)
        nothing_F = np.full(self.d_sae, np.nan)
        self.score_F = scored.score_F if scored else nothing_F
        self.rank_F = ranks(scored.score_F).astype(float) if scored else nothing_F
        self.explained_F = identity.explained if identity else nothing_F
        self.reasoning_share_F = self.share_of(reasoning)
        self.label_F = np.array([self._label(feature) for feature in range(self.d_sae)], object)
        self.verdict_F = np.array(
            [site.injected.get(feature, {}).get("verdict", "") for feature in range(self.d_sae)], object
        )

    @property
    def sources(self) -> list[str]:
        """Names of the sources of the held-out text."""
        return [name for name in self.site.by_source() if "/" not in name]

    def share_of(self, sources: Iterable[str]) -> np.ndarray:
        """Part of a feature's mean activation over rows that is in these sources, beside the mean over the others,
        float64 (F,); NaN for a feature that never fires, and where there are no others."""
        activity, chosen = self.site.activity, {*sources}
        inside_G = np.array([name.partition("/")[0] in chosen for name in activity.groups])
        if inside_G.all() or not inside_G.any():
            return np.full(self.d_sae, np.nan)
        inside_F, outside_F = (
            activity["sum"][at].sum(0) / max(1, activity["rows"][at].sum()) for at in (inside_G, ~inside_G)
        )
        both_F = inside_F + outside_F
        return np.divide(inside_F, both_F, out=np.full(self.d_sae, np.nan), where=both_F > 0)

    def of(self, features: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Label, ReasonScore, rank, density, maximum, verdict and first tokens (WORDS) of features."""
        return {
            feature: {
                "label": self.label_F[feature],
                "score": _known(self.score_F[feature]),
                "rank": _whole(self.rank_F[feature]),
                "density": float(self.density_F[feature]),
                "max": float(self.max_F[feature]),
                "verdict": self.verdict_F[feature],
                "fires_on": self._words_F[feature],
            }
            for feature in features
        }

    def row(self, feature: int) -> dict[str, Any]:
        """A line of the table."""
        return {
            "number": feature,
            **self.of([feature])[feature],
            "explained": _known(self.explained_F[feature]),
            "reasoning_share": _known(self.reasoning_share_F[feature]),
            "fires_on": self.fires_on(feature),
        }

    def fires_on(self, feature: int) -> list[str]:
        """The tokens that it fires on most often, as text with nothing hidden."""
        names = ("token", "token_active")
        token_T, active_T = (self.site.activity[name][feature, :CHIPS] for name in names)
        return [visible(self.site.text(token)) or f"⟨token {token}⟩" for token in token_T[active_T > 0].tolist()]

    @cached_property
    def _words_F(self) -> list[list[str]]:
        """The same of all features, the first alone: a text has thousands of features."""
        chip = cache(lambda token: visible(self.site.text(token)) or f"⟨token {token}⟩")
        tokens, actives = (self.site.activity[name][:, :WORDS].tolist() for name in ("token", "token_active"))
        return [[chip(t) for t, n in zip(*pair, strict=True) if n] for pair in zip(tokens, actives, strict=True)]

    def find(self, query: FindQuery) -> Found:
        """A page of the features that fit, sorted; features that lack the column that is sorted by come last.

        Raises UserError for a source, a verdict, a column or an order that there is not.
        """
        at_F, match_F = self._fitting(query)
        sort = query.sort or ("match" if match_F is not None else "score" if self.site.scored else "density")
        _check("sort", sort, SORTS)
        _check("order", query.order, ("", "asc", "desc"))
        features = np.flatnonzero(at_F)
        chosen = self._sorted(features, sort, query.order or ("asc" if sort in ASCENDING else "desc"), match_F)
        page = chosen[query.offset : query.offset + query.limit].tolist()
        matches = np.full(self.d_sae, np.nan) if match_F is None else match_F
        lines = [self.row(feature) | {"match": _known(float(matches[feature]))} for feature in page]
        return Found(len(features), lines)

    def _fitting(self, query: FindQuery) -> tuple[np.ndarray, np.ndarray | None]:
        """Bool (F,) of those that fit; and how well, (F,), where a token was asked for."""
        at_F, matches = np.ones(self.d_sae, bool), []
        if query.source:
            _check("source", query.source, self.sources)
            at_F &= np.nan_to_num(self.share_of([query.source])) >= ONLY
        if query.verdict:
            _check("verdict", query.verdict, sorted({*self.verdict_F} - {""}))
            at_F &= self.verdict_F == query.verdict
        for least, most, value_F in (
            (query.min_density, query.max_density, self.density_F),
            (query.min_score, None, np.nan_to_num(self.score_F, nan=-np.inf)),
        ):
            at_F &= True if least is None else value_F >= least
            at_F &= True if most is None else value_F <= most
        if query.label:
            at_F &= self._labelled(query.label)
        for text, match in ((query.token, self._firing_on), (query.promotes, self._promoting)):
            if text:
                matches.append(match(text))
                at_F &= ~np.isnan(matches[-1])
        if query.q.strip():
            here_F, match_F = self._asked(query.q)
            at_F &= here_F
            matches += [match_F] if match_F is not None else []
        return at_F, matches[0] if matches else None

    def _asked(self, q: str) -> tuple[np.ndarray, np.ndarray | None]:
        if re.fullmatch(r"[0-9]{1,9}", q.strip()) and int(q) < self.d_sae:
            return np.arange(self.d_sae) == int(q), None
        match_F, labelled_F = self._firing_on(q), self._labelled(q)
        return ~np.isnan(match_F) | labelled_F, np.where(labelled_F, 1.0, match_F)  # a label that says it comes first

    def _labelled(self, text: str) -> np.ndarray:
        wanted = text.strip().casefold()
        return np.array([wanted in label.casefold() for label in self.label_F], bool)

    def _label(self, feature: int) -> str:
        return self.site.explained.get(feature, {}).get("label") or ""

    def _firing_on(self, text: str) -> np.ndarray:
        """F1 of features as detectors of the tokens that a text means, (F,); NaN for those that fire on none."""
        activity, tokens = self.site.activity, self.tokens_of(text)
        active_F = np.where(np.isin(activity["token"], tokens), activity["token_active"], 0).sum(1)
        rows = self._rows_V[np.array([t for t in tokens if t < len(self._rows_V)], int)].sum()
        score_F = 2 * active_F / np.maximum(1, activity["token_total"] + rows)
        return np.where(active_F > 0, score_F, np.nan)

    def _promoting(self, text: str) -> np.ndarray:
        """Largest logit among the tokens that a text means, (F,); NaN but for the PROMOTING features of the largest."""
        found_F, tokens = np.full(self.d_sae, np.nan), self.tokens_of(text)
        if tokens:
            largest_F = self.logits(tokens).max(1)
            best = np.argsort(-largest_F, kind="stable")[:PROMOTING]
            best = best[largest_F[best] > 0]
            found_F[best] = largest_F[best]
        return found_F

    def tokens_of(self, text: str) -> list[int]:
        """The tokens that a text means: the four spellings of a word in lower case, else the text as it is (`wait`
        stands for ` Wait` too, `Wait` for itself, as in settings); where there is no such token, those that hold it."""
        wanted = {text, *spellings(text.replace("|", ""))} if text.strip() else {text}
        exact = [token for each in sorted(wanted) for token in self._vocabulary.get(each, ())]
        if exact or not text:
            return exact
        return sorted({token for name, tokens in self._vocabulary.items() if text in name for token in tokens})

    @cached_property
    def _vocabulary(self) -> dict[str, list[int]]:
        """Tokens by their text."""
        found: dict[str, list[int]] = {}
        for token in range(self.vocabulary):
            text = self.site.text(token)
            for name in {text, visible(text)}:  # as it is, and as pages write it
                found.setdefault(name, []).append(token)
        return found

    @cached_property
    def _rows_V(self) -> np.ndarray:
        """Kept held-out rows of each token."""
        tokens = self.site.activity["tokens"][self.site.activity["kept"]]
        return np.bincount(tokens.astype(np.int64), minlength=1)

    def _sorted(self, features: np.ndarray, sort: str, order: str, match_F: np.ndarray | None) -> np.ndarray:
        if sort in ("label", "verdict"):
            named = {"label": self.label_F, "verdict": self.verdict_F}[sort][features]
            keys = np.unique(named.astype(str), return_inverse=True)[1].astype(float)
            keys[named == ""] = np.nan
        elif sort == "match":
            keys = np.full(len(features), np.nan) if match_F is None else match_F[features]
        else:
            keys = np.arange(self.d_sae, dtype=float)[features] if sort == "number" else self._column(sort)[features]
        keys = keys if order == "asc" else -keys
        return features[np.argsort(keys, kind="stable")]  # NaN comes last either way; of equal ones the lower number

    def _column(self, name: str) -> np.ndarray:
        return getattr(self, f"{name}_F")


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _whole(value: float) -> int | None:
    return None if np.isnan(value) else int(value)


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name}: {value!r}: no such {name}; known here: {', '.join(filter(None, known)) or 'none'}")
