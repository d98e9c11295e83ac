import json
import os
import time
from pathlib import Path

import pytest
from conftest import contents, only, pipeline

from harvest.files import UserError, locked
from harvest.progress import size_text
from pipeline.prune import Found, _delete, choose, find, prune, start_run


@pytest.fixture
def two_trains(run_folder) -> Path:
    """The finished run, and a second train directory that configs/tiny.yaml does not use."""
    first = only(run_folder, "runs/train/*")
    second = first.with_name("0" * 12)
    second.mkdir()
    for name in ("begun.json", "manifest.json"):
        (second / name).write_bytes((first / name).read_bytes())
    (second / "weights").write_bytes(b"w" * 5000)
    return second


def size(*folders: Path) -> str:
    """What the files of some folders take on the disk."""
    inside = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return size_text(sum(path.lstat().st_blocks * 512 for path in inside))


def deleted(out: str) -> list[str]:
    """The stages of what was deleted, in that order."""
    return [line.split("/")[1] for line in out.splitlines() if line.startswith("deleted")]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("runs/*/*")}


def test_it_lists_sizes_and_users_and_deletes_nothing_unasked(run_folder, two_trains):
    before = contents(run_folder / "runs", "*/**/*")
    os.utime(two_trains / "manifest.json", (time.time() - 3 * 86400,) * 2)
    ran = pipeline("prune")
    assert ran.status == 0
    assert "nothing was deleted; --yes deletes 1 run (" in ran.out
    lines = {line.split()[1]: line for line in ran.out.splitlines() if line.startswith(("keep", "delete"))}
    unused = f"runs/train/{two_trains.name}"
    assert lines[unused].split() == ["delete", unused, *size(two_trains).split(), "3d", "complete", "-"]
    harvest = only(run_folder, "runs/harvest/*")
    train = next(path for path in run_folder.glob("runs/train/*") if path != two_trains)
    assert lines[f"runs/harvest/{harvest.name}"].startswith("keep")
    assert f"train {train.name}" in lines[f"runs/harvest/{harvest.name}"]
    assert "these settings" in lines[f"runs/harvest/{harvest.name}"]
    assert contents(run_folder / "runs", "*/**/*") == before


def test_yes_deletes_what_the_settings_do_not_use_and_no_more(run_folder, two_trains):
    before = names(run_folder)
    half = two_trains.with_name(f".trash-{two_trains.name}")  # of a run of this name that an earlier prune began on
    half.mkdir()
    (half / "weights").write_bytes(b"w" * 5000)
    asked = pipeline("prune").out.splitlines()[-1]
    assert asked == f"nothing was deleted; --yes deletes 1 run and 1 leftover ({size(two_trains, half)})"
    assert pipeline("prune", "--yes").status == 0
    assert before - names(run_folder) == {f"runs/train/{two_trains.name}"}
    assert not half.exists()
    assert "nothing to delete" in pipeline("prune", "--yes").out
    assert pipeline("status").out.count(" complete ") == 4


def test_what_a_running_process_needs_stays(run_folder, two_trains):
    """Under other settings everything here is unused, but for what the running train stands on."""
    with locked(two_trains, "train"):
        ran = pipeline("prune", "--yes", "sample.seed=7")
        assert ran.status == 0
        assert deleted(ran.out) == ["evaluate", "train"]  # an interruption leaves none without what it was made from
        kept = {path.parent.name for path in run_folder.glob("runs/*/*")}
        assert kept == {"sample", "harvest", "train"}
        assert two_trains.exists()
        ran = pipeline("prune", "--yes", str(two_trains))
        assert ran.status == 1
        assert "a process is working in it" in ran.out
    ran = pipeline("prune", "--yes", "sample.seed=7")
    assert ran.status == 0
    assert deleted(ran.out) == ["train", "harvest", "sample"]
    assert not names(run_folder)


def test_what_was_paid_for_stays_with_what_it_was_made_on():
    def run(stage: str, name: str, *before: Found, state: str = "complete") -> Found:
        return Found(stage, Path("runs") / stage / name, 0, 0.0, state, tuple(each.path for each in before))

    kept, other = run("evaluate", "1"), run("evaluate", "2")
    explained = [run("explain", "3", kept), run("explain", "4", other), run("benchmark", "5", kept)]
    trained = run("train", "6")
    running = run("evaluate", "7", trained, state="running")
    found = [kept, other, *explained, trained, running, run("train", "8")]
    assert {run.path.name for run in choose(found, [], [kept.path])} == {"2", "4", "8"}


