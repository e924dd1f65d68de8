"""V-JEPA 2's video transformer, its masked pre-training, and the predictor with actions on top.

The paper is arXiv:2506.09985.

  * Encoder: 3-D patches → tokens. Weights have the names of the public checkpoints, which
    load_encoder reads.
  * MaskedPredictor: features of the visible tokens → features of the hidden ones. Only
    pre-training uses it.
  * ActionPredictor: [action, state, tokens] of each tubelet → tokens of the next tubelet. Attention
    is causal from tubelet to tubelet.

B clips · T frames, T/2 tubelets · N tokens of a tubelet · E width of the encoder. Features are
normalised by a layer norm without weights, as in V-JEPA. "The reference text" is the description
that this folder follows; the README says where the text and the public code disagree.
"""

import math
from pathlib import Path

from utils.cli import CheckpointError

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.st_transformer import Rope, attend, causal_band

# Side of the pictures; width, depth and heads of encoder, masked predictor and action predictor;
# and the defaults of the two training scripts.
SIZES = {
    "vit-l": dict(  # sizes of the reference text, learning rates of V-JEPA 2
        size=256,
        encoder=(1024, 24, 16),
        masked=(384, 12, 12),
        predictor=(1024, 24, 16),
        pretrain=dict(learning_rate=5.25e-4),
        train=dict(learning_rate=4.25e-4),
    ),
    "nano": dict(  # minutes on two CPU cores
        size=64,
        encoder=(192, 4, 3),
        masked=(128, 3, 2),
        predictor=(192, 2, 6),
        pretrain=dict(
            n_updates=450,
            batch_size=16,
            num_frames=8,
            every=8,
            buffer=1024,
            mirror=0.5,
            optimizer="muon",
            learning_rate=1e-3,
            ema=0.998,
            spread=0.3,
        ),
        train=dict(
            n_updates=4500,
            batch_size=8,
            every=4,
            buffer=2048,
            mirror=0.5,
            remember=16384,
            optimizer="muon",
            learning_rate=6e-3,
        ),
    ),
}
PATCH, TUBELET = 16, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as V-JEPA was trained


def normalised(x: Tensor) -> Tensor:
    """Layer norm of the last dimension, without weights."""
    return F.layer_norm(x, x.shape[-1:])


