"""What a feature does to what the model writes: completions at several strengths, and their words counted.

    x' = x + γ · max_activation_i · direction_i        at every position, of the prompt and of what is generated

γ is the strength, max_activation_i the largest activation of feature i on the kept held-out rows, direction_i what a
unit of it adds to a row (W_dec,i / s). The code of arXiv 2503.18878 sets f_i to γ · max_activation_i where this adds
to it. Where the feature is silent, the two are the same; added, strength 0 is the model as it is.

Shape suffixes: P prompts, G strengths, K features, I interventions, D d_in, B rows of a batch, R resamplings.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluate.config import LARGEST_STRENGTH, ReasonScoreConfig
from evaluate.fidelity import Fidelity
from evaluate.generation import Completion, Sampling, complete
from evaluate.subject import Subject
from harvest.activation_store import ActivationStore
from harvest.files import UserError
from harvest.language_model import HookedModel
from harvest.progress import Progress
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import kept_rows

PROMPTS = Path(__file__).with_name("prompts.txt")
RESAMPLES = 2000

DEFINITIONS = {
    "strength": "γ: γ x max_activation x W_dec,i / s is added to the activation at every position, of the prompt and "
    "of what is generated; s is the input scale",
    "max_activation": "largest activation of the feature on the kept held-out rows, in scaled units",
    "words": "occurrences of the words in all completions",
    "words_per_100_tokens": "occurrences of the words in all completions, per 100 generated tokens",
    "tokens": "mean length of a completion in tokens, the end token not counted",
    "ended": "part of the completions that ended before the limit of new tokens",
    "change": "difference to strength 0 on the same prompts",
    "interval": f"95% by bootstrap over prompts, {RESAMPLES:,} resamples, percentiles; changes are paired by prompt",
    "rises": "whether words_per_100_tokens rises from each strength to the next",
}


class Steered(NamedTuple):
    """Completions under one feature; the first strength is 0."""

    feature: int
    max_activation: float
    strengths: tuple[float, ...]
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
    wanted = config.feature_ids or _best_by_reason_score(subject, config.features)
    silent = [feature for feature in wanted if not heldout.density_F[feature]]
    if silent:
        print(f"evaluate.steering: left out, as they fire on no held-out row: {silent}", flush=True)
    wanted = tuple(feature for feature in wanted if feature not in silent)
    if not wanted:
        if not silent:
            why = "no feature has a ReasonScore above 0" if subject.config.reason_score else "there is no ReasonScore"
            print(f"evaluate.steering: left out, as {why}; evaluate.steering.feature_ids chooses some", flush=True)
        return None
    maxima = heldout.max_F[list(wanted)].tolist()
    prompts = config.prompts or built_in_prompts()[: config.built_in_prompts]
    strengths = {strength for strength in config.strengths if strength}
    score = subject.config.reason_score
    words = config.words or (score or ReasonScoreConfig()).words
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed)
    model, tokenizer, chosen = subject.model(), subject.chat_tokenizer(), dict(zip(wanted, maxima, strict=True))
    with subject.progress("steering", len(prompts) * (1 + len(wanted) * len(strengths)), "completions") as progress:
        options = {"bos": subject.contexts.bos, "progress": progress}
        found = steer(model, tokenizer, subject.saved, chosen, config.strengths, prompts, sampling, **options)
    features = [figures(steered, words) | {"examples": _examples(steered)} for steered in found]
    return {"words": list(words), "max_new_tokens": config.max_new_tokens, "features": features}


def _best_by_reason_score(subject: Subject, count: int) -> tuple[int, ...]:
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
    """The prompts of a text file, one a line; blank lines are skipped.

    Raises UserError for a file that cannot be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; prompts are one a line") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts


def check_features(features: Sequence[int], d_sae: int, setting: str) -> None:
    """Raise UserError for a feature that the SAE does not have."""
    for feature in features:
        if not 0 <= feature < d_sae:
            raise UserError(f"{setting}: {feature}: the SAE has {d_sae:,} features, 0 to {d_sae - 1}")


def check_strengths(strengths: Sequence[float], setting: str) -> None:
    """Raise UserError for a strength that is NaN, infinite or beyond any use."""
    largest = LARGEST_STRENGTH
    for strength in strengths:
        if not abs(strength) <= largest:
            raise UserError(f"{setting}: {strength}: a strength is a number from -{largest:g} to {largest:g}")


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


def steering_vectors(saved: SavedSae, features: Sequence[int], maxima: Sequence[float]) -> Tensor:
    """What strength 1 adds to an unscaled activation, float32 (K, D)."""
    directions_KD = saved.sae.direction(features)
    return torch.tensor(list(maxima), device=directions_KD.device).unsqueeze(1) * directions_KD


def steer(
    model: HookedModel,
    tokenizer: Any,
    saved: SavedSae,
    maxima: dict[int, float],
    strengths: Sequence[float],
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    chat: bool | None = None,
    bos: str | None = None,
    batch_sequences: int = 64,
    progress: Progress | None = None,
) -> list[Steered]:
    """Completions of every prompt under each feature of `maxima` (feature -> its max_activation) and strength.

    Strength 0 comes first, and is computed once for all features. Raises UserError for prompts that are
    empty or too long for the model.
    """
    nonzero = sorted({float(strength) for strength in strengths if strength})
    vectors_KD = steering_vectors(saved, list(maxima), list(maxima.values()))
    steps = torch.tensor(nonzero, device=vectors_KD.device)
    interventions_ID = torch.cat(
        [torch.zeros_like(vectors_KD[:1]), (vectors_KD.unsqueeze(1) * steps.view(1, -1, 1)).flatten(0, 1)]
    )
    options: dict[str, Any] = {"chat": chat, "bos": bos, "batch_sequences": batch_sequences, "progress": progress}
    rows = complete(model, tokenizer, saved.hook, prompts, interventions_ID, sampling, **options)
    out = []
    for feature, maximum in maxima.items():
        first = 1 + len(out) * len(nonzero)
        completions = [[row[0], *row[first : first + len(nonzero)]] for row in rows]
        out.append(Steered(feature, maximum, (0.0, *nonzero), tuple(prompts), completions))
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
    for g, strength in enumerate(steered.strengths):
        line = {"strength": strength, "words": int(counts_PG[:, g].sum()), "ended": float(ended_PG[:, g].mean())}
        by_strength.append(line)
    for name, statistic in (("words_per_100_tokens", rate), ("tokens", length)):
        value_G, resampled_RG = statistic(everyone)[0], statistic(picks)
        for g, line in enumerate(by_strength):
            line[name] = _with_interval(value_G[g], resampled_RG[:, g])
            line[f"{name}_change"] = _with_interval(value_G[g] - value_G[0], resampled_RG[:, g] - resampled_RG[:, 0])
    rises = (np.diff(rate(everyone)[0][np.argsort(steered.strengths)]) > 0).all()
    head = {"feature": steered.feature, "max_activation": steered.max_activation, "prompts": len(steered.prompts)}
    return head | {"rises": bool(rises), "by_strength": by_strength}


def _with_interval(value: float, resampled: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return {"value": float(value), "low": float(low), "high": float(high)}
