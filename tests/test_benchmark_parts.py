"""Which conditions a benchmark has, under which keys its answers are known, and how its journal survives."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluate.attempts import (
    ANSWERS,
    Attempt,
    Condition,
    Place,
    answer_keys,
    journal_of,
    line_of,
    read_answers,
    write_answers,
)
from evaluate.benchmark import thinking_tokens
from evaluate.benchmark_config import BenchmarkConfig
from evaluate.controls import LIKE, Features, chosen_features, conditions_of, controls_of, count_conditions
from evaluate.operations import Operation
from harvest.files import UserError


def features(d_sae: int = 400, seed: int = 0, **more) -> Features:
    rng = np.random.default_rng(seed)
    density_F, max_F = 10 ** rng.uniform(-4, -1, d_sae), 10 ** rng.uniform(-1, 2, d_sae)
    return Features(density_F, max_F, rng.uniform(0.5, 2, d_sae), rng.normal(size=d_sae), 0.95)._replace(**more)


def test_controls_are_among_the_nearest_in_density_and_step():
    found, feature = features(), 17
    drawn = {one for seed in range(200) for one in controls_of(feature, found, 2, seed, ())}
    log_density, log_step = np.log(found.density_F), np.log(found.max_F * found.norm_F)
    apart = np.sqrt((log_density - log_density[feature]) ** 2 + (log_step - log_step[feature]) ** 2)
    free = [i for i in range(400) if i != feature and found.score_F[i] <= np.quantile(found.score_F, 0.95)]
    assert drawn == set(sorted(free, key=lambda i: apart[i])[:LIKE])
    selected = [i for i in range(400) if i not in free and i != feature]
    nearer = [i for i in selected if apart[i] < max(apart[list(drawn)])]
    assert nearer  # or the test would not see that they are left out


def test_controls_of_a_feature_stay_when_others_are_asked_for_too():
    found = features()
    alone = controls_of(17, found, 1, 3, [17])
    assert controls_of(17, found, 1, 3, [17, 4, 5, 99]) == alone
    assert controls_of(17, found, 2, 3, [17, *alone])[:1] != alone
    assert controls_of(17, found, 3, 3, [17])[:1] == alone
    assert any(controls_of(17, found, 1, seed, [17]) != alone for seed in range(5))


def test_features_that_never_fire_are_no_controls_and_there_may_be_too_few(capsys):
    density_F = np.zeros(400)
    density_F[[3, 8, 17]] = 0.01
    found = features(density_F=density_F, score_F=None)
    assert set(controls_of(17, found, 5, 0, [17])) == {3, 8}
    conditions = conditions_of(BenchmarkConfig(features=(17,), controls=5, strengths=(2.0,)), [17], found)
    assert len(conditions) == 1 + 1 + 2
    assert "benchmark.controls: 5: feature 17 has 2" in capsys.readouterr().out


def test_conditions_are_named_and_each_once():
    settings = {"features": (17, 4), "ops": ("add", "ablate", "scale"), "strengths": (0.0, 1.0, 2.5), "controls": 1}
    config = BenchmarkConfig(**settings, where=("all", "generated"))
    conditions = conditions_of(config, [17, 4], features())
    assert conditions[0] == Condition("none", (), "none", None)
    names = [condition.name for condition in conditions if condition.group == "feature"][:10]
    assert names == [
        *("feature 17 add 1", "feature 17 add 2.5", "feature 17 add 1 generated", "feature 17 add 2.5 generated"),
        *("feature 17 ablate", "feature 17 ablate generated", "feature 17 scale 0", "feature 17 scale 2.5"),
        *("feature 17 scale 0 generated", "feature 17 scale 2.5 generated"),
    ]
    assert len({condition.name for condition in conditions}) == len(conditions) == 1 + 2 * 10 * 2
    assert count_conditions(config) == len(conditions)
    for number, condition in enumerate(conditions):
        if condition.group == "control":
            (done,), (of,) = condition.operations, conditions[condition.of].operations
            assert condition.of == number - 1 and conditions[condition.of].group == "feature"
            assert done == of._replace(feature=done.feature) and done.feature not in (17, 4)
    assert conditions[1].operations == (Operation(17, "add", 1.0, "all"),)
    assert conditions[9].operations == (Operation(17, "ablate", 0.0, "all"),)


def test_features_are_those_of_the_settings_or_the_best():
    score_F = np.full(400, -1.0)
    score_F[[8, 9, 30, 31]] = [0, 0.5, 0.9, 0.1]
    found = features(score_F=score_F)
    assert chosen_features(BenchmarkConfig(features=(4, 2)), found) == (4, 2)
    assert chosen_features(BenchmarkConfig(best_features=2), found) == (30, 9)
    assert chosen_features(BenchmarkConfig(best_features=5), found) == (30, 9, 31)
    assert chosen_features(BenchmarkConfig(best_features=0), found._replace(score_F=None)) == ()


@pytest.mark.parametrize(
    ("settings", "changed", "says"),
    [
        ({"features": (400,)}, {}, "benchmark.features: 400: the SAE has 400 features, 0 to 399"),
        ({"features": (4,)}, {"max_F": np.zeros(400)}, "benchmark.features: 4: fires on no held-out row"),
        ({}, {"score_F": None}, "benchmark.features: empty, and there is no ReasonScore to choose by"),
        ({}, {"score_F": np.full(400, -1.0)}, "benchmark.features: empty, and no feature has a ReasonScore above 0"),
    ],
)
def test_features_that_cannot_be(settings, changed, says):
    with pytest.raises(UserError, match=says):
        chosen_features(BenchmarkConfig(**settings), features(**changed))


def test_a_key_is_of_all_that_decides_an_answer():
    shared, conditions, prompts = (
        [1, {"model": "x"}, [48, 0.6]],
        [[], ["sae", [3, "add", 2.0, "all", 7.5]]],
        [[1, 2], [3]],
    )
    keys = answer_keys(shared, conditions, prompts, 2, seed=0)
    assert set(keys) == {Place(c, p, s) for c in range(2) for p in range(2) for s in range(2)}
    assert len(set(keys.values())) == 8
    assert answer_keys(shared, conditions[::-1], prompts, 2, 0)[0, 1, 1] == keys[1, 1, 1]
    assert answer_keys(shared, conditions, [*prompts, [4]], 3, 0)[1, 1, 1] == keys[1, 1, 1]
    others = [
        answer_keys([1, {"model": "y"}, [48, 0.6]], conditions, prompts, 2, 0),
        answer_keys(shared, [["sae"], ["sae", [3, "add", 2.0, "all", 7.6]]], prompts, 2, 0),
        answer_keys(shared, conditions, [[1, 3], [4]], 2, 0),
        answer_keys(shared, conditions, prompts, 2, 1),
    ]
    assert not any(set(keys.values()) & set(each.values()) for each in others)


def attempt(number: int, text: str = "") -> Attempt:
    return Attempt(0, number, 0, text or f"answer\n{number} \u2028 é", 7, None, True, 12, 0)


def test_a_journal_is_read_as_it_was_written_whoever_wrote_it(tmp_path):
    for rank in range(2):
        with journal_of(tmp_path, rank) as journal:
            journal.add(line_of(f"key {rank}", attempt(rank)))
    assert read_answers(tmp_path) == {f"key {rank}": attempt(rank) for rank in range(2)}
    lines = [{"key": f"key {rank}", **attempt(rank)._asdict(), "parsed": None} for rank in range(2)]
    write_answers(tmp_path, lines)
    assert [path.name for path in tmp_path.iterdir()] == [ANSWERS]
    assert read_answers(tmp_path) == {f"key {rank}": attempt(rank) for rank in range(2)}


def test_a_line_that_was_cut_is_passed_over_by_others_and_taken_off_by_its_own(tmp_path):
    with journal_of(tmp_path, 1) as journal:
        journal.add(line_of("one", attempt(1)))
        journal.add(line_of("two", attempt(2)))
    whole = journal.path.read_bytes()
    for cut in range(1, len(whole) - whole.index(b"\n")):
        journal.path.write_bytes(whole[:-cut])
        assert set(read_answers(tmp_path)) == {"one"}
        assert journal.path.read_bytes() == whole[:-cut]
        with journal_of(tmp_path, 1) as journal:
            journal.add(line_of("two", attempt(2)))
        assert journal.path.read_bytes() == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is full")
def test_a_full_disk_is_named_by_the_journal(tmp_path):
    with journal_of(tmp_path, 0) as journal, Path("/dev/full").open("wb", buffering=0) as full:
        its_own, journal._file = journal._file, full
        with pytest.raises(OSError, match="No space left on device") as caught:
            journal.add(line_of("one", attempt(1)))
        journal._file = its_own
    assert caught.value.filename == str(journal.path)


@pytest.mark.parametrize("line", [b"{}\n", b"no JSON\n", b"[1]\n", b'{"key": "x", "condition": 0}\n', b"\xff\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    with journal_of(tmp_path, 0) as journal:
        journal.add(line_of("one", attempt(1)))
    journal.path.write_bytes(journal.path.read_bytes() + line)
    with pytest.raises(UserError, match=r"attempts-0\.jsonl: line 2 is damaged; delete it"):
        read_answers(tmp_path)


class Tokenizer:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


@pytest.mark.parametrize(
    ("prompt", "answer", "thought"),
    [
        ([9, 0], [5, 6, 1, 7, 8], 2),  # the template has begun the thinking
        ([9], [0, 5, 6, 1, 7], 3),
        ([9, 0], [5, 6, 7], 3),  # cut off
        ([9], [0, 5], 2),
        ([9], [5, 6], 0),
        ([0, 9, 1], [5, 6], 0),  # an earlier turn's
        ([0, 1, 0], [5, 1, 6, 0, 7, 1], 1),
    ],
)
def test_thinking_is_counted_up_to_its_end(prompt, answer, thought):
    assert thinking_tokens(Tokenizer("<think>", "</think>"), prompt, answer) == thought
    assert thinking_tokens(Tokenizer("<think>"), prompt, answer) is None


def test_a_journal_holds_no_key_twice_after_the_end(tmp_path):
    """A kill between writing attempts.jsonl and taking the journals away leaves both."""
    with journal_of(tmp_path, 0) as journal:
        journal.add(line_of("one", attempt(1)))
    kept = journal.path.read_bytes()
    write_answers(tmp_path, [{"key": "one", **attempt(1)._asdict()}])
    journal.path.write_bytes(kept)
    assert read_answers(tmp_path) == {"one": attempt(1)}
    assert json.loads((tmp_path / ANSWERS).read_text())["text"] == attempt(1).text
