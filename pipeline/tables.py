"""Tables in the terminal: aligned columns of text that a terminal prints and never obeys."""

from collections.abc import Collection, Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluate.visible import visible
from harvest.progress import duration

WIDEST = 10_000  # characters; lines are never broken, so that scripts can read them


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of a table, two spaces between columns; numbers in the columns `right` end at one place."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for column in range(max(map(len, rows), default=0)):
        grid.add_column(justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(visible(cell)) for cell in row))
    out = Console(file=StringIO(), width=WIDEST, color_system=None)
    with out.capture() as captured:
        out.print(grid)
    return [line.rstrip() for line in captured.get().splitlines()]


def hours(seconds: float | None) -> str:
    """A time that may be long, as days where it is more than ten."""
    if seconds is None:
        return "unknown"
    return f"{seconds / 86400:,.0f} days" if seconds > 10 * 86400 else duration(seconds)


def figures(summary: dict[str, Any]) -> list[str]:
    """The figures of a stage as a person reads them at its end; those of its parts are named after them."""
    rows = []
    for key, value in summary.items():
        if isinstance(value, dict):
            rows += [(f"  {key}  {k}", _figure(v)) for k, v in value.items() if _is_shown(k, v)]
        elif not isinstance(value, list):
            rows.append((f"  {key}", _figure(value)))
    return table(rows)


def _is_shown(name: str, value: Any) -> bool:
    """Whether a line says anything: no reasons and the like, and no rows of a kind that there were none of."""
    return not isinstance(value, dict | list) and not (name.startswith("rows_") and value == 0)


def _figure(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
