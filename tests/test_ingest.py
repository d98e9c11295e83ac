"""Activations that the user has already: files of every kind -> store -> SAE -> figures."""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CPU, ROOT, contents, only, pipeline

from evaluate.figures import read_figures
from harvest.activation_store import ActivationStore

INGEST = ROOT / "configs" / "ingest.yaml"
SMALL = (
    "ingest.shard_rows=64",
    "ingest.chunk_rows=32",
    "ingest.holdout_fraction=0.2",
    "train.sae.expansion_factor=4",
    "train.batch_size=64",
    "train.pool_rows=128",
    "train.validate_every=5",
    *CPU,
)
CONTEXTS, SIZE, D = 40, 16, 8


def acts(seed: int = 0) -> torch.Tensor:
    """float32 (contexts, context_size, d_in) that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CONTEXTS, SIZE, D, generator=generator).bfloat16().float()


TOKENS = torch.arange(CONTEXTS * SIZE, dtype=torch.int32).view(CONTEXTS, SIZE) % 50


def run(command: str, *overrides: str):
    return pipeline(command, *SMALL, *overrides, config=INGEST)


def ingest(path: str, *overrides: str) -> ActivationStore:
    """The store of the files at a path."""
    ran = run("ingest", f"ingest.path={path}", *overrides)
    assert ran.status == 0, ran.out
    newest = max(Path("runs/harvest").glob("*/manifest.json"), key=lambda p: p.stat().st_mtime_ns)
    return ActivationStore.open(newest.parent / "store")


def error(path: str, *overrides: str) -> str:
    """The sentence that a bad input gets; nothing that looks complete is left."""
    before = contents(Path("runs"), "*/**/*")
    ran = run("ingest", f"ingest.path={path}", *overrides)
    assert ran.status == 1, ran.out
    after = contents(Path("runs"), "*/**/*")
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name not in before and name.endswith(("manifest.json", "zarr.json"))]
    return ran.out.split("error: ", 1)[1]


def rows_by_place(store: ActivationStore, hook: str) -> dict[tuple[str, int, int], np.ndarray]:
    """Stored rows by (split, context, position)."""
    out = {}
    for split in ("train", "holdout"):
        for shard in range(store.geometry.shards(split)):
            store.verify_shard(split, shard)
            per = store.geometry.chunks_per_shard
            rows = np.concatenate([store.read_chunk(split, hook, shard * per + i) for i in range(per)])
            context, position = (store.read_provenance(split, name, shard) for name in ("context", "position"))
            places = zip([split] * len(rows), context.tolist(), position.tolist(), strict=True)
            out |= dict(zip(places, rows, strict=True))
    return out


def bits(rows: torch.Tensor) -> np.ndarray:
    return rows.bfloat16().view(torch.uint16).numpy()


def check(store: ActivationStore, hook: str, x: torch.Tensor) -> None:
    """Every stored row is the input's at its context and position, once; no context is on both sides."""
    found = rows_by_place(store, hook)
    assert len(found) == store.geometry.shard_rows * (store.geometry.train_shards + store.geometry.holdout_shards)
    assert len(found) > len(x.flatten(0, 1)) - 2 * store.geometry.shard_rows
    for (_, context, position), row in found.items():
        assert np.array_equal(row, bits(x)[context, position])
    sides = {(context, split) for split, context, _ in found}
    assert len({context for context, _ in sides}) == len(sides)
    norms = np.concatenate([store.read_norms("train", hook, s) for s in range(store.geometry.train_shards)])
    assert np.median(norms) == pytest.approx(float(x.flatten(0, 1).norm(dim=1).median()), rel=0.1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(kind: str, x: torch.Tensor, name: str, **columns: torch.Tensor) -> str:
    """Write a file of this kind."""
    path = f"{name}.{kind}"
    if kind == "npy":
        np.save(path, x.numpy())
    elif kind == "safetensors":
        safetensors.torch.save_file({"h": x.contiguous(), **columns}, path)
    else:
        torch.save({"h": x, **columns} if columns else x, path)
    return path


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("npy", "float32"),
        ("npy", "float16"),
        ("safetensors", "bfloat16"),
        ("safetensors", "float16"),
        ("pt", "bfloat16"),
    ],
)
def test_every_kind_of_file_and_number(kind, dtype):
    x = acts()
    store = ingest(save(kind, x.to(getattr(torch, dtype)), "x"), "ingest.hooks=[layer]")
    check(store, "layer", x.to(getattr(torch, dtype)))
    assert store.attributes["ingested"] == {"absent": ["token_id"], "context_size": SIZE}


