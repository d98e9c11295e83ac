"""The `steer` command: completions with a feature amplified and without, side by side, and their words counted."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluate.config import EvaluateConfig, ReasonScoreConfig
from evaluate.visible import visible
from harvest.files import UserError, write_json
from harvest.hub import resolved_commit
from pipeline.config import SettingsError
from pipeline.manifest import check_files, is_complete
from pipeline.stages import Runs


class Request(NamedTuple):
    """The options of one call."""

    features: tuple[int, ...]
    strengths: tuple[float, ...]
    prompts: tuple[str, ...]
    prompts_file: Path | None
    measure: bool
    words: tuple[str, ...]
    sampling: tuple[int, float, float, int]  # max_new_tokens, temperature, top_p, seed
    chat: bool | None
    hook: str | None
    max_activation: float | None
    json: Path | None


def steer(sweep: Sequence[Runs], request: Request) -> None:
    """Print completions side by side; with words to count, or with `measure`, their figures at each strength.

    Raises SettingsError for options that make no sense and UserError for what does not fit SAE or model;
    nothing is written before all of it is done.
    """
    runs = _checked(sweep, request)
    from evaluate import steering
    from evaluate.generation import Sampling
    from harvest.activation_store import ActivationStore, slug
    from harvest.device import resolve_device, resolve_dtype, set_threads
    from harvest.language_model import load_model
    from harvest.progress import Progress
    from harvest.store_files import files_of
    from harvest.tokenizer import load_whole_tokenizer
    from train.checkpoint import load_sae

    prompts = request.prompts
    if request.prompts_file:
        prompts += steering.read_prompts(request.prompts_file)
    if request.measure and not prompts:
        prompts = steering.built_in_prompts()
    steering.check_strengths(request.strengths, "--strength")
    config, settings = runs.config, runs.config.evaluate
    hook = request.hook or config.harvest.hooks[0]
    folder = runs.directory("train") / slug(hook)
    saved = load_sae(folder / "best" if settings.sae == "best" else folder)
    features = tuple(dict.fromkeys(request.features))
    steering.check_features(features, saved.sae.d_sae, "--feature")
    if request.max_activation is None:
        store = ActivationStore.open(files_of(runs.directory("harvest")))
        store.check_complete(("holdout",))
        maxima = steering.max_activations(store, saved, config.train.exclude, features)
    else:
        maxima = [request.max_activation] * len(features)
    device = resolve_device(settings.runtime.device)
    set_threads(settings.runtime.threads, device)
    dtype = resolve_dtype(settings.downstream.compute_dtype if settings.downstream else "auto", device)
    commit, offline = resolved_commit(runs.inputs.model), settings.runtime.offline
    model = load_model(config.model, commit, [hook], dtype, device, offline=offline, with_head=True)
    steering.check_fit(model, saved)
    tokenizer = load_whole_tokenizer(config.model, commit, offline)
    nonzero = {strength for strength in request.strengths if strength}
    with Progress("steer", len(prompts) * (1 + len(features) * len(nonzero)), "completions") as progress:
        found = steering.steer(
            model,
            tokenizer,
            saved._replace(sae=saved.sae.to(device)),
            dict(zip(features, maxima, strict=True)),
            request.strengths,
            prompts,
            Sampling(*request.sampling),
            chat=request.chat,
            bos=_bos(runs),
            progress=progress,
        )
    words = request.words or _default_words(settings)
    figures = [steering.figures(steered, words) for steered in found]
    console = Console()
    for steered, measured in zip(found, figures, strict=True):
        if not request.measure:
            show_completions(console, steered)
        if request.measure or request.words:
            show_figures(console, measured, words)
    if request.json:
        document = {
            "definitions": steering.DEFINITIONS,
            "sae": runs.fingerprints["train"],
            "hook": hook,
            "words": list(words),
            "sampling": Sampling(*request.sampling)._asdict(),
            "figures": figures,
            "completions": [steered._asdict() | {"completions": _plain(steered)} for steered in found],
        }
        write_json(request.json, document)
        print(request.json)


def _bos(runs: Runs) -> str | None:
    from harvest.contexts import Contexts

    contexts = runs.directory("sample") / "contexts"
    return Contexts(contexts).bos if contexts.exists() else None


def _checked(sweep: Sequence[Runs], request: Request) -> Runs:
    if len({runs.directory("train") for runs in sweep}) > 1:
        raise SettingsError(
            f"steer: these settings are a sweep of {len(sweep)} SAEs; choose one, as "
            "train.sweep=null train.sae.l1_coefficient=5"
        )
    runs = sweep[0]
    if not request.prompts and not request.prompts_file and not request.measure:
        raise SettingsError("steer: no prompt: give --prompt TEXT, --prompts FILE, or --measure for the built-in ones")
    if request.hook and request.hook not in runs.config.harvest.hooks:
        raise SettingsError(f"--hook: {request.hook!r}: these settings have {', '.join(runs.config.harvest.hooks)}")
    if request.max_activation is not None and not 0 < request.max_activation < math.inf:
        raise SettingsError(f"--max-activation: {request.max_activation}: a number above 0")
    if request.json and not request.json.parent.is_dir():
        raise SettingsError(f"--json: {request.json}: there is no folder {request.json.parent}")
    if request.json and request.json.is_dir():
        raise SettingsError(f"--json: {request.json}: is a folder; a file is meant")
    for prompt in request.prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"--prompt: {prompt!r}: not UTF-8 text") from None
    if not is_complete(runs.directory("train")):
        raise UserError(
            f"steer: the train stage for these settings is not complete ({runs.directory('train')}); run "
            "`make train` with the same CONFIG and SET first"
        )
    check_files(runs.directory("train"))
    return runs


def show_completions(console: Console, steered: Any) -> None:
    """A table for each prompt, a column for each strength. What the model wrote is text of strangers."""
    for prompt, row in zip(steered.prompts, steered.completions, strict=True):
        title = f"feature {steered.feature}, largest activation {steered.max_activation:.3g}"
        table = Table(title=Text(title), caption=Text(visible(prompt)), caption_justify="left", expand=True)
        for strength in steered.strengths:
            table.add_column(Text(f"strength {strength:g}" if strength else "as it is"), ratio=1, overflow="fold")
        table.add_row(*(Text(visible(completion.text)) for completion in row))
        console.print(table)


def show_figures(console: Console, figures: dict[str, Any], words: Sequence[str]) -> None:
    """Rates and lengths by strength, with 95% intervals."""
    title = f"feature {figures['feature']}, {figures['prompts']} prompts: {visible(', '.join(words))}"
    table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("strength", "words", "per 100 tokens", "change", "tokens, change"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in figures["by_strength"]:
        table.add_row(
            f"{line['strength']:g}",
            f"{line['words']:,}",
            _interval(line["words_per_100_tokens"], "{:.1f}"),
            _interval(line["words_per_100_tokens_change"], "{:+.1f}"),
            _interval(line["tokens_change"], "{:+.1f}"),
        )
    console.print(table)
    verdict = "rises with each strength" if figures["rises"] else "does not rise with each strength"
    console.print(Text(f"The rate of these words {verdict}. In brackets: 95% by bootstrap over prompts."))


def _interval(value: dict[str, float], form: str) -> str:
    return f"{form} [{form}, {form}]".format(value["value"], value["low"], value["high"])


def _plain(steered: Any) -> list[list[dict[str, Any]]]:
    return [[completion._asdict() for completion in row] for row in steered.completions]


def _default_words(settings: EvaluateConfig) -> tuple[str, ...]:
    return (settings.reason_score or ReasonScoreConfig()).words
