"""Answers come token by token with the bytes of `pipeline steer`, and with what the shaded feature reads there."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_tokenizers
import numpy as np
import pytest
import torch
from conftest import pipeline
from explored import TEXTS, reader_of, shelves_of
from transformers import AutoModelForCausalLM, GenerationConfig

from evaluate.engine import Completion, Engine
from evaluate.operations import Operation
from evaluate.sampler import Sampling
from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.language_model import load_model
from pipeline.explore.reading import Reader
from pipeline.explore.writing import HALF, Ask, End, Written, _Text, logprobs, write

HOOK = "model.layers.1"
PROMPT = "wait therefore the sum of two"


@pytest.fixture
def shelf(finished, monkeypatch) -> Any:
    monkeypatch.chdir(finished)
    return shelves_of(finished)[0]


@pytest.fixture(scope="module")
def reader(finished) -> Reader:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        return reader_of(shelves_of(finished)[0])


@pytest.fixture
def exact(reader, shelf, monkeypatch) -> Reader:
    """The same in float32."""
    settings = ModelConfig(name="assets/tiny-llama"), None, [HOOK], torch.float32, torch.device("cpu")
    return Reader(load_model(*settings, with_head=True), reader.tokenizer, reader.documents, reader.bos)


def firing(shelf: Any, count: int) -> list[int]:
    """Features by their largest activation."""
    return np.argsort(-shelf.activity["max"].max(0), kind="stable")[:count].tolist()


def sides(events: Iterator[Any]) -> tuple[dict[int, list[Written]], dict[int, Completion]]:
    """What was written, and how it ended; nothing comes after a side's end."""
    written, ends = {}, {}
    for event in events:
        assert event.side not in ends
        if isinstance(event, End):
            ends[event.side] = event.completion
        else:
            written.setdefault(event.side, []).append(event)
    return written, ends


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(16, 1.5, 0.9, seed=5)])
def test_an_answer_is_that_of_steer_byte_for_byte(reader, shelf, run_folder, sampling):
    one, two, three = firing(shelf, 3)
    operations = (Operation(one, "add", 4), Operation(two, "set", 2, "generated"), Operation(three, "ablate", 0))
    said = [f"{feature}:{op}:{strength}:{where}" for feature, op, strength, where in operations]
    ran = pipeline(
        *("steer", "--together", "--prompt", PROMPT, "--seed", str(sampling.seed), "--json", "out.json"),
        *("--max-new-tokens", str(sampling.max_new_tokens), "--temperature", str(sampling.temperature)),
        *("--top-p", str(sampling.top_p), *(part for each in said for part in ("--feature", each))),
    )
    assert ran.status == 0, ran.out
    expected = json.loads(Path("out.json").read_text())["completions"][0]["completions"][0]
    ids = reader.prompt_ids(PROMPT)
    for shade in (None, one):
        written, ends = sides(write(reader, shelf, Ask(ids, ((), operations), sampling, shade)))
        assert [ends[side]._asdict() for side in (0, 1)] == expected
        for side in (0, 1):
            assert "".join(each.text for each in written[side]) == expected[side]["text"]
            assert [each.id for each in written[side] if each.id is not None] == expected[side]["token_ids"]
    assert expected[0] != expected[1] and expected[1]["changed"] == expected[1]["processed"]
    alone = sides(write(reader, shelf, Ask(ids, (operations,), sampling)))[1][0]
    assert alone._asdict() == expected[1]
    other = sides(write(reader, shelf, Ask(ids, (operations,), sampling, sample=1)))[1][0]
    assert (other == alone) == (sampling.temperature == 0)


def dense_rows(ids: Sequence[int]) -> torch.Tensor:
    """Activations (S, D) behind the last layer, by transformers."""
    whole = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.float32).eval()
    found = []
    whole.model.layers[1].register_forward_hook(lambda _m, _i, out: found.append(out))
    with torch.no_grad():
        whole(torch.tensor([list(ids)]))
    return found[0].reshape(len(ids), -1)


def test_each_token_has_what_the_shaded_feature_reads_there_before_operations(exact, shelf):
    """The hook is behind the last layer, so what is done there changes the tokens alone."""
    feature = firing(shelf, 1)[0]
    ids, lists = exact.prompt_ids(PROMPT), ((), (Operation(feature, "ablate", 0), Operation(feature + 1, "add", 9)))
    asked = Ask(ids, lists, Sampling(20, 1.0, seed=3), feature)
    written, ends = sides(write(exact, shelf, asked))
    assert ends[0].token_ids != ends[1].token_ids
    for side in (0, 1):
        values, tokens = [each.value for each in written[side]], ends[side].token_ids
        expected = shelf.saved.sae.encode(dense_rows([*ids, *tokens]))[len(ids) :, feature].numpy()
        assert values[-1] is None and len(values) == 20  # the limit: the last token is never read
        assert np.abs(np.array(values[:-1], float) - expected[:-1]).max() < 1e-4 and expected.max() > 0.01
    plain, _ = sides(write(exact, shelf, asked._replace(shade=None)))
    assert [each.value for each in plain[1]] == [None] * 20 and [e.id for e in plain[1]] == ends[1].token_ids


