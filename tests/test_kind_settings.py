"""A kind of SAE chosen on the command line, sweeps over kinds and their settings, and what speaks of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, contents, pipeline

from evaluate.charts import COLOURS, points
from evaluate.compare import Evaluated, columns, compare, frontier_lines
from evaluate.figures import Evaluation, Measured, figures_of
from pipeline import measure
from pipeline.config import load
from pipeline.dry_run import rehearsal
from pipeline.settings_text import SettingsError
from pipeline.stages import Runs, fingerprints, swept
from train.config import KINDS, SaeConfig, SweepConfig, TrainConfig
from train.kinds import new_sae

HOOK = "model.layers.1"
TOPK = ("train.sae.kind=topk", "train.sae.k=3")


def settings(tmp_path: Path, train: str) -> Path:
    """TINY with other settings of train.sae, and a sweep."""
    path = tmp_path / "own.yaml"
    before = TINY.read_text()
    assert before.count("l1_coefficient: 1\n") == 1
    path.write_text(before.replace("l1_coefficient: 1\n", train))
    return path


def test_a_kind_of_the_command_line_sets_the_files_settings_of_others_aside(tmp_path, capsys):
    sweep = "l1_coefficient: 1\n  sweep: {l1_coefficient: [3, 5], lr: [0.001]}\n"
    file = settings(tmp_path, sweep)
    chosen = load(file, list(TOPK)).train
    assert chosen.sae == SaeConfig(kind="topk", k=3, expansion_factor=4)
    assert chosen.sweep == SweepConfig(lr=(0.001,))
    said = capsys.readouterr()
    assert said.err == (
        f"note: {file}: set aside, as train.sae.kind=topk: train.sae.l1_coefficient = 1, "
        "train.sweep.l1_coefficient = [3, 5]\n"
    )
    assert not said.out
    load(file, ["train.sae.kind=standard"])
    load(file, ["train.sweep.kind=[standard, topk]"])
    assert not capsys.readouterr().err
    load(file, ["train.sweep.kind=[topk, batchtopk]"])
    assert "as train.sweep.kind=[topk, batchtopk]: train.sae.l1_coefficient = 1" in capsys.readouterr().err
    of_kinds = settings(tmp_path, "l1_coefficient: 1\n  sweep: {kind: [standard, topk], k: [2, 4]}\n")
    assert load(of_kinds, ["train.sae.kind=batchtopk"]).train.sweep == SweepConfig(k=(2, 4))
    assert "train.sweep.kind = [standard, topk]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "given", "message"),
    [
        ("kind: topk\n    l1_coefficient: 1\n", [], r"sae\.l1_coefficient = 1 is a setting of kind standard.*, and"),
        ("l1_coefficient: 1\n", [*TOPK, "train.sae.l1_coefficient=2"], r"sae\.l1_coefficient = 2 is a setting of kind"),
        ("kind: topk\n", ["train.sae.l1_coefficient=2"], r"sae\.l1_coefficient = 2 .* and kind is topk"),
        ("l1_coefficient: 1\n", ["train.sae.kind=gated"], r"kind: 'gated': known kinds are standard, topk"),
        ("l1_coefficient: 1\n", ["train.sweep.kind=[gated]"], r"kind: 'gated': known kinds are standard, topk"),
        ("l1_coefficient: 1\n", ["train.sweep.k=[2]"], r"sweep\.k: kind standard has no k"),
        ("l1_coefficient: 1\n", ["train.sweep={kind: [topk], target_l0: [2]}"], r"sweep\.target_l0: kind topk has no"),
        ("l1_coefficient: 1\n  sweep: {kind: [topk]}\n", [], r"sae\.l1_coefficient = 1 is a setting of kind standard"),
        ("k: 0\n    kind: topk\n", [], "greater than or equal to 1"),
    ],
)
def test_settings_that_are_no_kinds_own(tmp_path, file, given, message):
    with pytest.raises(SettingsError, match=message):
        load(settings(tmp_path, file), given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([*TOPK, "train.sweep.k=[3, 129]"], "train.sae.k: 129: the SAE has 128 features"),
        (["train.sae.kind=matryoshka", "train.sae.prefixes=[4, 64]"], "[4, 64]: not widths that rise to d_sae = 128"),
    ],
)
def test_what_does_not_fit_the_width_is_said_before_anything_runs(fresh_folder, given, message):
    ran = pipeline("sample", *given)
    assert ran.status == 1
    assert message in " ".join(ran.out.split())
    assert not list(Path("runs").glob("sample/*/begun.json"))


def test_a_kind_takes_of_a_sweep_what_it_has():
    sae = SaeConfig(d_sae=8, l1_coefficient=7, aux_coefficient=0.5, bandwidth=0.1)
    kinds = ("standard", "topk", "jumprelu", "batchtopk")
    sweep = SweepConfig(kind=kinds, l1_coefficient=(3, 5), k=(2, 4), target_l0=(6,), lr=(1e-3, 2e-3))
    single = TrainConfig(sae=sae, epochs=1, sweep=sweep).expanded()
    of_standard = [("standard", value, None, None, None, lr) for value in (3, 5) for lr in (1e-3, 2e-3)]
    of_topk = [(kind, None, k, 0.5, None, lr) for kind in kinds[1::2] for k in (2, 4) for lr in (1e-3, 2e-3)]
    of_jumprelu = [("jumprelu", None, None, None, 6, lr) for lr in (1e-3, 2e-3)]
    names = ("kind", "l1_coefficient", "k", "aux_coefficient", "target_l0")
    found = [(*(getattr(one.sae, name) for name in names), one.lr) for one in single]
    assert found == of_standard + of_topk[:4] + of_jumprelu + of_topk[4:]
    assert [one.sae.bandwidth for one in single if one.sae.kind == "jumprelu"] == [0.1, 0.1]
    alone = SaeConfig(kind="topk", d_sae=8, k=2, aux_coefficient=0.5)
    assert single[4].sae == alone and single[4].sweep is None
    defaults = TrainConfig(sae=SaeConfig(d_sae=8), epochs=1, sweep=SweepConfig(kind=tuple(KINDS))).expanded()
    assert [one.sae for one in defaults] == [SaeConfig(kind=kind, d_sae=8) for kind in KINDS]


def trained() -> dict[str, dict[str, bytes]]:
    """Weights of every training run by its settings of the SAE."""
    out = {}
    for manifest in Path("runs/train").glob("*/manifest.json"):
        about = json.loads(manifest.read_text())["settings"]["sae"]
        name = f"{about.get('kind', 'standard')} {about.get('k', about['l1_coefficient'])}"
        found = contents(manifest.parent / HOOK)
        out[name] = {n: data for n, data in found.items() if n.endswith(("safetensors", "sae.json"))}
    return out


def test_a_sweep_over_kinds_trains_each_as_alone(run_folder):
    for kind, k in (("topk", 2), ("batchtopk", 4)):
        assert pipeline("train", f"train.sae.kind={kind}", f"train.sae.k={k}").status == 0
    alone = trained()
    sweep = ("train.sweep.kind=[topk, batchtopk]", "train.sweep.k=[2, 4]")
    ran = pipeline("train", *sweep, "--force", "--yes")
    assert ran.status == 0, ran.out
    assert ran.out.count("train     complete") == 4 and ran.out.count("note:") == 1
    together = trained()
    assert together.keys() == {"standard 1.0", "topk 2", "topk 4", "batchtopk 2", "batchtopk 4"}
    for name, found in alone.items():
        assert found == together[name], name
    assert together["topk 4"] != together["batchtopk 4"]
    status = pipeline("status", *sweep).out
    assert all(f"(kind={kind} k={k})" in status for kind in ("topk", "batchtopk") for k in (2, 4))
    steered = pipeline("steer", *sweep, "--feature", "1", "--prompt", "x")
    assert "train.sweep=null train.sae.kind=topk train.sae.k=2" in " ".join(steered.out.split())


def test_words_of_a_sweep_leave_out_what_a_kind_does_not_have():
    from pipeline.fingerprint import Inputs

    config = load(TINY, ["train.sweep={kind: [standard, jumprelu], l1_coefficient: [2, 3], target_l0: [8, 9.5]}"])
    inputs = Inputs("t", "m", ("a", "b"))
    singles = [config.model_copy(update={"train": one}) for one in config.train.expanded()]
    sweep = [Runs(one, inputs, fingerprints(one, inputs), Path("x")) for one in singles]
    assert [swept(runs, sweep, "_", "-") for runs in sweep] == [
        "kind-standard_l1_coefficient-2",
        "kind-standard_l1_coefficient-3",
        "kind-jumprelu_target_l0-8",
        "kind-jumprelu_target_l0-9.5",
    ]


def test_what_a_kind_says_of_itself():
    assert SaeConfig(d_sae=8, l1_coefficient=0.1).said() == "standard, l1_coefficient = 0.1"
    assert SaeConfig(kind="matryoshka", d_sae=8, k=34, prefixes=(2, 8)).said() == "matryoshka, k = 34"
    jumprelu = SaeConfig(kind="jumprelu", d_sae=8, target_l0=34, bandwidth=0.5)
    assert jumprelu.said() == "jumprelu, l0_coefficient = 1, target_l0 = 34"
    assert jumprelu.said(everything=True) == f"{jumprelu.said()}, bandwidth = 0.5"


def evaluated(kind: str, l0: float, **of_kind) -> Evaluated:
    names = ("k", "l1_coefficient", "l0_coefficient", "target_l0", "aux_coefficient")
    about = {f"train.sae.{name}": of_kind.get(name) for name in names} | {"train.sae.kind": kind}
    measured = {"l0": l0, "explained_variance": l0 / 100}
    sae = Measured("", "h", {}, tuple(figures_of("fidelity", measured, "outliers_excluded")), {})
    return Evaluated(f"{kind}{l0}", Evaluation("r", {}, "last", [], (sae,), {}), about)


def test_report_and_card_say_the_kind(run_folder):
    """And the report draws the terms that its kind's loss has."""
    settings = ("train.sae.kind=matryoshka", "train.sae.k=5", "train.sae.dead_after=64", "evaluate.features=null")
    ran = pipeline("run", *settings)
    assert ran.status == 0, ran.out
    html = Path(ran.out.splitlines()[-1]).read_text()
    assert "the last SAE (matryoshka, k = 5) of training" in " ".join(html.split())
    chart = html[html.index('aria-label="Terms of the loss by step"') :].partition("</svg>")[0]
    assert [name for name in ("inner", "aux", "l1") if f">{name}</text>" in chart] == ["inner", "aux"]
    assert chart.count("<polyline") == 2
    assert pipeline("export", *settings, "--to", "out").status == 0
    card = Path("out/README.md").read_text()
    assert " | matryoshka, k = 5, aux_coefficient = 0.03125 | " in card
    assert card.count("as batchtopk, loss Σ over nested prefixes") == 1


