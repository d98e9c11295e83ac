"""Training that starts from a finished SAE: its weights and scale, its content in the fingerprint, what is refused."""

import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TWO_HOOKS, contents, current_copy, only, pipeline
from test_peers import free_port
from typer.testing import CliRunner

from evaluate.figures import read_figures
from harvest.files import UserError, read_json
from pipeline.cli import app
from train import training
from train.checkpoint import load_sae, save_sae
from train.config import StartFrom
from train.exclusion import InputStatistics
from train.kinds import new_sae
from train.start_files import find_start
from train.trainer import Trainer

HOOK = "model.layers.1"
STILL = ("train.lr=0", "train.epochs=1")
PARTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def directory(stage: str, *overrides: str) -> Path:
    ran = pipeline("path", stage, *overrides)
    assert ran.status == 0, ran.out
    return Path(ran.out.strip())


def run(*arguments: str) -> str:
    ran = pipeline(*arguments)
    assert ran.status == 0, ran.out
    return ran.out


def first_step(run: Path) -> dict:
    return json.loads((run / HOOK / "metrics.jsonl").read_text().splitlines()[0])


@pytest.fixture
def given(run_folder) -> Path:
    """The training run that others start from."""
    return only(run_folder, "runs/train/*").relative_to(run_folder)


def of_ours(folder: Path, given: Path, **changed: torch.Tensor) -> Path:
    """A copy of the given SAE with other weights, whole in itself."""
    saved = load_sae(given / HOOK)
    sae = replace(saved.sae, parameters=saved.sae.parameters | changed)
    save_sae(folder, sae, saved.hook, saved.statistics, {"architecture": sae.kind})
    return folder


def test_with_lr_0_it_has_the_figures_of_the_given_one(given):
    start = f"train.start_from={given}"
    run("run", start, *STILL)
    train, evaluation = directory("train", start, *STILL), directory("evaluate", start, *STILL)
    ours, theirs = load_sae(train / HOOK), load_sae(given / HOOK)
    assert all(torch.equal(ours.sae.parameters[name], theirs.sae.parameters[name]) for name in PARTS)
    before = read_figures(directory("evaluate")).own(HOOK)
    after = read_figures(evaluation).own(HOOK)
    for section in ("fidelity", "downstream", "features", "statistics"):
        old, new = (
            {(*key, name): f.value for key, by in sae.table(section).items() for name, f in by.items()}
            for sae in (before, after)
        )
        assert new == pytest.approx(old, rel=1e-6), section
    html = (evaluation / "report.html").read_text()
    assert f"which started from <code>{given}</code> (<code>sha256:" in html
    run("export", start, *STILL, "--to", "out")
    card = Path("out/README.md").read_text()
    assert f"`start_from` | `training run {given.name}, sha256:" in card


def test_its_scale_is_that_of_the_given_one_and_the_rest_of_the_statistics_the_stores(given):
    """Of a window of one shard the statistics are others than of two."""
    options = ("train.window_shards=1", "train.seed=3")
    run("train", *options)
    run("train", *options, f"train.start_from={given}")
    own, started, theirs = (
        load_sae(path / HOOK).statistics
        for path in (directory("train", *options), directory("train", *options, f"train.start_from={given}"), given)
    )
    assert own.scale != theirs.scale
    assert started == own._replace(scale=theirs.scale)


def test_the_first_step_is_from_its_weights_and_a_fresh_adam(given):
    options = (f"train.start_from={given}/{HOOK}", "train.runtime.log_every=1", "train.l1_warmup_fraction=0")
    run("train", *options)
    run("train", *options, "train.lr=0")
    trained, still = directory("train", *options), directory("train", *options, "train.lr=0")
    for name in ("mse", "l1", "l0"):
        assert first_step(trained)[name] == first_step(still)[name]
    saved, statistics = load_sae(trained / HOOK), load_sae(given / HOOK).statistics
    assert not torch.equal(saved.sae.W_dec, load_sae(given / HOOK).sae.W_dec)
    assert saved.statistics.scale == statistics.scale
    lines = [json.loads(line) for line in (trained / HOOK / "metrics.jsonl").read_text().splitlines()]
    assert first_step(trained)["mse"] < 0.8 * first_step(directory("train"))["mse"]
    assert max(line["mse"] for line in lines if line["kind"] == "train") < first_step(directory("train"))["mse"]


