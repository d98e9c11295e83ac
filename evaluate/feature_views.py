"""What the page of a feature shows, and how: figures as text, tokens with nothing hidden in them.

Shape suffixes: F d_sae, N excerpts of a feature, W words.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from evaluate.activity import BINS, LEFT_OUT, Activity, Excerpts
from evaluate.charts import bars
from evaluate.config import FeaturesConfig
from evaluate.token_identity import TokenIdentity

LEVELS = 9  # of shading
LONGEST = 40  # characters of a token that are shown
CHIPS = 10  # tokens of a list
ALIKE = 8  # excerpts with the same tokens up to the active one count as one text
QUARTERS = ("highest", "upper middle", "lower middle", "lowest")


class Scored(NamedTuple):
    """ReasonScore of all features, and the mean activation of each near each word."""

    score_F: np.ndarray
    word_means_WF: np.ndarray
    words: list[str]


class Weighed(NamedTuple):
    """What the weights alone say of a feature, the most extreme first."""

    promoted: list[tuple[int, float]]  # (token, logit)
    suppressed: list[tuple[int, float]]
    nearest: list[tuple[int, float]]  # (feature, cosine)


class Site(NamedTuple):
    """All that the pages of one SAE are made from."""

    hook: str
    activity: Activity
    text: Callable[[int], str]  # of a token
    no_promoted: str  # why there are no promoted tokens
    scored: Scored | None
    identity: TokenIdentity | None = None  # what tokens alone say of all features
    injected: Mapping[int, dict[str, Any]] = MappingProxyType({})  # what token injection found, by feature
    explained: Mapping[int, dict[str, Any]] = MappingProxyType({})  # label, sentence and scores by feature

    def by_source(self) -> dict[str, list[int]]:
        """Indices of the groups that each line of the table counts: a source with its strata, then each stratum."""
        lines: dict[str, list[int]] = {}
        for number, name in enumerate(self.activity.groups):
            lines.setdefault(name.partition("/")[0], []).append(number)
            if "/" in name:
                lines[name] = [number]
        return lines


def visible(text: str, blank: str = "·") -> str:
    """A token's text with nothing in it that cannot be seen or that moves other text about."""
    shown = "".join(_visible(character, blank) for character in text[:LONGEST])
    if unicodedata.category(text[:1] or " ").startswith("M"):
        shown = f"◌{shown}"  # a mark would sit on the token before
    return shown + (f"… ({len(text):,} characters)" if len(text) > LONGEST else "")


def _visible(character: str, blank: str) -> str:
    named = {" ": blank, "\n": "↵", "\t": "⇥", "\r": "␍"}.get(character)
    hidden = unicodedata.category(character)[0] in "CZ"
    return named or (f"⟨U+{ord(character):04X}⟩" if hidden else character)


def number(value: float | None) -> str:
    """Three digits that count; small ones as powers of ten."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


def thousandths(value: float) -> str:
    """ReasonScores, which are parts of all features' activation."""
    return f"{1000 * value:.3f}"


def percent(value: float) -> str:
    """A share between 0 and 1 as text: 12.5%."""
    return f"{number(100 * value)}%"


def rounded(value: float | None) -> str:
    """The same without decimals: 13%; a dash where there is none."""
    return "–" if value is None else f"{round(100 * value)}%"


def ranks(score_F: np.ndarray) -> np.ndarray:
    """The place of each feature by its score, from 1 on, int64 (F,); those without one come last."""
    return np.argsort(np.argsort(-score_F, kind="stable"), kind="stable") + 1


