import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import contents, only, pipeline

from harvest.activation_store import ActivationStore
from harvest.files import read_json
from harvest.progress import Progress
from harvest.store_files import LocalFiles

BAD = {
    "a flipped bit": "train/model.layers.1/acts/c/3/0",
    "a truncated file": "train/row/context/c/1",
    "a deleted shard": "train/model.layers.1/acts/c/0/0",
    "a deleted chunk of provenance": "holdout/row/token_id/c/1",
    "a record without its data": "train/shards/00005.json",
}


def test_what_is_bad_is_named_and_just_that_is_restored(run_folder):
    store = only(run_folder, "runs/harvest/*/store")
    before = contents(store)
    digest = pipeline("verify", "--digest").out
    assert len(digest.strip()) == 64
    assert pipeline("verify").status == 0
    untouched = store / "train/model.layers.1/acts/c/4/0"
    written = untouched.stat().st_mtime_ns

    flipped = store / BAD["a flipped bit"]
    data = bytearray(flipped.read_bytes())
    data[77] ^= 16
    flipped.write_bytes(data)
    truncated = store / BAD["a truncated file"]
    truncated.write_bytes(truncated.read_bytes()[:20])
    for name in ("a deleted shard", "a deleted chunk of provenance"):
        (store / BAD[name]).unlink()
    (store / BAD["a record without its data"]).write_text("{}")
    assert pipeline("verify", "--digest").out != digest

    ran = pipeline("verify")
    assert ran.status == 1
    for name in BAD.values():
        assert name in ran.out
    assert "5 bad shards are marked" in ran.out
    assert pipeline("harvest").status == 0
    assert contents(store) == before
    assert pipeline("verify", "--digest").out == digest
    assert untouched.stat().st_mtime_ns == written


def test_there_is_nothing_to_verify(fresh_folder):
    assert pipeline("verify").status == 1
    ran = pipeline("verify", "--digest")
    assert ran.status == 1
    assert "`make harvest` makes it" in ran.out


def _edit(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


METADATA: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a chunk's rows": ("zarr.json", _edit('"chunk_rows": 64', '"chunk_rows": 65')),
    "fewer shards": ("zarr.json", _edit('"train_shards": 6', '"train_shards": 2')),
    "text for a number": ("zarr.json", _edit('"train_shards": 6', '"train_shards": "6"')),
    "a seed": ("zarr.json", _edit('"seed": 0', '"seed": 1')),
    "no JSON": ("zarr.json", _edit("{", "[")),
    "no root": ("zarr.json", Path.unlink),
    "another type": ("train/model.layers.1/acts/zarr.json", _edit('"uint16"', '"int16"')),
    "a group's": ("train/zarr.json", _edit('"group"', '"array"')),
    "no provenance": ("train/row/position/zarr.json", Path.unlink),
    "created.json": ("created.json", _edit("1", "2")),
    "no created.json": ("created.json", Path.unlink),
}


@pytest.mark.parametrize("fault", METADATA)
def test_damaged_metadata_is_written_anew_and_no_good_shard_is_lost(run_folder, fault):
    store = only(run_folder, "runs/harvest/*/store")
    before = contents(store)
    good = store / "train/model.layers.1/acts/c/4/0"
    written = good.stat().st_mtime_ns
    name, damage = METADATA[fault]
    damage(store / name)
    flipped = store / BAD["a flipped bit"]
    data = bytearray(flipped.read_bytes())
    data[77] ^= 16
    flipped.write_bytes(data)

    ran = pipeline("verify")
    assert ran.status == 1
    assert name in ran.out
    assert "reads the shards" in ran.out
    assert len(list((store / "train/shards").iterdir())) == 6
    assert pipeline("harvest").status == 0
    ran = pipeline("verify")  # the shards as well, by the right shape
    assert ran.status == 1
    assert "1 bad shards are marked" in ran.out
    assert pipeline("harvest").status == 0
    assert pipeline("verify").status == 0
    assert contents(store) == before
    assert good.stat().st_mtime_ns == written


@pytest.mark.parametrize("record", ["", "{}", "[]"])
def test_the_first_record_is_damaged(run_folder, record):
    store = only(run_folder, "runs/harvest/*/store")
    before = contents(store)
    (store / "train/shards/00000.json").write_text(record)
    ran = pipeline("verify")
    assert ran.status == 1
    assert "train shard 0: " in ran.out
    assert pipeline("harvest").status == 0
    assert contents(store) == before


def test_a_record_of_other_rows_is_bad(run_folder):
    store = only(run_folder, "runs/harvest/*/store")
    _edit('"rows": 256', '"rows": 999')(store / "train/shards/00003.json")
    assert "shards/00003.json" in pipeline("train", "train.seed=9").out
    assert "1 bad shards are marked" in pipeline("verify").out


def test_a_store_that_is_gone_is_made_again(run_folder):
    store = only(run_folder, "runs/harvest/*/store")
    before = contents(store)
    shutil.rmtree(store)
    assert "no activation store there" in pipeline("verify").out
    assert pipeline("harvest").status == 0
    assert contents(store) == before


