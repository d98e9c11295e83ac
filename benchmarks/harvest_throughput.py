"""Our harvest, writing included, against the bare truncated forward pass and SAELens' ActivationsStore, in turn.

    .venv/bin/python benchmarks/harvest_throughput.py --dtype float32                    # SmolLM2 from assets/
    .venv/bin/python benchmarks/harvest_throughput.py --shape r1-llama-8b --shards 16    # a GPU; random weights

bare: the layers up to the hook, without hook or writing. SAELens, which writes nothing here, stops at the hook too.
With --compile both also with compiled layers (harvest.compile), which are compared with each other. Equal batches of
the same tokens. Each round runs every arm once; SAELens does one shard of a round's tokens. Prints JSON: tokens/s
(median of rounds), the ratios ours / other by wall time and by CPU-seconds (medians of the rounds' ratios), and the
machine.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harvest.activation_store import ActivationStore, Geometry
from harvest.config import ModelConfig
from harvest.device import device_name, resolve_device
from harvest.language_model import HookedModel, load_model
from harvest.run import write_shards
from harvest.workers import Shard

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
R1_LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)


class Took(NamedTuple):
    tokens: int
    wall: float
    cpu: float  # of all threads


class Arm(NamedTuple):
    name: str
    run: Callable[[np.ndarray], Path | None]  # the folder that it has written
    shards: int  # of each round's tokens


class RoundContexts:
    """The tokens of a round, read as a sample is."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def read(self, _split: str, _name: str, first: int, count: int) -> np.ndarray:
        return self.tokens[first : first + count]


def timed(run: Callable[[np.ndarray], Path | None], tokens: np.ndarray) -> Took:
    wall, cpu = time.perf_counter(), time.process_time()
    written = run(tokens)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    took = Took(tokens.size, time.perf_counter() - wall, time.process_time() - cpu)
    if written:
        shutil.rmtree(written)
    return took


