"""Keys and values of answers that are written side by side: row b holds slot b's tokens from column 0 on.

All rows are as long as the longest of them needs, in blocks: so many tokens of memory a slot (131 kB a token for
Llama-3.1-8B in bfloat16: 32 slots of 4k tokens take 17 GB, 12 of 32k take 52 GB), and so many columns of work. What is
behind a row's last token is masked. Neither that, nor a row's place among the others, changes a bit of it:

- on a GPU the attention kernel goes through the columns in blocks of its own, one after another;
- on a CPU torch's kernel does not hold to it: it splits products by the number of columns, and its threads' buffers lie
  at addresses by which sums are split. Here each block of columns is a product of its own, and their sums are added in
  order; in float32, in which keys and values are kept.

Windows are masks here: keys before them stay in memory.

Shape suffixes: B slots, H heads of keys, K columns, D width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK = 64  # columns


def fits(causal: Any) -> bool:
    """Whether a model keeps keys and values alone, of masks and positions that it is given, and calls torch's SDPA."""
    text = causal.config.get_text_config()
    try:
        kinds = {type(layer) for layer in DynamicCache(config=causal.config).layers}
    except (AttributeError, KeyError, TypeError, ValueError):  # configurations that name layers of their own
        return False
    return (
        causal._can_compile_fullgraph
        and causal._supports_attention_backend
        and text._attn_implementation == "sdpa"
        and causal.device.type in ("cpu", "cuda")
        and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        and set(getattr(text, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        and getattr(text, "attention_chunk_size", None) is None
    )


class _SlotLayer(DynamicLayer):
    """Keys and values (B, H, K, D) of one decoder layer."""

    keys: Tensor  # type: ignore[assignment]  # neither of them is ever None here
    values: Tensor  # type: ignore[assignment]
    position_B: Tensor  # where the next token of each slot goes

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_keywords: Any) -> tuple[Tensor, Tensor]:
        """Put one token of each slot (B, H, 1, D) in its place; all keys and values."""
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            kept.scatter_(2, self.position_B.view(-1, 1, 1, 1).expand_as(new), new.to(kept))
        return self.keys, self.values


class SlotCache(Cache):
    """A cache of transformers' form for one token of each slot at a time. A slot of length 0 is free."""

    def __init__(self, causal: Any, slots: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.layers: list[Any]
        self.device, self.length_B = device, [0] * slots
        self.position_B = torch.zeros(slots, dtype=torch.long, device=device)
        self.dtype = torch.float32 if device.type == "cpu" else causal.dtype
        text = causal.config.get_text_config()
        self.types, self.window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)

    def put(self, slot: int, prompt: Any, length: int) -> None:
        """Copy what a model keeps of `length` tokens read alone into a slot."""
        self.length_B[slot] = length
        if not self.layers:
            self.layers = [_SlotLayer() for _ in prompt.layers]
            for layer, own in zip(self.layers, prompt.layers, strict=True):
                layer.keys, layer.values = (
                    torch.zeros(len(self.length_B), x.shape[1], 0, x.shape[3], dtype=self.dtype, device=self.device)
                    for x in (own.keys, own.values)
                )
                layer.is_initialized = True
        self._fit()
        for layer, own in zip(self.layers, prompt.layers, strict=True):
            for kept_BHKD, new_1HSD in ((layer.keys, own.keys), (layer.values, own.values)):
                kept_BHKD[slot, :, :length] = new_1HSD[0]
                kept_BHKD[slot, :, length:] = 0  # a masked key weighs 0, and 0 times an old infinity would be NaN

    def free(self, slot: int) -> None:
        """Leave a slot to others."""
        self.length_B[slot] = 0

    def close_gaps(self) -> list[int]:
        """Move slots together, so that those in use are the first: which slot each of these was."""
        used = [slot for slot, length in enumerate(self.length_B) if length]
        for to, slot in enumerate(used):
            if to != slot:
                for layer in self.layers:
                    layer.keys[to], layer.values[to] = layer.keys[slot], layer.values[slot]
                self.length_B[to], self.length_B[slot] = self.length_B[slot], 0
        return used

    def ready(self) -> dict[str, Any]:
        """Make room for a token of each slot; arguments of the model's pass over these tokens."""
        self._fit()
        self.position_B = torch.tensor(self.length_B, device=self.device)
        for layer in self.layers:
            layer.position_B = self.position_B
        return {
            "past_key_values": self,
            "attention_mask": self._masks(),
            "position_ids": self.position_B.unsqueeze(1),
            "use_cache": True,
        }

    def passed(self) -> None:
        """Count the token of each slot that is in use."""
        self.length_B = [length + (length > 0) for length in self.length_B]

    def _fit(self) -> None:
        columns = -(-(max(self.length_B) + 1) // BLOCK) * BLOCK
        for layer in self.layers:
            for name in ("keys", "values"):
                old_BHKD = getattr(layer, name)
                if (kept := min(columns, old_BHKD.shape[2])) == columns == old_BHKD.shape[2]:
                    continue
                more_BHKD = old_BHKD.new_zeros(*old_BHKD.shape[:2], columns - kept, old_BHKD.shape[3])
                setattr(layer, name, torch.cat([old_BHKD[:, :, :kept], more_BHKD], 2))

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """What is added to the scores (B, 1, 1, K), for each type of layer where the model has several.

        On a CPU free slots behind the last in use are left out.
        """
        column_K = torch.arange(self.layers[0].keys.shape[2], device=self.device)
        used = max(slot for slot, length in enumerate(self.length_B) if length) + 1
        position_B1 = self.position_B[: used if self.device.type == "cpu" else None].unsqueeze(1)
        masks = {"full_attention": column_K <= position_B1}
        if self.window is not None:
            masks["sliding_attention"] = masks["full_attention"] & (column_K > position_B1 - self.window)
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        masks = {name: torch.where(seen, zero, -torch.inf)[:, None, None] for name, seen in masks.items()}
        if self.types is None:
            return masks["full_attention" if self.window is None else "sliding_attention"]
        return {name: masks[name] for name in set(self.types)}


@contextmanager
def fixed_attention(device: torch.device) -> Iterator[None]:
    """Within this, attention to a `SlotCache` depends neither on the number of its columns nor on a slot's place."""
    if device.type == "cuda":
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
            yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = by_blocks
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def by_blocks(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_keywords: Any,
) -> tuple[Tensor, None]:
    """Attention of one token of each slot, (B, 1, heads, D), in the form that transformers calls it in.

    `query` is (B, heads, 1, D), key and value (B, H, K, D), the mask (B, 1, 1, K) is added to the scores. Slots behind
    those of the mask are given zeros.
    """
    (slots, heads, _, width), (kept, columns), used = query.shape, key.shape[1:3], len(attention_mask)
    blocks, each = columns // BLOCK, heads // kept
    scaled = query[:used].float() * (width**-0.5 if scaling is None else scaling)
    asked = scaled.reshape(used * kept, 1, each, width).expand(-1, blocks, -1, -1).flatten(0, 1)
    scores = torch.bmm(asked, key[:used].reshape(-1, BLOCK, width).transpose(1, 2))
    scores = scores.view(used, kept, blocks, each, BLOCK).add_(attention_mask.view(used, 1, blocks, 1, BLOCK))
    weights = scores.sub_(scores.amax((2, 4), keepdim=True)).exp_()
    found = torch.bmm(weights.view(-1, each, BLOCK), value[:used].reshape(-1, BLOCK, value.shape[3]))
    # A cumulative sum adds in order, so that the zeros of masked blocks at its end change nothing.
    total = weights.sum(4, keepdim=True).cumsum(2)[:, :, -1]
    found = found.view(used, kept, blocks, each, -1).cumsum(2)[:, :, -1] / total
    found = found.reshape(used, 1, heads, -1).to(query.dtype)
    return found if used == slots else torch.cat([found, found.new_zeros(slots - used, *found.shape[1:])]), None
