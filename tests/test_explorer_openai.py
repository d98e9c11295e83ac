"""OpenAI's protocol, spoken with httpx: answers of the engine, scores of the model, and what is refused by name."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from explorer_server import HOOK, StandInReader, StandInShelf, events, http, post, refused, serving, tiny_explorer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from evaluate.operations import Operation
from evaluate.sampler import Sampling
from pipeline.explore.app import make_app
from pipeline.explore.explorer import About, Explorer
from pipeline.explore.openai_answers import Stops
from pipeline.explore.safety import Access
from pipeline.explore.steering_command import Origin
from pipeline.explore.writing import Ask, End, write

MODEL = "tiny-llama"
PROMPT = "wait therefore the sum"
TURNS = [{"role": "user", "content": "wait"}]


@pytest.fixture(scope="module")
def explorer(finished):
    before = Path.cwd()
    os.chdir(finished)
    yield tiny_explorer()
    os.chdir(before)


@pytest.fixture(scope="module")
def url(explorer):
    with serving(make_app(explorer, Access())) as found:
        yield found


@pytest.fixture(scope="module")
def shelf(explorer):
    return explorer.shelf(None)


@pytest.fixture(scope="module")
def reader(explorer):
    return explorer.load()


@pytest.fixture(scope="module")
def feature(shelf):
    return int(shelf.activity["max"].max(0).argmax())


def written(reader, shelf, ids, sampling, operations=(), sample=0):
    """The answer, from the engine itself."""
    (end,) = (e for e in write(reader, shelf, Ask(ids, [operations], sampling, sample=sample)) if isinstance(e, End))
    return end.completion


def complete(url, **body):
    answer = post(url, "/v1/completions", {"model": MODEL, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_models(url):
    (model,) = http.get(f"{url}/v1/models").json()["data"]
    assert (model["id"], model["object"]) == (MODEL, "model")
    for name in (MODEL, f"{MODEL}+3:set:2:generated", f"{MODEL}@{HOOK}+3"):
        assert http.get(f"{url}/v1/models/{name}").json()["id"] == name
    assert "no such model; one of tiny-llama" in refused(http.get(f"{url}/v1/models/gpt-4o"), 404)


def test_a_completion_is_the_engine_s(url, reader, shelf):
    ids = reader.prompt_ids(PROMPT, False)
    expected = written(reader, shelf, ids, Sampling(7))
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        found = complete(url, prompt=prompt, max_tokens=7)
        assert (found["object"], found["model"]) == ("text_completion", MODEL)
        assert found["choices"] == [{"index": 0, "text": expected.text, "finish_reason": "length", "logprobs": None}]
        assert found["usage"] == {
            "prompt_tokens": len(ids),
            "completion_tokens": 7,
            "total_tokens": len(ids) + 7,
        }


def test_prompts_and_samples_come_in_order(url, reader, shelf):
    prompts, sampling = ["wait therefore", "so let me check"], Sampling(5, 1.0, 0.9, seed=4)
    found = complete(url, prompt=prompts, n=2, max_tokens=5, temperature=1, top_p=0.9, seed=4)
    expected = [
        written(reader, shelf, reader.prompt_ids(prompt, False), sampling, sample=sample).text
        for prompt in prompts
        for sample in range(2)
    ]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in found["choices"]] == expected
    assert len(set(expected)) == 4
    assert found["usage"]["prompt_tokens"] == sum(len(reader.prompt_ids(prompt, False)) for prompt in prompts)
    assert found["usage"]["completion_tokens"] == 20


def test_without_a_seed_answers_differ(url):
    assert len({complete(url, prompt=PROMPT, temperature=2)["choices"][0]["text"] for _ in range(4)}) > 1


def test_operations_of_the_name_and_of_the_body_are_one(url, reader, shelf, feature):
    operations = (Operation(feature, "add", 40.0, "all"), Operation(feature - 1, "ablate", 1.0, "generated"))
    expected = written(reader, shelf, reader.prompt_ids(PROMPT, False), Sampling(7), operations).text
    assert expected != written(reader, shelf, reader.prompt_ids(PROMPT, False), Sampling(7)).text
    one = {"feature": feature, "strength": 40.0}
    other = {"feature": feature - 1, "op": "ablate", "where": "generated"}
    for body in (
        {"operations": [one, other]},
        {"model": f"{MODEL}+{feature}:40+{feature - 1}:ablate:generated"},
        {"model": f"{MODEL}@{HOOK}+{feature}:add:40", "operations": [other]},
        {"model": "", "operations": [one, other]},
    ):
        assert complete(url, prompt=PROMPT, max_tokens=7, **body)["choices"][0]["text"] == expected
    twice = {"model": f"{MODEL}+{feature}", "operations": [one], "prompt": PROMPT}
    assert "two operations" in refused(post(url, "/v1/completions", twice), 400)


def test_a_stop_ends_an_answer_before_it(url, reader, shelf):
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1, "seed": 2}
    whole = written(reader, shelf, reader.prompt_ids(PROMPT, False), Sampling(12, 1.0, seed=2)).text
    middle = whole[9:13]
    at = whole.index(middle)
    assert at > 0
    for stop in (middle, ["never there", middle]):
        for stream in (False, True):
            answer = post(url, "/v1/completions", asked | {"stop": stop, "stream": stream})
            choices = [c["choices"][0] for c in events(answer)[:-1]] if stream else answer.json()["choices"]
            assert "".join(choice["text"] for choice in choices) == whole[:at]
            assert choices[-1]["finish_reason"] == "stop"
    for stop in ("never there", f"{whole[-2:]}never there"):
        assert complete(url, **asked | {"stop": stop})["choices"][0]["text"] == whole


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stops_are_found_however_the_text_comes(pieces, stops):
    found, text, given_on = Stops(stops), "".join(pieces), ""
    for piece in pieces:
        given_on += found.take(piece)
        assert not found.found or given_on == text[: len(given_on)]
        if found.found:
            break
    ends = [text.index(stop) for stop in stops if stop in text]
    if ends:
        assert found.found
        # Of stops that begin at several places the one that is whole first; what was given on holds none of them.
        assert not any(stop in given_on for stop in stops)
    else:
        assert given_on + found.held == text
        assert not found.held or any(stop.startswith(found.held) for stop in stops)


def scores_by_hand(ids):
    """Log-probabilities (S, V) behind each token, from transformers alone."""
    model = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].float().numpy().astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


def test_scores_of_a_text_are_the_model_s(url, reader):
    """What lm-eval's local-completions asks for, and how it reads it: all but the token that was written."""
    ids = reader.prompt_ids(PROMPT, False)
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    (choice,) = complete(url, prompt=[ids], **asked)["choices"]
    found = choice["logprobs"]
    log_SV = scores_by_hand(ids)
    likeliest = log_SV.argmax(1)
    assert len(found["tokens"]) == len(ids) + 1
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    for s in range(1, len(ids)):
        assert found["token_logprobs"][s] == pytest.approx(log_SV[s - 1, ids[s]], abs=0.02)
        top = found["top_logprobs"][s]
        assert max(top.values()) == pytest.approx(log_SV[s - 1].max(), abs=0.02)
        assert (found["token_logprobs"][s] == max(top.values())) == (likeliest[s - 1] == ids[s])
        assert top[found["tokens"][s]] == found["token_logprobs"][s]
    assert choice["text"] == "".join(found["tokens"])
    assert choice["text"].startswith(PROMPT)
    assert [choice["text"][at:].startswith(t) for at, t in zip(found["text_offset"], found["tokens"], strict=True)]
    assert found["text_offset"] == [len("".join(found["tokens"][:s])) for s in range(len(ids) + 1)]


