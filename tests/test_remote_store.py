"""A store in a bucket, over HTTP to a server on this machine: the same bytes and checks, errors with a way out."""

import os
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import contents, only, pipeline
from s3_server import BUCKET, Server, serving
from test_array_files import SHAPES, write
from zarr_twin import through_zarr

from harvest import store_files
from harvest.activation_store import ActivationStore
from harvest.files import UnreachableError, UserError, read_json
from harvest.store_files import LocalFiles, RemoteFiles
from harvest.verify import digest, verify
from train.config import ExcludeConfig
from train.dataloader import ActivationLoader, Position

G = SHAPES["usual"]
URL = f"s3://{BUCKET}/some/prefix"
SETTING = f"harvest.runtime.store={URL}"
SECRET = "never-to-be-written"


@pytest.fixture
def server(monkeypatch):
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    with serving() as running:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "writer")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setattr(store_files, "RETRIES", {"max_retries": 0})
        yield running


@pytest.fixture
def sampled(finished, fresh_folder) -> Path:
    """The current folder, with the tiny assets and the contexts of the finished run."""
    shutil.copytree(finished / "runs/sample", "runs/sample")
    shutil.copy(finished / "runs/.inputs.json", "runs/.inputs.json")
    return fresh_folder


def stored(server: Server) -> dict[str, bytes]:
    """The objects of the one store, by their names in it."""
    prefix = os.path.commonpath([*server.objects]) + "/"
    return {key.removeprefix(prefix): data for key, data in server.objects.items()}


def test_a_run_with_its_store_in_a_bucket(finished, sampled, server):
    """Harvest, verify, train and evaluate; only the harvest is told where the store lies."""
    ran = pipeline("harvest", SETTING)
    assert ran.status == 0, ran.out
    harvest = only(sampled, "runs/harvest/*")
    assert not (harvest / "store").exists()
    assert read_json(harvest / "manifest.json")["store"] == {"url": f"{URL}/{harvest.name}", "allow_http": False}
    local = contents(only(finished, "runs/harvest/*/store"))
    assert all(key.startswith(f"some/prefix/{harvest.name}/") for key in server.objects)
    assert stored(server) == local
    written = [key for method, key in server.requests if method == "PUT" and "/train/" in key and "/zarr" not in key]
    assert [key[-4:] == "json" for key in written] == [n % 6 == 5 for n in range(len(written))]  # last of its shard

    told = pipeline("verify", "--digest").out
    assert told.strip() == digest(LocalFiles(only(finished, "runs/harvest/*/store")))
    assert pipeline("verify").status == 0
    assert pipeline("train").status == 0
    weights = "runs/train/*/*/sae_weights.safetensors"
    assert only(sampled, weights).read_bytes() == only(finished, weights).read_bytes()
    ran = pipeline("evaluate")
    assert ran.status == 0, ran.out
    everything = b"".join(contents(sampled / "runs").values())
    for hidden in (SECRET, server.url):
        assert hidden.encode() not in everything

    key = f"some/prefix/{harvest.name}/train/model.layers.1/acts/c/3/0"
    data = bytearray(server.objects[key])
    data[77] ^= 16
    server.objects[key] = bytes(data)
    ran = pipeline("verify")
    assert ran.status == 1
    assert f"s3://{BUCKET}/{key}: damaged" in ran.out
    assert "1 bad shards are marked" in ran.out
    server.requests.clear()
    assert pipeline("harvest").status == 0
    assert stored(server) == local
    assert {k.split("/c/")[1].split("/")[0] for m, k in server.requests if m == "PUT" and "/c/" in k} == {"3"}


