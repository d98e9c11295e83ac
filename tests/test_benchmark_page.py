"""The benchmark's page: what it says is what the figures are, and what models write stays text."""

import html
import re

import numpy as np
import pytest
from conftest import only
from made_benchmark import Made, conditions_of, made

from evaluate import benchmark_page
from evaluate.benchmark_figures import benchmark_figures
from evaluate.benchmark_page import write_page
from evaluate.benchmark_views import charts
from evaluate.figures import Section, definitions, read_figures
from evaluate.report import write_report
from harvest.files import read_json

SAMPLES = 3


def of(turned: dict[int, float], **changes) -> tuple[Made, Section]:
    found = made(conditions_of((7, 8), (1.0, 2.0)), turned, 12, SAMPLES, 0, **changes)
    return found, benchmark_figures(found.conditions, found.marks(SAMPLES), 0)


def test_every_answer_stands_beside_the_others_of_its_problem(tmp_path):
    found, section = of({7: 0.5})
    (tmp_path / "problems").mkdir()
    (tmp_path / "problems" / "99.html").write_text("of an earlier run")
    attempts = [
        attempt._replace(text=f"thought {n}</think>answer {n} of {attempt.condition}")
        for n, attempt in enumerate(found.attempts)
    ]
    grades = [g._replace(parsed=None) if n % 7 == 0 and not g.correct else g for n, g in enumerate(found.grades)]
    order = np.random.default_rng(0).permutation(len(attempts))
    shuffled = [attempts[n] for n in order], [grades[n] for n in order]
    write_page(tmp_path / "benchmark.html", "t", found.problems, found.conditions, *shuffled, section)
    assert len(list((tmp_path / "problems").iterdir())) == 12
    for p in range(12):
        page = (tmp_path / "problems" / f"{p}.html").read_text()
        rows = re.findall("<tr>(.*?)</tr>", page.split("<tbody>")[1], re.DOTALL)
        assert len(rows) == SAMPLES
        for sample, row in enumerate(rows):
            cells = re.findall("<td>(.*?)</td>", row, re.DOTALL)
            assert len(cells) == len(found.conditions)
            for c, cell in enumerate(cells):
                n = next(n for n, a in enumerate(attempts) if a[:3] == (c, p, sample))
                assert f"answer {n} of {c}</div>" in cell and f"thought {n}</div></details>" in cell
                mark = "right" if grades[n].correct else "unread" if grades[n].parsed is None else "wrong"
                assert f'<b class="{mark}">' in cell
                assert re.findall('<span class="answer">([^<]*)<', cell) == [grades[n].parsed][: mark != "unread"]
                assert f"{attempts[n].tokens} tokens{', cut off' if not attempts[n].ended else ''}</p>" in cell
        heads = re.findall(r"<small>(\d) of 3 right</small>", page)
        right = found.marks(SAMPLES).correct_CPN[:, p].sum(1)
        assert [int(each) for each in heads] == right.tolist()
    index = (tmp_path / "benchmark.html").read_text()
    listed = re.findall(r'data-right="([^"]*)" data-tokens="([^"]*)"', index)
    marks = found.marks(SAMPLES)
    for p, (right, tokens) in enumerate(listed):
        assert [int(each) for each in right.split()] == marks.correct_CPN[:, p].sum(1).tolist()
        assert [float(each) for each in tokens.split()] == pytest.approx(marks.tokens_CPN[:, p].mean(1), abs=0.06)
    assert "answer 5 of 0" in html.unescape(index)
    assert "The search reads the first" not in index


def test_the_search_has_a_share_of_each_answer(tmp_path, monkeypatch):
    found, section = of({})
    monkeypatch.setattr(benchmark_page, "SEARCHED", 10 * len(found.attempts))
    write_page(tmp_path / "benchmark.html", "t", *found, section)
    index = (tmp_path / "benchmark.html").read_text()
    assert "The search reads the first 10 characters of each answer." in index
    assert "let me see let me see" in index and "let me see," not in index