# --- transformer -----------------------------------------------------------------------------
def positions(T: int, H: int, W: int, device: torch.device | None = None) -> Tensor:
    """→ (T·H·W, 3): time, row and column of each token."""
    axes = [torch.arange(n, device=device) for n in (T, H, W)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def rope_angles(places: Tensor, head_dim: int, public: bool = False) -> Tensor:
    """Angles of 3-D rotary positions: places (…, 3) → (…, head_dim).

    Each axis gets a third of the channels, rounded down to even. The rest is not rotated. The
    spine's rope_angles has one axis and pairs the two halves of the channels. Here neighbouring
    channels are a pair, as in the public weights, and both get the same angle.

    public: the channels of a pair get different angles, so it is no rotation. V-JEPA 2's code
    orders its frequencies for halves, not for neighbours, and its released weights were trained
    like that (src/models/utils/modules.py there).
    """
    d = 2 * (head_dim // 3 // 2)
    frequencies = 10000.0 ** -(torch.arange(d // 2, device=places.device) / (d / 2))
    angles = places[..., None].float() * frequencies  # (…, 3, d/2)
    if public:
        angles = torch.cat([angles, angles], dim=-1)  # (…, 3, d)
    else:
        angles = angles.repeat_interleave(2, dim=-1)  # (…, 3, d)
    angles = angles.flatten(-2)  # (…, 3d)
    return F.pad(angles, (0, head_dim - 3 * d))


def sincos(places: Tensor, dim: int) -> Tensor:
    """Fixed 3-D sinusoids, as in V-JEPA 1's configurations: places (…, 3) → (…, dim).

    Each axis gets a third of the channels, rounded up to even.
    """
    half = math.ceil(dim / 6)
    frequencies = 10000.0 ** -(torch.arange(half, device=places.device) / half)
    angles = places[..., None].float() * frequencies  # (…, 3, half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :dim]


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair of neighbouring channels; rope: cosine and sine of the angles."""
    cos, sin = rope
    partner = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + partner * sin


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, n, dim), with the layer names of public weights."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return self.proj(rearrange(attend(q, k, v, mask), "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), MLP(dim, hidden)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, mask)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Pre-norm blocks and a last norm. x (B, n, dim), places (n, 3) or (B, n, 3).

    kind of positions: "rotary", "rotary-public" (see rope_angles), or "sinusoid", which are added
    to x before the blocks.

    The n tokens are T frames of equal size. A token sees its own frame and the earlier ones.
    With T = 1 every token sees all others.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, kind: str = "rotary", hidden: int | None = None
    ):
        super().__init__()
        self.head_dim, self.kind = dim // heads, kind
        self.blocks = nn.ModuleList([Block(dim, heads, hidden or 4 * dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def init_weights(self) -> None:
        """Initial weights as in V-JEPA: small, and residual branches smaller the deeper."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for i, block in enumerate(self.blocks, 1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.data /= math.sqrt(2 * i)

    def apply_blocks(self, x: Tensor, places: Tensor, T: int = 1) -> Tensor:
        rope = mask = None
        if self.kind != "sinusoid":
            angles = rope_angles(places, self.head_dim, public=self.kind == "rotary-public")
            # (…, 1, n, head_dim): the same for all heads
            rope = tuple(y.unsqueeze(-3).to(x.dtype) for y in (angles.cos(), angles.sin()))
        if T > 1:
            n = x.shape[1] // T  # tokens of a frame
            mask = causal_band(T, T, T, x.device).repeat_interleave(n, 0).repeat_interleave(n, 1)
        for block in self.blocks:
            x = block(x, rope, mask)
        return self.norm(x)


class PatchEmbed(nn.Module):
    """The weights of the patch embedding, under their public name; Encoder.forward uses them."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (TUBELET, PATCH, PATCH), (TUBELET, PATCH, PATCH))


class Encoder(Transformer):
    """video uint8 (B, T, 3, S, S), T even → tokens (B, T/2·N, E), after the last norm.

    With `shown` (B, n), the numbers of visible tokens: only those tokens, computed from those
    alone.
    """

    def __init__(
        self,
        size: int = 256,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        kind: str = "rotary",
        hidden: int | None = None,
    ):
        super().__init__(dim, depth, heads, kind, hidden)
        self.size, self.dim, self.grid = size, dim, size // PATCH
        self.patch_embed = PatchEmbed(dim)
        self.init_weights()

    def forward(self, video: Tensor, shown: Tensor | None = None) -> Tensor:
        _, T, _, H, W = video.shape
        sizes = dict(p=TUBELET, q=PATCH, r=PATCH)
        # (B, T/2·N, pixels of a patch)
        x = rearrange(video, "b (t p) c (h q) (w r) -> b (t h w) (c p q r)", **sizes)
        places = positions(T // TUBELET, H // PATCH, W // PATCH, video.device)  # (T/2·N, 3)
        if shown is not None:
            x, places = x.gather(1, shown[..., None].expand(-1, -1, x.shape[2])), places[shown]
        scales = 255 * torch.tensor([MEAN, STD], device=x.device)
        mean, std = scales.repeat_interleave(TUBELET * PATCH * PATCH, dim=1)
        x = (x.float() - mean).mul_(1 / std)
        # a convolution without overlap is a linear map of each patch
        x = F.linear(x, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias)
        if self.kind == "sinusoid":
            x = x + sincos(places, self.dim).to(x.dtype)
        return self.apply_blocks(x, places)

    def each_tubelet(self, video: Tensor) -> Tensor:
        """→ normalised features (B, T/2, N, E), each tubelet encoded alone.

        The reference text encodes the clip at once. Attention then looks both ways, so the features
        of a tubelet would depend on later frames. A predictor with such a context would only have
        to read out the answer. V-JEPA 2-AC also encodes each frame alone.
        """
        B, T = video.shape[:2]
        x = normalised(self(video.reshape(B * T // TUBELET, TUBELET, *video.shape[2:])).float())
        return x.view(B, T // TUBELET, *x.shape[1:])


def load_encoder(path: str | Path, kind: str = "rotary-public") -> Encoder:
    """An Encoder with the weights of a public checkpoint file.

    The file is one of V-JEPA 2, or one of V-JEPA 1 with kind="sinusoid". Raises CheckpointError for
    any other file.

    A file has two encoders. The target encoder is taken, as V-JEPA 2's evaluations do. A saved
    pos_embed is dropped: V-JEPA 1's is computed again, and V-JEPA 2 does not use its own
    (facebookresearch/vjepa2, src/hub/backbones.py).
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        saved = saved["target_encoder" if "target_encoder" in saved else "encoder"]
        weights = {}
        for name, weight in saved.items():
            weights[name.removeprefix("module.").removeprefix("backbone.")] = weight
        weights.pop("pos_embed", None)
        dim = weights["patch_embed.proj.bias"].shape[0]
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        heads = {1280: 16}.get(dim, dim // 64)  # 64 channels each, except in ViT-H
        encoder = Encoder(256, dim, depth, heads, kind, len(weights["blocks.0.mlp.fc1.bias"]))
        encoder.load_state_dict({name: weight.float() for name, weight in weights.items()})
    except Exception as error:  # a foreign file may hold anything
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        raise CheckpointError(f"{path} is no public V-JEPA checkpoint ({reason})") from None
    return encoder


# --- pre-training ----------------------------------------------------------------------------
# (number of blocks, share of a frame each): both kinds of V-JEPA's masks
MASKS = ((8, 0.15), (2, 0.7))


def block_masks(
    B: int,
    T: int,
    grid: int,
    n_blocks: int,
    area: float,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-block masks over T tubelets of grid × grid tokens.

    → (shown (B, n), hidden (B, m)): numbers of the tokens, each sorted.

    All blocks of a batch have one size (aspect 0.75-1.5), and each clip has them at other places.
    Tokens outside the blocks are shown. n and m are the smallest of the batch. Where a clip has
    more, a random choice is kept, so that no corner is favoured.
    """
    aspect = float(torch.empty(1).uniform_(0.75, 1.5))
    sides = (round(math.sqrt(area * grid * grid * a)) for a in (aspect, 1 / aspect))
    h, w = (min(grid, max(1, side)) for side in sides)
    h -= h == w == grid  # on a tiny grid a block must not cover everything
    hidden = torch.zeros(B, grid, grid, dtype=torch.bool)
    for clip in hidden:
        while True:
            clip[:] = False
            rows = torch.randint(grid - h + 1, (n_blocks,))
            columns = torch.randint(grid - w + 1, (n_blocks,))
            for y, x in zip(rows, columns, strict=True):
                clip[y : y + h, x : x + w] = True
            if not clip.all():
                break
    hidden = hidden.flatten(1)

    def some_of(mask):
        n = int(mask.sum(1).min())
        chosen = (mask + 0.5 * torch.rand(mask.shape)).topk(n, dim=1).indices.sort(dim=1).values
        # (B, n), the same in all tubelets
        tokens = torch.arange(T)[:, None] * grid * grid + chosen[:, None]
        return tokens.flatten(1).to(device)

    return some_of(~hidden), some_of(hidden)


class MaskedPredictor(Transformer):
    """features of the visible tokens (B, n, E) → features of the hidden ones (B, m, E).

    shown (B, n) and hidden (B, m) are the numbers of these tokens; kind is the index of the mask.
    """

    def __init__(
        self, grid: int, tubelets: int, encoder_dim: int, dim: int, depth: int, heads: int
    ):
        super().__init__(dim, depth, heads)
        self.embed, self.project = nn.Linear(encoder_dim, dim), nn.Linear(dim, encoder_dim)
        # one per kind of mask
        self.mask_tokens = nn.ParameterList([torch.zeros(dim) for _ in MASKS])
        self.register_buffer("places", positions(tubelets, grid, grid), persistent=False)
        self.init_weights()

    def forward(self, x: Tensor, shown: Tensor, hidden: Tensor, kind: int) -> Tensor:
        x = self.embed(x)  # (B, n, dim)
        masked = self.mask_tokens[kind].expand(*hidden.shape, -1).to(x.dtype)  # (B, m, dim)
        places = self.places[torch.cat([shown, hidden], dim=1)]  # (B, n + m, 3)
        x = self.apply_blocks(torch.cat([x, masked], dim=1), places)
        return self.project(x[:, shown.shape[1] :])  # (B, m, E)


def vicreg_penalty(features: Tensor) -> Tensor:
    """features (n, E), centred → penalty on channels that hardly vary or vary together.

    These are the variance and the covariance term of VICReg (arXiv:2105.04906, §4.1), weighted
    25 : 1 as there.
    """
    std = (features.var(0) + 1e-4).sqrt()
    covariance = features.T @ features / (len(features) - 1)
    others = covariance - torch.diag(covariance.diagonal())
    return F.relu(1 - std).mean() + 0.04 * others.square().sum() / features.shape[1]


@torch.no_grad()
def std_and_rank(features: Tensor) -> tuple[float, float]:
    """features (B, n, E) → (mean standard deviation of a feature, effective rank).

    The effective rank is the exponential of the entropy of the covariance's spectrum. Both numbers
    measure how clips differ at the same place. Features that encode only their own place count as
    collapsed and give 0 and 1.
    """
    x = (features - features.mean(0)).flatten(0, -2).float()  # (B·n, E)
    spectrum = torch.linalg.svdvals(x.T @ x / len(x))
    share = torch.cat([spectrum[:1] + 1e-8, spectrum[1:]]) / (spectrum.sum() + 1e-8)
    share = share.clamp(min=1e-12)
    return float(x.std(0).mean()), float(torch.exp(-(share * share.log()).sum()))


# --- prediction from actions -----------------------------------------------------------------
class ActionPredictor(Transformer):
    """features (B, T, N, E), actions (B, T, D), states (B, T, 2) → (B, T, N, E).

    Entry t predicts the features of tubelet t + 1 from everything up to t.
    """

    def __init__(
        self,
        grid: int,
        encoder_dim: int = 1024,
        action_dim: int = 13,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
    ):
        super().__init__(dim, depth, heads)
        self.grid = grid
        self.embed, self.project = nn.Linear(encoder_dim, dim), nn.Linear(dim, encoder_dim)
        self.embed_action, self.embed_state = nn.Linear(action_dim, dim), nn.Linear(2, dim)
        self.init_weights()

    def forward(self, features: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        B, T, N, _ = features.shape
        action, state = self.embed_action(actions), self.embed_state(states)  # (B, T, dim)
        # (B, T, N + 2, dim)
        x = torch.cat([action[:, :, None], state[:, :, None], self.embed(features)], dim=2)
        places = positions(T, self.grid, self.grid, x.device).view(T, N, 3)
        # action and state have a time, but no row and column
        times = torch.arange(T, device=x.device)[:, None, None].expand(T, 2, 1)
        places = torch.cat([F.pad(times, (0, 2)), places], dim=1).flatten(0, 1)
        x = self.apply_blocks(x.flatten(1, 2), places, T)
        return normalised(self.project(x.view(B, T, N + 2, -1)[:, :, 2:]))

    def rollout(self, features: Tensor, actions: Tensor, states: Tensor, steps: int) -> Tensor:
        """Continue features (B, t, N, E) with actions and states (B, ≥ t + steps − 1, …).

        → the `steps` predicted tubelets (B, steps, N, E). The context holds the known features and
        then all predictions (V-JEPA 2-AC). The reference text keeps only the last prediction.
        """
        t = features.shape[1]
        for now in range(t, t + steps):
            predicted = self(features, actions[:, :now], states[:, :now])
            features = torch.cat([features, predicted[:, -1:]], dim=1)
        return features[:, t:]


def losses(
    predictor: ActionPredictor,
    features: Tensor,
    actions: Tensor,
    states: Tensor,
    auto_steps: int = 2,
    exponent: float = 1,
) -> tuple[Tensor, Tensor]:
    """features (B, T, N, E), actions (B, T−1, D), states (B, T, 2) → two losses.

    The first is teacher-forced, the second that of a rollout from the first tubelet. Each is a mean
    of |difference|^exponent / exponent (V-JEPA 2-AC: exponent 1; the reference text: 2). Training
    minimises their sum.
    """

    def error(predicted, truth):
        return ((predicted - truth).abs() ** exponent).mean() / exponent

    forced = predictor(features[:, :-1], actions, states[:, :-1])
    rolled = forced[:, :1]  # the first step of the rollout is the same prediction
    if auto_steps > 1:
        known = torch.cat([features[:, :1], rolled], dim=1)
        more = predictor.rollout(known, actions, states, auto_steps - 1)
        rolled = torch.cat([rolled, more], dim=1)
    return error(forced, features[:, 1:]), error(rolled, features[:, 1 : auto_steps + 1])
