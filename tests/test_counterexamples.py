"""Counterexamples on the tiny model: planted features, an oracle that writes texts, activations by a plain loop."""

import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle_server import MODEL, Said, serving

from evaluate.activity import LEFT_OUT, Excerpts
from evaluate.asking import Answer, Endpoint, ask
from evaluate.counterexamples import (
    Claim,
    Reading,
    candidates,
    counterexamples,
    json_texts,
    most_calls,
    reading_of,
    verdict,
)
from evaluate.falsify_config import FalsifyConfig
from evaluate.report import environment
from evaluate.visible import visible
from harvest.config import ModelConfig
from harvest.language_model import load_model
from harvest.tokenizer import load_tokenizer
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import Exclusion, InputStatistics
from train.standard import Standard

HOOK = "model.layers.0"
TINY = ModelConfig(name="assets/tiny-llama")
WAIT, NUMBERS, NEVER, PAD = 3, 5, 6, 7  # features: on the token " wait" alone, on " numbers" alone, on none, on token 0
CONFIG = FalsifyConfig(texts=6, contexts=2, paraphrases=3, at_least=3)


def planted(model, tokenizer) -> SavedSae:
    """An SAE with two token detectors: least squares on the rows of all tokens in many contexts."""
    words = ["wait", "numbers", "the", "sum", "of", "two", "is", "even", "so", "let", "me", "check", "therefore"]
    rng = np.random.default_rng(0)
    ids = np.array([tokenizer.encode_text(" " + " ".join(rng.choice(words, 24)))[:20] for _ in range(80)])
    ids[rng.random(ids.shape) < 0.05] = 0
    x_BD = model.activations(torch.from_numpy(ids))[HOOK].bfloat16().float().flatten(0, 1)
    x_B1 = torch.cat([x_BD, torch.ones(len(x_BD), 1)], 1)
    sae = Standard.initial(32, 8, scale=1.0)
    sae.W_enc[:], sae.b_enc[:] = 0, -1
    for feature, token in (
        (WAIT, *tokenizer.encode_text(" wait")),
        (NUMBERS, *tokenizer.encode_text(" numbers")),
        (PAD, 0),
    ):
        target_B = torch.from_numpy(np.where(ids.reshape(-1) == token, 1.0, -1.0)).float()
        solved = torch.linalg.lstsq(x_B1, target_B[:, None]).solution[:, 0]
        sae.W_enc[:, feature], sae.b_enc[feature] = solved[:-1], solved[-1]
    return SavedSae(sae, HOOK, InputStatistics(1.0, 1.0, None), {})


