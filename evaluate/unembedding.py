"""Which next tokens a direction at a hook promotes: through the final norm and the LM head, nothing between.

Of the model's files all but the decoder layers is read (57 of 269 MB of SmolLM2-135M). The layers between the hook
and the end are left out, as in the logit lens; the later the hook, the truer it is.

Shape suffixes: K directions, D d_in, F d_sae, V vocabulary, N tokens found, T tokens given.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harvest.config import ModelConfig
from harvest.files import UserError
from harvest.hooked_model import hooked
from harvest.language_model import find_head, load_skeleton, load_weights

AT_ONCE = 64  # directions; their logits are AT_ONCE × V float32
VOCABULARY_AT_ONCE = 16_384


class Unembedding(NamedTuple):
    """What the end of a model does to a direction."""

    gain_D: Tensor  # of the final norm, float32
    centred: bool  # LayerNorm takes the mean off, RMSNorm does not
    head_VD: Tensor  # as stored


class Tokens(NamedTuple):
    """Tokens and their logits less the mean over the vocabulary, the first the most extreme."""

    token_KN: Tensor
    logit_KN: Tensor


def load_unembedding(model: ModelConfig, commit: str | None, offline: bool) -> Unembedding:
    """The final norm's gain and the LM head, from the model's weights but for its decoder layers.

    Raises UserError where the model's parts are not found or not read.
    """
    skeleton = load_skeleton(model, commit, offline)

    def cut(whole: Any) -> None:
        whole.set_submodule(skeleton.layer_list, _NoLayers())

    loaded = load_weights(skeleton, model, commit, offline, "auto", cut)
    norm, head = find_end(loaded, skeleton.layer_list)
    head_VD = head.weight.detach()
    try:
        return Unembedding(*_gain(norm.float(), head_VD.shape[1]), head_VD)
    except RuntimeError:
        kind = f"{type(norm).__name__} of {type(loaded).__name__}"
        raise UserError(f"the final {kind} is of another width than its LM head") from None


class _NoLayers(nn.ModuleList):
    """In the place of the decoder layers; notes when the model comes to them."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[nn.Module]:
        """None."""
        self.reached()
        return iter(())

    def __getitem__(self, _index: Any) -> Any:
        """What a model takes of its layers to iterate over."""
        return self


@torch.inference_mode()
def find_end(model: Any, layer_list: str) -> tuple[nn.Module, nn.Linear]:
    """The norm that runs last between the layers, which were taken out of the model, and the head.

    Others may be registered after it (of per-layer embeddings, of mixers). Raises UserError where there is none, or
    weights stand between the two. Scaling and capping of logits come after the head and leave the order of the tokens.
    """
    kind = type(model).__name__
    head, layers = find_head(model), model.get_submodule(layer_list)
    names = {module: name for name, module in model.named_modules()}
    ran: list[nn.Module] = []
    with ExitStack() as stack:
        for module in names:
            if _is_norm(module) or next(module.children(), None) is None:
                stack.enter_context(hooked(module, lambda module, _inputs, _output: ran.append(module)))
        layers.reached = lambda: ran.append(layers)
        with suppress(Exception):  # whatever comes after the head may fail
            model(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    before = ran[ran.index(layers) : ran.index(head)] if head is not None and {layers, head} <= set(ran) else []
    last = max((place for place, module in enumerate(before) if _is_norm(module)), default=None)
    if last is None or not isinstance(head, nn.Linear):
        raise UserError(f"no final norm and LM head were found in {kind}")
    between = [names[module] for module in before[last + 1 :] if next(module.parameters(), None) is not None]
    if between:
        raise UserError(f"{between[0]} is between the final norm and the LM head of {kind}")
    return before[last], head


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


@torch.inference_mode()
def _gain(norm: nn.Module, d_in: int) -> tuple[Tensor, bool]:
    """The factor of each dimension, (D,), and whether the norm takes the mean off: LayerNorm does, RMSNorm does not.

    As the norm applies it: Gemma's is 1 + weight.
    """
    signs_D = torch.ones(d_in)  # of mean 0 and mean square 1: neither kind of norm changes it
    signs_D[1::2] = -1
    gain_D = (norm(signs_D[None]) - norm(-signs_D[None]))[0] / 2 * signs_D
    return gain_D, torch.allclose(norm((signs_D + 1)[None]), norm(signs_D[None]), rtol=1e-3, atol=1e-5)


@torch.inference_mode()
def promoted(unembedding: Unembedding, W_dec_KD: Tensor, count: int) -> tuple[Tokens, Tokens]:
    """The `count` tokens that each direction, at length 1, promotes most, and those that it suppresses most.

    Computed where the head is, whatever the device of the directions.
    """
    directions_KD = torch.nn.functional.normalize(W_dec_KD.float().to(unembedding.head_VD.device), dim=1)
    if unembedding.centred:
        directions_KD = directions_KD - directions_KD.mean(1, keepdim=True)
    found: dict[bool, list[Any]] = {True: [], False: []}
    for part_KD in (directions_KD * unembedding.gain_D).split(AT_ONCE):
        blocks = unembedding.head_VD.split(VOCABULARY_AT_ONCE)  # all of it in float32 would be 2 GB at Llama's size
        logits_KV = torch.cat([part_KD @ block_VD.float().T for block_VD in blocks], 1)
        logits_KV -= logits_KV.mean(1, keepdim=True)  # softmax does not see it
        for largest, parts in found.items():
            parts.append(logits_KV.topk(min(count, logits_KV.shape[1]), largest=largest))
    up, down = (Tokens(torch.cat([p.indices for p in f]), torch.cat([p.values for p in f])) for f in found.values())
    return up, down


@torch.inference_mode()
def token_logits(unembedding: Unembedding, W_dec: Tensor, tokens: Sequence[int]) -> Tensor:
    """What each direction (F, D), at length 1, adds to the logits of these tokens, as `promoted` counts it; (F, T)."""
    head_VD = unembedding.head_VD
    ends_TD = head_VD[torch.tensor(tokens, dtype=torch.long)].float() - head_VD.mean(0, dtype=torch.float32)
    ends_TD = ends_TD * unembedding.gain_D
    if unembedding.centred:
        ends_TD = ends_TD - ends_TD.mean(1, keepdim=True)
    W_FD = W_dec.float().to(head_VD.device)
    return W_FD @ ends_TD.T / W_FD.norm(dim=1, keepdim=True).clamp(min=1e-12)