def test_the_last_token_before_an_end_was_read(exact, shelf, monkeypatch):
    feature, ids = firing(shelf, 1)[0], exact.prompt_ids(PROMPT)
    asked = Ask(ids, ((),), Sampling(20, 1.0, seed=3), feature)
    whole, _ = sides(write(exact, shelf, asked))
    stop = next(n for n in range(4, 20) if whole[0][n].id not in [each.id for each in whole[0][:n]])
    monkeypatch.setattr(exact.causal, "generation_config", GenerationConfig(eos_token_id=whole[0][stop].id))
    written, ends = sides(write(exact, shelf, asked))
    assert ends[0].ended and [each.id for each in written[0]] == ends[0].token_ids
    assert [each.value for each in written[0]] == [each.value for each in whole[0][:stop]]
    assert "".join(each.text for each in written[0]) == ends[0].text


def test_tokens_come_one_by_one_and_a_closed_answer_computes_nothing_more(reader, shelf, monkeypatch):
    passes: list[str] = []
    read, step = "_read", "_decode"
    for name in (read, step):
        plain = getattr(Engine, name)
        see = lambda *args, name=name, plain=plain: (passes.append(name), plain(*args))[1]  # noqa: E731
        monkeypatch.setattr(Engine, name, see)
    ids = reader.prompt_ids(PROMPT)
    reader.sae(shelf)
    one = (Operation(firing(shelf, 1)[0], "add", 1),)
    events = write(reader, shelf, Ask(ids, ((), one), Sampling(50)))
    for side, expected in ((0, [read]), (1, [read, read]), (0, [read, read, step]), (1, [read, read, step])):
        event = next(events)
        assert isinstance(event, Written) and event.side == side and passes == expected
    events.close()  # type: ignore[attr-defined]
    assert passes == [read, read, step]
    passes.clear()
    events = write(reader, shelf, Ask(ids, (one,), Sampling(50)))  # alone, in the shape that `steer` computes in
    assert [next(events).side for _ in range(2)] == [0, 0] and passes == [read, step]


@pytest.mark.parametrize(
    "make",
    [
        made_tokenizers.byte_level,
        made_tokenizers.prepend,
        lambda: made_tokenizers.metaspace("first"),
        made_tokenizers.unigram,
        made_tokenizers.word_piece,
    ],
)
def test_pieces_make_up_the_text_and_hold_no_half_character(make):
    loaded = make()
    for text in (*TEXTS, "it 's , isn 't it ? we 've . done ' so ' they 're", "so 👍"):
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        for end in {len(ids), len(ids) - 1, 1}:  # the last ones may end within a character
            some = ids[: max(1, end)]
            piecemeal, whole = _Text(loaded), loaded.decode(some, skip_special_tokens=False)
            pieces = [piecemeal.next(some[: n + 1], n == len(some) - 1) for n in range(len(some))]
            assert "".join(pieces) == whole
            assert not any(HALF in piece for piece in pieces[:-1])
    cleaning = made_tokenizers.word_piece()
    cleaning.clean_up_tokenization_spaces = True
    ids = cleaning("it 's so , wait . the sum ? is", add_special_tokens=False)["input_ids"]
    piecemeal = _Text(cleaning)
    assert "".join(piecemeal.next(ids[: n + 1], n == len(ids) - 1) for n in range(len(ids))) == cleaning.decode(ids)


def test_a_text_that_a_later_token_changes_waits_until_it_goes_on():
    texts = ["so", "so ,", "so", "so, I", "so, I"]
    loaded = SimpleNamespace(
        decode=lambda ids, skip_special_tokens: texts[len(ids) - 1],
        convert_ids_to_tokens=lambda _id: "a",
        clean_up_tokenization_spaces=False,
    )
    text = _Text(loaded)
    assert [text.next(range(n + 1), n == 4) for n in range(5)] == ["so", " ,", "", "", ""]
    assert text.given == "so ,"  # of what was said nothing is taken back


