"""Pages of single features: a small site that opens from disk, each page a whole file of its own.

features/<hook>/index.html    all features that have a page: search, sort
features/<hook>/123.html      one feature

Tokens are text of strangers. Everything is escaped, what does not show (line breaks, controls, marks of
direction) is named, and a content security policy allows nothing but the one style and the one script below.

Shape suffixes: C held-out contexts, F d_sae, K features that have a page.
"""

import base64
import hashlib
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evaluate.config import FeaturesConfig
from evaluate.feature_views import CHIPS, Scored, Site, Views, number, percent, thousandths
from evaluate.features import ShardActivity, activity, choose_features, heldout_activity, nearest_features
from evaluate.fidelity import Fidelity
from evaluate.groups import finest
from evaluate.subject import Subject
from evaluate.unembedding import Tokens, promoted
from harvest.activation_store import slug
from harvest.files import UserError, replacing

DEFINITIONS = {
    "index": "page that lists the features that have one, below the folder of the report",
    "numbers": "features that have a page (evaluate.features); the page says what each of its figures means",
}


def analyse(subject: Subject, heldout: Fidelity) -> dict[str, Any] | None:
    """Pages of chosen features, and which they are; None where the setting is null or no feature fires.

    Raises UserError for a feature asked for that the SAE does not have.
    """
    config, saved, store = subject.config.features, subject.saved, subject.store
    if config is None:
        return None
    scored = read_scores(subject.file("reason_score", ".npz"))
    chosen_K = choose_features(config, heldout.density_F, scored.score_F if scored else None)
    if not len(chosen_K):
        return None
    names, finest_C = finest(subject.groups, len(subject.context_source))
    with subject.progress("feature pages", store.geometry.holdout_shards, "shards") as progress:

        def counted() -> Iterator[ShardActivity]:
            for shard in heldout_activity(store, saved, subject.exclude, finest_C, chosen_K):
                yield shard
                progress.advance(1)

        found = activity(counted(), len(chosen_K), len(names), config)
    site = Site(
        saved.hook,
        saved.sae.d_sae,
        chosen_K,
        found,
        names,
        subject.tokenizer().text,
        *_promoted(subject, chosen_K),
        nearest_features(saved.sae.W_dec, chosen_K),
        scored,
    )
    folder = subject.directory / "features" / slug(saved.hook)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    write_pages(folder, site, config)
    return {"index": f"features/{slug(saved.hook)}/index.html", "numbers": sorted(chosen_K.tolist())}


def read_scores(path: Path) -> Scored | None:
    """ReasonScore as its analysis has left it; None where it was not computed."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return Scored(arrays["score"], arrays["word_means"], arrays["words"].tolist())


def _promoted(subject: Subject, chosen_K: np.ndarray) -> tuple[tuple[Tokens, Tokens] | None, str]:
    """Promoted and suppressed tokens, or why there are none."""
    try:
        unembedding = subject.unembedding()
    except UserError as error:
        return None, str(error)
    d_in, width = subject.saved.sae.d_in, unembedding.head_VD.shape[1]
    if d_in != width:
        return None, f"the hook is of width {d_in}, the LM head of width {width}"
    return promoted(unembedding, subject.saved.sae.W_dec[torch.from_numpy(chosen_K).to(subject.device)], CHIPS), ""


def write_pages(folder: Path, site: Site, config: FeaturesConfig) -> None:
    """Write the index and a page for each chosen feature."""
    folder.mkdir(parents=True, exist_ok=True)
    style, script = (files("evaluate").joinpath("templates", f"features.{s}").read_text("utf-8") for s in ("css", "js"))
    environment = Environment(
        loader=PackageLoader("evaluate"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent, "thousandths": thousandths}
    environment.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        "policy": f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src '{_sha256(style)}'; script-src '{_sha256(script)}'",
        "hook": site.hook,
        "d_sae": site.d_sae,
        "sources": site.sources,
        "has_page": {int(feature) for feature in site.chosen_K},
        "scored": site.scored is not None,
    }
    views = Views(site, config)
    features = views.all()
    page = environment.get_template("feature.html")
    for i, feature in enumerate(features):
        before, after = features[i - 1] if i else None, features[i + 1] if i + 1 < len(features) else None
        _write(folder / f"{feature['number']}.html", page.render(feature=feature, before=before, after=after))
    _write(folder / "index.html", environment.get_template("features.html").render(features=features))


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _write(path: Path, html: str) -> None:
    with replacing(path) as partial:
        partial.write_text(html, encoding="utf-8")
