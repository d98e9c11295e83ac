"""Whole files of another run in the place of a run's own: each is sound in itself, and none is taken."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import contents, current_copy, only, pipeline, unlisted
from test_compare import run as command

from harvest.files import UserError, read_json
from train.checkpoint import load_sae

HOOK = "model.layers.1"
SEED = "train.seed=7"
QUICK = [f"evaluate.{name}=null" for name in ("downstream", "reason_score", "features", "diff", "steering")]
SAE = ("sae.json", "sae_weights.safetensors")


@pytest.fixture(scope="module")
def both(finished, tmp_path_factory) -> Path:
    """The finished run, and beside it one of another seed; read only."""
    folder = tmp_path_factory.mktemp("both") / "copy"
    shutil.copytree(finished, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in ("train", "evaluate"):
            ran = pipeline(stage, SEED, *QUICK)
            assert ran.status == 0, ran.out
    return folder


@pytest.fixture
def runs(both, tmp_path, monkeypatch) -> Path:
    """A copy of them, as the current folder."""
    return current_copy(both, tmp_path / "copy", monkeypatch) / "runs"


def directory(stage: str, *settings: str) -> Path:
    return Path(pipeline("path", stage, *settings).out.strip())


def of_other_sae(*inner: str) -> None:
    """Put both files of the other seed's SAE into the run."""
    for name in SAE:
        shutil.copy(Path(directory("train", SEED), HOOK, *inner, name), Path(directory("train"), HOOK, *inner, name))


STEER = ("steer", "--feature", "1", "--prompt", "wait", "--max-activation", "1", "--max-new-tokens", "2")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("arguments", [("evaluate", "evaluate.batch_rows=64"), ("export", "--to", "out"), STEER])
def test_an_sae_of_another_seed(runs, arguments, listed):
    """The manifest knows the run's own files; without its list, they know their run themselves."""
    of_other_sae()
    if not listed:
        unlisted(directory("train"))
    ran = pipeline(*arguments)
    assert ran.status == 1
    other = directory("train", SEED).name
    says = "missing, or changed since the stage ended" if listed else f"belongs to the training run {other}"
    assert f"{directory('train')}/{HOOK}/sae.json: {says}" in ran.out
    assert not Path("out").exists()


def test_the_best_sae_of_another_seed(runs):
    of_other_sae("best")
    unlisted(directory("train"))
    ran = pipeline("evaluate", "evaluate.sae=best", *QUICK)
    assert ran.status == 1 and f"belongs to the training run {directory('train', SEED).name}" in ran.out


def test_an_sae_goes_elsewhere_with_its_folder(runs, tmp_path):
    """To be read from Python, wherever it was copied to; alone, within another run, or with its whole run."""
    folder, other = directory("train"), directory("train", SEED)
    expected = load_sae(folder / HOOK)
    for place in (tmp_path / "mine", directory("evaluate") / "mine"):
        shutil.copytree(folder / HOOK, place)
        assert (load_sae(place).sae.W_enc == expected.sae.W_enc).all()
    shutil.copytree(folder, tmp_path / "whole")
    assert (load_sae(tmp_path / "whole" / HOOK / "best").sae.W_enc == load_sae(folder / HOOK / "best").sae.W_enc).all()
    shutil.copytree(folder / HOOK, other / "mine")
    with pytest.raises(UserError, match=f"belongs to the training run {folder.name}"):
        load_sae(other / "mine")
    runs.rename(tmp_path / "moved")
    assert pipeline("status", "--runs", str(tmp_path / "moved")).out.count(" complete ") == 4


def test_a_checkpoint_of_another_seed(runs):
    train = directory("train")
    (train / "manifest.json").unlink()
    (train / HOOK / "sae.json").unlink()
    newest = max((train / HOOK / "checkpoints").iterdir())
    shutil.rmtree(newest)
    shutil.copytree(directory("train", SEED) / HOOK / "checkpoints" / newest.name, newest)
    ran = pipeline("train")
    assert ran.status == 1
    assert f"{newest.name}/checkpoint.json: belongs to the training run {directory('train', SEED).name}" in ran.out


@pytest.mark.parametrize("listed", [True, False])
def test_figures_of_another_run(runs, listed):
    mine, other = directory("evaluate"), directory("evaluate", SEED, *QUICK)
    assert pipeline("export").status == 0
    shutil.copy(other / "metrics.json", mine / "metrics.json")
    if not listed:
        unlisted(mine)
    for ran in (command("compare", str(mine)), pipeline("export", "--to", "out"), pipeline("push", "me/sae")):
        assert ran.status == 1
        assert f"{mine.name}/metrics.json: " in ran.out
        if not listed:
            assert f"holds the figures of another run ({other.name})" in ran.out
    assert not Path("out").exists() and not Path("runs/compare").exists()
    if listed:
        assert "evaluate  would start over" in pipeline("status").out
        assert pipeline("run").status == 0
        assert read_json(mine / "metrics.json")["fingerprint"] == mine.name


