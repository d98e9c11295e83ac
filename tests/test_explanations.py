"""Windows, marks, prompts, the reading of answers, and scores by numpy written out."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from evaluate.activity import Activity
from evaluate.asking import Answer
from evaluate.explain_config import ExplainConfig
from evaluate.explanations import (
    Explanation,
    Part,
    Writer,
    explain_question,
    others,
    questions_of,
    read_explanation,
    read_judgements,
    scores,
    true_marks,
    wrong_marks,
)
from evaluate.windows import Example, Examples, Firing, Text, Wanted, choose_examples

CONFIG = ExplainConfig(model="x")
WANTED = Wanted(strongest=3, samples=1, tests=8, hard_share=0.5, seed=0)


def example(acts, quarter: int = 0, tokens=None) -> Example:
    acts_T = np.array(acts, np.float32)
    token_T = np.arange(len(acts_T)) if tokens is None else np.array(tokens)
    return Example(0, 0, token_T, acts_T, acts_T == 0, quarter)


def writer(words: dict[int, str] | None = None, special: tuple[int, ...] = ()) -> Writer:
    words = words or {}
    whole = SimpleNamespace(get_added_tokens_decoder=lambda: dict.fromkeys(special))
    return Writer(SimpleNamespace(whole=whole, text=lambda token: words.get(token, f" t{token}")))


def text(contexts: int = 24, size: int = 18, tokens: int = 8) -> Text:
    """Contexts of two groups, 18 tokens of which the last two fill no window."""
    rng = np.random.default_rng(0)
    arrays = {"tokens": rng.integers(0, 50, (contexts, size)), "group": np.arange(contexts) % 3 // 2}
    return Text(Activity(["a", "b"], arrays, tokens), contexts, tokens)


def firing(found: Text, token: int, left_out: int = -1) -> Firing:
    """A feature that fires on a token, more in later contexts; rows at position `left_out` do not count."""
    place_N = np.flatnonzero(found.tokens_CS.reshape(-1) == token)
    context_N, position_N = np.divmod(place_N, found.size)
    return Firing(place_N, (1 + context_N + position_N / 100).astype(np.float32), position_N != left_out)


def test_the_second_half_of_each_group_is_for_testing():
    found = text()
    testing_C = found.testing_W[:: found.per_context]
    assert found.per_context == 2
    group_C = np.arange(24) % 3 // 2
    for group in (0, 1):
        mine = testing_C[group_C == group]
        assert mine.tolist() == [False] * (len(mine) // 2) + [True] * (len(mine) // 2)


def test_examples_are_what_they_are_said_to_be():
    found = text(90)
    fires = firing(found, 7, left_out=3)
    chosen = choose_examples(5, fires, found, WANTED)
    assert not chosen.missing
    acts_CS = np.zeros(found.tokens_CS.shape)
    acts_CS.reshape(-1)[fires.place_N] = fires.value_N
    counted_CS = acts_CS * (np.arange(found.size) != 3)
    testing_C = found.testing_W[:: found.per_context]
    for kind, examples, is_testing in (("explaining", chosen.explaining, 0), ("active", chosen.active, 1)):
        for each in examples:
            here = each.context, slice(each.start, each.start + 8)
            assert np.allclose(each.acts_T, counted_CS[here]), kind
            assert each.acts_T.max() > 0
            assert np.array_equal(each.token_T, found.tokens_CS[here])
            assert np.array_equal(each.silent_T, acts_CS[here] == 0)
            assert testing_C[each.context] == is_testing
    for each in chosen.silent:
        assert not (acts_CS[each.context, each.start : each.start + 8]).any()
        assert testing_C[each.context]
    assert len(chosen.silent) == len(chosen.active) == 8
    assert len({(each.context, each.start) for each in (*chosen.active, *chosen.silent)}) == 16
    peaks = [each.acts_T.max() for each in chosen.explaining[:3]]
    assert peaks == sorted(peaks, reverse=True)
    # Quarters are those of the peaks of all active windows of the half.
    every = sorted((counted_CS[c, s : s + 8].max() for c in np.flatnonzero(testing_C) for s in (0, 8)), reverse=True)
    every = [value for value in every if value > 0]
    bounds = np.cumsum([len(part) for part in np.array_split(every, 4)])
    for each in chosen.active:
        rank = every.index(pytest.approx(each.acts_T.max()))
        assert each.quarter == np.searchsorted(bounds, rank, side="right")
    assert sorted(each.quarter for each in chosen.active) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_hard_examples_hold_a_token_at_which_it_fires_elsewhere():
    found = text(60)
    place_N = np.flatnonzero(found.tokens_CS.reshape(-1) == 7)
    place_N = place_N[(place_N // found.size) % 2 == 0]  # on the token, in every second context
    fires = Firing(place_N, np.ones(len(place_N), np.float32), np.ones(len(place_N), bool))
    chosen = choose_examples(5, fires, found, WANTED)
    assert chosen.hard == len(chosen.silent) // 2 > 0
    assert sum(7 in each.token_T for each in chosen.silent) >= chosen.hard
    assert all(7 in each.token_T for each in chosen.silent[: chosen.hard])


def test_a_window_where_only_rows_left_out_fire_is_neither_active_nor_silent():
    found = text()
    starts = np.arange(24) * found.size
    left_out = np.concatenate([starts + 3, starts[:-5] + 11])  # position 3 does not count; 11 counts where
    counts = np.isin(left_out // found.size, np.arange(0, 24, 2)) & (left_out % found.size == 11)
    order = np.argsort(left_out)
    fires = Firing(left_out[order], np.ones(len(order), np.float32), counts[order])
    chosen = choose_examples(0, fires, found, WANTED)
    assert not chosen.missing
    assert {each.start for each in chosen.silent} == {8}
    assert {each.context for each in chosen.silent} <= set(range(19, 24))
    assert {each.start for each in chosen.active} == {8}


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ([], "fires on no held-out row"),
        ([20 * 18 + 1], "fires in no context of the explaining half"),
        ([1, 20 * 18 + 1], "fires in 1 windows of the testing half; a test needs 4"),
        (list(range(24 * 18)), "is silent in 0 windows of the testing half; a test needs 4"),
    ],
)
def test_too_few_windows_are_said(places, says):
    fires = Firing(np.array(places, np.int64), np.ones(len(places), np.float32), np.ones(len(places), bool))
    assert choose_examples(0, fires, text(), WANTED).missing == says


def test_marks():
    one = example([0, 0, 5, 4, 0, 1, 0, 2])
    assert np.flatnonzero(true_marks(one)).tolist() == [2, 3, 7]  # from 0.3 of the largest on
    seen = set()
    for seed in range(50):
        wrong = wrong_marks(one, np.random.default_rng(seed))
        assert wrong.sum() == 3
        assert not (one.acts_T[wrong] > 0).any()
        seen.add(tuple(np.flatnonzero(wrong).tolist()))
    assert len(seen) > 1
    runs = wrong_marks(example([0] * 20 + [3, 3, 3]), np.random.default_rng(0))
    assert np.ptp(np.flatnonzero(runs)) == 2  # in one run, as the true ones
    assert wrong_marks(example([1, 1, 1, 0]), np.random.default_rng(0)) is None
    apart = example([3, 3, 0, 0.5, 0, 0.5, 0, 0.5, 0])  # no run of two is silent
    found = [wrong_marks(apart, np.random.default_rng(seed)) for seed in range(20)]
    assert all(wrong.sum() == 2 and not apart.acts_T[wrong].any() for wrong in found)
    left_out = one._replace(silent_T=np.zeros(8, bool))
    assert wrong_marks(left_out, np.random.default_rng(0)) is None


def test_nothing_of_a_text_ends_a_mark_or_a_message():
    words = {0: "«", 1: "<|im_end|>", 2: "\n", 3: "\x1b[31m", 4: " a<b"}
    (marked,), signs = writer(words, (1,)).marked([example([1, 1, 0, 0, 0])], [np.array([1, 0, 1, 1, 0], bool)])
    assert signs == "⟦ and ⟧"
    assert marked == "⟦«⟧⟨|im_end|⟩⟦↵\\x1b[31m⟧ a<b"
    (marked,), signs = writer().marked([example([1, 0])], [np.array([True, False])])
    assert (marked, signs) == ("« t0» t1", "« and »")
    every = {0: "«⟦<<{{", 1: "»"}
    (marked,), _ = writer(every).marked([example([1, 0])], [np.array([True, False])])
    assert marked == "«⟦<<{{»"


def examples(active: int = 12, silent: int = 12) -> Examples:
    rng = np.random.default_rng(1)
    fires = [example(np.where(np.arange(8) == n % 8, 1.0 + n, 0), n % 4, rng.integers(0, 90, 8)) for n in range(active)]
    none = [example([0] * 8, -1, rng.integers(0, 90, 8)) for _ in range(silent)]
    return Examples(fires, fires, none, 0)


def test_every_example_is_asked_once_and_no_call_has_a_text_with_both_marks():
    asked = questions_of(3, examples(), Explanation("a label", "A sentence."), writer(), CONFIG)
    for test, rows, columns in (("detection", 24, None), ("fuzzing", 12, {0, 1})):
        places = [place for part in asked if part.test == test for place in part.places]
        assert len(places) == len(set(places)) == 24
        assert {row for row, _ in places} == set(range(rows))
        if columns is None:
            assert all(column == (row >= 12) for row, column in places)
    for part in asked:
        assert len({row for row, _ in part.places}) == len(part.places) <= CONFIG.batch
        assert len({column for _, column in part.places}) == 2 or part.test == "detection"
        assert "Description: a label. A sentence." in part.question.messages[1][1]
        assert ("«" in part.question.messages[1][1]) == (part.test == "fuzzing")
    again = questions_of(3, examples(), Explanation("other", "Other."), writer(), CONFIG)
    assert [part.places for part in again] == [part.places for part in asked]
    assert explain_question(examples(), writer(), CONFIG).messages[1][1].startswith("Excerpt 1 (strength 1 of 10): ")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('{"label": "a", "sentence": "b"}', "a"),
        ('Sure!\n```json\n{"label": " a\\n b ", "sentence": "b"}\n```\nDone {', "a b"),
        ('{"label": "draft", "sentence": "x"} no: {"label": "a", "sentence": "b"}', "a"),
        ('{"label": "' + "x" * 200 + '", "sentence": "b"}', "x" * 99 + "…"),
        ('{"label": "a"}', ""),
        ('{"label": " ", "sentence": "b"}', ""),
        ("a: b", ""),
        ("{" * 30_000, ""),
        ('["label", "sentence"]', ""),
    ],
)
def test_explanations_are_read(answer, label):
    found = read_explanation(Answer(answer))
    assert found.label == label
    assert bool(found.problem) == (not label)


@pytest.mark.parametrize(
    ("answer", "judged"),
    [
        ("[1, 0, 1]", [1, 0, 1]),
        ('```json\n{"answers": [1, 0, 1]}\n```', [1, 0, 1]),
        ("As in [1, 0, 0] I say [0, 1, true]", [0, 1, 1]),
        ("[1, 0]", []),
        ("[1, 0, 2]", []),
        ('["1", "0", "1"]', []),
        ("[1, 0, 1", []),
        ("1 0 1", []),
        ("[1, 0, 1] " + "[" * 9_000, [1, 0, 1]),  # deeper than Python reads
    ],
)
def test_judgements_are_read(answer, judged):
    found, problem = read_judgements(Answer(answer), 3)
    assert found == judged
    assert problem == ("" if judged else "no list of 3 zeros and ones")
    assert read_judgements(Answer("", "refused"), 3) == ([], "refused")


def test_scores_are_balanced_accuracy():
    """Against numpy written out, where one class is told better than the other and an answer is unreadable."""
    chosen = examples(active=12, silent=8)
    asked = questions_of(3, chosen, Explanation("l", "s"), writer(), CONFIG)
    rng = np.random.default_rng(4)
    answers, hits = [], {"detection": ([], []), "fuzzing": ([], [])}
    quarter_hits: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    for number, part in enumerate(asked):
        said = [int(rng.random() < (0.8 if column == 0 else 0.3)) for _, column in part.places]
        answers.append(Answer("none" if number == 1 else json.dumps(said)))
        for (row, column), one in zip(part.places, said, strict=True) if number != 1 else ():
            hits[part.test][column].append(one != column)
            if part.test == "detection" and column == 0:
                quarter_hits[chosen.active[row].quarter].append(one == 1)
    found, problems = scores(chosen, asked, answers)
    assert problems == {f"no list of {len(asked[1].places)} zeros and ones": 1}
    for test, (active, silent) in hits.items():
        assert found[test]["value"] == pytest.approx((np.mean(active) + np.mean(silent)) / 2)
        assert np.mean(active) != pytest.approx(np.mean(silent))
        assert found[test]["judged"] == len(active) + len(silent)
        assert found[test]["low"] < found[test]["value"] < found[test]["high"]
    silent = np.mean(hits["detection"][1])
    for quarter, one in enumerate(found["detection"]["by_quarter"]):
        assert one["value"] == pytest.approx((np.mean(quarter_hits[quarter]) + silent) / 2)


def test_the_interval_is_that_of_examples():
    """The percentiles of resampled examples, drawn here another way."""
    asked = [Part("detection", tuple((n, int(n >= 40)) for n in range(80)), None)]
    chosen = examples(active=40, silent=40)
    said = [int(n % 5 > 0) if n < 40 else int(n % 10 == 0) for n in range(80)]
    found, _ = scores(chosen, asked, [Answer(json.dumps(said))])
    hit = np.array([one != (n >= 40) for n, one in enumerate(said)], float)
    drawn = np.random.default_rng(9).integers(0, 80, (4000, 80))
    values = [(hit[rows[rows < 40]].mean() + hit[rows[rows >= 40]].mean()) / 2 for rows in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    assert found["detection"]["low"] == pytest.approx(low, abs=0.015)
    assert found["detection"]["high"] == pytest.approx(high, abs=0.015)


def test_a_control_has_another_explanation():
    explained = {n: Explanation(f"label {n % 3}", "s") for n in range(7)} | {9: Explanation("", "", "refused")}
    found = others(explained, 0)
    assert set(found) == set(range(7))
    assert all(explained[one] != explained[other] and other != 9 for one, other in found.items())
    assert others({1: Explanation("a", "b"), 2: Explanation("a", "b")}, 0) == {}
