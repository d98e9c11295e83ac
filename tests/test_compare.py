import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Ran, only, unlisted
from typer.testing import CliRunner

from evaluate.compare import FIGURES, Evaluated, columns, compare, frontier_lines
from evaluate.figures import Evaluation, Measured, figures_of, read_figures
from harvest.files import read_json, write_sealed
from pipeline.cli import app
from pipeline.compare import _short

SWEEP = ("train.sweep.l1_coefficient=[0.5,2]", "train.epochs=0.5", "evaluate.features=null")
TINY = str(Path(__file__).parents[1] / "configs" / "tiny.yaml")


def run(command: str, *arguments: str) -> Ran:
    result = CliRunner().invoke(app, [command, *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.output)


def evaluated(name: str, l0: float | None, label: str = "", **settings) -> Evaluated:
    figures = [] if l0 is None else figures_of("fidelity", {"l0": l0, "explained_variance": 0.7}, "outliers_excluded")
    sae = Measured(
        "", "h", {"label": label} if label else {}, (*figures, *figures_of("features", {"dead_fraction": 0.1})), {}
    )
    return Evaluated(name, Evaluation(name, {}, "last", [], (sae,), {}), settings)


def test_rows_are_sorted_and_name_what_differs():
    runs = [evaluated("a", 30, λ=5, lr=1), evaluated("b", None, λ=7, lr=1), evaluated("c", 20, λ=8, lr=1)]
    rows = compare(runs)
    assert [row["run"] for row in rows] == ["c", "a", "b"]
    assert [row["settings"] for row in rows] == [{"λ": 8}, {"λ": 5}, {"λ": 7}]
    assert rows[0]["figures"]["ce_loss_score"] is None
    assert frontier_lines(rows, "ce_loss_score") == {}
    assert frontier_lines(rows, "explained_variance") == {"h": [(20, 0.7), (30, 0.7)]}


def test_an_sae_of_others_has_no_settings_of_training():
    """What it does not have makes no column either."""
    λ, seed, splits = "train.sae.l1_coefficient", "sample.seed", "harvest.splits"
    theirs = evaluated("c", 5, "theirs", **{seed: 0, splits: ["holdout"]})
    ours = [evaluated(f"{n}", 10 * n, **{λ: 2.0, seed: n, splits: ["train", "holdout"]}) for n in (1, 2)]
    rows = compare([*ours, theirs])
    assert [(row["sae"], row["settings"]) for row in rows] == [("theirs", {seed: 0}), ("", {seed: 1}), ("", {seed: 2})]
    other = evaluated("d", 30, **{λ: 4.0, seed: 0, splits: ["train", "holdout"]})
    assert [row["settings"] for row in compare([ours[0], other, theirs])] == [
        {seed: 0},
        {λ: 2.0, seed: 1},
        {λ: 4.0, seed: 0},
    ]


def test_what_another_kind_does_not_have_is_no_difference():
    kind, λ, k = (f"train.sae.{name}" for name in ("kind", "l1_coefficient", "k"))
    two = [
        evaluated("a", 10, **{kind: "standard", λ: 5.0, k: None}),
        evaluated("b", 20, **{kind: "topk", λ: None, k: 8}),
    ]
    rows = compare(two)
    assert [row["settings"] for row in rows] == [{kind: "standard"}, {kind: "topk"}]
    assert columns(rows) == []  # the table's column `kind` says it
    more = compare([*two, evaluated("c", 30, **{kind: "topk", λ: None, k: 16})])
    assert [row["settings"] for row in more] == [
        {kind: kind_, k: k_} for kind_, k_ in (("standard", None), ("topk", 8), ("topk", 16))
    ]


def test_long_names_are_cut_in_the_terminal():
    assert _short("a\n b") == "a b"
    assert _short("n" * 40) == "n" * 40
    assert _short("n" * 41) == "n" * 37 + "..."


def test_a_line_joins_what_differs_in_one_setting():
    """λ where it is swept; a wider SAE is on a frontier of its own."""
    λ, width, seed = "train.sae.l1_coefficient", "train.sae.d_sae", "train.seed"
    grid = [
        evaluated(f"{w}{x}", 10 * w / x, **{λ: x, width: w, "train.lr": 1}) for w in (8, 16) for x in (2.0, 4.0, 8.0)
    ]
    lines = frontier_lines(compare(grid), "explained_variance")
    assert {name: [x for x, _ in points] for name, points in lines.items()} == {
        "d_sae 8": [10, 20, 40],
        "d_sae 16": [20, 40, 80],
    }
    swept = [evaluated(f"{x}", 10 / x, **{λ: x}) for x in (2.0, 4.0)]
    assert list(frontier_lines(compare(swept), "explained_variance")) == ["h"]
    of_lr = [evaluated(f"{r}{s}", r, **{"train.lr": r, seed: s}) for r in (1, 2, 3) for s in (0, 1)]
    assert {n: len(p) for n, p in frontier_lines(compare(of_lr), "explained_variance").items()} == {
        "seed 0": 3,
        "seed 1": 3,
    }

    def measured(run, *saes):
        sae = run.figures.saes[0]
        others = tuple(sae._replace(name=name, hook=hook) for name, hook in saes)
        return run._replace(figures=run.figures._replace(saes=others))

    two_hooks = [measured(swept[0], ("", "a"), ("", "b"), ("paper", "a")), measured(swept[1], ("", "a"), ("", "b"))]
    lines = frontier_lines(compare(two_hooks), "explained_variance")
    assert {name: len(points) for name, points in lines.items()} == {"a": 2, "b": 2, "paper": 1}


def test_a_sweep_of_a_settings_file(run_folder):
    for stage in ("train", "evaluate"):
        ran = run(stage, "--config", TINY, *SWEEP)
        assert ran.status == 0, ran.out
    ran = run("compare", TINY, *SWEEP)
    assert ran.status == 0, ran.out
    lines = ran.out.splitlines()
    assert lines[0].split()[:3] == ["run", "hook", "kind"]
    assert "standard, l1_coefficient = 0.5" in lines[2] and "standard, l1_coefficient = 2" in lines[1]
    assert len(lines) == 4
    assert lines[-1] == "runs/compare/compare.html"
    rows = json.loads(Path("runs/compare/compare.json").read_text())["rows"]
    assert [row["settings"] for row in rows] == [{"train.sae.l1_coefficient": v} for v in (2.0, 0.5)]
    for row in rows:
        sae = read_figures(Path(f"runs/evaluate/{row['run']}")).own("model.layers.1")
        assert row["figures"] == {name: sae.value(name) for name in FIGURES}
        assert None not in row["figures"].values()
    html = Path("runs/compare/compare.html").read_text()
    assert html.count("<svg") == 2
    assert html.count("<circle") == 4
    assert "<script" not in html
    assert not re.search(r"(src|href)=\"?(https?:)?//", html)

    every = [str(path) for path in Path("runs/evaluate").iterdir()]
    trained = json.loads(Path(f"{every[0]}/manifest.json").read_text())["upstreams"][0].rpartition("/")[2]
    by_train = run("compare", trained, "--to", "out").out.splitlines()
    assert by_train[1].startswith(Path(every[0]).name)  # the only evaluation of that training
    assert len(run("compare", *every).out.splitlines()) == 5  # downstream, train and features differ as well


def test_figures_that_are_missing(run_folder):
    metrics = only(run_folder, "runs/evaluate/*/metrics.json")
    found = read_json(metrics)
    sae = found["saes"][0]
    sae["figures"] = [figure for figure in sae["figures"] if figure["section"] != "downstream"]
    write_sealed(metrics, found)
    unlisted(metrics.parent)
    shutil.rmtree("runs/train")  # pruned
    ran = run("compare", str(metrics.parent))
    assert ran.status == 0, ran.out
    assert "–" in ran.out


@pytest.mark.parametrize(
    ("names", "status", "message"),
    [
        (["0123456789ab"], 1, "'0123456789ab': neither a settings file"),
        (["nowhere"], 1, "'nowhere': neither a settings file"),
        ([TINY, "train.lr=0.5"], 1, "1 of 1 runs are not evaluated"),
        (["train.lr=0.5"], 2, "name at least one run"),
    ],
)
def test_what_cannot_be_compared(run_folder, names, status, message):
    ran = run("compare", *names)
    assert ran.status == status
    assert message in ran.out
    assert not Path("runs/compare").exists()


def test_a_directory_of_another_stage(run_folder):
    ran = run("compare", str(only(run_folder, "runs/train/*")))
    assert ran.status == 1
    assert "a train directory; compare takes those of evaluate" in ran.out