def test_figures_of_the_same_sae_by_other_settings(runs):
    assert pipeline("evaluate", *QUICK).status == 0
    mine, other = directory("evaluate"), directory("evaluate", *QUICK)
    shutil.copy(other / "metrics.json", mine / "metrics.json")
    unlisted(mine)
    assert f"holds the figures of another run ({other.name})" in command("compare", str(mine)).out


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_runs_that_traded_places(runs, stage):
    settings = QUICK if stage == "evaluate" else []
    mine, other = directory(stage), directory(stage, SEED, *settings)
    mine.rename("aside")
    other.rename(mine)
    Path("aside").rename(other)
    before = contents(runs)
    ran = pipeline("run")
    assert ran.status == 1
    assert f"{mine}/manifest.json: is that of the run {other.name}; move that run back" in ran.out
    assert f"is that of the run {other.name}" in pipeline("status").out
    assert {name: data for name, data in contents(runs).items() if ".inputs" not in name and ".lock" not in name} == {
        name: data for name, data in before.items() if ".inputs" not in name and ".lock" not in name
    }


def test_a_run_that_was_begun_by_another(runs):
    mine, other = directory("train"), directory("train", SEED)
    (mine / "manifest.json").unlink()
    shutil.copy(other / "begun.json", mine / "begun.json")
    ran = pipeline("train")
    assert ran.status == 1 and f"begun.json: is that of the run {other.name}" in ran.out


def test_a_shard_of_another_harvest(runs, tmp_path):
    """Rows, provenance and record together are whole; `verify` marks the shard, and the harvest makes just it anew."""
    store = directory("harvest") / "store"
    before = contents(store)
    assert pipeline("sample", "sample.seed=3").status == 0 and pipeline("harvest", "sample.seed=3").status == 0
    other = directory("harvest", "sample.seed=3") / "store"
    record = json.loads((other / "train/shards/00003.json").read_text())
    for name in [*record["files"], "train/shards/00003.json"]:
        shutil.copy(other / name, store / name)
    ran = pipeline("train", "train.lr=2e-3")
    assert ran.status == 1 and "store/train/shards/00003.json: missing, or changed since the stage ended" in ran.out
    assert "harvest   damaged" in pipeline("status").out
    ran = pipeline("verify")
    assert ran.status == 1 and "1 bad shards are marked" in ran.out
    assert pipeline("harvest").status == 0
    assert contents(store) == before
    assert pipeline("verify").status == 0


def test_an_export_of_another_run(runs):
    for settings in ([], [SEED]):
        assert pipeline("export", *settings).status == 0
    mine, other = (Path("runs/export") / directory("train", *settings).name for settings in ([], [SEED]))
    inner = "blocks.1.hook_resid_post"
    shutil.rmtree(mine / inner)
    shutil.copytree(other / inner, mine / inner)
    ran = pipeline("push", "me/sae")
    assert ran.status == 1
    assert f"{mine / inner}/cfg.json: has changed since it was exported (crc32c); export anew with --force" in ran.out
    assert pipeline("export", "--force").status == 0
    assert pipeline("push", "me/sae").status == 0


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json"])
def test_a_damaged_export_is_not_pushed(runs, name):
    assert pipeline("export").status == 0
    path = only(runs, f"export/*/*/{name}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ran = pipeline("push", "me/sae")
    assert ran.status == 1 and f"{name}: has changed since it was exported" in ran.out


def test_a_model_card_may_be_edited(runs):
    assert pipeline("export").status == 0
    card = only(runs, "export/*/README.md")
    card.write_text(card.read_text() + "\nMine.\n")
    assert pipeline("push", "me/sae").status == 0
    card.write_text("")
    assert "README.md: has changed" in pipeline("push", "me/sae").out


def test_an_export_without_checksums(runs):
    assert pipeline("export").status == 0
    marker = only(runs, "export/*/export.json")
    value = read_json(marker)
    marker.write_text(json.dumps(value | {"files": sorted(value["files"])}))
    ran = pipeline("push", "me/sae")
    assert ran.status == 1 and "of an earlier version, without checksums; export anew with --force" in ran.out
    assert pipeline("export", "--force").status == 0


def test_a_damaged_page_is_not_pushed(runs):
    assert pipeline("export").status == 0
    page = next(directory("evaluate").glob(f"features/{HOOK}/[0-9]*.html"))
    page.write_text(page.read_text().replace("<p", "<q", 1))
    ran = pipeline("push", "me/sae", "--with-text")
    assert ran.status == 1 and f"{page}: missing, or changed since the stage ended" in ran.out
