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

from evaluate.fidelity import Fidelity
from evaluate.groups import Groups
from evaluate.intervals import with_intervals
from evaluate.subject import Subject
from harvest.language_model import HookedModel
from harvest.progress import Progress
from train.checkpoint import SavedSae
from train.config import ExcludeConfig

ABLATED = ("zero_ablated", "mean_ablated", "zero_ablated_all_rows")
REBUILT = ("sae", "sae_all_rows")
POSITIONS_AT_ONCE = 64  # logits of more positions leave the cache between two passes

DEFINITIONS = {
    "contexts": "held-out contexts read by the whole model [contexts]",
    "ce_clean": "mean cross-entropy of the next token, with the activation as it is [nats]",
    "ce_sae": "the same with the SAE's reconstruction; rows that training leaves out pass through unchanged [nats]",
    "ce_zero_ablated": "the same with the activation set to 0; the same rows pass through [nats]",
    "ce_mean_ablated": "the same with the mean of the kept held-out rows; the same rows pass through [nats]",
    "ce_sae_all_rows": "the same with every row through the SAE [nats]",
    "ce_zero_ablated_all_rows": "the same with every row set to 0 (SAELens' ablation) [nats]",
    "ce_loss_score": "(ce_zero_ablated - ce_sae) / (ce_zero_ablated - ce_clean) [no unit; 1 is perfect]",
    "ce_loss_score_all_rows": "the same for the figures of all rows (SAELens' score) [no unit]",
    "kl_sae": "mean over positions of KL(clean || sae) [nats]",
    "kl_sae_all_rows": "mean over positions of KL(clean || sae_all_rows) [nats]",
}
WITH_INTERVAL = tuple(name for name in DEFINITIONS if name != "contexts")


def analyse(subject: Subject, heldout: Fidelity) -> dict[str, dict[str, Any]] | None:
    """Figures of the first held-out contexts; None where `evaluate.downstream` is null."""
    config = subject.config.downstream
    if config is None:
        return None
    count = min(config.contexts, len(subject.context_source))
    tokens = subject.contexts.read("holdout", "tokens", 0, count)
    with subject.progress("downstream", tokens.size, "tokens") as progress:
        return downstream(
            subject.model(),
            subject.saved,
            subject.exclude,
            heldout.mean_D,
            tokens,
            {name: mask_C[:count] for name, mask_C in subject.groups.items()},
            config.batch_contexts,
            progress,
        )


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
    losses: dict[str, list[np.ndarray]] = {name: [] for name in ("clean", *REBUILT, *ABLATED)}
    divergences: dict[str, list[np.ndarray]] = {name: [] for name in REBUILT}
    no_text = model.behind(saved.hook).no_text  # then every row 0 is the same to all texts, and one pass serves them
    of_zeros_1SV = None
    for start in range(0, len(tokens), batch_contexts):
        ids_BS = torch.from_numpy(tokens[start : start + batch_contexts].astype(np.int64)).to(model.device)
        acts, output = model.read(ids_BS)
        acts_BSD, clean_BSV = acts[saved.hook], output.logits
        losses["clean"].append(_cross_entropy(clean_BSV, ids_BS))
        for name, value_BSD in _variants(acts_BSD.float(), ids_BS, saved, exclude, mean_D).items():
            if name == "zero_ablated_all_rows" and of_zeros_1SV is not None:
                logits_BSV = of_zeros_1SV.expand(len(ids_BS), -1, -1)
            else:
                with model.replaced(saved.hook, value_BSD):
                    logits_BSV = model.model(ids_BS, use_cache=False).logits
                if name == "zero_ablated_all_rows" and no_text:
                    of_zeros_1SV = logits_BSV[:1].clone()
            losses[name].append(_cross_entropy(logits_BSV, ids_BS))
            if name in REBUILT:
                divergences[name].append(_divergence(clean_BSV, logits_BSV))
        if progress:
            progress.advance(ids_BS.numel())
    loss = {name: np.concatenate(parts) for name, parts in losses.items()}
    divergence = {name: np.concatenate(parts) for name, parts in divergences.items()}
    masks = {"all": np.ones(len(tokens), bool), **groups}
    return {name: _figures(loss, divergence, mask_C) for name, mask_C in masks.items() if mask_C.any()}


