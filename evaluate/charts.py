"""Small charts as inline SVG: the report must open offline, without scripts."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 36
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹"
COLOURS = ("#1d5fa8", "#b54e14", "#2a7a3b", "#8a3ea8", "#8a6d1a", "#5a5f66")


class _Frame:
    """Axes with round ticks, and the map from values to pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str) -> None:
        self.x, self.y = x, y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5)
        self.height = HEIGHT  # of the picture; a legend may stand below the frame
        self.parts = [
            f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
        ]
        for tick in ticks(*self.y):
            at = self.py(tick)
            self.parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            self.parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{figure(tick)}</text>')
        for tick in ticks(*self.x):
            at = self.px(tick)
            self.parts.append(
                f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{figure(tick)}</text>'
            )

    def px(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def svg(self, title: str) -> Markup:
        body = "".join(self.parts)
        head = f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(title)}">'
        return Markup(f"{head}<title>{escape(title)}</title>{body}</svg>")


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


def lines(
    title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_label: str = "step", clip: bool = True
) -> Markup:
    """A line for each named series of (x, y)."""
    points = [point for values in series.values() for point in values]
    if not points:
        return Markup("")
    xs, ys = zip(*points, strict=True)
    ordered = sorted(ys)
    # The first steps reach far beyond the rest; the top hundredth may leave the frame.
    top = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))] if clip else ordered[-1]
    frame = _Frame((min(xs), max(xs)), (min(0.0, ordered[0]) if ordered[0] > -1 else ordered[0], top), x_label)
    rises = ys[-1] > (frame.y[0] + frame.y[1]) / 2
    legend = HEIGHT - BOTTOM - 14 * len(series) - 8 if rises else TOP  # away from where the lines end
    for i, (name, values) in enumerate(series.items()):
        path = " ".join(f"{frame.px(x):.1f},{max(frame.py(y), TOP):.1f}" for x, y in values)
        colour = COLOURS[i % len(COLOURS)]
        frame.parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
        frame.parts.append(
            f'<text x="{WIDTH - RIGHT - 4}" y="{legend + 14 * (i + 1)}" fill="{colour}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
    return frame.svg(title)


def bars(title: str, counts: Sequence[float], edges: Sequence[float], x_label: str) -> Markup:
    """A histogram."""
    frame = _Frame((edges[0], edges[-1]), (0, max([*counts, 1])), x_label)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        x, y = frame.px(low), frame.py(count)
        width, height = max(frame.px(high) - x - 0.6, 0.5), HEIGHT - BOTTOM - y
        frame.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{COLOURS[0]}"/>'
        )
    return frame.svg(title)


def points(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_label: str) -> Markup:
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
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        frame.parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.2" points="{path}"/>')
        frame.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        frame.parts.append(f'<text x="{LEFT}" y="{HEIGHT + 14 * (i + 1) - 2}" fill="{colour}">{escape(name)}</text>')
    frame.height = HEIGHT + 14 * len(series) + 4
    return frame.svg(title)


def cells(
    title: str, counts: Sequence[tuple[int, int, int]], size: int, floor: float, labels: tuple[str, str]
) -> Markup:
    """A density plot of two rates on log axes from `floor` to 0: (column, row, count), of `size` columns and rows.

    The first column and row hold rates of zero.
    """
    side, left, bottom = 400, 62, 44
    step = side / size
    most = max((count for _, _, count in counts), default=1)

    def at(exponent: float) -> float:
        return (1 + (exponent - floor) / -floor * (size - 1)) * step

    parts = [f'<line class="grid" x1="{left + step:.1f}" y1="{side - step:.1f}" x2="{left + side}" y2="0"/>']
    for exponent in range(ceil(floor), 1):
        x, y, text = left + at(exponent), side - at(exponent), f"10⁻{RAISED[-exponent]}" if exponent else "1"
        parts.append(f'<text x="{min(x, left + side - 6):.1f}" y="{side + 16}" text-anchor="middle">{text}</text>')
        parts.append(f'<text x="{left - 6}" y="{max(y, 6) + 4:.1f}" text-anchor="end">{text}</text>')
    for column, row, count in counts:
        shade = 0.15 + 0.85 * (log10(count) / log10(most) if most > 1 else 1)
        parts.append(
            f'<rect x="{left + column * step:.1f}" y="{side - (row + 1) * step:.1f}" width="{step:.1f}" '
            f'height="{step:.1f}" fill="{COLOURS[0]}" fill-opacity="{shade:.2f}"/>'
        )
    x_label, y_label = map(escape, labels)
    middle = side / 2
    parts.append(f'<text class="label" x="{left + middle}" y="{side + 36}" text-anchor="middle">{x_label}</text>')
    parts.append(
        f'<text class="label" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{y_label}</text>"
    )
    head = f'<svg viewBox="0 -8 {left + side + 8} {side + bottom + 8}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}<title>{escape(title)}</title>{''.join(parts)}</svg>")


def heat(title: str, rows: Mapping[str, Sequence[float]], columns: Sequence[str]) -> Markup:
    """A line of shaded cells for each named row of values, one a column, none negative; a row's largest is darkest."""
    side, left, top = 18, 150, 90
    width, height = left + side * len(columns) + 70, top + side * len(rows) + 6
    parts = []
    for i, name in enumerate(columns):
        x = left + side * (i + 0.7)
        parts.append(f'<text x="{x:.1f}" y="{top - 6}" transform="rotate(-60 {x:.1f} {top - 6})">{escape(name)}</text>')
    for k, (name, values) in enumerate(rows.items()):
        y, most = top + side * k, max([*values, 0])
        parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<text x="{left + side * len(values) + 6}" y="{y + 13}">{most:.3g}</text>')
        parts += [
            f'<rect x="{left + side * i}" y="{y}" width="{side - 1}" height="{side - 1}" fill="{COLOURS[0]}" '
            f'fill-opacity="{value / most:.2f}"/>'
            for i, value in enumerate(values)
            if value > 0
        ]
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}">'
    return Markup(f"{head}<title>{escape(title)}</title>{''.join(parts)}</svg>")
