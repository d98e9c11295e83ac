"""The `steer` command: completions with features operated on and without, side by side, and their words counted."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluate.config import Op, ReasonScoreConfig, Where
from evaluate.visible import visible
from harvest.files import write_json
from harvest.hub import resolved_commit
from pipeline.running import trained
from pipeline.settings_text import SettingsError
from pipeline.stages import Runs, swept
from pipeline.tables import table

if TYPE_CHECKING:  # they load torch
    from evaluate.operations import Operation
    from train.checkpoint import SavedSae

Option = typer.Option


class Request(NamedTuple):
    """The options of the command."""

    feature: Annotated[
        list[str],
        Option(
            help="Feature to operate on: 123, or 123:set:2:thinking with what differs from the options; repeatable."
        ),
    ]
    op: Annotated[
        Op,
        Option(help="add or set strength times the feature's largest activation, ablate it, or scale it by strength."),
    ] = "add"
    strength: Annotated[list[float] | None, Option(help="Of the operation; may be repeated. Default: 1.")] = None
    where: Annotated[
        Where,
        Option(help="At all tokens, those of the prompt, those generated, or those between <think> and </think>."),
    ] = "all"
    together: Annotated[bool, Option("--together", help="All features at once, not one after another.")] = False
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
        list[float] | None,
        Option(help="Instead of the largest one on held-out rows, in scaled units: one for all, or one a --feature."),
    ] = None
    json: Annotated[Path | None, Option(help="Also write completions and figures to this file.")] = None


def steer(sweep: Sequence[Runs], request: Request) -> None:
    """Print completions side by side; with words to count, or with `measure`, their figures at each strength.

    Raises SettingsError for options that make no sense and UserError for what does not fit SAE or model;
    nothing is written before all of it is done.
    """
    directory = _checked(sweep, request)
    from evaluate import steering
    from evaluate.operations import check_operations, check_strengths
    from evaluate.prompts import prompt_ids, thinking_tags
    from evaluate.sampler import Sampling
    from harvest.contexts import Contexts
    from harvest.device import resolve_device, resolve_dtype, set_threads
    from harvest.language_model import load_model
    from harvest.progress import Progress
    from harvest.tokenizer import load_whole_tokenizer

    runs, config = sweep[0], sweep[0].config
    prompts = tuple(request.prompt or ())
    if request.prompts:
        prompts += steering.read_prompts(request.prompts)
    if request.measure and not prompts:
        prompts = steering.built_in_prompts()
    settings, hook = config.evaluate, request.hook or config.harvest.hooks[0]
    saved = saved_sae(runs, directory, hook)
    check_strengths(request.strength or (), "--strength")
    plans = planned(request)
    for operations in (operations for plan in plans for operations in (plan.operations, *plan.lists)):
        check_operations(operations, saved.sae.d_sae, "--feature")
    features = tuple(dict.fromkeys(operation.feature for plan in plans for operation in plan.operations))
    device = resolve_device(settings.runtime.device)
    saved = saved._replace(sae=saved.sae.to(device))
    maxima = _given_maxima(request) or held_out_maxima(runs, saved, features)
    set_threads(settings.runtime.threads, device)
    dtype = resolve_dtype(settings.downstream.compute_dtype if settings.downstream else "auto", device)
    commit, offline = resolved_commit(runs.inputs.model), settings.runtime.offline
    tokenizer = load_whole_tokenizer(config.model, commit, offline)
    contexts = runs.directory("sample") / "contexts"
    asked = {"chat": request.chat, "bos": Contexts(contexts).bos if contexts.exists() else None}
    ids = prompt_ids(tokenizer, prompts, **asked)
    if any(operation.where == "thinking" for plan in plans for operation in plan.operations):
        thinking_tags(tokenizer, ids, request.chat)
    model = load_model(config.model, commit, [hook], dtype, device, offline=offline, with_head=True)
    steering.check_fit(model, saved)
    sampling = Sampling(request.max_new_tokens, request.temperature, request.top_p, request.seed)
    with Progress("steer", len(prompts) * steering.columns(plans), "completions") as progress:
        found = steering.steer(model, tokenizer, saved, maxima, plans, prompts, sampling, **asked, progress=progress)
    words = tuple(request.word or (settings.reason_score or ReasonScoreConfig()).words)
    figures = [steering.figures(steered, words) for steered in found]
    for steered, measured in zip(found, figures, strict=True):
        if not request.measure:
            show_completions(Console(), steered)
        if request.measure or request.word:
            show_figures(measured, words)
    if request.json:
        document = {
            "definitions": steering.DEFINITIONS,
            "sae": runs.fingerprints["train"],
            "hook": hook,
            "words": list(words),
            "sampling": sampling._asdict(),
            "figures": figures,
            "completions": [_completions(steered) for steered in found],
        }
        write_json(request.json, document)
        print(request.json)


def saved_sae(runs: Runs, directory: Path, hook: str) -> "SavedSae":
    """The SAE of a hook in a directory of training, the one that is evaluated."""
    from harvest.activation_store import slug
    from train.checkpoint import load_sae

    folder = directory / slug(hook)
    return load_sae(folder / "best" if runs.config.evaluate.sae == "best" else folder)


def held_out_maxima(runs: Runs, saved: "SavedSae", features: Sequence[int]) -> dict[int, float]:
    """The largest activation of each feature on held-out rows, in scaled units.

    Raises UserError for a feature that fires on none, and where the rows are not there.
    """
    from evaluate.steering import max_activations
    from harvest.activation_store import ActivationStore
    from harvest.device import resolve_device
    from harvest.store_files import files_of

    device = resolve_device(runs.config.evaluate.runtime.device)
    saved = saved._replace(sae=saved.sae.to(device))
    store = ActivationStore.open(files_of(runs.directory("harvest")))
    store.check_complete(("holdout",))
    return dict(zip(features, max_activations(store, saved, runs.config.exclude, features), strict=True))


def _given_maxima(request: Request) -> dict[int, float]:
    features, given = [_asked(text).feature for text in request.feature], request.max_activation or []
    return dict(zip(features, given * len(features) if len(given) == 1 else given, strict=False))


def one_sae(sweep: Sequence[Runs], hook: str | None, command: str) -> Path:
    """The directory of the training run, of settings that are no sweep and have the hook, the first if None.

    Raises SettingsError for others, and UserError for a run that is not complete.
    """
    if len({runs.directory("train") for runs in sweep}) > 1:
        first = [f"train.{'' if one.startswith('lr=') else 'sae.'}{one}" for one in swept(sweep[0], sweep).split()]
        raise SettingsError(
            f"{command}: these settings are a sweep of {len(sweep)} SAEs; choose one, as "
            f"{' '.join(['train.sweep=null', *first])}"
        )
    if hook and hook not in (hooks := sweep[0].config.harvest.hooks):
        raise SettingsError(f"--hook: {hook!r}: these settings have {', '.join(hooks)}")
    return trained(sweep[0], command)


def _checked(sweep: Sequence[Runs], request: Request) -> Path:
    """The directory of the training run, for options that make sense."""
    to = request.json
    if not request.prompt and not request.prompts and not request.measure:
        raise SettingsError("steer: no prompt: give --prompt TEXT, --prompts FILE, or --measure for the built-in ones")
    given = request.max_activation or ()
    if not all(0 < each < math.inf for each in given):
        raise SettingsError(f"--max-activation: {', '.join(map(str, given))}: a number above 0")
    if len(given) > 1 and len(given) != len(request.feature):
        raise SettingsError(f"--max-activation: {len(given)} of them; give one, or one for each --feature")
    if to:
        check_target("--json", to)
    check_text(request.prompt or ())
    return one_sae(sweep, request.hook, "steer")


def check_target(option: str, to: Path) -> None:
    """Raise SettingsError for a file that cannot be written, as its place is a folder or in none."""
    if to.is_dir() or not to.parent.is_dir():
        what = "is a folder; a file is meant" if to.is_dir() else f"there is no folder {to.parent}"
        raise SettingsError(f"{option}: {to}: {what}")


def check_text(prompts: Sequence[str]) -> None:
    """Raise SettingsError for a prompt of the command line that is not UTF-8 text."""
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise SettingsError(f"--prompt: {prompt!r}: not UTF-8 text")


def planned(request: Request) -> list[Any]:
    """What is to be compared: a plan for each feature, or one for all of them together.

    Raises SettingsError for a feature that cannot be read.
    """
    from evaluate.steering import plan

    asked = list(dict.fromkeys(_asked(text) for text in request.feature))
    strengths = dict.fromkeys(request.strength or [1.0])
    return [
        plan(
            {
                strength: tuple(_operation(each, request.op, strength, request.where) for each in group)
                for strength in strengths
            }
        )
        for group in ([asked] if request.together else [[each] for each in asked])
    ]


def operations_of(texts: Sequence[str]) -> tuple["Operation", ...]:
    """Operations of the command line, as 123 (add, strength 1, everywhere) or 123:set:2:thinking.

    Raises SettingsError for one that cannot be read.
    """
    return tuple(_operation(_asked(text), "add", 1.0, "all") for text in texts)


class _Asked(NamedTuple):
    """A feature of the command line; None is what the options say."""

    feature: int
    op: Op | None = None
    strength: float | None = None
    where: Where | None = None


def _operation(asked: _Asked, op: Op, strength: float, where: Where) -> "Operation":
    """What is asked, with what it does not say as given."""
    from evaluate.operations import Operation

    own = strength if asked.strength is None else asked.strength
    return Operation(asked.feature, asked.op or op, own, asked.where or where)


def _asked(text: str) -> _Asked:
    number, *rest = text.split(":")
    found: dict[str, Any] = {}
    for part in rest:
        name = "op" if part in get_args(Op) else "where" if part in get_args(Where) else "strength"
        try:
            value = float(part) if name == "strength" else part
        except ValueError:
            value = None
        if value is None or name in found:
            raise SettingsError(
                f"--feature: {text!r}: {part!r} is no operation ({', '.join(get_args(Op))}), place "
                f"({', '.join(get_args(Where))}) or strength, or a second one; as 123:set:2:thinking"
            )
        found[name] = value
    try:
        return _Asked(int(number), **found)
    except ValueError:
        raise SettingsError(f"--feature: {text!r}: a feature is a number, as 123 or 123:set:2:thinking") from None


def _completions(steered: Any) -> dict[str, Any]:
    rows = [[completion._asdict() for completion in row] for row in steered.completions]
    lists = [[operation._asdict() for operation in operations] for operations in steered.plan.lists]
    return {"strengths": steered.plan.strengths, "operations": lists, "prompts": steered.prompts, "completions": rows}


def _title(steered: Any) -> str:
    """Each feature with its largest activation, and what is done to it unless it is amplified everywhere."""
    parts = []
    for operation in steered.plan.operations:
        done = "" if (operation.op, operation.where) == ("add", "all") else f" ({operation.op}, {operation.where})"
        parts.append(f"feature {operation.feature}{done}, largest activation {steered.maxima[operation.feature]:.3g}")
    return "; ".join(parts)


def show_completions(console: Console, steered: Any) -> None:
    """A table for each prompt, a column for each strength. What the model wrote is untrusted text."""
    for prompt, row in zip(steered.prompts, steered.completions, strict=True):
        grid = Table(title=Text(_title(steered)), caption=Text(visible(prompt)), caption_justify="left", expand=True)
        for number, strength in enumerate(steered.plan.strengths):
            grid.add_column(Text(f"strength {strength:g}" if number else "as it is"), ratio=1, overflow="fold")
        grid.add_row(*(Text(visible(completion.text)) for completion in row))
        console.print(grid)
    if not any(completion.changed for row in steered.completions for completion in row):
        print(f"{_title(steered)}: nothing was changed: no token was in such a place")


def show_figures(figures: dict[str, Any], words: Sequence[str]) -> None:
    """Rates and lengths by strength, with 95% intervals."""
    done = figures.get("together", [figures])
    features = ", ".join(f"{each['feature']} ({each['op']}, {each['where']})" for each in done)
    print(f"feature {features}, {figures['prompts']} prompts: {visible(', '.join(words))}")
    rows = [("strength", "words", "per 100 tokens", "change", "tokens, change", "changed")]
    for line in figures["by_strength"]:
        rate, change = line["words_per_100_tokens"], line["words_per_100_tokens_change"]
        changes = _interval(change, "{:+.1f}"), _interval(line["tokens_change"], "{:+.1f}")
        strength = "as it is" if line["strength"] is None else f"{line['strength']:g}"
        share = f"{line['changed'] / line['processed']:.0%}"
        rows.append((strength, f"{line['words']:,}", _interval(rate, "{:.1f}"), *changes, share))
    print("\n".join(table(rows, right=range(6))))
    if figures["rises"] is not None:
        verdict = "rises with each strength" if figures["rises"] else "does not rise with each strength"
        print(f"The rate of these words {verdict}.")
    print("In brackets: 95% by bootstrap over prompts. Changed: the part of the tokens that the operation was done at.")


def _interval(value: dict[str, float], form: str) -> str:
    return f"{form} [{form}, {form}]".format(value["value"], value["low"], value["high"])