def test_one_pass_says_what_two_say(url, reader):
    """A stop that never comes takes the way of all other answers: one pass to write, one to score."""
    asked = {"prompt": [reader.prompt_ids(PROMPT, False)], "max_tokens": 1, "logprobs": 3, "echo": True}
    one, two = (complete(url, **asked, **more)["choices"] for more in ({}, {"stop": "never there"}))
    assert one[0]["text"] == two[0]["text"]
    assert one[0]["logprobs"]["tokens"] == two[0]["logprobs"]["tokens"]
    pairs = zip(one[0]["logprobs"]["token_logprobs"][1:], two[0]["logprobs"]["token_logprobs"][1:], strict=True)
    assert all(a == pytest.approx(b, abs=0.02) for a, b in pairs)


def test_a_token_that_ends_the_text_is_scored_and_not_shown(url, explorer, monkeypatch):
    asked = {"prompt": PROMPT, "max_tokens": 1, "logprobs": 1, "echo": True}
    (plain,) = complete(url, **asked)["choices"]
    reader = explorer._loading.result()
    ids = reader.tokenizer(plain["text"], add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(reader, "ends", {ids[-1]})
    (choice,) = complete(url, **asked)["choices"]
    assert (plain["finish_reason"], choice["finish_reason"]) == ("length", "stop")
    assert plain["text"] != choice["text"] == PROMPT
    assert choice["logprobs"]["token_logprobs"] == plain["logprobs"]["token_logprobs"]


def test_scores_of_a_steered_model_are_others(url, feature):
    asked = {"prompt": PROMPT, "max_tokens": 1, "logprobs": 1, "echo": True}
    plain = complete(url, **asked)["choices"][0]["logprobs"]["token_logprobs"]
    steered = complete(url, model=f"{MODEL}+{feature}:set:6", **asked)["choices"][0]["logprobs"]["token_logprobs"]
    assert np.abs(np.subtract(plain[1:-1], steered[1:-1])).max() > 0.05


def test_scores_take_what_was_written_for_generated(url, feature):
    """An operation on what is generated changes the scores of the answer behind its first token, and no other."""
    asked = {"prompt": PROMPT, "max_tokens": 4, "logprobs": 0, "echo": True, "temperature": 1, "seed": 3}
    steered = {"operations": [{"feature": feature, "strength": 40.0, "where": "generated"}]}
    (choice,) = complete(url, **asked, **steered)["choices"]
    found, text = choice["logprobs"], choice["text"]
    (plain,) = complete(url, prompt=text, max_tokens=0, logprobs=0, echo=True)["choices"]
    assert plain["logprobs"]["tokens"] == found["tokens"]
    moved = np.abs(np.subtract(found["token_logprobs"][1:], plain["logprobs"]["token_logprobs"][1:]))
    assert moved[:-3].max() < 0.02 < moved[-3:].min()


def test_only_the_answer_is_scored_without_echo(url, reader):
    (choice,) = complete(url, prompt=PROMPT, max_tokens=3, logprobs=0)["choices"]
    assert len(choice["logprobs"]["tokens"]) == 3
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [[t] for t in choice["logprobs"]["tokens"]]
    (read,) = complete(url, prompt=PROMPT, max_tokens=0, logprobs=1, echo=True)["choices"]
    assert (read["text"], len(read["logprobs"]["tokens"])) == (PROMPT, len(reader.prompt_ids(PROMPT, False)))


def chat(url, **body):
    answer = post(url, "/v1/chat/completions", {"model": MODEL, "messages": TURNS, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_conversation(url, reader, shelf):
    turns = [{"role": "system", "content": "so"}, *TURNS]
    ids = reader.prompt_ids(turns, True)
    expected = written(reader, shelf, ids, Sampling(6))
    parts = [{"role": "developer", "content": "so"}, {"role": "user", "content": [{"type": "text", "text": "wait"}]}]
    for messages in (turns, parts):
        for limit in ("max_tokens", "max_completion_tokens"):
            found = chat(url, messages=messages, **{limit: 6})
            (choice,) = found["choices"]
            assert found["object"] == "chat.completion"
            assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
            assert choice["finish_reason"] == "length" and choice["logprobs"] is None
            assert found["usage"]["prompt_tokens"] == len(ids)


def test_a_conversation_without_a_limit_goes_on_to_the_model_s_end(url, reader):
    found = chat(url)
    assert found["usage"]["total_tokens"] == 128 or found["choices"][0]["finish_reason"] == "stop"
    long = [{"role": "user", "content": "wait " * 200}]
    assert "positions" in refused(post(url, "/v1/chat/completions", {"messages": long}), 400)


def test_scores_of_a_conversation_s_answer(url, reader):
    (choice,) = chat(url, max_tokens=3, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == choice["message"]["content"]
    for each in content:
        assert each["bytes"] == list(each["token"].encode())
        assert len(each["top_logprobs"]) == 2
        assert each["logprob"] == pytest.approx(each["top_logprobs"][0]["logprob"], abs=0.02)  # greedy


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_the_same(url, n):
    body = {"model": MODEL, "max_tokens": 6, "temperature": 1, "seed": 9, "n": n}
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    for path, own in (("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": TURNS})):
        whole = post(url, path, body | own).json()
        *chunks, last, done = events(post(url, path, body | own | asked))
        assert done == "[DONE]"
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert {chunk["object"] for chunk in chunks} == {
            "text_completion" if "prompt" in own else "chat.completion.chunk"
        }
        for choice in whole["choices"]:
            parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
            if "prompt" in own:
                assert "".join(part["text"] for part in parts) == choice["text"]
            else:
                assert parts[0]["delta"]["role"] == "assistant"
                text = "".join(part["delta"].get("content", "") for part in parts)
                assert text == choice["message"]["content"]
            assert len(parts) > 2


def test_a_character_of_several_tokens_is_repeated_whole(url, reader):
    text = "so 🧠, let"
    assert len(reader.prompt_ids(text, False)) > 6
    (choice,) = complete(url, prompt=text, max_tokens=0, echo=True)["choices"]
    assert choice["text"] == text


def test_a_stream_may_repeat_its_prompt(url):
    body = {"prompt": ["wait", "so let"], "max_tokens": 3, "temperature": 0, "echo": True}
    whole = complete(url, **body)["choices"]
    found = [chunk["choices"][0] for chunk in events(post(url, "/v1/completions", body | {"stream": True}))[:-1]]
    for choice in whole:
        assert choice["text"].startswith(body["prompt"][choice["index"]])
        assert "".join(part["text"] for part in found if part["index"] == choice["index"]) == choice["text"]


CHANGING = {
    "frequency_penalty": 0.5,
    "presence_penalty": 1,
    "logit_bias": {"50256": -100},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "json_object"},
    "reasoning_effort": "high",
    "tool_choice": "required",
}


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"prompt": []}, "prompt: []: list should have at least 1 item"),
        ({"prompt": 5}, "prompt: 5: input should be a valid string"),
        ({"prompt": [7, -1]}, "prompt.1: -1: input should be greater than or equal to 0"),
        ({"stop": ["a", ""]}, "stop.1: '': string should have at least 1 character"),
        ({"operations": [5]}, "operations.0: 5: an object is meant"),
    ],
)
def test_of_a_field_of_several_types_the_sentence_is_about_the_one_that_was_meant(url, field, says):
    assert refused(post(url, "/v1/completions", {"prompt": "a"} | field), 400).startswith(says)


