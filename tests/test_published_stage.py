"""An SAE that SAELens wrote, in the place of training, through every command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sae_lens
import safetensors.torch
import torch
from conftest import ROOT, contents, current_copy, only, pipeline
from sae_lens import StandardSAEConfig
from test_published import HOOK, NAME, D, F, edit_cfg, linear_state, write_theirs
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from evaluate.figures import read_figures
from harvest.activation_store import ActivationStore
from harvest.contexts import Contexts
from pipeline.architecture import find_architecture
from pipeline.cli import app
from pipeline.config import load
from pipeline.dry_run import rehearsal
from pipeline.estimate import plan_published
from pipeline.measure import Machine
from pipeline.sizes import sizes
from pipeline.stages import find_runs
from train.checkpoint import load_sae

PATH = "published.path=theirs"
OF_RUN = ("published.exclude.token_ids=[1]", "evaluate.downstream.compute_dtype=float32")
SETTINGS = ("train=null", PATH, "sample.train_tokens=0", *OF_RUN)


def made(folder: Path) -> sae_lens.SAE:
    config = StandardSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=True)
    theirs = write_theirs(folder, config)
    with torch.no_grad():  # of the rows' size, so that x̂ is not far from everything
        theirs.b_dec.mul_(0.05)
        theirs.b_enc.mul_(0.1)
        theirs.W_dec.mul_(0.1)
    theirs.save_model(folder)
    return theirs


@pytest.fixture(scope="module")
def published(finished, tmp_path_factory) -> Path:
    """A finished run of an SAE of SAELens on the tiny settings; read only."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(finished / "assets", folder / "assets")
    made(folder / "theirs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ran = pipeline("run", *SETTINGS)
    assert ran.status == 0, ran.out
    assert "warning: published: theirs says that it is of 'tiny', and model.name is 'assets/tiny-llama'" in ran.out
    return folder


@pytest.fixture
def published_folder(published, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the current folder."""
    return current_copy(published, tmp_path / "copy", monkeypatch)


@pytest.fixture
def theirs_folder(fresh_folder) -> Path:
    """The SAE and no runs, as the current folder."""
    made(fresh_folder / "theirs")
    return fresh_folder


def test_only_held_out_rows_are_made(published):
    store = ActivationStore.open(only(published, "runs/harvest/*/store"))
    assert (store.geometry.train_shards, store.geometry.holdout_shards) == (0, 2)
    assert not list(published.glob("runs/harvest/*/store/train/*/c"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(published)
        for command, said in (
            ("verify", "every byte that is there is as it was written"),
            ("status", "train     complete   runs/train/"),
            ("prune", "nothing to delete"),
        ):
            ran = pipeline(command, *SETTINGS)
            assert (ran.status, said in ran.out) == (0, True), ran.out


def test_the_rows_of_fidelity_by_numpy(published):
    """f and x̂ are SAELens' own; which rows count, and the formulas, are written out."""
    theirs = sae_lens.SAE.load_from_disk(published / "theirs")
    store = ActivationStore.open(only(published, "runs/harvest/*/store"))
    g = store.geometry
    chunks = [store.read_chunk("holdout", HOOK, n) for n in range(g.holdout_shards * g.chunks_per_shard)]
    x = torch.from_numpy(np.concatenate(chunks)).view(torch.bfloat16).float()
    token, norm = (
        np.concatenate([read("holdout", name, shard) for shard in range(g.holdout_shards)])
        for read, name in ((store.read_provenance, "token_id"), (store.read_norms, HOOK))
    )
    limit = 10 * np.median(norm)
    kept = (token != 1) & (norm <= limit)
    assert 0 < (token == 1).sum() < 100
    with torch.no_grad():
        f, rebuilt = (t.double().numpy() for t in (theirs.encode(x), theirs(x)))
    x = x.double().numpy()
    sae = read_figures(only(published, "runs/evaluate/*")).own(HOOK)
    assert sae.value("norm_limit") == pytest.approx(limit, rel=1e-6)
    assert sae.value("scale") == 1
    for name, rows in (("outliers_excluded", kept), ("all_rows", np.ones_like(kept))):
        error = ((x - rebuilt)[rows] ** 2).sum()
        spread = ((x[rows] - x[rows].mean(0)) ** 2).sum()
        expected = {
            "rows": rows.sum(),
            "l0": (f[rows] > 0).sum(1).mean(),
            "explained_variance": 1 - error / spread,
            "mse": error / rows.sum(),
        }
        found = {figure: sae.value(figure, "fidelity", name) for figure in expected}
        assert found == pytest.approx(expected, rel=1e-5)
    assert sae.value("dead_features") == (f[kept] > 0).sum(0).tolist().count(0)
    assert sae.value("l0", "fidelity", "all_rows") != sae.value("l0")


def test_the_loss_of_the_spliced_model_by_transformers(published):
    theirs = sae_lens.SAE.load_from_disk(published / "theirs")
    tokens = Contexts(only(published, "runs/sample/*/contexts")).read("holdout", "tokens", 0, 8).astype(np.int64)
    ids = torch.from_numpy(tokens)
    model = AutoModelForCausalLM.from_pretrained(published / "assets/tiny-llama", dtype=torch.float32)
    sae = read_figures(only(published, "runs/evaluate/*")).own(HOOK)

    def loss(replacement) -> float:
        hook = model.get_submodule(HOOK).register_forward_hook(lambda _m, _i, x: replacement(x.bfloat16().float()))
        with torch.no_grad():
            out = model(ids, labels=ids).loss.item()
        hook.remove()
        return out

    clean, rebuilt, zero = loss(lambda x: None), loss(theirs), loss(torch.zeros_like)
    found = [sae.value(f"ce_{name}") for name in ("clean", "sae_all_rows", "zero_ablated_all_rows")]
    assert found == pytest.approx([clean, rebuilt, zero], rel=1e-4)
    assert sae.value("ce_loss_score_all_rows") == pytest.approx((zero - rebuilt) / (zero - clean), abs=1e-3)
    assert abs(clean - rebuilt) > 1e-2


def test_the_report_says_whose_it_is(published):
    folder = only(published, "runs/evaluate/*")
    html = (folder / "report.html").read_text()
    assert "the published SAE <code>theirs</code>" in html
    assert "model_name <code>tiny</code>" in html
    assert "SAE of training" not in html
    assert html.count("<figcaption>") == html.count("<svg")
    for absent in ("Loss (its coefficients warm up)", "Training and features", "as in training"):
        assert absent not in html
    for present in ("ReasonScore", "Feature pages", "Steering", "Feature density"):
        assert present in html
    assert len(list(folder.glob(f"features/{HOOK}/[0-9]*.html"))) == 8


def test_it_exports_steers_and_compares(published_folder):
    ran = pipeline("export", *SETTINGS, "--to", "out")
    assert ran.status == 0, ran.out
    again, theirs = (sae_lens.SAE.load_from_disk(p) for p in (f"out/{NAME}", "theirs"))
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0)) * 0.05
    with torch.no_grad():
        assert torch.allclose(again.encode(x), theirs.encode(x), atol=1e-6)
        assert torch.allclose(again(x), theirs(x), atol=1e-6)
    assert again.cfg.metadata.dataset_path is None  # ours is not what it was trained on
    assert again.cfg.metadata.exclude_special_tokens is False
    card = Path("out/README.md").read_text()
    assert "Published by others as `theirs` (`sha256:" in card
    assert "- f = ReLU(z)\n" in card
    assert "Trained on" not in card
    assert "training never saw" not in card
    assert pipeline("push", "nobody/nothing", *SETTINGS, "--folder", "out").status == 0
    feature = str(int(np.load(only(Path(), f"runs/evaluate/*/density-{HOOK}.npy")).argmax()))
    ran = pipeline("steer", *SETTINGS, "--feature", feature, "--prompt", "the sum", "--max-new-tokens", "2")
    assert ran.status == 0, ran.out
    assert f"feature {feature}" in ran.out


