"""The explorer in Chromium: steering, links, errors, looks. `make test-browser`."""

import json
import time
from typing import Any
from urllib.parse import quote

import hostile
import pytest
from exploring import SAE, TEXT, driving, firing, of_side, opening, serving, steered, views  # noqa: F401
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from harvest.files import UserError
from pipeline.explore.jobs import Busy
from pipeline.explore.reading import Reader

pytestmark = pytest.mark.browser
# Drags what the first selector finds to what the second does: WebDriver's mouse starts no drag.
DRAG = """
const [from, to] = [...arguments].map(css => document.querySelector(css));
const dataTransfer = new DataTransfer();
const options = {dataTransfer, bubbles: true, cancelable: true};
const send = (target, type) => target.dispatchEvent(new DragEvent(type, options));
send(from, "dragstart");
const isTaken = !send(to, "dragover");
send(to, "drop");
return isTaken;
"""
# What can be used and has no name.
NAMELESS = """
const named = e => e.ariaLabel || e.textContent.trim() || [...(e.labels ?? [])].some(l => l.textContent.trim());
const used = [...document.querySelectorAll("button, input, select, textarea, a[href]")];
return used.filter(e => !named(e)).map(e => e.outerHTML);
"""


def test_answers_are_steered_by_two_features(explore):
    explore.open()
    one, two = firing(explore.server, 2)
    operations = [(one, "set", 4.0, "all"), (two, "ablate", 1.0, "generated")]
    steered(explore, operations)
    assert explore.listed() == operations
    explore.fill("#temperature", "1")
    explore.fill("#seed", "3")
    explore.click("#write")
    explore.says("#steer-status", "Done.")
    listed = [{"feature": f, "op": op, "strength": s, "where": w} for f, op, s, w in operations]
    asked = {"prompt": TEXT, "chat": False, "operations": listed, "shade": one}
    events = explore.server.written({**asked, "max_new_tokens": 12, "temperature": 1.0, "seed": 3})
    assert of_side(events, "plain") != of_side(events, "steered")
    top = json.loads(explore.server.ask(f"/api/feature/{SAE}/{one}"))["max"]
    for side in ("plain", "steered"):
        texts, values = of_side(events, side)
        seen = explore.js(f"return [...document.querySelectorAll('#{side} i')].map(i => [i.textContent, i.className])")
        assert [text.replace("↵\n", "\n").replace("·", " ") for text, _ in seen] == texts
        most = max([top, *(value or 0 for value in values)])
        assert [int(name[1:] or 0) for _, name in seen] == [min(9, -int(-9 * (value or 0) // most)) for value in values]
    assert any(of_side(events, "plain")[1])
    end = next(event for event in events if event.get("end") and event["side"] == "steered")
    assert f"at {end['changed']} of {end['processed']} tokens" in explore.find("#steered-end").text
    assert explore.find("#command-text").text == events[-1]["command"]
    assert f"{one}:set:4.0:all" in events[-1]["command"]
    explore.js("document.querySelector('#steered').focus()")
    explore.press(Keys.ARROW_RIGHT)
    assert json.dumps(of_side(events, "steered")[0][0])[1:-1].strip() in explore.find("#tip").text


def test_a_conversation_goes_on(explore, monkeypatch):
    said: list[list[dict[str, str]]] = []
    prompt_ids = Reader.prompt_ids

    def joined(reader: Reader, messages: list[dict[str, str]], chat: bool | None) -> list[int]:
        said.append(messages)  # the tiny model has no chat template
        return prompt_ids(reader, " ".join(each["content"] for each in messages), False)

    monkeypatch.setattr(Reader, "prompt_ids", joined)
    monkeypatch.setattr(explore.server.explorer, "about", explore.server.explorer.about._replace(chat=True))
    explore.open()
    steered(explore, [(firing(explore.server, 1)[0], "set", 4.0, "all")], count=6)
    explore.click("#write")
    explore.says("#steer-status", "Done.")
    answer = explore.js("return [...document.querySelectorAll('#steered i')].map(i => i.textContent).join('')")
    explore.click("[data-keep=steered]")
    explore.press("and now", Keys.CONTROL + Keys.ENTER)  # the new message has the focus
    explore.says("#steer-status", "Done.")
    assert [[each["role"] for each in messages] for messages in said] == [["user"], ["user", "assistant", "user"]]
    contents = [each["content"] for each in said[1]]
    assert contents[0] == TEXT
    assert contents[1].replace(" ", "") == answer.replace("↵", "").replace("·", "").replace(" ", "")
    assert contents[2] == "and now"
    assert explore.state()["messages"] == said[1]
    explore.click("#messages li:nth-child(2) button")
    assert [each["role"] for each in explore.state()["messages"]] == ["user", "user"]
    explore.click("#steer-chat")
    assert len(explore.all("#messages li")) == 1


def test_a_feature_is_dragged_into_the_steering_list(explore):
    explore.open({"view": "find"})
    explore.says("#find-status", "features found")
    first, second = explore.column("#found-table", "Feature")[:2]
    assert explore.js(DRAG, f".feature[data-feature='{first}']", "#steering")
    explore.click(f"#found-table [data-do=steer][data-feature='{second}']")
    assert [line[0] for line in explore.listed()] == [int(first), int(second)]
    explore.click(f"#found-table [data-do=steer][data-feature='{first}']")
    explore.says("#notice", f"Feature {first} is in the steering list.")
    assert not explore.js(DRAG, "#sae", "#steering")  # no feature
    explore.click(f"#operations [data-of='{first}'] button[aria-label^=Remove]")
    assert [line[0] for line in explore.listed()] == [int(second)]
    explore.fill("#operation-feature", "127\n")
    explore.js("document.querySelector('#operation-feature').max = ''")
    explore.fill("#operation-feature", "128\n")
    explore.says("#notice", "There is no feature 128: this SAE has 0 to 127.")
    assert [line[0] for line in explore.listed()] == [int(second), 127]


def test_an_answer_is_stopped(explore):
    explore.open()
    steered(explore, [(1, "add", 1.0, "all")], count=60)
    explore.server.pause = 0.1
    explore.click("#write")
    explore.until(lambda: len(explore.all("#steered i")) > 2)
    assert explore.find("#steered").get_attribute("aria-busy") == "true"
    explore.click("#stop")
    explore.says("#steer-status", "Stopped after")
    count = len(explore.all("#steered i"))
    assert 2 < count < 55
    time.sleep(0.5)
    assert len(explore.all("#steered i")) == count
    assert not explore.find("#stop").is_enabled()
    explore.server.pause = 0.0
    explore.click("#write")
    explore.says("#steer-status", "Done.")


def test_a_link_holds_everything(explore):
    explore.open()
    explore.read("wait let me\nsecret <b>text</b>")
    explore.click("#features-table [data-do=shade]")
    explore.click("#features-table [data-key=sum]")
    steered(explore, [(5, "scale", -2.5, "thinking"), (9, "add", 1.0, "all")])
    explore.fill("#temperature", "0.5")
    explore.fill("#answer-shade", "9")
    before = explore.state()
    assert before["operations"][0] == {"feature": 5, "op": "scale", "strength": -2.5, "where": "thinking"}
    link = explore.driver.current_url
    explore.asked()
    explore.open()
    explore.show(link)
    explore.until(lambda: len(explore.listed()) == 2)
    assert explore.state() == before
    assert explore.find("#steer-view").is_displayed()
    assert explore.find("#temperature").get_attribute("value") == "0.5"
    assert explore.find("#messages textarea").get_attribute("value") == TEXT
    explore.see("text")
    explore.says("#text-status", "token")
    assert explore.find("#text-0").get_attribute("value") == "wait let me\nsecret <b>text</b>"
    assert explore.find("#features-table [aria-sort]").text.startswith("Sum")
    asked = explore.asked()
    assert not any("/api/steer" in url for url in asked)  # a link alone writes nothing
    assert not any("secret" in url.partition("#")[0] for url in asked)
    assert any(f"{explore.server.address}/api/features" == url for url in asked)


def test_another_sae_begins_with_no_features_of_the_one_before(explore):
    explore.open({"sae": SAE, "operations": [{"feature": 3}], "shade": [4], "texts": [TEXT, ""]})
    explore.says("#text-status", "token")
    Select(explore.find("#sae")).select_by_visible_text("<b>second")
    assert explore.listed() == []
    explore.says("#text-status", "token")
    state = explore.state()
    assert (state["sae"], state["shade"], state["texts"]) == ("second", [], [TEXT, ""])
    explore.says("#about", "<b>second · standard · 128 features of 32 dimensions")
    explore.click("#features-table .feature")
    explore.says("#card", "Its page")
    assert "/feature/second/" in explore.find("#card a").get_attribute("href")
    explore.open({"sae": "third", "operations": [{"feature": 3}]})
    explore.says("#notice", "The link is of another SAE, third.")
    assert explore.listed() == []


def test_link_and_command_are_copied(explore):
    explore.open()
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": explore.server.address}
    explore.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    copied = "navigator.clipboard.readText().then(arguments[0])"
    steered(explore, [(3, "add", 1.0, "all")], count=2)
    explore.click("#write")
    explore.says("#steer-status", "Done.")
    explore.click("#copy-command")
    explore.says("#copy-command", "Copied")
    command = explore.driver.execute_async_script(copied)
    assert command == explore.find("#command-text").text
    assert "--feature 3:add:1.0:all" in command
    explore.click("#copy-link")
    explore.says("#copy-link", "Copied")
    assert explore.driver.execute_async_script(copied) == explore.driver.current_url
    assert explore.state()["operations"][0]["feature"] == 3


@pytest.mark.parametrize(
    "state",
    [
        "%E0%A4%A",
        "[1, 2",
        quote(json.dumps({"view": "<img>", "sae": 7, "texts": "x", "operations": [{"feature": "a"}, 3, None]})),
        quote(json.dumps({"operations": [{"feature": 10**9}], "shade": [-1, 1.5, "x", 10**9], "find": [], "add": {}})),
    ],
)
def test_a_link_that_makes_no_sense_is_an_empty_page(explore, state):
    explore.open()
    explore.show("about:blank")
    explore.show(f"{explore.server.address}/#{state}")
    explore.until(lambda: explore.js("return document.body.dataset.view") == "text")
    assert all(line[0] < 128 for line in explore.listed())
    explore.read()


def test_what_is_wrong_is_said_in_a_sentence(explore, monkeypatch):
    explore.open()
    explore.click("#text-form .main")
    explore.says("#text-status", "There is no text yet")
    explore.fill("#text-0", "wait " * 300)
    explore.click("#text-form .main")
    explore.says("#text-status", "Cut: the first 128 of")
    explore.see("steer")
    explore.click("#write")
    explore.says("#steer-status", "There is nothing to answer yet")
    explore.expected = ["429", "400", "ERR_CONNECTION_REFUSED"]  # the browser logs answers that are errors

    def busy(*_: Any) -> None:
        raise Busy(7)

    explore.see("text")
    with monkeypatch.context() as patch:
        patch.setattr(explore.server.explorer.desk, "run", busy)
        explore.click("#text-form .main")
        explore.says("#text-status", "The server is busy. Try again in 7 seconds.")
    explore.open({"view": "find", "find": {"source": "chat", "sort": "nonsense"}})
    explore.says("#find-status", "'nonsense': no such sort")


def test_without_a_model_pages_and_find_work(explore, monkeypatch):
    monkeypatch.setattr(explore.server.explorer, "about", None)
    monkeypatch.setattr(explore.server.explorer, "_loading", None)
    explore.open({"texts": [TEXT, ""]})
    explore.says("#text-off", "No text can be read: ")
    assert "ingested" in explore.find("#text-off").text
    assert not explore.find("#text-form").is_displayed()
    explore.see("steer")
    assert "Nothing can be steered" in explore.find("#steer-off").text
    assert not explore.find("#steer-form").is_displayed()
    explore.see("find")
    explore.says("#find-status", "128 features found")
    assert not explore.all("#found-table [data-do=shade]")


def test_hostile_text_is_text(explore, monkeypatch):
    for shelf in explore.server.shelves.values():
        labels = shelf.table.label_F.copy()
        labels[:] = [hostile.TOKENS[n % 3] for n in range(len(labels))]
        monkeypatch.setattr(shelf.table, "label_F", labels)
    explore.open()
    text = "".join(hostile.TOKENS[:4]) + hostile.TOKENS[10]
    explore.fill("#text-0", text[:100])
    explore.click("#text-form .main")
    explore.says("#text-status", "token")
    explore.click("#features-table [data-do=steer]")
    explore.click("#features-table [data-do=shade]")
    explore.click("#features-table .feature")
    explore.says("#card", "Largest activation")
    explore.press(Keys.ESCAPE)
    explore.see("find")
    explore.says("#find-status", "features found")
    steered(explore, [], count=4)
    explore.fill("#messages textarea", text[:60])
    explore.click("#write")
    explore.says("#steer-status", "Done.")
    assert explore.js("return window.broken") is None
    assert explore.js("return document.querySelectorAll('img, b b, main script').length") == 0
    shown = explore.js("return document.body.textContent")
    assert "</script><script>window.broken=1" in shown
    assert not set(shown) & set("\u202e\u2066\u200f\x00\x1b")


@pytest.mark.parametrize(("width", "theme"), [(400, "light"), (400, "dark"), (1200, "light"), (1200, "dark")])
def test_every_view_fits_and_stands_out(explore, width, theme):
    seen = []
    for view in views(explore, width, theme):
        explore.fits(width)
        explore.stands_out()
        seen.append(view)
    assert len(seen) == 5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_shade_stands_out(explore, theme):
    explore.open(theme=theme)
    explore.read()
    explore.js(
        "const line = document.querySelector('#tokens-0'); line.replaceChildren();"
        "for (let a = 1; a <= 9; a++) for (let h = 0; h < 6; h++)"
        " line.append(Object.assign(document.createElement('i'), {className: `a${a} h${h}`, textContent: 'x'}))"
    )
    colours = explore.js(
        "return [...document.querySelectorAll('#tokens-0 i')].map(token => getComputedStyle(token).backgroundColor)"
    )
    assert len(set(colours)) == 54
    explore.stands_out()


def test_the_theme_is_switched_and_kept(explore):
    ink = "return getComputedStyle(document.body).color"
    explore.open(theme="light")
    light = explore.js(ink)
    explore.click("#theme")
    dark = explore.js(ink)
    assert dark != light
    assert explore.find("#theme").text == "Light"
    explore.show(f"{explore.server.address}/feature/{SAE}/1", theme="light")
    assert explore.js(ink) == dark
    explore.stands_out()
    explore.click("#theme")
    assert explore.js(ink) == light
    explore.show(explore.server.address, theme="dark")
    assert explore.js(ink) == light


def test_controls_have_names_and_the_focus_is_seen(explore):
    for _ in views(explore, 1200, "light"):
        nameless = explore.js(NAMELESS)
        assert nameless == []
    explore.open()
    for _ in range(6):
        explore.press(Keys.TAB)
        assert explore.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_run_that_is_deleted_is_said(explore, monkeypatch):
    explore.open()
    explore.expected = ["410"]

    def deleted() -> None:
        raise UserError("runs/evaluate/x: was deleted while it was looked at; run `make all`, then explore again")

    for shelf in explore.server.shelves.values():
        monkeypatch.setattr(shelf, "check", deleted)
    explore.see("find")
    explore.says("#find-status", "was deleted while it was looked at")
