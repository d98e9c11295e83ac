"""Whether a feature's own tokens alone drive it (arXiv 2601.05679): they are put into text without reasoning.

A feature's own tokens and n-grams are found on the first half of the held-out text (evaluate/ngrams.py); all texts
that are read here are of the second. The activation of a text is the largest of its rows that training would keep.
Injected texts are compared with other texts of the same sources as they are, which all features share, as they do the
texts of reasoning.

Verdicts are the study's, by the strategy of the largest d, its p times the strategies that were tried (Bonferroni):

    token-driven                 d ≥ 0.8, p < 0.01
    partially token-driven       d ≥ 0.5, p < 0.01
    weakly token-driven          d ≥ 0.2, p < 0.05
    context-dependent            all else
    never fires                  on no row that its tokens would be chosen from

Cost: (features · strategies · texts + 2 · read) · tokens through the model up to the hook.

Shape suffixes: B texts, W tokens of a text, K features, F d_sae, C contexts, S positions, D d_in.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from evaluate.config import TokenInjectionConfig
from evaluate.effects import Effect, effect
from evaluate.feature_views import visible
from evaluate.figures import Section, figures_of
from evaluate.halves import second_half
from evaluate.injected_texts import STRATEGIES, Injected, inject, windows
from evaluate.ngrams import Own, fired, own_ngrams
from evaluate.reason_score import sources_read
from evaluate.subject import Subject, bos_id
from evaluate.token_identity import TokenIdentity
from harvest.activation_rows import kept_in_text
from harvest.progress import Progress

AT_ONCE = 2048  # tokens of a forward pass
LEAST_TEXTS = 4  # of a group, for a test
LIKE = 20  # living features of the nearest density, of which one is drawn
SHOWN = 5  # own tokens and n-grams in metrics.json
THRESHOLDS = (
    ("token-driven", 0.8, 0.01),
    ("partially token-driven", 0.5, 0.01),
    ("weakly token-driven", 0.2, 0.05),
)
OTHERWISE, SILENT = "context-dependent", "never fires"
NAMES = {verdict: verdict.replace("-", "_").replace(" ", "_") for verdict, *_ in (*THRESHOLDS, (OTHERWISE,), (SILENT,))}


class Texts(NamedTuple):
    """Texts of the second half, token ids without BOS, int64 (B, W) each."""

    base_BW: np.ndarray  # tokens are injected into these
    untouched_BW: np.ndarray  # others of the same sources
    reasoning_BW: np.ndarray
    bos: list[int]  # that begins each, or nothing


class Tested(NamedTuple):
    """What the injection of a feature's own tokens did; None and empty for a feature that never fires."""

    untouched: float  # mean activation of the texts as they are
    reasoning: Effect | None
    by_strategy: dict[str, Effect]
    best: str | None  # strategy
    p: float | None  # of the best, corrected for all that were tried
    verdict: str
    single: str  # verdict by single tokens alone, without the n-grams


def analyse(subject: Subject, density_F: np.ndarray, identity: TokenIdentity) -> Section | None:
    """Verdicts on the features of the highest ReasonScore and on a control group; None, and said why, where there is no
    score, no other text, or too little text.

    `density_F` is the part of the kept held-out rows in which each feature fires.
    """
    config, path = subject.config.token_injection, subject.file("reason_score", ".npz")
    if config is None:
        return None
    if subject.config.reason_score is None or not path.exists():
        return _left_out("there is no ReasonScore to choose features by")
    names = subject.contexts.sources
    read = [names[n] for n in sources_read(subject.config.reason_score, names)]
    into = list(config.into) or [name for name in names if name not in read]
    if not into:
        return _left_out("evaluate.reason_score reads all sources; its setting `sources` names those of reasoning")
    texts = choose_texts(subject, config, read, into)
    for group, found in ((into, min(len(texts.base_BW), len(texts.untouched_BW))), (read, len(texts.reasoning_BW))):
        if found < LEAST_TEXTS:
            return _left_out(
                f"the second half of the held-out text of {', '.join(group)} has too few texts of {config.tokens} "
                f"tokens for a test; raise sample.holdout_tokens, or lower evaluate.token_injection.tokens"
            )
    with np.load(path, allow_pickle=False) as arrays:
        groups = choose_features(arrays["score"], density_F, config)
    features = [feature for group in groups.values() for feature in group]
    owned = own_ngrams(fired(subject, features))
    injected = {
        (k, strategy): inject(texts.base_BW, ngrams, strategy, config.injected, _rng(config, features[k], strategy))
        for k, own in enumerate(owned)
        for strategy in STRATEGIES
        if len(ngrams := own.ngrams_GL if strategy == "context" else own.tokens_GL)
    }
    tested = verdicts(subject, features, texts, injected)
    group_of = {feature: group for group, members in groups.items() for feature in members}
    listed = []
    for k, (feature, own) in enumerate(zip(features, owned, strict=True)):
        example = injected.get((k, tested[k].best or ""))
        line = {"feature": feature, "group": group_of[feature], **_listed(subject, tested[k], own, example)}
        listed.append(line | identity.of(feature))
    figures = {f"features_{group}": len(members) for group, members in groups.items()}
    for group in groups:
        given = [line["verdict"] for line in listed if line["group"] == group]
        figures |= {f"{name}_{group}": given.count(verdict) for verdict, name in NAMES.items()}
        single = [line["verdict_single"] for line in listed if line["group"] == group]
        figures[f"single_token_driven_{group}"] = single.count(THRESHOLDS[0][0])
    counts = {name: len(getattr(texts, f"{name}_BW")) for name in ("base", "untouched", "reasoning")}
    about = {"into": into, "sources": read, "tokens": texts.base_BW.shape[1] + len(texts.bos), "texts": counts}
    return Section(figures_of("token_injection", figures), about | {"features": listed})


