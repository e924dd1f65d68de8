"""The spatio-temporal transformer under all three models (Genie, arXiv:2402.15391, §2 and fig. 4).

  * each block: attention over the N patches of a frame, attention over the T frames of a patch, one feed-forward
  * time is causal and banded: a frame sees itself and the `context_length - 1` frames before it
  * space has absolute positions, time has rotary ones (arXiv:2104.09864), so only distances between frames matter
  * an optional condition per frame enters through adaptive layer norm
  * finished frames can stay behind as cached keys and values: a new frame then costs the same at any age
  * residual branches end in zero-initialised projections: the untrained stack is the identity, up to its last norm
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint


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
    def rotation(times, dim):
        """What `rotate` takes: cosine and signed sine (S, dim) of the angles at frame numbers times (S,), dim even; computed once for all blocks."""
        # the usual base of 10,000 is for thousands of positions; a window holds tens of frames
        frequency = 100.0 ** (-2 * torch.arange(dim // 2, device=times.device) / dim)
        angle = times[:, None] * frequency  # (S, dim // 2)
        sin = angle.sin()
        return angle.cos().repeat(1, 2), torch.cat([-sin, sin], dim=1)

    @staticmethod
    def rotate(x, rotation):
        """Rotary encoding of x (..., S, d) by the (cos, sin) of `rotation`."""
        cos, sin = (part.to(x.dtype) for part in rotation)
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([b, a], dim=-1) * sin


class TemporalCache:
    """Keys and values of the last context_length - 1 finished frames of one block, (B·N, heads, context_length - 1, d).

    The shape is the same from the first frame on (what is not there yet is masked), so every step is the same work and can be captured
    as one CUDA graph. Keys are stored as they came and rotated by their place in the window: angles do not grow with age.
    """

    def __init__(self, context_length: int, device=None):
        self.length, self.keys = context_length - 1, None
        self.filled = torch.zeros(self.length, dtype=torch.bool, device=device)

    def clear(self):
        """Forget all frames, keep the memory."""
        self.filled.zero_()

    def extend(self, keys, rotated, values, rotation, finished: bool):
        """Keys (as they came, and rotated) and values of new frames → past and present ones, keys rotated. `finished` frames also stay for the next call.

        rotation: the (cos, sin) of all places, those of the past first.
        """
        rotate, n = SpatioTemporalPositionalEncoding.rotate, self.length
        if self.keys is None:
            self.keys, self.rotated, self.values = (keys.new_zeros(*keys.shape[:2], n, keys.shape[3]) for _ in range(3))
        together = torch.cat([self.rotated, rotated], dim=2), torch.cat([self.values, values], dim=2)
        if finished:  # in place: a captured graph goes on reading the same memory
            self.keys.copy_(torch.cat([self.keys, keys], dim=2)[:, :, -n:])
            self.values.copy_(together[1][:, :, -n:])
            self.rotated.copy_(rotate(self.keys, [part[:n] for part in rotation]))
            self.filled.copy_(torch.cat([self.filled, self.filled.new_ones(keys.shape[2])])[-n:])
        return together


def causal_band(n_queries: int, n_keys: int, context_length: int, device=None):
    """Boolean (n_queries, n_keys), True where a frame may look; the queries are the last of the keys' frames."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)
    return (key <= query) & (key > query - context_length)


