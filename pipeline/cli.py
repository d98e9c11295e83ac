"""The command line: `python -m pipeline COMMAND --config FILE [section.key=value ...]`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import config, share_commands, stages
from pipeline import status as status_of
from pipeline.command import (
    DEFAULT_CONFIG,
    DEFAULT_RUNS,
    AllowMixed,
    ConfigFile,
    Force,
    Overrides,
    Root,
    Yes,
    app,
    asker,
    errors,
    find,
    find_any,
    load_settings,
)
from pipeline.fingerprint import STAGES

__all__ = ["app", "main", "share_commands"]  # the last adds commands of its own to app


def _run(
    names: tuple[str, ...],
    file: Path,
    overrides: list[str] | None,
    root: Path,
    allow_mixed: bool,
    force: bool,
    yes: bool,
) -> None:
    with errors(root):
        sweep = find_any(file, overrides, root)
        for warning in config.given_twice(overrides or []):
            print(f"warning: {warning}", file=sys.stderr, flush=True)

        confirm = asker(yes)
        for name in names:
            stages.run_stage(sweep, name, allow_mixed=allow_mixed, force=force, confirm=confirm)
        if names[-1] == "evaluate":
            for runs in sweep:
                print(runs.directory("evaluate") / "report.html")


STAGE_HELP = {
    "sample": "Turn the sources' text into packed contexts of tokens.",
    "harvest": "Run the model over the contexts and write its activations into a store.",
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


for _stage in STAGE_HELP:
    _add_stage(_stage)


@app.command()
def train(
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    allow_mixed: AllowMixed = False,
    force: Force = False,
    yes: Yes = False,
) -> None:
    """Train one SAE for each hook from the store."""
    _run(("train",), config_file, overrides, runs, allow_mixed, force, yes)


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
    with errors(runs):
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
    allow_mixed: AllowMixed = False,
) -> None:
    """Harvest, train on and delete one window after another: the same SAE, byte for byte, on a fraction of the disk."""
    with errors(runs):
        from pipeline import stream as streaming

        streaming.stream(find(config_file, overrides, runs), allow_mixed=allow_mixed)


@app.command()
def status(overrides: Overrides = None, config_file: ConfigFile = DEFAULT_CONFIG, runs: Root = DEFAULT_RUNS) -> None:
    """Say which stages are complete, which would run, and why."""
    with errors():
        for line in status_of.status_lines(find_any(config_file, overrides, runs)):
            print(line)


@app.command()
def path(
    stage: Annotated[str, typer.Argument(help=f"One of {', '.join(STAGES)}.")],
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
) -> None:
    """Print a stage's directory for these settings (one for each of a sweep) and nothing else, for scripts."""
    with errors():
        if stage not in STAGES:
            raise config.SettingsError(f"path: {stage!r}: not a stage; one of {', '.join(STAGES)}")
        sweep = find_any(config_file, overrides, runs)
        if stage not in sweep[0].stages:
            raise config.SettingsError(f"path: {stage!r}: these settings ingest activations and have no such stage")
        for directory in dict.fromkeys(each.directory(stage) for each in sweep):
            print(directory)


@app.command()
def verify(
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    runs: Root = DEFAULT_RUNS,
    digest: Annotated[bool, typer.Option("--digest", help="Only print one sha256 of all files of the store.")] = False,
) -> None:
    """Read every byte that the stages left; what is bad is named, and rows are made anew by the next harvest."""
    with errors():
        from pipeline import verification

        sweep = find_any(config_file, overrides, runs)
        if digest:
            print(verification.store_digest(sweep[0]))
            return
        verification.verify(sweep, print)


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
    with errors(runs):
        from pipeline import prune as pruning

        directories = [Path(target) for target in targets or [] if "=" not in target]
        overrides = [target for target in targets or [] if "=" in target]
        files = config_file or ([] if directories else [DEFAULT_CONFIG])
        used = {each.directory(s) for file in files for each in find_any(file, overrides, runs) for s in each.stages}
        pruning.prune(runs, directories, used, asker(yes), print)


@app.command()
def estimate(overrides: Overrides = None, config_file: ConfigFile = DEFAULT_CONFIG, runs: Root = DEFAULT_RUNS) -> None:
    """Say what these settings need (disk, memory, hours) from a short measurement of this machine."""
    with errors(runs):
        settings = load_settings(config_file, overrides)
        from pipeline.estimate import estimate as lines

        for line in lines(settings, runs):
            print(line)


@app.command("dry-run")
def dry_run(overrides: Overrides = None, config_file: ConfigFile = DEFAULT_CONFIG, runs: Root = DEFAULT_RUNS) -> None:
    """Rehearse every stage of these settings in a minute, on a narrow random model and made-up text."""
    with errors(runs):
        from pipeline.dry_run import dry_run as rehearse

        settings = load_settings(config_file, overrides)
        for report in rehearse(settings, runs / "dry-run" / config_file.stem, str(config_file), print):
            print(report)


def main() -> None:
    """Run one command; exit statuses as `errors` gives them."""
    app(prog_name="python -m pipeline")
