"""An SAE that SAELens trained, through `published:`, against SAELens' own evals of it.

    .venv/bin/python benchmarks/published.py
    .venv/bin/python benchmarks/published.py --runs /tmp/runs sample.train_tokens=98304    # a fifth of the harvest

SAELens' own trainer takes the rows of the default's store (the same that ours would see), which is harvested if it is
not there; what it saves stands in the place of training on the default settings, and `run_evals` measures it on the
same held-out tokens, in batches of the harvest's size, with rows rounded as the store rounds them. All rows are
counted, as SAELens does. The cross-entropies are of the model in float32 on both sides: SAELens averages them in the
model's precision, which in bfloat16 moves them by up to 2e-3. Prints JSON: both figures and their difference, relative
to SAELens'; the exit status is 1 where one is above 1e-3.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate.figures import Measured, read_figures
from harvest.activation_store import ActivationStore
from harvest.contexts import Contexts
from harvest.device import device_name, resolve_dtype
from harvest.language_model import load_model
from harvest.store_files import files_of
from pipeline.config import load
from pipeline.stages import Runs, find_runs
from train.dataloader import ActivationLoader, Position
from train.exclusion import input_statistics

CONFIG = Path("configs/smollm2.yaml")
LARGEST = 1e-3  # relative difference
PRECISE = "evaluate.downstream.compute_dtype=float32"
OF_ROWS = {  # ours, and SAELens'
    "l0": "l0",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cosine": "cossim",
}
OF_MODEL = {
    "ce_clean": "ce_loss_without_sae",
    "ce_sae_all_rows": "ce_loss_with_sae",
    "ce_zero_ablated_all_rows": "ce_loss_with_ablation",
    "ce_loss_score_all_rows": "ce_loss_score",
    "kl_sae_all_rows": "kl_div_with_sae",
}


def train_theirs(runs: Runs, steps: int, folder: Path) -> None:
    """Train a standard SAE by SAELens on the kept training rows, and save it for inference."""
    from sae_lens import SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    config, hook = runs.config, runs.config.harvest.hooks[0]
    train, store = config.train, ActivationStore.open(files_of(runs.directory("harvest")))
    limit = input_statistics(store, hook, train.exclude, train.window_shards).norm_limit
    loader = ActivationLoader(
        store, hook, train.exclude, limit, train.batch_size, train.window_shards, train.pool_rows, train.seed
    )

    def rows() -> Iterator[torch.Tensor]:
        for batch in loader.batches(Position()):
            yield batch.rows_BD.float()

    torch.manual_seed(0)
    metadata = SAEMetadata(hook_name=hook, model_name=config.model.name)
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(
            d_in=store.geometry.d_in,
            d_sae=train.sae.width(store.geometry.d_in),
            l1_coefficient=train.sae.l1_coefficient or 0.0,
            l1_warm_up_steps=steps // 20,
            normalize_activations="expected_average_only_in",
            metadata=metadata,
        )
    )
    about = SAETrainerConfig(
        steps * train.batch_size, train.batch_size, lr=train.lr, lr_end=train.lr, n_batches_for_norm_estimate=10
    )
    SAETrainer(about, sae, rows()).fit().save_inference_model(folder)


def pipeline(command: str, runs_folder: Path, *settings: str) -> str:
    """The last line that a command of the pipeline prints."""
    arguments = [sys.executable, "-m", "pipeline", command, "--config", str(CONFIG), "--runs", str(runs_folder)]
    said = subprocess.run([*arguments, *settings], check=True, stdout=subprocess.PIPE).stdout.decode()
    return said.splitlines()[-1]


def ours(runs_folder: Path, folder: Path, settings: list[str]) -> Measured:
    """The figures of `published:` on the default settings."""
    report = pipeline("run", runs_folder, *settings, PRECISE, "train=null", f"published.path={folder}")
    return read_figures(Path(report).parent).saes[0]


class Tokens:
    """What SAELens' evals ask of its ActivationsStore: batches of held-out contexts, in order."""

    def __init__(self, ids: torch.Tensor, batch: int) -> None:
        self.store_batch_size_prompts, self.context_size = batch, ids.shape[1]
        self._ids, self._next = ids, 0

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        """The next contexts."""
        self._next += batch_size
        return self._ids[self._next - batch_size : self._next]

    def reset_input_dataset(self) -> None:
        """Begin anew."""
        self._next = 0


def theirs(runs: Runs, folder: Path) -> dict[str, float]:
    """The figures of SAELens' own evals."""
    from sae_lens import SAE
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformers import AutoTokenizer

    config, hook = runs.config, runs.config.harvest.hooks[0]
    cpu, batch = torch.device("cpu"), config.harvest.batch_contexts
    contexts, downstream = Contexts(runs.directory("sample") / "contexts"), config.evaluate.downstream
    ids = torch.from_numpy(contexts.read("holdout", "tokens", 0, contexts.count("holdout")).astype("int64"))
    batches = {
        "n_eval_reconstruction_batches": (downstream.contexts if downstream else batch) // batch,
        "n_eval_sparsity_variance_batches": len(ids) // batch,
    }
    of_rows = ("compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics")
    found: dict[str, float] = {}
    for dtype, parts in (
        (resolve_dtype(config.harvest.compute_dtype, cpu), of_rows),
        (torch.float32, ("compute_kl", "compute_ce_loss")),
    ):
        model = load_model(config.model, None, [hook], dtype, cpu, with_head=True)
        model.modules[hook].register_forward_hook(lambda _module, _inputs, output: output.bfloat16().to(output.dtype))
        proxy = HookedProxyLM(model.model, AutoTokenizer.from_pretrained(config.model.name), hook_names=[hook])
        chosen: dict[str, Any] = dict.fromkeys(parts, True)
        evals = EvalConfig(batch, **batches, **chosen)
        sae, tokens = SAE.load_from_disk(folder), cast(Any, Tokens(ids, batch))
        metrics, _ = run_evals(sae, tokens, proxy, ActivationScaler(), evals, exclude_special_tokens=False)
        found |= {name: value for group in metrics.values() for name, value in group.items()}
    return found


def main() -> int:
    """Train, evaluate both ways, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("settings", nargs="*", metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    runs = find_runs(load(CONFIG, options.settings), options.runs)[0]
    for stage in ("sample", "harvest"):
        pipeline(stage, options.runs, *options.settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sae"
        start = time.process_time()
        train_theirs(runs, options.steps, folder)
        seconds = time.process_time() - start
        found, expected = ours(options.runs, folder, options.settings), theirs(runs, folder)
    compared = {}
    for name, saelens in (OF_ROWS | OF_MODEL).items():
        figure = found.figure(name, rows="all_rows") or found.figure(name, "downstream")
        value = figure.value if figure and figure.value is not None else float("nan")
        compared[name] = {"ours": value, "saelens": expected[saelens], "relative": value / expected[saelens] - 1}
    worst = max(abs(each["relative"]) for each in compared.values())
    about = {"steps": options.steps, "train_cpu_seconds": round(seconds), "worst_relative": worst}
    machine = {"device": device_name(torch.device("cpu")), "date": date.today().isoformat()}
    print(json.dumps({**about, "figures": compared, **machine}, indent=1))
    return int(not worst <= LARGEST)


if __name__ == "__main__":
    sys.exit(main())
