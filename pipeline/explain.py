"""`pipeline explain`: the settings' section `explain` and what the command line adds, asked and checked before it runs.

Text of gated, private or local data leaves this machine only after a yes. An endpoint on this machine needs none.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import typer

from evaluate.explain_config import endpoint_of
from evaluate.loopback import is_here
from evaluate.visible import visible
from harvest.files import UserError
from pipeline.export import closed_sources
from pipeline.stages import Runs

Option = typer.Option


class Request(NamedTuple):
    """The options of the command; they stand in the place of settings."""

    base_url: Annotated[str | None, Option(help="explain.runtime.base_url, as http://127.0.0.1:8000/v1.")] = None
    model: Annotated[str | None, Option(help="explain.model: its name at the endpoint.")] = None
    feature: Annotated[list[int] | None, Option(help="explain.feature_ids: a feature to explain; may be repeated.")] = (
        None
    )
    parallel: Annotated[int | None, Option(help="explain.runtime.parallel: calls side by side.")] = None
    falsify: Annotated[bool, Option("--falsify", help="explain.falsify: also look for counterexamples.")] = False

    def overrides(self) -> list[str]:
        """The options as settings."""
        given = {
            "explain.runtime.base_url": self.base_url,
            "explain.model": self.model,
            "explain.feature_ids": self.feature and f"[{', '.join(map(str, self.feature))}]",
            "explain.runtime.parallel": self.parallel,
        }
        return [f"{name}={value}" for name, value in given.items() if value is not None]


def check_before_asking(sweep: Sequence[Runs], force: bool, confirm: Callable[[str], bool]) -> None:
    """See that the endpoint answers, and ask before text leaves this machine; nothing where all is complete.

    Raises UserError where it does not answer, and where the answer is no.
    """
    from evaluate.asking import check_endpoint

    config = sweep[0].config.explain
    assert config
    if not force and all(runs.of("explain").is_complete for runs in sweep):
        return
    where = endpoint_of(config)
    check_endpoint(where)
    closed = closed_sources(sweep[0].config)
    if not closed or is_here(where.base_url):
        return
    what, url = f"text of {', '.join(closed)}", visible(where.base_url)
    if not confirm(f"Send excerpts with {what} to {url}?"):
        raise UserError(f"explain: {what} would leave this machine for {url}; --yes sends it without asking")
