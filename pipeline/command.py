"""How commands are made: options that they share, the settings that these name, and errors as a user reads them."""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

from harvest.files import UnreachableError, UserError, is_out_of_memory
from pipeline import stages
from pipeline.config import PipelineConfig, load
from pipeline.settings_text import SettingsError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train and read sparse autoencoders on reasoning models, in stages: sample, harvest, train, evaluate.",
)

DEFAULT_CONFIG = Path("configs/smollm2.yaml")
Root = Annotated[Path, typer.Option("--runs", help="Folder of all results.")]
AllowMixed = Annotated[bool, typer.Option(help="Resume under other numerics (device, torch, ...), and record it.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]

FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
INTERRUPTED = 130  # the shell's status for SIGINT


class Given(NamedTuple):
    """What nearly every command takes: settings, and where results lie."""

    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's."),
    ] = None
    config_file: Annotated[Path, typer.Option("--config", "-c", help="Settings file.")] = DEFAULT_CONFIG
    runs: Root = Path("runs")

    def settings(self) -> PipelineConfig:
        """The settings."""
        return load(self.config_file, self.overrides or [])

    def settings_of_text(self) -> PipelineConfig:
        """The settings, for what needs a model and text. Raises SettingsError where there is neither."""
        settings = self.settings()
        if settings.ingest:
            raise SettingsError(
                f"{self.config_file}: ingests activations: there is no model and no text, which this needs"
            )
        return settings

    def find(self) -> list[stages.Runs]:
        """The runs of these settings."""
        return stages.find_runs(self.settings(), self.runs)

    def find_of_text(self) -> list[stages.Runs]:
        """The runs of these settings, for what needs a model and text."""
        return stages.find_runs(self.settings_of_text(), self.runs)


class How(NamedTuple):
    """How a stage is started."""

    allow_mixed: AllowMixed = False
    force: Annotated[bool, typer.Option(help="Clear this stage's directory and run anew; asks if it is complete.")] = (
        False
    )
    yes: Yes = False


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command. A parameter whose type is a NamedTuple stands for options named as its fields."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {n: kind for n, kind in hints.items() if hasattr(kind, "_fields")}
        parameters: list[Parameter] = []
        for own in signature(function).parameters.values():
            kind = groups.get(own.name)
            if kind is None:
                parameters.append(own.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[own.name]))
                continue
            types = get_type_hints(kind, include_extras=True)
            for field in kind._fields:
                default = kind._field_defaults.get(field, Parameter.empty)
                made = Parameter(field, Parameter.KEYWORD_ONLY, default=default, annotation=types[field])
                parameters.append(made)

        def run(**options: Any) -> None:
            with errors(options.get("runs", Path("runs"))):
                grouped = {n: kind(*(options.pop(field) for field in kind._fields)) for n, kind in groups.items()}
                function(**grouped, **options)

        run.__doc__ = function.__doc__
        run.__annotations__ = {made.name: made.annotation for made in parameters}
        run.__dict__["__signature__"] = Signature(parameters)
        app.command(name or function.__name__)(run)
        return function

    return add


@contextmanager
def errors(root: Path) -> Iterator[None]:
    """Turn what a user can mend into one sentence and an exit status: 2 for settings, 1 for the rest."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except SettingsError as error:
        _stop(error, 2)
    except (UserError, UnreachableError) as error:
        _stop(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _stop(
            f"out of memory ({reason}). What was complete is untouched; lower what a stage holds at once (harvest."
            "batch_contexts, train.batch_size, train.pool_rows, train.sae, evaluate.batch_rows, benchmark.slots)"
        )
    except OSError as error:
        if error.errno not in FULL_OR_FORBIDDEN and not error.filename:
            raise
        where, reason = error.filename or root, os.strerror(error.errno) if error.errno else str(error)
        _stop(
            f"{where}: {reason}. What was complete is untouched; mend it (or choose another folder with --runs) "
            "and run the same command again to go on"
        )
    except KeyboardInterrupt as error:
        text = " ".join(["interrupted", *map(str, error.args)])
        print(f"{text}: nothing complete is lost; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _stop(error: Exception | str, status: int = 1) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)


def asker(yes: bool) -> Callable[[str], bool]:
    """Asks on a terminal; elsewhere the answer is `--yes` or no."""
    return lambda question: yes or (sys.stdin.isatty() and typer.confirm(question))