def test_beside_a_trained_one(published_folder, finished):
    for stage in ("sample", "harvest", "train", "evaluate"):
        shutil.copytree(finished / "runs" / stage, f"runs/{stage}", dirs_exist_ok=True)
    runs = [str(path) for path in Path("runs/evaluate").iterdir()]
    assert len(runs) == 2
    ran = CliRunner().invoke(app, ["compare", *runs])
    assert ran.exit_code == 0, ran.output
    rows = json.loads(Path("runs/compare/compare.json").read_text())["rows"]
    assert sorted(row["sae"] for row in rows) == ["", "theirs"]
    assert not any(name.startswith(("train.", "harvest.splits")) for row in rows for name in row["settings"])
    ran = pipeline("status")  # of the trained one: the other is not its nearest
    assert "complete" in ran.out
    assert "would run" not in ran.out
    ran = pipeline("status", "train.lr=2e-3")
    assert "lr: 0.001 -> 0.002" in ran.out
    assert "published" not in ran.out
    ran = pipeline("status", *SETTINGS, "published.exclude.positions=[0]")
    assert "exclude.positions: [] -> [0]" in ran.out


def test_content_decides(theirs_folder):
    def path(*settings: str) -> str:
        ran = pipeline("path", "train", *SETTINGS, *settings)
        assert ran.status == 0, ran.out
        return ran.out

    before = path()
    shutil.copytree("theirs", "elsewhere")
    assert path("published.path=elsewhere") == before
    assert path("published.runtime.offline=true") == before
    assert path("published.exclude.positions=[0]") != before
    edit_cfg(Path("theirs"), dataset_path="another")
    assert path() != before


