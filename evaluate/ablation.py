"""What the model loses on reasoning text without a feature: cross-entropy with f_i set to 0, less that of the text.

    x' = x − f_i · direction_i       where feature i fires, but for the rows that training leaves out

The text runs through the model once. For each feature, only the batches in which it fires run again, and of the model
only the layers behind the hook; in contexts in which it does not fire the change is exactly 0.

Shape suffixes: B contexts of a batch, S positions, T = S − 1 of them that have a next token, C contexts, D d_in,
K features, N rows, R resamplings.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluate.downstream import losses
from evaluate.figures import Section, figures_of
from evaluate.intervals import with_intervals
from evaluate.operations import Operation, operated
from evaluate.reason_score import sources_read
from evaluate.steering import best_by_reason_score
from evaluate.subject import Subject
from harvest.activation_rows import kept_in_text
from harvest.language_model import HookedModel
from harvest.progress import Progress
from train.checkpoint import SavedSae
from train.exclusion import Exclusion


class Ablated(NamedTuple):
    """What ablating K features one at a time does to C contexts."""

    clean_C: np.ndarray  # mean cross-entropy of a context, nats, as it is
    change_KC: np.ndarray  # what ablation adds to it
    at_active_KC: np.ndarray  # the sum of what it adds at the positions where the feature fires
    active_KC: np.ndarray  # how many these are, int64; those that have a next token


def analyse(subject: Subject) -> Section | None:
    """Changes under the features of the highest ReasonScore, on held-out contexts of the sources that it reads.

    None where a setting is null, no feature has a score, or the held-out text has no such context.
    """
    config, score, contexts = subject.config.ablation, subject.config.reason_score, subject.contexts
    if config is None or score is None:
        return None
    features = best_by_reason_score(subject, config.features)
    sources = sources_read(score, contexts.sources)
    count = contexts.count("holdout")
    chosen = np.flatnonzero(np.isin(contexts.read("holdout", "source", 0, count), sources))[: config.contexts]
    if not features or not len(chosen):
        why = "no feature has a ReasonScore above 0" if not features else "no held-out context is of its sources"
        print(f"evaluate.ablation: left out, as {why}", flush=True)
        return None
    tokens_CS = contexts.read("holdout", "tokens", 0, int(chosen[-1]) + 1)[chosen]
    rule = subject.rules[subject.saved.hook]
    with subject.progress("ablation", tokens_CS.size * len(features), "tokens") as progress:
        size = config.batch_contexts
        found = ablate(subject.model(), subject.saved, rule, tokens_CS, features, size, progress)
    figures = {"contexts": len(chosen), "ce_clean": float(found.clean_C.mean())}
    listed = [{"feature": feature, **changes(found, k)} for k, feature in enumerate(features)]
    lists = {"sources": [contexts.sources[number] for number in sources], "features": listed}
    return Section(figures_of("ablation", figures), lists)


@torch.inference_mode()
def ablate(
    model: HookedModel,
    saved: SavedSae,
    rule: Exclusion,
    tokens_CS: np.ndarray,
    features: Sequence[int],
    batch_contexts: int,
    progress: Progress | None = None,
) -> Ablated:
    """Ablate each feature on the rows of contexts that `rule` keeps."""
    parts: list[Ablated] = []
    for start in range(0, len(tokens_CS), batch_contexts):
        tokens_BS = tokens_CS[start : start + batch_contexts]
        ids_BS = torch.from_numpy(tokens_BS.astype(np.int64)).to(model.device)
        acts, output = model.read(ids_BS)
        x_BSD, clean_BT = acts[saved.hook], losses(output.logits, ids_BS)
        del output  # 4 bytes × tokens × vocabulary, while the features' own passes make as much
        x_ND = x_BSD.flatten(0, 1)
        kept_N = torch.from_numpy(kept_in_text(rule, tokens_BS, x_ND.bfloat16())).to(model.device)
        fires_NK = (saved.sae.columns(x_ND, features) > 0) & kept_N.unsqueeze(1)
        of_each = []
        for k, feature in enumerate(features):
            fires_BS = fires_NK[:, k].view(ids_BS.shape)
            change_BT = torch.zeros_like(clean_BT)
            if fires_BS.any():
                # All contexts of the batch, as another shape would change the last bits of losses.
                places_1N = fires_BS.flatten().unsqueeze(0)
                without_ND = operated(saved.sae, x_ND, [Operation(feature, "ablate", 0.0)], {}, places_1N)
                with model.replaced(saved.hook, without_ND.view(x_BSD.shape)):
                    change_BT = losses(model.model(ids_BS, use_cache=False).logits, ids_BS) - clean_BT
                change_BT[~fires_BS.any(1)] = 0
            of_each.append((change_BT.mean(1), (change_BT * fires_BS[:, :-1]).sum(1), fires_BS[:, :-1].sum(1)))
            if progress:
                progress.advance(tokens_BS.size)
        sums = (torch.stack(each).cpu().numpy() for each in zip(*of_each, strict=True))
        parts.append(Ablated(clean_BT.mean(1).cpu().numpy(), *sums))
    return Ablated(*(np.concatenate(each, axis=-1) for each in zip(*parts, strict=True)))


def changes(found: Ablated, k: int) -> dict[str, Any]:
    """The change of the loss under feature k, over all tokens and over those where it fires, with 95% intervals."""

    def figures(weights_RC: np.ndarray) -> dict[str, np.ndarray]:
        active_R, at_active_R = weights_RC @ found.active_KC[k], weights_RC @ found.at_active_KC[k]
        return {
            "loss_change": weights_RC @ found.change_KC[k] / weights_RC.sum(1),
            "loss_change_active": np.divide(
                at_active_R, active_R, out=np.full_like(at_active_R, np.nan), where=active_R > 0
            ),
        }

    names = ("loss_change", "loss_change_active")
    measured = with_intervals(figures, len(found.clean_C), names)
    out: dict[str, Any] = {"active_rows": int(found.active_KC[k].sum())}
    for name in names:
        low, high = measured.get(f"{name}_interval", (None, None))
        out[name] = {"value": measured[name], "low": low, "high": high} if np.isfinite(measured[name]) else None
    return out