def test_a_named_run_goes_only_with_its_users(run_folder):
    found = find(Path("runs"))
    harvest = only(run_folder, "runs/harvest/*").relative_to(run_folder)
    with pytest.raises(UserError, match=r"used by train [0-9a-f]{12}; name them as well"):
        choose(found, [harvest], [])
    later = [run.path for run in found if run.stage in ("harvest", "train", "evaluate")]
    assert {run.path for run in choose(found, later, [])} == set(later)
    with pytest.raises(UserError, match="used by the settings that --config names"):
        choose(found, later, later)


def test_links_and_foreign_names_are_never_touched(run_folder, two_trains):
    outside = run_folder / "outside"
    (outside / "store").mkdir(parents=True)
    (outside / "begun.json").write_text(json.dumps({"stage": "harvest"}))
    (outside / "store" / "data").write_bytes(b"precious")
    runs = run_folder / "runs"
    (runs / "harvest" / ("a" * 12)).symlink_to(outside)  # a run directory that is a link
    (two_trains / "link").symlink_to(outside)  # links inside one that goes
    (two_trains / "file-link").symlink_to(outside / "store" / "data")
    (runs / "train" / ".trash-link").symlink_to(outside)
    foreign = [runs / "harvest" / "my-notes", runs / "harvest" / ("b" * 12), runs / "other" / ("c" * 12)]
    for folder in foreign:
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"mine")
    (runs / "harvest" / "my-notes" / "begun.json").write_text("{}")  # our marker under a foreign name
    assert pipeline("prune", "--yes", "sample.seed=7").status == 0
    assert (outside / "store" / "data").read_bytes() == b"precious"
    assert all((folder / "data").read_bytes() == b"mine" for folder in foreign)
    assert (runs / "harvest" / ("a" * 12)).is_symlink()
    assert not two_trains.exists()
    for folder in (*foreign, runs / "harvest" / ("a" * 12), outside):
        ran = pipeline("prune", "--yes", str(folder))
        assert ran.status == 1
        assert "left alone" in ran.out
    (runs / "train").rename(run_folder / "elsewhere")
    (runs / "train").symlink_to(run_folder / "elsewhere")  # a stage's folder that is a link
    assert not [run for run in find(runs) if run.stage == "train"]


def test_leftovers_of_interrupted_deletions_go(run_folder):
    harvest, train = only(run_folder, "runs/harvest/*"), only(run_folder, "runs/train/*")
    (harvest / ".trash-store").mkdir()
    (harvest / ".trash-store" / "x").write_text("x")
    aside = train.with_name(".trash-" + "d" * 12)
    aside.mkdir()
    with locked(harvest, "harvest"):  # --force may be deleting just now
        assert pipeline("prune", "--yes").status == 0
        assert (harvest / ".trash-store").exists()
        assert not aside.exists()
    assert "1 leftover (" in pipeline("prune").out
    assert pipeline("prune", "--yes").status == 0
    assert not (harvest / ".trash-store").exists()
    assert pipeline("status").out.count(" complete ") == 4


def test_a_run_that_begins_at_the_last_moment_stays(run_folder, two_trains):
    before = contents(two_trains)
    with locked(two_trains, "train"), pytest.raises(UserError, match="a process has begun to work in it"):
        _delete(two_trains)
    link = two_trains.with_name("1" * 12)
    link.symlink_to(two_trains)
    with pytest.raises(UserError, match=f"{link.name}: .*or it is a link now; left alone"):
        _delete(link)
    assert {name: data for name, data in contents(two_trains).items() if ".lock" not in name} == before


def test_the_run_that_a_training_starts_from(tmp_path):
    run = tmp_path / "runs/train" / ("a" * 12)
    for path in (run, run / "hook", run / "hook/best"):
        assert start_run(str(path), tmp_path / "runs") == run
    for path in (tmp_path / "sae", tmp_path / "runs/train/mine", tmp_path / "runs/harvest" / ("a" * 12)):
        assert start_run(str(path), tmp_path / "runs") is None


def test_a_run_that_begins_while_it_asks_stops_it(run_folder, two_trains):
    before = contents(run_folder / "runs")

    def begin_another(_question: str) -> bool:
        (two_trains / ".lock-train").touch()
        lock = locked(two_trains, "train")
        lock.__enter__()
        locks.append(lock)
        return True

    locks: list = []
    used = [run.path for run in find(Path("runs")) if run.path.name != two_trains.name]
    with pytest.raises(UserError, match="began or ended meanwhile"):
        prune(Path("runs"), [], used, begin_another, lambda _line: None)
    locks[0].__exit__(None, None, None)
    assert {k: v for k, v in contents(run_folder / "runs").items() if ".lock" not in k} == {
        k: v for k, v in before.items() if ".lock" not in k
    }
