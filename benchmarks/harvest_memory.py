"""Peak memory of a harvest's worker at one token budget and at ten times that.

    .venv/bin/python benchmarks/harvest_memory.py

Runs `pipeline harvest`, each in a process of its own, on a random one-layer Llama of `--d-in` and made-up text. Prints
JSON: tokens, bytes of the store and peak resident memory of both, the ratio of the peaks, and the machine.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CONTEXT, SHARD_CONTEXTS, HOLDOUT_SHARDS = 64, 64, 1


def make_assets(folder: Path, d_in: int, words: int) -> None:
    import tiny
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_in,
        intermediate_size=2 * d_in,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    tiny.write_jsonl(folder / "text.jsonl", [{"text": tiny.text(rng, 400)} for _ in range(words // 400)])
    settings = {
        "model": {"name": str(folder / "model")},
        "sample": {
            "sources": [{"name": "text", "path": str(folder / "text.jsonl"), "rows": "text", "share": 1}],
            "template": "chatml",
            "context_size": CONTEXT,
            "shard_contexts": SHARD_CONTEXTS,
            "train_tokens": 1,
            "holdout_tokens": HOLDOUT_SHARDS * SHARD_CONTEXTS * CONTEXT,
            "holdout_fraction": 0.2,
        },
        "harvest": {"hooks": ["model.layers.0"], "batch_contexts": 8, "threads": 2, "chunk_rows": 1024},
        "train": {"sae": {"expansion_factor": 1, "l1_coefficient": 1}, "epochs": 1},
    }
    (folder / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML


def peak(folder: Path, shards: int) -> dict[str, float]:
    """Harvest so many training shards; tokens, bytes of the store, and peak memory of the process."""
    tokens = shards * SHARD_CONTEXTS * CONTEXT
    arguments = ["--config", str(folder / "settings.yaml"), f"sample.train_tokens={tokens}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    for stage in ("sample", "harvest"):
        command = [sys.executable, "-m", "pipeline", stage, *arguments]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{stage} failed")
    stores = [path.parent for path in folder.glob("runs/harvest/*/store")]
    newest = max(sum(p.stat().st_size for p in store.rglob("*") if p.is_file()) for store in stores)
    return {"tokens": tokens, "store_mb": round(newest / 1e6, 1), "peak_mb": round(usage.ru_maxrss / 1024, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--shards", type=int, default=10, help="of the smaller budget")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_assets(folder, options.d_in, 20 * options.shards * SHARD_CONTEXTS * CONTEXT)
        once, tenfold = (peak(folder, shards) for shards in (options.shards, 10 * options.shards))
    figures = {"d_in": options.d_in, "shard_rows": SHARD_CONTEXTS * CONTEXT, "once": once, "tenfold": tenfold}
    figures |= {"peak_ratio": round(tenfold["peak_mb"] / once["peak_mb"], 3)}
    print(json.dumps(figures | {"cores": os.cpu_count(), "date": date.today().isoformat()}, indent=1))


if __name__ == "__main__":
    main()
