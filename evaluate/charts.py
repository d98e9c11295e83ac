"""Small charts as inline SVG: the report must open offline, without scripts."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any, NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 36
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"
COLOURS = ("#1d5fa8", "#b54e14", "#2a7a3b", "#8a3ea8", "#8a6d1a", "#5a5f66")
Series = Mapping[str, Sequence[tuple[float, float]]]  # (x, y) by name
Interval = tuple[float, float] | None


class Spot(NamedTuple):
    """A point with intervals."""

    x: float
    y: float
    x_interval: Interval
    y_interval: Interval
    label: str


class Trail(NamedTuple):
    """Spots that are joined, in this order."""

    name: str
    colour: int | None  # of COLOURS, which begin again; None is the text's
    hollow: bool
    spots: Sequence[Spot]


class Bar(NamedTuple):
    """A value with its interval, on a line of its own."""

    label: str
    colour: int
    hollow: bool
    value: float
    interval: Interval


def _tag(name: str, content: Any = "", **attributes: Any) -> Markup:
    """An element; numbers are rounded to a tenth, and everything is escaped."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{f"{v:.1f}" if isinstance(v, float) else escape(v)}"'
        for key, v in attributes.items()
    )
    return Markup(f"<{name}{written}>{escape(content)}</{name}>")


def _svg(title: str, box: tuple[float, float, float, float], parts: Sequence[Markup], **attributes: Any) -> Markup:
    view = " ".join(f"{side:g}" for side in box)
    content = _tag("title", title) + Markup("").join(parts)
    return _tag("svg", content, viewBox=view, role="img", aria_label=title, **attributes)


class _Frame:
    """Axes with round ticks, and the map from values to pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str, height: int = HEIGHT) -> None:
        self.x, self.y, self.height = x, y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5), height
        middle = (LEFT + WIDTH - RIGHT) // 2
        self.parts = [_tag("text", x_label, class_="label", x=middle, y=height - 4, text_anchor="middle")]
        for tick in ticks(*self.y):
            at = self.py(tick)
            self.parts.append(_tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
            self.parts.append(_tag("text", figure(tick), x=LEFT - 6, y=at + 4, text_anchor="end"))
        for tick in ticks(*self.x):
            place = {"x": self.px(tick), "y": self.height - BOTTOM + 15}
            self.parts.append(_tag("text", figure(tick), **place, text_anchor="middle"))

    def px(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def line(self, places: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        self.parts.append(_tag("polyline", fill="none", stroke=colour, stroke_width=width, points=path))

    def svg(self, title: str, height: int = HEIGHT) -> Markup:
        """A legend may be below the frame."""
        return _svg(title, (0, 0, WIDTH, height), self.parts)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    step = 10 ** floor(log10((high - low) / 4)) if high > low else 1.0
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5.5)
    return [i * step for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def figure(value: float) -> str:
    """A tick's text: 0.25, 1,500, 2M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 10):g}"


def lines(title: str, series: Series, x_label: str = "step", clip: bool = True) -> Markup:
    """A line for each named series of (x, y); empty without any point."""
    flat = [point for values in series.values() for point in values]
    if not flat:
        return Markup("")
    xs, ys = zip(*flat, strict=True)
    ordered = sorted(ys)
    # The first steps reach far beyond the rest; the top hundredth may leave the frame.
    top = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))] if clip else ordered[-1]
    frame = _Frame((min(xs), max(xs)), (min(0.0, ordered[0]), top), x_label)
    rises = ys[-1] > (frame.y[0] + frame.y[1]) / 2
    legend = HEIGHT - BOTTOM - 14 * len(series) - 8 if rises else TOP  # away from where the lines end
    for i, (name, values) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        frame.line([(frame.px(x), max(frame.py(y), TOP)) for x, y in values], colour, 1.6)
        place = {"x": WIDTH - RIGHT - 4, "y": legend + 14 * (i + 1)}
        frame.parts.append(_tag("text", name, **place, fill=colour, text_anchor="end"))
    return frame.svg(title)


def bars(title: str, counts: Sequence[float], edges: Sequence[float], x_label: str) -> Markup:
    """A histogram."""
    frame = _Frame((edges[0], edges[-1]), (0, max([*counts, 1])), x_label)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        x, y = frame.px(low), frame.py(count)
        size = {"width": max(frame.px(high) - x - 0.6, 0.5), "height": HEIGHT - BOTTOM - y}
        frame.parts.append(_tag("rect", x=x, y=y, **size, fill=COLOURS[0]))
    return frame.svg(title)


