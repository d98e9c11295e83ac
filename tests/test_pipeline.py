import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PYTHONPATH, TINY, contents, only, pipeline
from safetensors.torch import load_file, save_file

from harvest.config import ModelConfig
from harvest.files import locked, read_json, write_json, write_sealed
from harvest.hub import where_it_is
from train.config import exactly


def test_everything_twice_gives_the_same_bytes(finished, fresh_folder, monkeypatch):
    """Offline too, which reaches all that asks for a model or a tokenizer."""
    asked = []

    def asking(model: ModelConfig, commit: str | None, offline: bool) -> dict:
        asked.append(offline)
        return where_it_is(model, commit, offline)

    for module in ("language_model", "tokenizer"):
        monkeypatch.setattr(f"harvest.{module}.where_it_is", asking)
    stages = ("sample", "harvest", "train", "evaluate")
    assert pipeline("run", *(f"{stage}.runtime.offline=true" for stage in stages)).status == 0
    assert len(asked) > len(stages) and all(asked)
    for pattern in ("sample/*/contexts", "harvest/*/store"):
        assert contents(only(fresh_folder, f"runs/{pattern}")) == contents(only(finished, f"runs/{pattern}"))
    names = ("runs/train/*/*/sae_weights.safetensors", "runs/train/*/*/best/sae.json", "runs/evaluate/*/metrics.json")
    for pattern in names:
        assert only(fresh_folder, pattern).read_bytes() == only(finished, pattern).read_bytes()


def test_bfloat16_goes_through_every_stage(fresh_folder):
    """What a GPU, or a CPU with bfloat16 instructions, takes by itself."""
    stages = ("harvest", "train", "evaluate.downstream")
    ran = pipeline("run", *(f"{stage}.compute_dtype=bfloat16" for stage in stages))
    assert ran.status == 0, ran.out
    manifest = json.loads(only(fresh_folder, "runs/harvest/*/manifest.json").read_text())
    assert manifest["numerics"]["compute_dtype"] == "bfloat16"
    counted = re.findall(r"^(\w+)[^:\n]*: ([\d,]+)/([\d,]+) \w+  ", ran.out, re.MULTILINE)
    assert {"sample", "harvest", "train", "held", "downstream", "steering", "ablation"} <= {
        name for name, *_ in counted
    }
    assert all(done == total for _, done, total in counted), counted


def test_nothing_runs_when_all_is_complete(run_folder):
    before = contents(run_folder / "runs", "*/**/*")
    ran = pipeline("run")
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        [stage, "complete"] for stage in ("sample", "harvest", "train", "evaluate")
    ]
    report = Path(lines[-1])
    assert report.name == "report.html"
    assert report.exists()
    assert contents(run_folder / "runs", "*/**/*") == before


def test_a_changed_setting_reruns_just_its_stage(run_folder):
    change = "train.sae.l1_coefficient=0.5"
    status = pipeline("status", change).out.splitlines()
    assert [line.split()[1] for line in status] == ["complete", "complete", "would", "would"]
    assert "would run: sae.l1_coefficient: 1 -> 0.5" in status[2]
    ran = pipeline("train", change)
    assert ran.status == 0
    assert len(list(run_folder.glob("runs/train/*/manifest.json"))) == 2
    assert len(list(run_folder.glob("runs/harvest/*"))) == 1
    assert pipeline("status", change).out.splitlines()[2].split()[1] == "complete"


def test_status_of_an_upstream_change(run_folder):
    assert run_folder.exists()
    lines = pipeline("status", "sample.seed=1").out.splitlines()
    assert "sample    would run: seed: 0 -> 1" in lines[0]
    assert "sample would run before it" in lines[2]


def test_status_compares_with_the_nearest_run_on_the_same_harvest(run_folder):
    assert pipeline("train", "train.seed=5", "train.lr=2e-3").status == 0
    assert "would run: sae.l1_coefficient: 1 -> 2\n" in pipeline("status", "train.sae.l1_coefficient=2").out
    lines = pipeline("status", "sample.seed=1", "train.lr=5e-4").out.splitlines()
    assert "train     would run: sample would run before it" in lines  # those that are there are of another harvest


def test_status_says_how_far_an_interrupted_stage_is(run_folder):
    train = only(run_folder, "runs/train/*").relative_to(run_folder)
    (train / "manifest.json").unlink()
    write_json(train / "progress.json", {"done": 1234, "total": 5678, "unit": "rows", "seconds_left": 90})
    assert f"train     would resume  1,234/5,678 rows, 1m30s left  {train}" in pipeline("status").out
    (train / "progress.json").write_text("{")  # a crash
    assert f"train     would resume  {train}" in pipeline("status").out