def choose_features(score_F: np.ndarray, density_F: np.ndarray, config: TokenInjectionConfig) -> dict[str, list[int]]:
    """ "top", the best by ReasonScore, and "control": for each of these that fires a random one of like density.

    It is drawn of the `LIKE` other living features whose log density is nearest, each once.
    """
    top = np.argsort(-np.nan_to_num(score_F, nan=-np.inf), kind="stable")[: config.features].tolist()
    free, control, rng = np.setdiff1d(np.flatnonzero(density_F), top), [], np.random.default_rng(config.seed)
    for feature in top:
        if density_F[feature] and len(free):
            distance = np.abs(np.log(density_F[free] / density_F[feature]))
            near = free[np.argsort(distance, kind="stable")[:LIKE]]
            control.append(int(rng.choice(near)))
            free = free[free != control[-1]]
    return {"top": top, "control": control}


def choose_texts(subject: Subject, config: TokenInjectionConfig, read: list[str], into: list[str]) -> Texts:
    """Texts to inject into and to compare with. Fewer where there is less text; a fifth of it is injected into."""
    contexts, count = subject.contexts, subject.contexts.count("holdout")
    tokens_CS, source_C = (contexts.read("holdout", name, 0, count) for name in ("tokens", "source"))
    bos = [token] if (token := bos_id(subject)) is not None else []
    usable_CS = second_half(contexts, "holdout") & ~np.isin(tokens_CS, bos)
    width, rng = min(config.tokens, tokens_CS.shape[1]) - len(bos), np.random.default_rng(config.seed)

    def of(names: list[str]) -> np.ndarray:
        here = np.isin(source_C, [contexts.sources.index(name) for name in names])
        return windows(tokens_CS[here], usable_CS[here], width, rng)

    others_BW, reasoning_BW = of(into), of(read)
    base = min(config.texts, max(LEAST_TEXTS, len(others_BW) // 5))
    return Texts(others_BW[:base], others_BW[base : base + config.read], reasoning_BW[: config.read], bos)


def verdicts(
    subject: Subject, features: list[int], texts: Texts, injected: dict[tuple[int, str], Injected]
) -> list[Tested]:
    """What injection did to each feature; `injected` has the texts of each (index into features, strategy)."""
    shared_BW = np.concatenate([texts.untouched_BW, texts.reasoning_BW])
    total = len(shared_BW) + sum(len(each.tokens_BW) for each in injected.values())
    with subject.progress("token injection", total, "texts") as progress:
        shared_BK = _largest(subject, features, shared_BW, texts.bos, progress)
        all_BW = np.concatenate([shared_BW[:0], *(each.tokens_BW for each in injected.values())])
        all_BK = _largest(subject, features, all_BW, texts.bos, progress)
    untouched_BK, reasoning_BK = np.split(shared_BK, [len(texts.untouched_BW)])
    parts = np.split(all_BK, len(injected)) if injected else []
    of_strategy: list[dict[str, np.ndarray]] = [{} for _ in features]
    for (k, strategy), part_BK in zip(injected, parts, strict=True):
        of_strategy[k][strategy] = part_BK[:, k]
    return [judged(untouched_BK[:, k], reasoning_BK[:, k], found) for k, found in enumerate(of_strategy)]


def judged(untouched_B: np.ndarray, reasoning_B: np.ndarray, injected: dict[str, np.ndarray]) -> Tested:
    """The verdict on a feature, from the activations (B,) of its texts, the injected ones by strategy."""
    untouched = float(untouched_B.mean())
    if not injected:
        return Tested(untouched, None, {}, None, None, SILENT, SILENT)
    found = {strategy: effect(values_B, untouched_B) for strategy, values_B in injected.items()}
    single = {strategy: each for strategy, each in found.items() if strategy != "context"}
    best, p, verdict = _verdict(found)
    return Tested(untouched, effect(reasoning_B, untouched_B), found, best, p, verdict, _verdict(single).verdict)


class _Verdict(NamedTuple):
    best: str
    p: float
    verdict: str


def _verdict(found: dict[str, Effect]) -> _Verdict:
    best = max(found, key=lambda strategy: found[strategy].d)
    d, p = found[best].d, min(1.0, found[best].p * len(found))
    return _Verdict(best, p, next((name for name, least, below in THRESHOLDS if d >= least and p < below), OTHERWISE))


@torch.inference_mode()
def _largest(
    subject: Subject, features: list[int], tokens_BW: np.ndarray, bos: list[int], progress: Progress
) -> np.ndarray:
    """The largest activation of each feature on the kept rows of each text, float32 (B, K); 0 where no row is kept."""
    model, saved = subject.model(), subject.saved
    rule = subject.rules[saved.hook]
    tokens_BW = np.concatenate([np.full((len(tokens_BW), len(bos)), bos, np.int64), tokens_BW], 1)
    out = [np.zeros((0, len(features)), np.float32)]
    at_once = max(1, AT_ONCE // tokens_BW.shape[1])
    for start in range(0, len(tokens_BW), at_once):
        part_BW = tokens_BW[start : start + at_once]
        acts = model.activations(torch.from_numpy(part_BW))[saved.hook].bfloat16().flatten(0, 1)  # as stored
        f = saved.sae.columns(acts.to(subject.device).float(), features)
        kept = torch.from_numpy(kept_in_text(rule, part_BW, acts)).to(f.device)
        f = torch.where(kept[:, None], f, torch.zeros_like(f))
        out.append(f.view(*part_BW.shape, len(features)).amax(1).float().cpu().numpy())
        progress.advance(len(part_BW))
    return np.concatenate(out)


def _rng(config: TokenInjectionConfig, feature: int, strategy: str) -> np.random.Generator:
    return np.random.default_rng([config.seed, feature, STRATEGIES.index(strategy)])


def _listed(subject: Subject, tested: Tested, own: Own, example: Injected | None) -> dict[str, Any]:
    """What metrics.json says of a feature; definitions.toml has what each is."""

    def text(ids: list[int]) -> str:
        return "".join(visible(subject.tokenizer().text(token)) for token in ids)

    best = tested.by_strategy.get(tested.best or "")
    reasoning = tested.reasoning.mean if tested.reasoning else 0
    shown = zip(example.tokens_BW[0].tolist(), example.is_injected_BW[0].tolist(), strict=True) if example else ()
    return {
        "verdict": tested.verdict,
        "verdict_single": tested.single,
        "best": tested.best,
        "d": best and best.d,
        "d_interval": best and best.d_interval,
        "p": tested.p,
        "share": best.mean / reasoning if best and reasoning else None,
        "n": own.ngrams_GL.shape[1] if len(own.ngrams_GL) else None,
        "untouched": tested.untouched,
        "reasoning": tested.reasoning and tested.reasoning._asdict(),
        "strategies": [{"strategy": name, **found._asdict()} for name, found in tested.by_strategy.items()],
        "tokens": [text(ids) for ids in own.tokens_GL[:SHOWN].tolist()],
        "ngrams": [text(ids) for ids in own.ngrams_GL[:SHOWN].tolist()],
        "example": [{"text": text([token]), "injected": is_injected} for token, is_injected in shown],
    }


def _left_out(why: str) -> None:
    print(f"evaluate.token_injection: left out, as {why}", flush=True)