def points(title: str, series: Series, x_label: str) -> Markup:
    """Points (x, y), those of a name joined in order of x, the names below; empty without any."""
    flat = [point for values in series.values() for point in values]
    if not flat:
        return Markup("")
    xs, ys = zip(*flat, strict=True)
    space = [0.06 * ((max(v) - min(v)) or abs(v[0]) or 1) for v in (xs, ys)]
    frame = _Frame((min(xs) - space[0], max(xs) + space[0]), (min(ys) - space[1], max(ys) + space[1]), x_label)
    for i, (name, values) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [(frame.px(x), frame.py(y)) for x, y in sorted(values)]
        frame.line(places, colour, 1.2)
        frame.parts += [_tag("circle", cx=x, cy=y, r=3.5, fill=colour) for x, y in places]
        frame.parts.append(_tag("text", name, x=LEFT, y=HEIGHT + 14 * (i + 1) - 2, fill=colour))
    return frame.svg(title, HEIGHT + 14 * len(series) + 4)


def trails(title: str, found: Sequence[Trail], labels: tuple[str, str]) -> Markup:
    """Points with both intervals, those of a trail joined, the names below; `labels` are of x and y."""
    spots = [spot for trail in found for spot in trail.spots]
    across = [v for spot in spots for v in (spot.x, *(spot.x_interval or ()))]
    up = [v for spot in spots for v in (spot.y, *(spot.y_interval or ()))]
    space = [0.06 * ((max(v) - min(v)) or abs(v[0]) or 1) for v in (across, up)]
    x, y = ((max(min(v) - s, 0.0), max(v) + s) for v, s in zip((across, up), space, strict=True))
    frame = _Frame(x, y, labels[0], 300)
    aside = {"x": 12, "y": 140, "transform": "rotate(-90 12 140)"}
    frame.parts.append(_tag("text", labels[1], class_="label", **aside, text_anchor="middle"))
    for i, trail in enumerate(found):
        places = [(frame.px(spot.x), frame.py(spot.y)) for spot in trail.spots]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        dashes = {"stroke_dasharray": "3 3"} if trail.hollow else {}
        parts = [_tag("polyline", fill="none", stroke="currentColor", points=path, **dashes)]
        for spot, (px, py) in zip(trail.spots, places, strict=True):
            for name, interval, place in (("x", spot.x_interval, frame.px), ("y", spot.y_interval, frame.py)):
                if interval:
                    other = {"y1": py, "y2": py} if name == "x" else {"x1": px, "x2": px}
                    ends = {f"{name}1": place(interval[0]), f"{name}2": place(interval[1])}
                    parts.append(_tag("line", **ends, **other, stroke="currentColor", stroke_opacity="0.45"))
            parts.append(_mark(px, py, trail.hollow))
            place = {"x": px - 6, "y": py + 14, "text_anchor": "end"} if trail.hollow else {"x": px + 6, "y": py - 6}
            parts.append(_tag("text", spot.label, **place, fill="currentColor"))
        parts.append(_tag("text", trail.name, x=LEFT, y=300 + 16 * (i + 1) - 2, fill="currentColor"))
        parts.append(_mark(LEFT - 10.0, 300.0 + 16 * (i + 1) - 6, trail.hollow))
        frame.parts.append(_coloured(parts, trail.colour))
    return frame.svg(title, 300 + 16 * len(found) + 6)


