"""Other readers of Zarr v3 open the stores."""

import json
import os
import subprocess

import numpy as np
import pytest
import tensorstore
import zarr
from test_array_files import FORMS, SHAPES, shard_rows, write

G = SHAPES["usual"]
READ = """
import json, sys, zarr
group = zarr.open_group(sys.argv[1], mode="r")
print(json.dumps([zarr.__version__, {n: group[n][:].tolist() for n in sys.argv[2:]}]))
"""


def expected(name: str) -> np.ndarray:
    """An array of the train split."""
    shards = [shard_rows(G, shard) for shard in range(G.train_shards)]
    if name.endswith("acts"):
        return np.concatenate([rows.acts["h"] for rows in shards])
    if name.endswith("norm"):
        return np.concatenate([rows.norms["h"] for rows in shards])
    return np.concatenate([getattr(rows, name.split("/")[-1]) for rows in shards])


@pytest.mark.parametrize("form", FORMS)
def test_tensorstore_and_zarr_read_the_same(tmp_path, form):
    path = write(tmp_path, G._replace(stored=form)).path
    rows = ["train/h/acts_q", "train/h/acts_scale"] if form == "int8" else ["train/h/acts"]
    for name in (*rows, "train/h/norm", "train/row/token_id", "train/row/context", "train/row/position"):
        kvstore = {"driver": "file", "path": str(path / name)}
        read = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result().read().result()
        assert np.array_equal(read, zarr.open_array(str(path / name), mode="r")[:])
        if "_" not in name.split("/")[-1] or "row" in name:
            assert np.array_equal(read, expected(name))


def test_the_newest_zarr_reads_it(tmp_path):
    """Its own interpreter: zarr 3.4 wants a newer Python than this project. ZARR_PYTHON names one that has it."""
    python = os.environ.get("ZARR_PYTHON")
    if not python:
        pytest.skip("ZARR_PYTHON names no Python 3.12 with zarr 3.4")
    for form in ("bf16", "bf16-zstd"):
        path = write(tmp_path / form, G._replace(stored=form)).path
        names = ["train/h/acts", "train/row/token_id"]
        command = [python, "-W", "ignore", "-c", READ, str(path), *names]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        version, read = json.loads(ran.stdout)
        assert tuple(map(int, version.split(".")[:2])) >= (3, 4)
        assert all(np.array_equal(read[name], expected(name)) for name in names)
