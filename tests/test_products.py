"""Products of bfloat16 through float32 on CPUs without such instructions: torch's own result, up to the last bit."""

import pytest
import torch
from conftest import only, pipeline
from torch.nn import functional

from harvest import products
from harvest.config import ModelConfig
from harvest.files import read_json
from harvest.language_model import load_model
from harvest.products import WidenedProducts

HOOK = "model.layers.1"

HALF_BIT = 2.0**-8  # relative: what rounding to bfloat16 costs at most


def operands(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (functional.linear, [(7, 96), (40, 96), (40,)]),
        (lambda a, b: a @ b, [(3, 7, 96), (96, 5)]),
        (torch.bmm, [(3, 7, 96), (3, 96, 5)]),
        (torch.addmm, [(5,), (7, 96), (96, 5)]),
        (lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True), [(2, 3, 16, 8)] * 3),
    ],
    ids=["linear", "matmul", "bmm", "addmm", "attention"],
)
def test_equals_the_exact_product_rounded_once(product, shapes):
    given = operands(*shapes)
    exact = product(*(x.double() for x in given))
    with WidenedProducts():
        found = product(*given)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * HALF_BIT, atol=1e-6)


def test_only_products_are_touched():
    (x,) = operands((4, 8))
    with WidenedProducts():
        assert torch.equal(x * x + x, x.mul(x).add(x)) and (x + x).dtype == torch.bfloat16
        assert (x.float() @ x.float().T).dtype == torch.float32


def test_a_model_loaded_in_bfloat16(fresh_folder, monkeypatch):
    """Its activations differ in last bits from those that torch's own bfloat16 gives."""
    del fresh_folder
    tokens, rows = torch.arange(24).view(2, 12), []
    for has in (True, False):
        monkeypatch.setattr(products, "has_bfloat16", lambda _device, has=has: has)
        model = load_model(ModelConfig(name="assets/tiny-llama"), None, [HOOK], torch.bfloat16, torch.device("cpu"))
        rows.append(model.activations(tokens)[HOOK])
    assert rows[0].dtype == rows[1].dtype == torch.bfloat16
    torch.testing.assert_close(rows[1].float(), rows[0].float(), rtol=8 * HALF_BIT, atol=8 * HALF_BIT)


@pytest.mark.parametrize("has", [True, False])
def test_a_harvest_says_how_it_multiplied(fresh_folder, monkeypatch, has):
    monkeypatch.setattr(products, "has_bfloat16", lambda _device: has)
    assert pipeline("sample").status == 0
    ran = pipeline("harvest", "harvest.compute_dtype=bfloat16", "harvest.runtime.device=cpu")
    assert ran.status == 0, ran.out
    numerics = read_json(only(fresh_folder, "runs/harvest/*/begun.json"))["numerics"]
    assert numerics.get("products") == (None if has else "float32, rounded")