def test_it_enters_the_fingerprint_by_content(given):
    at_run = directory("train", f"train.start_from={given}")
    assert at_run != directory("train") == given
    shutil.copytree(given / HOOK, "elsewhere/x")
    assert directory("train", f"train.start_from={given}/{HOOK}") == at_run
    assert directory("train", "train.start_from=elsewhere", "train.runtime.offline=true") == at_run
    assert directory("harvest", "train.start_from=elsewhere") == directory("harvest")
    other = of_ours(Path("other"), given, b_dec=torch.zeros(32))
    assert directory("train", f"train.start_from={other}") not in (at_run, given)
    assert f"start_from: None -> {{'path': '{other}'" in run("status", f"train.start_from={other}")


def test_of_several_hooks_each_starts_from_its_own(two_hooks, tmp_path, monkeypatch):
    current_copy(two_hooks, tmp_path / "copy", monkeypatch)
    given = next(iter(sorted(Path("runs/train").iterdir())))
    options = (TWO_HOOKS, f"train.start_from={given}", "train.sweep.l1_coefficient=[1,2]", *STILL)
    run("train", *options)
    for made in pipeline("path", "train", *options).out.split():
        for hook in ("model.layers.0", "model.layers.1"):
            ours, theirs = load_sae(Path(made) / hook), load_sae(given / hook)
            assert torch.equal(ours.sae.W_enc, theirs.sae.W_enc)
            assert ours.statistics.scale == theirs.statistics.scale
    ran = pipeline("train", TWO_HOOKS, f"train.start_from={given}/model.layers.0")
    assert ran.status == 1
    assert "belongs to 'model.layers.0', not to 'model.layers.1'; name an SAE of this hook" in ran.out


def test_a_sweep_gives_what_each_gives_alone(given):
    start = (f"train.start_from={given}", "train.epochs=1")
    run("train", *start, "train.sae.l1_coefficient=2")
    alone = contents(directory("train", *start, "train.sae.l1_coefficient=2"), "**/*.safetensors")
    run("train", *start, "train.sweep.l1_coefficient=[0.5,2]", "--force", "--yes")
    assert contents(directory("train", *start, "train.sae.l1_coefficient=2"), "**/*.safetensors") == alone


def test_a_resume_reads_its_checkpoint(given, monkeypatch):
    start = f"train.start_from={given}"
    run("train", start)
    made = directory("train", start)
    undisturbed = contents(made, "**/*.safetensors")
    step = Trainer.step

    def stopped(self, rows):
        if self.step_number == 50:
            raise KeyboardInterrupt
        return step(self, rows)

    shutil.rmtree(made)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        assert pipeline("train", start).status == 130
    with monkeypatch.context() as patch:
        patch.setattr(training, "starting_sae", None)
        run("train", start)
    assert contents(made, "**/*.safetensors") == undisturbed