def test_a_comparison_has_a_line_and_a_colour_for_each_kind():
    runs = [evaluated("standard", l0, l1_coefficient=10 / l0) for l0 in (20, 40)]
    runs += [evaluated(kind, k, k=k, aux_coefficient=0.1) for kind in ("topk", "batchtopk") for k in (16, 34)]
    rows = compare(runs)
    by_kind = {"standard": [(20, 0.2), (40, 0.4)], **{kind: [(16, 0.16), (34, 0.34)] for kind in ("topk", "batchtopk")}}
    found = frontier_lines(rows, "explained_variance")
    assert found == by_kind
    drawn = points("", found, "L0")
    assert [drawn.count(f'stroke="{colour}"') for colour in COLOURS[:4]] == [1, 1, 1, 0]
    assert [row["kind"] for row in rows if row["figures"]["l0"] > 30] == [
        "batchtopk, k = 34",
        "topk, k = 34",
        "standard, l1_coefficient = 0.25",
    ]
    assert columns(rows) == []  # the kind says it all; a coefficient that only some kinds have is no difference
    runs.append(evaluated("topk", 50, k=50, aux_coefficient=0.2))
    rows = compare(runs)
    assert columns(rows) == ["train.sae.aux_coefficient"]
    lines = frontier_lines(rows, "explained_variance")
    assert lines["topk, aux_coefficient 0.2"] == [(50, 0.5)]
    assert lines["standard"] == by_kind["standard"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_times_every_kind(kind, monkeypatch):
    """At the L0 that it names, on as many features as it takes."""
    train = load(TINY, [f"train.sae.kind={kind}", "train.compute_dtype=float32"]).train
    sizes: Any = SimpleNamespace(geometry=SimpleNamespace(d_in=32), d_sae=4000)
    l0 = []

    class Watched(measure.Trainer):
        def step(self, rows_BD):
            stepped = super().step(rows_BD)
            l0.append(float(stepped.result.l0))
            return stepped

    monkeypatch.setattr(measure, "Trainer", Watched)
    torch.manual_seed(2)  # of the rows: L0 hangs on them, from 17 to 26
    seconds, part = measure._step(train, sizes, torch.device("cpu"))
    assert seconds and part == 4000
    assert l0[0] == pytest.approx(20, rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_narrows_what_counts_features(kind):
    own = {"topk": ["train.sae.k=60"], "matryoshka": ["train.sae.prefixes=[640, 1280]", "train.sweep.k=[50, 100]"]}
    config = load(TINY, [f"train.sae.kind={kind}", *own.get(kind, [])])
    rehearsed = rehearsal(config, 320, Path("x")).train
    for single in rehearsed.expanded():
        sae = new_sae(single, 32, 1.0, "cpu")
        assert (sae.kind, sae.d_sae) == (kind, 128)
    assert kind != "topk" or rehearsed.sae.k == 6


def test_one_mistake_is_one_sentence():
    with pytest.raises(SettingsError) as caught:
        load(TINY, ["train.sae.kind=topk", "train.sae.k=many"])
    (line,) = str(caught.value).splitlines()
    assert "train.sae.k: 'many'" in line
