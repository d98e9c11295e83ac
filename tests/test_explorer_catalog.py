"""What can be looked at in the explorer: the SAEs of finished runs, and any feature of them."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, TWO_HOOKS, contents, current_copy, only, pipeline
from test_published_stage import SETTINGS, made

from evaluate.feature_pages import write_pages
from evaluate.figures import read_figures, write_figures
from harvest.activation_store import ActivationStore
from harvest.files import UserError, read_json, write_sealed
from pipeline.config import load
from pipeline.explore.catalog import Once, Shelf, find_entries, labels, open_shelves
from pipeline.explore.features import FindQuery
from pipeline.stages import find_runs
from train.checkpoint import load_sae

HOOK = "model.layers.1"
RUNS = Path("runs")


def entries(*overrides: str, config: Path = TINY):
    return find_entries(find_runs(load(config, list(overrides)), RUNS))


def shelf(*overrides: str, config: Path = TINY):
    return next(iter(open_shelves(entries(*overrides, config=config)).values()))


@pytest.fixture(scope="module")
def look(finished):
    """The shelf of the finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        yield shelf()


def test_any_feature_s_view_makes_the_page_that_evaluation_wrote(look, tmp_path):
    folder = only(look.entry.runs.directory("evaluate"), f"features/{HOOK}")
    numbers = read_figures(folder.parents[1]).own(HOOK).lists["feature_pages"]["numbers"]
    weighed = {number: look.weighed(number) for number in numbers}
    write_pages(tmp_path, look.views.site, weighed, look.entry.runs.config.evaluate.features)
    assert len(numbers) == 8
    assert contents(tmp_path) == contents(folder)
    other = next(feature for feature in range(128) if feature not in numbers)
    view = look.view(other)
    assert view["number"] == other
    assert view["nearest"] == look.weighed(other).nearest
    assert view["density"] == look.activity["active"][:, other].sum() / look.activity["rows"].sum() > 0
    assert len(view["strongest"]) > 0
    assert len(view["promoted"]) == 10
    for number in (-1, 128):
        with pytest.raises(UserError, match=f"feature: {number}: the SAE has 128 features, 0 to 127"):
            look.view(number)


def test_the_table_is_of_the_same_features(look):
    found = look.table.find(FindQuery(limit=128)).features
    assert sorted(line["number"] for line in found) == list(range(128))
    for line in found[:5]:
        view = look.view(line["number"])
        assert {name: line[name] for name in ("density", "max", "score", "rank", "explained")} == {
            name: view[name] for name in ("density", "max", "score", "rank", "explained")
        }
        assert line["fires_on"] == [token["text"] for token in view["fires_on"]]
    assert found[0]["rank"] == 1
    assert {line["verdict"] for line in found} - {""} == {
        each["verdict"]
        for each in read_figures(look.entry.runs.directory("evaluate")).own(HOOK).lists["token_injection"]["features"]
    }


def test_promoting_features_are_those_of_the_largest_logits(look):
    """By numpy, from the norm's gain and the head."""
    end, W_dec = look.language.unembedding(), look.saved.sae.W_dec.double().numpy()
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    logits = (unit * end.gain_D.double().numpy()) @ end.head_VD.double().numpy().T
    logits -= logits.mean(1, keepdims=True)
    tokens = look.table.tokens_of("wait")
    assert sorted(look.text(token) for token in tokens) == [" wait", "wait"]
    largest = logits[:, tokens].max(1)
    found = look.table.find(FindQuery(promotes="wait", limit=128))
    best = [feature for feature in np.argsort(-largest)[:100].tolist() if largest[feature] > 0]
    assert [line["number"] for line in found.features] == best
    assert np.allclose([line["match"] for line in found.features], largest[best], atol=1e-5)
    assert 10 < found.total < 100
    _, logit = look.weighed(5).promoted[0]
    assert logit == pytest.approx(logits[5].max(), abs=1e-5)


def test_a_head_that_cannot_be_used_is_said_and_not_tried_again(finished, monkeypatch):
    tried = []

    def failing(*_):
        tried.append(True)
        raise UserError("model.name: 'assets/tiny-llama': no head")

    monkeypatch.chdir(finished)
    monkeypatch.setattr("pipeline.explore.catalog.load_unembedding", failing)
    one = shelf()
    for _ in range(2):
        with pytest.raises(UserError, match=r"^promotes: .*no head"):
            one.table.find(FindQuery(promotes="wait"))
        with pytest.raises(UserError, match=r"^model\.name: 'assets/tiny-llama': no head"):
            one.language.unembedding()
        assert one.table.find(FindQuery(limit=1)).total == 128
    assert len(tried) == 1


