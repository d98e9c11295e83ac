import numpy as np
import pytest
import torch
from conftest import only, pipeline

from evaluate.figures import read_figures
from harvest.files import UserError
from harvest.stored_forms import BLOCK, FILL, dequantize, quantized


def bits(rows: torch.Tensor) -> np.ndarray:
    return rows.bfloat16().view(torch.uint16).numpy()


def values(stored: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(stored).view(torch.bfloat16)


def through_int8(rows: torch.Tensor) -> torch.Tensor:
    out = np.empty(rows.shape, np.uint16)
    dequantize(*quantized(bits(rows)), out)
    return values(out)


@pytest.mark.parametrize("d_in", [1, 63, 64, 65, 576])
def test_int8_is_off_by_half_a_step_at_most(d_in):
    """A step is a 127th of the largest magnitude of the block; bfloat16 rounds again, by 2^-9."""
    generator = torch.Generator().manual_seed(d_in)
    size = torch.randn(300, d_in, generator=generator).exp()
    rows = (torch.randn(300, d_in, generator=generator) * size).bfloat16().float()
    rows[7] = 0
    found = through_int8(rows).float()
    for first in range(0, d_in, BLOCK):
        block, read = rows[:, first : first + BLOCK], found[:, first : first + BLOCK]
        step = block.abs().amax(1, keepdim=True) / 127
        assert ((block - read).abs() <= 0.51 * step + block.abs() * 2**-8).all()
    assert (found[7] == 0).all()


def test_dequantizing_equals_its_plain_twin():
    q, scale = quantized(bits(torch.randn(500, 200, generator=torch.Generator().manual_seed(0)) * 50))
    out = np.empty(q.shape, np.uint16)
    dequantize(q, scale, out)
    plain = torch.from_numpy(q).float() * torch.from_numpy(scale).float().repeat_interleave(BLOCK, 1)[:, :200]
    assert torch.equal(values(out), plain.bfloat16())


def test_a_block_that_is_not_there_reads_as_the_fill_value():
    out = np.empty((2, 70), np.uint16)
    dequantize(np.zeros((2, 70), np.int8), np.array([[np.nan, 1], [1, np.nan]], np.float16), out)
    assert (out[0, :64] == FILL).all() and (out[1, 64:] == FILL).all()
    assert (out[0, 64:] == 0).all()


def test_activations_that_int8_cannot_hold_are_refused():
    with pytest.raises(UserError, match=r"harvest.stored .*: int8: .*use bf16"):
        quantized(bits(torch.tensor([[1e9]])))


@pytest.mark.parametrize("form", ["bf16-zstd", "int8"])
def test_every_stage_works_on_it(finished, fresh_folder, form):
    ran = pipeline("run", f"harvest.stored={form}")
    assert ran.status == 0, ran.out
    ran = pipeline("verify", f"harvest.stored={form}")
    assert ran.status == 0, ran.out
    assert len(pipeline("verify", "--digest", f"harvest.stored={form}").out.strip()) == 64
    weights = "runs/train/*/*/sae_weights.safetensors"
    same = only(fresh_folder, weights).read_bytes() == only(finished, weights).read_bytes()
    assert same == (form == "bf16-zstd")
    figure = [
        read_figures(only(folder, "runs/evaluate/*")).own("model.layers.1").value("explained_variance", rows="all_rows")
        for folder in (fresh_folder, finished)
    ]
    assert figure[0] == pytest.approx(figure[1], abs=0.02)
