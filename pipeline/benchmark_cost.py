"""What a benchmark costs, for `pipeline estimate`: answers and tokens by count, hours by what one step of the decoder
takes. A step writes a token of every slot; it reads all weights once, and the keys and values of every slot.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from evaluate.benchmark_config import BenchmarkConfig
from evaluate.controls import count_conditions
from evaluate.task_config import TASKS, task_of
from evaluate.tasks import load_problems
from harvest.device import resolve_device, resolve_dtype, set_threads
from harvest.progress import size_text
from harvest.source_files import is_local
from pipeline.architecture import Architecture
from pipeline.measure import Machine, measure_weights
from pipeline.tables import hours

PROBLEMS = {"aime-2024": 30, "aime-2025": 30, "gpqa-diamond": 198, "gsm8k": 1319, "math-500": 500}  # of the hub's sets
PROMPT = 150  # tokens of a problem, about
# NVIDIA's data sheet has 3.35 TB/s. A layer's kernels are launched one by one, and attention reads keys more than once:
# a step of 32 layers and 32 slots with 2,048 tokens took 65 ms on an H200 (benchmarks/results.md).
H100_BYTES, H100_MEMORY, LAUNCH_S = 0.6 * 3.35e12, 80 * 10**9, 2.0e-3


class Step(NamedTuple):
    """What one step of a decoder reads."""

    weights: int  # elements: all but those of an embedding that is not the head as well
    cache: int  # elements of the keys and values of one token
    layers: int
    width: int  # of a token's activations

    def elements(self, slots: int, tokens: float) -> float:
        """Of weights, keys and values, where every slot holds so many tokens."""
        return self.weights + slots * tokens * self.cache


def step_of(shape: Architecture) -> Step:
    """The step of a model, by its shape."""
    model: Any = shape.skeleton.model
    text = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters()) - (0 if head is embedding else embedding.numel())
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Step(weights, 2 * text.num_hidden_layers * heads * width, text.num_hidden_layers, text.hidden_size)


def count_problems(config: BenchmarkConfig) -> int | None:
    """How many problems are asked; None of a set on the hub of which it is not known here.

    Raises UserError for a task that cannot be had.
    """
    task = task_of(config.task, config.source)
    if task.path is None or is_local(task.path):
        return len(load_problems(task, config.seed, config.problems))
    known = PROBLEMS.get(task.name or "") if task.path == TASKS[task.name or "arithmetic"].path else None
    return min(known, config.problems or known) if known else config.problems


def benchmark_lines(config: BenchmarkConfig, shape: Architecture, here: Machine) -> Iterator[tuple[str, str]]:
    """Rows of the section: what is asked, the memory for it, and hours here and on one H100.

    Raises UserError as `count_problems` does.
    """
    problems, conditions = count_problems(config), count_conditions(config)
    if problems is None:
        yield (
            "answers",
            f"{config.source.path}: how many problems it has is not known here; benchmark.problems says how many",
        )
        return
    count, step = problems * config.samples * conditions, step_of(shape)
    tokens, longest = count * config.max_new_tokens, PROMPT + config.max_new_tokens
    yield (
        "answers",
        f"{config.task or config.source.path}: {problems:,} problems x {config.samples:,} samples x {conditions:,} "
        f"conditions = {count:,}, of {config.max_new_tokens:,} tokens at most: {tokens:,}",
    )
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.compute_dtype, device)
    set_threads(config.threads, device)
    rate, element = measure_weights(step.width, config.slots, dtype, device), dtype.itemsize
    machines = {here.name: (rate, element, LAUNCH_S * here.is_gpu, here.memory)}
    if not here.is_gpu:
        machines["one H100 (from its data sheet and a step measured on an H200)"] = (
            H100_BYTES,
            2,
            LAUNCH_S,
            H100_MEMORY,
        )
    filled = PROMPT + config.max_new_tokens / 2
    for name, (of_machine, element, launch, memory) in machines.items():
        seconds = max(step.elements(config.slots, filled) * element / of_machine, step.layers * launch)
        needed = step.elements(config.slots, longest) * element
        what = f"weights, keys and values of {config.slots} answers take {size_text(needed)} of {size_text(memory)}"
        room = what if needed < memory else f"{what}: lower benchmark.slots or benchmark.max_new_tokens"
        taken = hours(tokens / config.slots * seconds)
        yield name, f"{taken} at most, with {config.slots / seconds:,.0f} tokens/s; {room}"
