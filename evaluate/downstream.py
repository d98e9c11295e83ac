"""What the model loses when the SAE's reconstruction stands in for the activation.

For held-out contexts, the next token's cross-entropy (nats) with the activation at the hook
    clean                    as it is
    sae                      rebuilt by the SAE; rows that training leaves out pass through unchanged
    zero_ablated             0; the same rows pass through
    mean_ablated             the mean of the kept held-out rows; the same rows pass through
    sae_all_rows             every row rebuilt
    zero_ablated_all_rows    every row 0, SAELens' ablation
and KL(clean ‖ SAE). ce_loss_score = (zero − sae) / (zero − clean), as in SAELens' evals. Numerator and
denominator replace the same rows: where outlier rows pass, the attention sink stays in both. (With every
row 0, a model without biases gives every token the same logit, and the cross-entropy is ln V.)

Shape suffixes: C contexts, B those of a batch, S positions, D d_in, V vocabulary, K resamplings.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluate.figures import definitions
from evaluate.groups import Groups
from evaluate.intervals import with_intervals
from evaluate.subject import Subject
from harvest.activation_rows import kept_in_text
from harvest.language_model import HookedModel
from harvest.progress import Progress
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import Exclusion

NAMES = tuple(definitions()["downstream"])
REBUILT = ("sae", "sae_all_rows")
POSITIONS_AT_ONCE = 64  # logits of more positions leave the cache between two passes


def analyse(subject: Subject, mean_D: Tensor) -> dict[str, dict[str, Any]]:
    """Figures of the first held-out contexts by group. `mean_D` is the mean of the kept held-out rows."""
    config, saved = subject.config.downstream, subject.saved
    if config is None:
        return {}
    count = min(config.contexts, subject.contexts.count("holdout"))
    tokens = subject.contexts.read("holdout", "tokens", 0, count)
    groups = {name: mask_C[:count] for name, mask_C in subject.groups.items()}
    with subject.progress("downstream", tokens.size, "tokens") as progress:
        size = config.batch_contexts
        return downstream(subject.model(), saved, subject.exclude, mean_D, tokens, groups, size, progress)


@torch.inference_mode()
def downstream(
    model: HookedModel,
    saved: SavedSae,
    exclude: ExcludeConfig,
    mean_D: Tensor,
    tokens: np.ndarray,
    groups: Groups,
    batch_contexts: int,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures for all contexts and for each group. `tokens` is (contexts, S)."""
    values: dict[str, list[np.ndarray]] = {}  # of each context, (B,) a batch
    no_text = model.behind(saved.hook).no_text  # then every row 0 is the same to all texts, and one pass serves them
    of_zeros_1SV = None
    for start in range(0, len(tokens), batch_contexts):
        tokens_BS = tokens[start : start + batch_contexts]
        ids_BS = torch.from_numpy(tokens_BS.astype(np.int64)).to(model.device)
        acts, output = model.read(ids_BS)
        acts_BSD, clean_BSV = acts[saved.hook], output.logits
        values.setdefault("ce_clean", []).append(_cross_entropy(clean_BSV, ids_BS))
        for name, value_BSD in _variants(acts_BSD.float(), tokens_BS, saved, exclude, mean_D).items():
            if name == "zero_ablated_all_rows" and of_zeros_1SV is not None:
                logits_BSV = of_zeros_1SV.expand(len(ids_BS), -1, -1)
            else:
                with model.replaced(saved.hook, value_BSD):
                    logits_BSV = model.model(ids_BS, use_cache=False).logits
                if name == "zero_ablated_all_rows" and no_text:
                    of_zeros_1SV = logits_BSV[:1].clone()
            values.setdefault(f"ce_{name}", []).append(_cross_entropy(logits_BSV, ids_BS))
            if name in REBUILT:
                values.setdefault(f"kl_{name}", []).append(_divergence(clean_BSV, logits_BSV))
            del logits_BSV  # gigabytes, which the next pass has room for then
        del acts, output, acts_BSD, clean_BSV
        if progress:
            progress.advance(ids_BS.numel())
    joined = {name: np.concatenate(parts) for name, parts in values.items()}
    masks = {"all": np.ones(len(tokens), bool), **groups}
    return {group: _figures(joined, mask_C) for group, mask_C in masks.items() if mask_C.any()}


def _variants(
    acts_BSD: Tensor, tokens_BS: np.ndarray, saved: SavedSae, exclude: ExcludeConfig, mean_D: Tensor
) -> dict[str, Tensor]:
    rows = acts_BSD.flatten(0, 1).bfloat16()  # as the store holds them
    rebuilt_BSD = saved.sae.decode(saved.sae.encode(rows)).view_as(acts_BSD)
    kept = kept_in_text(Exclusion(exclude, saved.statistics.norm_limit), tokens_BS, rows)
    passed_BS1 = ~torch.from_numpy(kept).to(acts_BSD.device).view(*tokens_BS.shape, 1)
    mean_BSD = mean_D.to(acts_BSD).expand_as(acts_BSD)
    return {
        "sae": torch.where(passed_BS1, acts_BSD, rebuilt_BSD),
        "zero_ablated": acts_BSD * passed_BS1,
        "mean_ablated": torch.where(passed_BS1, acts_BSD, mean_BSD),
        "sae_all_rows": rebuilt_BSD,
        "zero_ablated_all_rows": torch.zeros_like(acts_BSD),
    }


def losses(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """Cross-entropy of the next token at each position but the last, float64 (B, S - 1)."""
    positions = zip(
        logits_BSV[:, :-1].split(POSITIONS_AT_ONCE, 1), ids_BS[:, 1:].split(POSITIONS_AT_ONCE, 1), strict=True
    )
    parts = [
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        for logits, ids in positions
    ]
    return torch.cat(parts, 1).double()


def _cross_entropy(logits_BSV: Tensor, ids_BS: Tensor) -> np.ndarray:
    """Mean cross-entropy of each context, (B,)."""
    return losses(logits_BSV, ids_BS).mean(1).cpu().numpy()


def _divergence(clean_BSV: Tensor, other_BSV: Tensor) -> np.ndarray:
    """Mean KL(clean ‖ other) of each context, (B,)."""
    parts = []
    for clean, other in zip(clean_BSV.split(POSITIONS_AT_ONCE, 1), other_BSV.split(POSITIONS_AT_ONCE, 1), strict=True):
        log_p, log_q = clean.float().log_softmax(-1), other.float().log_softmax(-1)
        parts.append((log_p.exp() * log_p.sub(log_q)).sum(-1))
    return torch.cat(parts, 1).double().mean(1).cpu().numpy()


def _figures(values: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, Any]:
    count = int(chosen.sum())

    def figures_of(weights_KC: np.ndarray) -> dict[str, np.ndarray]:
        # Contexts are of one length, so that the mean over them is that over positions.
        out = {name: weights_KC @ values_C[chosen] / weights_KC.sum(1) for name, values_C in values.items()}
        for rows in ("", "_all_rows"):
            span = out[f"ce_zero_ablated{rows}"] - out["ce_clean"]
            gained = out[f"ce_zero_ablated{rows}"] - out[f"ce_sae{rows}"]
            out[f"ce_loss_score{rows}"] = np.divide(gained, span, out=np.full_like(span, np.nan), where=span != 0)
        return out

    figures = with_intervals(figures_of, count, NAMES[1:])
    return {"contexts": count} | {name: value for name, value in figures.items() if np.isfinite(value).all()}
