import shutil

import pytest
from conftest import only, pipeline

from harvest.activation_store import ActivationStore
from harvest.disk import BLOCK, shard_bytes


def test_a_shard_takes_what_it_is_said_to(finished):
    store = ActivationStore.open(only(finished, "runs/harvest/*/store"))
    record = store.record("train", 3)
    sizes = [file["bytes"] for file in record["files"].values()] + [store.record_path("train", 3).stat().st_size]
    assert shard_bytes(store.geometry) == sum(-(-size // BLOCK) * BLOCK for size in sizes)


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that every disk claims to have free."""

    def set_free(value: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**15, 0, value))

    return set_free


def test_harvest_does_not_start_on_a_disk_that_is_too_small(run_folder, free):
    store = only(run_folder, "runs/harvest/*/store")
    needed = 8 * shard_bytes(ActivationStore.open(store).geometry)
    shutil.rmtree(store.parent)
    free(needed - 1)
    ran = pipeline("harvest")
    assert ran.status == 1
    assert f"runs/harvest/{store.parent.name}: 8 shards are still to be written, 328 kB, and the disk has" in ran.out
    assert "--runs" in ran.out
    assert not list(store.glob("*/shards/*.json"))
    free(needed)
    assert pipeline("harvest").status == 0


def test_only_what_is_still_missing_must_fit(run_folder, free):
    directory = only(run_folder, "runs/harvest/*")
    store = ActivationStore.open(directory / "store")
    (directory / "manifest.json").unlink()
    store.record_path("train", 2).unlink()
    free(shard_bytes(store.geometry))
    assert pipeline("harvest").status == 0