def test_numpys_bfloat16(folder):
    """ml_dtypes' bfloat16 comes out of numpy as two bytes without a meaning."""
    np.save("x.npy", bits(acts()).view("V2"))
    check(ingest("x.npy"), "activations", acts())


def test_from_files_to_figures():
    """ingest -> train -> evaluate without a model; a second run finds all of it; a change reruns its stage alone."""
    x = acts() @ torch.randn(D, D, generator=torch.Generator().manual_seed(1))
    save("safetensors", x, "x", token_ids=TOKENS)
    ran = run("run", "ingest.path=x.safetensors", "train.exclude.token_ids=[0]")
    assert ran.status == 0, ran.out
    assert "sample    not needed" in ran.out
    assert "left out, as ingested rows have no model and no text: " in ran.out
    found = read_figures(only(Path(), "runs/evaluate/*"))
    assert found.own("h").value("rows", "fidelity", "all_rows") == 128
    held = ActivationStore.open(only(Path(), "runs/harvest/*/store"))
    zero = sum(int((held.read_provenance("holdout", "token_id", s) == 0).sum()) for s in range(2))
    assert found.own("h").value("rows", "fidelity") == 128 - zero
    assert "downstream" in found.left_out
    report = only(Path(), "runs/evaluate/*/report.html").read_text()
    assert "Left out, as there is no model and no text" in report
    sae = json.loads(only(Path(), "runs/train/*/h/sae.json").read_text())
    assert (sae["hook_name"], sae["context_size"], sae["d_in"]) == ("h", SIZE, D)
    for command in ("ingest", "harvest", "train", "evaluate"):
        again = run(command, "ingest.path=x.safetensors", "train.exclude.token_ids=[0]")
        assert " complete " in again.out and "runs  " not in again.out
    Path("moved").mkdir()
    Path("x.safetensors").rename("moved/x.safetensors")
    lines = run("status", "ingest.path=moved/x.safetensors", "train.exclude.token_ids=[0]", "train.lr=1e-4").out
    assert [line.split()[:2] for line in lines.splitlines()] == [
        ["harvest", "complete"],
        ["train", "would"],
        ["evaluate", "would"],
    ]
    assert run("verify", "ingest.path=moved/x.safetensors").status == 0


def test_token_ids_are_needed_where_they_are_excluded():
    np.save("x.npy", acts().flatten(0, 1).numpy())
    store = ingest("x.npy")
    assert store.attributes["ingested"] == {"absent": ["token_id", "context", "position"], "context_size": None}
    for excluded, way in (("token_ids=[3]", "ingest.token_ids"), ("positions=[0]", "ingest.context_size")):
        ran = run("train", "ingest.path=x.npy", f"train.exclude.{excluded}")
        assert ran.status == 1
        assert f"train.exclude.{excluded.split('=')[0]}" in ran.out
        assert way in ran.out
    np.save("tokens.npy", TOKENS.numpy())
    store = ingest("x.npy", "ingest.token_ids=tokens.npy", f"ingest.context_size={SIZE}")
    assert store.attributes["ingested"] == {"absent": [], "context_size": SIZE}
    check(store, "activations", acts())
    context, position, token = (store.read_provenance("train", n, 0) for n in ("context", "position", "token_id"))
    assert np.array_equal(token, TOKENS.numpy()[context, position])


