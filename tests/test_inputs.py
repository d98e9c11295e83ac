"""What a stage reads is what its fingerprint names: edits of inputs that keep size and mtime, at any moment."""

import ctypes
import hashlib
import json
import os
import random
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, contents, only, pipeline

from harvest import ingest
from harvest import run as harvesting
from harvest.files import Stamp, file_stamp, read_json, write_sealed
from pipeline import content, fingerprint, stages
from pipeline.config import load
from pipeline.fingerprint import find_inputs

MODEL = Path("assets/tiny-llama")
QUICK = [f"evaluate.{name}=null" for name in ("downstream", "reason_score", "features", "diff", "steering")]


def replaced(path: Path, data: bytes, *, mtime: bool) -> None:
    """Write other bytes into a file, in place, and with `mtime` set it back, as unzip, `cp -p` and rsync do."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    if mtime:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edited(name: str, data: bytes, rng: random.Random, *, size: bool) -> bytes:
    """Another content of a model's file, with which it still loads."""
    if name == "model.safetensors":
        at = rng.randrange(len(data) // 2, len(data) - 8) & ~1
        return data[:at] + bytes([data[at] ^ rng.randrange(1, 128)]) + data[at + 1 :]
    if not size:
        return data + b"\n" * rng.randrange(1, 9)
    return data.replace(b"1e-06", b"1e-05", 1) if b"1e-06" in data else data.replace(b"1e-05", b"1e-06", 1)


def model_hash() -> str:
    """The identity of a local model as docs/formats.md has it, written out."""
    names = sorted(p.name for p in MODEL.iterdir() if p.name == "config.json" or p.suffix == ".safetensors")
    pairs = [[name, hashlib.sha256((MODEL / name).read_bytes()).hexdigest()] for name in names]
    return "sha256:" + hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


@pytest.mark.parametrize("seed", range(10))
def test_a_harvest_names_the_weights_that_it_read(run_folder, monkeypatch, seed):
    """Random edits, two at each moment: whatever they keep, what is complete names what was loaded."""
    rng = random.Random(seed)
    path = MODEL / rng.choice(["model.safetensors", "model.safetensors", "config.json"])
    keeps_size, keeps_mtime = rng.choice([(True, True), (True, False), (False, True)])
    moment = ["before", "hashed", "loading", "loaded", "there and back"][seed % 5]
    before = path.read_bytes()
    other = edited(path.name, before, rng, size=keeps_size)
    assert other != before
    read, load_model, find = [], harvesting.load_model, stages.find_inputs

    def finding(*arguments):
        found = find(*arguments)
        if moment == "hashed":
            replaced(path, other, mtime=keeps_mtime)
        return found

    def loading(*arguments, **more):
        if moment in ("loading", "there and back"):
            replaced(path, other, mtime=keeps_mtime)
        read.append(model_hash())
        model = load_model(*arguments, **more)
        if moment in ("loaded", "there and back"):
            replaced(path, other if moment == "loaded" else before, mtime=keeps_mtime)
        return model

    monkeypatch.setattr(harvesting, "load_model", loading)
    monkeypatch.setattr(stages, "find_inputs", finding)
    if moment == "before":
        replaced(path, other, mtime=keeps_mtime)
    else:
        shutil.rmtree("runs/harvest")
    known = set(Path("runs/harvest").glob("*/manifest.json"))
    if moment == "before":
        assert pipeline("sample").status == 0
    ran = pipeline("harvest")
    new = set(Path("runs/harvest").glob("*/manifest.json")) - known
    assert [read_json(manifest)["inputs"]["model"] for manifest in new] == read[-1:] * len(new)
    if moment == "before":
        assert ran.status == 0 and len(new) == 1
    else:
        assert ran.status == 1 and not new
        assert f"(the newest is {path})" in ran.out
        assert not list(Path("runs/harvest").glob("*/begun.json"))
    monkeypatch.undo()
    monkeypatch.chdir(run_folder)
    for stage in ("sample", "harvest"):
        assert pipeline(stage).status == 0
    harvest = Path(pipeline("path", "harvest").out.strip())
    assert read_json(harvest / "manifest.json")["inputs"]["model"] == model_hash()


def test_zeros_in_the_weights_are_no_complete_harvest(run_folder):
    weights = MODEL / "model.safetensors"
    data = weights.read_bytes()
    assert "harvest   complete" in pipeline("status").out
    replaced(weights, data[:-400] + bytes(200) + data[-200:], mtime=True)
    lines = pipeline("status").out.splitlines()
    assert [line.split()[1] for line in lines] == ["complete", "would", "would", "would"]
    assert "model: sha256:" in lines[1]
    replaced(weights, data, mtime=True)
    assert [line.split()[1] for line in pipeline("status").out.splitlines()] == ["complete"] * 4


def test_weights_in_memory_do_not_follow_the_file(run_folder):
    import torch

    from harvest.config import ModelConfig
    from harvest.language_model import load_model

    model = load_model(ModelConfig(name=str(MODEL)), None, ["model.layers.1"], torch.bfloat16, torch.device("cpu"))
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    weights = MODEL / "model.safetensors"
    replaced(weights, weights.read_bytes()[:2000] + bytes(weights.stat().st_size - 2000), mtime=True)
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.named_parameters())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_evaluation_does_not_count_when_its_files_change_meanwhile(run_folder, monkeypatch, name):
    from evaluate import run as evaluation

    write_report = evaluation.write_report

    def writing(*arguments):
        data = (MODEL / name).read_bytes()
        replaced(MODEL / name, data[:-1] + bytes([data[-1] ^ 1]), mtime=True)
        write_report(*arguments)

    monkeypatch.setattr(evaluation, "write_report", writing)
    ran = pipeline("evaluate", "evaluate.batch_rows=64", *QUICK)
    assert ran.status == 1 and f"the newest is {MODEL / name}" in ran.out
    assert len(list(Path("runs/evaluate").glob("*/manifest.json"))) == 1


