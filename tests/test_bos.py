"""A BOS stands where the settings say: in the sample's text, in the export, and in what steering gives the model."""

import json
from pathlib import Path
from typing import Any

import made_tokenizers
import numpy as np
import pytest
import zarr
from conftest import TINY, only, pipeline

from evaluate.generation import prompt_ids
from harvest.config import ModelConfig
from harvest.contexts import Contexts
from harvest.files import UserError, read_json
from harvest.tokenizer import load_whole_tokenizer
from pipeline.config import load
from pipeline.export import Exported, _metadata
from pipeline.stages import find_runs

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_TEMPLATE = "{{ '<｜begin▁of▁sentence｜>' }}" + TURNS
MODEL = ["sample.template=model"]


@pytest.fixture
def with_template(fresh_folder) -> Path:
    """The tiny model with a chat template that writes a BOS."""
    model = fresh_folder / "assets" / "tiny-llama"
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {"bos_token": "<｜begin▁of▁sentence｜>"}), encoding="utf-8")
    return fresh_folder


def test_the_model_s_own_template_from_the_settings_to_the_contexts(with_template):
    ran = pipeline("sample", *MODEL)
    assert ran.status == 0, ran.out
    assert "sample: a BOS (<｜begin▁of▁sentence｜>) begins each document" in ran.out
    assert "sample: the chat template has no place for reasoning" not in ran.out  # the tokenizer has R1's tags
    assert "sample: text that spells one of the tokenizer's 7 special tokens (<|endoftext|>, " in ran.out
    assert "or markers <think>, </think> stays text" in ran.out
    contexts = Contexts(only(with_template, "runs/sample/*/contexts"))
    assert contexts.bos == "document"
    assert read_json(only(with_template, "runs/sample/*/manifest.json"))["summary"]["bos"] == "document"
    loaded = load_whole_tokenizer(ModelConfig(name="assets/tiny-llama"), None, offline=True)
    group = zarr.open_group(str(contexts.path), mode="r")
    rows = [json.loads(line) for line in Path("assets/tiny-chat.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens, document, source = (group[f"train/{name}"][:] for name in ("tokens", "document", "source"))
    for row in np.unique(document[source == 0])[:5]:
        text = loaded.apply_chat_template(rows[row]["conversation"], tokenize=False)
        whole = loaded(text, add_special_tokens=False)["input_ids"]
        assert whole.count(loaded.bos_token_id) == 1
        for context in np.flatnonzero((document == row).any(1) & (source == 0)):
            piece = tokens[context][document[context] == row].tolist()
            assert any(whole[i : i + len(piece)] == piece for i in range(len(whole)))


def test_without_a_template_of_the_model_the_sample_ends_before_any_text(fresh_folder):
    ran = pipeline("sample", "sample.template=null")
    assert ran.status == 1
    assert (
        "sample.template: the model's tokenizer has no chat template, and source 'chat' holds conversations" in ran.out
    )
    assert not list(Path("runs").glob("sample/*/scratch"))


@pytest.mark.parametrize(("bos", "prepends"), [("auto", True), ("none", False), ("document", True)])
def test_the_export_says_whether_there_is_one(with_template, bos, prepends):
    settings = [*MODEL, f"sample.bos={bos}"]
    assert pipeline("sample", *settings).status == 0
    runs = find_runs(load(TINY, settings), Path("runs"))[0]
    assert _metadata(Exported(runs, "model.layers.1", "x", Path()), "m")["prepend_bos"] is prepends


def test_ids_that_the_model_cannot_read_end_the_sample(fresh_folder):
    path = Path("assets/tiny-llama/config.json")
    path.write_text(json.dumps(read_json(path) | {"vocab_size": 300}), encoding="utf-8")
    ran = pipeline("sample")
    assert ran.status == 1
    assert "model.name: its tokenizer makes token 3" in ran.out
    assert "but the model's embedding has 300 rows" in ran.out


def prompts(loaded: Any, chat: bool | None, bos: str | None) -> list[int]:
    return prompt_ids(loaded, ["so wait"], chat, bos)[0]


def test_prompts_begin_with_one_where_the_sample_s_text_does():
    loaded = made_tokenizers.prepend()  # it puts one in front of a text by itself
    first, text = loaded.bos_token_id, loaded("so wait", add_special_tokens=False)["input_ids"]
    loaded.chat_template = None
    for bos in ("document", "context"):
        assert prompts(loaded, None, bos) == [first, *text]
    assert prompts(loaded, None, "none") == text
    assert prompts(loaded, None, None) == [first, *text]
    for template, own in (("{{ '<bos>' }}" + TURNS, True), (TURNS, False)):
        loaded.chat_template = template
        whole = loaded("<|im_start|>user\nso wait<|im_end|><|im_start|>assistant\n", add_special_tokens=False)[
            "input_ids"
        ]
        for bos, expected in (
            ("document", [first, *whole]),
            ("context", [first, *whole]),
            ("none", whole),
            (None, [first, *whole] if own else whole),
        ):
            assert prompts(loaded, None, bos) == expected, (bos, own)
        assert prompts(loaded, False, "none") == text


def test_a_bos_that_begins_every_turn_is_left_in_prompts():
    loaded = made_tokenizers.byte_level()
    loaded.bos_token = "<|im_start|>"
    loaded.chat_template = TURNS
    whole = loaded("<|im_start|>user\nso wait<|im_end|><|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert prompts(loaded, None, "none") == prompts(loaded, None, "document") == whole


def test_a_prompt_that_the_template_refuses_is_one_sentence():
    loaded = made_tokenizers.byte_level()
    loaded.chat_template = "{{ raise_exception('a system turn is needed') }}"
    with pytest.raises(UserError, match=r"as a user's turn \(.*a system turn is needed\); mend it"):
        prompt_ids(loaded, ["so"], None, "none")
