"""Complete means whole: what is missing or damaged of a stage is made anew, or named by status, run and verify."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import PYTHONPATH, TINY, contents, only, pipeline

from harvest import stage_directory
from harvest.files import file_crc32c, read_json
from train.standard import Standard

HOOK = "model.layers.1"
NOT_LISTED = ("manifest.json", "begun.json", "progress.json")  # and what begins with a dot


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of(stage: str) -> Path:
    return Path(pipeline("path", stage).out.strip())


def state(stage: str) -> str:
    return next(line for line in pipeline("status").out.splitlines() if line.startswith(stage)).removeprefix(stage)


def test_manifests_list_every_result(finished):
    """Each file is listed with its size and checksum, or vouched for by one that is."""
    for stage in ("sample", "harvest", "train", "evaluate"):
        directory = only(finished, f"runs/{stage}/*")
        listed = read_json(directory / "manifest.json")["files"]
        for name, entry in listed.items():
            path = directory / name
            assert entry == {"bytes": path.stat().st_size, "crc32c": file_crc32c(path)}
        rest = {name for name in contents(directory) if name not in listed and Path(name).name not in NOT_LISTED}
        rest = {name for name in rest if not Path(name).name.startswith(".")}
        vouched = {"sample": "/c/", "harvest": "/c/", "train": "/checkpoints/"}.get(stage, "nothing")
        assert {name for name in rest if vouched not in name} == set()
        assert len(listed) == {"sample": 11, "harvest": 27, "train": 6}.get(stage, len(listed))


EVALUATED: list[tuple[str, Callable[[Path], None]]] = [
    ("report.html", Path.unlink),
    ("report.html", flip),
    ("report.html", a_folder),
    ("metrics.json", Path.unlink),
    (f"density-{HOOK}.npy", flip),
    (f"reason_score-{HOOK}.npz", cut),
    (f"features/{HOOK}/index.html", flip),
    ("manifest.json", flip),
]


@pytest.mark.parametrize(("name", "damage"), EVALUATED[:2])
def test_an_evaluation_that_is_not_whole_is_made_anew(run_folder, name, damage):
    evaluate = of("evaluate")
    before = contents(evaluate)
    damage(evaluate / name)
    assert state("evaluate").startswith(f"  would start over: {evaluate / name}: missing, or changed")
    ran = pipeline("run")
    assert ran.status == 0
    assert f"evaluate  is made anew: {evaluate / name}: missing, or changed since the stage ended" in ran.out
    assert Path(ran.out.splitlines()[-1]) == evaluate / "report.html"
    after = contents(evaluate)
    assert {n for n in before if before[n] != after[n]} == {"begun.json", "manifest.json"}
    assert "is made anew" not in pipeline("run").out


def test_an_evaluation_whose_manifest_is_damaged_is_made_anew(run_folder):
    manifest = of("evaluate") / "manifest.json"
    flip(manifest)
    ran = pipeline("evaluate")
    assert ran.status == 0
    assert f"evaluate  is made anew: {manifest}: does not match its own checksum" in ran.out
    assert state("evaluate").startswith("  complete")


@pytest.mark.parametrize(("name", "damage"), EVALUATED)
def test_a_damaged_evaluation_is_named(run_folder, name, damage):
    evaluate = of("evaluate")
    assert state("evaluate").startswith("  complete")
    damage(evaluate / name)
    assert state("evaluate").startswith(f"  would start over: {evaluate / name}: ")
    ran = pipeline("verify")
    assert ran.status == 1 and f"{evaluate / name}: " in ran.out and "`make eval`" in ran.out


OTHERS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("sample", "contexts/zarr.json", Path.unlink),
    ("train", "begun.json", cut),
    ("sample", "checksums.json", flip),
    ("sample", "contexts/holdout/tokens/c/1/0", Path.unlink),
    ("sample", "contexts/train/source/c/5", cut),
    ("harvest", f"store/train/{HOOK}/acts/c/3/0", Path.unlink),
    ("harvest", f"store/holdout/{HOOK}/norm/c/1", cut),
    ("harvest", "store/train/row/position/c/0", Path.unlink),
    ("harvest", "store/train/shards/00002.json", Path.unlink),
    ("harvest", "store/zarr.json", flip),
    ("train", f"{HOOK}/sae_weights.safetensors", Path.unlink),
    ("train", f"{HOOK}/best/sae.json", flip),
    ("train", f"{HOOK}/metrics.jsonl", cut),
    ("train", "manifest.json", flip),
]


@pytest.mark.parametrize(("stage", "name", "damage"), OTHERS)
def test_a_result_of_hours_is_named_with_the_way_out(run_folder, stage, name, damage):
    path = of(stage) / name
    damage(path)
    assert state(stage).split()[0] == "damaged" and f"{path}" in state(stage)
    ran = pipeline("run")
    assert ran.status == 1 and f"error: {path}: " in ran.out
    assert "report.html" not in ran.out
    way_out = "`make verify`" if stage == "harvest" else f"{stage} --force" if name != "manifest.json" else "run train"
    assert way_out in ran.out
    ran = pipeline("verify")
    assert ran.status == 1 and name.removeprefix("store/").removesuffix("/0") in ran.out


def test_an_evaluation_of_other_weights_is_made_anew(run_folder, monkeypatch):
    """Code is in no fingerprint: weights that it trains anew may differ, under the same name."""
    first = contents(of("evaluate"), "metrics.json")
    assert pipeline("train", "--force", "--yes").status == 0
    assert [state(stage).split()[0] for stage in ("train", "evaluate")] == ["complete", "complete"]  # the same weights

    monkeypatch.setattr(Standard, "decoder_norm", 0.3)  # of the rows at the start
    assert pipeline("train", "--force", "--yes").status == 0
    assert "would start over: " in state("evaluate") and "has other weights now" in state("evaluate")
    ran = pipeline("run")
    assert ran.status == 0 and "evaluate  is made anew: " in ran.out
    assert state("evaluate").split()[0] == "complete"
    assert contents(of("evaluate"), "metrics.json") != first


def test_a_byte_of_the_contexts_is_found_by_verify(run_folder):
    """Of chunks that may be gigabytes, status looks at the size alone."""
    path = of("sample") / "contexts/train/tokens/c/2/0"
    flip(path)
    assert state("sample").split()[0] == "complete"
    ran = pipeline("verify")
    assert ran.status == 1 and f"{path}: missing, or changed" in ran.out and "sample --force" in ran.out
    assert f"{of('train')}: every file is as it was written" in ran.out


def test_status_does_not_read_large_files(run_folder, monkeypatch):
    monkeypatch.setattr(stage_directory, "SMALL_BYTES", 1000)
    weights = of("train") / HOOK / "sae_weights.safetensors"
    flip(weights)
    assert state("train").split()[0] == "complete"
    assert f"{weights}: missing, or changed" in pipeline("verify").out
    cut(weights)
    assert state("train").split()[0] == "damaged"


def test_a_store_of_many_shards_is_looked_at_by_its_folders(run_folder, monkeypatch):
    monkeypatch.setattr("harvest.row_files.MANY", 3)
    assert state("harvest").split()[0] == "complete"
    (of("harvest") / "store/train/row/context/c/4").unlink()
    assert "store/train/row/context/c/4: missing" in state("harvest")


def test_the_way_out_of_a_sample_and_of_training(run_folder):
    sample, train = of("sample"), of("train")
    before = contents(sample / "contexts"), contents(train, "*/*.safetensors")
    (sample / "contexts/train/tokens/zarr.json").unlink()
    (train / HOOK / "sae_weights.safetensors").unlink()
    for stage in ("sample", "train"):
        assert pipeline(stage, "--force", "--yes").status == 0
    assert (contents(sample / "contexts"), contents(train, "*/*.safetensors")) == before
    assert pipeline("verify").status == 0


def test_manifests_of_an_earlier_version_stay_valid(run_folder):
    """They list a few files, without sizes, or none; and nothing of the SAE or the figures names its run."""
    for stage in ("sample", "harvest", "train", "evaluate"):
        path = of(stage) / "manifest.json"
        value = read_json(path)
        few = {n: e["crc32c"] for n, e in value["files"].items() if Path(n).name in ("zarr.json", "metrics.jsonl")}
        value |= {"files": few}
        path.write_text(json.dumps(value if stage != "evaluate" else {k: v for k, v in value.items() if k != "files"}))
    for name in (f"{HOOK}/sae.json", f"{HOOK}/best/sae.json"):
        value = read_json(of("train") / name)
        del value["fingerprint"]
        (of("train") / name).write_text(json.dumps(value))
    lines = pipeline("status").out.splitlines()
    assert [line.split()[1] for line in lines] == ["complete"] * 4
    for ran in (pipeline("run"), pipeline("verify"), pipeline("export"), pipeline("push", "me/sae")):
        assert ran.status == 0, ran.out
    flip(of("train") / HOOK / "metrics.jsonl")
    assert state("train").split()[0] == "damaged"


def test_verify_before_there_is_a_store(run_folder):
    for stage in ("harvest", "train", "evaluate"):
        shutil.rmtree(f"runs/{stage}")
    ran = pipeline("verify")
    assert ran.status == 0 and f"{of('sample')}: every file is as it was written" in ran.out


def test_a_hook_with_the_name_of_a_folder_of_ours(tmp_path, monkeypatch):
    """Arrays of the user's own may be called c or checkpoints."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("given").mkdir()
    for name in ("c", "checkpoints"):
        file = Path(f"{name}.yaml")
        np.save(f"given/{name}.npy", rng.normal(size=(400, 8)).astype(np.float32))
        file.write_text(
            f"ingest: {{path: given/{name}.npy, hooks: [{name}], shard_rows: 64, chunk_rows: 16}}\n"
            "train: {sae: {d_sae: 8}, epochs: 1, batch_size: 16, window_shards: 1, pool_rows: 64}\n"
        )
        for stage in ("ingest", "train"):
            ran = pipeline(stage, config=file)
            assert ran.status == 0, ran.out
        train = Path(pipeline("path", "train", config=file).out.strip())
        assert f"{name}/sae.json" in read_json(train / "manifest.json")["files"]
        harvest = Path(pipeline("path", "harvest", config=file).out.strip())
        listed = read_json(harvest / "manifest.json")["files"]
        assert f"store/train/{name}/acts/zarr.json" in listed
        assert not [inner for inner in listed if inner.endswith("/0")]


def test_what_is_complete_is_known_without_torch(run_folder):
    code = "import sys\nfrom pipeline.cli import app\ntry:\n    app()\nexcept SystemExit:\n"
    code += "    print({'torch', 'zarr', 'transformers'} & set(sys.modules))\n"
    command = [sys.executable, "-c", code, "status", "--config", str(TINY)]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    ran = subprocess.run(command, cwd=run_folder, env=environment, capture_output=True, text=True)
    assert ran.stdout.count(" complete ") == 4 and ran.stdout.splitlines()[-1] == "set()"
