"""All stages at the 8B shape: a model of random weights on disk, made-up text, and the paper's width of SAE.

The commands are the pipeline's own; their seconds count the start of Python and the reading of the model. Of the
evaluation each part is timed alone, with torch's peak of memory. It runs twice: metrics.json must be the same bytes.
"""

import gc
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import evaluate.run as evaluation
from benchmarks.gpu.check import ROOT, Place, finish, start
from benchmarks.gpu.harvest import NARROW, memory
from benchmarks.harvest_throughput import R1_LLAMA_8B
from pipeline.cli import app

sys.path.insert(0, str(ROOT / "tests"))

import tiny

PARTS = {  # of evaluate.run: what is timed
    "load the model": "load_model",
    "rows, ReasonScore, activity": "feed",
    "loss": "downstream.analyse",
    "token injection": "token_injection.analyse",
    "pages": "pages",
    "steering": "steering.analyse",
    "ablation": "ablation.analyse",
}


def make_model(place: Place, folder: Path) -> None:
    """Random weights of one seed, and the tokenizer of the tiny settings."""
    narrow: dict[str, Any] = {}
    if not place.on_gpu:
        narrow = {**NARROW, "head_dim": 16, "vocab_size": 4096, "num_hidden_layers": 3}
    torch.manual_seed(0)
    with place.device:
        made = LlamaForCausalLM._from_config(LlamaConfig(**R1_LLAMA_8B.to_dict() | narrow), dtype=torch.bfloat16)
    made.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    made.save_pretrained(folder, max_shard_size="2GB")  # several files, as models on the hub: hashed at once
    tiny.tokenizer().save_pretrained(folder)


def settings(place: Place, model: Path) -> dict[str, Any]:
    """128 steps at full width."""
    s, layer = place.sizes, 19 if place.on_gpu else 1
    train, holdout = (512, 128) if place.on_gpu else (64, 16)
    sources = [
        {"name": "chat", "path": "chat.jsonl", "rows": "conversation", "share": 0.5},
        {"name": "reasoning", "path": "reasoning.jsonl", "rows": "reasoning", "share": 0.5},
    ]
    return {
        "model": {"name": str(model)},
        "sample": {
            "sources": sources,
            "template": "chatml",
            "context_size": s.context_size,
            "shard_contexts": s.shard_contexts,
            "train_tokens": train * s.context_size,
            "holdout_tokens": holdout * s.context_size,
            "holdout_fraction": 0.25,
        },
        "harvest": {
            "hooks": [f"model.layers.{layer}"],
            "batch_contexts": min(16, s.shard_contexts),
            "chunk_rows": min(1024, s.context_size * s.shard_contexts),
        },
        "train": {
            "sae": {"kind": "topk", "k": 86 if place.on_gpu else 8, "d_sae": s.d_sae},
            "batch_size": s.batch,
            "epochs": 1,
            "lr": 1e-4,
            "window_shards": 2,
            "pool_rows": 32 * s.batch,
        },
        "evaluate": {
            "batch_rows": s.batch,
            "downstream": {"contexts": holdout // 2, "batch_contexts": 8},
            "reason_score": {"words": ["wait", "therefore", "let me"], "sources": ["reasoning"]},
            "token_injection": {} if place.on_gpu else {"features": 2, "texts": 4, "tokens": 8},
            "steering": {"max_new_tokens": 24 if place.on_gpu else 4, "built_in_prompts": 6},
        },
    }


def write_text(folder: Path, documents: int) -> None:
    """Both sources, of long documents."""
    rng = random.Random(0)
    chats = [
        {
            "conversation_id": str(i),
            "conversation": [
                {"role": role, "content": tiny.text(rng, rng.randint(50, 300))} for role in ("user", "assistant")
            ],
        }
        for i in range(documents)
    ]
    tiny.write_jsonl(folder / "chat.jsonl", chats)
    reasoning = [
        {
            "problem": f"{i} {tiny.text(rng, 12)}",
            "deepseek_reasoning": tiny.text(rng, rng.randint(100, 500)),
            "deepseek_solution": tiny.text(rng, 8),
        }
        for i in range(documents)
    ]
    tiny.write_jsonl(folder / "reasoning.jsonl", reasoning)


def timed(place: Place, name: str, work: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What the work gives; notes its seconds, and GB of the device at most."""
    if place.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = work(*arguments, **keywords)
    if place.on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 1e9 if place.on_gpu else 0.0
    place.note(**{f"evaluate, {name}": {"s": round(time.perf_counter() - began, 2), "peak_gb": round(peak, 2)}})
    return result


def evaluate_timed(place: Place, arguments: list[str]) -> None:
    """The evaluate stage in this process."""
    before = []
    for name, path in PARTS.items():
        *inside, last = path.split(".")
        owner = getattr(evaluation, inside[0]) if inside else evaluation
        before.append((owner, last, getattr(owner, last)))
        setattr(owner, last, partial(timed, place, name, getattr(owner, last)))
    try:
        app(arguments, standalone_mode=False)
    finally:
        for owner, last, was in before:
            setattr(owner, last, was)


def run(place: Place) -> None:
    """The check."""
    model = (memory() or place.folder) / f"random-llama-{place.folder.name}"
    try:
        began = time.perf_counter()
        make_model(place, model)
        gc.collect()
        if place.on_gpu:
            torch.cuda.empty_cache()
        place.note(model_made_s=round(time.perf_counter() - began, 1))
        write_text(place.folder, 4000 if place.on_gpu else 60)
        config = place.folder / "settings.yaml"
        config.write_text(json.dumps(settings(place, model)))
        for stage in ("sample", "harvest", "train"):
            began = time.perf_counter()
            finish(start(["pipeline", stage, "--config", str(config)], place.folder))
            place.note(**{f"{stage}_s": round(time.perf_counter() - began, 1)})
        with chdir(place.folder):
            began = time.perf_counter()
            evaluate_timed(place, ["evaluate", "--config", str(config)])
            place.note(evaluate_s=round(time.perf_counter() - began, 1))
            (made,) = (place.folder / "runs" / "evaluate").glob("[0-9a-f]*")
            first = (made / "metrics.json").read_bytes()
            sizes = {path.name: round(path.stat().st_size / 1e6) for path in made.iterdir() if path.is_file()}
            place.note(megabytes={name: size for name, size in sizes.items() if size})
            gc.collect()
            app(["evaluate", "--config", str(config), "--force", "--yes"], standalone_mode=False)
        assert (made / "metrics.json").read_bytes() == first, "a second evaluation gave other figures"
        place.note(evaluated_twice="the same bytes")
    finally:
        shutil.rmtree(model, ignore_errors=True)
