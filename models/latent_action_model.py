"""Stage 2, the latent action model: a few actions, without labels, that explain what changes.

Genie (arXiv:2402.15391, §2.1). The encoder looks at frames t and t+1 and emits one of n_actions
codes; the decoder must predict frame t+1 from the past and that code. Only what helps to predict
the change survives the bottleneck. After training the decoder is dropped: the encoder labels the
video, and a player's keys take its place.

What keeps the codes alive and makes them mean the same everywhere (docs/choices.md has numbers):
  * the encoder sees both frames of a pair in each patch, and how well the patch matches the last
    frame shifted a little to each side (`matches`); the decoder may shift patches too (`warp`)
  * the loss is relative to copying the last frame: still games and moving cameras share settings
  * codes imitate the moves of what the past does not foretell: evaluation/news.py
  * actions are scaled to unit RMS before quantization, and half of their bits pass unrounded, so
    that gradients know where to move a code; a bonus on the entropy of codes spreads their use
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.distributed import gather_ranks, mean_over_ranks, rand
from models.fsq import FiniteScalarQuantizer, log_statistics
from models.patch_embed import PatchEmbedding, PatchUnembedding
from models.st_transformer import SpatialPositions, SpatioTemporalTransformer, zero_init

MOVES = range(-8, 9)  # pixels per frame that a patch can shift, across and down


class LatentActionsEncoder(nn.Module):
    """frames (B, T, 3, H, W) → a vector per transition (B, T-1, out_dim).

    Causal: vector t has seen frames up to t+1.
    """

    def __init__(
        self,
        out_dim: int,
        frame_size: list[int],
        patch_size: int,
        embed_dim: int,
        context_length: int,
        kind: str = "matches",
        **sizes: int,
    ):
        super().__init__()
        n_patches = (frame_size[0] // patch_size) * (frame_size[1] // patch_size)
        self.pairs, self.patch_size = kind != "frames", patch_size
        self.embed = PatchEmbedding(patch_size, embed_dim, channels=6 if self.pairs else 3)
        self.embed_matches = nn.Linear(2 * len(MOVES), embed_dim) if kind == "matches" else None
        self.positions = SpatialPositions(n_patches, embed_dim)
        window = context_length - 1 if self.pairs else context_length  # T frames make T-1 pairs
        self.transformer = SpatioTemporalTransformer(embed_dim, context_length=window, **sizes)
        self.action_head = nn.Linear(2 * embed_dim, out_dim)

    def forward(self, frames: Tensor) -> Tensor:
        inputs = frames
        if self.pairs:  # the frame, and the change that follows it, in one patch
            inputs = torch.cat([frames[:, :-1], frames.diff(dim=1)], dim=2)  # (B, T-1, 6, H, W)
        tokens = self.embed(inputs)
        if self.embed_matches is not None:
            tokens = tokens + self.embed_matches(self.mismatch(frames))
        tokens = self.transformer(self.positions(tokens))  # (B, T-1 or T, N, E)
        if self.pairs:  # a moving camera shows in the mean, a small sprite in the maximum
            pooled = torch.cat([tokens.mean(dim=2), tokens.amax(dim=2)], dim=-1)  # (B, T-1, 2E)
        else:
            pooled = torch.cat([tokens[:, :-1], tokens[:, 1:]], dim=-1).mean(dim=2)  # (B, T-1, 2E)
        return self.action_head(pooled)  # (B, T-1, out_dim)

    def mismatch(self, frames: Tensor) -> Tensor:
        """How badly each patch fits the last frame shifted by each of MOVES, across and down.

        → (B, T-1, N, 2·len(MOVES)), relative to the mean over moves. A coarser form of FlowNet's
        correlation layer (arXiv:1504.06852, §3).
        """
        gray = frames.mean(dim=2)  # (B, T, H, W)
        moves = [(move, axis) for axis in (-1, -2) for move in MOVES]
        moved = torch.stack([gray[:, :-1].roll(move, axis) for move, axis in moves], dim=2)
        error = ((moved - gray[:, 1:, None]) ** 2).flatten(0, 1)
        error = F.avg_pool2d(error, self.patch_size)  # (B(T-1), 2·len(MOVES), h, w)
        mean = error.mean(dim=1, keepdim=True)
        error = (error - mean) / (mean + 1e-4)  # a flat patch fits everywhere: 0
        return rearrange(error, "(b t) m h w -> b t (h w) m", b=len(frames))


class LatentActionsDecoder(nn.Module):
    """frames 0 … T-2 (B, T-1, 3, H, W) and actions (B, T-1, A) → frames 1 … T-1 (B, T-1, 3, H, W).

    kind "warp" shifts the pixels of the last frame by a mixture of moves per patch (after CDNA and
    DNA, arXiv:1605.07157, §3) and adds a correction; "change" only adds; "frame" draws the next
    frame from nothing. The transformer sees each patch with probability keep_rate, and the first
    frame always; the rest are mask tokens. keep_rate 1 is Genie's choice; with 0 and "frame" the
    decoder sees the first frame and the actions only. masking "training": in evaluation all are
    seen, though the decoder never learned from them.
    """

    def __init__(
        self,
        action_dim: int,
        frame_size: list[int],
        patch_size: int,
        embed_dim: int,
        context_length: int,
        keep_rate: float,
        kind: str,
        masking: str = "always",
        **sizes: int,
    ):
        super().__init__()
        n_patches = (frame_size[0] // patch_size) * (frame_size[1] // patch_size)
        self.keep_rate, self.kind, self.patch_size = keep_rate, kind, patch_size
        self.masking = masking
        self.embed = PatchEmbedding(patch_size, embed_dim)
        self.embed_action = nn.Linear(action_dim, embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(embed_dim))
        self.positions = SpatialPositions(n_patches, embed_dim)
        window = context_length - 1
        self.transformer = SpatioTemporalTransformer(embed_dim, context_length=window, **sizes)
        self.frame_head = PatchUnembedding(patch_size, embed_dim, frame_size)
        zero_init(self.frame_head.project)
        if kind == "warp":
            self.move_head = zero_init(nn.Linear(embed_dim, 2 * len(MOVES)))
            self.move_head.bias.data[MOVES.index(0) :: len(MOVES)] = 4.0  # begin with "stay"

    def mask(self, tokens: Tensor) -> Tensor:
        """Put the mask token into tokens (B, T-1, N, E), except the first frame and kept places."""
        if self.masking == "training" and not self.training:
            return tokens
        keep = rand(*tokens.shape[:3], device=tokens.device) < self.keep_rate  # (B, T-1, N)
        keep[:, 0] = True
        return torch.where(keep.unsqueeze(-1), tokens, self.mask_token.to(tokens.dtype))

    def forward(self, frames: Tensor, actions: Tensor) -> Tensor:
        tokens = self.positions(self.mask(self.embed(frames)))  # (B, T-1, N, E)
        tokens = tokens + self.embed_action(actions).unsqueeze(2)
        tokens = self.transformer(tokens)
        predicted = self.frame_head(tokens).float()  # (B, T-1, 3, H, W)
        if self.kind == "warp":
            frames = self.warp(frames, self.move_head(tokens).float())
        return predicted if self.kind == "frame" else frames + predicted

    def warp(self, frames: Tensor, moves: Tensor) -> Tensor:
        """Shift each patch by a mixture of MOVES, across and then down.

        moves (B, T-1, N, 2·len(MOVES)) are logits. What leaves at one edge enters at the opposite
        one; the correction has to repair that.
        """
        P, H = self.patch_size, frames.shape[-2]
        weights = moves.unflatten(-1, (2, -1)).softmax(dim=-1)  # (B, T-1, N, 2, len(MOVES))
        weights = rearrange(weights, "b t (h w) two m -> two m b t 1 h w", h=H // P)
        # (2, len(MOVES), B, T-1, 1, H, W)
        weights = weights.repeat_interleave(P, dim=-2).repeat_interleave(P, dim=-1)
        for axis, weight in zip((-1, -2), weights, strict=True):
            frames = sum(w * frames.roll(move, axis) for w, move in zip(weight, MOVES, strict=True))
        return frames


class LatentActionModel(nn.Module):
    """frames (B, T, 3, H, W) in [-1, 1] → actions (B, T-1) in [0, n_actions).

    actions[:, t] lies between frames t and t+1. Raises ValueError unless n_actions is a power of
    two: each of its A = log2(n_actions) dimensions has two levels. sizes: of encoder and decoder.
    """

    def __init__(
        self,
        n_actions: int = 8,
        encoder: str = "matches",
        decoder: str = "warp",
        keep_rate: float = 1.0,
        masking: str = "always",
        unit_rms: bool = True,
        soft_rate: float = 0.5,
        entropy_lambda: float = 0.25,
        var_target: float = 0.2,
        var_lambda: float = 1.0,
        **sizes,
    ):
        super().__init__()
        if n_actions < 2 or n_actions & (n_actions - 1):
            raise ValueError(f"n_actions must be a power of two (2, 4, 8, …), got {n_actions}")
        action_dim = n_actions.bit_length() - 1
        self.n_actions, self.unit_rms, self.soft_rate = n_actions, unit_rms, soft_rate
        self.entropy_lambda = entropy_lambda
        self.var_target, self.var_lambda = var_target, var_lambda
        self.context_length = sizes["context_length"]
        self.encoder = LatentActionsEncoder(action_dim, kind=encoder, **sizes)
        self.quantizer = FiniteScalarQuantizer([2] * action_dim)
        how = dict(keep_rate=keep_rate, kind=decoder, masking=masking)
        self.decoder = LatentActionsDecoder(action_dim, **how, **sizes)

    def latents(self, frames: Tensor) -> Tensor:
        """frames → actions before quantization (B, T-1, A), of unit RMS (if A > 1 and unit_rms)."""
        z = self.encoder(frames).float()
        if self.unit_rms and z.shape[-1] > 1:  # a single number would become ±1
            z = F.rms_norm(z, z.shape[-1:])
        return z

    def collapse_penalty(self, soft_bits: Tensor) -> Tensor:
        """soft_bits (B, T-1, A) in (-1, 1) → variance penalty minus entropy bonus, a scalar."""
        soft_bits = gather_ranks(soft_bits.flatten(0, 1))  # (M, A)
        variance = soft_bits.var(dim=0, correction=0)
        indices = torch.arange(self.n_actions, device=soft_bits.device)
        codes = self.quantizer.indices_to_codes(indices)  # (n_actions, A)
        p = (1 + soft_bits.unsqueeze(1) * codes) / 2  # of each bit, (M, n_actions, A)
        share = p.prod(dim=-1).mean(dim=0)  # (n_actions,), sums to 1
        # Each bit alone may vary while two bits say the same; the joint entropy sees that.
        entropy = -(share * share.clamp_min(1e-9).log()).sum()
        penalty = F.relu(self.var_target - variance).mean()
        return self.var_lambda * penalty - self.entropy_lambda * entropy

    def imitation(self, latents: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of latents (B, T-1, A) with targets (B, T-1, 2): a code and its weight."""
        bits = (self.quantizer.indices_to_codes(targets[..., 0].long()) + 1) / 2
        loss = F.binary_cross_entropy_with_logits(latents, bits, reduction="none").sum(dim=-1)
        return (targets[..., 1] * loss).sum() / (targets[..., 1] > 0).sum().clamp_min(1)

    def forward(self, frames: Tensor, targets: Tensor | None = None) -> tuple[Tensor, dict]:
        """frames → (loss, logs): error relative to copying the last frame, use of the codes."""
        latents = self.latents(frames)
        codes = self.quantizer(latents)  # (B, T-1, A), ±1
        soft_bits = self.quantizer.bound(latents)  # (B, T-1, A), between
        bits = codes
        if self.training:
            soft = rand(*codes.shape, device=codes.device) < self.soft_rate
            bits = torch.where(soft, soft_bits, codes)
        predicted = self.decoder(frames[:, :-1], bits)
        error = F.mse_loss(predicted, frames[:, 1:])
        copy_error = mean_over_ranks(F.mse_loss(frames[:, :-1], frames[:, 1:]))
        copy_error = copy_error.clamp_min(1e-8)  # a still batch has none
        loss = error / copy_error + self.collapse_penalty(soft_bits)
        if targets is not None:
            loss = loss + self.imitation(latents, targets)
        logs = {
            "error_over_copy": (error / copy_error).detach(),
            "codes_used": self.quantizer.codes_to_indices(codes.detach()).unique().numel(),
        }
        return loss, logs | log_statistics(soft_bits, predicted)

    def infer(self, frames: Tensor) -> Tensor:
        """frames (B, T, 3, H, W) → action indices (B, T-1)."""
        return self.quantizer.codes_to_indices(self.quantizer(self.latents(frames)))

    def predict(self, frames: Tensor, actions: Tensor) -> Tensor:
        """frames (B, T, 3, H, W) and action indices (B, T-1) → frames 1 … T-1 (B, T-1, 3, H, W)."""
        codes = self.quantizer.indices_to_codes(actions)
        return self.decoder(frames[:, :-1], codes).clamp(-1, 1)