def test_given_activations_that_change_while_they_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("given.npy", rng.normal(size=(400, 8)).astype(np.float32))
    file = Path("ingest.yaml")
    file.write_text("ingest: {path: given.npy, shard_rows: 64, chunk_rows: 16}\ntrain: {sae: {d_sae: 8}, epochs: 1}\n")
    shard_rows, calls = ingest.shard_rows, []

    def reading(*arguments):
        calls.append(1)
        if len(calls) == 3:
            data = Path("given.npy").read_bytes()
            replaced(Path("given.npy"), data[:-64] + data[-32:] + data[-64:-32], mtime=True)
        return shard_rows(*arguments)

    monkeypatch.setattr(ingest, "shard_rows", reading)
    ran = pipeline("ingest", config=file)
    assert ran.status == 1 and "given.npy: has changed while it was read" in ran.out
    assert len(list(Path("runs").glob("harvest/*/store/*/shards/*.json"))) <= 2
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert pipeline("ingest", config=file).status == 0
    sha = hashlib.sha256(Path("given.npy").read_bytes()).hexdigest()
    expected = "sha256:" + hashlib.sha256(json.dumps([["given.npy", sha]]).encode()).hexdigest()
    manifest = only(tmp_path, "runs/harvest/*/manifest.json")
    assert read_json(manifest)["inputs"]["activations"] == expected


# What is remembered of inputs.


def model_of(runs: Path = Path("runs")) -> str | None:
    return find_inputs(load(TINY, []), runs).model


def test_a_change_within_one_tick_of_the_clock_is_seen(fresh_folder, monkeypatch):
    """A file system whose times are coarse gives two contents of one size the same stamp."""
    now = time.time_ns()

    def coarse(path: Path) -> Stamp:
        return Stamp(path.stat().st_size, now, now, 1)

    monkeypatch.setattr(content, "file_stamp", coarse)
    before = model_of()
    assert model_of() == before == model_hash()
    data = (MODEL / "model.safetensors").read_bytes()
    replaced(MODEL / "model.safetensors", data[:-1] + bytes([data[-1] ^ 1]), mtime=True)
    assert model_of() == model_hash() != before