def test_a_folder_is_taken_in_order_of_names_and_hooks_share_their_rows():
    x, y = acts(0), acts(1)
    Path("dump").mkdir()
    for name, part in (("b", slice(13, 30)), ("a", slice(0, 13)), ("c", slice(30, 40))):
        tensors = {"one": x[part], "two": y[part], "tokens": TOKENS[part]}
        torch.save(tensors, f"dump/{name}.pt") if name == "b" else safetensors.torch.save_file(
            {k: v.contiguous() for k, v in tensors.items()}, f"dump/{name}.safetensors"
        )
    Path("dump/notes.txt").write_text("no activations")
    store = ingest("dump")
    check(store, "one", x)
    check(store, "two", y)
    assert store.geometry.hooks == ("one", "two")
    assert ingest("dump", "ingest.hooks=[two]").geometry.hooks == ("two",)
    assert "no array 'three' there" in error("dump", "ingest.hooks=[one, three]")


def test_a_cache_of_saelens():
    """What cache_activations_runner leaves: a column of (context_size, d_in) for the hook, and token_ids."""
    from datasets import Array2D, Dataset, Features, Sequence, Value, disable_progress_bars

    disable_progress_bars()
    hook = "blocks.3.hook_resid_post"
    features = Features(
        {hook: Array2D((SIZE, D), "float32"), "token_ids": Sequence(Value("int32"), length=SIZE)}  # as SAELens 6 has it
    )
    Dataset.from_dict({hook: acts(), "token_ids": TOKENS}, features=features).save_to_disk("cache", num_shards=2)
    store = ingest("cache")
    check(store, hook, acts())
    assert store.attributes["ingested"] == {"absent": [], "context_size": SIZE}
    arrow = sorted(Path("cache").glob("*.arrow"))[0]
    arrow.write_bytes(arrow.read_bytes()[:3000])
    assert "cache: damaged, or cut short" in error("cache", "ingest.seed=1")


def test_contexts_of_any_length():
    """A file each, or told by a column; rows of one context never lie on both sides."""
    x = acts().flatten(0, 1)
    lengths = np.random.default_rng(0).integers(1, 40, 60)
    lengths = lengths[np.cumsum(lengths) <= len(x)]
    ends = np.cumsum(lengths)
    Path("docs").mkdir()
    for i, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
        np.save(f"docs/{i:03d}.npy", x[start:end].numpy())
    number = np.repeat(np.arange(len(lengths)), lengths)
    save("safetensors", x[: ends[-1]], "column", context=torch.from_numpy(number % 20))
    for store, known in (
        (ingest("docs", "ingest.file_is_context=true"), number),
        (ingest("column.safetensors"), number % 20),
    ):
        found = rows_by_place(store, store.geometry.hooks[0])
        inputs = {bits(row).tobytes(): int(n) for row, n in zip(x, known, strict=False)}
        sides = {(inputs[row.tobytes()], split) for (split, _, _), row in found.items()}
        assert len({context for context, _ in sides}) == len(sides) > 5
        assert {context for _, context, _ in found} == {context for context, _ in sides}
        assert store.attributes["ingested"] == {"absent": ["token_id"], "context_size": None}


def test_shards_that_waste_rows_are_warned_of():
    np.save("x.npy", acts().flatten(0, 1)[:600].numpy())
    ran = run("ingest", "ingest.path=x.npy", "ingest.shard_rows=256", "ingest.holdout_fraction=0.1")
    assert ran.status == 0, ran.out
    assert (
        "ingest: warning: of 600 rows 256 are for training, 256 held out (43%; ingest.holdout_fraction is 10%), "
        "88 left out, as splits hold whole shards of ingest.shard_rows = 256 rows" in ran.out
    )
    ran = run("ingest", "ingest.path=x.npy", "ingest.shard_rows=128", "ingest.holdout_fraction=0.25")
    assert "384 are for training, 128 held out (21%; ingest.holdout_fraction is 25%), 88 left out" in ran.out


