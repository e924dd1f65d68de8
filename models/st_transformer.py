"""The spatio-temporal transformer under all three models (Genie, arXiv:2402.15391, §2 and fig. 4).

  * each block: attention over the N patches of a frame, attention over the T frames of a patch, one feed-forward
  * time is causal and banded: a frame sees itself and the `context_length - 1` frames before it
  * space has absolute positions, time has rotary ones (arXiv:2104.09864), so only distances between frames matter
  * an optional condition per frame enters through adaptive layer norm
  * finished frames can stay behind as cached keys and values: a new frame then costs the same at any age
  * residual branches end in zero-initialised projections: the untrained stack is the identity
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class SpatioTemporalPositionalEncoding(nn.Module):
    """Positions for tokens (B, T, N, E): adds a learned vector per patch; frames are told apart by `rotate` alone.

    A vector per frame number would tie the model to the clip length it was trained on. Rotated queries and keys
    depend on the distance between frames only, so a history can slide past that length without being recomputed.
    """

    def __init__(self, n_patches: int, embed_dim: int):
        super().__init__()
        self.space = nn.Parameter(0.02 * torch.randn(n_patches, embed_dim))

    def forward(self, tokens):
        return tokens + self.space  # (B, T, N, E)

    @staticmethod
    def rotate(x, times):
        """Rotary encoding of x (..., S, d), d even, at frame numbers times (S,)."""
        half = x.shape[-1] // 2
        # the usual base of 10,000 is for thousands of positions; a window holds tens of frames
        frequency = 100.0 ** (-torch.arange(half, device=x.device) / half)
        angle = times[:, None] * frequency  # (S, d/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class TemporalCache:
    """Keys and values of the last finished frames of one block, (B·N, heads, ≤ context_length - 1, d), not rotated.

    Keys are stored before rotation and rotated by their place in the window, so angles never leave the trained range.
    """

    def __init__(self, context_length: int):
        self.keep, self.keys, self.values = context_length - 1, None, None

    def __len__(self):
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys, values, finished: bool):
        """Past and present keys and values; `finished` frames also stay for the next call."""
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        if finished:
            self.keys, self.values = keys[:, :, -self.keep :], values[:, :, -self.keep :]
        return keys, values


def causal_band(n_queries: int, n_keys: int, context_length: int, device=None):
    """Boolean (n_queries, n_keys), True where a frame may look; the queries are the last of the keys' frames."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)
    return (key <= query) & (key > query - context_length)


def attend(q, k, v, mask=None):
    """softmax(q·kᵀ/√d)·v over (batch, heads, S, d); mask is boolean, True where a query may look."""
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # The fused CPU kernel loses to the plain form at our sizes: 2-7 times slower in bfloat16, about equal in float32.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention over the sequence axis of x (batch, S, E)."""

    def __init__(self, embed_dim: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, times=None, mask=None, cache=None, finished=False):
        q, k, v = rearrange(self.qkv(x), "b s (three h d) -> three b h s d", three=3, h=self.n_heads)
        if cache is not None:
            k, v = cache.extend(k, v, finished)
        if times is not None:  # the queries are the last of the keys
            rotate = SpatioTemporalPositionalEncoding.rotate
            q, k = rotate(q, times[-q.shape[2] :]), rotate(k, times)
        return self.out(rearrange(attend(q, k, v, mask), "b h s d -> b s (h d)"))


class AdaLN(nn.Module):
    """norm(x)·(1 + γ) + β, γ and β projected from a condition per frame (DiT, arXiv:2212.09748, §3.2).

    Without a condition (cond_dim None) it is a plain layer norm. The projection starts at zero: norm(x) exactly.
    """

    def __init__(self, embed_dim: int, cond_dim: int | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=cond_dim is None)
        self.project = None if cond_dim is None else nn.Linear(cond_dim, 2 * embed_dim)
        if self.project is not None:
            nn.init.zeros_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def forward(self, x, cond=None):
        if self.project is None:
            return self.norm(x)
        gamma, beta = self.project(cond).unsqueeze(2).chunk(2, dim=-1)  # (B, T, 1, E) each
        return self.norm(x) * (1 + gamma) + beta  # (B, T, N, E)


class STBlock(nn.Module):
    """Space, time, feed-forward; one feed-forward after both attentions, none between (Genie §2)."""

    def __init__(self, embed_dim: int, hidden_dim: int, n_heads: int, cond_dim: int | None = None):
        super().__init__()
        self.norm_space, self.space = AdaLN(embed_dim, cond_dim), Attention(embed_dim, n_heads)
        self.norm_time, self.time = AdaLN(embed_dim, cond_dim), Attention(embed_dim, n_heads)
        self.norm_ffn = AdaLN(embed_dim, cond_dim)
        self.ffn = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, embed_dim))
        nn.init.zeros_(self.ffn[-1].weight)
        nn.init.zeros_(self.ffn[-1].bias)

    def forward(self, x, cond, times, mask, cache, finished):
        B = x.shape[0]
        frames = rearrange(self.norm_space(x, cond), "b t n e -> (b t) n e")
        x = x + rearrange(self.space(frames), "(b t) n e -> b t n e", b=B)
        tracks = rearrange(self.norm_time(x, cond), "b t n e -> (b n) t e")
        x = x + rearrange(self.time(tracks, times, mask, cache, finished), "(b n) t e -> b t n e", b=B)
        return x + self.ffn(self.norm_ffn(x, cond))


class SpatioTemporalTransformer(nn.Module):
    """x (B, T, N, E), condition (B, T, cond_dim) or None → (B, T, N, E), normalised.

    `times` (T,) and `mask` (T, T) replace the default order 0 … T-1 and its causal band, for training on two copies of
    a clip at once (dynamics.py). With `cache` (from new_cache) x holds only the frames after those already finished;
    the result equals the same frames of one banded pass over everything.
    """

    def __init__(self, embed_dim, hidden_dim, n_heads, n_blocks, context_length, cond_dim=None):
        super().__init__()
        self.context_length = context_length
        self.blocks = nn.ModuleList(STBlock(embed_dim, hidden_dim, n_heads, cond_dim) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(embed_dim)

    def new_cache(self):
        return [TemporalCache(self.context_length) for _ in self.blocks]

    def forward(self, x, cond=None, times=None, mask=None, cache=None, finished=False):
        T = x.shape[1]
        if mask is None:
            n_keys = T if cache is None else T + len(cache[0])
            times = torch.arange(n_keys, device=x.device)
            mask = causal_band(T, n_keys, self.context_length, x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, cond, times, mask, None if cache is None else cache[i], finished)
        return self.norm(x)