def test_status_of_a_stage_that_works_otherwise_now(run_folder):
    train = only(run_folder, "runs/train/*")
    old = train.rename(train.with_name("0" * 12))
    begun = read_json(old / "begun.json")
    write_sealed(old / "begun.json", begun | {"version": 0})
    assert f"train     would run: train version: 0 -> {begun['version']}\n" in pipeline("status").out
    shutil.copytree(old, train)
    (train / "begun.json").write_text("{")  # damaged, so it says nothing
    ran = pipeline("status", "train.seed=9")
    assert f"train     would run: train version: 0 -> {begun['version']}; seed: 0 -> 9\n" in ran.out


def test_status_of_a_sweep_says_which_is_which(run_folder):
    lines = pipeline("status", "train.sweep.l1_coefficient=[1,2]").out.splitlines()
    assert len(lines) == 2 + 2 + 2
    assert lines[2].startswith("train     complete") and lines[2].endswith("(l1_coefficient=1)")
    assert lines[3] == "train     would run: sae.l1_coefficient: 1 -> 2  (l1_coefficient=2)"
    assert lines[5] == "evaluate  would run: train would run before it  (l1_coefficient=2)"


def test_numbers_of_a_sweep_are_told_apart():
    assert [exactly(value) for value in (5.0, 1e-3, 1.00000001e-3, 1_048_576)] == [
        "5",
        "0.001",
        "0.00100000001",
        "1048576",
    ]


def test_status_of_activations_beside_a_harvest_of_text(run_folder):
    np.save("given.npy", np.zeros((64, 8), np.float32))
    file = Path("ingest.yaml")
    file.write_text("ingest: {path: given.npy}\ntrain: {sae: {d_sae: 8}, epochs: 1}\n")
    assert "harvest   would run: it has not been run yet" in pipeline("status", config=file).out


def test_status_sees_another_second_model(run_folder):
    shutil.copytree("assets/tiny-llama", "assets/other")
    setting = "evaluate.diff.model.name=assets/other"
    assert pipeline("evaluate", setting).status == 0
    weights = next(Path("assets/other").glob("*.safetensors"))
    tensors = load_file(weights)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, weights)
    assert "evaluate  would run: diff: sha256:" in pipeline("status", setting).out


def test_a_forced_sample_is_not_cleared_for_a_hook_that_is_none(run_folder):
    before = contents(only(run_folder, "runs/sample/*"))
    assert pipeline("sample", "--force", "--yes", "harvest.hooks=[modle.layers.1]").status == 1
    assert contents(only(run_folder, "runs/sample/*")) == before


def test_a_hook_that_the_model_lacks_is_named_before_any_text_is_read(fresh_folder):
    ran = pipeline("sample", "harvest.hooks=[modle.layers.1]")
    assert ran.status == 1
    assert "harvest.hooks: 'modle.layers.1': no such module" in ran.out
    assert not list(Path("runs").glob("sample/*/begun.json"))


def test_one_module_under_two_names_is_named(fresh_folder):
    ran = pipeline("sample", "harvest.hooks=[model.layers.1,blocks.1.hook_resid_post]")
    assert ran.status == 1
    assert "harvest.hooks: 'blocks.1.hook_resid_post': the same module as 'model.layers.1'" in ran.out


