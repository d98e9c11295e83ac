"""Model diffing: rates by source and under two models are what a plain count gives."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluate.diff import CELLS, Rates, compare, renamed_tokens
from evaluate.figures import read_figures
from harvest.files import UserError

HOOK = "model.layers.1"
JUST_DIFF = ("evaluate.downstream=null", "evaluate.reason_score=null", "evaluate.steering=null")


def second_model(folder: str, noise: float = 0.0) -> None:
    model = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.bfloat16)
    with torch.no_grad():
        layer = model.model.layers[0].mlp.down_proj.weight
        layer += noise * torch.randn(layer.shape, generator=torch.Generator().manual_seed(0)).to(layer)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained("assets/tiny-llama").save_pretrained(folder)


def evaluated(*settings: str) -> tuple[dict, dict[str, np.ndarray], str]:
    """metrics, rates and report of the tiny run under these settings."""
    ran = pipeline("evaluate", *JUST_DIFF, *settings)
    assert ran.status == 0, ran.out
    folder = Path(pipeline("path", "evaluate", *JUST_DIFF, *settings).out.strip())
    sae = read_figures(folder).own(HOOK)
    found = {
        kind: lists | {name: f.value for name, f in sae.table("diff")[kind, "all"].items()}
        for kind, lists in sae.lists["diff"].items()
    }
    with np.load(folder / f"diff-{HOOK}.npz") as rates:
        return found, dict(rates), (folder / "report.html").read_text()


def test_the_same_model_gives_identical_rates_and_a_perturbed_one_others(run_folder):
    second_model("assets/same")
    second_model("assets/other", noise=0.3)
    same, rates, report = evaluated("evaluate.diff.model.name=assets/same")
    assert np.array_equal(rates["models_a"], rates["models_b"])
    assert rates["models_a"].any()
    assert same["models"]["correlation"] == pytest.approx(1)
    assert same["models"]["only_a"] == same["models"]["only_b"] == 0
    assert "this model against assets/same" in report
    _, other, _ = evaluated("evaluate.diff.model.name=assets/other")
    assert np.array_equal(other["models_a"], rates["models_a"])
    assert not np.allclose(other["models_b"], rates["models_a"])
    shutil.copytree("assets/same", "assets/elsewhere")
    before = pipeline("path", "evaluate", *JUST_DIFF, "evaluate.diff.model.name=assets/same").out
    assert pipeline("path", "evaluate", *JUST_DIFF, "evaluate.diff.model.name=assets/elsewhere").out == before
    assert pipeline("path", "evaluate", *JUST_DIFF, "evaluate.diff.model.name=assets/other").out != before


def test_sources_split_the_density(run_folder):
    found, rates, report = evaluated("evaluate.diff.present=0.5")
    rows = found["sources"]["rows_a"], found["sources"]["rows_b"]
    assert (found["sources"]["a"], found["sources"]["b"]) == ("chat", "reasoning")
    together = (rows[0] * rates["sources_a"] + rows[1] * rates["sources_b"]) / sum(rows)
    folder = Path(pipeline("path", "evaluate", *JUST_DIFF, "evaluate.diff.present=0.5").out.strip())
    density = np.load(folder / f"density-{HOOK}.npy")
    assert np.allclose(together, density)
    assert not np.array_equal(rates["sources_a"], rates["sources_b"])
    assert "chat against reasoning" in report


def test_what_appears_on_one_side_only():
    a = Rates("a", 1000, np.array([0.5, 0.1, 0.0, 0.0, 1e-7, 0.2]))
    b = Rates("b", 1000, np.array([0.0, 0.1, 0.02, 0.0, 0.5, 1.0]))
    figures, found = compare(a, b, 1e-3, 1e-5)
    assert found["only_a_features"] == [{"feature": 0, "rate": 0.5, "rate_there": 0.0}]
    assert [row["feature"] for row in found["only_b_features"]] == [4, 2]
    assert (figures["only_a"], figures["only_b"], figures["fire_on_both"]) == (1, 2, 3)
    assert sum(count for _, _, count in found["cells"]) == 5
    assert {0, CELLS - 1} < {place for x, y, _ in found["cells"] for place in (x, y)} <= set(range(CELLS))


def test_markers_may_be_named_otherwise_and_words_may_not():
    here = tiny.tokenizer().backend_tokenizer
    text = here.to_str()
    renamed = type(here).from_str(text.replace("<｜User｜>", "<|reserved_special_token_3|>"))
    assert [here.id_to_token(i) for i in renamed_tokens(here, renamed, "b")] == ["<｜User｜>"]
    spec = json.loads(text)
    vocabulary = spec["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    other = type(here).from_str(json.dumps(spec))
    with pytest.raises(UserError, match="its tokenizer is another one: 2 tokens differ"):
        renamed_tokens(here, other, "b")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("evaluate.diff.model.name=assets/nowhere", "evaluate.diff.model.name: 'assets/nowhere': no such folder"),
        (
            "evaluate.diff.sources=[chat,books]",
            "evaluate.diff.sources: 'books': no such source; one of chat, reasoning",
        ),
        ("evaluate.steering.feature_ids=[999]", "evaluate.steering.feature_ids: 999: the SAE has 128 features"),
    ],
)
def test_bad_settings_are_named(run_folder, setting, says):
    ran = pipeline("evaluate", "evaluate.downstream=null", setting)
    assert ran.status == (2 if "sources" in setting else 1)  # known from the settings alone, or not
    assert says in ran.out


def test_the_report_shows_steering_with_hostile_text_escaped(run_folder):
    settings = ("evaluate.downstream=null", "evaluate.diff=null", 'evaluate.steering.prompts=["wait <b>\\u202e"]')
    settings += ("evaluate.steering.max_new_tokens=4", "evaluate.steering.strengths=[2]")
    ran = pipeline("evaluate", *settings)
    assert ran.status == 0, ran.out
    folder = Path(pipeline("path", "evaluate", *settings).out.strip())
    evaluation = read_figures(folder)
    steering = evaluation.own(HOOK).lists["steering"]
    assert len(steering["features"]) == 2
    assert [line["strength"] for line in steering["features"][0]["by_strength"]] == [0, 2]
    for name in steering["features"][0]["by_strength"][0]:
        assert name.removesuffix("_change") in evaluation.definitions["steering"]
    html = (folder / "report.html").read_text()
    assert r"wait &lt;b&gt;\u202e" in html and "\u202e" not in html
