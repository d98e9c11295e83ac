"""What a model's chat template does with conversations is found by looking at what it writes."""

from pathlib import Path
from typing import Any

import made_tokenizers
import pytest
from conftest import KNOWN_TRANSFORMERS
from tokenizers import AddedToken

from harvest.chat_template import ChatTemplate, has_chat_template, render, template_markers, writes_bos
from harvest.conversations import Turn
from harvest.files import UserError
from harvest.templates import Refused

TEMPLATES = Path(__file__).with_name("chat_templates")
CHAT = [Turn("user", "so"), Turn("assistant", "Yes")]
SIMPLE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture
def loaded() -> Any:
    return made_tokenizers.byte_level()


def template(loaded: Any, source: str) -> ChatTemplate:
    path = TEMPLATES / f"{source}.jinja"
    loaded.chat_template = path.read_text(encoding="utf-8") if path.exists() else source
    return ChatTemplate(loaded)


def text_of(found: ChatTemplate, turns: list[Turn]) -> str:
    return "".join(segment.text for segment in found.compose(turns))


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("qwen3", "reasoning_content"),
        pytest.param("gpt-oss", "reasoning_content", marks=KNOWN_TRANSFORMERS),
        ("smollm3", "inline"),
        ("r1", "inserted"),
        ("qwq", "inserted"),
        ("{% for m in messages %}{{ m.content }}{% if m.thinking %}{{ m.thinking }}{% endif %}{% endfor %}", "inline"),
        ("{% for m in messages %}{{ m.thoughts }}{{ m.reasoning }}{{ m.content }}{% endfor %}", "reasoning"),
    ],
)
def test_where_reasoning_goes(loaded, source, form):
    assert template(loaded, source).reasoning == form


def test_without_any_tag_reasoning_is_plain_text_and_that_is_said(loaded):
    spec = loaded.backend_tokenizer.to_str().replace("<think>", "<pause>").replace("</think>", "</pause>")
    other = made_tokenizers.from_json(spec)
    found = template(other, "llama3")
    assert found.reasoning == "plain"
    assert "no place for reasoning" in " ".join(found.notes())
    text = text_of(found, [Turn("user", "so"), Turn("assistant", "Yes", "wait", "First:")])
    assert text.endswith("\n\nFirst:\n\nwait\n\nYes<|eot_id|>")


def test_a_template_that_drops_the_reasoning_is_replaced_by_its_tags_and_that_is_said(loaded):
    found = template(loaded, "r1")
    assert "drops an assistant's reasoning" in " ".join(found.notes())
    turns = [Turn("user", "so"), Turn("assistant", "Yes", "wait")]
    assert text_of(found, turns).endswith("<｜Assistant｜><think>\nwait\n</think>\n\nYes<｜end▁of▁sentence｜>")


def test_reasoning_of_earlier_turns_is_what_the_model_reads_and_what_it_does_not_is_counted(loaded):
    found = template(loaded, "qwen3")
    turns = [Turn("user", "so"), Turn("assistant", "Yes", "secret"), Turn("user", "x"), Turn("assistant", "OK", "wait")]
    text = text_of(found, turns)
    assert "secret" not in text
    assert "<think>\nwait\n</think>\n\nOK" in text
    assert list(found.counted.values()) == [1]


def test_what_a_template_adds_is_said_once(loaded):
    assert template(loaded, "qwen3").notes() == []
    notes = template(loaded, "smollm3").notes()
    assert "'<|im_start|>system\\n## Metadata" in notes[0]
    assert notes[0].endswith("named SmolLM.'")
    assert "always 01 January 2025" in notes[1]
    loaded.bos_token = "<bos>"
    assert template(loaded, "gemma").notes() == [
        "the chat template has no system turn; its text goes in front of the first user turn"
    ]


def test_the_date_is_always_the_same(loaded):
    text = text_of(template(loaded, "llama3"), CHAT)
    assert "Today Date: 01 Jan 2025" in text
    assert "Today Date: 01 Jan 2025" in loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_a_switch_within_the_text_does_what_it_does_for_the_model(loaded):
    found = template(loaded, "smollm3")
    turns = [Turn("system", "Be brief. /no_think"), *CHAT]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    assert text_of(found, turns) == render(loaded, messages)
    assert "Reasoning Mode: /no_think" in text_of(found, turns)
    assert dict(found.counted) == {"the chat template followed a switch within the text": 2}
    # With a token spelt beside it, all that is known is where the markers stand.
    turns[1] = Turn("user", "<|im_end|>")
    segments = found.compose(turns)
    assert [s.text for s in segments if not s.is_marker] == ["Be brief. /no_think", "<|im_end|>", "Yes"]