@pytest.mark.parametrize("name", [*CHANGING, "min_p"])
def test_what_would_change_the_answer_is_refused_by_name(url, name):
    sentence = refused(post(url, "/v1/chat/completions", {"messages": TURNS, name: CHANGING.get(name, 0.1)}), 400)
    assert sentence.startswith(f"{name}: ")
    assert "best_of" in refused(post(url, "/v1/completions", {"prompt": "a", "best_of": 3}), 400)
    assert "stream" in refused(post(url, "/v1/completions", {"prompt": "a", "logprobs": 1, "stream": True}), 400)


def test_what_changes_nothing_is_ignored(url):
    plain = chat(url, max_tokens=4)["choices"]
    more = {"user": "me", "store": False, "metadata": {"a": "b"}, "frequency_penalty": 0, "logit_bias": {}, "tools": []}
    none = dict.fromkeys(
        ("stop", "seed", "functions", "max_completion_tokens", "logprobs", "stream", "n", "operations")
    )
    again = [*TURNS[:-1], TURNS[-1] | {"name": "me", "tool_calls": None, "refusal": None, "annotations": []}]
    text = {"response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"], "top_logprobs": 0}
    assert chat(url, max_tokens=4, **more, **none, **text)["choices"] == plain
    assert chat(url, max_tokens=4, messages=again)["choices"] == plain


