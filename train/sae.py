"""The sparse autoencoder: four tensors, encode, decode, and how they start.

    f = ReLU(x W_enc + b_enc)        x̂ = f W_dec + b_dec        (arXiv 2503.18878, section 2)

A class beside `SAE` is another rule for f; `train` makes the standard one alone, the others are measured.
Rows come in scaled (`scale` in a checkpoint, see docs/design.md): the weights speak of s·x, never of x.

Shape suffixes: B rows of a batch, D d_in, F d_sae.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DECODER_NORM = 0.1  # SAELens' decoder_init_norm for standard SAEs


class SAE(NamedTuple):
    """Weights of one SAE; the same shape holds its gradients and Adam's moments.

    W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,), all contiguous:
    fused Adam reads a gradient in its parameter's memory layout, so a transposed view would be
    updated in the wrong elements without an error.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def encode(self, x_BD: Tensor) -> Tensor:
        """Feature activations f (B, F), non-negative."""
        return torch.relu(torch.addmm(self.b_enc, x_BD, self.W_enc))

    def decode(self, f_BF: Tensor) -> Tensor:
        """Reconstructed rows x̂ (B, D), in the scaled space."""
        return torch.addmm(self.b_dec, f_BF, self.W_dec)

    def to(self, device: torch.device | str) -> "SAE":
        """The same on a device."""
        return SAE(*(w.to(device) for w in self))


class JumpReluSae(SAE):
    """f = z where z = x W_enc + b_enc is positive and above the feature's threshold, else 0 (arXiv 2407.14435)."""

    threshold_F: Tensor

    def encode(self, x_BD: Tensor) -> Tensor:
        z_BF = torch.addmm(self.b_enc, x_BD, self.W_enc)
        return torch.relu(z_BF) * (z_BF > self.threshold_F)

    def to(self, device: torch.device | str) -> "JumpReluSae":
        return jumprelu(super().to(device), self.threshold_F.to(device))


class TopkSae(SAE):
    """f = ReLU of the k largest z = x W_enc + b_enc of a row, else 0 (arXiv 2406.04093)."""

    k: int

    def encode(self, x_BD: Tensor) -> Tensor:
        z_BF = torch.addmm(self.b_enc, x_BD, self.W_enc)
        top = z_BF.topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(z_BF).scatter_(1, top.indices, top.values.relu())

    def to(self, device: torch.device | str) -> "TopkSae":
        return topk(super().to(device), self.k)


def jumprelu(sae: SAE, threshold_F: Tensor) -> JumpReluSae:
    """An SAE with a threshold for each feature, (F,)."""
    out = JumpReluSae(*sae)
    out.threshold_F = threshold_F
    return out


def topk(sae: SAE, k: int) -> TopkSae:
    """An SAE of which k features fire in a row."""
    out = TopkSae(*sae)
    out.k = k
    return out


def initial_sae(d_in: int, d_sae: int, seed: int, device: torch.device | str = "cpu") -> SAE:
    """Random decoder rows of norm 0.1, W_enc its transpose, biases zero; float32.

    Drawn on the CPU, so that every device starts from the same bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec *= DECODER_NORM / W_dec.norm(dim=1, keepdim=True)
    return SAE(W_dec.t().contiguous(), torch.zeros(d_sae), W_dec, torch.zeros(d_in)).to(device)


def input_scale(d_in: int, mean_norm: float) -> float:
    """s = √d_in / mean‖x‖, so that scaled rows have norm √d_in on average.

    SAELens calls this `expected_average_only_in`; λ has its meaning only at this scale.
    """
    return math.sqrt(d_in) / mean_norm
