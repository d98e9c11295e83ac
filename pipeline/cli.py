"""The command line: `python -m pipeline COMMAND --config FILE [section.key=value ...]`."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from harvest.files import UserError, locked
from pipeline import config, stages
from pipeline import status as status_of
from pipeline.fingerprint import STAGES
from pipeline.manifest import MANIFEST

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train and read sparse autoencoders on reasoning models, in stages: sample, harvest, train, evaluate.",
)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="Settings file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's."),
]
Root = Annotated[Path, typer.Option("--runs", help="Folder of all results.")]
AllowMixed = Annotated[bool, typer.Option(help="Resume under other numerics (device, torch, ...), and record it.")]
Force = Annotated[bool, typer.Option(help="Clear this stage's directory and run anew; asks if it is complete.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DEFAULT_CONFIG = Path("configs/smollm2.yaml")
DEFAULT_RUNS = Path("runs")

INTERRUPTED = 130  # the shell's status for SIGINT


@contextmanager
def _errors(root: Path = DEFAULT_RUNS) -> Iterator[None]:
    """Turn what a user can mend into one sentence and an exit status: 2 for settings, 1 for the rest."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except config.SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        where = error.filename or root
        print(
            f"error: {where}: {os.strerror(error.errno)}. What was complete is untouched; mend it (or choose "
            "another folder with --runs) and run the same command again to go on",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: nothing complete is lost; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _load(file: Path, overrides: list[str] | None) -> config.PipelineConfig:
    """Settings with a model and text, for what needs them."""
    settings = config.load(file, overrides or [])
    if isinstance(settings, config.IngestedConfig):
        raise config.SettingsError(f"{file}: ingests activations: there is no model and no text, which this needs")
    return settings


def _find(file: Path, overrides: list[str] | None, root: Path) -> list[stages.Runs]:
    """The runs of settings with a model and text."""
    return stages.find_runs(_load(file, overrides), root)


def _find_any(file: Path, overrides: list[str] | None, root: Path) -> list[stages.AnyRuns]:
    """The runs of any settings."""
    return [*stages.find_runs(config.load(file, overrides or []), root)]


def _asker(yes: bool) -> Callable[[str], bool]:
    """Asks on a terminal; elsewhere the answer is `--yes` or no."""
    return lambda question: yes or (sys.stdin.isatty() and typer.confirm(question))


def _run(
    names: tuple[str, ...],
    file: Path,
    overrides: list[str] | None,
    root: Path,
    allow_mixed: bool,
    force: bool,
    yes: bool,
    follow: bool = False,
) -> None:
    with _errors(root):
        sweep = _find_any(file, overrides, root)

        confirm = _asker(yes)
        for name in names:
            stages.run_stage(sweep, name, allow_mixed=allow_mixed, force=force, confirm=confirm, follow=follow)
        if names[-1] == "evaluate":
            for runs in sweep:
                print(runs.directory("evaluate") / "report.html")


STAGE_HELP = {
    "sample": "Turn the sources' text into packed contexts of tokens.",
    "harvest": "Run the model over the contexts and write its activations into a store.",
    "train": "Train one SAE for each hook from the store.",
    "evaluate": "Measure the SAE on held-out text and write report.html and metrics.json.",
}


def _add_stage(stage: str) -> None:
    @app.command(stage, help=STAGE_HELP[stage])
    def command(
        overrides: Overrides = None,
        config_file: ConfigFile = DEFAULT_CONFIG,
        runs: Root = DEFAULT_RUNS,
        allow_mixed: AllowMixed = False,
        force: Force = False,
        yes: Yes = False,
    ) -> None:
        _run((stage,), config_file, overrides, runs, allow_mixed, force, yes)


for _stage in STAGES:
    if _stage != "train":
        _add_stage(_stage)


@app.command(help=STAGE_HELP["train"])
def train(
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    follow: Annotated[bool, typer.Option("--follow", help="Start beside the harvest; wait for each window.")] = False,
    allow_mixed: AllowMixed = False,
    force: Force = False,
    yes: Yes = False,
) -> None:
    _run(("train",), config_file, overrides, runs, allow_mixed, force, yes, follow)


@app.command()
def ingest(
    overrides: Overrides = None,
    config_file: ConfigFile = Path("configs/ingest.yaml"),
    runs: Root = DEFAULT_RUNS,
    allow_mixed: AllowMixed = False,
    force: Force = False,
    yes: Yes = False,
) -> None:
    """Turn activations that are there (.npy, .safetensors, .pt, a SAELens cache) into a store: ingest.path=FILE."""
    with _errors(runs):
        if not isinstance(config.load(config_file, overrides or []), config.IngestedConfig):
            raise config.SettingsError(f"{config_file}: has no section `ingest`; configs/ingest.yaml is an example")
    _run(("harvest",), config_file, overrides, runs, allow_mixed, force, yes)


@app.command()
def run(
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    allow_mixed: AllowMixed = False,
) -> None:
    """All stages, each only if it is not complete; ends with the path of the report."""
    _run(STAGES, config_file, overrides, runs, allow_mixed, force=False, yes=False)


@app.command()
def stream(
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    processes: Annotated[int, typer.Option(min=1, help="GPUs, or processes on a CPU; 1: both sides take turns.")] = 1,
    harvest_processes: Annotated[
        int | None, typer.Option(min=1, help="How many of them harvest; default: by measured rates.")
    ] = None,
    allow_mixed: AllowMixed = False,
) -> None:
    """Harvest and train side by side on a bounded disk (harvest.runtime.disk_limit): the same SAE, byte for byte."""
    with _errors(runs):
        from pipeline import stream as streaming

        request = streaming.Request(config_file, overrides or [], runs, processes, harvest_processes, allow_mixed)
        streaming.stream(_find(config_file, overrides, runs), request, _asker(yes=False))


@app.command()
def status(overrides: Overrides = None, config_file: ConfigFile = DEFAULT_CONFIG, runs: Root = DEFAULT_RUNS) -> None:
    """Say which stages are complete, which would run, and why."""
    with _errors():
        for line in status_of.status_lines(_find_any(config_file, overrides, runs)):
            print(line)


@app.command()
def path(
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.")],
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
) -> None:
    """Print a stage's directory for these settings (one for each of a sweep) and nothing else, for scripts."""
    with _errors():
        if stage not in STAGES:
            raise config.SettingsError(f"path: {stage!r}: not a stage; one of {', '.join(STAGES)}")
        sweep = _find_any(config_file, overrides, runs)
        if stage not in sweep[0].stages:
            raise config.SettingsError(f"path: {stage!r}: these settings ingest activations and have no such stage")
        for directory in dict.fromkeys(each.directory(stage) for each in sweep):
            print(directory)


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
    with _errors():
        from pipeline import export as exports

        print(exports.export(_find(config_file, overrides, runs), to, model_name, force))


@app.command()
def steer(
    feature: Annotated[list[int], typer.Option(help="Feature to amplify; may be repeated.")],
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    strength: Annotated[
        list[float] | None, typer.Option(help="Times the feature's largest activation; may be repeated. Default: 4.")
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
    with _errors():
        from pipeline import steer as steering

        request = steering.Request(
            features=tuple(feature),
            strengths=tuple(strength or [4.0]),
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
        steering.steer(_find(config_file, overrides, runs), request)


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
    with _errors():
        from pipeline import push as pushing

        planned = pushing.plan_push(_find(config_file, overrides, runs), folder, with_text)
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
    with _errors(runs):
        from pipeline import compare as comparison

        overrides = [target for target in targets if "=" in target]
        names = [target for target in targets if "=" not in target]
        if not names:
            raise config.SettingsError("compare: name at least one run or settings file")

        def of_settings(file: Path) -> list[Path]:
            return [each.directory("evaluate") for each in _find_any(file, overrides, runs)]

        folder = to or runs / "compare"
        for line in comparison.compare_runs(names, runs, of_settings, folder):
            print(line)
        print(folder / "compare.html")


@app.command()
def verify(
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    digest: Annotated[bool, typer.Option("--digest", help="Only print one sha256 of all files of the store.")] = False,
) -> None:
    """Read every byte of the activation store; what is bad is named, and made anew by the next harvest."""
    with _errors():
        from harvest import verify as verification
        from harvest.store_files import files_of

        directory = _find_any(config_file, overrides, runs)[0].directory("harvest")
        if digest:
            print(verification.digest(files_of(directory)))
            return
        with locked(directory, "harvest"):
            bad = verification.verify(files_of(directory))
            if bad:
                (directory / MANIFEST).unlink(missing_ok=True)
                raise UserError(
                    "\n".join(bad) + f"\n{len(bad)} bad shards are marked; `make harvest` redoes just these"
                )


@app.command()
def prune(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIRECTORY|SECTION.KEY=VALUE]...",
            help="Run directories to delete; without any, all that the settings do not use.",
        ),
    ] = None,
    config_file: Annotated[list[Path] | None, typer.Option("--config", "-c", help="Settings files to keep.")] = None,
    runs: Root = DEFAULT_RUNS,
    yes: Yes = False,
) -> None:
    """List the runs with size, age and users; delete what these settings do not use, or those named."""
    with _errors(runs):
        from pipeline import prune as pruning

        directories = [Path(target) for target in targets or [] if "=" not in target]
        overrides = [target for target in targets or [] if "=" in target]
        files = config_file or ([] if directories else [DEFAULT_CONFIG])
        used = {each.directory(s) for file in files for each in _find_any(file, overrides, runs) for s in each.stages}
        pruning.prune(runs, directories, used, _asker(yes), print)


@app.command()
def estimate(overrides: Overrides = None, config_file: ConfigFile = DEFAULT_CONFIG, runs: Root = DEFAULT_RUNS) -> None:
    """Say what these settings need (disk, memory, hours) from a short measurement of this machine."""
    with _errors(runs):
        settings = _load(config_file, overrides)
        from pipeline.estimate import estimate as lines

        for line in lines(settings, runs):
            print(line)


@app.command("dry-run")
def dry_run(overrides: Overrides = None, config_file: ConfigFile = DEFAULT_CONFIG, runs: Root = DEFAULT_RUNS) -> None:
    """Rehearse every stage of these settings in a minute, on a narrow random model and made-up text."""
    with _errors(runs):
        from pipeline.dry_run import dry_run as rehearse

        settings = _load(config_file, overrides)
        for report in rehearse(settings, runs / "dry-run" / config_file.stem, str(config_file), print):
            print(report)


def main() -> None:
    """Run one command; exit statuses as `_errors` gives them."""
    app(prog_name="python -m pipeline")