def test_stopped_and_started_again_makes_only_what_is_missing(finished, sampled, server, monkeypatch):
    """Stopped with half of a shard's objects written."""
    original = RemoteFiles.write

    def stopped(self, name, parts, size):
        if name == "train/row/token_id/c/1":
            raise KeyboardInterrupt
        original(self, name, parts, size)

    monkeypatch.setattr(RemoteFiles, "write", stopped)
    assert pipeline("harvest", SETTING).status == 130
    monkeypatch.setattr(RemoteFiles, "write", original)
    before = {key for key in server.objects if "/shards/" in key}
    assert [key[-10:] for key in sorted(before)] == ["00000.json", "00001.json", "00000.json"]
    server.requests.clear()
    ran = pipeline("harvest")  # goes on where it was begun
    assert ran.status == 0, ran.out
    assert stored(server) == contents(only(finished, "runs/harvest/*/store"))
    written = {key for method, key in server.requests if method == "PUT"}
    assert not before & written
    assert {key.split("/c/")[1][0] for key in written if "/c/" in key} == {"1", "2", "3", "4", "5"}
    ran = pipeline("prune", "harvest.chunk_rows=32", "--yes")
    assert f"left      {URL}/" in ran.out
    assert stored(server)["created.json"]


def test_another_place_and_starting_anew(sampled, server):
    assert pipeline("harvest", SETTING).status == 0
    manifest = only(sampled, "runs/harvest/*/manifest.json")
    manifest.unlink()
    ran = pipeline("harvest", f"harvest.runtime.store=s3://{BUCKET}/other")
    assert ran.status == 1
    assert f"this harvest was begun in {URL}/{manifest.parent.name}; go on there" in ran.out
    server.requests.clear()
    assert pipeline("harvest", "--force", "--yes").status == 0
    assert server.objects == {}
    assert (manifest.parent / "store/created.json").exists()


@pytest.mark.parametrize("form", ["bf16", "bf16-zstd", "int8"])
@pytest.mark.parametrize("by_zarr", [True, False])
def test_every_form_has_the_bytes_of_a_local_store(tmp_path, server, form, by_zarr):
    g = G._replace(stored=form)
    local = write(tmp_path, g)
    with through_zarr(by_zarr):
        remote = write(RemoteFiles(URL, False), g)
    assert stored(server) == contents(tmp_path)
    again = ActivationStore.open(RemoteFiles(URL, False))
    again.check_complete()
    for chunk in range(again.geometry.chunks_per_shard * g.train_shards):
        assert np.array_equal(again.read_chunk("train", "h", chunk), local.read_chunk("train", "h", chunk))
    assert again.records("train") == local.records("train")
    assert remote.path == URL


def test_a_large_object_is_sent_in_parts(server, monkeypatch):
    monkeypatch.setattr(store_files, "PART_BYTES", 1000)
    data = np.random.default_rng(0).bytes(4500)
    files = RemoteFiles(URL, False)
    files.write("large", [data], len(data))
    assert files.read("large") == data
    assert [method for method, _ in server.requests].count("PUT") == 5


def test_a_store_is_checked_by_listings_and_one_request_a_record(server):
    store = write(RemoteFiles(URL, False), G)
    server.requests.clear()
    store.check_complete()
    assert not any(method == "HEAD" for method, _ in server.requests)
    records = [key for _, key in server.requests if "/shards/" in key]
    assert len(records) == len(set(records)) == G.train_shards + G.holdout_shards


