"""Answers of the 8B shape: no bit of one depends on what is written beside it; tokens a second, and memory.

The model is random. Each choice of a token is compared by what it was chosen from: alone and among others, in the
order of the requests and in the opposite one. In float32 greedy answers are those of transformers' `generate`. What is
timed is a step of 32 slots with 2,048 tokens each.
"""

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.check import Place
from benchmarks.gpu.harvest import NARROW
from benchmarks.harvest_throughput import R1_LLAMA_8B
from evaluate import engine
from evaluate.engine import Completion, Engine, Request
from evaluate.operations import Interventions, Operation
from evaluate.sampler import Draw, Sampling, chosen
from harvest.hooked_model import HookedModel
from harvest.products import widens
from train.checkpoint import SavedSae
from train.exclusion import InputStatistics
from train.standard import Standard

HOOK = "model.layers.1"
LENGTHS = (5, 400, 61, 130, 63, 500, 128, 186)
TOKENIZER: Any = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: " ".join(map(str, ids)))
PLAIN, SET, ADD = (), (Operation(5, "set", 1.0),), (Operation(3, "add", 1.0),)


def made(place: Place, layers: int, dtype: torch.dtype) -> tuple[HookedModel, Interventions]:
    """The 8B shape with so many layers; narrow on a CPU."""
    narrow = {} if place.on_gpu else {**NARROW, "head_dim": 16, "vocab_size": 4096}
    config = LlamaConfig(**R1_LLAMA_8B.to_dict() | narrow | {"num_hidden_layers": layers})
    torch.manual_seed(0)
    with place.device:
        causal: Any = LlamaForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
    causal.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    sae = Standard.initial(config.hidden_size, 16, scale=0.5).to(place.device)
    saved = SavedSae(sae, HOOK, InputStatistics(0.5, 1.0, None), {})
    model = HookedModel(causal, {HOOK: causal.get_submodule(HOOK)}, place.device)
    return model, Interventions(saved, {3: 8.0, 5: 8.0}, [PLAIN, SET, ADD])