def test_path_prints_the_directory_and_nothing_else(finished, run_folder):
    ran = pipeline("path", "evaluate")
    assert ran.out == f"{only(finished, 'runs/evaluate/*').relative_to(finished)}\n"
    assert Path(ran.out.strip(), "metrics.json").exists()
    assert run_folder.exists()
    assert pipeline("path", "nonsense").status == 2


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["status"], 0),
        (["path", "train"], 0),
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "train.sae.d_sea=3"], 2),
        (["train"], 0),
    ],
)
def test_what_must_answer_at_once_never_imports_torch(run_folder, arguments, status):
    """All of it, the last one being a stage that is complete."""
    if "--help" not in arguments:
        arguments = [*arguments, "--config", str(TINY)]
    code = (
        "import sys\nfrom pipeline.cli import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit as e:\n    status = e.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'zarr'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run_folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr


def test_force_asks_before_it_clears_what_is_complete(run_folder):
    manifest = only(run_folder, "runs/train/*/manifest.json")
    before = contents(manifest.parent)
    ran = pipeline("train", "--force")
    assert ran.status == 1
    assert "left as it was" in ran.out
    assert contents(manifest.parent) == before
    elsewhere = run_folder / "elsewhere.txt"
    elsewhere.write_text("not ours to delete")
    (manifest.parent / "link").symlink_to(elsewhere)
    assert pipeline("train", "--force", "--yes").status == 0
    assert elsewhere.exists()
    weights = "model.layers.1/sae_weights.safetensors"
    assert (manifest.parent / weights).read_bytes() == before[weights]


def test_other_numerics_stop_a_resume_unless_allowed(run_folder):
    train = only(run_folder, "runs/train/*")
    (train / "manifest.json").unlink()
    (train / "model.layers.1" / "sae.json").unlink()
    begun = read_json(train / "begun.json")
    assert begun["numerics"]["threads"] == 1  # on a CPU: sums depend on their number
    begun["numerics"]["torch"] = "2.0.0"
    write_sealed(train / "begun.json", begun)
    ran = pipeline("train")
    assert ran.status == 1
    assert "begun under other numerics (torch: 2.0.0 then, " in ran.out
    assert "--allow-mixed" in ran.out
    ran = pipeline("train", "--allow-mixed")
    assert ran.status == 0, ran.out
    assert json.loads((train / "manifest.json").read_text())["mixed_with"]


def test_two_of_one_stage_cannot_run_together(run_folder):
    train = only(run_folder, "runs/train/*")
    (train / "manifest.json").unlink()
    with locked(train, "train"):
        assert "running" in pipeline("status").out
        ran = pipeline("train")
    assert ran.status == 1
    assert "another process is running this train" in ran.out


def test_a_folder_that_cannot_be_written(run_folder, monkeypatch):
    shutil.rmtree(run_folder / "runs" / "evaluate")

    def refuse(*_arguments, **_more):
        raise OSError(28, "No space left on device", "runs/evaluate/x/report.html")

    monkeypatch.setattr("evaluate.run.write_report", refuse)
    ran = pipeline("evaluate")
    assert ran.status == 1
    assert "runs/evaluate/x/report.html: No space left on device" in ran.out
    assert not list(run_folder.glob("runs/evaluate/*/manifest.json"))
    monkeypatch.undo()
    monkeypatch.chdir(run_folder)
    assert pipeline("evaluate").status == 0


def test_runs_can_be_looked_at_where_nothing_can_be_written(run_folder, monkeypatch):
    Path("runs/.inputs.json").unlink()

    def refused(path: Path, _value: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("pipeline.content.write_sealed", refused)
    for command in (["status"], ["path", "train"], ["verify", "--digest"]):
        ran = pipeline(*command)
        assert ran.status == 0, ran.out
    assert not Path("runs/.inputs.json").exists()


@pytest.mark.parametrize("command", [["sample"], ["run"], ["estimate"], ["dry-run"]])
def test_a_runs_folder_that_is_none_is_named(fresh_folder, command):
    Path("file").touch()
    ran = pipeline(*command, "--runs", "file/x")
    assert ran.status in (1, 2)
    assert "error: " in ran.out
    assert "Traceback" not in ran.out


def test_memory_that_is_not_there_is_an_error_that_names_what_to_lower(run_folder, monkeypatch):
    def no_memory(*_arguments: object, **_more: object) -> None:
        raise MemoryError("Unable to allocate 119 GiB")

    monkeypatch.setattr("train.run.heldout_rows", no_memory)
    ran = pipeline("train", "train.seed=3")
    assert ran.status == 1
    assert "error: out of memory (Unable to allocate 119 GiB)" in ran.out
    assert "train.batch_size" in ran.out


@pytest.mark.parametrize("fault", [RuntimeError("of ours"), OSError("of a library")], ids=["runtime", "os"])
def test_a_fault_of_ours_is_not_said_to_be_the_users(finished, monkeypatch, fault):
    def failing(*_arguments: object) -> None:
        raise fault

    monkeypatch.chdir(finished)
    monkeypatch.setattr("pipeline.cli.status_lines", failing)
    with pytest.raises(type(fault), match=r"^of "):
        pipeline("status")


def test_manifests_say_what_was_run_and_hold_no_secret(finished, run_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws_secretsecret")
    assert pipeline("train", "train.seed=5").status == 0
    for name, data in contents(run_folder / "runs").items():
        assert b"secretsecret" not in data, name
    manifest = json.loads(only(finished, "runs/harvest/*/manifest.json").read_text())
    assert manifest["settings"]["hooks"] == ["model.layers.1"]
    assert {"torch", "compute_dtype", "device", "attention"} <= manifest["numerics"].keys()
    assert manifest["summary"]["train_rows"] == 1536
    assert manifest["versions"]["zarr"]
    assert not {"host", "user"} & manifest.keys()


def test_what_force_was_deleting_is_never_taken_up(run_folder):
    """Killed while it deletes: what is left stands aside, and goes at the next start."""
    harvest = only(run_folder, "runs/harvest/*")
    before = contents(harvest / "store")
    (harvest / "manifest.json").unlink()
    (harvest / "begun.json").unlink()
    (harvest / "store").rename(harvest / ".trash-store")
    assert pipeline("harvest").status == 0
    assert contents(harvest / "store") == before
    assert not (harvest / ".trash-store").exists()


def test_threads_of_one_stage_do_not_reach_the_next(monkeypatch):
    import torch

    from harvest import device

    monkeypatch.setattr(device, "ALL_THREADS", 3)
    before = torch.get_num_threads()
    assert device.set_threads(1, torch.device("cpu")) == 1
    assert device.set_threads(0, torch.device("cpu")) == 3
    torch.set_num_threads(before)
