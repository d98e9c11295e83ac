"""Small charts as inline SVG: the report must open offline, without scripts."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 36
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"
COLOURS = ("#1d5fa8", "#b54e14", "#2a7a3b", "#8a3ea8", "#8a6d1a", "#5a5f66")
Series = Mapping[str, Sequence[tuple[float, float]]]  # (x, y) by name


def _tag(name: str, content: Any = "", **attributes: Any) -> Markup:
    """An element; numbers are rounded to a tenth, and everything is escaped."""
    written = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v)
        for key, v in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(written), content)


def _svg(title: str, box: tuple[float, float, float, float], parts: Sequence[Markup], **attributes: Any) -> Markup:
    view = " ".join(f"{side:g}" for side in box)
    content = _tag("title", title) + Markup("").join(parts)
    return _tag("svg", content, viewBox=view, role="img", aria_label=title, **attributes)


class _Frame:
    """Axes with round ticks, and the map from values to pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str) -> None:
        self.x, self.y = x, y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5)
        middle = (LEFT + WIDTH - RIGHT) // 2
        self.parts = [_tag("text", x_label, class_="label", x=middle, y=HEIGHT - 4, text_anchor="middle")]
        for tick in ticks(*self.y):
            at = self.py(tick)
            self.parts.append(_tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at))
            self.parts.append(_tag("text", figure(tick), x=LEFT - 6, y=at + 4, text_anchor="end"))
        for tick in ticks(*self.x):
            place = {"x": self.px(tick), "y": HEIGHT - BOTTOM + 15}
            self.parts.append(_tag("text", figure(tick), **place, text_anchor="middle"))

    def px(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

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
    frame = _Frame((min(xs), max(xs)), (min(0.0, ordered[0]) if ordered[0] > -1 else ordered[0], top), x_label)
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
