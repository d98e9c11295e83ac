"""A token of every slot by a model of Llama's form, in few calls: Llama, Mistral, Qwen2, Qwen3 and Gemma.

A step reads all weights for a few rows, so on a CPU a fifth of it was calls around the products. Here are the same
products and sums without these; what reads the same is one product, and queries and keys are turned at once. Whether
it gives the bits of the model's own step is tried with a made text; a model whose step gives others keeps its own. So
does every other family: a short text does not show what depends on large values or on far positions (OLMo clips
queries and keys, Ministral scales them behind its first 16,384 tokens).

Shape suffixes: B slots, S tokens, N heads of queries, keys and values, W width of a head, D d_in, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evaluate.packed_weights import PackedWeights, Product
from evaluate.slot_cache import SlotCache, fixed_attention
from harvest.files import is_out_of_memory
from harvest.hooked_model import HookedModel
from harvest.language_model import find_head
from harvest.products import widens

Change = Callable[[Tensor, Tensor], Tensor]

FAMILIES = {"gemma", "llama", "mistral", "qwen2", "qwen3"}  # transformers' model types
TRIED = 6  # tokens of the made text


class _Layer(NamedTuple):
    attention: Any
    norms: tuple[Product, Product]  # before attention, and behind it
    turned_norms: tuple[Product, Product] | None  # of queries and keys
    products: tuple[Product, Product, Product, Product]  # queries, keys and values; o; gate and up; down
    activation: Product


class LayerStep:
    """The pass of a token of each slot through a model's layers, with a hook behind one of them."""

    def __init__(self, model: HookedModel, hook: str, weights: PackedWeights) -> None:
        """Raises ValueError if the hook is not a layer of the model."""
        causal: Any = model.model
        text = causal.model
        self.hooked = list(text.layers).index(model.modules[hook])
        self.embed, self.rotary, self.norm = text.embed_tokens.forward, text.rotary_emb.forward, text.norm.forward
        self.rows = text.embed_tokens.num_embeddings
        self.head = weights.product([find_head(causal)])
        self.layers = [_layer(layer, weights) for layer in text.layers]

    def __call__(self, ids_B1: Tensor, cache: SlotCache, ready: dict[str, Any], change: Change) -> Tensor:
        """Logits (B, V) behind these tokens; `ready` is what `cache.ready` gave, `change` the hook's."""
        x_B1D = self.embed(ids_B1)
        cos_B1W, sin_B1W = self.rotary(x_B1D, ready["position_ids"])
        half = cos_B1W.shape[2] // 2
        # Rotating half of the columns is exchanging the halves and turning one's sign, which the sine may do as well.
        sin_B1W = torch.cat([-sin_B1W[..., :half], sin_B1W[..., half:]], -1)
        attend, masks = ALL_ATTENTION_FUNCTIONS["sdpa"], ready["attention_mask"]
        for number, (attention, norms, turned_norms, products, activation) in enumerate(self.layers):
            mask = masks[cache.types[number]] if cache.types and isinstance(masks, dict) else masks
            read, write, gate_up, down = products
            heads_BNW = read(norms[0](x_B1D)).view(len(ids_B1), -1, attention.head_dim)
            kept = heads_BNW.shape[1] // (attention.num_key_value_groups + 2)
            turned_BNW, values_BNW = heads_BNW[:, :-kept], heads_BNW[:, -kept:]
            if turned_norms:
                parts = turned_BNW[:, :-kept], turned_BNW[:, -kept:]
                turned_BNW = torch.cat([norm(part) for norm, part in zip(turned_norms, parts, strict=True)], 1)
            turned_BNW = turned_BNW * cos_B1W + turned_BNW.roll(half, -1) * sin_B1W
            keys, values = cache.layers[number].update(turned_BNW[:, -kept:, None], values_BNW[:, :, None])
            queries = turned_BNW[:, :-kept, None]
            found, _ = attend(attention, queries, keys, values, mask, scaling=attention.scaling, is_causal=False)
            x_B1D = x_B1D + write(found.reshape(len(ids_B1), 1, -1))
            gate, up = gate_up(norms[1](x_B1D)).chunk(2, -1)
            x_B1D = x_B1D + down(activation(gate) * up)
            if number == self.hooked:
                x_B1D = change(x_B1D, ids_B1)
        return self.head(self.norm(x_B1D))[:, -1]


def _layer(layer: Any, weights: PackedWeights) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention,
        (layer.input_layernorm.forward, layer.post_attention_layernorm.forward),
        (attention.q_norm.forward, attention.k_norm.forward) if hasattr(attention, "q_norm") else None,
        (
            weights.product([attention.q_proj, attention.k_proj, attention.v_proj]),
            weights.product([attention.o_proj]),
            weights.product([mlp.gate_proj, mlp.up_proj]),
            weights.product([mlp.down_proj]),
        ),
        mlp.act_fn.forward,
    )


def same_step(model: HookedModel, hook: str, weights: PackedWeights, slots: int) -> LayerStep | None:
    """The step of a model, if its family is known and it gives the bits of the model's own behind a made text.

    It is tried once for each hook and number of slots, and kept beside the weights.
    """
    if (hook, slots) not in weights.steps:
        weights.steps[hook, slots] = _tried(model, hook, weights, slots)
    return weights.steps[hook, slots]


@torch.inference_mode()
def _tried(model: HookedModel, hook: str, weights: PackedWeights, slots: int) -> LayerStep | None:
    causal: Any = model.model
    if causal.config.model_type not in FAMILIES or widens(model.device, causal.dtype):
        return None
    try:
        step = LayerStep(model, hook, weights)
        ids_1S = torch.arange(1, TRIED + 1, device=model.device)[None] % step.rows
        prompt = DynamicCache()
        with weights():
            causal(ids_1S, past_key_values=prompt, use_cache=True)
        ids_B1 = ids_1S[:, :1].expand(slots, 1)
        found = []
        for own in (True, False):
            cache = SlotCache(causal, slots, model.device)
            for slot in range(slots):
                cache.put(slot, prompt, TRIED)
            cache.length_B = [1 + slot % TRIED for slot in range(slots)]
            ready = cache.ready()
            with fixed_attention(model.device):
                if own:
                    with weights(), model.changed(hook, _negated):
                        logits_BV = causal(ids_B1, **ready).logits[:, -1]
                else:
                    logits_BV = step(ids_B1, cache, ready, _negated)
            found.append([logits_BV, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))])
    except Exception as error:  # of any kind: a hook elsewhere, a family's form in another transformers
        if is_out_of_memory(error):
            raise
        return None
    return step if all(torch.equal(a, b) for a, b in zip(*found, strict=True)) else None


def _negated(acts_BSD: Tensor, _ids_BS: Tensor) -> Tensor:
    return -acts_BSD
