"""The explorer's pages hold nothing that its policy forbids; tests/browser drives them."""

import re
from html.parser import HTMLParser

import hostile
import pytest
from conftest import TINY

from pipeline import stages
from pipeline.config import load
from pipeline.explore import pages
from pipeline.explore.catalog import Shelf, find_entries, open_shelves

# What a content policy without 'unsafe-inline' refuses, and what another host would be asked for.
FORBIDDEN = re.compile(r"<style|<script(?![^>]* src=)|\s(style|on\w+)=|javascript:|https?:|//[a-z]", re.IGNORECASE)
# What makes markup or code of a text.
PARSES = re.compile(r"(inner|outer)HTML|insertAdjacent|document\.write|DOMParser|\beval\b|new Function|[\"']style[\"']")


@pytest.fixture
def shelf(finished, monkeypatch) -> Shelf:
    monkeypatch.chdir(finished)
    return next(iter(open_shelves(find_entries(stages.find_runs(load(TINY, []), finished / "runs"))).values()))


def feature_page(shelf: Shelf, number: int) -> str:
    return pages.feature_page(shelf.entry.id, shelf.entry.hook, 128, shelf.view(number))


def test_pages_hold_nothing_inline_and_nothing_of_another_host(shelf):
    shown = [pages.app_page(), *(feature_page(shelf, number) for number in (0, 63, 127))]
    for page in shown:
        assert not FORBIDDEN.search(page), FORBIDDEN.search(page)
    assert FORBIDDEN.search("<p style='x'>") and FORBIDDEN.search("<script>") and FORBIDDEN.search("<a onclick='x'>")


def test_scripts_make_no_markup_of_texts():
    scripts = {name: asset.body.decode() for name, asset in pages.assets().items() if name.endswith(".js")}
    assert len(scripts) > 10
    for name, text in scripts.items():
        assert not PARSES.search(text), f"{name}: {PARSES.search(text)}"
        assert not re.search(r"https?:", text), name


def test_every_file_that_is_asked_for_is_served(shelf):
    asked = set(re.findall(r"/static/([\w.]+)", pages.app_page() + feature_page(shelf, 0)))
    for name, asset in pages.assets().items():
        assert asset.media_type == {"js": "text/javascript", "css": "text/css"}[name.partition(".")[2]]
        asked |= set(re.findall(r'from "\./([\w.]+)"', asset.body.decode()))
    assert asked == set(pages.assets())


def test_a_feature_s_page_leads_to_its_neighbours_and_views(shelf):
    first, last = feature_page(shelf, 0), feature_page(shelf, 127)
    assert 'href="1" rel="next"' in first
    assert 'rel="prev"' not in first
    assert 'href="126" rel="prev"' in last
    assert 'rel="next"' not in last
    hashes = re.findall(r'href="/#([^"]+)"', first)
    assert any('"add"'.replace('"', "%22") in each and "0%5D" in each for each in hashes)
    assert all(f"%22sae%22%3A%20%22{shelf.entry.id}%22" in each for each in hashes)
    for other, _ in shelf.view(0)["nearest"]:
        assert f'<a href="{other}">{other}</a>' in first


def test_labels_and_tokens_of_strangers_are_escaped(shelf):
    view = shelf.view(0) | {"explanation": hostile.explained(1)}
    view["fires_on"] = [{"text": token, "share": 0.5, "mean": 1.0} for token in hostile.TOKENS]
    page = pages.feature_page("x", "<b>hook", 128, view)
    found: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    assert not {tag for tag, _ in found} & {"img", "style"}
    assert all(attributes.get("src", "").startswith("/static/") for tag, attributes in found if tag == "script")
    assert not {name for _, attributes in found for name in attributes if name.startswith("on") or name == "style"}
    assert "&lt;b&gt;hook" in page
