"""The table of all features, and what is found in it, by hand."""

import numpy as np
import pytest

from evaluate.activity import Activity
from evaluate.feature_views import Scored, Site
from evaluate.token_identity import TokenIdentity
from harvest.files import UserError
from pipeline.explore.features import FeatureTable, FindQuery

WORDS = ["wait", " wait", "Wait", " Wait", " await", "\n", "7", "12", "the", "<b>"]
F, KEPT = 5, 40
NAN = np.nan


def table(**changed) -> FeatureTable:
    """Five features: 0 fires on all spellings of `wait`, 1 on two, 2 on `the`, 3 on `\\n` and `12`, 4 never.

    Three groups of unlike size: chat has 20 kept rows, reasoning 16 of algebra and 4 of numbers.
    """
    tokens = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 5], np.uint32)
    kept = np.ones(tokens.shape, bool)
    kept[0, KEPT:] = False  # of each token 4 rows count
    token, active = np.zeros((F, 32), np.uint32), np.zeros((F, 32), np.int32)
    for feature, fired in enumerate(({0: 4, 1: 4, 2: 4, 3: 4}, {1: 3, 8: 5}, {8: 4, 2: 1}, {5: 2, 7: 1})):
        token[feature, : len(fired)], active[feature, : len(fired)] = [*fired], [*fired.values()]
    arrays = {
        "rows": np.array([20, 16, 4]),
        "active": np.array([[0, 4, 5, 1, 0], [12, 4, 0, 1, 0], [4, 0, 0, 0, 0]]),
        "sum": np.array([[0.0, 10.0, 7.0, 2.0, 0.0], [24.0, 5.0, 0.0, 0.1, 0.0], [8.0, 0.0, 0.0, 0.0, 0.0]]),
        "max": np.array([[0.0, 3.0, 2.0, 2.0, 0.0], [4.0, 5.0, 0.0, 0.1, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0]], np.float32),
        "token": token,
        "token_active": active,
        "token_total": np.array([16, 8, 5, 3, 0]),
        "tokens": tokens,
        "kept": kept,
    }
    nothing = np.zeros((F, 10), np.int64)
    identity = TokenIdentity(
        np.array(["chat", "reasoning"]), np.array([False, True]), np.array([0.9, 0.2, 0.4, 0.4, NAN]), *[nothing] * 6
    )
    given = {
        "hook": "h",
        "activity": Activity(["chat", "reasoning/algebra", "reasoning/numbers"], arrays, 8),
        "text": lambda token: WORDS[token] if token < len(WORDS) else "",
        "no_promoted": "",
        "scored": Scored(np.array([0.5, 0.7, -0.1, NAN, NAN]), np.zeros((1, F)), ["wait"]),
        "identity": identity,
        "injected": {1: {"verdict": "token-driven"}, 2: {"verdict": "context-dependent"}},
        "explained": {0: {"label": "Waiting <b>"}, 3: {"label": "ends of lines"}},
    }
    return FeatureTable(Site(**given | changed), ["reasoning"], lambda ids: LOGITS[:, ids], len(WORDS))


LOGITS = np.random.default_rng(0).normal(size=(F, len(WORDS)))
LOGITS[:, 8] = [-1.0, 0.5, 2.0, -0.2, 0.7]


def numbers(found: FeatureTable, **query) -> list[int]:
    return [line["number"] for line in found.find(FindQuery(**query)).features]


def test_a_line_by_hand():
    assert table().row(1) == {
        "number": 1,
        "label": "",
        "score": 0.7,
        "rank": 1,
        "density": 8 / 40,
        "max": 5.0,
        "verdict": "token-driven",
        "explained": 0.2,
        "reasoning_share": pytest.approx((5 / 20) / (5 / 20 + 10 / 20)),
        "fires_on": ["·wait", "the"],
    }
    assert table().of([0, 4]) == {
        0: {"label": "Waiting <b>", "score": 0.5, "rank": 2, "density": 0.4, "max": 4.0, "verdict": ""}
        | {"fires_on": ["wait", "·wait", "Wait"]},
        4: {"label": "", "score": None, "rank": 5, "density": 0.0, "max": 0.0, "verdict": "", "fires_on": []},
    }
    assert (table().row(4)["reasoning_share"], table().row(4)["fires_on"]) == (None, [])
    assert table().row(3)["fires_on"] == ["↵", "12"]


def test_shares_do_not_depend_on_how_much_text_a_source_has():
    found = table()
    found.site.activity["rows"][0] *= 10
    found.site.activity["sum"][0] *= 10
    assert np.array_equal(found.share_of(["reasoning"]), table().share_of(["reasoning"]), equal_nan=True)
    assert np.allclose((found.share_of(["chat"]) + found.share_of(["reasoning"]))[:4], 1)
    assert np.isnan(found.share_of(["chat", "reasoning"])).all()  # there are no others to compare with
    assert np.isnan(found.share_of([])).all()