def _variants(
    acts_BSD: Tensor, ids_BS: Tensor, saved: SavedSae, exclude: ExcludeConfig, mean_D: Tensor
) -> dict[str, Tensor]:
    sae = saved.sae
    rows = acts_BSD.flatten(0, 1).bfloat16().float()  # as the store holds them
    rebuilt_BSD = sae.decode(sae.encode(rows)).view_as(acts_BSD)
    norm_BS = rows.norm(dim=1).view(ids_BS.shape)
    passed_BS1 = left_out(norm_BS, ids_BS, exclude, saved.statistics.norm_limit).unsqueeze(2)
    mean_BSD = mean_D.to(acts_BSD).expand_as(acts_BSD)
    return {
        "sae": torch.where(passed_BS1, acts_BSD, rebuilt_BSD),
        "zero_ablated": acts_BSD * passed_BS1,
        "mean_ablated": torch.where(passed_BS1, acts_BSD, mean_BSD),
        "sae_all_rows": rebuilt_BSD,
        "zero_ablated_all_rows": torch.zeros_like(acts_BSD),
    }


def left_out(norm_BS: Tensor, ids_BS: Tensor, exclude: ExcludeConfig, norm_limit: float | None) -> Tensor:
    """Bool (B, S): the tokens whose rows training leaves out; what `kept_rows` says of stored rows."""
    left_BS = torch.isin(ids_BS, torch.tensor(exclude.token_ids, device=ids_BS.device, dtype=ids_BS.dtype))
    position_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
    left_BS |= torch.isin(position_S, torch.tensor(exclude.positions, device=ids_BS.device, dtype=torch.long))
    return left_BS if norm_limit is None else left_BS | (norm_BS > norm_limit)


def _cross_entropy(logits_BSV: Tensor, ids_BS: Tensor) -> np.ndarray:
    """Mean cross-entropy of each context, (B,)."""
    positions = zip(
        logits_BSV[:, :-1].split(POSITIONS_AT_ONCE, 1), ids_BS[:, 1:].split(POSITIONS_AT_ONCE, 1), strict=True
    )
    losses = [
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        for logits, ids in positions
    ]
    return torch.cat(losses, 1).double().mean(1).cpu().numpy()


def _divergence(clean_BSV: Tensor, other_BSV: Tensor) -> np.ndarray:
    """Mean KL(clean ‖ other) of each context, (B,)."""
    parts = []
    for clean, other in zip(clean_BSV.split(POSITIONS_AT_ONCE, 1), other_BSV.split(POSITIONS_AT_ONCE, 1), strict=True):
        log_p, log_q = clean.float().log_softmax(-1), other.float().log_softmax(-1)
        parts.append((log_p.exp() * log_p.sub(log_q)).sum(-1))
    return torch.cat(parts, 1).double().mean(1).cpu().numpy()


def _figures(loss: dict[str, Any], divergence: dict[str, Any], chosen: np.ndarray) -> dict[str, Any]:
    ce_C = {name: values[chosen] for name, values in loss.items()}
    kl_C = {name: values[chosen] for name, values in divergence.items()}

    def figures_of(weights_KC: np.ndarray) -> dict[str, np.ndarray]:
        total = weights_KC.sum(1)  # contexts are of one length
        ce = {name: weights_KC @ values / total for name, values in ce_C.items()}
        out = {f"ce_{name}": value for name, value in ce.items()}
        for rows in ("", "_all_rows"):
            span = ce[f"zero_ablated{rows}"] - ce["clean"]
            gained = ce[f"zero_ablated{rows}"] - ce[f"sae{rows}"]
            out[f"ce_loss_score{rows}"] = np.divide(gained, span, out=np.full_like(span, np.nan), where=span != 0)
        return out | {f"kl_{name}": weights_KC @ values / total for name, values in kl_C.items()}

    figures = with_intervals(figures_of, int(chosen.sum()), WITH_INTERVAL)
    return {"contexts": int(chosen.sum())} | {n: v for n, v in figures.items() if np.isfinite(v).all()}