def test_the_table_has_the_figures(tmp_path):
    found, section = of({7: 0.5})
    write_page(tmp_path / "benchmark.html", "t", *found, section)
    index = (tmp_path / "benchmark.html").read_text()
    table = re.search('<table class="conditions sortable">(.*?)</table>', index, re.DOTALL)[1]
    rows = re.findall("<tr>(.*?)</tr>", table, re.DOTALL)[1:]
    for row, entry in zip(rows, section.lists["conditions"], strict=True):
        values = [float(each or "nan") for each in re.findall('data-value="([^"]*)"', row)]
        change, beyond = entry["change"] or {}, entry["beyond_control"] or {}
        expected = [
            entry["pass_at_1"],
            change.get("pass_at_1"),
            beyond.get("pass_at_1"),
            entry["maj_at_n"],
            entry["pass_at_n"],
            entry["tokens"],
            change.get("tokens"),
            entry["thinking_tokens"],
            change.get("thinking_tokens"),
            entry["cut_off"],
            entry["unparsed"],
        ]
        assert values[1:] == pytest.approx([each["value"] if each else np.nan for each in expected], nan_ok=True)
        low, high = (100 * entry["pass_at_1"][end] for end in ("low", "high"))
        assert f"<small>{low:.1f}% to {high:.1f}%</small>" in row
    heads = re.findall(r'type="button">([^<]*)<', table)
    assert heads == [
        "condition",
        "pass@1",
        "change, points",
        "beyond its control, points",
        "maj@3",
        "pass@3",
        "tokens",
        "change",
        "thinking tokens",
        "change",
        "cut off",
        "unparsed",
    ]


def along(svg: str, pixels: list[float]) -> list[float]:
    """The values at places along the x axis, by its first and last tick."""
    found = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([-\d.]+)<', svg)
    (x0, v0), (x1, v1) = ((float(x), float(v)) for x, v in (found[0], found[-1]))
    return [v0 + (x - x0) / (x1 - x0) * (v1 - v0) for x in pixels]


def test_charts_have_the_figures():
    _, section = of({7: 0.5}, longer=20)
    drawn, conditions = charts(section.lists), section.lists["conditions"]
    for title, name, times in (
        ("Change of pass@1", "pass_at_1", 100),
        ("Change of thinking tokens", "thinking_tokens", 1),
    ):
        groups = re.findall(r'<g class="(..)"[^>]*>(.*?)</g>', drawn[title])
        assert [colour for colour, _ in groups] == ["c0"] * 4 + ["c1"] * 4
        assert ['fill="none"' in group for _, group in groups] == [False, True] * 4
        for each, (_, group) in zip(conditions[1:], groups, strict=True):
            places = re.search(r'x1="([\d.]+)" x2="([\d.]+)".*cx="([\d.]+)"', group).groups()
            change = each["change"][name]
            expected = [times * change[end] for end in ("low", "high", "value")]
            assert along(drawn[title], [float(place) for place in places]) == pytest.approx(
                expected, abs=0.05 + times / 1000
            )
            assert f">{each['name']}</text>" in group
    svg = drawn["pass@1 against thinking tokens of an answer"]
    groups = re.findall(r"<g([^>]*)>(.*?)</g>", svg)
    assert [re.findall('class="(..)"', each) for each, _ in groups] == [["c0"], ["c0"], ["c1"], ["c1"], []]
    places = [path.split() for path in re.findall('points="([^"]*)"', svg)]
    for path, numbers in zip(places, ((0, 1, 3), (0, 2, 4), (0, 5, 7), (0, 6, 8), (0,)), strict=True):
        expected = [conditions[n]["thinking_tokens"]["value"] for n in numbers]
        assert along(svg, [float(each.split(",")[0]) for each in path]) == pytest.approx(expected, abs=0.05)
    heights = {n: float(places[0][k].split(",")[1]) for k, n in enumerate((0, 1, 3))}
    right = {n: conditions[n]["pass_at_1"]["value"] for n in heights}
    assert heights[3] < heights[0] and right[3] > right[0]  # up is less in SVG
    assert (heights[0] - heights[1]) / (heights[0] - heights[3]) == pytest.approx(
        (right[1] - right[0]) / (right[3] - right[0]), rel=0.02
    )


