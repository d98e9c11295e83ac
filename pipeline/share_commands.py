"""Commands for what a trained SAE is used for: export, push, steer, compare."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import config
from pipeline.command import DEFAULT_CONFIG, DEFAULT_RUNS, ConfigFile, Overrides, Root, app, errors, find, find_any


@app.command()
def export(
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    to: Annotated[Path | None, typer.Option(help="Folder to write; runs/export/FINGERPRINT by default.")] = None,
    model_name: Annotated[str | None, typer.Option(help="Hub id of a model that is a local folder.")] = None,
    force: Annotated[bool, typer.Option(help="Write an older export anew.")] = False,
) -> None:
    """Write the trained SAEs as SAELens folders with a model card; prints the folder."""
    with errors():
        from pipeline import export as exports

        print(exports.export(find(config_file, overrides, runs), to, model_name, force))


@app.command()
def steer(
    feature: Annotated[list[int], typer.Option(help="Feature to amplify; may be repeated.")],
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    strength: Annotated[
        list[float] | None, typer.Option(help="Times the feature's largest activation; may be repeated. Default: 1.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to answer; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts, one a line.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Take the sixty built-in prompts; show figures.")] = False,
    word: Annotated[
        list[str] | None, typer.Option(help="Word to count, `a|b` for alternatives; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest completion, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1, help="Sample from the likeliest tokens of this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    chat: Annotated[bool | None, typer.Option(help="Use the model's chat template; default: if it has one.")] = None,
    hook: Annotated[str | None, typer.Option(help="Which SAE, where several hooks were trained.")] = None,
    max_activation: Annotated[
        float | None, typer.Option(help="Instead of the largest one on held-out rows, in scaled units.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write completions and figures to this file.")] = None,
) -> None:
    """Let the model write with a feature amplified and without, side by side."""
    with errors():
        from pipeline import steer as steering

        request = steering.Request(
            features=tuple(feature),
            strengths=tuple(strength or [1.0]),
            prompts=tuple(prompt or ()),
            prompts_file=prompts,
            measure=measure,
            words=tuple(word or ()),
            sampling=(max_new_tokens, temperature, top_p, seed),
            chat=chat,
            hook=hook,
            max_activation=max_activation,
            json=json,
        )
        steering.steer(find(config_file, overrides, runs), request)


@app.command()
def push(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub; made if absent.")],
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    folder: Annotated[Path | None, typer.Option(help="The export; runs/export/FINGERPRINT by default.")] = None,
    with_text: Annotated[bool, typer.Option("--with-text", help="Push pages with text of gated data too.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Push; without it, only show what would be pushed.")] = False,
) -> None:
    """Push an export and its figures to the hub; without --yes, only say what would be pushed."""
    with errors():
        from pipeline import push as pushing

        planned = pushing.plan_push(find(config_file, overrides, runs), folder, with_text)
        pushing.push(repository, planned, public=public, yes=yes, say=print)


@app.command()
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [SECTION.KEY=VALUE]...",
            help="Evaluate directories, fingerprints (of evaluate or train), or settings files with their overrides.",
        ),
    ],
    runs: Root = DEFAULT_RUNS,
    to: Annotated[
        Path | None, typer.Option(help="Folder of compare.html and compare.json; runs/compare by default.")
    ] = None,
) -> None:
    """Lay evaluated runs, or those of a sweep, side by side: a table, and L0 against fidelity as a plot."""
    with errors(runs):
        from pipeline import compare as comparison

        overrides = [target for target in targets if "=" in target]
        names = [target for target in targets if "=" not in target]
        if not names:
            raise config.SettingsError("compare: name at least one run or settings file")

        def of_settings(file: Path) -> list[Path]:
            return [each.directory("evaluate") for each in find_any(file, overrides, runs)]

        folder = to or runs / "compare"
        for line in comparison.compare_runs(names, runs, of_settings, folder):
            print(line)
        print(folder / "compare.html")
