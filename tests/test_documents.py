"""Documents under every template and tokenizer have the tokens of the whole text, written by transformers or here."""

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import made_tokenizers
import numpy as np
import pytest
from conftest import KNOWN_TRANSFORMERS
from conversations_of_all_kinds import CLEAN, SPELT
from made_tokenizers import KINDS, SPECIAL, TAGS

from harvest.config import SampleConfig, Source
from harvest.conversations import Turn
from harvest.documents import DocumentTokenizer
from harvest.files import UserError
from harvest.templates import Refused, Segment

TEMPLATES = Path(__file__).with_name("chat_templates")
PROTECTED = [*SPECIAL, *TAGS]
WRITTEN = ("chatml", "deepseek-r1", "deepseek-r1-paper")
MODELS = tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
BOS = {"gemma": "<bos>", "llama3": "<|begin_of_text|>", "r1": "<｜begin▁of▁sentence｜>"}
DAY = datetime(2025, 1, 1)


def settings(template: str | None = None, *, rows: str = "conversation", **more: Any) -> SampleConfig:
    return SampleConfig(
        sources=(Source(name="s", path="x", rows=rows, share=1),),
        template=template,
        context_size=4,
        shard_contexts=1,
        train_tokens=4,
        holdout_tokens=4,
        holdout_fraction=0.1,
        **more,
    )


def documents(loaded: Any, template: str, **more: Any) -> DocumentTokenizer:
    """The document tokenizer under one of the written templates, or under a model's."""
    if template in WRITTEN:
        loaded.chat_template = None
        return DocumentTokenizer(loaded, settings(template, **more))
    loaded.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    loaded.bos_token = BOS.get(template)
    return DocumentTokenizer(loaded, settings(**more))


# What each template should write, without the code under test.


def chatml(turns: list[Turn]) -> str:
    out = ""
    for turn in turns:
        text = turn.content if not turn.reasoning else f"{turn.reasoning}\n\n{turn.content}".rstrip()
        out += f"<|im_start|>{turn.role}\n{text}<|im_end|>\n"
    return out


def r1(turns: list[Turn], gap: str = "\n\n") -> str:
    out = ""
    for i, turn in enumerate(turns):
        before = turns[i - 1].role if i else ""
        if turn.role == "system":
            out += turn.content
        elif turn.role == "user":
            out += f"<｜User｜>{turn.content}"
        elif turn.role == "tool":
            out += "\n" if before == "tool" else "<｜tool▁outputs▁begin｜>"
            out += f"<｜tool▁output▁begin｜>{turn.content}<｜tool▁output▁end｜>"
        else:
            thought = "" if turn.reasoning is None else f"<think>\n{turn.reasoning}\n</think>{gap}"
            out += "<｜tool▁outputs▁end｜>" if before == "tool" else "<｜Assistant｜>"
            out += f"{thought}{turn.content}<｜end▁of▁sentence｜>"
    return out


def r1_paper(turns: list[Turn]) -> str:
    """As the scripts write it, and joined with a next document, of which only the end token is kept."""
    text = r1(turns, "\n").removesuffix("<｜end▁of▁sentence｜>")
    return "<｜end▁of▁sentence｜>".join([text, "next"]).removesuffix("next")


def rendered(loaded: Any, template: str, turns: list[Turn]) -> str:
    """By transformers, with the reasoning where this template takes it, on the day that the code fixes."""
    if template == "gemma":
        turns = joined(turns)
    messages = []
    for turn in turns:
        message = {"role": turn.role, "content": turn.content}
        if turn.reasoning is not None and template in ("qwen3", "gpt-oss"):
            message["reasoning_content"] = turn.reasoning
        elif turn.reasoning is not None and template in ("r1", "qwq"):
            message["content"] = f"{{thought {len(messages)}}}"
        elif turn.reasoning is not None:
            message["content"] = f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}"
        messages.append(message)
    text = loaded.apply_chat_template(messages, tokenize=False)
    for pattern in ("%Y-%m-%d", "%d %b %Y", "%d %B %Y"):
        text = text.replace(datetime.now().strftime(pattern), DAY.strftime(pattern))
    for i, turn in enumerate(turns):
        if turn.reasoning is not None:
            answer = turn.content.lstrip("\n") if template == "qwq" else turn.content
            text = text.replace(f"{{thought {i}}}", f"<think>\n{turn.reasoning}\n</think>\n\n{answer}")
    return text


def joined(turns: list[Turn]) -> list[Turn]:
    if turns[0].role != "system":
        return turns
    return [Turn("user", f"{turns[0].content}\n\n{turns[1].content}"), *turns[2:]]