def test_charts_take_tokens_where_thinking_is_not_known():
    found, section = of({7: 0.5})
    drawn = charts(section.lists)
    assert list(drawn) == [
        "pass@1 against thinking tokens of an answer",
        "Change of pass@1",
        "Change of thinking tokens",
    ]
    unknown = [a._replace(thinking_tokens=None) if a.condition == 2 else a for a in found.attempts]
    for attempts in (unknown, [a._replace(thinking_tokens=0) for a in found.attempts]):
        section = benchmark_figures(found.conditions, found._replace(attempts=attempts).marks(SAMPLES), 0)
        drawn = charts(section.lists)
        assert list(drawn) == ["pass@1 against tokens of an answer", "Change of pass@1", "Change of tokens"]
    first = next(iter(drawn.values()))
    names = re.findall(r'<text x="56" y="[^"]*" fill="currentColor">([^<]*)</text>', first)
    assert names == ["add 7", "add 107, a random feature", "add 8", "add 108, a random feature", "no intervention"]
    alone = found._replace(conditions=found.conditions[:1], attempts=found.attempts[:36], grades=found.grades[:36])
    assert charts(benchmark_figures(alone.conditions, alone.marks(SAMPLES), 0).lists) == {}


def test_a_trail_passes_through_none_at_the_strength_that_changes_nothing():
    found = made(conditions_of((7,), (-1.0, 2.0)), {7: 0.5}, 12, SAMPLES, 0, longer=10)
    section = benchmark_figures(found.conditions, found.marks(SAMPLES), 0)
    svg = charts(section.lists)["pass@1 against thinking tokens of an answer"]
    groups = re.findall("<g[^>]*>(.*?)</g>", svg)
    none = re.search('points="([^"]*)"', groups[-1])[1]
    assert [len(re.search('points="([^"]*)"', group)[1].split()) for group in groups] == [3, 3, 1]
    assert re.search('points="([^"]*)"', groups[0])[1].split()[1] == none


@pytest.mark.parametrize("samples", [1, 3])
def test_no_feature_is_no_error(tmp_path, samples):
    found = made(conditions_of()[:1], {}, 4, samples, 0)
    section = benchmark_figures(found.conditions, found.marks(samples), 0)
    write_page(tmp_path / "benchmark.html", "t", *found, section)
    index = (tmp_path / "benchmark.html").read_text()
    assert "No feature was operated on" in index and "compare with" not in index
    assert ("maj@" in index) == (samples > 1)


def test_the_report_has_the_section(finished, tmp_path):
    """Beside the sections of the evaluation, with its definitions."""
    _, section = of({7: 0.5})
    evaluation = read_figures(only(finished, "runs/evaluate/*"))
    sae = evaluation.saes[0]
    lists = {**sae.lists, "benchmark": section.lists}
    evaluation = evaluation._replace(
        saes=(sae._replace(lists=lists, figures=(*sae.figures, *section.figures)), *evaluation.saes[1:]),
        definitions=evaluation.definitions | {"benchmark": definitions()["benchmark"]},
    )
    manifests = {
        name: read_json(only(finished, f"runs/{name}/*/manifest.json")) for name in ("sample", "harvest", "train")
    }
    write_report(tmp_path / "report.html", evaluation, {}, manifests)
    report = (tmp_path / "report.html").read_text()
    part = report.split('<h3 id="benchmark-1">')[1].split("<h3")[0]
    assert 'href="benchmark.html"' in part and "12 problems, 3 answers to each in 9 conditions" in part
    assert len(re.findall("<tr>", part)) == 10
    assert "<button" not in part
    assert "<h3>benchmark</h3>" in report
