"""Stage-wise diffing: how far the decoder row of each feature turns while an SAE is fine-tuned along two paths.

An SAE is fine-tuned from stage to stage, once on the new model first and once on the new data first (Anthropic,
transformer-circuits.pub/2024/model-diffing). A feature keeps its number, so its row can be followed. One that turns
along both paths has changed its meaning whichever came first.

Shape suffixes: F d_sae, D d_in, K steps of a path, N rows of the table.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluate.charts import cells
from evaluate.diff import CELLS, FLOOR, density_cells
from evaluate.report import environment, write_text
from harvest.files import replacing, write_json

BLOCK = 4096  # rows that are taken as float64 at a time
LISTED = 50
RANKINGS = {
    "score": "turned along both paths",
    "last_step": "turned in the last step of both paths",
}
DEFINITIONS = {
    "turned": "1 − cosine of the decoder rows of a feature in the first and the last SAE of a path: 0 is the same "
    "direction, 1 a right angle; a step is the same between two neighbours of the path",
    "score": "the smaller of what the feature turned along the two paths",
    "last_step": "the smaller of what it turned in the last step of each path, where the other half of the change was "
    "already learned",
}


class Stage(NamedTuple):
    """An SAE of a path, and what it was trained on."""

    name: str
    model: str
    sources: str


class Turns(NamedTuple):
    """How far every feature turns along a path: cosine distances, NaN where a row is zero."""

    total_F: np.ndarray
    step_KF: np.ndarray


class Pages(NamedTuple):
    """Pages of features of an evaluated stage."""

    name: str
    links: dict[int, str]  # by feature, relative to the report


class HookTurns(NamedTuple):
    """What becomes of the features of one hook."""

    hook: str
    paths: tuple[Turns, Turns]
    pages: Sequence[Pages]

    def score(self, ranking: str) -> np.ndarray:
        """(F,) float64 by which features are ranked, a key of RANKINGS; NaN where a row is zero."""
        one, two = (turns.total_F if ranking == "score" else turns.step_KF[-1] for turns in self.paths)
        return np.minimum(one, two)

    @property
    def rankings(self) -> list[str]:
        """Those that say different things: a path of one step has no other last one."""
        return list(RANKINGS) if all(len(turns.step_KF) > 1 for turns in self.paths) else ["score"]


def turned(before_FD: np.ndarray, after_FD: np.ndarray) -> np.ndarray:
    """Cosine distance (F,) of rows, float64; NaN where one is zero."""
    out_F = np.empty(len(before_FD))
    for first in range(0, len(before_FD), BLOCK):
        rows = slice(first, first + BLOCK)
        with np.errstate(invalid="ignore"):
            one, two = (
                part / np.linalg.norm(part, axis=1, keepdims=True)
                for part in (before_FD[rows].astype(np.float64), after_FD[rows].astype(np.float64))
            )
        out_F[rows] = ((one - two) ** 2).sum(1) / 2  # 1 − one·two would lose small angles
    return out_F


def along(decoders: Iterable[np.ndarray]) -> Turns:
    """How far rows turn along a path; `decoders` are (F, D) each, two at least, of which three are held at a time."""
    first = before = next(given := iter(decoders))
    steps = []
    for after in given:
        steps.append(turned(before, after))
        before = after
    return Turns(turned(first, before), np.stack(steps))


def ranked(score_F: np.ndarray) -> np.ndarray:
    """Features (F,) int64, largest score first; those without one come last."""
    return np.argsort(-np.nan_to_num(score_F, nan=-np.inf), kind="stable")


def top_rows(found: HookTurns, ranking: str) -> list[dict[str, Any]]:
    """The first features of a ranking, as the table has them."""
    score_F = found.score(ranking)
    chosen_N = [int(i) for i in ranked(score_F)[:LISTED] if not np.isnan(score_F[i])]
    return [
        {
            "feature": i,
            ranking: float(score_F[i]),
            "turned": [float(turns.total_F[i]) for turns in found.paths],
            "steps": [[float(x) for x in turns.step_KF[:, i]] for turns in found.paths],
            "pages": {pages.name: pages.links[i] for pages in found.pages if i in pages.links},
        }
        for i in chosen_N
    ]


def write_rotations(folder: Path, paths: Sequence[Sequence[Stage]], hooks: dict[str, HookTurns]) -> None:
    """Write diff-stages.html, diff-stages.json and, for each hook by the name of its file, features-<name>.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in hooks.items():
        _write_csv(folder / f"features-{name}.csv", found)
    described = {
        name: {
            "hook": found.hook,
            "d_sae": len(found.paths[0].total_F),
            "without_direction": int(np.isnan(found.score("score")).sum()),
            "quantiles": {str(q): [_quantile(turns.total_F, q) for turns in found.paths] for q in (0.5, 0.9, 0.99)},
            "top": {ranking: top_rows(found, ranking) for ranking in found.rankings},
        }
        for name, found in hooks.items()
    }
    stages = [[stage._asdict() for stage in path] for path in paths]
    write_json(
        folder / "diff-stages.json", {"schema": 1, "paths": stages, "hooks": described, "definitions": DEFINITIONS}
    )
    charts = {name: [_chart(found, ranking) for ranking in found.rankings] for name, found in hooks.items()}
    template = environment({}).get_template("diff_stages.html")
    html = template.render(paths=paths, hooks=described, charts=charts, titles=RANKINGS, definitions=DEFINITIONS)
    write_text(folder / "diff-stages.html", html)


def _quantile(total_F: np.ndarray, q: float) -> float | None:
    known = total_F[~np.isnan(total_F)]
    return float(np.quantile(known, q)) if len(known) else None


def _chart(found: HookTurns, ranking: str) -> Any:
    one, two = (turns.total_F if ranking == "score" else turns.step_KF[-1] for turns in found.paths)
    known = ~np.isnan(one) & ~np.isnan(two)
    what = "turned" if ranking == "score" else "turned in the last step"
    title = f"Features by how far they {what}"
    return cells(title, density_cells(one[known], two[known]), CELLS, FLOOR, (f"{what}, path 1", f"{what}, path 2"))


def _write_csv(path: Path, found: HookTurns) -> None:
    columns = {"feature": np.arange(len(found.paths[0].total_F))}
    columns |= {ranking: found.score(ranking) for ranking in found.rankings}
    for number, turns in enumerate(found.paths, 1):
        columns[f"path_{number}"] = turns.total_F
        columns |= {f"path_{number}_step_{k}": step_F for k, step_F in enumerate(turns.step_KF, 1)}
    order = ranked(columns["score"])
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for i in order:
            writer.writerow(["" if np.isnan(column[i]) else column[i].item() for column in columns.values()])