def expected(loaded: Any, template: str, turns: list[Turn]) -> str:
    writers: dict[str, Callable[[list[Turn]], str]] = {
        "chatml": chatml,
        "deepseek-r1": lambda turns: "<｜begin▁of▁sentence｜>" + r1(turns),
        "deepseek-r1-paper": r1_paper,
    }
    return writers[template](turns) if template in writers else rendered(loaded, template, turns)


def refuses(template: str, name: str) -> bool:
    """Templates that take no tool's turns."""
    return name == "tools" and template in ("gemma", "gpt-oss")


@KNOWN_TRANSFORMERS
@pytest.mark.parametrize("template", [*WRITTEN, *MODELS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_the_whole_text(kind, template):
    loaded = KINDS[kind]()
    tokenizer = documents(loaded, template, bos="auto")
    has_bos = loaded("a")["input_ids"][:1] == [loaded.bos_token_id]
    for name, turns in CLEAN.items():
        if refuses(template, name):
            with pytest.raises(Refused):
                tokenizer.compose(turns)
            continue
        text = expected(loaded, template, turns)
        whole = loaded(text, add_special_tokens=False)["input_ids"]
        if has_bos and template != "deepseek-r1-paper" and whole[:1] != [tokenizer.bos_id]:
            whole = [tokenizer.bos_id, *whole]
        segments = tokenizer.compose(turns)
        assert "".join(segment.text for segment in segments) == text, name
        assert tokenizer.encode([segments])[0].tolist() == whole, name


@pytest.mark.parametrize("template", [*WRITTEN, *MODELS])
@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_token_is_read_as_if_it_did_not(kind, template):
    """Protected tokens are those of the same conversation without the spellings; between them stands the text."""
    loaded = KINDS[kind]()
    tokenizer = documents(loaded, template)
    spelling = re.compile("|".join(map(re.escape, PROTECTED)) + r"|<\|im_|<\|endoftext\||>?<\|im_end\|")
    known = tokenizer.protected - {"[UNK]", "<unk>"}
    protected = np.array([i for i, t in loaded.added_tokens_decoder.items() if t.content in known])
    for name, turns in SPELT.items():
        clean = [turn._replace(content="x", reasoning=turn.reasoning and "y") for turn in turns]
        found, reference = (tokenizer.encode([tokenizer.compose(document)])[0] for document in (turns, clean))
        markers = [ids[np.isin(ids, protected)].tolist() for ids in (found, reference)]
        assert markers[0] == markers[1], name
        text = "".join(segment.text for segment in tokenizer.compose(turns))
        for turn in turns:
            for part in (turn.content, turn.reasoning or ""):
                assert part in text, name
        if kind.startswith(("byte", "llama")):
            decoded = loaded.decode(found)
            assert decoded.removeprefix(loaded.bos_token or "") == text.removeprefix(loaded.bos_token or ""), name
            assert spelling.search(decoded)


def test_the_tail_of_reasoning_is_one_token_with_its_line_feed():
    """R1's own model writes `.` and a line feed as one token, and two line feeds after the tag as one."""
    loaded = KINDS["llama 3"]()
    tokenizer = documents(loaded, "deepseek-r1")
    found = tokenizer.encode([tokenizer.compose([Turn("user", "so"), Turn("assistant", "Yes", "wait.\n\nOK.")])])[0]
    pieces = loaded.convert_ids_to_tokens(found.tolist())
    tag = pieces.index("</think>")
    assert pieces[tag + 1] == "ĊĊ"
    assert pieces[tag - 1] == ".Ċ"


def test_text_before_the_reasoning_stands_in_front_of_its_tag():
    turns = [Turn("user", "so"), Turn("assistant", "Yes", "wait", "First:")]
    loaded = KINDS["byte-level"]()
    for template in ("deepseek-r1", "deepseek-r1-paper", "r1", "qwen3", "llama3", "smollm3", "qwq", "gemma"):
        text = "".join(segment.text for segment in documents(loaded, template).compose(turns))
        assert "First:\n\n<think>\nwait\n</think>\n" in text, template
    text = "".join(segment.text for segment in documents(loaded, "gpt-oss").compose(turns))
    assert text.endswith("<|message|>wait<|end|><|start|>assistant<|channel|>final<|message|>First:\n\nYes<|return|>")
    text = "".join(segment.text for segment in documents(loaded, "chatml").compose(turns))
    assert text.endswith("First:\n\nwait\n\nYes<|im_end|>\n")
    turns = [Turn("user", "so"), Turn("assistant", "Yes", None, "First:")]
    for template in ("deepseek-r1", "chatml", "qwen3"):
        text = "".join(segment.text for segment in documents(loaded, template).compose(turns))
        assert "First:\n\nYes" in text


def test_bos_once_a_document_as_the_tokenizer_or_its_template_does():
    text, chat = [Turn("", "so wait")], [Turn("user", "so"), Turn("assistant", "wait")]
    prepend = KINDS["prepend"]()
    cases = [
        (prepend, "chatml", "document"),
        (prepend, "deepseek-r1-paper", "none"),
        (KINDS["metaspace first"](), "chatml", "none"),
        (KINDS["metaspace first"](), "gemma", "document"),
        (KINDS["llama 3"](), "llama3", "document"),
        (KINDS["byte-level"](), "deepseek-r1", "document"),
        (KINDS["byte-level"](), "qwen3", "none"),
    ]
    for loaded, template, mode in cases:
        tokenizer = documents(loaded, template)
        assert tokenizer.bos == mode, template
        for document in (text, chat):
            ids = tokenizer.encode([tokenizer.compose(document)])[0].tolist()
            assert ids.count(tokenizer.bos_id) == (mode == "document"), template
            assert (ids[0] == tokenizer.bos_id) == (mode == "document"), template
    assert (
        prepend("so wait")["input_ids"]
        == documents(prepend, "chatml").encode([[Segment("so wait", False)]])[0].tolist()
    )


def test_bos_as_set():
    turns = [Turn("user", "so"), Turn("assistant", "wait")]
    loaded = KINDS["metaspace first"]()
    written = {}
    for bos in ("document", "context", "none"):
        for template in ("gemma", "chatml"):
            tokenizer = documents(loaded, template, bos=bos)
            loaded.bos_token = "<bos>"
            tokenizer = documents(loaded, template, bos=bos)
            assert tokenizer.bos == bos
            assert tokenizer.bos_id == loaded.convert_tokens_to_ids("<bos>")
            written[bos, template] = tokenizer.encode([tokenizer.compose(turns)])[0].tolist()
    for template in ("gemma", "chatml"):
        assert written["document", template] == [tokenizer.bos_id, *written["none", template]]
        assert written["context", template] == written["none", template]
        assert tokenizer.bos_id not in written["none", template]


def test_a_bos_that_begins_every_turn_is_no_bos_of_the_template():
    loaded = KINDS["byte-level"]()  # as SmolLM2's tokenizer
    documents(loaded, "qwen3")
    loaded.bos_token = "<|im_start|>"
    turns = [Turn("user", "so"), Turn("assistant", "wait")]
    for bos, mode in (("auto", "none"), ("none", "none"), ("document", "document")):
        tokenizer = DocumentTokenizer(loaded, settings(bos=bos))
        assert tokenizer.bos == mode
        found = tokenizer.encode([tokenizer.compose(turns)])[0].tolist()
        assert found.count(tokenizer.bos_id) == 2
        assert loaded.decode(found).startswith("<|im_start|>user\nso")


def test_a_bos_that_the_tokenizer_lacks_is_an_error():
    loaded = made_tokenizers.byte_level()
    for bos in ("document", "context"):
        with pytest.raises(UserError, match=f"sample.bos: '{bos}': .* no BOS token; set none"):
            DocumentTokenizer(loaded, settings(rows="text", bos=bos))
    assert DocumentTokenizer(loaded, settings(rows="text")).bos == "none"


def test_without_a_chat_template_the_others_are_named():
    loaded = made_tokenizers.byte_level()
    loaded.chat_template = None
    for template in (None, "model"):
        with pytest.raises(
            UserError, match=r"has no chat template, .* 's' .* chatml, deepseek-r1 or deepseek-r1-paper"
        ):
            DocumentTokenizer(loaded, settings(template))
    assert DocumentTokenizer(loaded, settings(rows="text")).template is None


def test_a_template_of_another_model_is_an_error():
    other = made_tokenizers.byte_level().backend_tokenizer.to_str().replace("<｜User｜>", "<other>")
    loaded = made_tokenizers.from_json(other)
    with pytest.raises(UserError, match=r"sample\.template: writes the marker '<｜User｜>'"):
        DocumentTokenizer(loaded, settings("deepseek-r1"))
    other = other.replace('"</think>"', '"</thunk>"').replace("<other>", "<｜User｜>")
    tokenizer = DocumentTokenizer(made_tokenizers.from_json(other), settings("deepseek-r1"))
    assert tokenizer.compose([Turn("user", "a"), Turn("assistant", "b")])
    with pytest.raises(UserError, match=r"writes the marker '</think>'"):
        tokenizer.compose([Turn("user", "a"), Turn("assistant", "b", "c")])


def test_a_tools_turn_without_markers_is_refused():
    other = made_tokenizers.byte_level().backend_tokenizer.to_str().replace("<｜tool▁output▁end｜>", "<other>")
    loaded = made_tokenizers.from_json(other)
    tokenizer = DocumentTokenizer(loaded, settings("deepseek-r1"))
    with pytest.raises(Refused, match="no markers for it"):
        tokenizer.compose([Turn("user", "a"), Turn("assistant", "b"), Turn("tool", "c")])