@pytest.fixture
def reading(finished, monkeypatch) -> Reading:
    monkeypatch.chdir(finished)
    model = load_model(TINY, None, [HOOK], torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(TINY, None, offline=True)
    return Reading(model, planted(model, tokenizer), tokenizer, Exclusion(ExcludeConfig(positions=(0,))), None, 30)


def plain(reading: Reading, text: str, feature: int) -> float:
    """The same, one text and one position at a time."""
    ids = ([] if reading.bos is None else [reading.bos]) + reading.tokenizer.encode_text(text)
    ids = ids[: reading.longest]
    largest = 0.0
    if ids:
        rows_SD = reading.model.activations(torch.tensor([ids]))[HOOK][0].bfloat16()
        for position, (token, row_D) in enumerate(zip(ids, rows_SD, strict=True)):
            about = {"token_id": token, "position": position, "norm": float(row_D.float().norm())}
            if reading.rule({name: np.array([value]) for name, value in about.items()}.__getitem__).all():
                largest = max(largest, float(reading.saved.sae.encode(row_D.float()[None])[0, feature]))
    return largest


@pytest.mark.parametrize(("bos", "first"), [("none", None), (None, None), ("document", 7), ("context", 7)])
def test_texts_are_read_as_contexts_are(reading, bos, first):
    subject = SimpleNamespace(
        model=lambda: reading.model,
        saved=reading.saved,
        tokenizer=lambda: reading.tokenizer,
        chat_tokenizer=lambda: SimpleNamespace(bos_token_id=7),
        rules={HOOK: reading.rule, "another": None},
        contexts=SimpleNamespace(bos=bos),
        store=SimpleNamespace(geometry=SimpleNamespace(context_size=30)),
    )
    assert reading_of(subject) == reading._replace(bos=first)


def claim(reading: Reading, feature: int, texts: list[str], explanation: str = "a word") -> Claim:
    """Excerpts of one length, with the activations that the texts have."""
    ids = [reading.tokenizer.encode_text(text) for text in texts]
    size = min(map(len, ids))
    token_NT = np.array([row[:size] for row in ids], np.uint32)
    found = reading.model.activations(torch.from_numpy(token_NT.astype(np.int64)))[HOOK].bfloat16()
    acts_NT = reading.saved.sae.encode(found.flatten(0, 1))[:, feature].reshape(len(ids), size).numpy()
    acts_NT[:, 0] = LEFT_OUT
    zeros = np.zeros(len(ids), np.int64)
    return Claim(feature, explanation, Excerpts(zeros, zeros, zeros, token_NT, acts_NT))


STRONG = {
    WAIT: [" so wait the sum of two is even so check", " let me check the two wait is the sum even"],
    NUMBERS: [" the sum of numbers is even so let me check", " two numbers so the sum is even let me so"],
}


def oracle(messages) -> str:
    """Recipes of which four of six hold the first marked word; paraphrases without any, but for the first."""
    asked = messages[-1]["content"]
    (word, *_) = re.findall("«(.*?)»", asked.replace("« and »", ""))
    if "nothing is reasoned" in asked:
        return (
            "Here they are:\n```json\n"
            + json.dumps([f" the {'sum' if i > 3 else word.strip()} {'even ' * i}is so" for i in range(6)])
            + "\n```"
        )
    return json.dumps([f" two of the {word.strip()} let me", " two of the sum let me", " of two the check is"])


@pytest.fixture
def asking(tmp_path):
    """`ask_all` of an oracle, which a test may replace."""
    with serving(oracle) as server:
        endpoint = Endpoint(server.url, MODEL, None, timeout_s=10, tries=3, parallel=4)
        server.ask_all = partial(ask, endpoint, journal=tmp_path / "calls.jsonl")
        yield server


def test_verdicts_of_planted_features(reading, asking):
    claims = [claim(reading, feature, STRONG[feature]) for feature in (WAIT, NUMBERS)]
    lists = counterexamples(reading, claims, asking.ask_all, CONFIG)
    assert [each["feature"] for each in lists["features"]] == [WAIT, NUMBERS]
    assert sum(asking.answered.values()) == most_calls(CONFIG, 2) == 8
    for each, word in zip(lists["features"], ("wait", "numbers"), strict=True):
        # The second answer of texts repeats the first; it asks for one, and an answer of five for no sixth.
        assert (each["fired"], each["of"], each["silent"], each["paraphrases"]) == (4, 5, 2, 3)
        assert each["verdict"] == "fires without reasoning"
        for row in each["texts"]:
            assert row["fires"] == (f" {word} " in f" {row['text']} ")
            assert row["activation"] == pytest.approx(plain(reading, row["text"], each["feature"]), abs=1e-5)
            if row["kind"] == "paraphrase":
                assert row["original"] in [text.strip() for text in STRONG[each["feature"]]]
                assert row["original_activation"] > 0.5 * each["reference"]
        assert each["reference"] == pytest.approx(
            max(plain(reading, text.strip(), each["feature"]) for text in STRONG[each["feature"]]), abs=1e-5
        )
    # Of each feature: a text again, and three paraphrases of the second context that are those of the first.
    assert lists["problems"] == {"a copy of an example or of another text": 2 * (1 + 3)}


def test_what_is_asked_has_the_explanation_and_marks(reading, asking):
    about = claim(reading, WAIT, STRONG[WAIT], "the word {wait} of <doubt>")
    counterexamples(reading, [about], asking.ask_all, CONFIG)
    bodies = [body for _, body in asking.requests]
    assert all("the word {wait} of <doubt>" in body["messages"][1]["content"] for body in bodies)
    texts = sorted((b for b in bodies if "nothing is reasoned" in b["messages"][1]["content"]), key=lambda b: b["seed"])
    assert ["1. so« wait» the sum of two" in b["messages"][1]["content"] for b in texts] == [True, True]
    assert [re.search(r"Write (\d+) texts", b["messages"][1]["content"])[1] for b in texts] == ["5", "1"]
    assert [b["seed"] for b in texts] == [0, 1] and {b["temperature"] for b in bodies} == {0.8}


def test_activations_are_those_of_a_plain_loop(reading):
    texts = [
        " wait",
        "",
        " wait the sum",
        " the sum of two wait " * 9,
        "numbers 1 é <|im_start|> wait",
        " so" * 40,
        " wait",
    ]
    texts += [" ".join(np.random.default_rng(i).choice(["wait", "numbers", "so", "even"], 3 + i)) for i in range(30)]
    features = [(WAIT, NUMBERS, NEVER, PAD)[i % 4] for i in range(len(texts))]
    rules = [Exclusion(ExcludeConfig(), 3.0), reading.rule, Exclusion(ExcludeConfig(token_ids=(3, 278)))]
    for rule in rules:
        for bos, longest in ((None, 30), (0, 7)):
            here = reading._replace(rule=rule, bos=bos, longest=longest)
            expected = [plain(here, text, feature) for text, feature in zip(texts, features, strict=True)]
            np.testing.assert_allclose(here.activations(texts, features), expected, atol=1e-5)
            assert max(expected) > 0.2


def test_thresholds_are_parts_of_the_strongest_context_alone(reading):
    class Graded:
        """Reads a text as a quarter of the number of its " wait"."""

        tokenizer = reading.tokenizer

        def activations(self, texts, _features):
            return np.array([text.count("wait") / 4 for text in texts], np.float32)

    texts = ["so", "wait", "wait wait", "wait wait wait", "wait wait wait wait wait"]
    texts = [f"let {text} let" for text in texts]
    strong = [" wait" * count + " so" * (8 - count) for count in (8, 4, 5)]  # 2, 1 and 1.25
    found = claim(reading, WAIT, strong)
    asked = []

    def ask_all(questions):
        asked.extend(questions)
        return [Answer(json.dumps([f"{text} {n}" for text in texts])) for n in range(len(questions))]

    (each,) = counterexamples(Graded(), [found], ask_all, FalsifyConfig(texts=5, contexts=3, paraphrases=5))["features"]
    assert each["reference"] == 2.0
    by_kind = {kind: [row for row in each["texts"] if row["kind"] == kind] for kind in ("counterexample", "paraphrase")}
    # Above 1 it fires, below 0.5 it is silent; a half and a quarter are neither.
    assert [row["activation"] for row in by_kind["counterexample"]] == [0, 0.25, 0.5, 0.75, 1.25]
    for rows in by_kind.values():
        assert [row["fires"] for row in rows] == [False, False, False, False, True] * (len(rows) // 5)
        assert [row["silent"] for row in rows] == [True, True, False, False, False] * (len(rows) // 5)
    assert {row["original_activation"] for row in by_kind["paraphrase"]} == {2.0, 1.25} and len(asked) == 3
    assert (each["fired"], each["of"], each["silent"], each["paraphrases"]) == (1, 5, 4, 10)
    assert each["verdict"] == "silent on paraphrases"


def test_a_context_that_does_not_fire_alone_is_not_reworded(reading, asking):
    about = claim(reading, WAIT, [*STRONG[WAIT][:1], " the sum of two is even so let me check"])
    (found,) = counterexamples(reading, [about], asking.ask_all, CONFIG)["features"]
    assert {row["original"] for row in found["texts"] if row["kind"] == "paraphrase"} == {STRONG[WAIT][0].strip()}


def test_a_feature_that_never_fires_is_not_asked_about(reading, asking):
    claims = [claim(reading, NEVER, STRONG[WAIT]), Claim(WAIT, "", claim(reading, WAIT, STRONG[WAIT]).strongest)]
    claims.append(Claim(NEVER, "", Excerpts(*(array[:0] for array in claims[0].strongest))))
    first, second, third = counterexamples(reading, claims, asking.ask_all, CONFIG)["features"]
    assert first["verdict"] == third["verdict"] == "too few texts" and not first["texts"] and not third["texts"]
    assert second["of"] and sum(asking.answered.values()) == most_calls(CONFIG, 1)


def test_answers_without_texts_are_counted(reading, asking):
    answers = iter(["no JSON", Said("I will not", "content_filter"), '["a wait", 7]', json.dumps([" the wait is so"])])
    asking.answer = lambda _: next(answers)
    lists = counterexamples(
        reading, [claim(reading, WAIT, STRONG[WAIT])], lambda q: [asking.ask_all([each])[0] for each in q], CONFIG
    )
    assert lists["problems"] == {"no JSON array of texts": 2, "refused": 1}
    assert [row["text"] for row in lists["features"][0]["texts"]] == ["the wait is so"]
    assert lists["features"][0]["verdict"] == "too few texts"


def test_copies_of_examples_do_not_count(reading, asking):
    long = " let me check the two wait is the sum even so the sum of two"
    answers = iter([json.dumps([long, f"Recipe: {long}", "two wait is", " wait so the wait", "Wait"])] * 3)
    asking.answer = lambda _: next(answers)
    config = CONFIG.model_copy(update={"texts": 5, "contexts": 1})
    lists = counterexamples(reading, [claim(reading, WAIT, [long])], asking.ask_all, config)
    assert [row["text"] for row in lists["features"][0]["texts"]] == ["wait so the wait", "Wait"]


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ('["a", " b "]', ["a", "b"]),
        ('Sure!\n```json\n["a\\n[1]"]\n```\nDone.', ["a\n[1]"]),
        ('["a", ""]', ["a"]),
        ('{"texts": ["a"]}', ["a"]),
        ('Here are [2] texts [1, "b"]: ["a", "b]"] and ["c"]', ["a", "b]"]),
        ('[{"text": "a"}]', []),
        ('["a", "b', []),
        ("[" * 99_999 + "]" * 99_999, []),
        ("", []),
    ],
)
def test_texts_are_found_in_what_models_answer(answer, texts):
    assert json_texts(answer) == texts
    assert [len(text) for text in json_texts(json.dumps(["x" * 9_999]))] == [2_000]


def test_verdicts_by_counts():
    assert verdict(3, 10, 0, 10, 3) == "fires without reasoning"
    assert verdict(2, 10, 3, 10, 3) == "silent on paraphrases"
    assert verdict(3, 3, 3, 3, 3) == "fires without reasoning, silent on paraphrases"
    assert verdict(2, 3, 2, 3, 3) == "not falsified"
    assert verdict(2, 10, 2, 2, 3) == verdict(0, 2, 0, 9, 3) == "too few texts"


def test_candidates_are_the_context_dependent_ones_without_controls():
    injected = [
        {"feature": feature, "group": group, "verdict": verdict}
        for feature, group, verdict in (
            (4, "top", "context-dependent"),
            (2, "top", "token-driven"),
            (9, "control", "context-dependent"),
            (7, "top", "context-dependent"),
            (1, "top", "context-dependent"),
        )
    ]
    assert candidates(injected, FalsifyConfig(features=2)) == [4, 7]


def test_settings_that_cannot_give_a_verdict_are_refused():
    with pytest.raises(ValueError, match=r"silent: 0\.6: is above fires = 0.5"):
        FalsifyConfig(silent=0.6)
    with pytest.raises(ValueError, match="at_least: 11: more than there are"):
        FalsifyConfig(at_least=11)


def test_hostile_texts_are_shown_as_text(reading):
    hostile = "so wait <script>alert(1)</script> \x1b[31m \u202e so"
    texts = json.dumps([hostile, "the wait is so"])
    lists = counterexamples(
        reading, [claim(reading, WAIT, STRONG[WAIT])], lambda asked: [Answer(texts, "")] * len(asked), CONFIG
    )
    lists["problems"]["<b>\x1b[0m"] = 1
    templates = environment({"visible": visible})
    page = templates.from_string(
        '{% from "counterexamples.html" import texts_of, table %}{{ texts_of(lists.features[0], lists) }}'
        "{{ table(lists, link) }}"
    ).render(lists=lists, link=str)
    assert "so wait &lt;script&gt;alert(1)&lt;/script&gt; \\x1b[31m \\u202e so" in page
    assert not re.search("<script|<b>\x1b|[\x1b\u202e]", page)
    assert "<p><b>Too few texts.</b> 2 of 2 texts without reasoning fire it, 0 of 0" in re.sub(r"\s+", " ", page)
    assert f"fires above {0.5 * lists['features'][0]['reference']:.3g} and is silent below" in page
    assert "&lt;b&gt;\\x1b[0m (1)" in page and page.count("<tr><td>") == 3
