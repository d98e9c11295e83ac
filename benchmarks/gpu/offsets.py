"""The kernels where offsets pass 2³¹: batch × d_sae and d_sae × d_in, held against plain twins of what is at both ends.

Shape suffixes: B rows of a batch, D d_in, F d_sae, N non-zeros.
"""

import torch

from benchmarks.gpu.check import Place
from benchmarks.gpu.kernels import error_of
from train.adam import Update, plain_update
from train.nonzeros import PLAIN, ByRow, by_feature


def check_past_int32(B: int, D: int, F: int, device: torch.device) -> None:
    """Offsets into (B, F), (F, D) and (D, F) past 2³¹, held against twins of the rows and features at both ends."""
    from train.kernels import TRITON, adam_update

    assert B * F > 2**31 < F * D
    pre_BF, b_enc = torch.randn(B, F, dtype=torch.bfloat16, device=device), torch.full((F,), -3.0, device=device)
    ours = TRITON.extract(pre_BF, b_enc)
    parts = [PLAIN.extract(rows, b_enc) for rows in pre_BF.split(B // 4)]  # nonzero takes no more than 2³¹ elements
    for mine, plain in zip(ours[:3], list(zip(*parts, strict=True))[:3], strict=True):
        assert torch.equal(mine.to(plain[0].dtype), torch.cat(plain)), "extract past 2³¹"
    del pre_BF, ours, parts

    edge, rows = 64, 8
    ends = torch.cat([torch.arange(edge), torch.arange(F - edge, F)]).to(device)
    W_dec, b_dec = torch.randn(F, D, device=device), torch.randn(D, device=device)
    x_BD, f_N = torch.randn(rows, D, device=device), torch.rand(rows * len(ends), device=device)
    offset_B = torch.arange(rows + 1, dtype=torch.int32, device=device) * len(ends)
    active = ByRow(offset_B, ends.int().repeat(rows), f_N)
    small = active._replace(feature_N=torch.arange(len(ends), dtype=torch.int32, device=device).repeat(rows))
    by, by_small = by_feature(active, F), by_feature(small, len(ends))
    scale_F = torch.rand(F, device=device)
    both = ((TRITON, active, W_dec), (PLAIN, small, W_dec[ends]))
    pairs = {
        "residual": [ops.residual(listed, W, b_dec, x_BD) for ops, listed, W in both],
        "row_dots": [ops.row_dots(listed, x_BD, W) for ops, listed, W in both],
    }
    sums = TRITON.decoder_sums(by, f_N[by.order_N], x_BD, W_dec, scale_F)
    pairs["decoder_sums"] = [
        sums[ends], PLAIN.decoder_sums(by_small, f_N[by_small.order_N], x_BD, W_dec[ends], scale_F[ends])
    ]  # fmt: skip
    middle = slice(F // 2, F // 2 + edge)
    pairs["decoder_sums between"] = [sums[middle], W_dec[middle] * scale_F[middle, None]]
    del sums
    sums = TRITON.encoder_sums(by, f_N[by.order_N], x_BD)
    pairs["encoder_sums"] = [sums[:, ends], PLAIN.encoder_sums(by_small, f_N[by_small.order_N], x_BD)]
    assert not sums[:, middle].any()
    del sums
    for name, (mine, plain) in pairs.items():
        assert error_of(mine, plain) <= 1e-5, f"{name} past 2³¹: {error_of(mine, plain):.1e} from its twin"

    tensors = [{"W": W_dec}, {"W": torch.randn_like(W_dec)}, *({"W": torch.zeros_like(W_dec)} for _ in range(2))]
    tensors.append({"W": W_dec.bfloat16()})
    kept = [{"W": t["W"].view(-1)[-5000:].clone()} for t in tensors]
    numbers = Update(1e-2, (0.9, 0.999), 1, torch.tensor(2.0, device=device))
    adam_update(*tensors, numbers)
    plain_update(*kept, numbers)
    del tensors[1], kept[1]  # the gradients, which torch's overwrites
    for mine, plain in zip(tensors, kept, strict=True):
        rtol = 1e-4 if plain["W"].dtype == torch.float32 else 2**-7
        torch.testing.assert_close(mine["W"].view(-1)[-5000:], plain["W"], rtol=rtol, atol=1e-6)


def run(place: Place) -> None:
    """The check."""
    s = place.sizes
    check_past_int32(s.batch, s.d_in, s.past_int32_d_sae, place.device)
    place.note(offsets="equal", peak_gb=torch.cuda.max_memory_allocated() / 1e9)
