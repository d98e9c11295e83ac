"""A step of layers has every bit of the model's own, and packed weights give the products of the plain ones."""

from typing import Any

import pytest
import torch
from test_engine import TOKENIZER, by_number, generated, hooked, requests, scores  # noqa: F401 - a fixture

from evaluate.engine import Engine, answers
from evaluate.packed_weights import PackedWeights
from evaluate.sampler import Sampling
from harvest.products import widens

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
PACKED = [dtype for dtype in DTYPES if not widens(CPU, dtype)]  # others a CPU multiplies in wider tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "layer", "has_own"),
    [
        ("llama", "model.layers.1", True),
        ("mistral", "model.layers.1", True),  # windows of 4 tokens
        ("qwen2", "model.layers.1", True),  # biases
        ("qwen3", "model.layers.1", True),  # norms of queries and keys
        ("llama", "model.layers.1.mlp", False),  # a hook inside a layer
        ("gemma", "model.layers.1", True),  # scales its embeddings
        ("olmo", "model.layers.1", False),  # clips queries and keys where they are large, as no made text shows
        ("gpt2", "transformer.h.1", False),
    ],
)
def test_the_step_of_layers_has_every_bit_of_the_models_own(
    scores,  # noqa: F811
    kind,
    layer,
    has_own,
    dtype,
):
    model, interventions = hooked(kind, layer, dtype)
    asked = requests((5, 17, 3, 30, 9))
    weights = PackedWeights(model.model, model.device)
    found = [dict(answers(model, TOKENIZER, interventions, asked, Sampling(9, 1.0), slots=3, weights=weights))]
    count = len(scores)
    assert (weights.steps[layer, 3] is not None) == (has_own and dtype in PACKED)
    weights.steps[layer, 3] = None
    found += [dict(answers(model, TOKENIZER, interventions, asked, Sampling(9, 1.0), slots=3, weights=weights))]
    assert found[0] == found[1] and len(scores) == count == 5 * 9


def test_a_model_of_the_same_form_that_does_more_keeps_its_own_step():
    model, interventions = hooked()
    mlp: Any = model.model.get_submodule("model.layers.2.mlp")
    mlp.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    assert Engine(model, TOKENIZER, interventions, Sampling(4), slots=3).layer_step is None
    request = requests((9,), lists=1)[0]
    found = by_number(model, interventions, [request], Sampling(8), slots=3)[0]
    assert found.token_ids == generated(model, interventions, request, 8)


def test_slots_in_use_are_moved_together(scores):  # noqa: F811
    model, interventions = hooked(max_position_embeddings=512)
    asked = requests((70, 5, 130, 9))
    whole = by_number(model, interventions, asked, Sampling(6, 1.0), slots=4)
    writer = Engine(model, TOKENIZER, interventions, Sampling(6, 1.0), slots=4)
    numbers = [writer.add(request) for request in asked]
    writer.step()
    for number in (0, 2):
        writer.cancel(numbers[number])
    ended = writer.step()
    assert [answer and answer.number for answer in writer.slots] == [1, 3, None, None]
    while not writer.is_done:
        ended += writer.step()
    assert dict(ended) == {1: whole[1], 3: whole[3]}


@pytest.mark.parametrize("dtype", PACKED)
def test_layers_of_one_input_are_one_product(dtype):
    model, _ = hooked("qwen2", dtype=dtype)
    weights = PackedWeights(model.model, model.device)
    attention: Any = model.model.get_submodule("model.layers.0.self_attn")
    three = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert three in weights.joined and {len(layers) for layers in weights.joined} == {2, 3}
    x, other = torch.randn(2, 3, 1, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = [layer(x) for layer in three]
    with weights():
        apart = [three[0](x), three[1](x), three[2](other), three[2](x)]
    for found in (apart[:2] + apart[3:], weights.product(three)(x).split([layer.out_features for layer in three], -1)):
        for a, b in zip(found, plain, strict=True):
            assert torch.equal(a, b) if dtype == torch.bfloat16 else torch.allclose(a, b, atol=1e-5)
    assert not torch.allclose(apart[2], plain[2])


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_weights_give_the_products_of_the_plain_ones(dtype):
    generator = torch.Generator().manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(48, 80), torch.nn.Linear(80, 24, bias=False)).requires_grad_(False)
    layers.to(dtype)
    plain = layers[0].forward
    weights = PackedWeights(layers, CPU)
    assert len(weights.forwards) == 2
    for rows in (1, 7, 130):
        x = torch.randn(rows, 1, 48, generator=generator).to(dtype)
        with weights():
            assert layers[0].forward != plain
            found = layers(x)
        assert torch.equal(found, layers(x)) if dtype == torch.bfloat16 else torch.allclose(found, layers(x), atol=1e-5)
    x = torch.randn(7, 1, 48, generator=generator).to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):  # takes inputs of either
        with weights():
            found = layers[0](x)
        assert torch.equal(found, layers[0](x))
    assert layers[0].forward == plain
