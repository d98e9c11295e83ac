"""What ReasonScore costs at several widths, against the SAE's own encoding of the same rows.

    .venv/bin/python benchmarks/reason_score.py [--rows 8192] [--repeats 3]

Prints JSON: for each d_sae, CPU seconds (median of alternating runs) of encoding alone and of the whole accumulation,
and their ratio; the number of model passes. Random rows and weights at d_in 576; ten words.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate.reason_score import WordSums
from evaluate.subject import feed
from harvest.activation_rows import RowBatch
from train.checkpoint import SavedSae
from train.exclusion import InputStatistics
from train.standard import Standard

D_IN, WORDS, BATCH, REFERENCE_FEATURES = 576, 10, 2048, 48


def cpu_seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def measure(d_sae: int, rows: int, repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    saved = SavedSae(Standard.initial(D_IN, d_sae), "", InputStatistics(1.0, 1.0, None), {})
    x_BD = torch.randn(rows, D_IN, generator=generator).bfloat16()
    inside = np.random.default_rng(0).random((WORDS, rows)) < 0.004
    number = np.arange(rows)
    whole = RowBatch("holdout", {"": x_BD}, *([number] * 5), np.ones(rows, bool))
    batches = [whole.at(slice(start, start + BATCH)) for start in range(0, rows, BATCH)]

    def read(*readers: WordSums) -> None:
        feed(saved, batches, readers)

    def score() -> None:
        read(WordSums(saved, WORDS, lambda rows: (inside[:, rows.position], rows.kept), BATCH))

    times = {"encode": [], "reason_score": []}
    for _ in range(repeats + 1):
        times["encode"].append(cpu_seconds(read))
        times["reason_score"].append(cpu_seconds(score))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "d_sae": d_sae,
        "encode_cpu_seconds": round(medians["encode"], 3),
        "reason_score_cpu_seconds": round(medians["reason_score"], 3),
        "ratio": round(medians["reason_score"] / medians["encode"], 3),
        "reference_model_passes": -(-d_sae // REFERENCE_FEATURES),
        "model_passes": 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    results = [measure(d_sae, options.rows, options.repeats) for d_sae in (1024, 4096, 16384)]
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(json.dumps({"rows": options.rows, "results": results, "torch": torch.__version__, **machine}, indent=2))


if __name__ == "__main__":
    main()
