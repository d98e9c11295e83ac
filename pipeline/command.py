"""What the commands share: options, the settings and runs that they name, and errors as a user reads them."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from harvest.files import UnreachableError, UserError, is_out_of_memory
from pipeline import config, stages

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

FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
INTERRUPTED = 130  # the shell's status for SIGINT


@contextmanager
def errors(root: Path = DEFAULT_RUNS) -> Iterator[None]:
    """Turn what a user can mend into one sentence and an exit status: 2 for settings, 1 for the rest."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except config.SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (UserError, UnreachableError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(
            f"error: out of memory ({reason}). What was complete is untouched; lower what a stage holds at once "
            "(harvest.batch_contexts, train.batch_size, train.pool_rows, train.sae, evaluate.batch_rows)",
            file=sys.stderr,
        )
        sys.exit(1)
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN and not error.filename:
            raise
        where, reason = error.filename or root, os.strerror(error.errno) if error.errno else str(error)
        print(
            f"error: {where}: {reason}. What was complete is untouched; mend it (or choose another folder with --runs) "
            "and run the same command again to go on",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt as error:
        text = " ".join(["interrupted", *map(str, error.args)])
        print(f"{text}: nothing complete is lost; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def load_settings(file: Path, overrides: list[str] | None) -> config.PipelineConfig:
    """Settings with a model and text, for what needs them. Raises SettingsError for others."""
    settings = config.load(file, overrides or [])
    if isinstance(settings, config.IngestedConfig):
        raise config.SettingsError(f"{file}: ingests activations: there is no model and no text, which this needs")
    return settings


def find(file: Path, overrides: list[str] | None, root: Path) -> list[stages.Runs]:
    """The runs of settings with a model and text."""
    return stages.find_runs(load_settings(file, overrides), root)


def find_any(file: Path, overrides: list[str] | None, root: Path) -> list[stages.AnyRuns]:
    """The runs of any settings."""
    return [*stages.find_runs(config.load(file, overrides or []), root)]


def asker(yes: bool) -> Callable[[str], bool]:
    """Asks on a terminal; elsewhere the answer is `--yes` or no."""
    return lambda question: yes or (sys.stdin.isatty() and typer.confirm(question))
