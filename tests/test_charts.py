"""Charts say what the figures are: their coordinates are read, not counted."""

import itertools
import re

import pytest

from evaluate.charts import COLOURS, Bar, Spot, Trail, bars, cells, figure, forest, lines, points, ticks, trails


def attributes(svg: str, tag: str, *names: str) -> list[tuple[float, ...]]:
    """Numbers of these attributes of each element of a kind."""
    found = re.findall(rf"<{tag} [^>]*>", svg)
    return [tuple(float(re.search(rf' {name}="([^"]*)"', each)[1]) for name in names) for each in found]


def path(svg: str, number: int = 0) -> list[tuple[float, ...]]:
    """The points of a line."""
    return [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]*)"', svg)[number].split()]


def test_bars_rise_from_the_axis_to_their_count():
    found = attributes(bars("t", [2, 8, 0, 4], [0, 1, 2, 3, 4], "x"), "rect", "x", "y", "width", "height")
    left, top, width, height = zip(*found, strict=True)
    assert list(left) == sorted(left) and len({round(b - a) for a, b in itertools.pairwise(left)}) == 1
    assert all(w > 90 for w in width)
    assert height == pytest.approx([max(height) * share for share in (0.25, 1, 0, 0.5)], abs=0.2)
    axis = top[2]
    assert [t + h for t, h in zip(top, height, strict=True)] == pytest.approx([axis] * 4, abs=0.2)
    assert top[1] < top[3] < top[0] < axis  # up is less in SVG
    assert attributes(bars("t", [0, 0], [0, 1, 2], "x"), "rect", "y", "height") == [(184, 0), (184, 0)]


def test_lines_rise_with_their_values_and_grow_to_the_right():
    svg = lines("t", {"a": [(0, 0.0), (10, 1.0), (20, 0.5)], "b": [(0, 1.0), (20, 0.0)]}, clip=False)
    (x0, y0), (x1, y1), (x2, y2) = path(svg)
    assert x0 < x1 < x2 and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 < y2 < y0 and y2 == pytest.approx((y0 + y1) / 2, abs=0.1)
    assert path(svg, 1) == [(x0, y1), (x2, y0)]
    assert 'class="label" x="252" y="216"' in svg  # of the axis, in the middle of the frame and above its lower edge
    labels = {text: float(y) for y, text in re.findall(r'<text x="50" y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    assert labels["0"] == pytest.approx(y0 + 4) and labels["1"] == pytest.approx(y1 + 4)
    assert lines("t", {"a": []}) == ""
    assert path(lines("t", {"a": [(0, 0.0), (1, 0.0)]})) == [(56, 98), (448, 98)]  # in the middle
    assert path(lines("t", {"a": [(0, -2.0), (1, -1.0)]}, clip=False)) == [(56, 184), (448, 12)]


def test_the_top_hundredth_of_a_line_may_leave_the_frame():
    """Its top is at 12, and 0 at 184."""
    falling = [(0, 1000.0), *((i, 100.0 - i) for i in range(1, 100))]
    clipped, whole = (path(lines("t", {"a": falling}, clip=clip)) for clip in (True, False))
    heights = [12, *(184 - 172 * (100 - i) / 99 for i in range(1, 100))]
    assert [y for _, y in clipped] == pytest.approx(heights, abs=0.06)
    assert [y for _, y in whole] == pytest.approx([184 - 0.172 * y for _, y in falling], abs=0.06)


@pytest.mark.parametrize(("end", "heights"), [(0.4, ["26", "40"]), (0.6, ["162", "176"])])
def test_names_of_lines_are_away_from_where_the_last_one_ends(end, heights):
    """At the top, which is 12, or above the axis at 184, each on a line of its own and as its line is coloured."""
    svg = lines("t", {"a": [(0, 0.0), (20, 1.0)], "b": [(0, 1.0), (20, end)]}, clip=False)
    colours = re.findall('<polyline fill="none" stroke="(.*?)"', svg)
    named = re.findall(r'<text x="444" y="(\d+)" fill="(.*?)" text-anchor="end">(.)<', svg)
    assert named == list(zip(heights, colours, "ab", strict=True))
    assert len(set(colours)) == 2


def test_points_are_where_their_figures_say():
    svg = points("t", {"a": [(30, 0.8), (10, 0.6)], "b": [(20, 0.7)]}, "L0")
    (x0, y0), (x1, y1), (x2, y2) = attributes(svg, "circle", "cx", "cy")
    assert x0 < x2 < x1 and y1 < y2 < y0
    assert x0 - 56 == pytest.approx(448 - x1, abs=0.2) and y1 - 12 == pytest.approx(184 - y0, abs=0.2)
    assert x0 - 56 > 15 and y1 - 12 > 5  # none lies on the frame
    assert path(svg) == [(x0, y0), (x1, y1)]
    assert re.findall(r'<text x="56" y="(\d+)" fill="(.*?)">(.)<', svg) == [
        ("232", COLOURS[0], "a"),
        ("246", COLOURS[1], "b"),
    ]
    assert 'viewBox="0 0 460 252"' in svg
    assert re.findall('<circle .*?fill="(.*?)"', svg) == [COLOURS[0], COLOURS[0], COLOURS[1]]


def test_cells_have_the_second_rate_upwards_and_shade_by_count():
    svg = cells("t", [(0, 0, 1), (3, 1, 100), (1, 3, 10)], 4, -6.0, ("a", "b"))
    assert attributes(svg, "rect", "x", "y", "fill-opacity") == [(62, 300, 0.15), (362, 200, 1), (162, 0, 0.57)]
    across = dict(re.findall(r'<text x="([\d.]+)" y="416" text-anchor="middle">(.*?)<', svg))
    up = dict(re.findall(r'<text x="56" y="([\d.]+)" text-anchor="end">(.*?)<', svg))
    named = ["10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"]  # the first column and row are of 0
    assert across == dict(zip(["162.0", "212.0", "262.0", "312.0", "362.0", "412.0", "456.0"], named, strict=True))
    assert up == dict(zip(["304.0", "254.0", "204.0", "154.0", "104.0", "54.0", "10.0"], named, strict=True))


def test_ticks_are_round():
    assert ticks(0, 720) == [0, 200, 400, 600]
    assert ticks(0, 0) == [0]
    assert [round(t, 3) for t in ticks(0.1, 0.62)] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1 + 0.2, "0.3"), (999, "999"), (-1500, "-1,500"), (999_999, "999,999"), (2_500_000, "2.5M"), (-1e6, "-1M")],
)
def test_figures_of_ticks(value, text):
    assert figure(value) == text


