"""The command line: `python -m pipeline COMMAND --config FILE [section.key=value ...]`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import explain as explaining
from pipeline import generate as generating
from pipeline import steer as steering
from pipeline.command import DEFAULT_CONFIG, AllowMixed, Given, How, Root, Yes, app, asker, command
from pipeline.fingerprint import EVERY_STAGE, STAGES
from pipeline.running import run_stage
from pipeline.settings_text import SettingsError, given_twice
from pipeline.status import status_lines

STAGE_HELP = {
    "sample": "Turn the sources' text into packed contexts of tokens.",
    "harvest": "Run the model over the contexts and write its activations into a store.",
    "train": "Train one SAE for each hook from the store; with `published`, fetch and check that SAE instead.",
    "evaluate": "Measure the SAE on held-out text and write report.html and metrics.json.",
}
PAGES = {"evaluate": "report.html", "explain": "report.html", "benchmark": "benchmark.html"}


def _run(names: tuple[str, ...], given: Given, how: How) -> None:
    sweep = given.find()
    for warning in given_twice(given.overrides or []):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    for name in names:
        run_stage(sweep, name, allow_mixed=how.allow_mixed, force=how.force, confirm=asker(how.yes))
    if page := PAGES.get(names[-1]):
        for run in {runs.directory(names[-1]): runs.of(names[-1]) for runs in sweep}.values():
            if run.is_complete:  # other workers may have problems to answer
                print(run.path / page)


def _add_stage(stage: str, text: str) -> None:
    def run_stage_alone(given: Given, how: How) -> None:
        _run((stage,), given, how)

    run_stage_alone.__doc__ = text
    command(stage)(run_stage_alone)


for _stage, _text in STAGE_HELP.items():
    _add_stage(_stage, _text)


@command()
def ingest(given: Given, how: How) -> None:
    """Turn activations that are there (.npy, .safetensors, .pt, a SAELens cache) into a store: ingest.path=FILE."""
    if given.config_file == DEFAULT_CONFIG:
        given = given._replace(config_file=Path("configs/ingest.yaml"))
    if not given.settings().ingest:
        raise SettingsError(f"{given.config_file}: has no section `ingest`; configs/ingest.yaml is an example")
    _run(("harvest",), given, how)


@command()
def explain(request: explaining.Request, given: Given, how: How) -> None:
    """Let a language model say what features mean, and test how well that predicts; writes pages with it."""
    given = given._replace(overrides=[*(given.overrides or []), *request.overrides()])
    config = given.settings_of_text().explain
    if not config:
        raise SettingsError("explain: no model to ask: give --model NAME, or explain.model in the settings")
    if request.falsify and not config.falsify:
        given = given._replace(overrides=[*(given.overrides or []), "explain.falsify={}"])
    explaining.check_before_asking(given.find(), how.force, asker(how.yes))
    _run(("explain",), given, how)


@command()
def benchmark(given: Given, how: How) -> None:
    """Let the model answer problems with features operated on and without, grade the answers, and compare in pairs."""
    settings = given.settings_of_text()
    if not settings.evaluate.features:
        raise SettingsError("evaluate.features: null: benchmark reads what it writes; leave evaluate.features as it is")
    if not settings.benchmark:
        given = given._replace(overrides=[*(given.overrides or []), "benchmark={}"])
    _run(("benchmark",), given, how)


@command()
def run(given: Given, allow_mixed: AllowMixed = False) -> None:
    """All stages, each only if it is not complete; ends with the path of the report."""
    _run(STAGES, given, How(allow_mixed))


@command()
def stream(given: Given, allow_mixed: AllowMixed = False) -> None:
    """Harvest, train on and delete one window after another: the same SAE, byte for byte, on a fraction of the disk."""
    from pipeline import stream as streaming

    streaming.stream(given.find_of_text(), allow_mixed=allow_mixed)


@command()
def status(given: Given) -> None:
    """Say which stages are complete, which would run, and why."""
    print("\n".join(status_lines(given.find())))


@command()
def path(stage: Annotated[str, typer.Argument(help=f"One of {', '.join(EVERY_STAGE)}.")], given: Given) -> None:
    """Print a stage's directory for these settings (one for each of a sweep) and nothing else, for scripts."""
    if stage not in EVERY_STAGE:
        raise SettingsError(f"path: {stage!r}: not a stage; one of {', '.join(EVERY_STAGE)}")
    sweep = given.find()
    if stage not in sweep[0].stages:
        why = "ingest activations and have no such stage" if stage in STAGES else f"have no section `{stage}`"
        raise SettingsError(f"path: {stage!r}: these settings {why}")
    for directory in dict.fromkeys(each.directory(stage) for each in sweep):
        print(directory)


@command()
def verify(
    given: Given,
    digest: Annotated[bool, typer.Option("--digest", help="Only print one sha256 of all files of the store.")] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Of the store only so many shards, drawn at random: a quick look.")
    ] = None,
) -> None:
    """Read every byte of the stages' results; what is bad is named, and rows are made anew by the next harvest.

    Interrupted, it goes on where it was.
    """
    from harvest import verify as store_verification
    from harvest.store_files import files_of
    from pipeline import verification

    sweep = given.find()
    if digest:
        print(store_verification.digest(files_of(sweep[0].directory("harvest"))))
        return
    verification.verify(sweep, print, sample)


