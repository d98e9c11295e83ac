"""Stage-wise diffing: planted changes of a dictionary are found by training, and every figure is numpy's."""

import csv
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import CPU, ROOT, TWO_HOOKS, Ran, current_copy, pipeline
from typer.testing import CliRunner

from evaluate.rotation import HookTurns, Turns, along, ranked, turned
from harvest.files import read_json
from pipeline.cli import app
from train.checkpoint import load_sae

D, DIRECTIONS, CHANGED, ROWS = 48, 40, 4, 12_288  # a tenth of the directions changes
INGEST = ROOT / "configs" / "ingest.yaml"
OPTIONS = (
    "ingest.shard_rows=2048",
    "ingest.chunk_rows=512",
    "ingest.hooks=[acts]",
    f"train.sae={{d_sae: {DIRECTIONS}, l1_coefficient: 0.3}}",
    "train.batch_size=256",
    "train.pool_rows=4096",
    "train.exclude.norm_above_median=null",
    "train.runtime.threads=1",
    *CPU,
)
FINE_TUNED = ("train.epochs=10", "train.l1_warmup_fraction=0", "train.lr=1e-3")


def run(*arguments: str) -> Ran:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.output)


def directions(seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((DIRECTIONS, D))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def rows(mixed: np.ndarray, seed: int) -> np.ndarray:
    """Sums of a few directions each, with a little noise."""
    rng = np.random.default_rng(seed)
    amounts = (rng.random((ROWS, DIRECTIONS)) < 0.06) * rng.uniform(0.5, 1.5, (ROWS, DIRECTIONS))
    return (amounts @ mixed + 0.01 * rng.standard_normal((ROWS, D))).astype(np.float32)


class Planted(NamedTuple):
    folder: Path
    first: str  # train directories, as named from the folder
    paths: list[tuple[str, str]]  # after half of the change, and after all of it


def trained(rows_file: str, *options: str) -> str:
    given = (f"ingest.path={rows_file}.npy", *OPTIONS, *options)
    for stage in ("ingest", "train"):
        ran = pipeline(stage, *given, config=INGEST)
        assert ran.status == 0, ran.out
    return pipeline("path", "train", *given, config=INGEST).out.strip()


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    """An SAE of a dictionary, fine-tuned twice on one whose changed rows are half turned, then wholly."""
    folder = tmp_path_factory.mktemp("planted")
    old, new = directions(0), directions(0)
    new[:CHANGED] = directions(1)[:CHANGED]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, (name, mixed) in enumerate({"old": old, "half": (old + new) / 2, "new": new}.items()):
            np.save(f"{name}.npy", rows(mixed / np.linalg.norm(mixed, axis=1, keepdims=True), seed))
        first = trained("old", "train.epochs=40", "train.lr=3e-3")
        paths = []
        for seed in ("train.seed=0", "train.seed=1"):
            half = trained("half", f"train.start_from={first}", *FINE_TUNED, seed)
            paths.append((half, trained("new", f"train.start_from={half}", *FINE_TUNED)))
        ran = run("diff-stages", *(last for _, last in paths), "--to", "out")
        assert ran.status == 0, ran.out
        Path("out/terminal.txt").write_text(ran.out)
    return Planted(folder, first, paths)


def decoder(planted: Planted, run: str) -> np.ndarray:
    return load_sae(planted.folder / run / "acts").sae.W_dec.numpy().astype(np.float64)


def table(planted: Planted) -> list[dict[str, float]]:
    lines = csv.DictReader((planted.folder / "out/features-acts.csv").read_text().splitlines())
    return [{name: float(value) for name, value in line.items()} for line in lines]


def auc(score_F: np.ndarray, is_changed_F: np.ndarray) -> float:
    """How often a changed feature is above an unchanged one."""
    above = score_F[is_changed_F][:, None] - score_F[~is_changed_F][None]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def test_changed_features_come_first(planted):
    """Those whose row in the first SAE is nearest to a direction that changed."""
    W = decoder(planted, planted.first)
    nearest = (W / np.linalg.norm(W, axis=1, keepdims=True) @ directions(0).T).argmax(1)
    by_feature = sorted(table(planted), key=lambda line: line["feature"])
    assert set(nearest) == set(range(DIRECTIONS))
    for ranking in ("score", "last_step"):
        assert auc(np.array([line[ranking] for line in by_feature]), nearest < CHANGED) >= 0.95, ranking
    assert [line["score"] for line in table(planted)] == sorted((line["score"] for line in by_feature), reverse=True)


def test_figures_are_those_of_numpy(planted):
    def distance(before: np.ndarray, after: np.ndarray, i: int) -> float:
        return 1 - before[i] @ after[i] / np.linalg.norm(before[i]) / np.linalg.norm(after[i])

    first = decoder(planted, planted.first)
    stages = [[first, *(decoder(planted, run) for run in path)] for path in planted.paths]
    for line in table(planted):
        i, totals, last = int(line["feature"]), [], []
        for number, (start, half, new) in enumerate(stages, 1):
            totals.append(distance(start, new, i))
            last.append(distance(half, new, i))
            assert line[f"path_{number}"] == pytest.approx(totals[-1], abs=1e-12)
            assert line[f"path_{number}_step_1"] == pytest.approx(distance(start, half, i), abs=1e-12)
            assert line[f"path_{number}_step_2"] == pytest.approx(last[-1], abs=1e-12)
        assert line["score"] == pytest.approx(min(totals), abs=1e-12)
        assert line["last_step"] == pytest.approx(min(last), abs=1e-12)


def test_report_and_json_say_the_same(planted):
    found = read_json(planted.folder / "out/diff-stages.json")
    (acts,) = found["hooks"].values()
    names = [[Path(run).name for run in (planted.first, *path)] for path in planted.paths]
    assert [[stage["name"] for stage in path] for path in found["paths"]] == names
    lines = table(planted)
    assert [row["feature"] for row in acts["top"]["score"]] == [int(line["feature"]) for line in lines]
    assert acts["quantiles"]["0.5"] == pytest.approx([np.median([x[f"path_{n}"] for x in lines]) for n in (1, 2)])
    html = (planted.folder / "out/diff-stages.html").read_text()
    assert html.count("<svg") == 2
    assert f"<td>{int(lines[0]['feature'])}</td><td>{lines[0]['score']:.4f}</td>" in html
    assert "<script" not in html
    terminal = (planted.folder / "out/terminal.txt").read_text().splitlines()
    assert terminal[1].split()[:2] == [str(int(lines[0]["feature"])), f"{lines[0]['score']:.4f}"]
    assert terminal[-1] == "out/diff-stages.html"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (lambda p: (p.first, p.paths[0][1]), f"runs/train/{'[0-9a-f]' * 12}: started from no other SAE"),
        (lambda p: (p.paths[0][1], "0123456789ab"), "'0123456789ab': no finished training run"),
        (lambda p: (p.paths[0][1], next(Path("runs/harvest").iterdir())), "a harvest directory; diff-stages takes"),
    ],
)
def test_what_cannot_be_compared(planted, monkeypatch, names, message):
    monkeypatch.chdir(planted.folder)
    ran = run("diff-stages", *map(str, names(planted)), "--to", "nowhere")
    assert ran.status == 1
    assert re.search(message, ran.out), ran.out
    assert not Path("nowhere").exists()


