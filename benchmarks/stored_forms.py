"""The same SAE trained on a store in each of its forms: bytes, and what the SAE is worth on the exact rows.

    .venv/bin/python benchmarks/stored_forms.py runs/harvest/*/store

Converts the store (of form bf16, which is only read) into the other forms in a temporary folder, trains an SAE of
the embedded default's recipe on each, and measures all of them on the held-out rows of the store given.
Prints JSON: bytes a row, of the rows that an SAE reads their relative squared error, and for each SAE explained
variance and L0.
"""

import argparse
import json
import sys
import tempfile
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harvest.activation_store import ActivationStore, ShardRows
from harvest.device import device_name, resolve_device, resolve_dtype
from harvest.stored_forms import FORMS
from train.config import ExcludeConfig, SaeConfig, TrainConfig
from train.dataloader import ActivationLoader, Position, heldout_rows
from train.exclusion import InputStatistics, input_statistics
from train.kinds import new_sae
from train.trainer import Trainer


def convert(source: ActivationStore, folder: Path, form: str, train_shards: int) -> ActivationStore:
    """The first training shards and all held-out ones in another form."""
    g = source.geometry._replace(stored=form, train_shards=train_shards)
    store = ActivationStore.create(folder, g, {})
    for split in ("train", "holdout"):
        for shard in range(g.shards(split)):
            chunks = range(shard * g.chunks_per_shard, (shard + 1) * g.chunks_per_shard)
            acts = {h: torch.empty(g.shard_rows, g.d_in, dtype=torch.uint16).numpy() for h in g.hooks}
            for hook, rows in acts.items():
                source.read_chunks(split, hook, chunks, rows)
            norms = {hook: source.read_norms(split, hook, shard) for hook in g.hooks}
            provenance = (source.read_provenance(split, name, shard) for name in ("token_id", "context", "position"))
            store.write_shard(split, shard, ShardRows(acts, norms, *provenance))
    return store


def file_bytes(store: ActivationStore) -> int:
    """Of rows alone, without norms and provenance."""
    files = [
        file for shard in range(store.geometry.train_shards) for file in store.record("train", shard)["files"].items()
    ]
    return sum(about["bytes"] for name, about in files if "/acts" in name)


def trained(
    store: ActivationStore, hook: str, config: TrainConfig, found: InputStatistics, device: torch.device
) -> Trainer:
    g = store.geometry
    rows = g.train_shards * g.shard_rows
    steps = int(rows * (config.epochs or 1)) // config.batch_size
    trainer = Trainer(new_sae(config, g.d_in, found.scale, device), config, steps, rows, resolve_dtype("auto", device))
    loader = ActivationLoader(
        store, hook, config.exclude, found.norm_limit, config.batch_size, config.window_shards, config.pool_rows, 0
    )
    for batch in islice(loader.batches(Position()), steps):
        trainer.step(batch.rows_BD)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--d-sae", type=int, default=1152)
    parser.add_argument("--shards", type=int, help="training shards to use; all by default")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    source = ActivationStore.open(options.store)
    hook = source.geometry.hooks[0]
    shards = min(options.shards or source.geometry.train_shards, source.geometry.train_shards)
    config = TrainConfig(
        sae=SaeConfig(d_sae=options.d_sae, l1_coefficient=5),
        epochs=options.epochs,
        batch_size=2048,
        lr=1e-3,
        exclude=ExcludeConfig(),
        window_shards=4,
        pool_rows=65_536,
        sparse_below=0.1,
    )
    found = input_statistics(source, hook, config.exclude, config.window_shards)
    exact = heldout_rows(source, hook, config.exclude, found.norm_limit, 65_536)
    forms: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for form in FORMS:
            store = convert(source, Path(temporary) / form, form, shards)
            read = heldout_rows(store, hook, config.exclude, found.norm_limit, 65_536)
            error = (read.float() - exact.float()).square().sum() / exact.float().square().sum()
            trainer = trained(store, hook, config, found, device)
            validation = trainer.validate(exact.to(device))
            forms[form] = {
                "bytes_per_row": round(file_bytes(store) / (shards * source.geometry.shard_rows), 1),
                "relative_squared_error": float(f"{error:.3g}"),
                "explained_variance": round(validation.explained_variance, 4),
                "l0": round(validation.l0, 2),
                "loss": round(validation.loss, 3),
            }
    for form in forms.values():
        form["times_smaller"] = round(forms["bf16"]["bytes_per_row"] / form["bytes_per_row"], 3)
    shape = {"d_in": source.geometry.d_in, "d_sae": options.d_sae, "rows": shards * source.geometry.shard_rows}
    report = {
        "benchmark": "stored_forms",
        "shape": shape | {"epochs": options.epochs},
        "forms": forms,
        "machine": {"device": device_name(device), "torch": torch.__version__},
        "date": str(date.today()),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