def test_what_is_left_out_is_said_and_an_interrupted_ingest_ends_with_the_same_bytes():
    x = acts().flatten(0, 1)[:600]
    np.save("x.npy", x.numpy())
    ran = run("ingest", "ingest.path=x.npy")
    assert ran.status == 0, ran.out
    assert re.search(r"rows_left_out +24\n", ran.out)
    assert "ingest: warning" not in ran.out
    harvest = only(Path(), "runs/harvest/*")
    before = contents(harvest / "store")
    (harvest / "manifest.json").unlink()
    (harvest / "store/train/shards/00002.json").unlink()
    (harvest / "store/train/activations/acts/c/2/0").write_bytes(b"half a sh")
    assert run("ingest", "ingest.path=x.npy").status == 0
    assert contents(harvest / "store") == before


def test_rows_that_do_not_fit_on_the_disk_are_refused_before_any_is_written(monkeypatch):
    np.save("x.npy", acts().flatten(0, 1)[:600].numpy())
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 0, 20_000))
    ran = run("ingest", "ingest.path=x.npy")
    assert ran.status == 1 and not list(Path().glob("runs/harvest/*/store/*/shards/*"))
    assert "shards are still to be written, " in ran.out and "20 kB free" in ran.out
    assert "fewer files in ingest.path" in ran.out


def hostile_pt(path: str, value: object) -> None:
    """A file of torch.save's form whose table of tensors is this object's pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_no_code_is_run():
    hostile_pt("x.pt", {"h": Code()})
    assert "x.pt: holds more than tensors (classes or code, which are never run)" in error("x.pt")
    np.save("x.npy", np.array([[Code()]], dtype=object), allow_pickle=True)
    assert "x.npy: damaged" in error("x.npy")
    Path("renamed.safetensors").write_bytes(Path("x.pt").read_bytes())
    assert "renamed.safetensors: damaged" in error("renamed.safetensors")
    assert not Path("executed").exists()


def npy_header(shape: str, descr: str = "<f4") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def test_headers_that_announce_terabytes():
    for shape in ("(1000000000, 4096)", "(4294967296, 4294967296, 16)", "(-1, 4)", "(10, 4)", "(0, 4)"):
        Path("x.npy").write_bytes(npy_header(shape) + bytes(100))
        assert error("x.npy").startswith("x.npy: ")
    header = json.dumps({"h": {"dtype": "F32", "shape": [10**9, 4096], "data_offsets": [0, 4 * 4096 * 10**9]}}).encode()
    Path("x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "x.safetensors: damaged, or cut short" in error("x.safetensors")
    Path("x.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "x.safetensors: damaged, or cut short" in error("x.safetensors")
    torch.save(torch.zeros(1).expand(10**9, 4096), "x.pt")
    assert "x.pt: '' of shape (1000000000, 4096)" in error("x.pt")
    with zipfile.ZipFile("x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    assert "x.pt: not as torch.save writes it" in error("x.pt")


def test_settings_of_the_wrong_kind():
    ran = pipeline("status", "ingest.path=x.npy")
    assert ran.status == 2
    assert "model: not together with ingest" in ran.out
    ran = pipeline("ingest")
    assert ran.status == 2
    assert "has no section `ingest`" in ran.out
    ran = run("ingest", "ingest.context_size=4", "ingest.file_is_context=true")
    assert "context_size or file_is_context, not both" in ran.out
    assert "chunk_rows: 33: must divide shard_rows = 64" in run("ingest", "ingest.chunk_rows=33").out
    np.save("x.npy", acts().numpy())
    assert "there is no model and no text" in run("export", "ingest.path=x.npy").out
    assert "have no such stage" in pipeline("path", "sample", "ingest.path=x.npy", config=INGEST).out
