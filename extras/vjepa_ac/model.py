"""V-JEPA 2's video transformer, its masked pre-training, and the action-conditioned predictor on top (arXiv:2506.09985).

  * Encoder: 3-D patches → tokens. Names of the weights as in the public checkpoints, which load with load_encoder.
  * MaskedPredictor: from the tokens that are shown to the features of those that are not; only for pre-training.
  * ActionPredictor: [action, state, tokens] of each tubelet, frame-causal → tokens of the next one.

B clips · T frames, T/2 tubelets · N tokens of a tubelet · E width of the encoder. Features are layer-normed without weights, as in V-JEPA.
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from models.checkpoint import CheckpointError
from models.st_transformer import attend

# Side of the pictures; width, depth and heads of encoder, masked predictor and action predictor; what the scripts take unless told otherwise.
SIZES = {
    "vit-l": dict(  # the seed's, with the rates of V-JEPA 2
        size=256, encoder=(1024, 24, 16), masked=(384, 12, 12), predictor=(1024, 24, 16),
        pretrain=dict(learning_rate=5.25e-4), train=dict(learning_rate=4.25e-4),
    ),
    "nano": dict(  # minutes on two CPU cores
        size=64, encoder=(192, 4, 3), masked=(128, 3, 2), predictor=(192, 2, 6),
        pretrain=dict(n_updates=450, batch_size=16, num_frames=8, every=8, buffer=1024, mirror=0.5, optimizer="muon", learning_rate=1e-3, ema=0.998, spread=0.3),
        train=dict(n_updates=4500, batch_size=8, every=4, buffer=2048, mirror=0.5, remember=16384, optimizer="muon", learning_rate=6e-3),
    ),
}  # fmt: skip
PATCH, TUBELET = 16, 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as V-JEPA was trained


def normalised(x):
    return F.layer_norm(x, x.shape[-1:])


# --- transformer -------------------------------------------------------------------------------------------------
def positions(T, H, W, device=None):
    """→ (T·H·W, 3): time, row and column of each token."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in (T, H, W)), indexing="ij"), dim=-1).flatten(0, 2)


