"""p(a | s, s′) as a conditional flow: a learned velocity field carries noise to actions.

This is flow matching (arXiv:2210.02747, §4). Training samples noise x₀ ~ N(0, I), a time
t ~ U(0, 1), and the action x₁ of a triplet. At x_t = (1 − t)·x₀ + t·x₁ the field learns the
velocity x₁ − x₀. Where several actions explain the same (s, s′), the field carries a share of the
noise to each of them. A regression would learn their mean.

Sampling integrates the field from t = 0 to 1. Straighter paths need fewer steps. Reflow
(arXiv:2209.03003, §2.2) trains again on pairs of noise and the action that the flow made of it.
The paths become nearly straight, and then one step is enough.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLERS = ("euler", "midpoint")


class ConditionalBlock(nn.Module):
    """Two convolutions over the chunk. Between them the condition scales and shifts each channel.

    This is FiLM (arXiv:1709.07871). x (B, channels_in, chunk) → (B, channels_out, chunk).
    """

    def __init__(self, channels_in: int, channels_out: int, cond_dim: int):
        super().__init__()
        self.first = nn.Conv1d(channels_in, channels_out, 3, padding=1)
        self.second = nn.Conv1d(channels_out, channels_out, 3, padding=1)
        self.film = nn.Linear(cond_dim, 2 * channels_out)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.film(cond).unsqueeze(-1).chunk(2, dim=1)  # (B, channels, 1) each
        return self.skip(x) + self.second(F.silu(self.first(F.silu(x)) * (1 + scale) + shift))


class FlowInverseDynamics(nn.Module):
    """s and s′ (B, state_dim), actions (B, chunk, action_dim).

    The field is a 1-D U-Net over the chunk. Each level halves the length while it is above 1. The
    model sees s and the difference s′ − s, because s′ alone hardly differs from s. It standardises
    states, differences and actions itself (`fit_scales`).
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        chunk: int = 1,
        diffusion_step_embed_dim: int = 16,
        down_dims: list[int] = (16, 32, 64),
        num_inference_steps: int = 100,
    ):
        super().__init__()
        self.chunk, self.action_dim = chunk, action_dim
        self.num_inference_steps = num_inference_steps
        self.frequencies = diffusion_step_embed_dim // 2
        cond_dim = down_dims[-1]
        self.condition = nn.Sequential(
            nn.Linear(2 * state_dim + 2 * self.frequencies, 2 * cond_dim),
            nn.SiLU(),
            nn.Linear(2 * cond_dim, cond_dim),
            nn.SiLU(),
        )
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for width_in, width_out in pairwise([action_dim, *down_dims]):
            self.down.append(ConditionalBlock(width_in, width_out, cond_dim))
        for width_in, width_out in pairwise([*reversed(down_dims), down_dims[0]]):
            self.up.append(ConditionalBlock(2 * width_in, width_out, cond_dim))
        self.out = nn.Conv1d(down_dims[0], action_dim, 1)
        for name, size in (("state", state_dim), ("change", state_dim), ("action", action_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def fit_scales(self, s: Tensor, a: Tensor, s_next: Tensor) -> None:
        """Take mean and standard deviation of the training data; 1 where a number is constant."""
        for name, values in (("state", s), ("change", s_next - s), ("action", a.flatten(0, 1))):
            std = values.std(dim=0)
            getattr(self, f"{name}_mean").copy_(values.mean(dim=0))
            getattr(self, f"{name}_std").copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def embed(self, s: Tensor, s_next: Tensor) -> Tensor:
        """→ the standardised pair (B, 2 · state_dim)."""
        n = len(self.state_mean)
        if s.shape != s_next.shape or s.shape[-1] != n:
            found = f"{s.shape[-1]} and {s_next.shape[-1]}"
            raise ValueError(f"this model is for states of {n} numbers, not {found}")
        state = (s - self.state_mean) / self.state_std
        change = (s_next - s - self.change_mean) / self.change_std
        return torch.cat([state, change], dim=-1)

    def field(self, x: Tensor, t: Tensor, pair: Tensor) -> Tensor:
        """x (B, chunk, action_dim) at times t (B,) → its velocity, the same shape."""
        angles = t[:, None] * torch.pi * 2.0 ** torch.arange(self.frequencies, device=t.device) / 2
        cond = self.condition(torch.cat([pair, angles.sin(), angles.cos()], dim=-1))
        x, passed = x.transpose(1, 2), []  # (B, action_dim, chunk)
        for i, block in enumerate(self.down):
            x = block(x, cond)
            passed.append(x)
            if i < len(self.down) - 1 and x.shape[-1] > 1:
                x = F.avg_pool1d(x, 2, ceil_mode=True)
        for block in self.up:
            skipped = passed.pop()
            x = block(torch.cat([F.interpolate(x, skipped.shape[-1]), skipped], dim=1), cond)
        return self.out(x).transpose(1, 2)

    def forward(self, s: Tensor, a: Tensor, s_next: Tensor, noise: Tensor | None = None) -> Tensor:
        """The flow-matching loss, or that of reflow if `noise` (B, chunk, action_dim) is given.

        In reflow, a is the action that the flow made of this noise.
        """
        x1 = (a - self.action_mean) / self.action_std
        x0 = torch.randn_like(x1) if noise is None else noise
        t = torch.rand(len(x1), device=x1.device)
        x = torch.lerp(x0, x1, t[:, None, None])
        return F.mse_loss(self.field(x, t, self.embed(s, s_next)), x1 - x0)

    @torch.no_grad()
    def path(
        self,
        s: Tensor,
        s_next: Tensor,
        noise: Tensor,
        steps: int | None = None,
        sampler: str = "euler",
    ) -> Tensor:
        """Carry noise (B, chunk, action_dim) along the field.

        → its values at all times (steps + 1, B, chunk, action_dim), standardised.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
        steps = steps or self.num_inference_steps
        x, pair, values = noise, self.embed(s, s_next), [noise]
        for i in range(steps):
            t = torch.full((len(x),), i / steps, device=x.device)
            velocity = self.field(x, t, pair)
            if sampler == "midpoint":
                velocity = self.field(x + velocity / (2 * steps), t + 1 / (2 * steps), pair)
            x = x + velocity / steps
            values.append(x)
        return torch.stack(values)

    def sample(
        self,
        s: Tensor,
        s_next: Tensor,
        steps: int | None = None,
        sampler: str = "euler",
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """One action chunk for each pair, (B, chunk, action_dim), in the units of the data."""
        if noise is None:
            shape = (len(s), self.chunk, self.action_dim)
            noise = torch.randn(shape, device=s.device, generator=generator)
        return self.path(s, s_next, noise, steps, sampler)[-1] * self.action_std + self.action_mean


def straightness(path: Tensor) -> float:
    """Mean squared distance between a path's velocity and its chord; 0 for straight paths.

    path (steps + 1, B, chunk, action_dim). This is S(Z) of arXiv:2209.03003, §2.2.
    """
    velocity = path.diff(dim=0) * (len(path) - 1)
    return float((velocity - (path[-1] - path[0])).square().flatten(2).sum(-1).mean())
