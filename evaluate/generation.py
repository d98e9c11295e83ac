"""Text that a model writes while features of its activations are operated on: prompts under several lists at once."""

from collections.abc import Sequence
from typing import Any

from evaluate.engine import Completion, Request, answers
from evaluate.operations import Interventions
from evaluate.prompts import check_lengths, position_limit, prompt_ids
from evaluate.sampler import Sampling
from harvest.language_model import HookedModel
from harvest.progress import Progress


def complete(
    model: HookedModel,
    tokenizer: Any,
    interventions: Interventions,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    chat: bool | None = None,
    bos: str | None = None,
    slots: int = 64,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Completions [prompt][list of operations]. `chat` and `bos` are those of `prompt_ids`.

    Those of one prompt are drawn with the same noise. Raises UserError for prompts that are empty, and as `answers`.
    """
    ids = prompt_ids(tokenizer, prompts, chat, bos)
    causal: Any = model.model
    check_lengths(ids, sampling.max_new_tokens, position_limit(causal.config))
    count = len(interventions.lists)
    requests = [Request(row, i, (sampling.seed, number)) for number, row in enumerate(ids) for i in range(count)]
    found: dict[int, Completion] = {}
    at_once = max(1, min(slots, len(requests)))
    for number, completion in answers(model, tokenizer, interventions, requests, sampling, slots=at_once, chat=chat):
        found[number] = completion
        if progress:
            progress.advance(1)
    every = [found[number] for number in range(len(requests))]
    return [every[i : i + count] for i in range(0, len(every), count)]