def test_a_damaged_manifest_is_written_anew(run_folder):
    manifest = only(run_folder, "runs/harvest/*/manifest.json")
    _edit('"stage": "harvest"', '"stage": "Harvest"')(manifest)
    assert "delete it and run harvest again" in pipeline("train", "train.seed=9").out
    ran = pipeline("verify")
    assert ran.status == 1
    assert f"{manifest.name}: does not match its own checksum" in ran.out
    assert ran.out.endswith("`make harvest` writes it anew\n")
    assert pipeline("harvest").status == 0
    assert pipeline("verify").status == 0


def test_a_manifest_names_nothing_but_metadata_to_take_away(run_folder):
    store = only(run_folder, "runs/harvest/*/store")
    before = contents(store)
    manifest = only(run_folder, "runs/harvest/*/manifest.json")
    value = json.loads(manifest.read_text())
    del value["crc32c"]
    value["files"] |= {"store/train": 1, "store/": 1, "store/train/shards/00000.json": 1}
    manifest.write_text(json.dumps(value))
    pipeline("verify")
    assert contents(store) == before


def test_an_unfinished_store_is_not_judged_by_a_damaged_shape(run_folder):
    store = only(run_folder, "runs/harvest/*/store")
    (store.parent / "manifest.json").unlink()
    (store / "train/shards/00005.json").unlink()
    before = contents(store)
    _edit('"chunk_rows": 64', '"chunk_rows": 32')(store / "zarr.json")
    ran = pipeline("verify")
    assert ran.status == 1
    assert "not that of the store that zarr.json describes" in ran.out
    assert pipeline("harvest").status == 0
    assert {name: data for name, data in contents(store).items() if name in before} == before


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[77] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("restored", [False, True])
def test_an_interrupted_verification_goes_on_where_it_was(run_folder, monkeypatch, tmp_path, restored):
    """And looks once more at what was bad, which may have been restored meanwhile."""
    store = only(run_folder, "runs/harvest/*/store")
    shutil.copytree(store, tmp_path / "backup")
    flip(store / "train/model.layers.1/acts/c/1/0")
    whole, looked = ActivationStore.verify_shard, []

    def look(self, split, shard):
        looked.append((split, shard))
        if (split, shard) == ("train", 4):
            raise KeyboardInterrupt
        whole(self, split, shard)

    monkeypatch.setattr(LocalFiles, "readers", 1)
    monkeypatch.setattr(ActivationStore, "verify_shard", look)
    assert pipeline("verify").status == 130
    assert looked[:5] == [("train", n) for n in range(5)]
    monkeypatch.setattr(ActivationStore, "verify_shard", lambda *place: looked.append(place[1:]) or whole(*place))
    looked.clear()
    if restored:
        shutil.copytree(tmp_path / "backup", store, dirs_exist_ok=True)
    ran = pipeline("verify")
    assert looked == [("train", 1), ("train", 4), ("train", 5), ("holdout", 0), ("holdout", 1)]
    assert "4 shards were read by" in ran.out
    assert ran.status == (0 if restored else 1)
    assert ("train shard 1: " in ran.out) is ("1 bad shards are marked" in ran.out) is not restored
    assert not list(run_folder.glob("runs/harvest/*/verify.json"))
    assert pipeline("harvest").status == 0 and pipeline("verify").status == 0


def test_a_verification_that_is_killed_has_noted_how_far_it_was(run_folder, monkeypatch):
    """A kill gives no time to note anything, so that is done on the way."""
    memory = only(run_folder, "runs/harvest/*") / "verify.json"
    flip(memory.parent / "store/train/model.layers.1/acts/c/1/0")
    monkeypatch.setattr("harvest.verify.MEMORY_SECONDS", -1.0)
    noted, advance = [], Progress.advance

    def look(self, amount, note=""):
        found = read_json(memory, sealed=True) if memory.exists() else {"read": 0, "bad": []}
        if self.title == "verify":
            noted.append((found["read"], [place[:2] for place in found["bad"]]))
        advance(self, amount, note)

    monkeypatch.setattr(Progress, "advance", look)
    assert pipeline("verify").status == 1
    assert noted == [(n, [["train", 1]] if n > 1 else []) for n in range(8)]


def test_a_damaged_memory_is_not_believed(run_folder):
    memory = only(run_folder, "runs/harvest/*") / "verify.json"
    flip(memory.parent / "store/train/model.layers.1/acts/c/1/0")
    memory.write_text('{"last": ["holdout", 1], "read": 8, "bad": []}')
    ran = pipeline("verify")
    assert ran.status == 1 and "train shard 1: " in ran.out


def test_a_sample_reads_so_many_shards(run_folder, monkeypatch):
    whole, looked = ActivationStore.verify_shard, []
    monkeypatch.setattr(ActivationStore, "verify_shard", lambda *place: looked.append(place[1:]) or whole(*place))
    ran = pipeline("verify", "--sample", "3")
    assert ran.status == 0 and len(set(looked)) == len(looked) == 3
    assert (
        "verify: 3/3 shards" in ran.out
        and "3 of 8 shards, drawn at random" in ran.out
        and "every byte that was read" in ran.out
    )
    looked.clear()
    assert pipeline("verify", "--sample", "100").status == 0 and len(looked) == 8
