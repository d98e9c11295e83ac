import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, pipeline
from huggingface_hub import HfApi
from pydantic import Field

from harvest.config import Settings
from harvest.files import UserError
from harvest.store_files import LocalFiles
from pipeline import content
from pipeline.config import PipelineConfig, load
from pipeline.content import ContentHashes
from pipeline.fingerprint import STAGES, Inputs, Memory, find_inputs, hashed_settings
from pipeline.stages import fingerprints
from pipeline.watch import Watch

SMOLLM2 = ROOT / "configs" / "smollm2.yaml"
INPUTS = Inputs("sha256:tokenizer", "sha256:model", ("sha256:chat", "sha256:reasoning"))
GOLDEN = Path(__file__).parent / "golden_fingerprints.json"
GOLDEN_SETTINGS = Path(__file__).parent / "golden_settings.json"


def of(*overrides: str, inputs: Inputs = INPUTS, file: Path = SMOLLM2) -> dict[str, str]:
    return fingerprints(load(file, list(overrides)), inputs)


def first_changed(*overrides: str) -> str | None:
    old, new = of(), of(*overrides)
    changed = [stage for stage in STAGES if old[stage] != new[stage]]
    assert changed == list(STAGES[STAGES.index(changed[0]) :] if changed else [])
    return changed[0] if changed else None


def test_shipped_settings_keep_their_fingerprints():
    """Fails when a default or a setting's meaning changed: bump that stage's version and this file then."""
    found = {name: of(file=ROOT / "configs" / f"{name}.yaml") for name in ("smollm2", "r1-llama-8b", "tiny")}
    found["defaults"] = {s: hashed_settings(getattr(load(SMOLLM2, []), s)) for s in STAGES}
    assert json.loads(json.dumps(found)) == json.loads(GOLDEN.read_text())


def accepted() -> dict[str, dict[str, object]]:
    """What each setting takes, and its default: its schema but for the words."""
    sections = PipelineConfig.model_json_schema()["$defs"].items()
    return {
        f"{section}.{name}": {k: v for k, v in field.items() if k not in ("title", "description")}
        for section, schema in sections
        for name, field in sorted(schema["properties"].items())
    }


def test_what_settings_take_is_as_it_was():
    """Fails when a default, a bound or a choice changed: change the file on purpose."""
    assert accepted() == json.loads(GOLDEN_SETTINGS.read_text())


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("sample.seed=1", "sample"),
        ("sample.template=deepseek-r1", "sample"),
        ("sample.train_tokens=32768", "sample"),
        ("harvest.hooks=[model.layers.3]", "harvest"),
        ("harvest.batch_contexts=4", "harvest"),
        ("harvest.threads=1", "harvest"),
        ("harvest.compute_dtype=float32", "harvest"),
        ("train.sae.l1_coefficient=4", "train"),
        ("train.exclude.positions=[0]", "train"),
        ("train.validate_every=7", "train"),
        ("evaluate.sae=best", "evaluate"),
        ("sample.runtime.offline=true", None),
        ("harvest.runtime.device=cpu", None),
        ("train.runtime.checkpoint_every=7", None),
        ("train.runtime.threads=1", None),
        ("evaluate.runtime.threads=1", None),
        ("model.name=somewhere/else", None),
        ("sample.sources.0.path=elsewhere.jsonl", None),
    ],
)
def test_a_setting_touches_its_stage_and_those_after(override, stage):
    assert first_changed(override) == stage


def test_content_enters_where_it_is_used():
    old = of()
    model = of(inputs=INPUTS._replace(model="sha256:other"))
    assert [stage for stage in STAGES if old[stage] != model[stage]] == ["harvest", "train", "evaluate"]
    tokenizer = of(inputs=INPUTS._replace(tokenizer="sha256:other"))
    assert old["sample"] != tokenizer["sample"]


def test_an_added_setting_stays_out_while_it_has_its_default():
    class Old(Settings):
        a: int = 1

    class New(Settings):
        a: int = 1
        b: int = Field(default=2, json_schema_extra={"added": True})

    assert hashed_settings(New()) == hashed_settings(Old())
    assert hashed_settings(New(b=3)) == {"a": 1, "b": 3}


def test_local_inputs_are_known_by_content(fresh_folder):
    config = load(ROOT / "configs" / "tiny.yaml", [])
    before = find_inputs(config, Path("runs"))
    Path("assets/tiny-llama").rename("assets/other")
    moved = find_inputs(load(ROOT / "configs" / "tiny.yaml", ["model.name=assets/other"]), Path("runs"))
    assert moved == before
    with Path("assets/tiny-chat.jsonl").open("a") as file:
        file.write("{}\n")
    Path("assets/other").rename("assets/tiny-llama")
    changed = find_inputs(config, Path("runs"))
    assert changed.sources[0] != before.sources[0]
    assert changed.model == before.model


def test_what_was_read_before_an_interrupt_is_remembered(fresh_folder, monkeypatch):
    monkeypatch.setattr(content, "RECENT_NS", 0)
    monkeypatch.setattr(LocalFiles, "readers", 1)  # so that the order is known
    digest, read = ContentHashes._read, []

    def interrupted(hashes, path):
        read.append(path.name)
        if len(read) == 2:
            raise KeyboardInterrupt
        return digest(hashes, path)

    monkeypatch.setattr(ContentHashes, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_inputs(load(TINY, []), Path("runs"))
    first, interrupted_at, *_ = read
    read[:] = ["", ""]
    find_inputs(load(TINY, []), Path("runs"))
    assert interrupted_at in read and first not in read


def test_a_folder_that_holds_no_model_is_named(fresh_folder):
    Path("assets/tiny-llama/config.json").rename("assets/tiny-llama/conf.json")
    said = "model.name: 'assets/tiny-llama': needs config.json, *.safetensors and tokenizer files; it holds conf.json, "
    ran = pipeline("path", "sample")
    assert ran.status == 1 and said in ran.out, ran.out
    Path("empty").mkdir()
    assert "model.name: 'empty': needs config.json, *.safetensors and tokenizer files; it holds nothing" in (
        pipeline("path", "harvest", "model.name=empty").out
    )


@pytest.mark.parametrize("commit", [None, "main"])
def test_a_hub_without_a_commit_is_named(tmp_path, monkeypatch, commit):
    monkeypatch.setattr("pipeline.fingerprint.hub_answers", lambda: True)
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha=commit))
    memory = Memory(tmp_path / "memory.json")
    with pytest.raises(
        UserError, match=r"^model\.revision: the hub gives no commit for 'a/b' at 'main'; .*full commit"
    ):
        memory.commit("model", "a/b", None, "model.revision")
    assert not memory.known


def test_a_folder_in_the_place_of_the_hubs_model_is_a_change(fresh_folder):
    """And the other way round; files of the hub are known by their commit."""
    config = load(TINY, ["model.name=own/model", f"model.revision={'0' * 40}"])
    at_hub = find_inputs(config, Path("runs"))
    assert at_hub.model == f"hub:own/model@{'0' * 40}"
    Watch(config, at_hub, Path("runs"), "harvest").check()
    shutil.copytree("assets/tiny-llama", "own/model")
    local = at_hub._replace(model=find_inputs(load(TINY, []), Path("runs")).model)
    Watch(config, local, Path("runs"), "harvest").check()
    with pytest.raises(UserError, match="files that it reads have changed"):
        Watch(config, at_hub, Path("runs"), "harvest").check()
    shutil.rmtree("own/model")
    with pytest.raises(UserError, match="files that it reads have changed"):
        Watch(config, local, Path("runs"), "harvest").check()
