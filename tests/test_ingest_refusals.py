"""Files of activations that cannot be taken: each is named, with what is wrong and the way out."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
from test_ingest import acts, error, run, save

from harvest.activation_files import Array
from harvest.files import UserError
from harvest.given_rows import LaidRows


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["npy", "safetensors", "pt"])
def test_files_that_were_cut_short_or_are_empty(kind):
    path = Path(save(kind, acts(), "x"))
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 20):
        path.write_bytes(whole[:size])
        assert error(str(path)).startswith(f"{path}: ")
    path.write_bytes(b"")
    assert f"{path}: empty" in error(str(path))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((640, 8), np.int64), "is int64; float32, float16 or bfloat16 is needed"),
        (np.zeros((640, 8), np.float64), "is float64"),
        (np.zeros((640, 8), np.complex64), "is complex64"),
        (np.zeros((640, 8), "V3"), "is |V3"),
        (np.zeros((640, 8), ">f4"), "is >f4"),
        (np.zeros(640, np.float32), "of shape (640,); (rows, d_in) or (contexts, context_size, d_in)"),
        (np.zeros((2, 2, 4, 8), np.float32), "of shape (2, 2, 4, 8)"),
        (np.zeros((10, 0), np.float32), "of shape (10, 0)"),
        (np.asfortranarray(np.zeros((640, 8), np.float32)), "fortran_order"),
        (np.zeros((100, 8), np.float32), "less than a shard of ingest.shard_rows = 64"),
    ],
)
def test_arrays_of_another_kind(x, message):
    np.save("x.npy", x)
    assert message in error("x.npy")


def test_files_that_do_not_fit_together():
    Path("dump").mkdir()
    np.save("dump/a.npy", np.ones((320, 8), np.float32))
    np.save("dump/b.npy", np.ones((320, 6), np.float32))
    assert "dump/b.npy: of shape (320, 6); dump/a.npy is of (320, 8)" in error("dump")
    np.save("dump/b.npy", np.ones((20, 16, 8), np.float32))
    assert "dump/b.npy: of shape (20, 16, 8)" in error("dump")
    np.save("dump/b.npy", np.ones((321, 8), np.float32))
    assert "ingest.context_size: 16: dump/b.npy has 321 rows, not whole" in error("dump", "ingest.context_size=16")
    np.save("tokens.npy", np.zeros(640, np.int32))
    assert "640 token ids; the activations have 641 rows" in error("dump", "ingest.token_ids=tokens.npy")
    np.save("tokens.npy", np.full(641, -100))
    assert "tokens.npy: token_id -100 at row 0" in error("dump", "ingest.token_ids=tokens.npy")
    np.save("tokens.npy", np.zeros(641, np.float32))
    assert "whole numbers are needed" in error("dump", "ingest.token_ids=tokens.npy")
    save("safetensors", acts(), "x", context=torch.zeros(3, dtype=torch.int64))
    assert "'context' is of shape (3,); (40, 16) expected" in error("x.safetensors")
    Path("mixed").mkdir()
    save("safetensors", acts(), "mixed/a", token_id=torch.zeros(40, 16, dtype=torch.int64))
    save("safetensors", acts(), "mixed/b")
    assert "mixed/b.safetensors: holds the columns none, the first file ('token_id',)" in error("mixed")
    save("safetensors", acts(), "ids", token_id=torch.zeros(640, dtype=torch.int64))
    assert "ingest.token_ids: 'tokens.npy': ids.safetensors holds token ids itself; leave one out" in error(
        "ids.safetensors", "ingest.token_ids=tokens.npy"
    )
    np.save("y.npy", acts().numpy())
    assert "which says itself what a context is" in error("y.npy", "ingest.context_size=16")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_a_value_that_is_no_number_is_named_by_file_and_row(bad):
    Path("dump").mkdir()
    x = acts().flatten(0, 1)
    x[400, 3] = bad  # 3.4e38 rounds to infinity in bfloat16
    np.save("dump/a.npy", x[:300].numpy())
    np.save("dump/b.npy", x[300:].numpy())
    message = run("ingest", "ingest.path=dump").out
    assert "dump/b.npy: NaN or infinity (as bfloat16) in 'activations' at row 100" in message
    assert not list(Path("runs").glob("harvest/*/manifest.json"))


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "no such file or folder"), ("empty", "no .npy, .safetensors, .pt, .pth file, and no saved data set")],
)
def test_paths_without_activations(path, message):
    Path("empty").mkdir()
    assert f"ingest.path: '{path}': {message}" in error(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"h": (640, 8), "tokens": (640,), "input_ids": (640,)}, "holds token ids twice (input_ids, tokens); keep one"),
        ({"tokens": (640,)}, "holds no array of activations, but 'tokens'; ingest.path takes the activations"),
        ({"one": (640, 8), "two": (320, 8)}, "'two' is of shape (320, 8), 'one' of (640, 8); they must be equal"),
    ],
)
def test_arrays_of_one_file_that_do_not_fit(tensors, message):
    columns = ("tokens", "input_ids")
    made = {n: torch.zeros(s, dtype=torch.int64 if n in columns else torch.float32) for n, s in tensors.items()}
    safetensors.torch.save_file(made, "x.safetensors")
    assert f"x.safetensors: {message}" in error("x.safetensors")


def test_token_ids_that_are_not_one_array():
    np.save("x.npy", acts().numpy())
    safetensors.torch.save_file({name: torch.zeros(640, dtype=torch.int64) for name in "ab"}, "t.safetensors")
    said = error("x.npy", "ingest.token_ids=t.safetensors")
    assert "t.safetensors: no one array of token ids there, but a, b" in said
    torch.save({}, "t.pt")
    assert "t.pt: no one array of token ids there, but none" in error("x.npy", "ingest.token_ids=t.pt")


def test_a_context_of_more_rows_than_positions_are_counted():
    np.save("x.npy", np.zeros((65_537, 1), np.float32))
    said = error("x.npy", "ingest.file_is_context=true")
    assert "ingest.path: 'x.npy': a context of 65,537 rows; the store counts to 65,536" in said


def test_a_folder_of_token_ids_alone():
    Path("dump").mkdir()
    np.save("dump/tokens.npy", np.zeros(640, np.int32))
    assert "ingest.path: 'dump': holds nothing but the files of ingest.token_ids" in error(
        "dump", "ingest.token_ids=dump/tokens.npy"
    )


@pytest.mark.parametrize("value", [[torch.zeros(640, 8)], 7])
def test_a_pt_file_of_neither_a_tensor_nor_a_dict(value):
    torch.save(value, "x.pt")
    assert f"x.pt: holds a {type(value).__name__}; save a tensor, or a dict of tensors" in error("x.pt")


def test_columns_of_a_data_set_that_are_no_numbers_are_passed_over():
    """Text beside the activations is left out, and not called damage."""
    data = {"h": acts().flatten(0, 1).tolist(), "text": ["a"] * 640, "tags": [["a", "b"]] * 640}
    features = {"h": datasets.List(datasets.Value("float32"), length=8), "text": datasets.Value("string")}
    features["tags"] = datasets.List(datasets.Value("string"))
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(data, features=datasets.Features(features)).save_to_disk("set")
    assert run("ingest", "ingest.path=set").status == 0
    datasets.load_from_disk("set").remove_columns("h").save_to_disk("text")
    assert "text: holds no array of activations" in error("text")


def test_rows_that_cannot_be_read_any_more_are_named():
    def read(start: int, _stop: int) -> torch.Tensor:
        raise OSError(f"input/output error at {start}")

    paths = [Path("a.npy"), Path("b.npy")]
    rows = LaidRows(lambda _path: {"h": Array((20, 16, 8), torch.float32, read)}, paths, "h", [320, 320], 1)
    with pytest.raises(UserError, match=r"b\.npy: cannot be read at row 80: input/output error at 5"):
        rows.read(400, 410)