def test_two_ranks_start_from_it(given):
    options = (f"train.start_from={given}", *STILL)

    def of_two(rank: int, port: int) -> None:
        place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in place.items()})
        os._exit(pipeline("train", *options).status)

    port, fork = free_port(), multiprocessing.get_context("fork")
    ranks = [fork.Process(target=of_two, args=(rank, port)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    ours, theirs = load_sae(directory("train", *options) / HOOK), load_sae(given / HOOK)
    assert all(torch.equal(ours.sae.parameters[name], theirs.sae.parameters[name]) for name in PARTS)


def test_a_stream_gives_what_the_whole_store_gives(given):
    options = (f"train.start_from={given}", "train.epochs=1")
    run("train", *options)
    made = directory("train", *options)
    whole = contents(made, "**/*.safetensors")
    shutil.copytree(given, "given")
    shutil.rmtree("runs/train")
    shutil.rmtree("runs/harvest")
    run("stream", "train.start_from=given", "train.epochs=1")
    assert contents(made, "**/*.safetensors") == whole


def test_an_export_is_started_from_as_saelens_reads_it(given):
    """Its weights are for rows as the model gives them: scale 1."""
    run("export", "--to", "out")
    for path in ("out", "out/blocks.1.hook_resid_post", "{path: out, file: blocks.1.hook_resid_post}"):
        options = (f"train.start_from={path}", *STILL)
        run("run", *options)
        saved, theirs = load_sae(directory("train", *options) / HOOK), load_sae(given / HOOK)
        assert saved.statistics.scale == saved.sae.scale == 1
        assert torch.allclose(saved.sae.W_enc, theirs.sae.W_enc * theirs.sae.scale)
        old, new = (read_figures(directory("evaluate", *of)).own(HOOK) for of in ((), options))
        assert new.value("explained_variance") == pytest.approx(old.value("explained_variance"), rel=1e-4)
        assert new.value("l0") == pytest.approx(old.value("l0"), rel=1e-3)


def test_an_sae_of_saelens_for_scaled_rows_takes_the_scale_of_these_rows(given):
    """Its steps can be followed too: with lr 0 no feature turns."""
    run("export", "--to", "out")
    cfg = Path("out/blocks.1.hook_resid_post/cfg.json")
    cfg.write_text(json.dumps(json.loads(cfg.read_text()) | {"normalize_activations": "expected_average_only_in"}))
    options = ("train.start_from=out", *STILL)
    run("train", *options)
    saved, theirs = load_sae(directory("train", *options) / HOOK), load_sae(given / HOOK)
    assert saved.statistics.scale == theirs.statistics.scale  # of the same store
    assert torch.allclose(saved.sae.W_enc, theirs.sae.W_enc * theirs.sae.scale)
    name = str(directory("train", *options))
    ran = CliRunner().invoke(app, ["diff-stages", name, name])
    assert ran.exit_code == 0, ran.output
    found = read_json(Path("runs/diff-stages/diff-stages.json"))
    assert [stage["name"] for stage in found["paths"][0]] == ["out", Path(name).name]
    assert found["hooks"][HOOK]["quantiles"]["0.99"] == [0, 0]


def test_given_activations(given):
    """Hooks of an ingest have the names of their arrays."""
    np.save("acts.npy", np.random.default_rng(0).standard_normal((4096, 32), np.float32))
    options = ("ingest.path=acts.npy", f"ingest.hooks=[{HOOK}]", "ingest.shard_rows=512", "ingest.chunk_rows=128")
    options += ("train.sae.expansion_factor=4", "train.batch_size=64", "train.pool_rows=512", *STILL, *CPU)
    for stage in ("ingest", "train"):
        ran = pipeline(stage, *options, f"train.start_from={given}", config=ROOT / "configs/ingest.yaml")
        assert ran.status == 0, ran.out
    ran = pipeline("path", "train", *options, f"train.start_from={given}", config=ROOT / "configs/ingest.yaml")
    assert torch.equal(load_sae(Path(ran.out.strip()) / HOOK).sae.W_dec, load_sae(given / HOOK).sae.W_dec)


def test_a_topk_sae_takes_the_k_of_the_settings(given):
    topk = ("train.sae.kind=topk", "train.sae.l1_coefficient=null")
    run("train", *topk, "train.sae.k=3")
    start = f"train.start_from={directory('train', *topk, 'train.sae.k=3')}"
    run("train", *topk, "train.sae.k=5", start, *STILL)
    saved = load_sae(directory("train", *topk, "train.sae.k=5", start, *STILL) / HOOK)
    assert saved.sae.settings() == {"k": 5}
    given_W_enc = load_sae(Path(start.partition("=")[2]) / HOOK).sae.W_enc
    assert torch.allclose(saved.sae.W_enc, given_W_enc, rtol=1e-6, atol=0)  # its decoder rows are made 1 again


def made(folder: str, d_in: int = 32, width: int = 128, hook: str = HOOK) -> Path:
    """An untrained SAE of ours in a folder."""
    from train.config import SaeConfig, TrainConfig

    sae = new_sae(TrainConfig(sae=SaeConfig(d_sae=width, l1_coefficient=1), epochs=1), d_in, 1.0, "cpu")
    save_sae(Path(folder), sae, hook, InputStatistics(1.0, 1.0, None), {"architecture": "standard"})
    return Path(folder)


@pytest.mark.parametrize(
    ("prepare", "overrides", "message"),
    [
        (lambda given: made("x", width=64), (), "an SAE of d_sae 64, and the settings have d_sae 128; set train.sae.d"),
        (lambda given: made("x", d_in=16), (), "an SAE of d_in 16, and the settings have d_in 32; choose a hook"),
        (
            lambda given: given,
            ("train.sae.kind=topk", "train.sae.k=2", "train.sae.l1_coefficient=null"),
            f"{HOOK}: an SAE of kind standard, and the settings have kind topk; set train.sae.kind=standard",
        ),
        (lambda given: made("x", hook="model.layers.0"), (), "'x': belongs to 'model.layers.0', not to 'model.layers"),
        (lambda given: of_ours(Path("x"), given, b_dec=torch.full((32,), torch.nan)), (), "x: b_dec holds a NaN"),
        (lambda given: Path("./nowhere"), (), "train.start_from: 'nowhere': there is no folder nowhere"),
        (lambda given: Path("assets/"), (), "train.start_from: 'assets': holds no SAE; name a train directory"),
        (lambda given: Path("some/body"), (), "'some/body' is no local path, and the hub does not answer"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_byte_is_written(given, prepare, overrides, message):
    start = prepare(given)
    before = contents(Path("runs"), "*/**/*")
    for stage in ("train", "harvest"):
        seed = ("sample.seed=1",) if stage == "harvest" else ()  # of a whole run, the first stage says it
        ran = pipeline("run" if seed else stage, f"train.start_from={start}", *overrides, *seed)
        assert ran.status == 1, ran.out
        assert message in ran.out
    after = contents(Path("runs"), "*/**/*")
    assert {name for name in after if name not in before and "/.lock" not in name} == set()
    assert {name: after[name] for name in before} == before


def test_what_is_damaged_or_unfinished_is_refused(given):
    shutil.copytree(given / HOOK, "x")
    weights = Path("x/sae_weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert "its bytes have changed since they were written" in pipeline("train", "train.start_from=x").out
    weights.unlink()
    assert "there is no file x/sae_weights.safetensors; restore it" in pipeline("train", "train.start_from=x").out
    commit = "0123456789" * 4
    ran = pipeline("train", f"train.start_from={{path: a/b, revision: {commit}}}")
    assert "train.start_from: 'a/b': the hub cannot be reached and its cache lacks cfg.json" in ran.out
    assert (
        "train.start_from.revision: 'main': a local path has none"
        in pipeline("train", f"train.start_from={{path: {given}, revision: main}}").out
    )
    (given / "manifest.json").unlink()
    for path in (given, given / HOOK, given / HOOK / "best"):
        with pytest.raises(
            UserError, match=f"'{path}': its training run .*{given.name} is not finished; run `make tra"
        ):
            find_start(StartFrom(path=str(path)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.lr=0",), "lr: 0: trains nothing"),
        (("train.start_from={path: a/b, file: ../c}",), "must stay within path"),
        (("train.start_from=x", "train.sae={d_sae: 64}", "train.sweep.d_sae=[8,16]"), "sweep.d_sae: not together with"),
        (("train.epochs=null", "train.training_tokens=9"), "training_tokens: 9: less than one batch of batch_size = "),
        (("train.start_from=x", "train.sweep.kind=[standard,topk]"), "sweep.kind: not together with start_from"),
    ],
)
def test_settings_that_cannot_be(fresh_folder, overrides, message):
    ran = pipeline("status", *overrides)
    assert ran.status == 2, ran.out
    assert message in ran.out


def test_it_is_rehearsed_without_the_file(fresh_folder):
    out = run("dry-run", "train.start_from=not/made/yet", "train.sae={d_sae: 64, l1_coefficient: 1}")
    assert "dry-run  passed" in out
    begun = read_json(only(Path("runs/dry-run/tiny"), "runs/train/*/begun.json"))
    assert begun["settings"]["start_from"]["path"] == "runs/dry-run/tiny/start"


def test_prune_keeps_what_another_run_started_from(given):
    start = f"train.start_from={given}"

    def kept(*overrides: str) -> bool:
        listed = run("prune", *overrides).splitlines()
        return next(line for line in listed if given.name in line.split()[1]).startswith("keep")

    other = ("train.seed=5", "train.epochs=1")
    assert not kept(*other)
    assert kept(*other, start)  # needed, though nothing has started from it yet
    run("train", start, *other)
    second = directory("train", start, *other)
    run("train", f"train.start_from={second}", *other)
    assert kept(f"train.start_from={second}", *other)
    assert f"used by train {second.name}" in pipeline("prune", "--yes", str(given), "sample.seed=9").out