def test_paths_of_other_saes_and_changed_ones(planted, tmp_path, monkeypatch):
    shutil.copytree(planted.folder / "runs", tmp_path / "runs")
    for name in ("old", "half"):
        shutil.copy(planted.folder / f"{name}.npy", tmp_path)
    monkeypatch.chdir(tmp_path)
    (half, new), last = planted.paths[0], planted.paths[1][1]
    elsewhere = trained("half", f"train.start_from={half}", "train.epochs=1")
    fresh = trained("half", f"train.start_from={trained('old', 'train.epochs=1')}", "train.epochs=1")
    assert run("diff-stages", elsewhere, last).status == 0  # paths may be of unlike length
    assert "the paths begin at different SAEs" in run("diff-stages", fresh, last).out
    Path("sweep.yaml").write_text(
        "ingest: {path: old.npy}\ntrain: {sae: {d_sae: 8}, epochs: 1, sweep: {lr: [1e-3, 1e-4]}}\n"
    )
    swept = "sweep.yaml: a sweep of 2 training runs; name one by its fingerprint"
    assert swept in run("diff-stages", "sweep.yaml", last).out
    about = Path(half) / "acts/sae.json"
    about.write_text(about.read_text().replace('"step"', '"steps"'))
    assert f"{new}: started from other weights than {half} holds now" in run("diff-stages", new, last).out


