import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, pipeline
from transformers import AutoConfig, PreTrainedTokenizerFast

from harvest.chat_template import ChatTemplate
from harvest.config import ModelConfig, Source
from harvest.conversations import Turn, read_row
from harvest.files import UserError, read_json
from harvest.sources import open_source
from harvest.tokenizer import SegmentTokenizer, load_whole_tokenizer
from pipeline import architecture
from pipeline.architecture import find_architecture, shipped_folder
from pipeline.config import load
from pipeline.dry_run import D_IN, _write_model, dry_run, rehearsal, stand_in_tokenizer, write_rows
from pipeline.fingerprint import hashed_settings

R1 = ROOT / "configs" / "r1-llama-8b.yaml"


def test_it_ends_with_the_report_and_can_be_run_again(fresh_folder):
    ran = pipeline("dry-run", "train.exclude.token_ids=[2]")
    assert ran.status == 0, ran.out
    report = Path(ran.out.splitlines()[-1])
    assert report.is_relative_to("runs/dry-run/tiny")
    assert "<html" in report.read_text()
    assert "dry-run  passed: every stage of " in ran.out
    assert {path.name for path in Path("runs").iterdir()} == {"dry-run"}
    left = report.parent / "left"
    left.touch()
    ran = pipeline("dry-run", "train.exclude.token_ids=[399]")
    assert "train.exclude.token_ids: 399: never occurs" in ran.out
    assert not left.exists()


def test_a_folder_of_somebody_else_is_left_alone(fresh_folder):
    mine = Path("runs/dry-run/tiny/mine")
    mine.parent.mkdir(parents=True)
    mine.touch()
    ran = pipeline("dry-run")
    assert ran.status == 1
    assert "not an earlier dry run" in ran.out
    assert mine.exists()


def test_only_model_text_width_and_budget_are_replaced():
    real = load(R1, [])
    other = rehearsal(real, 4096, Path("x"))
    changed = {"sample": set(), "harvest": set(), "train": set(), "evaluate": set()}
    for stage, names in changed.items():
        before, after = (hashed_settings(getattr(config, stage)) for config in (real, other))
        names |= {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {
        "sample": {"sources", "train_tokens", "holdout_tokens", "holdout_fraction"},
        "harvest": set() if torch.cuda.is_available() else {"compile"},
        "train": {"sae", "training_tokens"},
        "evaluate": {"downstream", "reason_score", "steering", "ablation"},  # how much of the text, and how many tokens
    }
    assert other.train.sae.d_sae == 16 * D_IN  # 65,536 of 4,096
    assert other.harvest.hooks == ("model.layers.19",)
    kept = ("name", "rows", "share")
    assert [[getattr(s, k) for k in kept] for s in other.sample.sources] == [
        [getattr(s, k) for k in kept] for s in real.sample.sources
    ]


def test_the_stand_in_tokenizer_has_the_special_tokens_of_the_settings():
    config = load(R1, [])
    special = read_json(shipped_folder(config.model) / "special_tokens.json")
    tokenizer = SegmentTokenizer(stand_in_tokenizer(special, 128_256), "<｜end▁of▁sentence｜>")
    assert tokenizer.whole.get_vocab_size() == 128_256
    document = [Turn("user", "a <think> b"), Turn("assistant", "yes", "hm")]
    template = ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=tokenizer.whole), str(config.sample.template))
    ids = tokenizer.encode([template.compose(document)])[0].tolist()
    assert [i for i in ids if i >= 128_000] == [128_011, 128_012, 128_013, 128_014, 128_001]
    assert set(config.train.exclude.token_ids) <= set(ids)