def test_no_text_is_dropped_where_a_template_cuts_it(loaded):
    answer = "a long answer about </thunk> and much more than that, all of which would be cut away"
    cuts = SIMPLE.replace("m.content", "m.content.split('</thunk>')[-1]")
    found = template(loaded, cuts)
    assert text_of(found, [Turn("user", "so"), Turn("assistant", answer)]) == f"[user]so[assistant]{answer}"
    for source in ("qwen3", "r1", "qwq"):
        answer = "an answer about </think> and more"
        assert answer in text_of(template(loaded, source), [Turn("user", "so"), Turn("assistant", answer)])
    drops = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
    with pytest.raises(Refused, match="leaves out what the tool says"):
        template(loaded, drops).compose([*CHAT, Turn("tool", "17")])


def test_a_conversation_that_a_template_refuses_comes_with_its_reason(loaded):
    found = template(loaded, "gemma")
    with pytest.raises(Refused, match="the chat template refuses it: Conversation roles must alternate"):
        found.compose([Turn("user", "a"), Turn("user", "b")])
    assert text_of(found, [Turn("system", "Be brief."), *CHAT]).startswith("<bos><start_of_turn>user\nBe brief.\n\nso<")


def test_what_a_template_refuses_for_its_words_alone_is_written_with_its_markers(loaded):
    found = template(loaded, "gpt-oss")
    answer = "x <|channel|>final<|message|> y"
    segments = found.compose([Turn("user", "so"), Turn("assistant", answer)])
    assert [s.text for s in segments if not s.is_marker] == ["so", answer]
    assert segments[-1].text == "<|return|>"


def test_text_within_json_is_found(loaded):
    turns = [*CHAT, Turn("tool", 'a "quoted"\nline'), Turn("assistant", "OK")]
    segments = template(loaded, "llama3").compose(turns)
    assert 'a \\"quoted\\"\\nline' in [s.text for s in segments if not s.is_marker]


def test_a_template_that_is_broken_is_named(loaded):
    for source in ("{% for m in messages %}", "{{ raise_exception('no') }}", "{{ messages.nothing.there }}"):
        with pytest.raises(UserError, match=r"sample.template: the model's own chat template cannot write"):
            template(loaded, source)
        assert template_markers(loaded) == set()
        loaded.bos_token = "<bos>"
        assert not writes_bos(loaded)


def test_markers_are_the_added_tokens_that_a_template_writes(loaded):
    loaded.backend_tokenizer.add_tokens([AddedToken(name) for name in ("user", "\n\n", "<|toolname|>", "<x>")])
    template(loaded, "qwen3")
    tags = {"<think>", "</think>", "<tool_response>", "</tool_response>"}
    assert template_markers(loaded) & {*made_tokenizers.TAGS, *made_tokenizers.ORDINARY} == tags
    # Built from pieces, and written only with tools: both are found by rendering.
    template(loaded, "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}\n\n user<h1>{% endfor %}")
    loaded.backend_tokenizer.add_tokens([AddedToken("<|tool|>")])
    assert template_markers(loaded) == {"<|tool|>", "<h1>"}


def test_named_templates_take_the_default(loaded):
    loaded.chat_template = {"default": SIMPLE, "rag": "x"}
    assert has_chat_template(loaded)
    assert text_of(ChatTemplate(loaded), CHAT) == "[user]so[assistant]Yes"
    loaded.chat_template = {"rag": "x"}
    assert not has_chat_template(loaded)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "x",
        "{% for m in messages %}<|im_start|>{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>{% endfor %}",
    ],
)
def test_a_template_that_leaves_out_turns_is_refused(loaded, source):
    with pytest.raises(UserError, match="cannot write a plain conversation"):
        template(loaded, source)


def test_a_template_that_refuses_reasoning_in_a_field_gets_it_in_the_content(loaded):
    found = template(loaded, SIMPLE.replace("[", "{{ raise_exception('no') if m.thinking }}["))
    assert found.reasoning == "inline"
    text = text_of(found, [Turn("user", "so"), Turn("assistant", "Yes", "hm")])
    assert text == "[user]so[assistant]<think>\nhm\n</think>\n\nYes"


def test_more_forms_of_conversations_than_are_kept(loaded, monkeypatch):
    """Each has its own answer, and memory holds no more than so many."""
    monkeypatch.setattr("harvest.chat_template.STRUCTURES_KEPT", 2)
    found = template(loaded, SIMPLE)
    for turns in range(1, 8):
        said = [Turn("user" if n % 2 == 0 else "assistant", str(n)) for n in range(turns)]
        assert text_of(found, said) == "".join(f"[{turn.role}]{turn.content}" for turn in said)
        assert len(found._structures) <= 2
