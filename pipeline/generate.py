"""`pipeline generate`: what the model writes, steered or not, as a source of conversations that `sample` reads."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from harvest.hub import resolved_commit
from pipeline.settings_text import SettingsError
from pipeline.stages import Runs
from pipeline.steer import check_target, check_text, held_out_maxima, one_sae, operations_of, saved_sae

Option = typer.Option


class Request(NamedTuple):
    """The options of the command."""

    to: Annotated[Path, Option(help="JSON Lines to write; while it grows it is FILE.partial.")]
    prompt: Annotated[list[str] | None, Option(help="What to answer; may be repeated.")] = None
    prompts: Annotated[
        Path | None, Option(help="File of prompts, one a line; of a .jsonl file, the column `prompt`.")
    ] = None
    samples: Annotated[int, Option(min=1, help="Answers to each prompt.")] = 1
    feature: Annotated[
        list[str] | None,
        Option(help="Feature to operate on meanwhile: 123, or 123:set:2:thinking; all that are given, at once."),
    ] = None
    hook: Annotated[str | None, Option(help="Whose SAE, where several hooks were trained.")] = None
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, reasoning included, in tokens.")] = 4096
    temperature: Annotated[float, Option(min=0, help="0 takes the likeliest token.")] = 0.6
    top_p: Annotated[
        float, Option(min=0.01, max=1, help="Sample from the likeliest tokens of this probability together.")
    ] = 0.95
    seed: Annotated[int, Option(min=0, help="Of sampling.")] = 0
    chat: Annotated[bool | None, Option(help="Use the model's chat template; default: if it has one.")] = None
    slots: Annotated[int, Option(min=1, help="Answers that are written side by side.")] = 32


def generate(sweep: Sequence[Runs], request: Request) -> None:
    """Write the file and say what it holds.

    Raises SettingsError for options that make no sense and UserError for what does not fit SAE or model, and for a file
    that is there; what was answered when it stops is kept, and the same command goes on.
    """
    _check(request)
    from evaluate.operations import Interventions, check_operations, check_strengths, no_interventions
    from evaluate.sampler import Sampling
    from evaluate.steering import check_fit, read_prompts
    from evaluate.traces import kept, write_traces
    from harvest.contexts import Contexts
    from harvest.device import numerics, resolve_device, resolve_dtype, set_threads
    from harvest.language_model import load_model
    from harvest.tokenizer import load_whole_tokenizer

    runs = sweep[0]
    config, settings = runs.config, runs.config.evaluate
    device = resolve_device(settings.runtime.device)
    prompts = tuple(request.prompt or ()) + (read_prompts(request.prompts) if request.prompts else ())
    hook, operations = request.hook or config.harvest.hooks[0], operations_of(request.feature or ())
    interventions, maxima = no_interventions(hook), {}
    if operations:
        saved = saved_sae(runs, one_sae(sweep, request.hook, "generate"), hook)
        check_operations(operations, saved.sae.d_sae, "--feature")
        check_strengths([operation.strength for operation in operations], "--feature")
        saved = saved._replace(sae=saved.sae.to(device))
        maxima = held_out_maxima(runs, saved, [operation.feature for operation in operations])
        interventions = Interventions(saved, maxima, [operations])
    threads = set_threads(settings.runtime.threads, device)
    dtype = resolve_dtype(settings.downstream.compute_dtype if settings.downstream else "auto", device)
    contexts = runs.directory("sample") / "contexts"
    form = {"chat": request.chat, "bos": Contexts(contexts).bos if contexts.exists() else None}
    sampling = Sampling(request.max_new_tokens, request.temperature, request.top_p, request.seed)
    asked: dict[str, Any] = {
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "samples": request.samples,
        "model": runs.inputs.model,
        "tokenizer": runs.inputs.tokenizer,
        "sae": runs.fingerprints["train"] if operations else None,
        "hook": hook if operations else None,
        "operations": [[*operation._asdict().values(), maxima[operation.feature]] for operation in operations],
        **sampling._asdict(),
        **form,
        "slots": request.slots,
        "numerics": numerics(device, dtype, threads=threads if device.type == "cpu" else None),
    }
    kept(request.to, asked)
    commit, offline = resolved_commit(runs.inputs.model), settings.runtime.offline
    tokenizer = load_whole_tokenizer(config.model, commit, offline)
    model = load_model(config.model, commit, [hook], dtype, device, offline=offline, with_head=True)
    if operations:
        check_fit(model, interventions.saved)
    rest = {"slots": request.slots, **form}
    lines = write_traces(request.to, asked, model, tokenizer, interventions, prompts, request.samples, sampling, **rest)
    ended, tokens = sum(line["ended"] for line in lines), sum(line["tokens"] for line in lines)
    print(
        f"{len(lines):,} answers of {tokens / len(lines):,.0f} tokens, {ended / len(lines):.0%} ended before the limit"
    )
    print(request.to)


def _check(request: Request) -> None:
    if not request.prompt and not request.prompts:
        raise SettingsError("generate: no prompt: give --prompt TEXT or --prompts FILE")
    check_target("--to", request.to)
    if request.to.suffix != ".jsonl":
        raise SettingsError(f"--to: {request.to}: a name that ends in .jsonl is meant, which sample reads")
    if request.samples > 1 and not request.temperature:
        raise SettingsError(
            f"--samples: {request.samples}: at --temperature 0 all answers to a prompt are the same; give 1, or a "
            "temperature"
        )
    check_text(request.prompt or ())