def requests(model: HookedModel, lists: Sequence[int]) -> list[Request]:
    """One for each of `LENGTHS`."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, model.model.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Request(row, lists[number % len(lists)], (number,)) for number, row in enumerate(ids)]


def compare_bits(place: Place, dtype: torch.dtype) -> int:
    """Raise AssertionError where a token was chosen from other bits than before; how many were compared."""
    model, interventions = made(place, 4, dtype)
    asked, seen, compared = requests(model, (0, 1, 2)), {}, 0

    def keep(logits_NV: torch.Tensor, sampling: Sampling, draws: Sequence[Draw | None]) -> list[int]:
        nonlocal compared
        for row_V, draw in zip(logits_NV.cpu(), draws, strict=True):
            if draw:
                before_V = seen.setdefault((draw.seed, draw.step), row_V)
                assert torch.equal(before_V, row_V), f"{dtype}: answer {draw.seed}, token {draw.step}: other bits"
                compared += before_V is not row_V
        return chosen(logits_NV, sampling, draws)

    writer = Engine(model, TOKENIZER, interventions, Sampling(24, 1.0, 0.9), slots=7)
    taken = writer.layer_step is not None or widens(place.device, dtype)  # widened products are the modules' own
    assert taken, f"{dtype}: the step by layers gives other bits than the model's own"
    engine.chosen = keep
    try:
        for some in (asked, asked[::-1], asked[2:3], [asked[3]] * 7):
            list(engine.answers(model, TOKENIZER, interventions, some, Sampling(24, 1.0, 0.9), slots=7))
        numbers = [writer.add(request) for request in asked]
        writer.step()
        for number in numbers[:2]:
            writer.cancel(number)  # the others move to the first slots
        while not writer.is_done:
            writer.step()
    finally:
        engine.chosen = chosen
    return compared


def as_generated(place: Place) -> int:
    """Greedy answers in float32 that are those of `generate` for the prompt alone."""
    model, interventions = made(place, 4, torch.float32)
    asked = requests(model, (0,))
    found: dict[int, Completion] = dict(engine.answers(model, TOKENIZER, interventions, asked, Sampling(24), slots=7))
    equal = 0
    for number, request in enumerate(asked):
        ids_1S = torch.tensor([request.ids], device=place.device)
        causal: Any = model.model
        written = causal.generate(ids_1S, attention_mask=torch.ones_like(ids_1S), max_new_tokens=24, do_sample=False)
        equal += written[0, len(request.ids) :].tolist() == found[number].token_ids
    return equal


def steered(place: Place) -> int:
    """Positions that were steered in 32 long answers at once; raises AssertionError where one is not counted."""
    model, interventions = made(place, 4, torch.bfloat16)
    model.model.lm_head.weight *= 8  # so that logits count beside the noise
    anywhere, prompt, generated = ((Operation(3, "add", 4.0, where),) for where in ("all", "prompt", "generated"))
    lists, tokens = [PLAIN, anywhere, prompt, generated], 512 if place.on_gpu else 12
    asked = [request for first in range(4) for request in requests(model, [(first + n) % 4 for n in range(4)])]
    found = dict(
        engine.answers(model, TOKENIZER, interventions._replace(lists=lists), asked, Sampling(tokens, 1.0), slots=32)
    )
    for number, request in enumerate(asked):
        of_prompt, of_answer = len(request.ids), tokens - 1  # the last token is not read
        expected = (0, of_prompt + of_answer, of_prompt, of_answer)[request.operations]
        completion = found[number]
        read, changed = completion.processed, completion.changed
        assert read == of_prompt + of_answer, f"answer {number}: {read} positions read, not {of_prompt + of_answer}"
        assert changed == expected, f"answer {number}: {changed} positions steered, not {expected}"
    written = {(request.seed, request.operations): found[number].token_ids for number, request in enumerate(asked)}
    for (seed, operations), ids in written.items():  # one noise, so they differ by what is done alone
        assert not operations or ids != written[seed, 0], f"prompt {seed}: {lists[operations]} changed nothing"
    return sum(completion.changed for completion in found.values())


def timed(place: Place) -> dict[str, float]:
    """Seconds of a step of all layers, and of reading a prompt; GB of memory at most."""
    slots, columns = (32, 2048) if place.on_gpu else (4, 128)
    dtype = torch.bfloat16 if place.on_gpu else torch.float32
    model, interventions = made(place, 32 if place.on_gpu else 4, dtype)
    model.model.lm_head.weight *= 8  # so that likely tokens are few, as a trained model's: no nucleus of 100,000
    writer = Engine(model, TOKENIZER, interventions, Sampling(64, 0.6, 0.95), slots=slots)
    prompt = torch.randint(1, 4096, (columns - 16,), generator=torch.Generator().manual_seed(0)).tolist()
    for number in range(slots):
        writer.add(Request(prompt, 2, (number,)))
    began = time.perf_counter()
    writer.step()
    read, steps = time.perf_counter() - began, []
    for _ in range(12):
        began = time.perf_counter()
        writer.step()
        steps.append(time.perf_counter() - began)
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if place.on_gpu else 0.0
    step = sorted(steps)[len(steps) // 2]
    return {"prompts_s": read, "step_s": step, "tokens_per_s": slots / step, "memory_gb": gigabytes}


def run(place: Place) -> None:
    """All of it; raises AssertionError where a bit is another one."""
    place.note(bits_compared_float32=compare_bits(place, torch.float32))
    place.note(bits_compared_bfloat16=compare_bits(place, torch.bfloat16))
    equal = as_generated(place)
    place.note(as_generated=equal)
    assert equal == len(LENGTHS), f"{equal} of {len(LENGTHS)} greedy answers are those of generate"
    place.note(steered_positions=steered(place))
    place.note(**timed(place))
