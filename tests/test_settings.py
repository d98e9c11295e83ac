"""Settings that would mean something else than they say, or nothing: an error or a warning before anything runs."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, pipeline
from typer.testing import CliRunner

from harvest import device
from harvest.files import UserError
from harvest.language_model import load_skeleton
from pipeline import settings_check
from pipeline.cli import app
from pipeline.config import load
from pipeline.settings_text import Loaded, SettingsError, given_twice, override, read

SMOLLM2 = ROOT / "configs" / "smollm2.yaml"
SHAPES = settings_check._shapes  # before a fixture keeps what it finds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("010", 10), ("-08", -8), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("1_0.5", 10.5), ("1e3", 1000.0)),
        *(("1:30", "1:30"), ("190:20:30.5", "190:20:30.5"), ("0b11", "0b11"), ("1__0", "1__0"), ("2026-01-01",) * 2),
        *((word, word) for word in ("yes", "No", "on", "OFF", "y", "=", "1,000")),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("'010'", "010")),
        *((".inf", float("inf")), ("[.5, 5., 012]", [0.5, 5.0, 12])),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path, text, value):
    file = tmp_path / "x.yaml"
    file.write_text(f"a: {text}\n")
    found = read(file, []).values["a"]
    assert (found, type(found)) == (value, type(value))
    if text:
        loaded = Loaded({}, {}, {})
        override(loaded, f"a={text}")
        assert (loaded.values["a"], type(loaded.values["a"])) == (value, type(value))


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        (["train.lr=1e-3", "train.lr=1e-3"], "train.lr: set twice; the last one counts"),
        (["train.sae.d_sae=8", "train.sae={d_sae: 16}"], "train.sae: set twice, with train.sae.d_sae"),
        (["train.sweep={lr: [1e-3]}", "train.sweep.lr=[1e-4]"], "train.sweep.lr: set twice"),
        (["evaluate.features=null", "evaluate.features.count=3"], "features.count: set twice, with evaluate.features;"),
        (["train.sweep={lr: [1e-3]}", "train.sweep.d_sae=[8,16]"], None),
        (["sample.sources.0.share=0.4", "sample.sources.1.share=0.6"], None),
    ],
)
def test_what_is_given_twice_on_the_command_line_is_said(given, warned):
    load(SMOLLM2, given)
    said = list(given_twice(given))
    assert len(said) == bool(warned)
    assert all(warned in sentence for sentence in said)


def test_a_stage_says_it_and_the_last_one_counts(fresh_folder):
    ran = pipeline("sample", "sample.seed=3", "sample.seed=4")
    assert ran.status == 0, ran.out
    assert "warning: command line: sample.seed: set twice; the last one counts" in ran.out
    assert pipeline("path", "sample", "sample.seed=4").out.strip() in ran.out


@pytest.mark.parametrize("offline", ["sample", "harvest", None])
def test_offline_of_either_stage_is_offline_before_the_first(fresh_folder, monkeypatch, offline):
    asked = []

    def asking(_model, _commit, offline):
        asked.append(offline)
        raise UserError("enough")

    for reader in ("language_model.load_skeleton", "tokenizer.load_whole_tokenizer"):
        with monkeypatch.context() as patch:
            patch.setattr(f"harvest.{reader}", asking)
            patch.setattr(settings_check, "_checked", set())
            ran = pipeline("sample", *([f"{offline}.runtime.offline=true"] if offline else []))
            assert ran.status == 1 and "enough" in ran.out
    assert asked == [offline is not None] * 2


def test_text_that_looks_like_a_number_is_taken_as_written(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(SMOLLM2.read_text().replace("name: assets/smollm2-135m", "name: 010"))
    config = load(file, ["sample.sources.1.revision=012e5", "evaluate.reason_score.words=[1_000, so]"])
    assert (config.model.name, config.sample.sources[1].revision) == ("010", "012e5")
    assert config.evaluate.reason_score.words == ("1_000", "so")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.batch_size=1:30", "train.batch_size: '1:30': input should be a valid integer"),
        ("train.epochs=", "train.epochs=: no value; null takes a setting away"),
        ("train.sae={d_sae: 4, d_sae: 8}", "command line: train.sae.d_sae: set twice"),
        ("train.epochs=0.0001", "train.epochs: 0.0001: gives 49 of the 491,520 training rows, less than one batch"),
        ("evaluate.also=[{name: x, path: a}, {name: y, path: b}, {name: y, path: c}]", "also: names 'y' twice"),
        ("train.exclude.positions=[0,512]", "train.exclude.positions: 512: a context has positions 0 to 511"),
        ("train.exclude.positions=[0,0]", "names 0 twice"),
        ("train.exclude.token_ids=[1,2,1]", "names 1 twice"),
        ("evaluate.diff.sources=[chat,chat]", "names 'chat' twice"),
        ("evaluate.diff.absent=0.5", "absent: 0.5: is above present = 0.001"),
        ("evaluate.reason_score.sources=[chat,chat]", "names 'chat' twice"),
        ("evaluate.reason_score.words=[Wait,wait]", "'wait': fold with 'Wait' into one word, as both stand for 'wait'"),
        ("evaluate.reason_score.words=[WAIT,wait]", "'wait': fold with 'WAIT' into one word"),
        ("evaluate.reason_score.words=[wait,WAIT]", "'WAIT': fold with 'wait' into one word"),
        ("evaluate.reason_score.words=[hmm|hm,hm]", "as both stand for 'hm'"),
        ("evaluate.reason_score.words=[wait,wait]", "'wait': is named twice"),
        ("evaluate.reason_score.words=[wait,' ']", "' ': an empty word"),
        ("evaluate.reason_score.words=['wait|']", "'wait|': an empty word"),
        ("evaluate.reason_score.ignored_token_ids=[-1]", "greater than or equal to 0"),
        ("evaluate.steering.words=['']", "an empty word"),
        ("evaluate.steering.strengths=[0]", "strengths: 0: a strength is a number other than 0"),
        (
            "evaluate.steering={op: scale, strengths: [1]}",
            "strengths: 1: a strength is a number other than 1, which is",
        ),
        ("evaluate.steering={op: set, strengths: [0, 2e6]}", "strengths: 2e+06: a strength is a number from -1e+06"),
        ("evaluate.steering.where=thoughts", "'all', 'prompt', 'generated' or 'thinking'"),
        ("evaluate.steering.strengths=[.nan]", "finite number"),
        ("evaluate.steering.strengths=[2e6]", "strengths: 2e+06: a strength is a number from -1e+06 to 1e+06"),
        ("evaluate.steering.strengths=[1,1.0]", "strengths: names 1.0 twice"),
        ("evaluate.steering.feature_ids=[3,3]", "feature_ids: names 3 twice"),
        ("evaluate.steering.prompts=['']", "prompts.0: '': is empty"),
        ("evaluate.features.include=[7,7]", "include: names 7 twice"),
    ],
)
def test_settings_that_mislead_are_refused(setting, expected):
    with pytest.raises(SettingsError) as caught:
        load(SMOLLM2, [setting])
    assert expected in str(caught.value)


def test_ingested_activations_too():
    settings = ["ingest.context_size=8", "train.exclude.positions=[8]"]
    with pytest.raises(SettingsError, match="a context has positions 0 to 7"):
        load(ROOT / "configs" / "ingest.yaml", settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["harvest.hooks=[lm_head]"], "harvest.hooks: 'lm_head': is not within 'model'"),
        (["harvest.hooks=[model]"], "harvest.hooks: 'model': is not within 'model'"),
        (["harvest.hooks=[model.rotary_emb]"], "'model.rotary_emb': gives (1, 3, 8) for 2 x 3 tokens"),
        (["harvest.hooks=[model.layers.0.self_attn.q_proj,model.layers.0.mlp.up_proj]"], "hooks of different widths"),
        (["harvest.threads=100000"], "harvest.threads: 100,000: this machine has"),
        (
            ["train.exclude.token_ids=[1,5000]"],
            "train.exclude.token_ids: 5000: never occurs, as the tokenizer's ids end at",
        ),
        (
            ["evaluate.reason_score.ignored_token_ids=[5000]"],
            "ignored_token_ids: 5000: never occurs, as the tokenizer's ids end at",
        ),
        (["evaluate.steering.max_new_tokens=128"], "evaluate.steering.max_new_tokens: 128: prompt 1 of 2 has"),
        (["evaluate.steering.feature_ids=[128]"], "evaluate.steering.feature_ids: 128: the SAE has 128 features"),
        (["evaluate.features.include=[128]"], "evaluate.features.include: 128: the SAE has 128 features"),
        (
            ["sample.sources.0.share=0.999", "sample.sources.1.share=0.001"],
            "sources.1.share: 0.001: gives reasoning none",
        ),
        (["sample.sources.0.subset=all"], "sample.sources.0.subset: 'all': is for data sets of the hub"),
        (["sample.sources.0.revision=main"], "sample.sources.0.revision: 'main': is for data sets of the hub"),
        (["sample.sources.0.split=test"], "sample.sources.0.split: 'test': 'assets/tiny-chat.jsonl' has no such files"),
        ([f"train.exclude.positions={list(range(16))}"], "leaves no row of a context"),
        (["model.revision=main"], "model.revision: 'main': a local path has none"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_sample(fresh_folder, settings, expected):
    ran = pipeline("run", *settings)
    assert ran.status == 1, ran.out
    assert expected in ran.out
    assert not list(Path("runs").glob("*/*/*"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["train.l1_warmup_fraction=0.001"], "train.l1_warmup_fraction: 0.001: of 96 steps is less than one"),
        (["train.lr_decay_fraction=0.004"], "train.lr_decay_fraction: 0.004: of 96 steps is less than one"),
        (["train.kernel=dense"], "train.sparse_below: without effect, as train.kernel is dense"),
        (
            ["evaluate.steering.top_p=0.9"],
            "evaluate.steering.top_p: without effect, as evaluate.steering.temperature is 0",
        ),
        (
            ["evaluate.steering.prompts=[so]"],
            "evaluate.steering.built_in_prompts: without effect, as evaluate.steering.prompts is",
        ),
        (["evaluate.diff.contexts=3"], "evaluate.diff.contexts: without effect, as evaluate.diff.model is not set"),
        (["harvest.runtime.allow_http=true"], "harvest.runtime.allow_http: without effect"),
    ],
)
def test_what_has_no_effect_is_said(fresh_folder, settings, expected):
    ran = pipeline("sample", *settings)
    assert ran.status == 0, ran.out
    assert f"warning: {expected}" in ran.out


def test_the_shipped_settings_have_no_warning(fresh_folder):
    assert "warning" not in pipeline("sample").out


def test_tokens_that_never_occur_and_a_limit_that_is_not_kept_are_said(run_folder):
    ran = pipeline("harvest", "train.exclude.token_ids=[1,3]", "--force", "--yes", "harvest.runtime.disk_limit=3shards")
    assert ran.status == 0, ran.out
    assert "train.exclude.token_ids: 3: is not among the 1,536 tokens of the first 96 contexts" in ran.out
    assert "train.exclude.token_ids: 1:" not in ran.out
    assert "harvest.runtime.disk_limit: 3shards: only `make stream` keeps it" in ran.out


def test_text_without_an_end_token_is_said(fresh_folder):
    file = Path("assets/tiny-llama/tokenizer_config.json")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}))
    rows = [json.loads(line) for line in Path("assets/tiny-reasoning.jsonl").read_text().splitlines()]
    texts = [{"text": row["deepseek_reasoning"] + f" {i}"} for i, row in enumerate(rows)]
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    source = "sample.sources=[{name: reasoning, path: text.jsonl, rows: text, share: 1}]"
    ran = pipeline("sample", source, "sample.template=null")
    assert "a tokenizer without an end token: documents follow each other with nothing between" in ran.out


def test_threads_are_bounded_by_the_cores(monkeypatch, capsys):
    cpu = torch.device("cpu")
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "cores", lambda: 3)
    try:
        assert device.set_threads(100_000, cpu) == 3
        assert "runtime.threads: 100,000: this machine has 3 cores; 3 threads are used" in capsys.readouterr().out
        assert device.set_threads(2, cpu) == 2
        assert not capsys.readouterr().out
    finally:
        torch.set_num_threads(before)
    device.check_threads("harvest.threads", 3, cpu)
    with pytest.raises(UserError, match=r"harvest\.threads: 4: this machine has 3 cores"):
        device.check_threads("harvest.threads", 4, cpu)
    monkeypatch.setattr(device, "cores", lambda: 1)
    device.check_threads("harvest.threads", 2, cpu)  # the default runs on one core too


def test_a_model_that_does_not_think_is_named_before_sample(fresh_folder):
    file = Path("assets/tiny-llama/tokenizer.json")
    file.write_text(file.read_text().replace("<think>", "<thought>"))
    ran = pipeline("run", "evaluate.steering.where=thinking")
    expected = (
        "error: evaluate.steering.where: thinking: this model's tokenizer has no tokens <think> and </think>; choose"
    )
    assert ran.status == 1 and expected in ran.out, ran.out
    assert not list(Path("runs").glob("*/*/*"))


def test_training_runs_where_the_model_cannot_be_had(run_folder, monkeypatch):
    def missing(*_):
        raise UserError("model.name: cannot be had")

    monkeypatch.setattr("harvest.language_model.load_skeleton", missing)
    ran = pipeline("train", "train.epochs=1")
    assert ran.status == 0 and "train     complete" in ran.out, ran.out
    ran = pipeline("harvest", "harvest.hooks=[model.layers.0]")
    assert ran.status == 1 and "model.name: cannot be had" in ran.out, ran.out


@pytest.mark.parametrize(("hooks", "width"), [(("model.layers.1",), 32), (("model.layers.1.mlp.up_proj",), None)])
def test_a_model_that_looks_at_values_has_the_width_of_its_layers(finished, monkeypatch, hooks, width):
    monkeypatch.chdir(finished)
    config = load(TINY, [])
    skeleton = load_skeleton(config.model, None, offline=True)

    def forward(*_args, **_options):
        raise RuntimeError("this tensor has no values")

    skeleton.model.forward = forward
    monkeypatch.setattr(settings_check, "_shapes", SHAPES)
    assert settings_check.check_widths(skeleton, config.harvest.model_copy(update={"hooks": hooks})) == width


@pytest.mark.parametrize(("command", "file"), [("ingest", "ingest"), ("sample", "smollm2")])
def test_a_command_has_settings_of_its_own(tmp_path, monkeypatch, command, file):
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, [command])
    assert ran.exit_code == 2
    assert f"configs/{file}.yaml: cannot read the settings file" in ran.output