def attend(q, k, v, mask=None):
    """softmax(q·kᵀ/√d)·v over (batch, heads, S, d); mask is boolean, True where a query may look.

    Fused or plain is decided here. On CUDA the fused kernel is the better one. On a CPU it takes 0.15 to 0.5 of the plain form's time in
    float32 but 2.7 to 10 times as long in bfloat16, which it computes in float32 (2 cores, AVX512-BF16; 64 patches or 4 to 32 frames, forward
    and backward; `python bench.py` measures it again).
    """
    if q.device.type == "cuda" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, T, N, E): among the patches of a frame, or, in time, among the frames of a patch."""

    def __init__(self, embed_dim: int, n_heads: int, in_time: bool):
        super().__init__()
        self.n_heads, self.in_time = n_heads, in_time
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, rotation=None, mask=None, cache=None, finished=False):
        B, T = x.shape[:2]
        if not self.in_time:
            q, k, v = rearrange(self.qkv(x), "b t n (three h d) -> three (b t) h n d", three=3, h=self.n_heads)
            return self.out(rearrange(attend(q, k, v), "(b t) h n d -> b t n (h d)", b=B))
        qkv = rearrange(self.qkv(x), "b t n (three h d) -> three (b n) h t d", three=3, h=self.n_heads)
        q, k = SpatioTemporalPositionalEncoding.rotate(qkv[:2], [part[-T:] for part in rotation])  # x holds the last of the frames
        k, v = (k, qkv[2]) if cache is None else cache.extend(qkv[1], k, qkv[2], rotation, finished)
        return self.out(rearrange(attend(q, k, v, mask), "(b n) h t d -> b t n (h d)", b=B))


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

    def modulation(self, cond):
        """Condition (B, T, cond_dim) → 1 + γ and β, (B, T, 1, E) each."""
        gamma, beta = self.project(cond).unsqueeze(2).chunk(2, dim=-1)
        return 1 + gamma, beta

    def forward(self, x, modulation=None):
        if modulation is None:
            return self.norm(x)
        scale, shift = modulation
        return torch.addcmul(shift, self.norm(x), scale)  # (B, T, N, E)


class STBlock(nn.Module):
    """Space, time, feed-forward; one feed-forward after both attentions, none between (Genie §2)."""

    def __init__(self, embed_dim: int, hidden_dim: int, n_heads: int, cond_dim: int | None = None):
        super().__init__()
        self.norm_space, self.space = AdaLN(embed_dim, cond_dim), Attention(embed_dim, n_heads, in_time=False)
        self.norm_time, self.time = AdaLN(embed_dim, cond_dim), Attention(embed_dim, n_heads, in_time=True)
        self.norm_ffn = AdaLN(embed_dim, cond_dim)
        self.ffn = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, embed_dim))
        nn.init.zeros_(self.ffn[-1].weight)
        nn.init.zeros_(self.ffn[-1].bias)

    def modulations(self, cond):
        return [norm.modulation(cond) for norm in (self.norm_space, self.norm_time, self.norm_ffn)]

    def forward(self, x, modulations, rotation, mask, cache, finished):
        space, time, ffn = modulations or (None, None, None)
        x = x + self.space(self.norm_space(x, space))
        x = x + self.time(self.norm_time(x, time), rotation, mask, cache, finished)
        return x + self.ffn(self.norm_ffn(x, ffn))


class SpatioTemporalTransformer(nn.Module):
    """x (B, T, N, E) → (B, T, N, E), normalised; with cond_dim also modulations(condition (B, T, cond_dim)).

    `times` (T,) and `mask` (T, T) replace the default order 0 … T-1 and its causal band, for training on two copies of
    a clip at once (dynamics.py). With `cache` (from new_cache) x holds only the frames after those already finished;
    the result equals the same frames of one banded pass over everything.
    """

    def __init__(self, embed_dim, hidden_dim, n_heads, n_blocks, context_length, cond_dim=None):
        super().__init__()
        self.context_length, self.head_dim = context_length, embed_dim // n_heads
        self.blocks = nn.ModuleList(STBlock(embed_dim, hidden_dim, n_heads, cond_dim) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(embed_dim)
        self.recompute = False  # in the backward pass, instead of keeping what lies inside blocks: less memory, one more forward pass

    def new_cache(self):
        return [TemporalCache(self.context_length, self.norm.weight.device) for _ in self.blocks]

    def modulations(self, cond):
        """What the condition does to every norm; at play it is the same for all MaskGIT passes of a frame."""
        return [block.modulations(cond) for block in self.blocks]

    def forward(self, x, modulations=None, times=None, mask=None, cache=None, finished=False):
        T = x.shape[1]
        if mask is None:
            past = 0 if cache is None else cache[0].length
            times = torch.arange(past + T, device=x.device)
            mask = causal_band(T, past + T, self.context_length, x.device)
            if past:
                mask[:, :past] &= cache[0].filled
        rotation = SpatioTemporalPositionalEncoding.rotation(times, self.head_dim)
        for i, block in enumerate(self.blocks):
            inputs = (x, modulations and modulations[i], rotation, mask, None if cache is None else cache[i], finished)
            x = checkpoint(block, *inputs, use_reentrant=False) if self.recompute and self.training else block(*inputs)
        return self.norm(x)
