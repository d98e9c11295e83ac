"""Headless Chromium with the network off, and one page of it: opened, looked at, typed into."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

TOOLS = ("chromium", "chromedriver")
# Moves of what was painted already.
SHIFTS = """
const done = arguments[0];
let count = 0;
new PerformanceObserver(list => { count += list.getEntries().length; }).observe({type: "layout-shift", buffered: true});
setTimeout(() => done(count), 20);
"""
# The least contrast of a text with what is behind it (WCAG 2.2, relative luminance), and the element.
CONTRAST = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parse = text => text.match(/[\\d.]+/g).map(Number);
const behind = element => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
  const over = (under, [r, g, b, a = 1]) => under.map((u, i) => u + ([r, g, b][i] - u) * a);
  return layers.reverse().reduce(over, [255, 255, 255]);
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let least = [99, ""];
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const element = node.parentElement;
  if (!node.textContent.trim() || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const ink = parse(element.closest("svg") ? style.fill : style.color);
  const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < least[0]) least = [ratio, `${element.outerHTML.slice(0, 80)}`];
}
return least;
"""


@contextmanager
def chromium_in(profile: Path) -> Iterator[Chrome]:
    """A browser that keeps what it keeps in a folder, and reaches no host but this one."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        pytest.fail(f"{' and '.join(missing)} not found: on Debian, apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (
        "headless=new",
        "no-sandbox",  # its sandbox refuses root
        "disable-dev-shm-usage",
        "disable-gpu",
        f"user-data-dir={profile}",
        "proxy-server=127.0.0.1:9",  # nothing listens there: the network is off, but for this machine
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "disable-background-networking",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, Service(shutil.which("chromedriver")))
    try:
        driver.get("about:blank")  # a new tab's own page asks for its parts for a while
        yield driver
    finally:
        driver.quit()


class Page:
    """One page open at a time, and what it asked for and complained of."""

    def __init__(self, driver: Chrome) -> None:
        self.driver, self.js = driver, driver.execute_script
        self.addresses: set[str] = set()  # that were asked for
        for kind in ("browser", "performance"):
            driver.get_log(kind)

    def show(self, address: str, width: int = 1200, theme: str = "light") -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        self.driver.get(address)

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def fits(self, width: int) -> None:
        """Nothing is wider than the window."""
        inner, whole = self.js("const e = document.documentElement; return [e.clientWidth, e.scrollWidth]")
        assert width - 20 < inner <= width  # a scroll bar, on a desktop
        assert whole <= inner, self.driver.current_url

    def stands_out(self) -> None:
        """Text has the contrast that WCAG 2.2 AA asks for."""
        ratio, where = self.js(CONTRAST)
        assert ratio >= 4.5, where

    def complaints(self) -> list[str]:
        """What was written to the console since this was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def asked(self) -> set[str]:
        """Addresses that were asked for since this was last asked."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        found = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        self.addresses |= found
        return found
