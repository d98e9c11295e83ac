"""Answers of mixed length: the engine against batches of transformers' `generate`, and its continuous batching.

    .venv/bin/python benchmarks/engine.py [--dtype bfloat16] [--answers 24] [--slots 8] [--threads 1] [--repeats 3]
        [--lengths uniform] [--check]

Prints JSON: for each way, wall and CPU seconds (the best of alternating runs) and tokens a CPU second; with --check, of
how many answers all tokens are those of `generate` for the prompt alone. SmolLM2-135M, prompts of 20 to 60 tokens,
answers of 8 to 96 (--lengths skewed: log-uniform, so many are short and few long, as in reasoning), greedy, a feature
added at layer 17 by the same plain hook everywhere but in the engine.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import engine, sampler
from evaluate.operations import Interventions, Operation
from evaluate.packed_weights import PackedWeights
from harvest.config import ModelConfig
from harvest.hooked_model import hooked
from harvest.language_model import load_model
from harvest.tokenizer import load_whole_tokenizer
from pipeline.environment import set_up
from train.checkpoint import SavedSae
from train.exclusion import InputStatistics
from train.standard import Standard

MODEL, HOOK, END = ModelConfig(name="assets/smollm2-135m"), "model.layers.17", 2
Answers = list[list[int]]


class Work:
    """What is to be written, and the ways to do it. Each answer is made to end at its own length."""

    def __init__(self, dtype: str, answers: int, slots: int, lengths: str) -> None:
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(100, 40_000, n).tolist() for n in rng.integers(20, 61, answers)]
        low, high = (8, 97) if lengths == "uniform" else np.log((8, 97))
        drawn = rng.uniform(low, high, answers)
        self.lengths = (drawn if lengths == "uniform" else np.exp(drawn)).astype(int).tolist()
        self.slots = slots
        device = torch.device("cpu")
        self.model = load_model(MODEL, None, [HOOK], getattr(torch, dtype), device, offline=True, with_head=True)
        self.causal: Any = self.model.model
        before = time.perf_counter()
        self.weights = PackedWeights(self.causal, device)
        self.packing_s = time.perf_counter() - before
        self.tokenizer = load_whole_tokenizer(MODEL, None, offline=True)
        self.saved = SavedSae(Standard.initial(576, 4608), HOOK, InputStatistics(1.0, 1.0, None), {})
        self.step_D = (40.0 * self.saved.sae.direction([7])[0]).to(getattr(torch, dtype))

    def engine(self) -> Answers:
        """`evaluate/engine.py`."""
        interventions = Interventions(self.saved, {7: 40.0}, [(Operation(7, "add", 1.0),)])
        asked = [engine.Request(ids, 0, (number,)) for number, ids in enumerate(self.prompts)]
        with ending_at(self.lengths):
            found = dict(
                engine.answers(
                    self.model,
                    self.tokenizer,
                    interventions,
                    asked,
                    sampler.Sampling(96),
                    slots=self.slots,
                    weights=self.weights,
                )
            )
        return [found[number].token_ids for number in range(len(asked))]

    def generate(self, slots: int | None = None) -> Answers:
        """Batches in order, padded on the left, each until its longest answer ends."""
        found: Answers = []
        for first in range(0, len(self.prompts), slots or self.slots):
            part = slice(first, first + (slots or self.slots))
            prompts, lengths = self.prompts[part], self.lengths[part]
            width = max(map(len, prompts))
            ids_BS = torch.tensor([[END] * (width - len(row)) + row for row in prompts])
            mask_BS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
            config = GenerationConfig(max_new_tokens=max(lengths), do_sample=False, eos_token_id=END, pad_token_id=END)
            self.causal.generation_config = config
            with self.hook():
                out_BS = self.causal.generate(ids_BS, attention_mask=mask_BS, logits_processor=[no_end])
            found += [row[width : width + n].tolist() for row, n in zip(out_BS, lengths, strict=True)]
        return found

    def continuous_batching(self) -> Answers:
        """`generate_batch`'s manager, each request with its own limit."""
        config = GenerationConfig(max_new_tokens=96, do_sample=False, eos_token_id=-1, pad_token_id=END)
        batching = ContinuousBatchingConfig(
            max_requests_per_batch=self.slots, num_blocks=8 * self.slots, page_size=64, max_batch_tokens=256
        )
        names, found = [], {}
        with (
            self.hook(),
            self.causal.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=batching
            ) as manager,
        ):
            for ids, length in zip(self.prompts, self.lengths, strict=True):
                names.append(manager.add_request(ids, max_new_tokens=length))
            while len(found) < len(names):
                result = manager.get_result(timeout=1)
                if result and result.is_finished():
                    found[result.request_id] = result.generated_tokens
        return [found[name] for name in names]

    def hook(self) -> Any:
        """The feature added at every token, by a plain hook."""
        return hooked(self.model.modules[HOOK], lambda _module, _inputs, output: output + self.step_D)


def no_end(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """No answer ends by itself; `generate` writes on until the batch's longest, as it does after an end."""
    scores[:, END] = -torch.inf
    return scores


@contextmanager
def ending_at(lengths: list[int]) -> Any:
    """Within this, the engine's answers are of these lengths, told apart by their seeds."""
    choose = sampler.chosen

    def chosen(logits_NV: torch.Tensor, sampling: sampler.Sampling, draws: Any) -> list[int]:
        logits_NV[:, END] = -torch.inf
        tokens = choose(logits_NV, sampling, draws)
        ends = [draw is not None and draw.step == lengths[draw.seed[0]] for draw in draws]
        return [END if end else token for token, end in zip(tokens, ends, strict=True)]

    engine.chosen = chosen
    try:
        yield
    finally:
        engine.chosen = choose


def measure(ways: dict[str, Callable[[], Answers]], repeats: int) -> tuple[dict[str, Any], dict[str, Answers]]:
    """Seconds of each way, the best of alternating runs, and what it wrote."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    wrote: dict[str, Answers] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            before = time.perf_counter(), time.process_time()
            wrote[name] = way()
            times[name].append((time.perf_counter() - before[0], time.process_time() - before[1]))
    best = {name: {"wall_s": min(w for w, _ in each), "cpu_s": min(c for _, c in each)} for name, each in times.items()}
    return best, wrote


def main() -> None:
    """Measure and print."""
    set_up()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    for name, default in (("answers", 24), ("slots", 8), ("threads", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", choices=("uniform", "skewed"), default="uniform")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Work(options.dtype, options.answers, options.slots, options.lengths)
    ways = {"engine": work.engine, "generate": work.generate, "continuous_batching": work.continuous_batching}
    best, wrote = measure(ways, options.repeats)
    tokens, alone = sum(work.lengths), work.generate(slots=1) if options.check else []
    for name, each in best.items():
        each["tokens_per_cpu_s"] = tokens / each["cpu_s"]
        if options.check:
            each["as_alone"] = sum(a == b for a, b in zip(wrote[name], alone, strict=True))
    about = {"machine": platform.processor(), "tokens": tokens, "packing_s": work.packing_s, "ways": best}
    print(json.dumps(vars(options) | about, indent=1))


if __name__ == "__main__":
    main()