def by_hand(ids: Sequence[int], change=lambda acts_SD: acts_SD) -> np.ndarray:
    """Log probabilities (S, V) by transformers, of a model whose last layer is changed."""
    whole = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.float32).eval()
    whole.model.layers[1].register_forward_hook(lambda _m, _i, out: change(out.clone()))
    with torch.no_grad():
        return torch.log_softmax(whole(torch.tensor([list(ids)])).logits[0], 1).numpy()


def test_probabilities_of_a_text_are_those_of_the_model(exact, shelf, monkeypatch):
    monkeypatch.setattr("pipeline.explore.writing.PLACES_AT_ONCE", 7)
    ids = exact.prompt_ids("so let me check the sum of two numbers is even wait")
    found, log_SV = logprobs(exact, shelf, ids, (), 3), by_hand(ids)
    assert np.isnan(found.of_S[0]) and len(found.of_S) == len(ids) > 8
    expected = [log_SV[s - 1, ids[s]] for s in range(1, len(ids))]
    assert np.abs(found.of_S[1:] - expected).max() < 1e-4
    order = np.argsort(-log_SV, 1, kind="stable")[:, :3]
    assert found.top_id_SK.shape == (len(ids) + 1, 3) and (found.top_id_SK[0] == -1).all()
    assert np.array_equal(found.top_id_SK[1:], order) and np.isnan(found.top_SK[0]).all()
    assert np.abs(found.top_SK[1:] - np.take_along_axis(log_SV, order, 1)).max() < 1e-4
    assert logprobs(exact, shelf, ids[:1], (), 0).top_id_SK.tolist() == [[-1], [order[0, 0]]]


def test_operations_change_probabilities_where_they_hold(exact, shelf):
    feature = firing(shelf, 1)[0]
    ids = exact.prompt_ids("so let me check the sum of two numbers")
    step_D = 3 * float(shelf.activity["max"][:, feature].max()) * shelf.saved.sae.direction([feature])[0]

    def from_5(out: torch.Tensor) -> torch.Tensor:
        out[..., 5:, :] += step_D
        return out

    plain, expected = by_hand(ids), by_hand(ids, from_5)
    found = logprobs(exact, shelf, ids, (Operation(feature, "add", 3, "generated"),), 1, prompt=5)
    given = [expected[s - 1, ids[s]] for s in range(1, len(ids))]
    assert np.abs(found.of_S[1:] - given).max() < 1e-4 and np.abs(expected - plain)[5:].max() > 0.01
    everywhere = logprobs(exact, shelf, ids, (Operation(feature, "add", 3, "generated"),), 1)
    assert np.abs(everywhere.of_S[1:] - [plain[s - 1, ids[s]] for s in range(1, len(ids))]).max() < 1e-4


def test_what_cannot_be_asked_is_named(reader, shelf, monkeypatch):
    add = lambda feature, where="all": ((Operation(feature, "add", 1, where),),)  # noqa: E731
    rows = len(reader.tokenizer)
    for ids, lists, sampling, shade, says in (
        ([], ((),), Sampling(4), None, "the prompt is empty"),
        ([5, rows], ((),), Sampling(4), None, f"has the token {rows}; this model has {rows}, 0 to {rows - 1}"),
        ([5, -1], ((),), Sampling(4), None, "has the token -1"),
        ([5] * 129, ((),), Sampling(4), None, "the prompt has 129 tokens; 128 at most"),
        ([5] * 128, ((),), Sampling(4), None, "has 128 tokens; with 4 new ones"),
        ([5], add(128), Sampling(4), None, "operations: 128: the SAE has 128 features"),
        ([5], ((), (*add(3)[0], *add(3)[0])), Sampling(4), None, "two operations on this feature"),
        ([5], ((),), Sampling(4), 128, "shade: 128: the SAE has 128 features"),
    ):
        with pytest.raises(UserError, match=says):
            next(write(reader, shelf, Ask(ids, lists, sampling, shade)))
    with pytest.raises(UserError, match="has the token"):
        logprobs(reader, shelf, [rows], (), 1)
    monkeypatch.setattr(reader.tokenizer, "get_vocab", dict)
    with pytest.raises(UserError, match="where: thinking"):
        next(write(reader, shelf, Ask([5], add(firing(shelf, 1)[0], "thinking"), Sampling(4))))


def test_a_feature_that_never_fired_is_ablated_and_not_added(reader, shelf):
    class Quiet:
        saved, activity = shelf.saved, SimpleNamespace(largest=lambda _feature: 0.0)

    made: Any = Quiet()
    with pytest.raises(UserError, match="feature 3 fires on none of the held-out rows"):
        next(write(reader, made, Ask([5, 6], ((Operation(3, "set", 1),),), Sampling(2))))
    assert sides(write(reader, made, Ask([5, 6], ((Operation(3, "ablate", 1),),), Sampling(2))))[1][0].changed == 3