def test_training_rows_that_reason_score_reads_come_from_the_model(theirs_folder, finished):
    settings = ("train=null", PATH, "evaluate.reason_score.contexts=40", "evaluate.features=null")
    ran = pipeline("run", *settings)
    assert ran.status == 0, ran.out
    assert "sample.train_tokens: 1,536: a published SAE is not trained, and evaluation reads 128 of them" in ran.out
    store = only(Path(), "runs/harvest/*/store")
    assert ActivationStore.open(store).geometry.train_shards == 0
    chunks = contents(store, "holdout/**/c/**/*")
    assert len(chunks) == 2 * 5  # acts, norms and three columns of each shard
    assert chunks == contents(only(finished, "runs/harvest/*/store"), "holdout/**/c/**/*")  # those of a whole harvest
    sae = read_figures(only(Path(), "runs/evaluate/*")).own(HOOK)
    assert sae.lists["reason_score"]["rows_from"] == "model"
    assert sae.value("contexts_of_training") > 0


def test_scaled_rows_take_the_scale_of_the_held_out_rows(theirs_folder):
    edit_cfg(Path("theirs"), normalize_activations="expected_average_only_in")
    for stage in ("sample", "harvest", "train"):
        ran = pipeline(stage, *SETTINGS)
        assert ran.status == 0, ran.out
    store = ActivationStore.open(only(Path(), "runs/harvest/*/store"))
    norm, token = (
        np.concatenate([read("holdout", name, shard) for shard in range(2)])
        for read, name in ((store.read_norms, HOOK), (store.read_provenance, "token_id"))
    )
    saved = load_sae(only(Path(), f"runs/train/*/{HOOK}"))
    kept = norm[(norm <= 10 * np.median(norm)) & (token != 1)]
    assert saved.statistics.scale == pytest.approx(D**0.5 / kept.mean(dtype=float), rel=1e-6)
    assert kept.mean() != pytest.approx(norm.mean(), rel=1e-3)
    theirs = sae_lens.SAE.load_from_disk("theirs")
    x = torch.from_numpy(store.read_chunk("holdout", HOOK, 0)).view(torch.bfloat16).float()
    with torch.no_grad():
        assert torch.allclose(saved.sae.encode(x), theirs.encode(x * saved.sae.scale), rtol=1e-5, atol=1e-5)


