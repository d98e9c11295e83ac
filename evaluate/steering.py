"""What operations on a feature do to what the model writes: completions at several strengths, and their words counted.

    add, the default:  x' = x + γ · max_activation_i · direction_i

γ is the strength, max_activation_i the largest activation of feature i on the kept held-out rows. The other operations,
and where they hold, are in evaluate/operations.py.

Shape suffixes: P prompts, G strengths, K features, B rows of a batch, R resamplings.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluate.config import AS_IT_IS, ReasonScoreConfig
from evaluate.engine import Completion
from evaluate.fidelity import Fidelity
from evaluate.generation import complete
from evaluate.operations import Interventions, Operation, check_features, check_strengths, effective
from evaluate.sampler import Sampling
from evaluate.subject import Subject
from harvest.activation_store import ActivationStore
from harvest.files import UserError
from harvest.language_model import HookedModel
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import kept_rows

PROMPTS = Path(__file__).with_name("prompts.txt")
RESAMPLES = 2000

DEFINITIONS = {
    "op": "add: strength x max_activation x W_dec,i / s is added to the activation, s being the input scale; set: the "
    "feature becomes strength x max_activation; ablate: it becomes 0; scale: it becomes strength x what it is; what "
    "the SAE does not rebuild stays",
    "where": "all: every token of the prompt and of what is generated; prompt; generated; thinking: those between "
    "<think> and </think>",
    "strength": "γ of the operation; null where the model is as it is",
    "max_activation": "largest activation of the feature on the kept held-out rows, in scaled units",
    "words": "occurrences of the words in all completions",
    "words_per_100_tokens": "occurrences of the words in all completions, per 100 generated tokens",
    "tokens": "mean length of a completion in tokens, the end token not counted",
    "ended": "part of the completions that ended before the limit of new tokens",
    "processed": "positions that the model read, of all prompts and completions",
    "changed": "of these, positions where an operation was done",
    "change": "difference to the model as it is on the same prompts",
    "interval": f"95% by bootstrap over prompts, {RESAMPLES:,} resamples, percentiles; changes are paired by prompt",
    "rises": "whether words_per_100_tokens rises from each strength to the next; null for one strength",
}


class Plan(NamedTuple):
    """What is done to one feature, or to several at once, at several strengths."""

    strengths: tuple[float | None, ...]  # the first is the model as it is: None where the operation has no such
    lists: tuple[tuple[Operation, ...], ...]  # of each strength; the first is empty
    operations: tuple[Operation, ...]  # at any strength


class Steered(NamedTuple):
    """Completions under the operations of a plan."""

    plan: Plan
    maxima: dict[int, float]
    prompts: tuple[str, ...]
    completions: list[list[Completion]]  # [prompt][strength]


def analyse(subject: Subject, heldout: Fidelity) -> dict[str, Any] | None:
    """Completions and figures under the features of the highest ReasonScore, or those of the setting; None where the
    setting is null or no feature is chosen.

    Raises UserError for features, strengths and prompts that cannot be used.
    """
    config = subject.config.steering
    if config is None:
        return None
    check_strengths(config.strengths, "evaluate.steering.strengths")
    check_features(config.feature_ids, subject.saved.sae.d_sae, "evaluate.steering.feature_ids")
    wanted = config.feature_ids or best_by_reason_score(subject, config.features)
    silent = [feature for feature in wanted if not heldout.density_F[feature]]
    if silent:
        print(f"evaluate.steering: left out, as they fire on no held-out row: {silent}", flush=True)
    wanted = tuple(feature for feature in wanted if feature not in silent)
    if not wanted:
        if not silent:
            why = "no feature has a ReasonScore above 0" if subject.config.reason_score else "there is no ReasonScore"
            print(f"evaluate.steering: left out, as {why}; evaluate.steering.feature_ids chooses some", flush=True)
        return None
    maxima = {feature: float(heldout.max_F[feature]) for feature in wanted}
    plans = [plan({s: (Operation(i, config.op, s, config.where),) for s in config.strengths}) for i in wanted]
    prompts = config.prompts or built_in_prompts()[: config.built_in_prompts]
    score = subject.config.reason_score
    words = config.words or (score or ReasonScoreConfig()).words
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed)
    model, tokenizer = subject.model(), subject.chat_tokenizer()
    with subject.progress("steering", len(prompts) * columns(plans), "completions") as progress:
        options = {"bos": subject.contexts.bos, "progress": progress}
        found = steer(model, tokenizer, subject.saved, maxima, plans, prompts, sampling, **options)
    features = [figures(steered, words) | {"examples": _examples(steered)} for steered in found]
    shared = {"op": config.op, "where": config.where, "words": list(words), "max_new_tokens": config.max_new_tokens}
    return shared | {"features": features}


def best_by_reason_score(subject: Subject, count: int) -> tuple[int, ...]:
    """The features of the highest ReasonScore, `count` at most, those of 0 and less left out; none without a score."""
    path = subject.file("reason_score", ".npz")
    if subject.config.reason_score is None or not path.exists():
        return ()
    with np.load(path, allow_pickle=False) as arrays:
        best = np.argsort(-arrays["score"], kind="stable")[:count]
        return tuple(int(i) for i in best if arrays["score"][i] > 0)


def _examples(steered: Steered) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "texts": [completion.text for completion in row]}
        for prompt, row in zip(steered.prompts, steered.completions, strict=True)
    ]


def built_in_prompts() -> tuple[str, ...]:
    """Sixty short questions, half of them with something to work out."""
    return read_prompts(PROMPTS)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file: of JSON Lines (.jsonl) the column `prompt`, else one a line; blank ones are skipped.

    Raises UserError for a file that cannot be read or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; prompts are one a line") from None
    if path.suffix == ".jsonl":
        lines = [_column(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        lines = text.splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts


def _column(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
        prompt.encode()
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f'{path}: line {number}: has no prompt; each is {{"prompt": "..."}}') from None
    return prompt


def check_fit(model: HookedModel, saved: SavedSae, name: str = "this model") -> None:
    """Raise UserError when the activation at the SAE's hook is of another width than the SAE's."""
    width = model.activations(torch.zeros(1, 1, dtype=torch.long))[saved.hook].shape[-1]
    if width != saved.sae.d_in:
        raise UserError(f"the SAE has d_in {saved.sae.d_in}, but {saved.hook} of {name} is {width} wide")


def max_activations(
    store: ActivationStore, saved: SavedSae, exclude: ExcludeConfig, features: Sequence[int]
) -> list[float]:
    """The largest activation of each feature on the kept held-out rows, in scaled units.

    Raises UserError for a feature that fires on none of them.
    """
    g, sae = store.geometry, saved.sae
    best_K = torch.zeros(len(features), device=sae.W_enc.device)
    for shard in range(g.holdout_shards):
        kept = kept_rows(store, "holdout", saved.hook, shard, exclude, saved.statistics.norm_limit)
        for i in range(g.chunks_per_shard):
            acts = torch.from_numpy(store.read_chunk("holdout", saved.hook, shard * g.chunks_per_shard + i))
            rows = acts[torch.from_numpy(kept[i * len(acts) : (i + 1) * len(acts)])].view(torch.bfloat16)
            if len(rows):
                best_K = torch.maximum(best_K, sae.columns(rows.to(best_K.device), features).amax(0))
    for feature, best in zip(features, best_K.tolist(), strict=True):
        if best <= 0:
            raise UserError(
                f"feature {feature} fires on none of the held-out rows, so its maximum is unknown; choose another, "
                "or give --max-activation"
            )
    return best_K.tolist()


def plan(by_strength: dict[float, tuple[Operation, ...]]) -> Plan:
    """The operations at each strength, weakest first, behind the model as it is.

    What changes nothing is left out, and so is what comes twice: ablation has one strength, which is 0.
    """
    lists: dict[tuple[Operation, ...], float] = {}
    for strength, operations in sorted(by_strength.items()):
        done = tuple(o._replace(strength=0.0) if o.op == "ablate" else o for o in operations)
        shared = {operation.strength for operation in done}
        if effective(done):
            lists.setdefault(done, shared.pop() if len(shared) == 1 else strength)
    named = next(iter(by_strength.values()))
    is_one = len({operation.op for operation in named}) == 1
    return Plan((AS_IT_IS.get(named[0].op) if is_one else None, *lists.values()), ((), *lists), named)


def columns(plans: Sequence[Plan]) -> int:
    """Completions of a prompt: of each strength of every plan, and of the model as it is."""
    return 1 + sum(len(each.lists) - 1 for each in plans)


def steer(
    model: HookedModel,
    tokenizer: Any,
    saved: SavedSae,
    maxima: dict[int, float],
    plans: Sequence[Plan],
    prompts: Sequence[str],
    sampling: Sampling,
    **options: Any,
) -> list[Steered]:
    """Completions of every prompt under each of the plans; `maxima` has the max_activation of their features.

    Those of the model as it is are computed once for all plans. `options` are those of `complete`. Raises UserError for
    prompts that are empty or too long for the model, and as `complete` does.
    """
    lists = [(), *(operations for each in plans for operations in each.lists[1:])]
    rows = complete(model, tokenizer, Interventions(saved, maxima, lists), prompts, sampling, **options)
    out, first = [], 1
    for each in plans:
        last = first + len(each.lists) - 1
        out.append(Steered(each, maxima, tuple(prompts), [[row[0], *row[first:last]] for row in rows]))
        first = last
    return out


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Finds whole words: those in lower case also with a capital, others as they are; `a|b` are alternatives.

    Raises UserError where there is no word at all.
    """
    parts = []
    for word in filter(None, (part.strip() for entry in words for part in entry.split("|"))):
        either = word == word.lower() and word[0].isalpha()
        first = f"[{word[0]}{word[0].upper()}]" if either else re.escape(word[0])
        parts.append(first + r"\s+".join(re.escape(piece) for piece in word[1:].split(" ")))
    if not parts:
        raise UserError(f"words: {list(words)!r}: there is no word to count")
    return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)")