def test_trails_are_where_their_figures_say_with_their_intervals():
    none = Spot(10, 40, (8, 12), None, "none")
    found = [
        Trail("none", None, False, [none]),
        Trail("feature", 1, False, [none._replace(x_interval=None), Spot(30, 60, (20, 40), (50, 70), "2")]),
        Trail("control", 1, True, [Spot(20, 50, None, (45, 55), "2")]),
    ]
    svg = trails("t", found, ("tokens", "pass@1, %"))
    circles = [
        c for c in attributes(svg, "circle", "cx", "cy") if c[0] > 50
    ]  # those of the legend stand before the axis
    (x0, y0), (_, _), (x1, y1), (x2, y2) = circles
    scale = (x1 - x0) / 20, (y0 - y1) / 20
    assert (x2, y2) == pytest.approx((x0 + 10 * scale[0], y0 - 10 * scale[1]), abs=0.2)
    ends = [line for line in attributes(svg, "line", "x1", "x2", "y1", "y2") if line[0] != 56]
    assert ends[0] == pytest.approx((x0 - 2 * scale[0], x0 + 2 * scale[0], y0, y0), abs=0.2)
    assert ends[1] == pytest.approx((x1 - 10 * scale[0], x1 + 10 * scale[0], y1, y1), abs=0.2)
    assert ends[2] == pytest.approx((x1, x1, y1 + 10 * scale[1], y1 - 10 * scale[1]), abs=0.2)
    assert ends[3] == pytest.approx((x2, x2, y2 + 5 * scale[1], y2 - 5 * scale[1]), abs=0.2)
    assert path(svg, 1) == [(x0, y0), (x1, y1)]
    groups = re.findall(r"<g([^>]*)>(.*?)</g>", svg)
    assert [re.findall('class="(..)"', each) for each, _ in groups] == [[], ["c1"], ["c1"]]
    assert ['fill="none" stroke="currentColor" stroke-width' in inner for _, inner in groups] == [False, False, True]
    named = re.findall(r'<text x="56" y="(\d+)" fill="currentColor">(.*?)<', svg)
    assert named == [("314", "none"), ("330", "feature"), ("346", "control")]
    assert [c for c in attributes(svg, "circle", "cx", "cy") if c[0] < 50] == [(46, 310), (46, 326), (46, 342)]
    assert 'viewBox="0 0 460 354"' in svg


def test_axes_of_trails_end_at_0():
    spots = [Spot(0, 0, None, None, ""), Spot(100, 50, None, None, "")]
    svg = trails("t", [Trail("a", 0, False, spots)], ("tokens", "pass@1, %"))
    assert path(svg) == [(56, 264), pytest.approx((56 + 392 / 1.06, 264 - 252 / 1.06), abs=0.06)]


def test_a_forest_has_a_line_for_each_value_beside_0():
    found = [Bar("a", 0, False, 5, (1, 9)), Bar("b", 0, True, -3, None)]
    svg = forest("t", found, "points")
    zero = next(
        x for x, wide in re.findall(r'<line class="grid" x1="([\d.]+)"[^>]*?( stroke-width="2")?>', svg) if wide
    )
    (x0, y0), (x1, y1) = attributes(svg, "circle", "cx", "cy")
    scale = (x0 - x1) / 8
    assert float(zero) == pytest.approx(x0 - 5 * scale, abs=0.2)
    assert y0 < y1
    lines_of = attributes(svg, "line", "x1", "x2", "y1")[-2:]
    assert lines_of[0] == pytest.approx((x0 - 4 * scale, x0 + 4 * scale, y0), abs=0.2)
    assert lines_of[1] == pytest.approx((x1, x1, y1), abs=0.2)


@pytest.mark.parametrize(("length", "end"), [(3, "34.7"), (37, "269.3"), (38, "270")])
def test_a_forest_makes_room_for_its_names_and_cuts_long_ones(length, end):
    """6.9 pixels a letter, and 256 at most; names end 10 before the frame."""
    svg = forest("t", [Bar("n" * length, 0, False, 5, None)], "points")
    shown = "n" * length if length < 38 else f"{'n' * 36}…"
    assert re.findall(r'<text x="([\d.]+)" y="26.0" text-anchor="end" fill="currentColor">(.*?)<', svg) == [
        (end, shown)
    ]