def test_what_is_remembered_is_read_once(fresh_folder, monkeypatch):
    monkeypatch.setattr(content, "RECENT_NS", 0)
    expected = model_of()
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert model_of() == expected


def test_a_damaged_memory_is_made_anew(fresh_folder, monkeypatch):
    monkeypatch.setattr(content, "RECENT_NS", 0)
    expected, memory = find_inputs(load(TINY, []), Path("runs")), Path("runs/.inputs.json")
    whole, rng = memory.read_bytes(), random.Random(0)
    assert b"crc32c" in whole
    for _ in range(60):
        at = rng.randrange(len(whole))
        memory.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        assert find_inputs(load(TINY, []), Path("runs")) == expected
    wrong = json.loads(whole.replace(b'"sha256": "', b'"sha256": "0'))
    memory.write_text(json.dumps(wrong))
    assert find_inputs(load(TINY, []), Path("runs")) == expected
    del wrong["crc32c"]  # as a file of an earlier version, of which hashes are not believed
    memory.write_text(json.dumps(wrong))
    assert find_inputs(load(TINY, []), Path("runs")) == expected
    assert read_json(memory, sealed=True)


def test_commits_of_an_earlier_version_are_kept(fresh_folder):
    Path("runs").mkdir()
    commit = "0123456789abcdef0123456789abcdef01234567"
    Path("runs/.inputs.json").write_text(json.dumps({"model:a/b@main": commit, f"{MODEL}/x|1|2": "0" * 64}))
    memory = fingerprint.Memory(Path("runs/.inputs.json"))
    assert memory.commit("model", "a/b", None, "model.name") == f"hub:a/b@{commit}"
    assert list(memory.known) == ["model:a/b@main"]


def test_a_file_that_is_being_written_is_named(fresh_folder, monkeypatch):
    stamps = iter(range(100))
    monkeypatch.setattr(content, "file_stamp", lambda path: file_stamp(path)._replace(inode=next(stamps)))
    ran = pipeline("status")
    assert ran.status == 1 and "changes while it is read; wait until it is written" in ran.out


# Which files a stage reads.

EXTRA = {
    "README.md": "# a model",
    "LICENSE": "MIT",
    "chat_template.jinja": "{% for m in messages %}A {{ m['content'] }}{% endfor %}",
    "additional_chat_templates/default.jinja": "{% for m in messages %}B {{ m['content'] }}{% endfor %}",
    "special_tokens_map.json": '{"eos_token": "<|im_end|>"}',
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "",
    "tokenizer.model": "",
    "preprocessor_config.json": "{}",
    "pytorch_model.bin": "",
    "trainer_state.json": "{}",
}
IN_OPEN = 0x20


class Opened:
    """Names of the files of some folders that any library opens, as the kernel reports them (inotify)."""

    def __init__(self, *folders: Path) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self.libc.inotify_init1(os.O_NONBLOCK)
        self.folders = {
            self.libc.inotify_add_watch(self.descriptor, os.fsencode(folder), IN_OPEN): folder for folder in folders
        }

    def names(self) -> set[str]:
        out = set()
        try:
            while data := os.read(self.descriptor, 1 << 16):
                while data:
                    watch, _mask, _cookie, length = struct.unpack_from("iIII", data)
                    name = data[16 : 16 + length].rstrip(b"\0").decode()
                    if name:
                        out.add(str((self.folders[watch] / name).relative_to(MODEL)))
                    data = data[16 + length :]
        except BlockingIOError:
            return out
        return out


def fingerprints() -> dict[str, str]:
    return dict(stages.find_runs(load(TINY, []), Path("runs"))[0].fingerprints)


def changed_by(name: str) -> set[str]:
    """Stages whose fingerprints change with a file of the model."""
    before, path = fingerprints(), MODEL / name
    data = path.read_bytes()
    replaced(path, data + b" ", mtime=False)
    after = fingerprints()
    replaced(path, data, mtime=False)
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.fixture
def full_model(fresh_folder) -> Path:
    """The tiny model's folder with what else lies in folders of models."""
    for name, text in EXTRA.items():
        path = MODEL / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return fresh_folder