def figures(steered: Steered, words: Sequence[str]) -> dict[str, Any]:
    """Rates and lengths at each strength with their intervals; see DEFINITIONS."""
    pattern = word_pattern(words)
    counts_PG = np.array([[len(pattern.findall(c.text)) for c in row] for row in steered.completions], float)
    tokens_PG = np.array([[len(c.token_ids) for c in row] for row in steered.completions], float)
    ended_PG = np.array([[c.ended for c in row] for row in steered.completions])
    picks = np.random.default_rng(0).integers(0, len(counts_PG), (RESAMPLES, len(counts_PG)))
    everyone = np.arange(len(counts_PG))[None]

    def rate(chosen: np.ndarray) -> np.ndarray:
        return 100 * counts_PG[chosen].sum(1) / np.maximum(tokens_PG[chosen].sum(1), 1)

    def length(chosen: np.ndarray) -> np.ndarray:
        return tokens_PG[chosen].mean(1)

    by_strength: list[dict[str, Any]] = []
    for g, strength in enumerate(steered.plan.strengths):
        line = {"strength": strength, "words": int(counts_PG[:, g].sum()), "ended": float(ended_PG[:, g].mean())}
        for name in ("processed", "changed"):
            line[name] = sum(getattr(row[g], name) for row in steered.completions)
        by_strength.append(line)
    for name, statistic in (("words_per_100_tokens", rate), ("tokens", length)):
        value_G, resampled_RG = statistic(everyone)[0], statistic(picks)
        for g, line in enumerate(by_strength):
            line[name] = _with_interval(value_G[g], resampled_RG[:, g])
            line[f"{name}_change"] = _with_interval(value_G[g] - value_G[0], resampled_RG[:, g] - resampled_RG[:, 0])
    ordered = sorted((s, g) for g, s in enumerate(steered.plan.strengths) if s is not None)
    rises = bool((np.diff(rate(everyone)[0][[g for _, g in ordered]]) > 0).all()) if len(ordered) > 1 else None
    return _what_was_done(steered) | {"prompts": len(counts_PG), "rises": rises, "by_strength": by_strength}


def _what_was_done(steered: Steered) -> dict[str, Any]:
    """Feature, operation and place; of several features at once, a list of them."""
    done = [
        {"feature": o.feature, "max_activation": steered.maxima[o.feature], "op": o.op, "where": o.where}
        for o in steered.plan.operations
    ]
    return done[0] if len(done) == 1 else {"together": done}


def _with_interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return {"value": float(value), "low": float(low), "high": float(high)}