def test_a_feature_is_found_by_the_token_that_it_fires_on():
    """F1: precision is the part of the feature's rows that have the token, recall that of the token's rows."""
    lines = table().find(FindQuery(token="wait")).features
    for line, (active, total) in zip(lines, ((16, 16), (3, 8), (1, 5)), strict=True):
        precision, recall = active / total, active / 16
        assert line["match"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert [line["number"] for line in lines] == [0, 1, 2]
    assert numbers(table(), token="Wait") == [0, 2]  # this spelling alone, as in settings
    assert numbers(table(), token=" wait") == [1, 0]
    assert numbers(table(), token="ait") == [0, 1, 2]  # a part of tokens, as there is none of this name
    assert numbers(table(), token="\n") == numbers(table(), token="↵") == [3]  # as pages write it
    assert numbers(table(), token="·wait") == [1, 0]
    assert numbers(table(), token="nothing") == []
    assert numbers(table(), token="<b>") == []  # a token that no feature fires on
    assert numbers(table(), token="wait", sort="score") == [1, 0, 2]


def test_a_question_is_a_number_or_a_label_or_a_token():
    assert numbers(table(), q="3") == [3]
    assert numbers(table(), q=" 3 ") == [3]
    assert numbers(table(), q="7") == []  # no such feature, and none fires on this token
    assert numbers(table(), q="12") == [3]  # no such feature, and one that fires on this token
    assert numbers(table(), q="WAITING") == [0]
    assert numbers(table(), q="lines") == [3]
    found = table(explained={2: {"label": "the wait"}}).find(FindQuery(q="wait")).features
    assert [(line["number"], line["match"]) for line in found][:2] == [(0, 1.0), (2, 1.0)]  # what its label says first
    assert numbers(table(), q="  ") == numbers(table())
    assert numbers(table(), q="wait", verdict="token-driven") == [1]


def test_a_feature_is_found_by_the_token_that_it_promotes(monkeypatch):
    assert numbers(table(), promotes="the") == [2, 4, 1]  # the others make it less likely
    assert [line["match"] for line in table().find(FindQuery(promotes="the")).features] == [2.0, 0.7, 0.5]
    largest = LOGITS[:, [0, 1, 2, 3]].max(1)
    best = [feature for feature in np.argsort(-largest) if largest[feature] > 0]
    assert numbers(table(), promotes="wait") == best
    monkeypatch.setattr("pipeline.explore.features.PROMOTING", 2)
    assert numbers(table(), promotes="the") == [2, 4]
    assert numbers(table(), promotes="the", token="the") == [2]
    assert numbers(table(), promotes="nothing") == []


def test_filters_hold_together():
    assert numbers(table(), source="reasoning") == [0]
    assert numbers(table(), source="chat") == [2, 3]  # 3 fires there a hundred times as strongly per row
    assert numbers(table(), min_density=0.05, max_density=0.2) == [1, 2, 3]
    assert numbers(table(), min_density=0.4) == [0]
    assert numbers(table(), max_density=0.0) == [4]
    assert numbers(table(), min_score=0.5) == [1, 0]
    assert numbers(table(), min_score=-1) == [1, 0, 2]  # one without a score has none that is large enough
    assert numbers(table(), verdict="context-dependent") == [2]
    assert numbers(table(), label="of") == [3]
    assert numbers(table(), source="chat", max_density=0.06) == [3]


@pytest.mark.parametrize(
    ("sort", "order", "expected"),
    [
        ("", "", [1, 0, 2, 3, 4]),
        ("score", "asc", [2, 0, 1, 3, 4]),  # those without one stay last
        ("density", "", [0, 1, 2, 3, 4]),
        ("density", "asc", [4, 3, 2, 1, 0]),
        ("number", "", [0, 1, 2, 3, 4]),
        ("number", "desc", [4, 3, 2, 1, 0]),
        ("max", "", [1, 0, 2, 3, 4]),
        ("rank", "", [1, 0, 2, 3, 4]),
        ("explained", "", [0, 2, 3, 1, 4]),  # of equal ones the lower number
        ("reasoning_share", "", [0, 1, 3, 2, 4]),
        ("label", "", [3, 0, 1, 2, 4]),
        ("label", "desc", [0, 3, 1, 2, 4]),
        ("verdict", "", [2, 1, 0, 3, 4]),
        ("match", "", [0, 1, 2, 3, 4]),  # nothing was asked that could match
    ],
)
def test_columns_are_sorted(sort, order, expected):
    given = {} if sort != "label" else {"explained": {0: {"label": "waiting"}, 3: {"label": "ends"}}}
    assert numbers(table(**given), sort=sort, order=order) == expected


def test_without_scores_the_densest_come_first():
    assert numbers(table(scored=None)) == [0, 1, 2, 3, 4]
    assert table(scored=None, identity=None).row(0)["score"] is None
    assert table(scored=None, identity=None).row(0)["explained"] is None


def test_pages_join_without_a_gap():
    found = [table().find(FindQuery(offset=offset, limit=2)) for offset in (0, 2, 4, 6)]
    assert [each.total for each in found] == [5] * 4
    assert [line["number"] for each in found for line in each.features] == [1, 0, 2, 3, 4]
    assert [len(each.features) for each in found] == [2, 2, 1, 0]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"sort": "beauty"}, "sort: 'beauty': no such sort; known here: number, rank"),
        ({"order": "up"}, "order: 'up': no such order; known here: asc, desc"),
        ({"source": "books"}, "source: 'books': no such source; known here: chat, reasoning"),
        ({"verdict": "good"}, "verdict: 'good': no such verdict; known here: context-dependent, token-driven"),
    ],
)
def test_what_is_not_known_is_named(query, message):
    with pytest.raises(UserError, match=message):
        table().find(FindQuery(**query))