def test_what_a_stage_opens_is_in_its_fingerprint(full_model, monkeypatch):
    monkeypatch.setattr(content, "RECENT_NS", 0)  # so that nothing is opened just to be hashed again for another stage
    for stage in ("sample", "harvest", "train", "evaluate"):
        pipeline("status")
        opened = Opened(MODEL, MODEL / "additional_chat_templates")
        ran = pipeline(stage)
        assert ran.status == 0, ran.out
        names = {name for name in opened.names() if (MODEL / name).is_file()}
        if stage == "train":
            names -= {name for name in names if changed_by(name)}  # `find_inputs` may hash them again
        assert {name for name in names if stage not in changed_by(name)} == set(), stage
        needed = {"harvest": "model.safetensors", "evaluate": "generation_config.json", "sample": "tokenizer.json"}
        assert stage == "train" or needed[stage] in names


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("README.md", None),
        ("LICENSE", None),
        ("pytorch_model.bin", None),
        ("preprocessor_config.json", None),
        ("tokenizer.json", "sample"),
        ("special_tokens_map.json", "sample"),
        ("config.json", "sample"),
        ("model.safetensors", "harvest"),
        ("chat_template.jinja", "sample"),
        ("additional_chat_templates/default.jinja", "sample"),
        ("generation_config.json", "evaluate"),
    ],
)
def test_a_file_of_the_model_concerns(full_model, name, stage):
    every = ["sample", "harvest", "train", "evaluate"]
    assert changed_by(name) == set(every[every.index(stage) :] if stage else [])


def test_a_file_that_is_put_into_the_folder(run_folder):
    """Its settings of generation say what ends a text."""
    assert "evaluate  complete" in pipeline("status").out
    path = MODEL / "generation_config.json"
    path.write_text(path.read_text() + "\n")
    lines = pipeline("status").out.splitlines()
    assert [line.split()[1] for line in lines] == ["complete", "complete", "complete", "would"]
    assert "evaluate  would run: generation: sha256:" in lines[3]


def test_a_chat_template_names_what_no_content_makes(run_folder):
    """So it concerns a sample of chatml too."""
    (MODEL / "chat_template.jinja").write_text(EXTRA["chat_template.jinja"])
    assert "sample    would run: tokenizer: sha256:" in pipeline("status").out


def test_what_is_not_hashed_changes_no_byte(full_model):
    """A folder with nothing but what was hashed gives the same contexts, whatever else lay there."""
    assert pipeline("sample").status == 0
    before = contents(only(full_model, "runs/sample/*/contexts"))
    shutil.rmtree("runs/sample")
    for name in EXTRA:
        if not changed_by(name) & {"sample", "harvest"}:
            (MODEL / name).unlink()
    assert not (MODEL / "README.md").exists()
    assert pipeline("sample").status == 0
    assert contents(only(full_model, "runs/sample/*/contexts")) == before


def test_the_second_model_is_known_by_its_tokenizer_too(fresh_folder):
    shutil.copytree(MODEL, "assets/other")
    setting = ["evaluate.diff.model.name=assets/other"]
    before = find_inputs(load(TINY, setting), Path("runs"))
    tokenizer = Path("assets/other/tokenizer.json")
    replaced(tokenizer, tokenizer.read_bytes() + b"\n", mtime=True)
    after = find_inputs(load(TINY, setting), Path("runs"))
    assert after._replace(diff=None) == before._replace(diff=None)
    assert after.diff != before.diff


def test_a_sealed_file_without_its_seal(tmp_path):
    write_sealed(tmp_path / "a.json", {"b": 1})
    assert read_json(tmp_path / "a.json", sealed=True) == {"b": 1}
    (tmp_path / "a.json").write_text('{"b": 1}')
    assert read_json(tmp_path / "a.json") == {"b": 1}
    with pytest.raises(Exception, match="does not match its own checksum"):
        read_json(tmp_path / "a.json", sealed=True)
