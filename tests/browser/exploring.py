"""The explorer on the finished tiny run, served by a thread, and its page in Chromium."""

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import explorer_server
import pytest
from conftest import TINY
from driving import Page, chromium_in
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from pipeline import stages
from pipeline.config import load
from pipeline.explore import app
from pipeline.explore.catalog import find_entries, open_shelves
from pipeline.explore.explorer import Explorer, about_model
from pipeline.explore.reading import Reader
from pipeline.explore.safety import Access
from pipeline.explore.steering_command import Origin

SAE = "model.layers.1"
TEXT = "wait let me check the sum of two numbers\nso therefore the sum is even"


class Server:
    """The explorer, served by a thread of the tests; `pause` slows the writing of answers down, seconds a token."""

    def __init__(self, folder: Path) -> None:
        sweep = stages.find_runs(load(TINY, []), folder / "runs")
        (entry,) = find_entries(sweep)
        entries = [entry, entry._replace(id="second", title="<b>second")]
        self.shelves = open_shelves(entries)
        origin = Origin(TINY, [], folder / "runs", sweep)
        self.explorer = Explorer(self.shelves, about_model(sweep[0]), lambda: Reader.load(entries), origin)
        self.address = ""
        self.pause = 0.0

    def ask(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The answer to a GET, or to a POST of JSON."""
        data = body and json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def read(self, text: str) -> dict[str, Any]:
        return json.loads(self.ask("/api/features", {"sae": SAE, "text": text}))

    def written(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Events of /api/steer."""
        return [
            json.loads(line[5:]) for line in self.ask("/api/steer", {"sae": SAE, **body}).decode().split("\n\n")[:-1]
        ]


@pytest.fixture(scope="module", name="server")
def serving(finished) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        made = Server(finished)
        write = app.write

        def slowed(*asked: Any) -> Iterator[Any]:
            for event in write(*asked):
                time.sleep(made.pause)
                yield event

        patch.setattr(app, "write", slowed)
        with explorer_server.serving(app.make_app(made.explorer, Access())) as made.address:
            yield made


@pytest.fixture(scope="module", name="chromium")
def driving(tmp_path_factory):
    with chromium_in(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


class Explore(Page):
    """The explorer's page."""

    def __init__(self, driver, server: Server) -> None:
        super().__init__(driver)
        self.server = server
        self.expected: list[str] = []  # parts of what may be written to the console

    def open(self, state: dict[str, Any] | None = None, width: int = 1200, theme: str = "light") -> None:
        """A new page, with nothing remembered of others but what the link holds."""
        self.show(f"{self.server.address}/feature/{SAE}/0", width, theme)  # of the same origin, and keeps nothing
        self.js("sessionStorage.clear(); localStorage.clear()")
        self.show(self.server.address + (f"/#{quote(json.dumps(state))}" if state else "/"), width, theme)
        self.until(lambda: self.js("return document.body.dataset.view"))

    def until(self, is_so: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 20, 0.05).until(lambda _: is_so())

    def says(self, css: str, words: str) -> None:
        """Wait for words in a place."""
        try:
            self.until(lambda: words in self.find(css).text)
        except TimeoutException:
            raise AssertionError(f"{css} says {self.find(css).text!r}, not {words!r}") from None

    def click(self, css: str) -> None:
        self.find(css).click()

    def fill(self, css: str, text: str) -> None:
        self.find(css).clear()
        self.find(css).send_keys(text)

    def texts(self, css: str) -> list[str]:
        return [each.text for each in self.all(css)]

    def see(self, view: str) -> None:
        self.click(f"nav [data-view={view}]")

    def read(self, text: str = TEXT) -> dict[str, Any]:
        """Have a text read; what the server says of it."""
        self.fill("#text-0", text)
        self.click("#text-form .main")
        found = self.server.read(text)
        self.says("#text-status", f"{len(found['tokens'])} token")
        return found

    def column(self, table: str, title: str) -> list[str]:
        """Cells of a table's column, from above."""
        heads = [text.strip(" ▼▲") for text in self.texts(f"{table} th")]
        return self.texts(f"{table} tbody td:nth-child({heads.index(title) + 1})")

    def numbers(self, table: str, title: str) -> list[float]:
        return [float(text.replace(",", "").replace("−", "-").strip("%")) for text in self.column(table, title)]

    def state(self) -> dict[str, Any]:
        """What the link holds."""
        time.sleep(0.3)  # it is written a moment later
        return json.loads(unquote(self.js("return location.hash.slice(1)")))

    def listed(self) -> list[tuple[int, str, float, str]]:
        """The steering list as it is seen."""
        lines = self.js(
            "return [...document.querySelectorAll('#operations li')].map(line => [line.dataset.of,"
            " line.querySelector('[data-name=op]').value, line.querySelector('input').value,"
            " line.querySelector('[data-name=where]').value])"
        )
        return [(int(feature), op, float(strength), where) for feature, op, strength, where in lines]


@pytest.fixture(name="explore")
def opening(chromium, server) -> Iterator[Explore]:
    """Fails a test whose pages write to the console, or ask another host for anything."""
    yield (page := Explore(chromium, server))
    server.pause = 0.0
    complaints = [line for line in page.complaints() if not any(part in line for part in page.expected)]
    assert not complaints, complaints
    page.asked()
    assert page.addresses
    assert all(url.startswith((f"{server.address}/", "data:")) for url in page.addresses), page.addresses


def steered(explore: Explore, operations: list[tuple[int, str, float, str]], count: int = 12) -> None:
    """The view Steer with a list of operations, put there by number and by hand."""
    explore.see("steer")
    for feature, op, strength, where in operations:
        explore.fill("#operation-feature", f"{feature}\n")
        line = f"#operations [data-of='{feature}']"
        Select(explore.find(f"{line} [data-name=op]")).select_by_value(op)
        Select(explore.find(f"{line} [data-name=where]")).select_by_value(where)
        if op != "ablate":
            explore.fill(f"{line} input", str(strength))
    explore.fill("#messages textarea", TEXT)
    explore.fill("#max_new_tokens", str(count))


def of_side(events: list[dict[str, Any]], side: str) -> tuple[list[str], list[float | None]]:
    """Texts and values of a side's tokens."""
    tokens = [event for event in events if event.get("side") == side and "end" not in event]
    return [event["text"] for event in tokens], [event["value"] for event in tokens]


def firing(server: Server, count: int) -> list[int]:
    """Features that fire most often."""
    found = json.loads(server.ask(f"/api/find?sae={SAE}&sort=density&limit={count}"))["features"]
    return [each["number"] for each in found]


def views(explore: Explore, width: int, theme: str) -> Iterator[str]:
    """Each view with something in it."""
    one, two = firing(explore.server, 2)
    explore.open({"operations": [{"feature": one}, {"feature": two}]}, width, theme)
    explore.read()
    for number in range(6):
        explore.all("#features-table [data-do=shade]")[number].click()
    explore.js("document.querySelector('#tokens-0').focus()")
    explore.press(Keys.HOME, Keys.ENTER)
    yield "text"
    explore.click("#features-table .feature")
    explore.says("#card", "Largest activation")
    yield "card"
    explore.press(Keys.ESCAPE)
    explore.see("find")
    explore.says("#find-status", "found")
    explore.click("#example summary")
    yield "find"
    steered(explore, [], count=8)
    explore.click("#write")
    explore.says("#steer-status", "Done.")
    yield "steer"
    explore.show(f"{explore.server.address}/feature/{SAE}/{one}", width, theme)
    yield "feature"
