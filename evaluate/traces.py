"""What a model writes, as conversations that `sample` reads (`rows: conversation`), its reasoning in its place.

JSON Lines, a line an answer, in the order of prompts and samples:

    conversation   the user's turn and the assistant's, as {"role", "content"}; reasoning is between <think> and
                   </think>, also where the chat template wrote the opening tag, or a limit cut the reasoning off
    prompt, sample numbers of the prompt and of the answer to it
    ended          false where the limit of tokens cut it off; `where: {ended: true}` of a source leaves such rows out
    tokens         written, without the one that ends the answer

Until all are there they are in FILE.partial, in the order in which they ended, below a line that says what was asked:
the same command goes on from there.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from evaluate.engine import Completion, Request, answers
from evaluate.journal import Journal, read_lines
from evaluate.operations import Interventions
from evaluate.prompts import prompt_ids
from evaluate.sampler import Sampling
from harvest.files import UserError, replacing
from harvest.language_model import HookedModel
from harvest.progress import Progress
from harvest.templates import THINK, THINK_END

FIELDS = ("conversation", "prompt", "sample", "ended", "tokens", "asked")


def partial_of(path: Path) -> Path:
    """Where the answers are until all are there."""
    return path.with_name(f"{path.name}.partial")


def kept(path: Path, asked: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """The lines that are there already, by prompt and sample; `asked` (JSON) is all that decides them.

    Raises UserError where the file is complete, or was begun for another request.
    """
    partial = partial_of(path)
    if path.exists():
        raise UserError(f"--to: {path}: exists; give another file, or delete it")
    begun, *lines = list(read_lines(partial, FIELDS, "its answer is written anew")) or [{"asked": asked}]
    begun = begun["asked"] or {}
    if changed := [name for name in {**begun, **asked} if begun.get(name) != asked.get(name)]:
        name = changed[0]
        raise UserError(
            f"{partial}: was begun with another {name} ({begun.get(name)} then, {asked.get(name)} now); go on with "
            "that, give another --to, or delete it"
        )
    return {(line["prompt"], line["sample"]): {name: line[name] for name in FIELDS[:-1]} for line in lines}


def write_traces(
    path: Path,
    asked: dict[str, Any],
    model: HookedModel,
    tokenizer: Any,
    interventions: Interventions,
    prompts: Sequence[str],
    samples: int,
    sampling: Sampling,
    *,
    slots: int,
    chat: bool | None = None,
    bos: str | None = None,
) -> list[dict[str, Any]]:
    """Answer every prompt `samples` times under the only list of `interventions`, and write the file.

    Returns its lines. Raises UserError as `kept`, `prompt_ids` and `answers` do; what ended before is kept.
    """
    done = kept(path, asked)
    ids = prompt_ids(tokenizer, prompts, chat, bos)
    left = [(p, s) for p in range(len(prompts)) for s in range(samples) if (p, s) not in done]
    requests = [Request(ids[p], 0, (sampling.seed, p, s)) for p, s in left]
    total, before = len(prompts) * samples, len(done)
    with ExitStack() as stack, Progress("generate", total, "answers", start=before) as progress:
        journal = None
        for number, completion in answers(model, tokenizer, interventions, requests, sampling, slots=slots, chat=chat):
            p, s = left[number]
            is_thinking = tokenizer.decode(ids[p]).rstrip().endswith(THINK)
            if journal is None:  # what is refused before its first answer leaves no file
                journal = stack.enter_context(Journal(partial_of(path)))
                if journal.is_new:
                    journal.add({**dict.fromkeys(FIELDS), "asked": asked})
            done[p, s] = {
                "conversation": conversation(prompts[p], completion, is_thinking),
                "prompt": p,
                "sample": s,
                "ended": completion.ended,
                "tokens": len(completion.token_ids),
            }
            journal.add({**done[p, s], "asked": None})
            progress.advance(1)
    lines = [done[place] for place in sorted(done)]
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    partial_of(path).unlink()
    return lines


def conversation(prompt: str, completion: Completion, is_thinking: bool) -> list[dict[str, str]]:
    """The two turns; `is_thinking` where the prompt that the model read ends within its thinking."""
    text = f"{THINK}\n{completion.text}" if is_thinking else completion.text
    if not completion.ended and text.rfind(THINK) > text.rfind(THINK_END):
        text += f"\n{THINK_END}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