class Views:
    """What the templates show of each feature."""

    def __init__(self, site: Site, config: FeaturesConfig) -> None:
        self.site, self.config = site, config
        self.chip: Callable[[int], str] = cache(lambda token: visible(site.text(token)) or f"⟨token {token}⟩")
        self.running: Callable[[int], Markup] = cache(lambda token: escape(self._running(token)))
        self.silent: Callable[[int], Markup] = cache(lambda token: Markup("<i>{}</i>").format(self.running(token)))
        score_F = site.scored.score_F if site.scored else None
        self.rank_F = None if score_F is None else ranks(score_F)

    def all(self, weighed: Mapping[int, Weighed]) -> list[dict[str, Any]]:
        """Views of these features, the best first."""
        features = [self.of(feature, found) for feature, found in weighed.items()]
        key = "density" if self.site.scored is None else "score"
        return sorted(features, key=lambda feature: -feature[key])

    def _running(self, token: int) -> str:
        text = self.site.text(token)
        return visible(text, " ") if text.strip(" ") else self.chip(token)

    def of(self, feature: int, weighed: Weighed) -> dict[str, Any]:
        """The view of any feature."""
        site, activity = self.site, self.site.activity
        groups = list(range(len(activity.groups)))
        whole = self._source("", groups, feature)
        view = {
            "number": feature,
            "density": whole["density"],
            "max": whole["max"],
            "by_source": [self._source(name, groups, feature) for name, groups in site.by_source().items()],
            "fires_on": self._fires_on(feature),
            "strongest": self._strongest(activity.excerpts("strongest", feature), whole["max"]),
            "quarters": self._quarters(activity.excerpts("sampled", feature), whole["max"]),
            "histogram": self._histogram(feature),
            "promoted": self._chips(weighed.promoted),
            "suppressed": self._chips(weighed.suppressed),
            "no_promoted": site.no_promoted,
            "nearest": weighed.nearest,
            "explanation": site.explained.get(feature),
            "score": None,
            "words": [],
            "injected": site.injected.get(feature),
            "own": [],
        }
        if site.identity:
            view |= site.identity.of(feature) | {"own": self._own(site.identity, feature)}
        if site.scored and self.rank_F is not None:
            means = site.scored.word_means_WF[:, feature].tolist()
            widths = [100 * mean / (max(means) or 1) for mean in means]
            view["score"] = float(site.scored.score_F[feature])
            view["rank"] = int(self.rank_F[feature])
            view["words"] = list(zip(site.scored.words, means, widths, strict=True))
        return view

    def _source(self, name: str, groups: list[int], feature: int) -> dict[str, Any]:
        activity = self.site.activity
        rows, active = int(activity["rows"][groups].sum()), int(activity["active"][groups, feature].sum())
        total = float(activity["sum"][groups, feature].sum())
        return {
            "name": name,
            "rows": rows,
            "density": active / max(1, rows),
            "mean": total / max(1, rows),
            "mean_active": total / active if active else None,
            "max": float(activity["max"][groups, feature].max()),
        }

    def _fires_on(self, feature: int) -> list[dict[str, Any]]:
        found = self.site.activity
        names = ("token", "token_active", "token_sum")
        return [
            {"text": self.chip(int(token)), "share": active / found["token_total"][feature], "mean": total / active}
            for token, active, total in zip(*(found[name][feature, :CHIPS] for name in names), strict=True)
            if active
        ]

    def _own(self, identity: TokenIdentity, feature: int) -> list[dict[str, Any]]:
        """Its own tokens, with P(fires | token, source) and the rows that it is taken of."""
        return [
            {
                "text": self.chip(int(token)),
                "by_source": [
                    {"rows": int(rows), "rate": int(active) / int(rows) if rows else None}
                    for active, rows in zip(identity.active[feature, n], identity.rows[feature, n], strict=True)
                ],
            }
            for n, token in enumerate(identity.token[feature])
            if token >= 0
        ]

    def _chips(self, tokens: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"text": self.chip(token), "logit": logit} for token, logit in tokens]

    def _histogram(self, feature: int) -> Markup:
        counts, top = self.site.activity["histogram"][feature].tolist(), float(self.site.activity["top"][feature])
        used = max((i + 1 for i, count in enumerate(counts) if count), default=0)
        edges = [top * i / BINS for i in range(used + 1)]
        return bars("Held-out tokens by activation", counts[:used], edges, "activation") if used else Markup("")

    def _strongest(self, excerpts: Excerpts, top: float) -> list[dict[str, Any]]:
        seen: set[tuple[int, ...]] = set()
        shown = []
        for n in range(len(excerpts.context_N)):
            at = int(excerpts.position_N[n] - excerpts.start_N[n])
            text = tuple(excerpts.token_NT[n, max(0, at + 1 - ALIKE) : at + 1].tolist())
            if text not in seen and len(shown) < self.config.contexts:
                seen.add(text)
                shown.append(self._excerpt(excerpts, n, top))
        return shown

    def _quarters(self, excerpts: Excerpts, top: float) -> list[dict[str, Any]]:
        order = np.argsort(-excerpts.value_N, kind="stable")
        quarters = []
        for name, part in zip(QUARTERS, np.array_split(order, len(QUARTERS)), strict=True):
            # Evenly over the quarter, and of each context once where there are enough.
            fresh = [n for i, n in enumerate(part) if excerpts.context_N[n] not in excerpts.context_N[part[:i]]]
            usable = fresh if len(fresh) >= self.config.samples else part.tolist()
            picked = np.unique(np.linspace(0, len(usable) - 1, min(self.config.samples, len(usable))).astype(int))
            if len(part):
                values = excerpts.value_N[part]
                found = [self._excerpt(excerpts, int(usable[i]), top) for i in picked]
                quarters.append({"name": name, "low": values.min(), "high": values.max(), "excerpts": found})
        return quarters

    def _excerpt(self, excerpts: Excerpts, n: int, top: float) -> dict[str, Any]:
        at = int(excerpts.position_N[n] - excerpts.start_N[n])
        values = excerpts.acts_NT[n].tolist()
        tokens = [
            self._token(token, value, top, is_peak=i == at)
            for i, (token, value) in enumerate(zip(excerpts.token_NT[n].tolist(), values, strict=True))
        ]
        return {
            "tokens": Markup("").join(tokens),
            "glimpse": Markup("").join(tokens[max(0, at - 9) : at + 3]),
            "value": values[at],
            "source": self.site.activity.groups[self.site.activity["group"][excerpts.context_N[n]]],
            "context": int(excerpts.context_N[n]),
            "position": int(excerpts.position_N[n]),
            "start": int(excerpts.start_N[n]),
        }

    def _token(self, token: int, value: float, top: float, is_peak: bool) -> Markup:
        # Hundreds of thousands: a template takes four times as long.
        if value == 0:
            return self.silent(token)
        if value == LEFT_OUT:
            return Markup('<i class="x">{}</i>').format(self.running(token))
        level = min(LEVELS, math.ceil(LEVELS * value / top))
        return Markup('<i class="a{}{}" data-v="{}">{}</i>').format(
            level, " peak" if is_peak else "", number(value), self.running(token)
        )