@command()
def prune(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIRECTORY|SECTION.KEY=VALUE]...",
            help="Run directories to delete; without any, all that the settings do not use.",
        ),
    ] = None,
    config_file: Annotated[list[Path] | None, typer.Option("--config", "-c", help="Settings files to keep.")] = None,
    runs: Root = Path("runs"),
    yes: Yes = False,
) -> None:
    """List the runs with size, age and users; delete what these settings do not use, or those named."""
    from pipeline import prune as pruning

    directories = [Path(target) for target in targets or [] if "=" not in target]
    overrides = [target for target in targets or [] if "=" in target]
    files = config_file or ([] if directories else [DEFAULT_CONFIG])
    sweeps = [each for file in files for each in Given(overrides, file, runs).find()]
    used = {each.directory(stage) for each in sweeps for stage in each.stages}
    starts = [each.config.train and each.config.train.start_from for each in sweeps]
    used |= {run for start in starts if start and (run := pruning.start_run(start.path, runs))}
    pruning.prune(runs, directories, used, asker(yes), print)


@command()
def estimate(given: Given) -> None:
    """Say what these settings need (disk, memory, hours) from a short measurement of this machine."""
    settings = given.settings_of_text()
    from pipeline.estimate import estimate as lines

    for line in lines(settings, given.runs):
        print(line)


@command("dry-run")
def dry_run(given: Given) -> None:
    """Rehearse these settings up to the report, in a minute or two, on a narrow random model and made-up text."""
    from pipeline.dry_run import dry_run as rehearse

    folder = given.runs / "dry-run" / given.config_file.stem
    for report in rehearse(given.settings_of_text(), folder, str(given.config_file), print):
        print(report)


@command()
def export(
    given: Given,
    to: Annotated[Path | None, typer.Option(help="Folder to write; runs/export/FINGERPRINT by default.")] = None,
    model_name: Annotated[str | None, typer.Option(help="Hub id of a model that is a local folder.")] = None,
    force: Annotated[bool, typer.Option(help="Write an older export anew.")] = False,
    to_lm_eval: Annotated[
        Path | None, typer.Option("--steering", help="Write features to add to this .pt file of lm-eval's instead.")
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option(help="Of --steering: 123, or 123:add:2 with its strength; repeatable.")
    ] = None,
    hook: Annotated[
        str | None, typer.Option(help="Of --steering: which SAE, where several hooks were trained.")
    ] = None,
) -> None:
    """Write the trained SAEs as SAELens folders with a model card, or features for lm-eval; prints the path."""
    from pipeline import export as exports

    if to_lm_eval is None and (feature or hook):
        raise SettingsError("export: --feature and --hook go with --steering FILE.pt")
    if to_lm_eval is not None:
        from pipeline.steering_file import write_steering

        print(write_steering(given.find_of_text(), to_lm_eval, feature or [], hook, force))
        return
    print(exports.export(given.find_of_text(), to, model_name, force))


@command()
def steer(request: steering.Request, given: Given) -> None:
    """Let the model write with features amplified, set, ablated or scaled, and without, side by side."""
    steering.steer(given.find_of_text(), request)


@command()
def generate(request: generating.Request, given: Given) -> None:
    """Let the model answer prompts, steered or not, and write it as conversations that `sample` reads."""
    generating.generate(given.find_of_text(), request)


@command()
def explore(
    given: Given,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; default: the first free one from 7860 on.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own asks for the token that is printed.")
    ] = "127.0.0.1",
    browse: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open a browser; default: where there is a desktop.")
    ] = None,
) -> None:
    """Type text and see features fire, look at any feature, steer the model: in a browser, and for programs."""
    from pipeline.explore.serve import serve

    serve(given.find(), given.config_file, given.overrides or [], host, port, browse)


@command()
def push(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub; made if absent.")],
    given: Given,
    folder: Annotated[Path | None, typer.Option(help="The export; runs/export/FINGERPRINT by default.")] = None,
    with_text: Annotated[bool, typer.Option("--with-text", help="Push pages with text of gated data too.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Push; without it, only show what would be pushed.")] = False,
) -> None:
    """Push an export and its figures to the hub; without --yes, only say what would be pushed."""
    from pipeline import push as pushing

    planned = pushing.plan_push(given.find_of_text(), folder, with_text)
    pushing.push(repository, planned, public=public, yes=yes, say=print)


@command()
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [SECTION.KEY=VALUE]...",
            help="Evaluate directories, fingerprints (of evaluate or train), or settings files with their overrides.",
        ),
    ],
    runs: Root = Path("runs"),
    to: Annotated[
        Path | None, typer.Option(help="Folder of compare.html and compare.json; runs/compare by default.")
    ] = None,
) -> None:
    """Lay evaluated runs, or those of a sweep, side by side: a table, and L0 against fidelity as a plot."""
    from pipeline import compare as comparison

    overrides = [target for target in targets if "=" in target]
    names = [target for target in targets if "=" not in target]
    if not names:
        raise SettingsError("compare: name at least one run or settings file")
    folder = to or runs / "compare"
    for line in comparison.compare_runs(names, overrides, runs, folder):
        print(line)
    print(folder / "compare.html")


@command("diff-stages")
def diff_stages(
    model_first: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Last training run of a path: train directory, fingerprint or settings file."
        ),
    ],
    data_first: Annotated[str, typer.Argument(metavar="RUN", help="Last training run of the other path.")],
    runs: Root = Path("runs"),
    to: Annotated[Path | None, typer.Option(help="Folder of the report; runs/diff-stages by default.")] = None,
) -> None:
    """Rank features by how far they turn while an SAE is fine-tuned along two paths (train.start_from)."""
    from pipeline import diff_stages as staged

    folder = to or runs / "diff-stages"
    for line in staged.diff_stages((model_first, data_first), runs, folder):
        print(line)
    print(folder / "diff-stages.html")


def main() -> None:
    """Run one command; exit statuses as `errors` gives them."""
    app(prog_name="python -m pipeline")
