from pathlib import Path
from typing import get_args

import pytest
from conftest import ROOT, TINY
from pydantic import BaseModel

from pipeline.config import PipelineConfig, load
from pipeline.settings_text import SettingsError

SMOLLM2 = ROOT / "configs" / "smollm2.yaml"
INGEST = SMOLLM2.with_name("ingest.yaml")


def error(*overrides: str, file: Path = SMOLLM2) -> str:
    with pytest.raises(SettingsError) as caught:
        load(file, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("name", ["smollm2", "r1-llama-8b", "tiny", "ingest"])
def test_shipped_settings_load(name):
    load(ROOT / "configs" / f"{name}.yaml", [])


def test_the_papers_settings():
    config = load(ROOT / "configs" / "r1-llama-8b.yaml", [])
    train = config.train
    assert (train.sae.d_sae, train.sae.l1_coefficient, train.lr, train.batch_size) == (65_536, 5, 5e-5, 4096)
    assert (train.clip_norm, train.l1_warmup_fraction, train.lr_decay_fraction) == (1.0, 0.05, 0.2)
    assert train.training_tokens == 819_200_000
    assert train.exclude.token_ids == (128001,)
    assert config.harvest.hooks == ("model.layers.19",)
    assert [source.share * config.sample.train_tokens for source in config.sample.sources] == [5e8, 5e8]


def test_a_mistyped_setting_names_file_line_and_a_near_one(tmp_path):
    text = SMOLLM2.read_text().replace("    d_sae: 4608 ", "    expansion_facter: 8 ")
    line = next(i for i, content in enumerate(text.splitlines(), 1) if "expansion_facter" in content)
    file = tmp_path / "x.yaml"
    file.write_text(text)
    expected = f"{file}:{line}: train.sae.expansion_facter: unknown setting; did you mean 'expansion_factor'?"
    assert expected in error(file=file)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=abc", "command line: train.lr: 'abc': input should be a valid number"),
        ("train.lr=-1", "command line: train.lr: -1: input should be greater than or equal to 0"),
        ("train.lr=0", "lr: 0: trains nothing"),
        ("sample.sources.0.share=0.3", "sum to 0.8"),
        ("train.sae.expansion_factor=8", "exactly one of d_sae and expansion_factor"),
        ("train.training_tokens=1e6", "exactly one of training_tokens and epochs"),
        ("harvest.batch_contexts=7", "must divide sample.shard_contexts"),
        ("harvest.chunk_rows=1000", "must divide the rows of a shard"),
        ("sample.train_tokens=100", "less than one shard"),
        ("train.pool_rows=100", "must hold at least one chunk"),
        ("sample.sources.0.name=all", "sources need names of their own"),
        ("train.epochs=.inf", "finite number"),
        ("train.lr=2024-99-99", "'2024-99-99': input should be a valid number"),
        ("harvest.hooks=[a,a]", "hooks: names 'a' twice"),
        ("nonsense", "an override is section.key=value"),
        ("train.lr=[", "not valid YAML"),
        ("train.lr=true", "command line: train.lr: True: a number or text is meant, not true or false"),
        ("train.sae.l1_coefficient=1e300", "a finite number of at most 1e+30 is meant"),
        ("train.batch_size=99999999999999999999999", "less than 2147483648"),
        ('evaluate.steering.prompts=["\\ud800"]', "half of a surrogate pair"),
        ("harvest.hooks=model.layers.1", "input should be a list, as [model.layers.1]"),
        ("train.sae=3", "this is a section, with kind, d_sae, expansion_factor, l1_coefficient, k"),
        ("harvest.runtime.disk_limit=lots", "not of the form that it has: Of `make stream` only"),
        ("evaluate.reason_score.words=[wait,", "a value with spaces takes quotes within SET"),  # what make passes on
        ("sample.template=vicuna", "input should be 'model', 'chatml', 'deepseek-r1' or 'deepseek-r1-paper'"),
        ("model.name.x=1", "there is no model.name.x to set"),
        ("sample.sources.1.pth=x", "sample.sources.1.pth: unknown setting; did you mean 'path'?"),
    ],
)
def test_what_is_wrong_is_named(override, expected):
    assert expected in error(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("explain.model=m", "explain: ingested activations have no text to explain; take this section out"),
        ("benchmark.task=gsm8k", "benchmark: ingested activations have no model to answer; take this section out"),
    ],
)
def test_what_needs_a_model_is_refused_beside_activations(override, expected):
    assert expected in error(override, file=INGEST)


def test_plain_text_needs_no_template():
    config = load(SMOLLM2.with_name("own.yaml"), ["sample.sources.0.path=a.jsonl"])
    assert config.sample.template is None
    assert {source.rows for source in config.sample.sources} == {"text"}


def test_numbers_with_exponents_are_numbers():
    config = load(
        SMOLLM2, ["train.lr=1e-4", "sample.train_tokens=1e6", "train.epochs=null", "train.training_tokens=1e9"]
    )
    assert (config.train.lr, config.sample.train_tokens, config.train.training_tokens) == (1e-4, 10**6, 10**9)


def test_overrides_reach_into_lists_and_sections_that_are_absent():
    config = load(SMOLLM2, ["sample.sources.1.subset=metadata", "train.exclude.positions=[0]"])
    assert config.sample.sources[1].subset == "metadata"
    assert config.train.exclude.positions == (0,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no settings in it"),
        ("model: [", "not valid YAML"),
        ("model: {name: a}\nmodel: {name: b}", ":2: model: set twice"),
        ("\x00", "not valid YAML"),
        ("model: {name: a}", "sample: this setting is required"),
        ("model: {name: caf\udce9}", "x.yaml: not UTF-8 text; is it a settings file?"),
        ("model: &a [*a]", "x.yaml: nested too deeply or refers to itself"),
        ("#" * (1 << 20), "x.yaml: no settings in it"),
        ("#" * ((1 << 20) + 1), "x.yaml: larger than 1048576 bytes; is it a settings file?"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_that_is_no_settings_file(tmp_path, text, expected):
    file = tmp_path / "x.yaml"
    file.write_text(text, errors="surrogateescape")
    assert expected in error(file=file)


def test_a_missing_file(tmp_path):
    assert "cannot read the settings file" in error(file=tmp_path / "none.yaml")


def test_every_setting_is_documented():
    def check(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                check(inner)
            else:
                assert field.description, f"{section.__name__}.{name}"

    for field in PipelineConfig.model_fields.values():
        check(next((t for t in get_args(field.annotation) if t is not type(None)), field.annotation))


def test_a_limit_of_the_disk_may_be_a_number_of_bytes():
    assert load(TINY, ["harvest.runtime.disk_limit=500000000"]).harvest.runtime.disk_limit == "500000000"
