"""p(a | s, s′) as a conditional flow: noise is carried to actions along a learned field (flow matching, arXiv:2210.02747, §4).

Training draws noise x₀ ~ N(0, I), a time t ~ U(0, 1), and the action x₁ of a triplet; at x_t = (1 − t)·x₀ + t·x₁ the field learns to point along
x₁ − x₀. Where several actions explain the same (s, s′), the field carries a share of the noise to each of them: a regression would learn their
mean. Sampling integrates the field from t = 0 to 1; the straighter its paths, the fewer steps that takes. Reflow (arXiv:2209.03003, §2.2) trains once
more on pairs of a noise and the action it was carried to, and makes the paths nearly straight: then one step is enough.
"""
import torch
import torch.nn.functional as F
from torch import nn

SAMPLERS = ("euler", "midpoint")


class ConditionalBlock(nn.Module):
    """Two convolutions over the chunk, with a scale and a shift per channel from the condition between them (FiLM, arXiv:1709.07871)."""

    def __init__(self, channels_in, channels_out, cond_dim):
        super().__init__()
        self.first = nn.Conv1d(channels_in, channels_out, 3, padding=1)
        self.second = nn.Conv1d(channels_out, channels_out, 3, padding=1)
        self.film = nn.Linear(cond_dim, 2 * channels_out)
        self.skip = nn.Conv1d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x, cond):
        scale, shift = self.film(cond).unsqueeze(-1).chunk(2, dim=1)  # (B, channels, 1) each
        return self.skip(x) + self.second(F.silu(self.first(F.silu(x)) * (1 + scale) + shift))


class FlowInverseDynamics(nn.Module):
    """s and s′ (B, state_dim), actions (B, chunk, action_dim). A 1-D U-Net over the chunk is the field; each level halves what it can.

    States, their difference and actions are standardised inside (`fit_scales`), because s and s′ alone hardly differ.
    """

    def __init__(self, state_dim, action_dim, chunk=1, diffusion_step_embed_dim=16, down_dims=(16, 32, 64), num_inference_steps=100):
        super().__init__()
        self.chunk, self.action_dim, self.num_inference_steps = chunk, action_dim, num_inference_steps
        self.frequencies = diffusion_step_embed_dim // 2
        cond_dim = down_dims[-1]
        self.condition = nn.Sequential(
            nn.Linear(2 * state_dim + 2 * self.frequencies, 2 * cond_dim), nn.SiLU(), nn.Linear(2 * cond_dim, cond_dim), nn.SiLU()
        )
        widths = [action_dim, *down_dims]
        self.down = nn.ModuleList(ConditionalBlock(a, b, cond_dim) for a, b in zip(widths, down_dims))
        self.up = nn.ModuleList(ConditionalBlock(2 * a, b, cond_dim) for a, b in zip(reversed(down_dims), reversed([down_dims[0], *down_dims[:-1]])))
        self.out = nn.Conv1d(down_dims[0], action_dim, 1)
        for name, size in (("state", state_dim), ("change", state_dim), ("action", action_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def fit_scales(self, s, a, s_next):
        """Take mean and spread of the training data; what never changes keeps a spread of 1."""
        for name, values in (("state", s), ("change", s_next - s), ("action", a.flatten(0, 1))):
            std = values.std(dim=0)
            getattr(self, f"{name}_mean").copy_(values.mean(dim=0))
            getattr(self, f"{name}_std").copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def embed(self, s, s_next):
        """→ the standardised pair (B, 2 · state_dim)."""
        if s.shape != s_next.shape or s.shape[-1] != len(self.state_mean):
            raise ValueError(f"this model is for states of {len(self.state_mean)} numbers, not {s.shape[-1]} and {s_next.shape[-1]}")
        return torch.cat([(s - self.state_mean) / self.state_std, (s_next - s - self.change_mean) / self.change_std], dim=-1)

    def field(self, x, t, pair):
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

    def forward(self, s, a, s_next, noise=None):
        """The flow-matching loss; with `noise` (B, chunk, action_dim) given, that of reflow: a is what the noise was carried to."""
        x1 = (a - self.action_mean) / self.action_std
        x0 = torch.randn_like(x1) if noise is None else noise
        t = torch.rand(len(x1), device=x1.device)
        x = torch.lerp(x0, x1, t[:, None, None])
        return F.mse_loss(self.field(x, t, self.embed(s, s_next)), x1 - x0)

    @torch.no_grad()
    def path(self, s, s_next, noise, steps=None, sampler="euler"):
        """Carry noise (B, chunk, action_dim) along the field → its places at all times (steps + 1, B, chunk, action_dim), standardised."""
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
        steps = steps or self.num_inference_steps
        x, pair, places = noise, self.embed(s, s_next), [noise]
        for i in range(steps):
            t = torch.full((len(x),), i / steps, device=x.device)
            velocity = self.field(x, t, pair)
            if sampler == "midpoint":
                velocity = self.field(x + velocity / (2 * steps), t + 1 / (2 * steps), pair)
            x = x + velocity / steps
            places.append(x)
        return torch.stack(places)

    def sample(self, s, s_next, steps=None, sampler="euler", generator=None, noise=None):
        """One action chunk for each pair, (B, chunk, action_dim), in the data's own units."""
        if noise is None:
            noise = torch.randn(len(s), self.chunk, self.action_dim, device=s.device, generator=generator)
        return self.path(s, s_next, noise, steps, sampler)[-1] * self.action_std + self.action_mean


def straightness(path):
    """Mean squared distance between the velocity along a path (steps + 1, B, …) and its chord: 0 if straight (arXiv:2209.03003, §2.2, S(Z))."""
    velocity = path.diff(dim=0) * (len(path) - 1)
    return float((velocity - (path[-1] - path[0])).square().flatten(2).sum(-1).mean())