def test_what_a_list_of_saes_says(look):
    assert look.about() == {
        "id": HOOK,
        "title": HOOK,
        "hook": HOOK,
        "kind": "standard",
        "d_in": 32,
        "d_sae": 128,
        "sources": ["chat", "reasoning"],
        "has": {"score": True, "injection": True, "labels": False},
    }


def test_every_hook_and_every_value_of_a_sweep_is_found(two_hooks, tmp_path, monkeypatch):
    current_copy(two_hooks, tmp_path / "copy", monkeypatch)
    less = [f"evaluate.{name}=null" for name in ("downstream", "reason_score", "token_injection", "steering", "diff")]
    given = [TWO_HOOKS, "train.sweep.lr=[1e-3,3e-3]", *less]
    with pytest.raises(UserError, match=r"the evaluate stage .* is not complete \(runs/evaluate/\w+\); run `make all`"):
        entries(*given)
    assert pipeline("evaluate", *given).status == 0
    shelves = open_shelves(entries(*given))
    assert [*shelves] == [f"model.layers.{n}-lr-{lr}" for lr in ("0.001", "0.003") for n in (1, 0)]
    for one in shelves.values():
        saved = load_sae(one.entry.runs.directory("train") / one.entry.hook)
        assert torch.equal(one.saved.sae.W_dec, saved.sae.W_dec)
        assert one.saved.hook == one.entry.hook == one.about()["hook"]
    assert shelves["model.layers.0-lr-0.003"].entry.title == "model.layers.0, lr=0.003"
    maxima = {tuple(one.activity["max"].max(0).tolist()) for one in shelves.values()}
    assert len(maxima) == 4
    # Nothing but densities is known without scores and tokens: none is made up.
    line = shelves["model.layers.0-lr-0.003"].table.find(FindQuery(limit=1)).features[0]
    assert (line["score"], line["rank"], line["explained"], line["verdict"]) == (None, None, None, "")
    shutil.rmtree(shelves["model.layers.0-lr-0.003"].entry.runs.directory("evaluate"))
    assert [entry.id for entry in entries(*given)] == ["model.layers.1-lr-0.001", "model.layers.0-lr-0.001"]


def test_an_sae_of_others_in_the_place_of_training(fresh_folder):
    made(fresh_folder / "theirs")
    assert pipeline("run", *SETTINGS, "evaluate.steering=null").status == 0
    found = shelf(*SETTINGS, "evaluate.steering=null")
    assert found.entry.title == f"{found.entry.hook}, theirs"
    assert found.view(3)["number"] == 3


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_run_that_is_deleted_meanwhile_is_named(run_folder, stage):
    first, second = shelf(), shelf()
    assert first.view(3)["number"] == 3
    shutil.rmtree(only(run_folder, f"runs/{stage}/*"))
    for one in (first, second):  # what was read before as well: it is not to look as if the run were there
        for name, given in (("view", [3]), ("weighed", [3]), ("about", [])):
            with pytest.raises(UserError, match=rf"runs/{stage}/\w+: was deleted while it was looked at; `.*` makes"):
                getattr(one, name)(*given)
        for name in ("saved", "activity", "views", "table"):
            with pytest.raises(UserError, match="was deleted while it was looked at"):
                getattr(one, name)


def test_features_that_were_not_recorded_are_an_error_that_names_the_setting(look):
    runs = look.entry.runs
    without = runs.config.model_copy(update={"evaluate": runs.config.evaluate.model_copy(update={"features": None})})
    blind = Shelf(look.entry._replace(runs=runs._replace(config=without)), look.language)
    for name in ("activity", "views", "table"):
        with pytest.raises(UserError, match=r"evaluate\.features: null: nothing is known of single features"):
            getattr(blind, name)
    assert blind.saved.sae.d_sae == 128  # text is read all the same


