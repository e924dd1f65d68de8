"""The spatio-temporal transformer under all three models (Genie, arXiv:2402.15391, §2 and fig. 4).

* each block: attention over the N patches of a frame, attention over the T frames of a patch,
  one feed-forward
* time is causal and banded: a frame sees itself and the `context_length - 1` frames before it
* space has absolute positions, time has rotary ones (arXiv:2104.09864), so only distances
  between frames matter
* an optional condition per frame enters through adaptive layer norm
* finished frames can stay as cached keys and values: a new frame then costs the same at any age
* residual branches end in zero-initialised projections: untrained blocks are the identity
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Rope = tuple[Tensor, Tensor]


class SpatialPositions(nn.Module):
    """Adds a learned vector per patch to tokens (B, T, N, E).

    Frames get none: it would tie the model to the clip length of its training. They are told apart
    by rotary angles (`apply_rope`), which depend on the distance between frames only.
    """

    def __init__(self, n_patches: int, embed_dim: int):
        super().__init__()
        self.space = nn.Parameter(0.02 * torch.randn(n_patches, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.space  # (B, T, N, E)


def rope_angles(times: Tensor, dim: int) -> Rope:
    """Frame numbers (S,) → cosine and signed sine (S, dim), dim even (arXiv:2104.09864, §3.4)."""
    # the usual base of 10,000 is for thousands of positions; a window holds tens of frames
    frequency = 100.0 ** (-2 * torch.arange(dim // 2, device=times.device) / dim)
    angle = times[:, None] * frequency  # (S, dim // 2)
    return angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], dim=1)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Turn x (..., S, dim) by the angles that `rope_angles` made."""
    cos, sin = (part.to(x.dtype) for part in rope)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([b, a], dim=-1) * sin


class TemporalCache:
    """Keys and values (B·N, heads, context_length - 1, d) of the last finished frames of one block.

    Frames that are not there yet are masked, so every step is the same work, and one CUDA graph.
    Keys are kept twice: as they came, and rotated by their place in the window: small angles.
    """

    def __init__(self, context_length: int, device: torch.device | None = None):
        self.length, self.keys = context_length - 1, None
        self.filled = torch.zeros(self.length, dtype=torch.bool, device=device)

    def clear(self) -> None:
        """Forget all frames, keep the memory."""
        self.filled.zero_()

    def extend(
        self, keys: Tensor, rotated: Tensor, values: Tensor, rope: Rope, finished: bool
    ) -> tuple[Tensor, Tensor]:
        """Keys (unrotated and rotated) and values of new frames → those of past and new frames.

        finished: the new frames stay for the next call. rope: of all places, the past ones first.
        """
        n = self.length
        if self.keys is None:
            shape = (*keys.shape[:2], n, keys.shape[3])
            self.keys, self.rotated, self.values = (keys.new_zeros(shape) for _ in range(3))
        kept = (self.keys, self.rotated, self.values)  # autocast may come and go between frames
        self.keys, self.rotated, self.values = (part.to(keys.dtype) for part in kept)
        all_keys = torch.cat([self.rotated, rotated], dim=2)
        all_values = torch.cat([self.values, values], dim=2)
        if finished:  # in place, because a captured graph reads the same memory again
            self.keys.copy_(torch.cat([self.keys, keys], dim=2)[:, :, -n:])
            self.values.copy_(all_values[:, :, -n:])
            self.rotated.copy_(apply_rope(self.keys, [part[:n] for part in rope]))
            new = self.filled.new_ones(keys.shape[2])
            self.filled.copy_(torch.cat([self.filled, new])[-n:])
        return all_keys, all_values


def causal_band(
    n_queries: int, n_keys: int, context_length: int, device: torch.device | None = None
) -> Tensor:
    """Boolean (n_queries, n_keys), True where a query, one of the last frames, may look."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)
    return (key <= query) & (key > query - context_length)


class Past(NamedTuple):
    """How the frames of a patch see each other, for attention in time."""

    rope: Rope  # of all keys
    mask: Tensor  # (queries, keys)
    cache: TemporalCache | None
    finished: bool


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ/√d)·v over (batch, heads, S, d); mask is True where a query may look.

    Fused or plain is decided here. On a CPU (2 cores, AVX512-BF16) the fused kernel takes 0.15 to
    0.5 of the plain form's time in float32, 2.7 to 10 times as long in bfloat16 (tools/bench.py).
    """
    if q.device.type == "cuda" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


