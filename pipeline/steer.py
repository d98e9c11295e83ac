"""The `steer` command: completions with a feature amplified and without, side by side, and their words counted."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluate.config import ReasonScoreConfig
from evaluate.visible import visible
from harvest.files import write_json
from harvest.hub import resolved_commit
from pipeline.running import trained
from pipeline.settings_text import SettingsError
from pipeline.stages import Runs, swept
from pipeline.tables import table

Option = typer.Option


class Request(NamedTuple):
    """The options of the command."""

    feature: Annotated[list[int], Option(help="Feature to amplify; may be repeated.")]
    strength: Annotated[
        list[float] | None, Option(help="Times the feature's largest activation; may be repeated. Default: 1.")
    ] = None
    prompt: Annotated[list[str] | None, Option(help="What to answer; may be repeated.")] = None
    prompts: Annotated[Path | None, Option(help="File of prompts, one a line.")] = None
    measure: Annotated[bool, Option("--measure", help="Take the sixty built-in prompts; show figures.")] = False
    word: Annotated[list[str] | None, Option(help="Word to count, `a|b` for alternatives; may be repeated.")] = None
    max_new_tokens: Annotated[int, Option(min=1, help="Longest completion, in tokens.")] = 64
    temperature: Annotated[float, Option(min=0, help="0 takes the likeliest token.")] = 0.0
    top_p: Annotated[
        float, Option(min=0.01, max=1, help="Sample from the likeliest tokens of this probability together.")
    ] = 1.0
    seed: Annotated[int, Option(min=0, help="Of sampling.")] = 0
    chat: Annotated[bool | None, Option(help="Use the model's chat template; default: if it has one.")] = None
    hook: Annotated[str | None, Option(help="Which SAE, where several hooks were trained.")] = None
    max_activation: Annotated[
        float | None, Option(help="Instead of the largest one on held-out rows, in scaled units.")
    ] = None
    json: Annotated[Path | None, Option(help="Also write completions and figures to this file.")] = None


def steer(sweep: Sequence[Runs], request: Request) -> None:
    """Print completions side by side; with words to count, or with `measure`, their figures at each strength.

    Raises SettingsError for options that make no sense and UserError for what does not fit SAE or model;
    nothing is written before all of it is done.
    """
    directory = _checked(sweep, request)
    from evaluate import steering
    from evaluate.generation import Sampling
    from harvest.activation_store import ActivationStore, slug
    from harvest.contexts import Contexts
    from harvest.device import resolve_device, resolve_dtype, set_threads
    from harvest.language_model import load_model
    from harvest.progress import Progress
    from harvest.store_files import files_of
    from harvest.tokenizer import load_whole_tokenizer
    from train.checkpoint import load_sae

    runs, config = sweep[0], sweep[0].config
    prompts, strengths = tuple(request.prompt or ()), tuple(request.strength or [1.0])
    if request.prompts:
        prompts += steering.read_prompts(request.prompts)
    if request.measure and not prompts:
        prompts = steering.built_in_prompts()
    steering.check_strengths(strengths, "--strength")
    settings, hook = config.evaluate, request.hook or config.harvest.hooks[0]
    folder = directory / slug(hook)
    saved = load_sae(folder / "best" if settings.sae == "best" else folder)
    features = tuple(dict.fromkeys(request.feature))
    steering.check_features(features, saved.sae.d_sae, "--feature")
    if request.max_activation is None:
        store = ActivationStore.open(files_of(runs.directory("harvest")))
        store.check_complete(("holdout",))
        maxima = steering.max_activations(store, saved, config.exclude, features)
    else:
        maxima = [request.max_activation] * len(features)
    device = resolve_device(settings.runtime.device)
    set_threads(settings.runtime.threads, device)
    dtype = resolve_dtype(settings.downstream.compute_dtype if settings.downstream else "auto", device)
    commit, offline = resolved_commit(runs.inputs.model), settings.runtime.offline
    model = load_model(config.model, commit, [hook], dtype, device, offline=offline, with_head=True)
    steering.check_fit(model, saved)
    tokenizer = load_whole_tokenizer(config.model, commit, offline)
    contexts = runs.directory("sample") / "contexts"
    sampling = Sampling(request.max_new_tokens, request.temperature, request.top_p, request.seed)
    with Progress("steer", len(prompts) * (1 + len(features) * len(set(strengths) - {0})), "completions") as progress:
        found = steering.steer(
            model,
            tokenizer,
            saved._replace(sae=saved.sae.to(device)),
            dict(zip(features, maxima, strict=True)),
            strengths,
            prompts,
            sampling,
            chat=request.chat,
            bos=Contexts(contexts).bos if contexts.exists() else None,
            progress=progress,
        )
    words = tuple(request.word or (settings.reason_score or ReasonScoreConfig()).words)
    figures = [steering.figures(steered, words) for steered in found]
    for steered, measured in zip(found, figures, strict=True):
        if not request.measure:
            show_completions(Console(), steered)
        if request.measure or request.word:
            show_figures(measured, words)
    if request.json:
        completions = [[[c._asdict() for c in row] for row in steered.completions] for steered in found]
        document = {
            "definitions": steering.DEFINITIONS,
            "sae": runs.fingerprints["train"],
            "hook": hook,
            "words": list(words),
            "sampling": sampling._asdict(),
            "figures": figures,
            "completions": [s._asdict() | {"completions": c} for s, c in zip(found, completions, strict=True)],
        }
        write_json(request.json, document)
        print(request.json)


def _checked(sweep: Sequence[Runs], request: Request) -> Path:
    """The directory of the training run, for options that make sense."""
    hooks, to = sweep[0].config.harvest.hooks, request.json
    if len({runs.directory("train") for runs in sweep}) > 1:
        first = [f"train.{'' if one.startswith('lr=') else 'sae.'}{one}" for one in swept(sweep[0], sweep).split()]
        raise SettingsError(
            f"steer: these settings are a sweep of {len(sweep)} SAEs; choose one, as "
            f"{' '.join(['train.sweep=null', *first])}"
        )
    if not request.prompt and not request.prompts and not request.measure:
        raise SettingsError("steer: no prompt: give --prompt TEXT, --prompts FILE, or --measure for the built-in ones")
    if request.hook and request.hook not in hooks:
        raise SettingsError(f"--hook: {request.hook!r}: these settings have {', '.join(hooks)}")
    if request.max_activation is not None and not 0 < request.max_activation < math.inf:
        raise SettingsError(f"--max-activation: {request.max_activation}: a number above 0")
    if to and (to.is_dir() or not to.parent.is_dir()):
        what = "is a folder; a file is meant" if to.is_dir() else f"there is no folder {to.parent}"
        raise SettingsError(f"--json: {to}: {what}")
    for prompt in request.prompt or ():
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise SettingsError(f"--prompt: {prompt!r}: not UTF-8 text")
    return trained(sweep[0], "steer")


def show_completions(console: Console, steered: Any) -> None:
    """A table for each prompt, a column for each strength. What the model wrote is untrusted text."""
    for prompt, row in zip(steered.prompts, steered.completions, strict=True):
        title = f"feature {steered.feature}, largest activation {steered.max_activation:.3g}"
        grid = Table(title=Text(title), caption=Text(visible(prompt)), caption_justify="left", expand=True)
        for strength in steered.strengths:
            grid.add_column(Text(f"strength {strength:g}" if strength else "as it is"), ratio=1, overflow="fold")
        grid.add_row(*(Text(visible(completion.text)) for completion in row))
        console.print(grid)


def show_figures(figures: dict[str, Any], words: Sequence[str]) -> None:
    """Rates and lengths by strength, with 95% intervals."""
    print(f"feature {figures['feature']}, {figures['prompts']} prompts: {visible(', '.join(words))}")
    rows = [("strength", "words", "per 100 tokens", "change", "tokens, change")]
    for line in figures["by_strength"]:
        rate, change = line["words_per_100_tokens"], line["words_per_100_tokens_change"]
        changes = _interval(change, "{:+.1f}"), _interval(line["tokens_change"], "{:+.1f}")
        rows.append((f"{line['strength']:g}", f"{line['words']:,}", _interval(rate, "{:.1f}"), *changes))
    print("\n".join(table(rows, right=range(5))))
    verdict = "rises with each strength" if figures["rises"] else "does not rise with each strength"
    print(f"The rate of these words {verdict}. In brackets: 95% by bootstrap over prompts.")


def _interval(value: dict[str, float], form: str) -> str:
    return f"{form} [{form}, {form}]".format(value["value"], value["low"], value["high"])
