"""Pages of single features: a small site that opens from disk, each page a whole file of its own.

features/<hook>/index.html    all features that have a page: search, sort
features/<hook>/123.html      one feature

Tokens are untrusted text. Everything is escaped, what does not show (line breaks, controls, marks of
direction) is named, and a content security policy allows nothing but the one style and the one script below.

Shape suffixes: D d_in, F d_sae, K features that have a page, N of what is listed of each.
"""

import base64
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from evaluate.activity import Activity
from evaluate.config import FeaturesConfig
from evaluate.feature_views import CHIPS, QUARTERS, Scored, Site, Views, Weighed, number, percent, rounded, thousandths
from evaluate.figures import Section
from evaluate.operations import check_features
from evaluate.report import environment, write_text
from evaluate.subject import Subject
from evaluate.token_identity import read_identity
from evaluate.unembedding import Unembedding, promoted
from evaluate.visible import visible
from harvest.activation_store import slug
from harvest.files import UserError


def pages(
    subject: Subject,
    activity: Activity,
    injected: Sequence[dict[str, Any]] = (),
    *,
    explained: Mapping[int, dict[str, Any]] | None = None,
    to: Path | None = None,
) -> Section | None:
    """Write the pages of chosen features, and say which they are; None where no feature fires.

    `injected` is what token injection found. `explained` are explanations by feature: each of these features has a page
    too. All else is read from files of the evaluation, below whose directory the pages are written, or below `to`.
    """
    config, saved = subject.config.features, subject.saved
    assert config is not None
    scored = read_scores(subject.file("reason_score", ".npz"))
    density_F = activity["active"].sum(0) / max(1, activity["rows"].sum())
    chosen_K = choose_features(config, density_F, scored.score_F if scored else None)
    chosen_K = np.concatenate([chosen_K, np.setdiff1d(list(explained or ()), chosen_K).astype(np.int64)])
    if not len(chosen_K):
        return None
    unembedding, why_none = usable(subject.unembedding, saved.sae.d_in)
    folder = (to or subject.directory) / "features" / slug(saved.hook)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    identity, by_feature = read_identity(subject.file("token_identity", ".npz")), {f["feature"]: f for f in injected}
    of_tokens = identity, by_feature, explained or {}
    site = Site(saved.hook, activity, subject.tokenizer().text, why_none, scored, *of_tokens)
    write_pages(folder, site, weigh(saved.sae.W_dec, chosen_K, unembedding), config)
    return Section([], {"index": f"features/{slug(saved.hook)}/index.html", "numbers": sorted(chosen_K.tolist())})


def choose_features(config: FeaturesConfig, density_F: np.ndarray, score_F: np.ndarray | None) -> np.ndarray:
    """Features that get a page, int64 (K,): those asked for, the best ranked, and a random part of the living.

    Ranked by ReasonScore; where there is none, all are drawn at random. Raises UserError for a number out of range.
    """
    check_features(config.include, len(density_F), "evaluate.features.include")
    scored = score_F is not None
    ranking = np.where(density_F > 0, np.nan_to_num(score_F, nan=-np.inf) if scored else 0, -np.inf)
    living = int((density_F > 0).sum())
    ranked = np.argsort(-ranking, kind="stable")[:living]
    drawn = np.random.default_rng(config.seed).permutation(ranked)
    ranked_count = config.count - round(config.count * config.random_share) if scored else 0
    wanted = [*config.include, *ranked[:ranked_count].tolist(), *drawn.tolist()]
    return np.array(list(dict.fromkeys(wanted))[: max(config.count, len(set(config.include)))], np.int64)


@torch.no_grad()
def nearest_features(W_dec: torch.Tensor, chosen_K: np.ndarray, count: int = 8) -> list[list[tuple[int, float]]]:
    """Of each chosen feature, the others with the highest cosine of decoder rows (d_sae, d_in), highest first."""
    unit_FD = torch.nn.functional.normalize(W_dec, dim=1)
    found = []
    for part_K in torch.from_numpy(chosen_K).to(W_dec.device).split(64):
        cosine_KF = unit_FD[part_K] @ unit_FD.T
        cosine_KF[torch.arange(len(part_K), device=part_K.device), part_K] = -2  # itself
        best = cosine_KF.topk(min(count, len(W_dec) - 1))
        found += _pairs(best.indices, best.values)
    return found


def read_scores(path: Path) -> Scored | None:
    """ReasonScore as its analysis has left it; None where it was not computed."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return Scored(arrays["score"], arrays["word_means"], arrays["words"].tolist())


def usable(load: Callable[[], Unembedding], d_in: int) -> tuple[Unembedding | None, str]:
    """The end of the model for directions of this width; or None, and why."""
    try:
        unembedding = load()
    except UserError as error:
        return None, str(error)
    width = unembedding.head_VD.shape[1]
    if d_in != width:
        return None, f"the hook is of width {d_in}, the LM head of width {width}"
    return unembedding, ""


def weigh(W_dec: torch.Tensor, chosen_K: np.ndarray, unembedding: Unembedding | None) -> dict[int, Weighed]:
    """What the weights (d_sae, d_in) say of each chosen feature; without the model's end nothing of tokens."""
    sides: list[list[list[tuple[int, float]]]] = [[[] for _ in chosen_K]] * 2
    if unembedding:
        found = promoted(unembedding, W_dec[torch.from_numpy(chosen_K).to(W_dec.device)], CHIPS)
        sides = [_pairs(tokens.token_KN, tokens.logit_KN) for tokens in found]
    lists = zip(*sides, nearest_features(W_dec, chosen_K), strict=True)
    return {feature: Weighed(*of) for feature, of in zip(chosen_K.tolist(), lists, strict=True)}


def _pairs(number_KN: torch.Tensor, value_KN: torch.Tensor) -> list[list[tuple[int, float]]]:
    return [list(zip(i, v, strict=True)) for i, v in zip(number_KN.tolist(), value_KN.tolist(), strict=True)]


def write_pages(folder: Path, site: Site, weighed: Mapping[int, Weighed], config: FeaturesConfig) -> None:
    """Write the index and a page for each of these features."""
    folder.mkdir(parents=True, exist_ok=True)
    style, script = (files("evaluate").joinpath("templates", f"features.{s}").read_text("utf-8") for s in ("css", "js"))
    templates = environment(
        {
            "number": number,
            "percent": percent,
            "rounded": rounded,
            "thousandths": thousandths,
            "visible": visible,
        },
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
        hook=site.hook,
        d_sae=site.activity["active"].shape[1],
        has_page=set(weighed),
        ending=".html",
        scored=site.scored is not None,
        by_token=site.identity is not None,
        explained=bool(site.explained),
        quarters=QUARTERS,
        sources=site.identity.sources.tolist() if site.identity else [],
    )
    features = Views(site, config).all(weighed)
    page = templates.get_template("feature.html")
    for before, feature, after in zip([None, *features], features, [*features[1:], None], strict=False):
        write_text(folder / f"{feature['number']}.html", page.render(feature=feature, before=before, after=after))
    write_text(folder / "index.html", templates.get_template("features.html").render(features=features))


def content_policy(style: str, script: str) -> str:
    """A content security policy that allows one style and one script, both inside the page, and nothing else."""
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src '{_sha256(style)}'"
    return f"{policy}; script-src '{_sha256(script)}'"


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