def zero_init(layer: nn.Linear) -> nn.Linear:
    """The layer, with an output of zero until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, T, N, E): in space or, with a past, in time."""

    def __init__(self, embed_dim: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.out = zero_init(nn.Linear(embed_dim, embed_dim))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        B, T = x.shape[:2]
        layout = "b t n (three h d) -> three (b t) h n d"
        if past:
            layout = "b t n (three h d) -> three (b n) h t d"
        qkv = rearrange(self.qkv(x), layout, three=3, h=self.n_heads)
        if not past:
            return self.out(rearrange(attend(*qkv), "(b t) h n d -> b t n (h d)", b=B))
        q, k = apply_rope(qkv[:2], tuple(part[-T:] for part in past.rope))  # x: the last frames
        v = qkv[2]
        if past.cache is not None:
            k, v = past.cache.extend(qkv[1], k, v, past.rope, past.finished)
        return self.out(rearrange(attend(q, k, v, past.mask), "(b n) h t d -> b t n (h d)", b=B))


class AdaLN(nn.Module):
    """norm(x)·(1 + γ) + β, with γ and β from a condition per frame (DiT, arXiv:2212.09748, §3.2).

    Without a condition (cond_dim None) it is a plain layer norm. The projection starts at zero,
    which gives norm(x) exactly.
    """

    def __init__(self, embed_dim: int, cond_dim: int | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=cond_dim is None)
        if cond_dim is not None:
            self.project = zero_init(nn.Linear(cond_dim, 2 * embed_dim))

    def modulation(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Condition (B, T, cond_dim) → 1 + γ and β, (B, T, 1, E) each."""
        gamma, beta = self.project(cond).unsqueeze(2).chunk(2, dim=-1)
        return 1 + gamma, beta

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if modulation is None:
            return self.norm(x)
        scale, shift = modulation
        return torch.addcmul(shift, self.norm(x), scale)  # (B, T, N, E)


class STBlock(nn.Module):
    """Space, time, then one feed-forward, with none between the attentions (Genie §2)."""

    def __init__(self, embed_dim: int, hidden_dim: int, n_heads: int, cond_dim: int | None = None):
        super().__init__()
        self.norm_space = AdaLN(embed_dim, cond_dim)
        self.space = Attention(embed_dim, n_heads)
        self.norm_time = AdaLN(embed_dim, cond_dim)
        self.time = Attention(embed_dim, n_heads)
        self.norm_ffn = AdaLN(embed_dim, cond_dim)
        into, out = nn.Linear(embed_dim, hidden_dim), nn.Linear(hidden_dim, embed_dim)
        self.ffn = nn.Sequential(into, nn.GELU(), zero_init(out))

    def modulations(self, cond: Tensor) -> list:
        return [norm.modulation(cond) for norm in (self.norm_space, self.norm_time, self.norm_ffn)]

    def forward(self, x: Tensor, modulations: list | None, past: Past) -> Tensor:
        space, time, ffn = modulations or (None, None, None)
        x = x + self.space(self.norm_space(x, space))
        x = x + self.time(self.norm_time(x, time), past)
        return x + self.ffn(self.norm_ffn(x, ffn))


class SpatioTemporalTransformer(nn.Module):
    """x (B, T, N, E) → (B, T, N, E), normalised; cond_dim is the width of a condition per frame.

    `times` (T,) and `mask` (T, T), given together, replace the order 0 … T-1 and its causal band:
    training shows two copies of a clip at once (dynamics.py). With `cache` (from new_cache) x holds
    only the frames after the finished ones; the result equals one banded pass over all frames.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        n_heads: int,
        n_blocks: int,
        context_length: int,
        cond_dim: int | None = None,
    ):
        super().__init__()
        self.context_length, self.head_dim = context_length, embed_dim // n_heads
        self.blocks = nn.ModuleList(
            STBlock(embed_dim, hidden_dim, n_heads, cond_dim) for _ in range(n_blocks)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.recompute = False  # keep only the inputs of blocks for the backward pass

    def new_cache(self) -> list[TemporalCache]:
        return [TemporalCache(self.context_length, self.norm.weight.device) for _ in self.blocks]

    def modulations(self, cond: Tensor) -> list:
        """What a condition (B, T, cond_dim) does to every norm: the same in all MaskGIT passes."""
        return [block.modulations(cond) for block in self.blocks]

    def forward(
        self,
        x: Tensor,
        modulations: list | None = None,
        times: Tensor | None = None,
        mask: Tensor | None = None,
        cache: list | None = None,
        finished: bool = False,
    ) -> Tensor:
        T = x.shape[1]
        if mask is None:
            n = 0 if cache is None else cache[0].length
            times = torch.arange(n + T, device=x.device)
            mask = causal_band(T, n + T, self.context_length, x.device)
            if n:
                mask[:, :n] &= cache[0].filled
        rope = rope_angles(times, self.head_dim)  # once for all blocks
        for i, block in enumerate(self.blocks):
            past = Past(rope, mask, cache[i] if cache else None, finished)
            inputs = (x, modulations[i] if modulations else None, past)
            if self.recompute and self.training:
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self.norm(x)
