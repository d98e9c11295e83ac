"""Links in the places that are emptied, and names that lead out of a folder: nothing outside is touched."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import contents, only, pipeline

from harvest.files import read_json, write_sealed


@pytest.fixture
def outside(tmp_path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    return folder


def test_force_removes_links_and_not_what_they_lead_to(run_folder, outside):
    train = only(run_folder, "runs/train/*")
    weights = only(train, "*/sae_weights.safetensors").read_bytes()
    (train / "linked").symlink_to(outside, target_is_directory=True)
    (train / "file").symlink_to(outside / "precious")
    only(train, "model.layers.1/best/sae.json").unlink()
    only(train, "model.layers.1/best").rename(outside / "best")
    (train / "model.layers.1" / "best").symlink_to(outside / "best", target_is_directory=True)
    before = contents(outside)
    ran = pipeline("train", "--force", "--yes")
    assert ran.status == 0, ran.out
    assert contents(outside) == before
    assert not (train / "linked").exists() and not (train / "model.layers.1" / "best").is_symlink()
    assert only(train, "model.layers.1/sae_weights.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["../../../../outside/precious", "/etc/hostname"])
def test_a_manifest_that_names_files_outside_reads_none(run_folder, outside, name):
    manifest = only(run_folder, "runs/harvest/*/manifest.json")
    write_sealed(manifest, read_json(manifest) | {"files": {name: 1}})
    assert pipeline("train", "train.lr=2e-3").status == 0


def test_metadata_that_was_changed_is_named(run_folder):
    """Its figures decide which rows are read, and the checksums of the rows say nothing of them."""
    path = only(run_folder, "runs/harvest/*/store/zarr.json")
    meta = json.loads(path.read_text())
    meta["attributes"]["seed"] += 1
    path.write_text(json.dumps(meta))
    ran = pipeline("train", "train.lr=2e-3")
    assert ran.status == 1 and "store/zarr.json: missing, or changed since the stage ended" in ran.out


def test_a_log_that_was_changed_is_named_at_a_resume(run_folder):
    train = only(run_folder, "runs/train/*")
    (train / "manifest.json").unlink()
    only(train, "*/sae.json").unlink()
    path = only(train, "*/metrics.jsonl")
    path.write_text(path.read_text().replace('"step": 5,', '"step": 6,'))
    ran = pipeline("train")
    assert ran.status == 1 and "metrics.jsonl: has changed since the checkpoint was written" in ran.out
    path.write_text("")
    ran = pipeline("train")
    assert ran.status == 1 and "metrics.jsonl: shorter than when the checkpoint was written; restore it, or" in ran.out


def test_contexts_that_traded_places_are_named(run_folder):
    """Each is whole in itself, so its own crc32c says nothing."""
    shutil.rmtree(run_folder / "runs/harvest")
    chunks = only(run_folder, "runs/sample/*/contexts/train/tokens/c")
    first, second = ((chunks / name / "0").read_bytes() for name in ("1", "2"))
    (chunks / "1" / "0").write_bytes(second)
    (chunks / "2" / "0").write_bytes(first)
    ran = pipeline("harvest")
    assert ran.status == 1 and "train/tokens/c/1/0: not what was written there (crc32c)" in ran.out
