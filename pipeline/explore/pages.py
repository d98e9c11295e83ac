"""What a browser is given: the explorer's page, the page of any feature, and the files that both ask for.

No page has a script or style of its own, inline or from another host, so the server's policy can forbid both. Names of
files are those of a fixed list: none is made from a request.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import ChoiceLoader, Environment, PackageLoader

from evaluate.feature_views import QUARTERS, number, percent, rounded, thousandths
from evaluate.report import environment
from evaluate.token_injection import NAMES as VERDICTS
from evaluate.visible import visible

TYPES = {"css": "text/css", "js": "text/javascript"}


class Asset(NamedTuple):
    """A file of the pages."""

    body: bytes
    media_type: str


@cache
def assets() -> dict[str, Asset]:
    """What /static/<name> gives, by name."""
    shared = files("evaluate").joinpath("templates")
    found = [*files("pipeline.explore").joinpath("static").iterdir()]
    found += [shared.joinpath(name) for name in ("features.css", "features.js")]
    typed = ((each, TYPES.get(each.name.rpartition(".")[2])) for each in found)
    return {each.name: Asset(each.read_bytes(), media_type) for each, media_type in typed if media_type}


@cache
def _templates() -> Environment:
    filters = {"number": number, "percent": percent, "rounded": rounded, "thousandths": thousandths, "visible": visible}
    made = environment(filters, quarters=QUARTERS)
    made.loader = ChoiceLoader([PackageLoader("pipeline.explore"), PackageLoader("evaluate")])
    return made


@cache
def app_page() -> str:
    """The page with the views Text, Find and Steer, at /. All else its script asks for."""
    return _templates().get_template("explore.html").render(verdicts=list(VERDICTS))


def feature_page(entry: str, hook: str, d_sae: int, view: dict[str, Any], sources: Sequence[str] = ()) -> str:
    """The page /feature/<entry>/<number> of a feature, from its view (`Shelf.view`).

    `sources` are the names of the sources that `own` tokens are counted in, in their order.
    """
    feature, page = view["number"], _templates().get_template("explore_feature.html")
    return page.render(
        entry=entry,
        hook=hook,
        d_sae=d_sae,
        feature=view,
        before={"number": feature - 1} if feature else None,
        after={"number": feature + 1} if feature + 1 < d_sae else None,
        has_page=range(d_sae),
        ending="",
        scored=view["score"] is not None,
        by_token="explained" in view,
        sources=sources,
    )
