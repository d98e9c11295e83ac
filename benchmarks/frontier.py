"""What each kind of SAE is worth at one L0, trained here and by SAELens' own trainer on the same batches.

    make harvest && .venv/bin/python -m benchmarks.frontier            # every kind: an hour and a half on two cores
    .venv/bin/python -m benchmarks.frontier --kinds batchtopk --sides ours --l0 34

Takes the store of a configuration (the default's: SmolLM2-135M, layer 17), its width, batch size, epochs and
exclusions. Both sides get the same rows in the same order and the same schedule (constant, then linear to 0), at each
lr of --lr; of a side and kind the one that explains most variance within 1 of the L0 counts, else the nearest.
Kinds with k get that L0 as k; standard and jumprelu have a grid of penalties, which a line states. SAELens' jumprelu is
trained to the target by its quadratic penalty, at several bandwidths and starting thresholds.

Prints a JSON line for each SAE, and for each kind what was best: held-out L0, explained variance, dead features,
ce_loss_score (held-out contexts, all rows through the SAE but the excluded ones), CPU-seconds of training.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluate.downstream import downstream
from harvest.activation_store import ActivationStore
from harvest.contexts import Contexts
from harvest.device import device_name
from harvest.language_model import load_model
from harvest.store_files import files_of
from pipeline.config import load as load_config
from pipeline.stages import find_runs
from train.checkpoint import SavedSae
from train.config import TrainConfig
from train.dataloader import ActivationLoader, Position, heldout_rows
from train.exclusion import input_statistics, mean_row
from train.kinds import new_sae
from train.saelens import CONFIG, SaelensConfig
from train.trainer import Trainer

LR = (1e-3, 2e-3)
GRIDS: dict[str, list[dict[str, Any]]] = {  # of ours
    "standard": [{"l1_coefficient": 5.0}],
    "jumprelu": [{"target_l0": 33.0}, {"target_l0": 32.0}],
}
THEIR_GRIDS: dict[str, list[dict[str, Any]]] = {
    "standard": [{"l1_coefficient": 5.0}],
    "jumprelu": [
        {"jumprelu_bandwidth": bandwidth, "jumprelu_init_threshold": threshold, "l0_coefficient": 1.0}
        for bandwidth, threshold in ((0.05, 0.01), (0.5, 0.1), (2.0, 1.0))
    ],
}


class Data(NamedTuple):
    """What both sides train on and are measured on."""

    config: Any
    store: ActivationStore
    hook: str
    statistics: Any
    batches: list[Tensor]  # (B, D) bfloat16, as stored
    heldout_BD: Tensor
    tokens: np.ndarray  # held-out contexts (contexts, S)


def load(options: argparse.Namespace) -> Data:
    """The store of a configuration, and its batches."""
    runs = find_runs(load_config(options.config, []), options.runs)[0]
    config = runs.config.train
    store = ActivationStore.open(files_of(runs.directory("harvest")))
    hook, g = store.geometry.hooks[0], store.geometry
    statistics = input_statistics(store, hook, config.exclude, config.window_shards)
    reading = (config.batch_size, config.window_shards, config.pool_rows, config.seed)
    loader = ActivationLoader(store, hook, config.exclude, statistics.norm_limit, *reading)
    steps = config.batches(g.train_shards * g.shard_rows)
    batches = [batch.rows_BD.clone() for batch in islice(loader.batches(Position()), options.steps or steps)]
    held = heldout_rows(store, hook, config.exclude, statistics.norm_limit, g.holdout_shards * g.shard_rows)
    tokens = Contexts(runs.directory("sample") / "contexts").read("holdout", "tokens", 0, options.contexts)
    return Data(runs.config, store, hook, statistics, batches, held, tokens)


def ours(data: Data, kind: str, hyperparameters: dict[str, Any], lr: float) -> tuple[Any, float]:
    """The trained SAE and its CPU-seconds."""
    base = data.config.train
    shape = {"kind": kind, "d_sae": base.sae.width(data.store.geometry.d_in)}
    config = TrainConfig.model_validate(base.model_dump() | {"sae": {**shape, **hyperparameters}, "lr": lr})
    sae = new_sae(config, data.store.geometry.d_in, data.statistics.scale, "cpu")
    if config.sae.b_dec_init_method == "mean":
        limit = data.statistics.norm_limit
        sae = sae.centered(mean_row(data.store, data.hook, config.exclude, limit, config.window_shards))
    rows = data.store.geometry.train_shards * data.store.geometry.shard_rows
    trainer = Trainer(sae, config, len(data.batches), rows, torch.float32)
    began = time.process_time()
    for batch in data.batches:
        trainer.step(batch)
    return trainer.whole_sae(), time.process_time() - began


def saelens(data: Data, kind: str, hyperparameters: dict[str, Any], lr: float) -> tuple[Any, float]:
    """The same by SAELens' trainer, read back from what it saves for inference."""
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    base, d_in, steps = data.config.train, data.store.geometry.d_in, len(data.batches)
    d_sae = base.sae.width(d_in)
    class_name = {
        "standard": "StandardTrainingSAE", "topk": "TopKTrainingSAE", "batchtopk": "BatchTopKTrainingSAE",
        "jumprelu": "JumpReLUTrainingSAE", "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
    }[kind]  # fmt: skip
    given = {"d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": False, **hyperparameters}
    if kind == "matryoshka":
        given["matryoshka_widths"] = [d_sae // share for share in (16, 8, 4, 2, 1)]
    warm = round(steps * base.l1_warmup_fraction)
    given |= {"standard": {"l1_warm_up_steps": warm}, "jumprelu": {"l0_warm_up_steps": warm}}.get(kind, {})
    sae = getattr(saes, class_name)(getattr(saes, class_name + "Config")(**given))
    settings = SAETrainerConfig(
        steps * base.batch_size, base.batch_size, lr=lr, lr_end=0.0,
        lr_decay_steps=round(steps * base.lr_decay_fraction), device="cpu",
    )  # fmt: skip
    trainer = SAETrainer(settings, sae, data_provider=iter(()))
    began = time.process_time()
    for batch in data.batches:
        trainer.step(batch.float() * data.statistics.scale)
        trainer.n_training_steps += 1
    cpu = time.process_time() - began
    with TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        read = SaelensConfig(Path(folder) / CONFIG).read_sae(Path(folder) / "sae_weights.safetensors", 1.0)
    # Trained on scaled rows: so is it read.
    return read.__class__(read.parameters, data.statistics.scale, **read.settings()), cpu


def figures(data: Data, sae: Any, contexts: int) -> dict[str, float]:
    """Held-out figures, the same for both sides."""
    sums, fired_F = torch.zeros(3, dtype=torch.float64), torch.zeros(sae.d_sae, dtype=torch.bool)
    mean_D = data.heldout_BD.double().mean(0)
    for x_BD in data.heldout_BD.split(4096):
        f_BF = sae.encode(x_BD)
        fired_F |= (f_BF > 0).any(0)
        error = (sae.decode(f_BF) - x_BD.float()).double().square().sum()
        spread = (x_BD.double() - mean_D).square().sum()
        sums += torch.stack([(f_BF > 0).sum().double(), error, spread])
    found = {
        "l0": float(sums[0]) / len(data.heldout_BD),
        "explained_variance": float(1 - sums[1] / sums[2]),
        "dead_features": float(1 - fired_F.double().mean()),
    }
    if contexts:
        model = load_model(data.config.model, None, [data.hook], torch.float32, torch.device("cpu"), with_head=True)
        saved = SavedSae(sae, data.hook, data.statistics, {})
        result = downstream(model, saved, data.config.train.exclude, mean_D.float(), data.tokens[:contexts], {}, 4)
        found["ce_loss_score"] = result["all"]["ce_loss_score"]
    return found


def cases(side: str, kind: str, l0: float) -> list[dict[str, Any]]:
    """The hyperparameters that are tried."""
    if side == "ours":
        return GRIDS.get(kind, [{"k": round(l0)}])
    grid = THEIR_GRIDS.get(kind, [{"k": round(l0)}])
    if kind == "jumprelu":
        return [{**case, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": l0} for case in grid]
    return grid


def trained(data: Data, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each SAE, both sides of a kind in turn."""
    for kind in options.kinds:
        for lr in options.lr:
            for side in options.sides:
                for hyperparameters in cases(side, kind, options.l0):
                    with torch.set_grad_enabled(side == "saelens"):
                        sae, cpu = (ours if side == "ours" else saelens)(data, kind, hyperparameters, lr)
                    with torch.inference_mode():
                        found = figures(data, sae, options.contexts)
                    yield {"kind": kind, "side": side, "lr": lr, **hyperparameters, **found, "cpu_s": round(cpu, 1)}


def best(lines: Sequence[dict[str, Any]], l0: float) -> dict[str, Any]:
    """The line of the largest explained variance within 1 of the L0; without one, the nearest."""
    near = [line for line in lines if abs(line["l0"] - l0) <= 1]
    return (
        max(near, key=lambda line: line["explained_variance"]) if near else min(lines, key=lambda x: abs(x["l0"] - l0))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2.yaml"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--kinds", nargs="+", default=["standard", "topk", "batchtopk", "jumprelu", "matryoshka"])
    parser.add_argument("--sides", nargs="+", default=["ours", "saelens"], choices=["ours", "saelens"])
    parser.add_argument("--lr", type=float, nargs="+", default=LR)
    parser.add_argument("--l0", type=float, default=34.0)
    parser.add_argument("--contexts", type=int, default=16, help="held-out contexts of ce_loss_score; 0: none")
    parser.add_argument("--steps", type=int, help="fewer than the configuration's, to try this out")
    options = parser.parse_args()
    data = load(options)
    machine = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "frontier", "steps": len(data.batches), "machine": machine}), flush=True)
    lines = []
    for line in trained(data, options):
        lines.append(line)
        print(json.dumps(line), flush=True)
    for kind in options.kinds:
        sides = {side: [x for x in lines if x["kind"] == kind and x["side"] == side] for side in options.sides}
        summary = {side: best(found, options.l0) for side, found in sides.items()}
        if len(summary) == 2:
            summary["cpu_ratio"] = round(summary["saelens"]["cpu_s"] / summary["ours"]["cpu_s"], 2)
        print(json.dumps({"best": kind, **summary}), flush=True)


if __name__ == "__main__":
    main()
