"""Loss and exact gradients of one batch, dense: five matrix products in blocks of features, no autograd graph.

    loss = mean over rows of ‖x − x̂‖² + λ Σ_i f_i ‖W_dec,i‖₂          (arXiv 2503.18878, eq. 3)

With e = x̂ − x and the active set S = {(b, i): f_bi > 0}:

    df_bi     = (2/B) e_b·W_dec,i + (λ/B) ‖W_dec,i‖                          for (b, i) in S, else 0
    dW_dec,i  = (2/B) Σ_b f_bi e_b + (λ/B) (Σ_b f_bi) W_dec,i / ‖W_dec,i‖
    dW_enc,·i = Σ_b df_bi x_b        db_enc,i = Σ_b df_bi        db_dec = (2/B) Σ_b e_b

Products run in `compute_dtype`; weights, sums, residual and gradients stay float32. Written out because
autograd would take six products (it differentiates x too when x comes from a module) and keep several
(B, F) float32 tensors: here f, in compute_dtype, is the only one, and all else lives for one block.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from train.parallel import SINGLE, FeatureRanks
from train.sae import Dead, Sae
from train.step import Reconstruction, StepResult, Tensors, result

# Features of a block. On a CPU a block of f is read again while it is in cache (17 MB at 4096 rows); on a GPU a
# product of this width keeps every unit busy, and its float32 result takes 134 MB.
CPU_BLOCK, CUDA_BLOCK = 1024, 8192


def product(a: Tensor, b: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """a (M, K) @ b (K, N) with operands in compute_dtype, result float32 (M, N)."""
    a, b = a.to(compute_dtype), b.to(compute_dtype)
    if a.is_cuda and compute_dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def dense_step(
    sae: Sae,
    x_BD: Tensor,
    coefficients: Mapping[str, float],
    compute_dtype: torch.dtype,
    ranks: FeatureRanks = SINGLE,
    operands: Tensors | None = None,
    dead: Dead | None = None,
) -> StepResult:
    """Gradients and figures of one batch of stored rows (B, D); arguments as of `autograd_step`."""
    del dead
    B, l1_coefficient, x_BD = x_BD.shape[0], coefficients["l1"], sae.scaled(x_BD)
    W_enc, W_dec = ((operands or sae.parameters)[name] for name in ("W_enc", "W_dec"))
    x = x_BD.to(compute_dtype)
    width = CUDA_BLOCK if x_BD.is_cuda else CPU_BLOCK
    blocks = [slice(i, i + width) for i in range(0, sae.d_sae, width)]
    error_BD = torch.zeros_like(x_BD)
    f_blocks: list[Tensor] = []  # in compute_dtype: the only (B, F) entries that are kept
    f_sum_F, count_F = torch.empty_like(sae.b_enc), torch.empty_like(sae.b_enc, dtype=torch.int64)
    for block in blocks:
        f = product(x, W_enc[:, block], compute_dtype).add_(sae.b_enc[block]).relu_()
        f_sum_F[block], count_F[block] = f.sum(0), (f > 0).sum(0)
        f_blocks.append(f.to(compute_dtype))
        error_BD.add_(product(f_blocks[-1], W_dec[block], compute_dtype))
    ranks.sum(error_BD).add_(sae.b_dec).sub_(x_BD)

    error = error_BD.to(compute_dtype)
    norm_F = sae.W_dec.norm(dim=1)
    l1_scale_F = f_sum_F / norm_F.clamp_min(1e-30) * (l1_coefficient / B)
    gradients = {name: torch.empty_like(weight) for name, weight in sae.parameters.items()}
    for block, f in zip(blocks, f_blocks, strict=True):
        df = product(error, W_dec[block].t(), compute_dtype).mul_(2 / B)
        df.add_(norm_F[block], alpha=l1_coefficient / B).mul_(f > 0)
        gradients["b_enc"][block] = df.sum(0)
        gradients["W_enc"][:, block] = product(x.t(), df, compute_dtype)
        dW_dec = product(f.t(), error, compute_dtype).mul_(2 / B)
        gradients["W_dec"][block] = dW_dec.addcmul_(sae.W_dec[block], l1_scale_F[block].unsqueeze(1))
    gradients["b_dec"].copy_(error_BD.sum(0).mul_(2 / B))
    return result(x_BD, error_BD, gradients, {"l1": f_sum_F @ norm_F / B}, count_F)


def dense_reconstruction(
    sae: Sae,
    x_BD: Tensor,
    compute_dtype: torch.dtype,
    ranks: FeatureRanks = SINGLE,
    operands: Tensors | None = None,
) -> Reconstruction:
    """Stored rows (B, D) rebuilt; arguments as of `autograd_step`."""
    x_BD, weights = sae.scaled(x_BD), operands or sae.parameters
    f_BF = product(x_BD, weights["W_enc"], compute_dtype).add_(sae.b_enc).relu_()
    x_hat_BD = product(f_BF, weights["W_dec"], compute_dtype)
    error_BD = ranks.sum(x_hat_BD).add_(sae.b_dec).sub_(x_BD)
    terms = {"mse": error_BD.square().sum(1), "l1": f_BF @ sae.W_dec.norm(dim=1)}
    return Reconstruction(error_BD, terms, (f_BF > 0).sum(1))
