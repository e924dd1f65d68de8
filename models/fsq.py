"""Finite scalar quantization (FSQ): the codebook is a grid, so it need not be learned.

Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", arXiv:2309.15505, §3.
Each of the D numbers of a latent is squashed to (-1, 1) and rounded to one of L evenly spaced
levels; the codebook is the product of the levels (4·4·4·4·4 = 1,024). The paper shifts even grids
by half a step so that 0 becomes a level. Here the grid stays symmetric, because with two levels
the shifted one is {-1, 0} and an action bit should be a sign.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def round_straight_through(x: Tensor) -> Tensor:
    """Round x forwards; backwards act as the identity: x + stopgrad(round(x) - x) (§3)."""
    return x + (x.round() - x).detach()


def log_statistics(latents: Tensor, outputs: Tensor) -> dict[str, Tensor]:
    """For the log: variance of latents (..., D), a mean over D; mean and deviation of outputs."""
    latents, outputs = latents.detach().float().flatten(0, -2), outputs.detach().float()
    variance = latents.var(dim=0, correction=0).mean()
    return {"latent_variance": variance, "output_mean": outputs.mean(), "output_std": outputs.std()}


class FiniteScalarQuantizer(nn.Module):
    """z (..., D), any real numbers → codes (..., D) in [-1, 1], D = len(levels). No parameters.

    Raises ValueError unless every level is an integer of at least 2.
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or any(level != int(level) or level < 2 for level in levels):
            raise ValueError(f"FSQ levels must be integers of at least 2, got {list(levels)}")
        self.codebook_size = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]  # mixed radix: 4·4·4 → 1, 4, 16
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """(..., D) → (..., D) in (-1, 1), in float32: bfloat16 is too coarse for a fine grid."""
        return torch.tanh(z.float())

    def forward(self, z: Tensor) -> Tensor:
        half = (self.levels - 1) / 2  # L levels lie at 0 … L-1, centred on `half`
        return round_straight_through((self.bound(z) + 1) * half) / half - 1

    def nearest(self, latents: Tensor) -> Tensor:
        """latents (..., D) → the nearest codes on the grid."""
        half = (self.levels - 1) / 2
        return ((latents.clamp(-1, 1) + 1) * half).round() / half - 1

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """codes (..., D) on the grid → indices (...) in [0, codebook_size)."""
        digits = ((codes + 1) * (self.levels - 1) / 2).round().long()
        return (digits * self.basis).sum(-1)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """indices (...) in [0, codebook_size) → codes (..., D) in [-1, 1]."""
        digits = indices.unsqueeze(-1) // self.basis % self.levels
        return digits / ((self.levels - 1) / 2) - 1