def harvester(model: HookedModel, hook: str, options: argparse.Namespace, d_in: int) -> Callable[[np.ndarray], Path]:
    contexts, size = options.shard_contexts, options.context_size

    def run(tokens: np.ndarray) -> Path:
        chunk_rows = min(contexts * size, 1 << ((4 << 20) // (2 * d_in)).bit_length() - 1)
        geometry = Geometry((hook,), d_in, size, contexts, chunk_rows, len(tokens) // contexts, 0)
        folder = Path(tempfile.mkdtemp(dir=options.disk))
        store = ActivationStore.create(folder / "store", geometry, {})
        shards = [Shard("train", number) for number in range(geometry.train_shards)]
        write_shards(model, RoundContexts(tokens), store, shards, options.batch_contexts, 0, lambda _: None)  # pyright: ignore[reportArgumentType]
        return folder

    return run


def bare(model: HookedModel, options: argparse.Namespace) -> Callable[[np.ndarray], None]:
    @torch.inference_mode()
    def run(tokens: np.ndarray) -> None:
        on_device = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
        for batch in on_device.split(options.batch_contexts):
            model.model(batch, use_cache=False)

    return run


def saelens(model: Any, hook: str, options: argparse.Namespace, d_in: int) -> Callable[[np.ndarray], None]:
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore

    def run(tokens: np.ndarray) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store = ActivationsStore(
                model,
                Dataset.from_dict({"input_ids": tokens.astype(np.int64)}),
                streaming=False,
                hook_name=hook,
                hook_head_index=None,
                context_size=options.context_size,
                d_in=d_in,
                n_batches_in_buffer=8,
                total_training_tokens=tokens.size,
                store_batch_size_prompts=options.batch_contexts,
                train_batch_size_tokens=4096,
                prepend_bos=False,
                normalize_activations="none",
                device=options.device,
                dtype=options.dtype,
            )
            for _ in range(len(tokens) // options.batch_contexts):
                store.get_raw_llm_batch()

    return run


def hooked_transformer(causal: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """TransformerLens' model of a Llama, configured as its loader does for checkpoints without a name of its own."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    c = causal.config
    heads = c.num_attention_heads
    config = HookedTransformerConfig(
        d_model=c.hidden_size,
        d_head=c.hidden_size // heads,
        n_heads=heads,
        n_key_value_heads=c.num_key_value_heads if c.num_key_value_heads != heads else None,
        d_mlp=c.intermediate_size,
        n_layers=c.num_hidden_layers,
        n_ctx=min(c.max_position_embeddings, 2048),
        eps=c.rms_norm_eps,
        d_vocab=c.vocab_size,
        act_fn=c.hidden_act,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=c.hidden_size // heads,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        dtype=dtype,
        device=str(device),
    )
    model = HookedTransformer(config)
    model.load_state_dict(convert_llama_weights(causal, config), strict=False)
    return model.to(device).eval()


def arms(options: argparse.Namespace, device: torch.device) -> tuple[list[Arm], int]:
    """The arms, and the size of the vocabulary."""
    from sae_lens.load_model import HookedProxyLM

    dtype = DTYPES[options.dtype]
    hook = f"model.layers.{options.layer}"
    model = truncated(options, hook, dtype, device)
    d_in, vocabulary = model.model.config.hidden_size, model.model.config.vocab_size
    out = [
        Arm("ours", harvester(model, hook, options, d_in), options.shards),
        Arm("bare", bare(model, options), options.shards),
    ]
    if options.compile:
        compiled = truncated(options, hook, dtype, device)
        compiled.compile_layers(torch.zeros(options.batch_contexts, options.context_size, dtype=torch.long))
        out += [
            Arm("ours, compiled", harvester(compiled, hook, options, d_in), options.shards),
            Arm("bare, compiled", bare(compiled, options), options.shards),
        ]
    if not options.peers:
        return out, vocabulary
    if options.shape:
        with device:
            causal: Any = AutoModelForCausalLM.from_config(R1_LLAMA_8B, dtype=dtype)
    else:
        causal = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    causal = causal.to(device).eval().requires_grad_(False)
    if "saelens_hf" in options.peers:
        proxy = HookedProxyLM(causal, None, hook_names=[hook])  # pyright: ignore[reportArgumentType]
        out.append(Arm("saelens_hf", saelens(proxy, hook, options, d_in), 1))
    if "saelens_hooked_transformer" in options.peers:
        name = f"blocks.{options.layer}.hook_resid_post"
        hooked = hooked_transformer(causal, dtype, device)
        out.append(Arm("saelens_hooked_transformer", saelens(hooked, name, options, d_in), 1))
    return out, vocabulary


def truncated(options: argparse.Namespace, hook: str, dtype: torch.dtype, device: torch.device) -> HookedModel:
    """The layers up to the hook; with --shape the same random weights every time."""
    if not options.shape:
        return load_model(ModelConfig(name=options.model), None, [hook], dtype, device, offline=True)
    torch.manual_seed(0)
    sliced = LlamaConfig(**R1_LLAMA_8B.to_dict() | {"num_hidden_layers": options.layer + 1})
    with device:
        body: Any = AutoModel.from_config(sliced, dtype=dtype).eval().requires_grad_(False)
    return HookedModel(body, {hook: body.layers[options.layer]}, device, body.layers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "assets" / "smollm2-135m"), help="folder of a Llama")
    parser.add_argument("--shape", choices=["r1-llama-8b"], help="random weights of this shape instead")
    parser.add_argument("--layer", type=int, help="17; 19 with --shape")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--context-size", type=int, help="512; 1024 with --shape")
    parser.add_argument("--batch-contexts", type=int, default=8)
    parser.add_argument("--shard-contexts", type=int, help="16; 64 with --shape")
    parser.add_argument("--shards", type=int, default=2, help="of ours and bare in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compiled layers as well")
    parser.add_argument("--disk", type=Path, help="folder to write into; the system's temporary one")
    parser.add_argument("--peers", nargs="*", default=["saelens_hf", "saelens_hooked_transformer"])
    options = parser.parse_args()
    for name, usual, shaped in (("layer", 17, 19), ("context_size", 512, 1024), ("shard_contexts", 16, 64)):
        if getattr(options, name) is None:
            setattr(options, name, shaped if options.shape else usual)
    return options


def main() -> None:
    options = parse()
    device = resolve_device("auto")
    options.device = str(device)
    torch.set_num_threads(options.threads)
    every, vocabulary = arms(options, device)
    rng = np.random.default_rng(0)
    taken: dict[str, list[Took]] = {arm.name: [] for arm in every}
    for number in range(-1, options.rounds):  # the first warms up, on one batch
        contexts = options.shards * options.shard_contexts
        tokens = rng.integers(1000, vocabulary - 1000, (contexts, options.context_size), dtype=np.uint32)
        turn = every if number % 2 else every[::-1]
        for arm in turn:
            took = timed(arm.run, tokens[: options.shard_contexts * (1 if number < 0 else arm.shards)])
            if number >= 0:
                taken[arm.name].append(took)
                print(f"round {number + 1}: {arm.name} {took.tokens / took.wall:,.0f} tokens/s", file=sys.stderr)

    def ratio(other: str, field: str) -> float:
        ours = "ours, compiled" if other == "bare, compiled" else "ours"
        pairs = zip(taken[ours], taken[other], strict=True)
        return round(
            statistics.median((a.tokens / getattr(a, field)) / (b.tokens / getattr(b, field)) for a, b in pairs), 3
        )

    peers = [arm.name for arm in every if not arm.name.startswith("ours")]
    figures = {
        "model": options.shape or Path(options.model).name,
        **{name: getattr(options, name) for name in ("layer", "dtype", "context_size", "batch_contexts")},
        **{name: getattr(options, name) for name in ("shard_contexts", "shards", "rounds", "threads")},
        "tokens_per_second": {
            name: round(statistics.median(t.tokens / t.wall for t in took), 1) for name, took in taken.items()
        },
        "ours_over_wall": {name: ratio(name, "wall") for name in peers},
        "ours_over_cpu": {name: ratio(name, "cpu") for name in peers},
        "peak_host_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "machine": f"{device_name(device)}, {os.cpu_count()} cores, torch {torch.__version__}",
        "date": date.today().isoformat(),
    }
    if device.type == "cuda":
        figures["peak_device_mb"] = torch.cuda.max_memory_allocated() >> 20
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