def forest(title: str, found: Sequence[Bar], x_label: str) -> Markup:
    """Values with their intervals, one below the other, beside the line of 0."""
    reach = [v for bar in found for v in (0.0, bar.value, *(bar.interval or ()))]
    left = 24 + min(6.9 * max(len(bar.label) for bar in found), 256)
    step, space = 20, 0.05 * (max(reach) - min(reach) or 1)
    low, high, bottom = min(reach) - space, max(reach) + space, TOP + step * len(found)

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    middle = (left + WIDTH - RIGHT) / 2
    parts = [_tag("text", x_label, class_="label", x=middle, y=bottom + 34, text_anchor="middle")]
    for tick in ticks(low, high):
        wide = {} if tick else {"stroke_width": 2}
        parts.append(_tag("line", class_="grid", x1=px(tick), x2=px(tick), y1=TOP, y2=bottom, **wide))
        parts.append(_tag("text", figure(tick), x=px(tick), y=bottom + 15, text_anchor="middle"))
    for i, bar in enumerate(found):
        y = TOP + step * (i + 0.5)
        ends = bar.interval or (bar.value, bar.value)
        line = _tag("line", x1=px(ends[0]), x2=px(ends[1]), y1=y, y2=y, stroke="currentColor", stroke_width=1.6)
        name = bar.label if len(bar.label) <= 37 else f"{bar.label[:36]}…"
        label = _tag("text", name, x=left - 10, y=y + 4, text_anchor="end", fill="currentColor")
        parts.append(_coloured([line, _mark(px(bar.value), y, bar.hollow), label], bar.colour))
    return _svg(title, (0, 0, WIDTH, bottom + 40), parts)


def _mark(x: float, y: float, hollow: bool) -> Markup:
    shape = {"fill": "none", "stroke": "currentColor", "stroke_width": 1.6} if hollow else {"fill": "currentColor"}
    return _tag("circle", cx=x, cy=y, r=3.5, **shape)


def _coloured(parts: Sequence[Markup], colour: int | None) -> Markup:
    """A group in one colour; a page may give the class another one on a dark ground."""
    number = None if colour is None else colour % len(COLOURS)
    of = {} if number is None else {"class_": f"c{number}", "color": COLOURS[number]}
    return _tag("g", Markup("").join(parts), **of)


def cells(
    title: str, counts: Sequence[tuple[int, int, int]], size: int, floor: float, labels: tuple[str, str]
) -> Markup:
    """A density plot of two rates on log axes from `floor` to 0: (column, row, count), of `size` columns and rows.

    The first column and row hold rates of zero.
    """
    side, left, bottom = 400, 62, 44
    step, middle = side / size, side // 2
    most = max((count for _, _, count in counts), default=1)
    parts = [_tag("line", class_="grid", x1=left + step, y1=side - step, x2=left + side, y2=0)]
    for exponent in range(ceil(floor), 1):
        at, text = (1 + (exponent - floor) / -floor * (size - 1)) * step, f"10⁻{RAISED[-exponent]}" if exponent else "1"
        parts.append(_tag("text", text, x=min(left + at, left + side - 6.0), y=side + 16, text_anchor="middle"))
        parts.append(_tag("text", text, x=left - 6, y=max(side - at, 6) + 4.0, text_anchor="end"))
    for column, row, count in counts:
        shade = f"{0.15 + 0.85 * (log10(count) / log10(most) if most > 1 else 1):.2f}"
        place = {"x": left + column * step, "y": side - (row + 1) * step, "width": step, "height": step}
        parts.append(_tag("rect", **place, fill=COLOURS[0], fill_opacity=shade))
    aside = {"x": 12, "y": middle, "transform": f"rotate(-90 12 {middle})"}
    for label, place in zip(labels, ({"x": left + middle, "y": side + 36}, aside), strict=True):
        parts.append(_tag("text", label, class_="label", **place, text_anchor="middle"))
    return _svg(title, (0, -8, left + side + 8, side + bottom + 8), parts)


def heat(title: str, rows: Mapping[str, Sequence[float]], columns: Sequence[str]) -> Markup:
    """A line of shaded cells for each named row of values, one a column, none negative; a row's largest is darkest."""
    side, left, top = 18, 150, 90
    width, height = left + side * len(columns) + 70, top + side * len(rows) + 6
    parts = []
    for i, name in enumerate(columns):
        x = left + side * (i + 0.7)
        parts.append(_tag("text", name, x=x, y=top - 6, transform=f"rotate(-60 {x:.1f} {top - 6})"))
    for k, (name, values) in enumerate(rows.items()):
        y, most = top + side * k, max([*values, 0])
        parts.append(_tag("text", name, x=left - 6, y=y + 13, text_anchor="end"))
        parts.append(_tag("text", f"{most:.3g}", x=left + side * len(values) + 6, y=y + 13))
        for i, value in enumerate(values):
            if value > 0:
                square = {"x": left + side * i, "y": y, "width": side - 1, "height": side - 1}
                parts.append(_tag("rect", **square, fill=COLOURS[0], fill_opacity=f"{value / most:.2f}"))
    return _svg(title, (0, 0, width, height), parts, width=width)
