"""What the benchmark's page and the report show of its lists: charts, and how figures are written."""

from collections.abc import Sequence
from math import inf
from typing import Any

from markupsafe import Markup

from evaluate.benchmark_figures import p_value
from evaluate.charts import Bar, Interval, Spot, Trail, forest, trails
from evaluate.config import AS_IT_IS


def _times(value: float, form: str, by: float = 1) -> str:
    """A number as `form` writes it, without the sign of a zero."""
    text = form % (by * value)
    return text.replace("-0.0", "0.0") if float(text.rstrip("%")) == 0 else text


FILTERS = {"times": _times, "p_value": p_value}  # of templates that include benchmark_parts.html


def what_is_done(operations: Sequence[dict[str, Any]]) -> str:
    """The operations of a condition without their strengths."""
    places = ("" if each["where"] == "all" else f" ({each['where']})" for each in operations)
    return " and ".join(f"{each['op']} {each['feature']}{p}" for each, p in zip(operations, places, strict=True))


def strengths(operations: Sequence[dict[str, Any]]) -> str:
    """The strengths of a condition; ablation has none."""
    return ", ".join(f"{each['strength']:g}" for each in operations if each["op"] != "ablate")


def charts(lists: dict[str, Any]) -> dict[str, Markup]:
    """Charts by title, of the lists of `benchmark_figures`; none where no feature was operated on."""
    conditions = lists["conditions"]
    if len(conditions) < 2:
        return {}
    thinking = [each["thinking_tokens"]["value"] if each["thinking_tokens"] else None for each in conditions]
    thinks = None not in thinking and any(thinking)  # tags that a model never writes say nothing
    length, said = ("thinking_tokens", "thinking tokens") if thinks else ("tokens", "tokens")
    colour = _colours(conditions)
    out = {
        f"pass@1 against {said} of an answer": trails(
            f"pass@1 against {said}",
            _trails(conditions, length, colour),
            (f"{said} of an answer; numbers at points are strengths", "pass@1, %"),
        )
    }
    for name, title, unit, times in (
        ("pass_at_1", "pass@1", "points", 100),
        (length, said, f"{said} of an answer", 1),
    ):
        bars = [
            Bar(each["name"], colour[n], each["group"] == "control", times * found["value"], _interval(found, times))
            for n, each in enumerate(conditions)
            if each["change"] and (found := each["change"][name])
        ]
        out[f"Change of {said if times == 1 else title}"] = forest(f"Change of {title}", bars, f"change, {unit}")
    return out


def _interval(found: dict[str, Any], times: float = 1) -> Interval:
    return None if found["low"] is None else (times * found["low"], times * found["high"])


def _colours(conditions: Sequence[dict[str, Any]]) -> list[int]:
    """A colour for each thing done to a feature, at all strengths and with its controls."""
    done = [what_is_done(conditions[n if e["of"] is None else e["of"]]["operations"]) for n, e in enumerate(conditions)]
    kinds = list(dict.fromkeys(what for what in done if what))
    return [kinds.index(what) if what else 0 for what in done]


def _trails(conditions: Sequence[dict[str, Any]], length: str, colour: Sequence[int]) -> list[Trail]:
    """From no intervention through the strengths of each thing done, controls behind their features."""

    def spot(each: dict[str, Any], label: str) -> Spot:
        x, y = each[length], each["pass_at_1"]
        return Spot(x["value"], 100 * y["value"], _interval(x), _interval(y, 100), label)

    none = next(each for each in conditions if each["group"] == "none")
    grouped: dict[tuple[int, bool, str], list[dict[str, Any]]] = {}
    for n, each in enumerate(conditions):
        if each is not none:
            key = colour[n], each["group"] == "control", what_is_done(each["operations"])
            grouped.setdefault(key, []).append(each)
    start = spot(none, "")._replace(x_interval=None, y_interval=None)
    out = []
    for (number, hollow, done), found in sorted(grouped.items(), key=lambda item: item[0][:2]):
        as_it_is = AS_IT_IS.get(found[0]["operations"][0]["op"], -inf)
        places = [(each["operations"][0]["strength"], spot(each, strengths(each["operations"]))) for each in found]
        ordered = sorted([*places, (as_it_is, start)], key=lambda place: place[0])
        name = f"{done}, a random feature" if hollow else done
        out.append(Trail(name, number, hollow, [each for _, each in ordered]))
    return [*out, Trail("no intervention", None, False, [spot(none, "")])]