def rotation(places, head_dim, public=False):
    """Angles of rotary positions: places (…, 3) → (…, head_dim), a third of the channels for each axis, rounded down to even; the rest is not rotated.

    Neighbouring channels are a pair, and both get the same angle. `public`: they get different ones, which is no rotation; V-JEPA 2's code lines
    its frequencies up for halves, not for neighbours, and its released weights have learned with that (src/models/utils/modules.py there).
    """
    d = 2 * (head_dim // 3 // 2)
    frequencies = 10000.0 ** -(torch.arange(d // 2, device=places.device) / (d / 2))
    angles = places[..., None].float() * frequencies  # (…, 3, d/2)
    angles = (torch.cat([angles, angles], dim=-1) if public else angles.repeat_interleave(2, dim=-1)).flatten(-2)  # (…, 3d)
    return F.pad(angles, (0, head_dim - 3 * d))


def sincos(places, dim):
    """Fixed 3-D sinusoids, as V-JEPA 1's configurations ask for them: a third of the channels, rounded up to even, for each axis. (…, 3) → (…, dim)."""
    half = math.ceil(dim / 6)
    angles = places[..., None].float() * 10000.0 ** -(torch.arange(half, device=places.device) / half)  # (…, 3, half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :dim]


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, turn, T):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if turn is not None:
            q, k = (y * turn[0] + torch.stack((-y[..., 1::2], y[..., ::2]), dim=-1).flatten(-2) * turn[1] for y in (q, k))
        n = x.shape[1] // T  # frame by frame: a query sees the keys of its frame and of those before
        x = torch.cat([attend(q[:, :, t * n : (t + 1) * n], k[:, :, : (t + 1) * n], v[:, :, : (t + 1) * n]) for t in range(T)], dim=2)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), MLP(dim, hidden)

    def forward(self, x, turn, T):
        x = x + self.attn(self.norm1(x), turn, T)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Pre-norm blocks and a last norm. x (B, n, dim), places (n, 3) or (B, n, 3).

    kind of positions: "rotary", "rotary-public" (see rotation), or "sinusoid": not here, x brings them.

    The n tokens are T frames of equal size and attention is causal among them, to all sides within each. T = 1: to all sides.
    """

    def __init__(self, dim, depth, heads, kind="rotary", hidden=None):
        super().__init__()
        self.head_dim, self.kind = dim // heads, kind
        self.blocks = nn.ModuleList([Block(dim, heads, hidden or 4 * dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def start(self):
        """Initial weights as V-JEPA's: small, and what is added to the stream the smaller the deeper."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for i, block in enumerate(self.blocks, 1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.data /= math.sqrt(2 * i)

    def run(self, x, places, T=1):
        turn = None
        if self.kind != "sinusoid":
            angles = rotation(places, self.head_dim, public=self.kind == "rotary-public")
            turn = [y.unsqueeze(-3).to(x.dtype) for y in (angles.cos(), angles.sin())]  # (…, 1, n, head_dim): the same for all heads
        for block in self.blocks:
            x = block(x, turn, T)
        return self.norm(x)


class PatchEmbed(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, (TUBELET, PATCH, PATCH), (TUBELET, PATCH, PATCH))


class Encoder(Transformer):
    """video uint8 (B, T, 3, S, S), T even → tokens (B, T/2·N, E), after the last norm; with `shown` (B, n), only of those tokens, from those alone."""

    def __init__(self, size=256, dim=1024, depth=24, heads=16, kind="rotary", hidden=None):
        super().__init__(dim, depth, heads, kind, hidden)
        self.size, self.dim, self.grid = size, dim, size // PATCH
        self.patch_embed = PatchEmbed(dim)
        self.start()

    def forward(self, video, shown=None):
        B, T, _, H, W = video.shape
        x = rearrange(video, "b (t p) c (h q) (w r) -> b (t h w) (c p q r)", p=TUBELET, q=PATCH, r=PATCH)
        places = positions(T // TUBELET, H // PATCH, W // PATCH, video.device)
        if shown is not None:
            x, places = x.gather(1, shown[..., None].expand(-1, -1, x.shape[2])), places[shown]
        mean, std = (255 * torch.tensor(y, device=x.device).repeat_interleave(TUBELET * PATCH * PATCH) for y in (MEAN, STD))
        x = (x.float() - mean).mul_(1 / std)
        x = F.linear(x, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias)  # the same as a convolution without overlap
        if self.kind == "sinusoid":
            x = x + sincos(places, self.dim).to(x.dtype)
        return self.run(x, places)

    def each_tubelet(self, video):
        """→ normalised features (B, T/2, N, E), each tubelet encoded alone.

        The seed encodes the clip at once; but attention looks both ways, so the features of a tubelet would know of later frames, and a
        predictor that gets them as context would only have to read out the answer. V-JEPA 2-AC encodes each frame alone, too.
        """
        B, T = video.shape[:2]
        x = normalised(self(video.reshape(B * T // TUBELET, TUBELET, *video.shape[2:])).float())
        return x.view(B, T // TUBELET, *x.shape[1:])


def load_encoder(path, kind="rotary-public"):
    """An Encoder with the weights of a public checkpoint file: of V-JEPA 2, or with kind="sinusoid" of V-JEPA 1. Raises CheckpointError for another file.

    Of the two encoders in a file the target encoder is taken, as V-JEPA 2's evaluations do. A saved pos_embed is not needed: V-JEPA 1's is computed
    again, and V-JEPA 2 carries one that it does not use (facebookresearch/vjepa2, src/hub/backbones.py).
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name.removeprefix("module.").removeprefix("backbone."): weight for name, weight in saved["target_encoder" if "target_encoder" in saved else "encoder"].items()}
        weights.pop("pos_embed", None)
        dim = weights["patch_embed.proj.bias"].shape[0]
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        encoder = Encoder(256, dim, depth, {1280: 16}.get(dim, dim // 64), kind, len(weights["blocks.0.mlp.fc1.bias"]))  # heads of 64 channels, but ViT-H
        encoder.load_state_dict({name: weight.float() for name, weight in weights.items()})
    except Exception as error:  # whatever a foreign file may hold
        raise CheckpointError(f"{path} is no public V-JEPA checkpoint ({type(error).__name__}: {str(error).splitlines()[0][:200]})") from None
    return encoder


# --- pre-training ------------------------------------------------------------------------------------------------
MASKS = ((8, 0.15), (2, 0.7))  # V-JEPA: eight small blocks, or two large ones, through the whole clip


def block_masks(B, T, grid, n_blocks, area, device=None):
    """Multi-block masks over T tubelets of grid × grid tokens. → (shown (B, n), hidden (B, m)): numbers of the tokens, each sorted.

    The blocks of a batch have one size (aspect 0.75-1.5), their places differ. What they leave free is shown. n and m are the
    smallest of the batch, and what is too much in a clip is left out at random, so that no corner is favoured.
    """
    aspect = float(torch.empty(1).uniform_(0.75, 1.5))
    h, w = (min(grid, max(1, round(math.sqrt(area * grid * grid * a)))) for a in (aspect, 1 / aspect))
    h -= h == w == grid  # on a tiny grid: something must be left
    hidden = torch.zeros(B, grid, grid, dtype=torch.bool)
    for clip in hidden:
        while True:
            clip[:] = False
            for y, x in zip(torch.randint(grid - h + 1, (n_blocks,)), torch.randint(grid - w + 1, (n_blocks,))):
                clip[y : y + h, x : x + w] = True
            if not clip.all():
                break
    hidden = hidden.flatten(1)

    def some_of(mask):
        n = int(mask.sum(1).min())
        chosen = (mask + 0.5 * torch.rand(mask.shape)).topk(n, dim=1).indices.sort(dim=1).values  # (B, n)
        return (torch.arange(T)[:, None] * grid * grid + chosen[:, None]).flatten(1).to(device)  # the same in all tubelets

    return some_of(~hidden), some_of(hidden)


class MaskedPredictor(Transformer):
    """features of the shown tokens (B, n, E), shown (B, n), hidden (B, m) → the features of the hidden (B, m, E)."""

    def __init__(self, grid, tubelets, encoder_dim, dim, depth, heads):
        super().__init__(dim, depth, heads)
        self.embed, self.project = nn.Linear(encoder_dim, dim), nn.Linear(dim, encoder_dim)
        self.mask_tokens = nn.ParameterList([torch.zeros(dim) for _ in MASKS])  # one per kind of mask
        self.register_buffer("places", positions(tubelets, grid, grid), persistent=False)
        self.start()

    def forward(self, x, shown, hidden, kind):
        x = torch.cat([self.embed(x), self.mask_tokens[kind].expand(*hidden.shape, -1).to(x.dtype)], dim=1)
        return self.project(self.run(x, self.places[torch.cat([shown, hidden], dim=1)])[:, shown.shape[1] :])


def crowding(features):
    """features (n, E), centred → how far they are from channels that all vary and say different things (VICReg, arXiv:2105.04906, eq. 1 and 3)."""
    std = (features.var(0) + 1e-4).sqrt()
    covariance = features.T @ features / (len(features) - 1)
    return F.relu(1 - std).mean() + 0.04 * (covariance - torch.diag(covariance.diagonal())).square().sum() / features.shape[1]  # 1 : 25, as there


@torch.no_grad()
def health(features):
    """features (B, n, E) → (mean standard deviation of a feature, effective rank: the exponential of the entropy of the covariance's spectrum).

    Both look at how clips differ at the same place, so that features which say no more than where they are count as collapsed: 0 and 1.
    """
    x = (features - features.mean(0)).flatten(0, -2).float()
    spectrum = torch.linalg.svdvals(x.T @ x / len(x))
    share = torch.cat([spectrum[:1] + 1e-8, spectrum[1:]]) / (spectrum.sum() + 1e-8)
    share = share.clamp(min=1e-12)
    return float(x.std(0).mean()), float(torch.exp(-(share * share.log()).sum()))


# --- prediction from actions -------------------------------------------------------------------------------------
class ActionPredictor(Transformer):
    """features (B, T, N, E), actions (B, T, D), states (B, T, 2) → (B, T, N, E): entry t predicts the features of tubelet t + 1 from what came until t."""

    def __init__(self, grid, encoder_dim=1024, action_dim=13, dim=1024, depth=24, heads=16):
        super().__init__(dim, depth, heads)
        self.grid = grid
        self.embed, self.project = nn.Linear(encoder_dim, dim), nn.Linear(dim, encoder_dim)
        self.embed_action, self.embed_state = nn.Linear(action_dim, dim), nn.Linear(2, dim)
        self.start()

    def forward(self, features, actions, states):
        B, T, N, _ = features.shape
        x = torch.cat([self.embed_action(actions)[:, :, None], self.embed_state(states)[:, :, None], self.embed(features)], dim=2)
        places = positions(T, self.grid, self.grid, x.device).view(T, N, 3)
        when = F.pad(torch.arange(T, device=x.device)[:, None, None].expand(T, 2, 1), (0, 2))  # action and state have a time, but no row and column
        x = self.run(x.flatten(1, 2), torch.cat([when, places], dim=1).flatten(0, 1), T)
        return normalised(self.project(x.view(B, T, N + 2, -1)[:, :, 2:]))

    def rollout(self, features, actions, states, steps):
        """Play on from features (B, t, N, E), with actions and states (B, ≥ t + steps − 1, …). → the `steps` predicted tubelets (B, steps, N, E).

        The context grows: what is known, then what was predicted (V-JEPA 2-AC; the seed keeps only the last prediction).
        """
        t = features.shape[1]
        for now in range(t, t + steps):
            features = torch.cat([features, self(features, actions[:, :now], states[:, :now])[:, -1:]], dim=1)
        return features[:, t:]


def losses(predictor, features, actions, states, auto_steps=2, exponent=1):
    """features (B, T, N, E), actions (B, T−1, D), states (B, T, 2) → (teacher-forced loss, loss of a rollout from the first tubelet).

    Each is a mean of |difference|^exponent / exponent (V-JEPA 2-AC: 1; the seed: squares). Both are added up for training.
    """

    def error(predicted, truth):
        return ((predicted - truth).abs() ** exponent).mean() / exponent

    forced = predictor(features[:, :-1], actions, states[:, :-1])
    first = forced[:, :1]  # is also the first step of the rollout
    more = predictor.rollout(torch.cat([features[:, :1], first], dim=1), actions, states, auto_steps - 1) if auto_steps > 1 else first[:, :0]
    return error(forced, features[:, 1:]), error(torch.cat([first, more], dim=1), features[:, 1 : auto_steps + 1])