def test_paths_of_one_start_that_have_no_hook_in_common(two_hooks, tmp_path, monkeypatch):
    current_copy(two_hooks, tmp_path / "copy", monkeypatch)
    first = pipeline("path", "train", TWO_HOOKS, "train.lr=3e-3").out.strip()
    paths = []
    for hook in ("model.layers.0", "model.layers.1"):
        given = (
            f"harvest.hooks=[{hook}]",
            f"train.start_from={first}",
            "train.epochs=0.5",
            "train.l1_warmup_fraction=0",
        )
        for stage in ("harvest", "train"):
            ran = pipeline(stage, *given)
            assert ran.status == 0, ran.out
        paths.append(pipeline("path", "train", *given).out.strip())
    ran = run("diff-stages", *paths, "--to", "nowhere")
    assert ran.status == 1 and "no hook in common: ['model.layers.0'] and ['model.layers.1']" in ran.out, ran.out
    assert not Path("nowhere").exists()


def test_the_smallest_angles_rows_of_zeros_and_ties():
    before = np.array([[1, 0], [1, 0], [0, 2], [0, 0], [3, 4]], np.float32)
    after = np.array([[5, 0], [1, 1e-6], [0, -1], [1, 0], [-4, 3]], np.float32)
    found = turned(before, after)
    assert found[0] == 0
    assert found[1] == pytest.approx(5e-13, rel=1e-6)  # half of the angle squared
    assert found[2:3] == 2
    assert np.isnan(found[3])
    assert found[4] == pytest.approx(1)
    assert ranked(np.array([0.5, np.nan, 0.7, 0.5])).tolist() == [2, 0, 3, 1]


def test_a_step_back_is_turned_twice_and_comes_to_nothing():
    """Paths of unlike length; with one of a single step, there is no ranking by last steps."""
    one, two = np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)[::-1]
    there_and_back, there = along([one, two, one]), along([one, two])
    assert there_and_back.total_F.tolist() == [0, 0]
    assert there_and_back.step_KF.tolist() == [[1, 1], [1, 1]]
    assert there.total_F.tolist() == [1, 1]
    assert HookTurns("h", (there_and_back, there), ()).rankings == ["score"]
    assert HookTurns("h", (there_and_back, there), ()).score("score").tolist() == [0, 0]
    half = Turns(np.array([0.5, 0.1]), np.array([[0, 0], [0.2, 0.3]]))
    both = HookTurns("h", (there_and_back, half), ())
    assert both.rankings == ["score", "last_step"]
    assert both.score("last_step").tolist() == [0.2, 0.3]


def test_on_text_with_links_to_pages(run_folder):
    """Chat first, then both; or reasoning first, then both: one model, as the default has."""
    short = ("train.epochs=1", "evaluate.steering=null", "evaluate.downstream=null", "evaluate.diff=null")
    chat, reasoning = (
        f"sample.sources=[{{name: {name}, path: assets/tiny-{name}.jsonl, rows: {rows}, share: 1}}]"
        for name, rows in (("chat", "conversation"), ("reasoning", "reasoning"))
    )
    no_words = "evaluate.reason_score=null"

    def made(*options: str) -> str:
        ran = pipeline("run", *short, *options)
        assert ran.status == 0, ran.out
        return pipeline("path", "train", *short, *options).out.strip()

    first = made(chat, no_words)
    direct = made(f"train.start_from={first}")
    by_way = made(f"train.start_from={made(reasoning, no_words, f'train.start_from={first}')}")
    ran = run("diff-stages", by_way, Path(direct).name)
    assert ran.status == 0, ran.out
    found = read_json(Path("runs/diff-stages/diff-stages.json"))
    assert [[stage["sources"] for stage in path] for path in found["paths"]] == [
        ["chat", "reasoning", "chat, reasoning"],
        ["chat", "chat, reasoning"],
    ]
    assert {stage["model"] for path in found["paths"] for stage in path} == {"assets/tiny-llama"}
    (hook,) = found["hooks"].values()
    pages = [(title, link) for row in hook["top"]["score"] for title, link in row["pages"].items()]
    of = {title: read_json(Path("runs/diff-stages", link).parents[2] / "manifest.json") for title, link in pages}
    assert {title: about["upstreams"] for title, about in of.items()} == {
        "first": [first],
        "path 1": [by_way],
        "path 2": [direct],
    }
    assert all((Path("runs/diff-stages") / link).is_file() for _, link in pages)