FAULTS = {
    "flipped": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "truncated": lambda data: data[: len(data) // 2],
    "missing": lambda data: None,
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["train/h/acts/c/1/0", "train/h/norm/c/1", "train/shards/00001.json"])
def test_training_stops_and_names_the_object(server, fault, name):
    write(RemoteFiles(URL, False), G)
    opened = ActivationStore.open(RemoteFiles(URL, False))
    changed = FAULTS[fault](server.objects.pop(f"some/prefix/{name}"))
    if changed is not None:
        server.objects[f"some/prefix/{name}"] = changed

    def read_all() -> None:
        loader = ActivationLoader(opened, "h", ExcludeConfig(norm_above_median=10), 9.0, 16, 2, 32, 0)
        for _ in islice(loader.batches(Position()), 12):
            pass

    with pytest.raises(UserError, match=f"{URL}/{name}: "):
        read_all()


def test_an_object_that_changes_between_two_looks_is_named(server):
    """Its index was read when it was there, and whole."""
    files = RemoteFiles(URL, False)
    with pytest.raises(UserError, match=f"{URL}/gone: missing; `make verify`"):
        files.read_into("gone", 0, memoryview(bytearray(4)))
    files.write("short", [b"abcdef"], 6)
    out = bytearray(4)
    files.read_into("short", 2, memoryview(out))
    assert out == b"cdef"
    with pytest.raises(UserError, match=f"{URL}/short: "):
        files.read_into("short", 4, memoryview(out))


def test_what_the_object_store_refuses(server, monkeypatch):
    def error(url: str = URL) -> str:
        with pytest.raises(UnreachableError) as caught:
            write(RemoteFiles(url, False), G)
        assert server.url not in str(caught.value)
        return str(caught.value)

    assert "s3://other/x/zarr.json: there is no bucket 'other' at this endpoint; make it" in error("s3://other/x")
    for who in ("nobody", "reader"):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", who)
        found = error()
        assert "access denied (403" in found and "AWS_SECRET_ACCESS_KEY" in found
        assert "may read, write, list and delete there" in found
        assert found.startswith(f"{URL}/zarr.json: ")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert f"{URL}/zarr.json: the object store does not answer" in error()


@pytest.mark.parametrize(
    "endpoint", ["http://10.0.0.1:9000", "http://storage.example.com", "http://127.0.0.1.evil.org"]
)
def test_plain_http_stays_on_this_machine(server, monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL is plain http to another machine.*allow_http=true"):
        RemoteFiles(URL, False)
    RemoteFiles(URL, True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.replace("http:", "https:"))
    RemoteFiles(URL, False)


def test_a_deletion_that_is_interrupted_leaves_nothing_that_passes_for_a_store(server, monkeypatch):
    files = RemoteFiles(URL, False)
    write(files, G)
    delete, deleted = files._obstore.delete, []

    def interrupted(store: object, paths: object) -> None:
        if deleted:  # the records
            raise KeyboardInterrupt
        deleted.append(paths)
        delete(store, paths)

    monkeypatch.setattr(files._obstore, "delete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.delete_all()
    monkeypatch.undo()
    assert any("/acts/" in key for key in server.objects)
    assert ActivationStore.open(files).complete_shards("train") == set()


def test_a_store_in_a_bucket_that_is_gone_or_damaged_is_made_again(sampled, server):
    assert pipeline("harvest", SETTING).status == 0
    before = dict(server.objects)
    for damage in (
        server.objects.clear,
        lambda: server.objects.update(
            {k: v.replace(b'"train_shards": 6', b'"train_shards": 2') for k, v in before.items()}
        ),
    ):
        damage()
        assert pipeline("train").status == 1
        assert pipeline("verify").status == 1
        assert pipeline("harvest", SETTING).status == 0
        assert server.objects == before


def test_what_cannot_be_reached_is_not_called_bad(server):
    write(RemoteFiles(URL, False), G)
    before = dict(server.objects)
    server.failing = "acts/c/1/0"
    with pytest.raises(UnreachableError, match=r"acts/c/1/0: the object store does not answer as it should \(503"):
        verify(RemoteFiles(URL, False))
    assert server.objects == before


def test_without_obstore(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '\.\[s3\]'"):
        RemoteFiles(URL, False)


@pytest.mark.parametrize(
    "url", ["s3://key:secret@bucket/x", "https://bucket/x", "s3://b", "s3://bucket/a//b", "bucket"]
)
def test_what_is_no_place_of_a_store(fresh_folder, url):
    ran = pipeline("status", f"harvest.runtime.store={url}")
    assert ran.status == 2
    assert "harvest.runtime.store" in ran.out
