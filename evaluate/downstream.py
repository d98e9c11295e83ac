"""What the model loses when the SAE's reconstruction stands in for the activation.

For held-out contexts, the next token's cross-entropy (nats) with the activation at the hook
    clean              as it is
    sae                rebuilt by the SAE; rows that training leaves out pass through unchanged
    sae_all_rows       every row rebuilt
    zero_ablated       0
    mean_ablated       the mean of the kept held-out rows
and KL(clean ‖ each). ce_loss_score = (zero − sae) / (zero − clean), as in SAELens' evals.

Shape suffixes: B contexts, S positions, D d_in, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from harvest.language_model import HookedModel
from harvest.progress import Progress
from train.checkpoint import SavedSae
from train.config import ExcludeConfig

VARIANTS = ("sae", "sae_all_rows", "zero_ablated", "mean_ablated")

DEFINITIONS = {
    "contexts": "held-out contexts read by the whole model",
    "ce_clean": "mean cross-entropy of the next token, nats, with the activation as it is",
    "ce_sae": "the same with the SAE's reconstruction; rows that training leaves out pass through unchanged",
    "ce_sae_all_rows": "the same with every row through the SAE",
    "ce_zero_ablated": "the same with the activation set to 0",
    "ce_mean_ablated": "the same with the activation set to the mean of the kept held-out rows",
    "ce_loss_score": "(ce_zero_ablated - ce_sae) / (ce_zero_ablated - ce_clean)",
    "ce_loss_score_all_rows": "the same for ce_sae_all_rows",
    "kl_*": "mean over positions of KL(clean || variant), nats",
}


@torch.inference_mode()
def downstream(
    model: HookedModel,
    saved: SavedSae,
    exclude: ExcludeConfig,
    mean_D: Tensor,
    tokens: np.ndarray,
    sources: np.ndarray,
    source_names: list[str],
    batch_contexts: int,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Figures for all contexts and for each source. `tokens` (contexts, S), `sources` (contexts,)."""
    losses: dict[str, list[np.ndarray]] = {name: [] for name in ("clean", *VARIANTS)}
    divergences: dict[str, list[np.ndarray]] = {name: [] for name in VARIANTS}
    for start in range(0, len(tokens), batch_contexts):
        ids_BS = torch.from_numpy(tokens[start : start + batch_contexts].astype(np.int64)).to(model.device)
        acts_BSD = model.activations(ids_BS)[saved.hook]
        clean_BSV = _log_probabilities(model, ids_BS)
        losses["clean"].append(_loss(clean_BSV, ids_BS))
        for name, value_BSD in _variants(acts_BSD.float(), ids_BS, saved, exclude, mean_D).items():
            with model.replaced(saved.hook, value_BSD):
                variant_BSV = _log_probabilities(model, ids_BS)
            losses[name].append(_loss(variant_BSV, ids_BS))
            divergences[name].append(_divergence(clean_BSV, variant_BSV))
        if progress:
            progress.advance(ids_BS.numel())
    loss = {name: np.concatenate(parts) for name, parts in losses.items()}
    divergence = {name: np.concatenate(parts) for name, parts in divergences.items()}
    out = {"all": _figures(loss, divergence, np.ones(len(sources), bool))}
    for number, name in enumerate(source_names):
        if (sources == number).any():
            out[name] = _figures(loss, divergence, sources == number)
    return out


def _variants(
    acts_BSD: Tensor, ids_BS: Tensor, saved: SavedSae, exclude: ExcludeConfig, mean_D: Tensor
) -> dict[str, Tensor]:
    sae, scale = saved.sae, saved.statistics.scale
    rows = acts_BSD.flatten(0, 1).bfloat16().float()  # as the store holds them
    rebuilt_BSD = (sae.decode(sae.encode(rows * scale)) / scale).view_as(acts_BSD)
    norm_BS = rows.norm(dim=1).view(ids_BS.shape)
    passed_BS = torch.isin(ids_BS, torch.tensor(exclude.token_ids, device=ids_BS.device, dtype=ids_BS.dtype))
    position_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
    passed_BS |= torch.isin(position_S, torch.tensor(exclude.positions, device=ids_BS.device, dtype=torch.long))
    if saved.statistics.norm_limit is not None:
        passed_BS |= norm_BS > saved.statistics.norm_limit
    return {
        "sae": torch.where(passed_BS.unsqueeze(2), acts_BSD, rebuilt_BSD),
        "sae_all_rows": rebuilt_BSD,
        "zero_ablated": torch.zeros_like(acts_BSD),
        "mean_ablated": mean_D.to(acts_BSD).expand_as(acts_BSD),
    }


def _log_probabilities(model: HookedModel, ids_BS: Tensor) -> Tensor:
    return model.model(ids_BS, use_cache=False).logits.float().log_softmax(-1)


def _loss(log_p_BSV: Tensor, ids_BS: Tensor) -> np.ndarray:
    """Mean cross-entropy of each context, (B,)."""
    chosen = log_p_BSV[:, :-1].gather(2, ids_BS[:, 1:].unsqueeze(2)).squeeze(2)
    return -chosen.double().mean(1).cpu().numpy()


def _divergence(clean_BSV: Tensor, variant_BSV: Tensor) -> np.ndarray:
    """Mean KL(clean ‖ variant) of each context, (B,)."""
    kl_BS = torch.stack([(c.exp() * (c - v)).sum(-1) for c, v in zip(clean_BSV, variant_BSV, strict=True)])
    return kl_BS.double().mean(1).cpu().numpy()


def _figures(loss: dict[str, Any], divergence: dict[str, Any], chosen: np.ndarray) -> dict[str, float]:
    ce = {name: float(values[chosen].mean()) for name, values in loss.items()}
    out: dict[str, float] = {"contexts": int(chosen.sum())}
    out |= {f"ce_{name}": value for name, value in ce.items()}
    span = ce["zero_ablated"] - ce["clean"]
    if span:
        out["ce_loss_score"] = (ce["zero_ablated"] - ce["sae"]) / span
        out["ce_loss_score_all_rows"] = (ce["zero_ablated"] - ce["sae_all_rows"]) / span
    out |= {f"kl_{name}": float(values[chosen].mean()) for name, values in divergence.items()}
    return out
