"""The explorer in Chromium: texts, features, finding. `make test-browser`."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from exploring import SAE, TEXT, Explore, driving, opening, serving  # noqa: F401
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from pipeline.explore import reading

pytestmark = pytest.mark.browser


def strongest(found: dict[str, Any], place: int) -> list[tuple[int, float]]:
    """Features that are active at a token, the strongest first."""
    active = found["active"]
    here = slice(*active["indptr"][place : place + 2])
    return sorted(zip(active["feature"][here], active["value"][here], strict=True), key=lambda pair: -pair[1])


def levels(found: dict[str, Any], feature: int) -> list[int]:
    """Shades of the tokens by a feature, of 9."""
    top = next(each["held_out_max"] or each["max"] for each in found["features"] if each["feature"] == feature)
    values = [dict(strongest(found, place)).get(feature, 0) for place in range(len(found["tokens"]))]
    return [min(9, -int(-9 * value // top)) if value > 0 else 0 for value in values]


def shades(explore: Explore, hue: str = "") -> list[int]:
    """Shades of the tokens as they are seen; with a hue only those that have it."""
    names = explore.js("return [...document.querySelectorAll('#tokens-0 i')].map(token => token.className.split(' '))")
    return [int(name[0][1:]) if name[0].startswith("a") and (not hue or hue in name) else 0 for name in names]


def counted(found: dict[str, Any], all_levels: list[int]) -> list[int]:
    """The same, less the tokens that no figure counts: those are struck out, not shaded."""
    return [level if token["counts"] else 0 for token, level in zip(found["tokens"], all_levels, strict=True)]


def test_a_text_is_read_and_its_tokens_are_pointed_at(explore):
    explore.open()
    found = explore.read()
    tokens = explore.js("return [...document.querySelectorAll('#tokens-0 i')].map(token => token.textContent)")
    assert [text.replace("↵\n", "\n").replace("·", " ") for text in tokens] == [t["text"] for t in found["tokens"]]
    for place in (1, 5):
        ActionChains(explore.driver).move_to_element(explore.all("#tokens-0 i")[place]).perform()
        features, values = explore.texts("#at-list .feature"), explore.texts("#at-list b")
        expected = strongest(found, place)[:12]
        assert [int(text) for text in features] == [feature for feature, _ in expected]
        assert [float(text) for text in values] == pytest.approx([value for _, value in expected], rel=5e-3)
        assert f"token {place}" in explore.find("#at-title").text
        shown = int(explore.find("#shades .shade").text.split()[0])
        value = dict(strongest(found, place)).get(shown, 0)
        assert float(explore.find("#tip").text.rpartition(":")[2]) == pytest.approx(value, rel=5e-3)
    ActionChains(explore.driver).move_to_element(explore.find("h2#features-title")).perform()
    assert explore.texts("#at-list li") == []


def test_a_text_of_one_token_says_why_its_table_is_empty(explore, monkeypatch):
    """Features are active there, and none counts."""
    monkeypatch.setattr(reading, "kept_in_text", lambda _rule, ids, _acts: np.zeros(ids.size, bool))
    explore.open()
    found = explore.read("wait")
    assert [token["counts"] for token in found["tokens"]] == [False]
    assert found["active"]["feature"]
    explore.says("#features-table", "Training leaves out the first row of a text")


def test_tokens_are_read_with_the_keyboard(explore):
    explore.open()
    found = explore.read()
    explore.js("document.querySelector('#tokens-0').focus()")
    explore.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert "token 1" in explore.find("#at-title").text
    explore.press(Keys.END)
    assert f"token {len(found['tokens']) - 1}" in explore.find("#at-title").text
    explore.press(Keys.HOME, Keys.ARROW_RIGHT, Keys.ENTER, Keys.ARROW_RIGHT)
    assert "token 1" in explore.find("#at-title").text  # held
    assert "Held" in explore.find("#at-about").text
    explore.press(Keys.ESCAPE, Keys.ARROW_RIGHT)
    assert "token 1" not in explore.find("#at-title").text
    explore.js("document.querySelector('#tokens-0').focus()")
    explore.press(Keys.HOME, Keys.ENTER, Keys.TAB)  # into the list
    for _ in range(8):
        if explore.js("return document.activeElement.closest('#at-list') !== null"):
            break
        explore.press(Keys.TAB)
    assert explore.js("return document.activeElement.dataset.do") == "card"


def test_the_features_of_a_text_are_ranked(explore):
    explore.open()
    features = explore.read()["features"]
    titles = {"Max": "max", "Sum": "sum", "Tokens": "count", "Unusual": "unusual", "ReasonScore": "score"}
    for title, key in titles.items():
        for order in ("descending", "ascending") if title != "Max" else ("ascending", "descending"):
            explore.click(f"#features-table [data-key={key}]")
            assert explore.find("#features-table th[aria-sort]").get_attribute("aria-sort") == order
            scale = 1000 if key == "score" else 1
            expected = sorted((scale * each[key] for each in features), reverse=order == "descending")[:50]
            assert explore.numbers("#features-table", title) == pytest.approx(expected, rel=5e-3, abs=6e-4)
    assert len({each["unusual"] for each in features}) > 3


def test_tokens_are_shaded_by_one_feature_or_several(explore):
    explore.open()
    found = explore.read()
    best = sorted(found["features"], key=lambda each: (-each["max"], each["feature"]))
    assert any(levels(found, best[0]["feature"]))
    assert shades(explore) == counted(found, levels(found, best[0]["feature"]))  # nobody chose one yet
    by_number = {
        number: counted(found, levels(found, number)) for number in sorted(each["feature"] for each in best[:20])
    }
    # Both fire at a token, and the weaker one comes later there.
    first, second = next(
        (a, b)
        for a, b in itertools.combinations(by_number, 2)
        if any(x > y > 0 for x, y in zip(by_number[a], by_number[b], strict=True))
    )
    explore.click(f"#features-table [data-do=shade][data-feature='{second}']")
    assert shades(explore) == counted(found, levels(found, second))
    explore.click(f"#features-table [data-do=shade][data-feature='{first}']")
    pairs = [*zip(levels(found, second), levels(found, first), strict=True)]
    assert shades(explore) == counted(found, [max(pair) for pair in pairs])
    assert shades(explore, "h1") == counted(found, [b if b > a else 0 for a, b in pairs])
    place = [each["feature"] for each in best]
    words = {each["feature"]: each["label"] or "\n".join(each["fires_on"]) for each in found["features"]}
    assert explore.texts("#shades button") == [f"{feature}\n{words[feature]}\n✕" for feature in (second, first)]
    explore.click("#shades button")
    assert shades(explore) == counted(found, levels(found, first))
    pressed = "return [...document.querySelectorAll('[data-do=shade][aria-pressed=true]')].map(b => b.dataset.feature)"
    assert explore.js(pressed) == [str(first)]
    explore.js(f"document.querySelector('#features-table [data-do=shade][data-feature=\"{second}\"]').focus()")
    explore.press(Keys.ENTER, Keys.ENTER, Keys.ENTER)  # the focus stays where it is
    assert explore.js(pressed) == [str(number) for number in sorted((first, second), key=place.index)]
    assert explore.state()["shade"] == [first, second]


def test_two_texts_are_compared(explore):
    explore.open()
    texts = [TEXT, "two numbers let me check"]
    explore.click("#comparing")
    explore.fill("#text-0", texts[0])
    explore.fill("#text-1", texts[1])
    explore.press(Keys.CONTROL + Keys.ENTER)
    explore.says("#text-status", ";")
    maxima = [{each["feature"]: each["max"] for each in explore.server.read(text)["features"]} for text in texts]
    both = {f: (maxima[0].get(f, 0), maxima[1].get(f, 0)) for f in {**maxima[0], **maxima[1]}}
    features = [int(text) for text in explore.column("#features-table", "Feature")]
    differences = [both[feature][0] - both[feature][1] for feature in features]
    assert explore.numbers("#features-table", "Difference") == pytest.approx(differences, rel=5e-3)
    sizes = [abs(difference) for difference in differences]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == max(abs(a - b) for a, b in both.values())
    explore.click("#only-differing")
    alone = {feature for feature, (a, b) in both.items() if not a or not b}
    assert explore.find("#features-found").text.startswith(f"{len(alone)} feature")
    assert {int(text) for text in explore.column("#features-table", "Feature")} <= alone


def test_features_are_found(explore):
    explore.open()
    explore.see("find")
    explore.says("#find-status", "features found")
    assert explore.numbers("#found-table", "Feature") == [
        each["number"] for each in json.loads(explore.server.ask(f"/api/find?sae={SAE}&limit=50"))["features"]
    ]
    explore.click("#next")
    explore.says("#page-of", "51 to 100 of")
    second = json.loads(explore.server.ask(f"/api/find?sae={SAE}&limit=50&offset=50"))["features"]
    assert explore.numbers("#found-table", "Feature") == [each["number"] for each in second]
    explore.click("#found-table [data-key=density]")
    explore.says("#page-of", "1 to 50 of")
    densities = explore.numbers("#found-table", "Density")
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) > 3
    explore.fill("[name=q]", "7\n")
    explore.says("#find-status", "1 feature found")
    assert explore.column("#found-table", "Feature") == ["7"]
    explore.fill("[name=q]", "")
    explore.fill("[name=token]", "wait\n")
    explore.says("#find-status", "found")
    asked = json.loads(explore.server.ask(f"/api/find?sae={SAE}&token=wait"))
    explore.says("#find-status", f"{asked['total']} feature")
    assert explore.numbers("#found-table", "Feature") == [each["number"] for each in asked["features"]]
    explore.fill("[name=token]", "zzzz\n")
    explore.says("#find-status", "No feature fits all of this.")
    explore.click("#find-form [type=reset]")
    explore.says("#find-status", "128 features found")


def test_density_and_score_are_asked_for_in_the_units_of_the_table(explore):
    explore.open({"view": "find"})
    explore.says("#find-status", "features found")
    everything = json.loads(explore.server.ask(f"/api/find?sae={SAE}&limit=500"))["features"]
    middle = sorted(each["density"] for each in everything)[len(everything) // 2]
    explore.fill("[name=min_density]", f"{100 * middle}\n")
    explore.says("#find-status", f"{sum(each['density'] >= middle for each in everything)} features found")
    explore.fill("[name=min_density]", "")
    score = sorted(each["score"] for each in everything)[-5]
    explore.fill("[name=min_score]", f"{1000 * score - 1e-9}\n")
    explore.says("#find-status", "5 features found")


def test_features_are_found_by_example(explore):
    explore.open()
    explore.see("find")
    explore.click("#example summary")
    explore.click("#example-form .main")
    explore.says("#find-status", "Give a text at least")
    yes, no = ["let me check", "wait let me"], ["two numbers is even"]
    explore.fill("#yes", "\n".join(yes))
    explore.fill("#no", "\n".join(no))
    explore.click("#example-form .main")
    expected = json.loads(explore.server.ask("/api/find", {"sae": SAE, "yes": yes, "no": no}))["features"]
    explore.says("#find-status", f"{len(expected)} feature")
    assert explore.numbers("#found-table", "Feature") == [each["number"] for each in expected]
    assert explore.state()["find"]["yes"] == "\n".join(yes)


def test_a_feature_s_card_and_page(explore):
    explore.open({"operations": [{"feature": 3, "op": "set", "strength": 2, "where": "prompt"}]})
    found = explore.read()
    best = max(found["features"], key=lambda each: each["max"])["feature"]
    explore.click(f"#features-table .feature[data-feature='{best}']")
    card = json.loads(explore.server.ask(f"/api/feature/{SAE}/{best}"))
    explore.says("#card", "Largest activation")
    assert explore.find("#card-title").text == f"Feature {best}"
    assert explore.texts("#card .chip") == card["fires_on"] + card["promoted"]
    assert len(explore.all("#card .tokens")) == len(card["excerpts"])
    explore.press(Keys.ESCAPE)
    assert not explore.find("#card").is_displayed()
    explore.click(f"#features-table .feature[data-feature='{best}']")
    explore.says("#card", "Its page")
    explore.click("#card a")
    assert explore.find("h1").text == f"Feature {best}"
    assert f"/feature/{SAE}/{best}" in explore.driver.current_url
    tip, peak = explore.find("#tip"), explore.find(".tokens .peak")
    ActionChains(explore.driver).move_to_element(peak).perform()
    assert tip.text.startswith(peak.get_attribute("data-v"))
    explore.driver.find_element("link text", "Add to the steering list").click()
    explore.until(lambda: len(explore.listed()) == 2)
    assert explore.listed() == [(3, "set", 2, "prompt"), (best, "add", 1, "all")]
    assert explore.find("#steer-view").is_displayed()
    explore.driver.back()
    explore.driver.find_element("link text", "Shade the text by it").click()
    explore.says("#text-status", "token")
    assert shades(explore) == counted(found, levels(found, best))
    assert len(explore.listed()) == 2


def test_every_feature_has_a_page(explore):
    for number in (0, 64, 127):
        explore.show(f"{explore.server.address}/feature/{SAE}/{number}")
        assert explore.find("h1").text == f"Feature {number}"
        targets = explore.js("return [...document.links].map(a => a.href)")
        assert targets
        for target in targets:
            explore.server.ask(target.removeprefix(explore.server.address).partition("#")[0])
