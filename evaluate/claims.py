"""What is known of the features of the highest ReasonScore: a line for each, gathered from all analyses."""

from typing import Any, NamedTuple

from evaluate.figures import Evaluation, Measured

Interval = dict[str, float]  # value, low, high


class Claim(NamedTuple):
    """A feature and what was found about it; None and "" stand for what was not measured."""

    rank: int  # by ReasonScore
    feature: int
    score: float
    label: str = ""  # of a language model
    detection: Interval | None = None  # how well the label tells contexts apart
    verdict: str = ""  # of token injection
    verdict_single: str = ""  # of the same without n-grams
    d: float | None = None  # Cohen's d of the best strategy
    falsified: str = ""  # verdict of counterexamples
    steered: dict[str, Any] | None = None  # op, strength, and change of words per 100 tokens at the largest strength
    ablated: Interval | None = None  # change of the loss on reasoning text


def claims(sae: Measured, count: int = 20) -> list[Claim]:
    """The features of the highest ReasonScore, best first; none where it was not computed."""
    about = {
        section: {found["feature"]: found for found in sae.lists.get(section, {}).get("features", [])}
        for section in ("explanations", "token_injection", "counterexamples", "steering", "ablation")
    }
    out = []
    for row in sae.lists.get("reason_score", {}).get("top", [])[:count]:
        explained, injected, falsified, steered, ablated = (of.get(row["feature"], {}) for of in about.values())
        out.append(
            Claim(
                row["rank"],
                row["feature"],
                row["score"],
                explained.get("label", ""),
                explained.get("detection"),
                injected.get("verdict", ""),
                injected.get("verdict_single", ""),
                injected.get("d"),
                falsified.get("verdict", ""),
                _steered(steered),
                ablated.get("loss_change"),
            )
        )
    return out


def _steered(found: dict[str, Any]) -> dict[str, Any] | None:
    if not found:
        return None
    _, *changed = found["by_strength"]  # the first is the model as it is
    strongest = max(changed, key=lambda line: line["strength"])
    said = {"op": found.get("op", "add"), "strength": strongest["strength"]}
    return said | strongest["words_per_100_tokens_change"]


def any_known(found: list[Claim]) -> bool:
    """Whether anything but the score is known of any of them."""
    return any(any(value not in (None, "") for value in claim[3:]) for claim in found)


def by_run(evaluations: list[Evaluation]) -> list[tuple[str, list[Claim]]]:
    """The claims of each SAE of several evaluations that has some, under a name that tells them apart."""
    saes = [(each.fingerprint, sae) for each in evaluations for sae in each.saes if not sae.name]
    named = [(f"{sae.about.get('label') or fingerprint}, {sae.hook}", claims(sae)) for fingerprint, sae in saes]
    return [(name, found) for name, found in named if any_known(found)]