def test_two_linear_layers_and_given_activations(theirs_folder):
    torch.save(linear_state(), "sae.pt")
    rows = torch.randn(600, D, generator=torch.Generator().manual_seed(1))
    safetensors.torch.save_file({HOOK: rows, "other": rows.clone()}, "rows.safetensors")
    settings = (
        "ingest.path=rows.safetensors",
        "ingest.shard_rows=128",
        "ingest.chunk_rows=64",
        "ingest.holdout_fraction=0.5",
    )
    linear = ("published.path=sae.pt", "published.format=linear", f"published.hook={NAME}")
    Path("given.yaml").write_text("ingest: {}\npublished: {}\nevaluate: {batch_rows: 128}\n")
    ran = pipeline("run", *settings, *linear, config=Path("given.yaml"))
    assert ran.status == 1
    assert "published: is one SAE; the store" in ran.out
    ran = pipeline("run", *settings, f"ingest.hooks=[{HOOK}]", *linear, config=Path("given.yaml"))
    assert ran.status == 0, ran.out
    f = (
        rows.bfloat16().float() @ linear_state()["encoder.weight"].float().T + linear_state()["encoder.bias"].float()
    ) > 0
    sae = read_figures(Path(ran.out.splitlines()[-1]).parent).own(HOOK)
    assert sae.value("l0") == pytest.approx(f.sum(1).float().mean().item(), rel=0.05)  # half of the rows
    Path("trained.yaml").write_text("ingest: {}\ntrain: {sae: {d_sae: 8}, epochs: 1, batch_size: 64}\n")
    ran = pipeline("status", *settings, f"ingest.hooks=[{HOOK}]", config=Path("trained.yaml"))
    assert "harvest   complete" in ran.out
    assert "train     would run: it has not been run yet" in ran.out  # a published one is no earlier training


def test_rehearsed_and_estimated(theirs_folder, monkeypatch):
    monkeypatch.setattr("pipeline.measure.DISK_BYTES", 1 << 20)
    ran = pipeline("estimate", *SETTINGS)
    assert ran.status == 0, ran.out
    assert "budget   512 held-out tokens in 2 shards; nothing is trained" in ran.out
    assert "in short, on this machine: it fits; harvest " in ran.out
    before = contents(Path("theirs"))
    ran = pipeline("dry-run", *SETTINGS)
    assert ran.status == 0, ran.out
    assert "published SAE" in Path(ran.out.splitlines()[-1]).read_text()
    assert contents(Path("theirs")) == before


def test_the_shipped_settings_are_estimated():
    config = load(ROOT / "configs" / "published-r1.yaml", [])
    shape = find_architecture(config.model, offline=True)
    s = sizes(config, shape)
    assert (s.geometry.train_shards, s.geometry.holdout_shards) == (0, 32)
    assert s.store == s.holdout == pytest.approx(2 * 4096 * 2_097_152, rel=0.01)
    machine = Machine("a GPU", True, 2, 80 * 10**9, 1e12, 1e12, 50_000.0, None, "measured")
    lines = [*plan_published(config, shape, s, machine, 10**12, Path("runs"))]
    assert lines[-1] == "in short, on this machine: it fits; harvest 42s; 17 GB of disk"  # 2,097,152 at 50,000/s
    assert not any("train" in line.replace("nothing is trained", "") for line in lines)
    lines = [*plan_published(config, shape, s, machine._replace(is_gpu=False, memory=10**9), 10**10, Path("runs"))]
    assert any("one H100" in line for line in lines)
    assert "the disk of runs lacks 7." in lines[-1]
    assert "harvest.batch_contexts=16 does not fit into 1 GB" in lines[-1]


def test_the_shipped_settings_are_rehearsed_with_a_stand_in():
    real = load(ROOT / "configs" / "published-r1.yaml", [])
    paper = load(ROOT / "configs" / "r1-llama-8b.yaml", [])
    assert (real.model, real.harvest) == (paper.model, paper.harvest)
    assert real.sample.holdout_tokens == 2_097_152
    assert real.exclude.model_dump() == paper.exclude.model_dump()
    other = rehearsal(real, 4096, Path("x"))
    assert other.published.path == "x/sae"
    assert other.published.exclude == real.published.exclude
    assert (other.published.revision, other.published.file, other.train) == (None, "", None)


def test_a_run_of_the_settings_with_training_is_another(theirs_folder):
    """The store of held-out rows alone must not pass for the whole one."""
    without = find_runs(load(ROOT / "configs" / "tiny.yaml", ["train=null", PATH]), Path("runs"))[0]
    trained = find_runs(load(ROOT / "configs" / "tiny.yaml", []), Path("runs"))[0]
    assert without.fingerprints["sample"] == trained.fingerprints["sample"]
    assert without.fingerprints["harvest"] != trained.fingerprints["harvest"]
