"""`pipeline compare`: find evaluated runs by directory, fingerprint or settings file, and lay them side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluate.compare import FIGURES, Evaluated, compare, short_name, titles, write_comparison
from evaluate.figures import read_figures, text
from harvest.files import UserError, read_json
from pipeline.fingerprint import STAGES
from pipeline.manifest import FINGERPRINT, MANIFEST, is_complete, read_manifest, read_metrics


def compare_runs(names: Sequence[str], root: Path, of_settings: Callable[[Path], list[Path]], to: Path) -> list[str]:
    """Write compare.html and compare.json into `to`; returns the table's lines.

    A name is an evaluate directory, the fingerprint of one or of a train directory, or a settings file, whose
    evaluate directories `of_settings` gives. Raises UserError for what is none of them or not evaluated.
    """
    found = [directory for name in names for directory in _directories(name, root, of_settings)]
    runs = [_read(directory) for directory in dict.fromkeys(path.resolve() for path in found)]
    rows = compare(runs)
    write_comparison(to, rows)
    return _table(rows)


def _directories(name: str, root: Path, of_settings: Callable[[Path], list[Path]]) -> list[Path]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        directories = of_settings(path)
        missing = [directory for directory in directories if not is_complete(directory)]
        if missing:
            raise UserError(
                f"{name}: {len(missing)} of {len(directories)} runs are not evaluated ({missing[0]}); run `make eval` "
                "with the same CONFIG and SET first"
            )
        return directories
    if (path / MANIFEST).exists():
        return [path]
    if FINGERPRINT.fullmatch(name):
        if is_complete(root / "evaluate" / name):
            return [root / "evaluate" / name]
        every = sorted((root / "evaluate").glob(f"*/{MANIFEST}"))
        of_train = [file.parent for file in every if Path(str(read_json(file).get("upstream"))).name == name]
        if of_train:
            return of_train
    raise UserError(
        f"{name!r}: neither a settings file, nor a complete evaluate directory, nor the fingerprint of an evaluated "
        f"run under {root}"
    )


def _read(directory: Path) -> Evaluated:
    manifest = read_manifest(directory)
    if manifest.get("stage") != "evaluate":
        raise UserError(f"{directory}: a {manifest.get('stage')} directory; compare takes those of evaluate")
    read_metrics(directory)
    figures = read_figures(directory)
    settings: dict[str, Any] = {}
    for stage in STAGES:
        fingerprint = directory.name if stage == "evaluate" else figures.inputs.get(stage)
        here = directory.parents[1] / stage / str(fingerprint)
        if is_complete(here):  # a stage before may have been pruned; ingested activations have no sample
            settings |= _flat(read_json(here / MANIFEST)["settings"], stage)
    return Evaluated(directory.name, figures, settings)


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}").items()}
    return {prefix: value}


def _table(rows: list[dict[str, Any]]) -> list[str]:
    differing = sorted({name for row in rows for name in row["settings"]})
    cells = [["run", "hook", *map(short_name, differing), *(titles()[name] for name in FIGURES)]]
    for row in rows:
        settings = [_plain(row["settings"].get(name, "")) for name in differing]
        figures = [text(row["figures"][name], name) for name in FIGURES]
        cells.append([_plain(row["sae"] or row["run"]), _plain(row["hook"]), *settings, *figures])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    sides = ["<", "<"] + [">"] * len(widths)
    return ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=False)).rstrip() for line in cells]


def _plain(value: Any) -> str:
    """Text that a terminal prints and never obeys."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    return text if len(text) <= 40 else f"{text[:37]}..."
