"""Report, feature pages and the benchmark's page in Chromium, from disk, with the network off: `make test-browser`."""

import shutil
from pathlib import Path

import hostile
import pytest
from conftest import only
from driving import SHIFTS, Page, chromium_in

from evaluate.benchmark_figures import benchmark_figures
from evaluate.benchmark_page import write_page
from evaluate.feature_pages import write_pages

pytestmark = pytest.mark.browser


@pytest.fixture(scope="session")
def run(finished, tmp_path_factory) -> Path:
    """The finished run's evaluate folder, its feature pages made anew with hostile tokens, and a hostile benchmark."""
    folder = tmp_path_factory.mktemp("browser") / "evaluate"
    shutil.copytree(only(finished, "runs/evaluate/*"), folder)
    shutil.rmtree(folder / "features")
    write_pages(folder / "features" / hostile.HOOK, *hostile.site(finished), hostile.CONFIG)
    made = hostile.benchmark()
    section = benchmark_figures(made.conditions, made.marks(2), 0)
    write_page(folder / "benchmark.html", f"arithmetic {hostile.TOKENS[0]}", *made, section)
    return folder


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    with chromium_in(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


class Browser(Page):
    """The pages of a run."""

    def __init__(self, driver, run: Path) -> None:
        super().__init__(driver)
        self.folder = run / "features" / hostile.HOOK
        self.report, self.index = run / "report.html", self.folder / "index.html"
        self.benchmark, self.problems = run / "benchmark.html", sorted((run / "problems").iterdir())

    def open(self, path: Path, width: int = 1200, theme: str = "light") -> None:
        self.show(path.as_uri(), width, theme)

    def column(self, key: str) -> list[float]:
        """What the visible rows of the index hold of a column, from above."""
        rows = "[...document.querySelectorAll('.index tbody tr')].filter(r => r.offsetHeight)"
        return self.js(f"return {rows}.map(r => Number(r.dataset[arguments[0]]))", key)


@pytest.fixture
def browser(chromium, run):
    """Fails a test whose pages write to the console or ask for anything but files."""
    yield (page := Browser(chromium, run))
    assert page.complaints() == []
    asked = page.asked()
    assert asked
    assert all(url.startswith(("file:", "data:")) for url in asked), asked


def test_the_index_searches(browser):
    browser.open(browser.report)
    browser.find("a[href$='index.html']").click()
    assert browser.js("return document.querySelector('h1').textContent") == "Features"
    assert len(browser.column("number")) == 12
    search, found = browser.find("#search"), browser.find("#found")
    for wanted, expected in (("11", [11]), ("999", []), ("<IMG SRC", list(range(12))), ("zzz", [])):
        search.clear()
        search.send_keys(wanted)
        assert sorted(browser.column("number")) == expected
        assert found.text == f"{len(expected)} of 12 features"
    search.clear()
    browser.find("h1").click()
    browser.press("/")
    browser.press("11")
    assert browser.column("number") == [11]
    browser.find(".index tbody tr:not([hidden]) a").click()
    assert browser.find("h1").text == "Feature 11"
    browser.driver.back()
    assert browser.find("#found").text == f"{len(browser.column('number'))} of 12 features"


def test_the_index_searches_labels(browser):
    browser.open(browser.index)
    search = browser.find("#search")
    for wanted, expected in (("number 7", [7]), ("NUMBER 1", [1, 10]), ("of {{ 7 * 7", [10]), ("number 11", [])):
        search.clear()
        search.send_keys(wanted)
        assert sorted(browser.column("number")) == expected
    search.clear()
    search.send_keys("number 7")
    browser.find(".index tbody tr:not([hidden]) a").click()
    assert browser.find(".explanation h2").text == "Number 7 of שלום"
    assert [cell.text for cell in browser.driver.find_elements("css selector", ".explanation td")][:2] == [
        "detection",
        "0.79",
    ]


def test_a_page_shows_counterexamples_as_text(browser):
    browser.open(browser.folder / "1.html")
    assert "<img src=x onerror=" in browser.find(".counterexamples").text
    assert "</script><script>window.broken=1</script>" in browser.find(".paraphrases").text
    assert browser.js("return window.broken") is None


def test_the_index_sorts(browser):
    browser.open(browser.index)
    best_first = browser.column("score")
    assert best_first == sorted(best_first, reverse=True)
    for key in ("density", "max", "explained", "inside", "score", "detection"):
        header = browser.find(f"th[data-key={key}]")
        for order in ("descending", "ascending"):
            header.find_element("css selector", "button").click()
            values = browser.column(key)
            assert len(set(values)) > 3
            assert values == sorted(values, reverse=order == "descending")
            assert header.get_attribute("aria-sort") == order
    browser.find("th[data-key=number] button").send_keys("\ue007")  # Enter
    assert browser.column("number") == list(range(12))
    assert len(browser.driver.find_elements("css selector", "[aria-sort]")) == 1


def test_every_link_leads_somewhere(browser, finished):
    untouched = only(finished, "runs/evaluate/*")  # the report's links are to its own run's pages
    for page in (
        untouched / "report.html",
        *untouched.glob("features/*/index.html"),
        *sorted(browser.folder.iterdir()),
        browser.benchmark,
        *browser.problems,
    ):
        browser.open(page)
        targets = browser.js("return [...document.links].map(a => [a.protocol, a.pathname, a.hash])")
        assert targets
        for protocol, path, anchor in targets:
            assert protocol == "file:"
            assert Path(path).is_file(), path
            if anchor and Path(path).samefile(page):
                assert browser.js("return !!document.querySelector(arguments[0])", anchor)
            elif anchor:
                assert f'id="{anchor[1:]}"' in Path(path).read_text()


def test_activations_are_read_by_mouse_tap_and_keyboard(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    number = int(browser_first_active(browser))
    browser.open(browser.folder / f"{number}.html")
    tip, height = browser.find("#tip"), browser.js("return document.documentElement.scrollHeight")
    peak = browser.find(".tokens .peak")
    value = peak.get_attribute("data-v")
    assert value == browser.find(".meta b").text
    assert not tip.is_displayed()
    ActionChains(browser.driver).move_to_element(peak).perform()
    assert tip.text.startswith(value)
    ActionChains(browser.driver).move_to_element(browser.find("h1")).perform()
    assert not tip.is_displayed()
    peak.click()
    assert tip.text.startswith(value)
    browser.press(Keys.ESCAPE)
    assert not tip.is_displayed()

    browser.js("document.querySelector('.tokens[tabindex]').focus()")
    browser.press(Keys.ARROW_RIGHT)
    position = int(tip.text.rsplit(" ", 1)[1])
    assert tip.text.startswith(value)
    browser.press(Keys.ARROW_LEFT)
    assert int(tip.text.rsplit(" ", 1)[1]) == position - 1
    assert browser.js("return document.documentElement.scrollHeight") == height  # nothing moves


def browser_first_active(browser) -> float:
    browser.open(browser.index)
    browser.find("th[data-key=max] button").click()
    return browser.column("number")[0]


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_is_wider_than_the_window(browser, width):
    pages = *sorted(browser.folder.glob("[0-9]*.html")), browser.benchmark, *browser.problems
    for page in (browser.report, browser.index, *pages):
        browser.open(page, width)
        browser.fits(width)
        assert browser.driver.execute_async_script(SHIFTS) == 0, page


def test_hostile_tokens_are_text(browser):
    for page in (*browser.problems, browser.benchmark, browser.index, *sorted(browser.folder.glob("[0-9]*.html"))):
        browser.open(page)
        assert browser.js("return window.broken") is None
        assert browser.js("return document.querySelectorAll('img, script:not(:last-of-type), b b').length") == 0
        assert browser.js("return document.scripts.length") == (page not in browser.problems)
        shown = browser.js("return document.body.textContent")
        assert "</script><script>window.broken=1" in shown
        assert not set(shown) & set("\u202e\u2066\u200f\x00\x1b")
    assert "<b>let me</b>" in shown


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(browser, theme):
    pages = *sorted(browser.folder.glob("[0-9]*.html"))[:4], browser.benchmark, *browser.problems[:4]
    for page in (browser.report, browser.index, *pages):
        browser.open(page, theme=theme)
        assert browser.js("return matchMedia('(prefers-color-scheme: dark)').matches") == (theme == "dark")
        browser.stands_out()


def problems(browser) -> list[list[str]]:
    """Number, right as it is, right with the condition, difference and change in tokens of the visible problems."""
    return browser.js(
        "return [...document.querySelectorAll('.problems tbody tr')].filter(r => r.offsetHeight)"
        ".map(r => [r.dataset.order, ...[3, 4, 5, 7].map(n => r.cells[n].textContent)])"
    )


def test_a_benchmark_s_problems_are_compared_under_any_condition(browser):
    from selenium.webdriver.support.select import Select

    marks, names = hostile.benchmark().marks(2), [each.name for each in hostile.benchmark().conditions]
    right_CP, tokens_CP = marks.correct_CPN.sum(2), marks.tokens_CPN.mean(2)
    browser.open(browser.benchmark)
    chosen = Select(browser.find("#chosen"))
    assert [option.text for option in chosen.options] == names[1:]
    for condition in (1, 3, 2):
        chosen.select_by_index(condition - 1)
        for order, none, other, difference, longer in problems(browser):
            p = int(order)
            assert (none, other) == tuple(f"{right_CP[c, p]} of 2" for c in (0, condition))
            change = int(right_CP[condition, p]) - int(right_CP[0, p])
            assert int(difference.replace("−", "-")) == change
            assert float(longer.replace("−", "-")) == pytest.approx(tokens_CP[condition, p] - tokens_CP[0, p], abs=0.6)
    chosen.select_by_index(0)
    browser.find("#differing").click()
    differing = [p for p in range(12) if right_CP[1, p] != right_CP[0, p]]
    assert 0 < len(differing) < 12
    assert [int(row[0]) for row in problems(browser)] == differing
    assert browser.find("#found").text == f"{len(differing)} of 12 problems"
    browser.find(".problems tbody tr:not([hidden]) a").click()
    assert browser.js("return location.hash") == "#c1"
    assert browser.find("th:target").text.startswith("feature 7")
    browser.driver.back()
    assert len(problems(browser)) == int(browser.find("#found").text.split()[0])


def test_a_benchmark_s_problems_are_searched(browser):
    browser.open(browser.benchmark)
    search = browser.find("#search")
    for wanted, expected in (
        ("WORD3of", [3]),
        ("word3of  ", [3]),
        ("problem 1", [1, 10, 11]),
        ("6 times 7? <IMG", [1]),
        ("nowhere", []),
        ("</script>", list(range(12))),
    ):
        search.clear()
        search.send_keys(wanted)
        assert [int(row[0]) for row in problems(browser)] == expected, wanted
        assert browser.find("#found").text == f"{len(expected)} of 12 problems"
    search.clear()
    browser.find("h1").click()
    browser.press("/")
    browser.press("word7of")
    assert [int(row[0]) for row in problems(browser)] == [7]


def test_a_benchmark_s_tables_sort(browser):
    browser.open(browser.benchmark)
    cells = "return [...document.querySelectorAll('{} tbody tr')].map(r => r.cells[{}].{})"
    for table, value in ((".conditions", "dataset.value"), (".problems", "textContent")):
        heads = browser.driver.find_elements("css selector", f"{table} th")
        for column, header in enumerate(heads):
            if not header.get_attribute("data-key") or (table, column) == (".problems", 0):
                continue
            for order in ("descending", "ascending"):
                header.find_element("css selector", "button").click()
                texts = browser.js(cells.format(table, column, value))
                known = [float(text.replace("−", "-").split(" of ")[0]) for text in texts if text]
                assert texts[: len(known)] == [text for text in texts if text]  # what is not known comes last
                assert known == sorted(known, reverse=order == "descending")
                assert header.get_attribute("aria-sort") == order
            assert len(set(known)) > 1
            assert len(browser.driver.find_elements("css selector", f"{table} [aria-sort]")) == 1
    browser.find(".problems th button").send_keys("\ue007")  # Enter
    assert [int(row[0]) for row in problems(browser)] == list(range(12))
