"""The figures of an evaluation: one typed table, which report, pages, compare, model card and terminal read.

metrics.json, schema 2
    fingerprint, inputs     of this evaluation, and of the stages before by name
    which_sae, left_out     "last" or "best"; analyses that lack the model or text that they need
    saes                    for each SAE: its name ("" for the run's own), hook, what is known of a third-party one,
                            figures [{section, name, rows, source, value, interval}], and lists by section: what is no
                            single number (histogram, best features, completions)
    definitions             [{section, name, title, unit, text}]
"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harvest.files import UserError, read_json, write_sealed

FILE = "metrics.json"
SCHEMA = 2
KEPT, EVERY = "outliers_excluded", "all_rows"  # which rows were counted

Definitions = dict[str, dict[str, dict[str, str]]]  # section -> name -> title, unit, text


class Figure(NamedTuple):
    """One number, with all that is needed to read it."""

    section: str  # the analysis that it comes from
    name: str
    value: float | None
    rows: str = ""  # counted: KEPT or EVERY, "sources" or "models" of a comparison, a benchmark's condition, or ""
    source: str = "all"  # contexts counted: "all", a source, or source/value for a stratum
    interval: tuple[float, float] | None = None  # 95%
    unit: str = ""
    definition: str = ""


STORED = Figure._fields[:6]  # the rest is found in the definitions


class Section(NamedTuple):
    """What an analysis gives."""

    figures: list[Figure]
    lists: dict[str, Any]  # what is no single number


class Measured(NamedTuple):
    """One SAE and its figures."""

    name: str  # in evaluate.also; "" for the run's own
    hook: str
    about: dict[str, Any]  # of a third-party SAE, `label` of one in the place of training
    figures: tuple[Figure, ...]
    lists: dict[str, Any]

    def figure(self, name: str, section: str = "", rows: str = "", source: str = "all") -> Figure | None:
        """The first figure of this name; those without outliers come first. None where it was not measured."""
        for f in self.figures:
            if (f.name, f.source) == (name, source) and section in ("", f.section) and rows in ("", f.rows):
                return f
        return None

    def value(self, name: str, section: str = "", rows: str = "", source: str = "all") -> float | None:
        """The value of the figure that `figure` gives."""
        found = self.figure(name, section, rows, source)
        return found.value if found else None

    def table(self, section: str) -> dict[tuple[str, str], dict[str, Figure]]:
        """The figures of a section by (rows, source), then name."""
        table: dict[tuple[str, str], dict[str, Figure]] = {}
        for figure in self.figures:
            if figure.section == section:
                table.setdefault((figure.rows, figure.source), {})[figure.name] = figure
        return table


class Evaluation(NamedTuple):
    """What metrics.json holds."""

    fingerprint: str
    inputs: dict[str, str]
    which_sae: str
    left_out: list[str]
    saes: tuple[Measured, ...]  # the run's own come first
    definitions: Definitions

    def own(self, hook: str) -> Measured | None:
        """The run's own SAE at a hook."""
        return next((sae for sae in self.saes if sae.hook == hook and not sae.name), None)


def definitions() -> Definitions:
    """Title, unit and text of every figure by section and name, from definitions.toml."""
    return tomllib.loads(Path(__file__).with_name("definitions.toml").read_text(encoding="utf-8"))


def figures_of(
    section: str, values: Mapping[str, Any], rows: str = "", source: str = "all", names: Iterable[str] = ()
) -> list[Figure]:
    """Figures from values by name, in the order of `names` (all if empty); `<name>_interval` is the interval of one."""
    chosen = [name for name in names or values if name in values and not name.endswith("_interval")]
    return [Figure(section, name, values[name], rows, source, values.get(f"{name}_interval")) for name in chosen]


def write_figures(directory: Path, evaluation: Evaluation) -> None:
    """Write metrics.json. A figure's unit and definition are stored once, in `definitions`."""
    saes = [
        sae._asdict() | {"figures": [dict(zip(STORED, figure, strict=False)) for figure in sae.figures]}
        for sae in evaluation.saes
    ]
    about = [
        {"section": s, "name": n, **of} for s, by_name in evaluation.definitions.items() for n, of in by_name.items()
    ]
    write_sealed(directory / FILE, {"schema": SCHEMA, **evaluation._asdict(), "saes": saes, "definitions": about})


def read_figures(directory: Path) -> Evaluation:
    """The figures of an evaluate directory.

    Raises UserError when metrics.json is missing, damaged or of another version.
    """
    path = directory / FILE
    raw = read_json(path)
    if raw.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema: {raw.get('schema')!r}: this code reads {SCHEMA}; `make eval` makes it anew")
    try:
        about: Definitions = {}
        for each in raw["definitions"]:
            about.setdefault(each.pop("section"), {})[each.pop("name")] = each
        saes = tuple(_measured(sae, about) for sae in raw["saes"])
        return Evaluation(**{name: raw[name] for name in Evaluation._fields} | {"saes": saes, "definitions": about})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {error!r}; `make eval` makes it anew") from None


def _measured(sae: dict[str, Any], about: Definitions) -> Measured:
    figures = []
    for row in sae["figures"]:
        of = about.get(row["section"], {}).get(row["name"], {})
        interval = tuple(row["interval"]) if row["interval"] else None
        figures.append(Figure(**row | {"interval": interval}, unit=of.get("unit", ""), definition=of.get("text", "")))
    return Measured(**{**sae, "figures": tuple(figures)})


def text(value: float | None, name: str = "") -> str:
    """A figure's value as tables write it: counts whole, L0 and MSE with one digit after the point, else three."""
    if value is None:
        return "–"
    if name in ("rows", "contexts"):
        return f"{value:,.0f}"
    if name in ("l0", "mse"):
        return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:.3f}"
