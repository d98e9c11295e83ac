"""The `pipeline steer` command that writes what the explorer wrote, byte for byte."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.explore.catalog import Entry, Shelf
from pipeline.explore.requests import OperationAsked, SteerAsked
from pipeline.stages import Runs, swept

PROGRAM = (".venv/bin/python", "-m", "pipeline", "steer")


class Origin(NamedTuple):
    """The settings that the explorer was started with."""

    config_file: Path
    overrides: Sequence[str]
    runs: Path
    sweep: Sequence[Runs]

    def of(self, entry: Entry) -> list[str]:
        """Arguments that name the settings and the hook of one SAE."""
        chosen = [
            f"train.{'' if one.startswith('lr=') else 'sae.'}{one}" for one in swept(entry.runs, self.sweep).split()
        ]
        hooks = entry.runs.config.harvest.hooks
        return [
            *("--config", str(self.config_file), "--runs", str(self.runs)),
            *(["--hook", entry.hook] if len(hooks) > 1 else []),
            *self.overrides,
            *(["train.sweep=null", *chosen] if chosen else []),
        ]


def steering_command(origin: Origin, shelf: Shelf, asked: SteerAsked) -> str | None:
    """The command, for a shell; None for what `steer` has no options for: no operation, or a longer conversation.

    Raises UserError where the SAE's runs were deleted.
    """
    prompt = asked.prompt
    if asked.messages is not None:
        first, *more = asked.messages
        prompt = None if more or first.role != "user" or asked.chat is False else first.content
    if prompt is None or not asked.operations:
        return None
    options = {
        "max-new-tokens": asked.max_new_tokens,
        "temperature": asked.temperature,
        "top-p": asked.top_p,
        "seed": asked.seed,
    }
    chat = {None: [], True: ["--chat"], False: ["--no-chat"]}[asked.chat]
    return shlex.join(
        [
            *PROGRAM,
            *origin.of(shelf.entry),
            *(part for each in asked.operations for part in ("--feature", _spelt(each))),
            # Of a feature that never fires any will do: it is ablated or scaled.
            *(f"--max-activation={shelf.activity.largest(each.feature) or 1.0!r}" for each in asked.operations),
            "--together",
            *(f"--{name}={value}" for name, value in options.items()),
            *chat,
            f"--prompt={prompt}",
        ]
    )


def _spelt(operation: OperationAsked) -> str:
    strength = [] if operation.op == "ablate" else [repr(operation.strength)]
    return ":".join([str(operation.feature), operation.op, *strength, operation.where])