def test_rows_without_a_text_have_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(640, 8, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    np.save("x.npy", x.numpy())
    small = [f"ingest.{name}" for name in ("path=x.npy", "shard_rows=64", "chunk_rows=32", "hooks=[h]")]
    small += ["train.sae.expansion_factor=4", "train.batch_size=64", "train.pool_rows=128", "train.validate_every=5"]
    small += CPU
    config = ROOT / "configs" / "ingest.yaml"
    ran = pipeline("run", *small, config=config)
    assert ran.status == 0, ran.out
    found = shelf(*small, config=config)
    assert found.about() | {"title": ""} == found.about() | {
        "title": "",
        "sources": [],
        "has": {"score": False, "injection": False, "labels": False},
    }
    held = np.concatenate(_held_out(found.entry.runs.directory("harvest")))
    limit = found.saved.statistics.norm_limit or np.inf
    with torch.inference_mode():
        f = found.saved.sae.encode(torch.from_numpy(held[np.linalg.norm(held, axis=1) <= limit])).numpy()
    view = found.view(3)
    assert view["density"] == pytest.approx((f[:, 3] > 0).mean())
    assert view["max"] == pytest.approx(f[:, 3].max(), rel=1e-5)
    assert [line["name"] for line in view["by_source"]] == ["all"]
    assert (view["strongest"], view["fires_on"], view["promoted"]) == ([], [], [])
    assert view["no_promoted"] == "ingested rows have no model"
    assert len(view["nearest"]) == 8
    densities = [line["density"] for line in found.table.find(FindQuery(sort="density", limit=32)).features]
    assert densities == sorted((f > 0).mean(0).tolist(), reverse=True)
    assert found.table.find(FindQuery(token="wait")).total == 0
    assert found.text(5) == ""


def _held_out(harvest: Path) -> list[np.ndarray]:
    store = ActivationStore.open(harvest / "store")
    chunks = range(store.geometry.holdout_shards * store.geometry.chunks_per_shard)
    return [bfloat16(store.read_chunk("holdout", "h", n)) for n in chunks]


def bfloat16(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits).view(torch.bfloat16).float().numpy()


def test_the_newest_explanation_of_a_feature_speaks(run_folder):
    runs = find_runs(load(TINY, []), RUNS)[0]
    asked = find_runs(load(TINY, ["explain.model=m"]), RUNS)[0]
    evaluated = runs.of("evaluate")
    evaluation = read_figures(evaluated.path)
    told_by = {asked.fingerprints["explain"]: {3: "old", 4: "kept"}, "bbbbbbbbbbbb": {3: "new"}}
    for number, (name, told) in enumerate(told_by.items()):
        folder = RUNS / "explain" / name
        folder.mkdir(parents=True)
        sae = evaluation.own(HOOK)
        features = [{"feature": feature, "label": label, "sentence": "."} for feature, label in told.items()]
        lists = sae.lists | {"explanations": {"model": "m", "features": features}}
        inputs = evaluation.inputs | {"evaluate": evaluated.path.name}
        write_figures(folder, evaluation._replace(fingerprint=name, inputs=inputs, saes=(sae._replace(lists=lists),)))
        manifest = read_json(evaluated.path / "manifest.json")
        manifest |= {"stage": "explain", "fingerprint": name, "upstreams": [str(evaluated.path)], "files": {}}
        write_sealed(folder / "manifest.json", manifest)
        os.utime(folder / "manifest.json", (number, number))
    assert {feature: each["label"] for feature, each in labels(runs, HOOK).items()} == {3: "new", 4: "kept"}
    one = shelf()
    assert one.view(3)["explanation"]["label"] == "new"
    assert one.about()["has"]["labels"]
    assert [line["number"] for line in one.table.find(FindQuery(label="NE")).features] == [3]
    # Settings with an explanation of their own have that alone.
    assert {feature: each["label"] for feature, each in labels(asked, HOOK).items()} == {3: "old", 4: "kept"}
    (asked.directory("explain") / "manifest.json").unlink()
    assert labels(asked, HOOK) == {}
    assert labels(runs, HOOK).keys() == {3}


def test_a_thing_is_made_once_for_many_threads():
    made_of = []

    def make() -> int:
        made_of.append(1)
        if len(made_of) == 1:
            raise UserError("not yet")
        return sum(range(100_000))

    once = Once(make)
    with pytest.raises(UserError, match="not yet"):
        once()
    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(lambda _: once(), range(32))} == {4_999_950_000}
    assert len(made_of) == 2