def test_errors_have_their_form(url):
    for path in ("/v1/completions", "/v1/nothing", "/v1/chat/completions"):
        error = post(url, path, {"prompt": 1}).json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)


def test_what_goes_wrong_in_a_stream_is_its_last_event(url, monkeypatch):
    def write(_reader, _shelf, _ask):
        yield SimpleNamespace()
        raise AssertionError

    monkeypatch.setattr("pipeline.explore.openai_answers.write", write)
    answer = post(url, "/v1/completions", {"prompt": "a"})
    assert answer.status_code == 500 and "terminal" in refused(answer, 500)


def test_several_saes_have_names(finished):
    saes = {name: StandInShelf(finished, sae=name) for name in ("one", "two")}
    about = About("org/tiny-llama", chat=True, thinking=False, positions=128)
    explorer = Explorer(saes, about, StandInReader, Origin(Path(), (), Path(), []))
    with serving(make_app(explorer, Access())) as url:
        names = [model["id"] for model in http.get(f"{url}/v1/models").json()["data"]]
        assert names == ["tiny-llama", "tiny-llama@two"]
        for name in (*names, "org/tiny-llama@two+3:ablate"):
            assert http.get(f"{url}/v1/models/{name}").json()["id"] == name
        assert "one of tiny-llama, tiny-llama@two" in refused(http.get(f"{url}/v1/models/tiny-llama@three"), 404)
        assert "12 features" in refused(http.get(f"{url}/v1/models/tiny-llama@two+12"), 400)