def test_the_rehearsed_model_is_narrow_and_no_shorter(tmp_path):
    """Where the hub cannot be reached, of the shipped facts, with a tokenizer of their special tokens."""
    config = load(R1, [])
    width, origin = _write_model(config, tmp_path)
    assert width == 4096 and "as the hub cannot be reached" in origin
    model = AutoConfig.from_pretrained(tmp_path)
    assert (model.num_hidden_layers, model.vocab_size, model.hidden_size) == (32, 128_256, D_IN)
    assert model.num_attention_heads % model.num_key_value_heads == 0
    tokenizer = load_whole_tokenizer(ModelConfig(name=str(tmp_path)), None, offline=True)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<｜end▁of▁sentence｜>", 128_001)
    assert tokenizer.convert_tokens_to_ids("<think>") == 128_013


@pytest.mark.parametrize(("reachable", "origin"), [(True, "the hub"), (False, "the hub's local cache")])
def test_the_shape_comes_from_the_hub_or_what_was_loaded_of_it(monkeypatch, reachable, origin):
    asked = []
    monkeypatch.setattr(architecture, "hub_answers", lambda: reachable)
    monkeypatch.setattr(architecture, "load_skeleton", lambda *given, offline: asked.append((*given, offline)))
    model = load(R1, [f"model.revision={'0' * 40}"]).model
    assert find_architecture(model, offline=False)[1:] == (origin, None, True)
    assert find_architecture(model, offline=True)[1:] == ("the hub's local cache", None, True)
    assert asked == [(model, "0" * 40, not reachable), (model, "0" * 40, True)]


def test_the_shape_comes_from_the_shipped_facts_where_the_hub_cannot_be_reached():
    config = load(R1, [])
    shape = find_architecture(config.model, offline=False)  # the tests are offline
    assert not shape.has_model
    assert "as the hub cannot be reached" in shape.origin
    assert shape.skeleton.layer_list == "model.layers"
    assert sum(p.numel() for p in shape.skeleton.model.parameters()) == 8_030_261_248  # 8.03B, as published
    with pytest.raises(UserError, match=r"model\.name"):
        find_architecture(config.model.model_copy(update={"name": "nobody/nothing"}), offline=False)


@pytest.mark.parametrize("rows", ["conversation", "conversations", "messages", "reasoning", "text", "tokens"])
def test_made_up_rows_fit_their_schema(tmp_path, rows):
    source = Source(name="s", path=str(tmp_path / "s.jsonl"), rows=rows, share=1)
    write_rows(Path(source.path), source, 2000)
    opened = open_source(source, None, offline=True)
    readings = [read_row(rows, row) for row in opened.rows.take(range(len(opened.rows)), opened.columns)]
    assert not any(reading.dropped for reading in readings)
    words = sum(len(f"{turn.content} {turn.reasoning or ''}".split()) for reading in readings for turn in reading.turns)
    words += sum(len(reading.ids) for reading in readings if reading.ids is not None)
    assert words >= 1800
    assert json.loads(Path(source.path).read_text().splitlines()[0])


def test_sources_with_strata_where_and_token_ids_are_rehearsed(fresh_folder):
    chosen = "where: {domain: [math, code], right: true, level: 3}, strata: domain"
    sources = [
        f"{{name: reasoning, path: nobody/chosen, rows: reasoning, share: 0.5, {chosen}}}",
        "{name: kinds, path: nobody/kinds, split: train+test, rows: text, share: 0.25, strata: kind}",
        "{name: ids, path: nobody/ids, rows: tokens, share: 0.25, drop: any}",
    ]
    config = load(TINY, [f"sample.sources=[{', '.join(sources)}]", "train.exclude.token_ids=[1, 2, 300]"])
    (report,) = dry_run(config, Path("runs/dry-run/tiny"), "tiny", print)
    assert "kinds/made up" in report.read_text()
    assert "reasoning/math" in report.read_text()
    ids = [json.loads(line)["input_ids"] for line in Path("runs/dry-run/tiny/ids.jsonl").read_text().splitlines()]
    assert all(row[:3] == [1, 2, 300] for row in ids)  # else a token of no other source would never occur
    row = json.loads(Path("runs/dry-run/tiny/reasoning.jsonl").read_text().splitlines()[0])
    assert (row["domain"], row["right"], row["level"]) == ("math", True, 3)
