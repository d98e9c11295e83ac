"""Feature pages whose tokens are text that tries to break them, and a benchmark whose answers are."""

from pathlib import Path
from typing import Any

import numpy as np
from conftest import only
from made_benchmark import Made, conditions_of, made

from evaluate.activity import read_activity
from evaluate.config import FeaturesConfig
from evaluate.feature_pages import nearest_features
from evaluate.feature_views import Scored, Site, Weighed, visible
from evaluate.token_identity import TokenIdentity
from train.checkpoint import load_sae

HOOK = "model.layers.1"
CONFIG = FeaturesConfig(contexts=4, tokens=16)
TOKENS = (
    "</script><script>window.broken=1</script>",
    '<img src=x onerror="window.broken=1">',
    '" onmouseover="window.broken=1',
    "\u202eevil\u2066\u200f",
    "\x00\x1b[31m\x7f",
    "w" * 5000,
    "\u0301" * 30,
    "שלום",
    " ",
    "\n\n",
    "{{ 7 * 7 }}",
    "&amp;<!--",
)


def text(token: int) -> str:
    return TOKENS[token] if token < len(TOKENS) else f" tok{token}"


def explained(feature: int) -> dict[str, Any]:
    """What a hostile language model said of a feature, and wrote to break it."""
    word = TOKENS[feature][:30]  # answers are shortened, and not as tokens are
    score = {"value": 0.5 + feature / 24, "low": 0.5, "high": 1.0}
    scored = score | {"judged": 40, "by_quarter": [score, score, score, None]}
    text = {"text": word, "activation": 1.0, "fires": True, "silent": False}
    texts = [
        {**text, "kind": "counterexample"},
        {**text, "kind": "paraphrase", "original": TOKENS[0], "original_activation": 2.0},
    ]
    counted = {"verdict": "fires without reasoning", "fired": 1, "of": 1, "silent": 0, "paraphrases": 1}
    rule = {"fires": 0.5, "silent": 0.25, "at_least": 1}
    return {
        "feature": feature,
        "label": f"Number {feature} of {word}",
        "sentence": f"Active at {TOKENS[0]} and {word}.",
        "detection": scored,
        "fuzzing": scored,
        "control": scored,
        "control_fuzzing": None,
        "examples": {"explaining": 16, "active": 20, "silent": 20, "hard": 10},
        "problems": {f"HTTP 500: {TOKENS[4]}{TOKENS[1]}": 2},
        "counterexamples": {"reference": 3.0, "rule": rule, "texts": texts, **counted},
    }


def site(finished: Path, features: int = 12) -> tuple[Site, dict[int, Weighed]]:
    """The first features of the finished run; every second token hostile, in the contexts and among the promoted."""
    saved = load_sae(only(finished, f"runs/train/*/{HOOK}"))
    found = read_activity(only(finished, f"runs/evaluate/*/activity-{HOOK}.safetensors"))
    for name in ("tokens", "token"):
        found[name][...] = np.where(found[name] % 2, found[name], found[name] % len(TOKENS))
    tokens, logits = range(10), np.linspace(3, 1, 10).tolist()
    up, down = [*zip(tokens, logits, strict=True)], [(50 + token, -logits[token]) for token in tokens]
    nearest = nearest_features(saved.sae.W_dec, np.arange(features))
    weighed = {feature: Weighed(up, down, near) for feature, near in enumerate(nearest)}
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, (128, 10, 2))
    identity = TokenIdentity(
        np.array(["chat", "<b>reasoning"]),
        np.array([False, True]),
        *rng.random((2, 128)),
        np.tile(np.arange(10), (128, 1)),
        counts // 2,
        counts,
        *rng.random((2, 128)),
    )
    of_reasoning = {"mean": 2.0, "d": 1.5, "d_interval": [1.0, 2.0], "p": 1e-9}
    injected = {
        "verdict": "token-driven",
        "best": "context",
        "d": 2.0,
        "d_interval": [1.0, 3.0],
        "p": 0.001,
        "share": None,
        "n": 2,
        "untouched": 0.1,
        "reasoning": of_reasoning,
        "strategies": [of_reasoning | {"strategy": "context"}],
        "example": [{"text": visible(token), "injected": n % 2 == 0} for n, token in enumerate(TOKENS)],
    }
    scored = Scored(rng.normal(size=128), rng.random((2, 128)), ["wait", "<b>let me</b>"])
    by_feature = dict.fromkeys(range(0, features, 2), injected)
    labelled = {feature: explained(feature) for feature in range(features - 1)}
    return Site(HOOK, found, text, "", scored, identity, by_feature, labelled), weighed


def benchmark(samples: int = 2) -> Made:
    """A benchmark whose problems, answers and names are hostile; feature 7 turns half of the wrong answers right."""
    found = made(conditions_of((7, 8), (1.0, 2.0)), {7: 0.5}, len(TOKENS), samples, 0)
    problems = [
        problem._replace(id=f"{n} {token[:40]}", prompt=f"{problem.prompt}\n{token}", answer=token)
        for n, (problem, token) in enumerate(zip(found.problems, TOKENS, strict=True))
    ]
    conditions = [
        found.conditions[0],
        found.conditions[1]._replace(name=f"feature 7 {TOKENS[1]}"),
        *found.conditions[2:],
    ]
    attempts = [
        attempt._replace(
            text=f"{attempt.text} word{attempt.problem}of{attempt.condition} {TOKENS[n % 5]} {TOKENS[n % len(TOKENS)]}"
        )
        for n, attempt in enumerate(found.attempts)
    ]
    grades = [
        grade if grade.correct else grade._replace(parsed=TOKENS[n % len(TOKENS)] if n % 3 else None)
        for n, grade in enumerate(found.grades)
    ]
    return Made(problems, conditions, attempts, grades)
