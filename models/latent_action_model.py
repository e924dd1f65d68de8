"""Stage 2, the latent action model: discover, without labels, a few actions that explain what changes in a video.

Genie (arXiv:2402.15391, §2.1). The encoder looks at frames t and t+1 and emits one of n_actions codes; the decoder must
predict frame t+1 from the past and that code. Only what helps to predict the change survives the bottleneck. After
training the decoder is dropped: the encoder labels the video, and a player's keys take its place.

What keeps the codes alive and makes them mean the same everywhere (the README's table says what each is worth):
  * the encoder sees both frames of a pair in each patch, and how well the patch matches the last frame moved a little to
    each side (`matches`): which way a texture went is then plain to see, instead of a product it must learn to form. The
    article compares pooled frames instead
  * the decoder moves the patches of the last frame, then adds what is missing (`warp`). "A little to the left" then helps in
    every picture, where "brighter on the right", the shortcut of a decoder that only adds, helps in one
  * the loss is counted in units of the error of copying the last frame, so the same weights serve a still game and a moving camera
  * pre-quantised actions are scaled to unit RMS, which keeps tanh out of saturation
  * in training half of the action bits pass unrounded, so that gradients know which way a code should move
  * a bonus on the entropy of the joint code spreads its use; the article's variance penalty stays as a safety net
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from models.distributed import mean_over_ranks, of_all_ranks, rand
from models.fsq import FiniteScalarQuantizer
from models.patch_embed import PatchEmbedding, PatchUnembedding
from models.st_transformer import SpatioTemporalPositionalEncoding, SpatioTemporalTransformer

MOVES = range(-8, 9)  # pixels per frame that a decoder can move a patch, across and down


class LatentActionsEncoder(nn.Module):
    """frames (B, T, 3, H, W) → one vector per transition (B, T-1, out_dim). Causal: vector t has seen frames ≤ t+1."""

    def __init__(self, frame_size, patch_size, embed_dim, hidden_dim, n_heads, n_blocks, context_length, out_dim, kind="matches"):
        super().__init__()
        n_patches = (frame_size[0] // patch_size) * (frame_size[1] // patch_size)
        self.pairs, self.patch_size = kind != "frames", patch_size
        self.embed = PatchEmbedding(patch_size, embed_dim, channels=6 if self.pairs else 3)
        self.embed_matches = nn.Linear(2 * len(MOVES), embed_dim) if kind == "matches" else None
        self.positions = SpatioTemporalPositionalEncoding(n_patches, embed_dim)
        window = context_length - 1 if self.pairs else context_length  # T frames make T-1 pairs
        self.transformer = SpatioTemporalTransformer(embed_dim, hidden_dim, n_heads, n_blocks, window)
        self.action_head = nn.Linear(2 * embed_dim, out_dim)

    def forward(self, frames):
        pairs = frames
        if self.pairs:  # the frame, and the change that follows it, in one patch
            pairs = torch.cat([frames[:, :-1], frames[:, 1:] - frames[:, :-1]], dim=2)  # (B, T-1, 6, H, W)
        tokens = self.embed(pairs)
        if self.embed_matches is not None:
            tokens = tokens + self.embed_matches(self.mismatch(frames))
        tokens = self.transformer(self.positions(tokens))  # (B, T-1 or T, N, E)
        if self.pairs:  # the mean hears a moving camera, the maximum a small sprite
            pooled = torch.cat([tokens.mean(dim=2), tokens.amax(dim=2)], dim=-1)  # (B, T-1, 2E)
        else:
            means = tokens.mean(dim=2)
            pooled = torch.cat([means[:, :-1], means[:, 1:]], dim=-1)  # (B, T-1, 2E)
        return self.action_head(pooled)  # (B, T-1, out_dim)

    def mismatch(self, frames):
        """How badly each patch of the next frame fits the last frame moved by each of MOVES, across and down, relative to
        the mean over moves: (B, T-1, N, 2·len(MOVES)). The correlation layer of FlowNet (arXiv:1504.06852, §3), coarser."""
        gray = frames.mean(dim=2)  # (B, T, H, W)
        moved = torch.stack([gray[:, :-1].roll(move, axis) for axis in (-1, -2) for move in MOVES], dim=2)
        error = F.avg_pool2d(((moved - gray[:, 1:, None]) ** 2).flatten(0, 1), self.patch_size)  # (B(T-1), 2·len(MOVES), h, w)
        mean = error.mean(dim=1, keepdim=True)
        error = (error - mean) / (mean + 1e-4)  # a flat patch fits everywhere: 0
        return rearrange(error, "(b t) m h w -> b t (h w) m", b=len(frames))


class LatentActionsDecoder(nn.Module):
    """frames 0 … T-2 (B, T-1, 3, H, W) and actions (B, T-1, A) → prediction of frames 1 … T-1 (B, T-1, 3, H, W).

    kind "warp" moves the pixels of the last frame as a mixture of shifts per patch (after CDNA and DNA, arXiv:1605.07157,
    §3) and adds a correction; "change" only adds; "frame" draws the next frame anew, as the article does.
    The transformer sees each patch with probability keep_rate, and the first frame always; the rest are mask tokens. 1 is
    Genie's choice. 0, with kind "frame", is the article's: first frame and actions only ("warp" and "change" start from
    the last frame all the same).
    """

    def __init__(
        self, frame_size, patch_size, embed_dim, hidden_dim, n_heads, n_blocks, context_length, action_dim, keep_rate, kind
    ):  # fmt: skip
        super().__init__()
        n_patches = (frame_size[0] // patch_size) * (frame_size[1] // patch_size)
        self.keep_rate, self.kind, self.patch_size = keep_rate, kind, patch_size
        self.embed = PatchEmbedding(patch_size, embed_dim)
        self.embed_action = nn.Linear(action_dim, embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(embed_dim))
        self.positions = SpatioTemporalPositionalEncoding(n_patches, embed_dim)
        self.transformer = SpatioTemporalTransformer(embed_dim, hidden_dim, n_heads, n_blocks, context_length - 1)
        self.frame_head = PatchUnembedding(patch_size, embed_dim, frame_size)
        nn.init.zeros_(self.frame_head.project.weight)
        nn.init.zeros_(self.frame_head.project.bias)
        if kind == "warp":
            self.move_head = nn.Linear(embed_dim, 2 * len(MOVES))
            nn.init.zeros_(self.move_head.weight)
            nn.init.zeros_(self.move_head.bias)
            self.move_head.bias.data[MOVES.index(0) :: len(MOVES)] = 4.0  # "stay", for a start

    def mask(self, tokens):
        """Replace tokens (B, T-1, N, E) by the mask token, except in the first frame and at the kept places."""
        keep = rand(*tokens.shape[:3], device=tokens.device) < self.keep_rate  # (B, T-1, N)
        keep[:, 0] = True
        return torch.where(keep.unsqueeze(-1), tokens, self.mask_token.to(tokens.dtype))

    def forward(self, frames, actions):
        # The article masks in training only; unmasked frames would then be new to the decoder at evaluation.
        tokens = self.positions(self.mask(self.embed(frames)))  # (B, T-1, N, E)
        tokens = tokens + self.embed_action(actions).unsqueeze(2)
        tokens = self.transformer(tokens)
        predicted = self.frame_head(tokens).float()  # (B, T-1, 3, H, W)
        if self.kind == "warp":
            frames = self.warp(frames, self.move_head(tokens).float())
        return predicted if self.kind == "frame" else frames + predicted

    def warp(self, frames, moves):
        """Move each patch's content by a mixture of MOVES, across and then down; moves (B, T-1, N, 2·len(MOVES)) are logits.
        What enters at an edge is what left at the opposite one; the correction has to mend that."""
        P, H = self.patch_size, frames.shape[-2]
        weights = moves.unflatten(-1, (2, -1)).softmax(dim=-1)  # (B, T-1, N, 2, len(MOVES))
        weights = rearrange(weights, "b t (h w) two m -> two m b t 1 h w", h=H // P)
        weights = weights.repeat_interleave(P, dim=-2).repeat_interleave(P, dim=-1)  # (2, len(MOVES), B, T-1, 1, H, W)
        for axis, weight in zip((-1, -2), weights):
            frames = sum(w * frames.roll(move, axis) for w, move in zip(weight, MOVES))
        return frames


class LatentActionModel(nn.Module):
    """frames (B, T, 3, H, W) in [-1, 1] → actions (B, T-1) in [0, n_actions); actions[t] lies between frames t and t+1.

    Raises ValueError unless n_actions is a power of two (each of its A = log2(n_actions) dimensions has two levels).
    """

    def __init__(
        self, frame_size, patch_size, embed_dim, hidden_dim, n_heads, n_blocks, context_length,
        n_actions=8, encoder="matches", decoder="warp", keep_rate=1.0, unit_rms=True, soft_rate=0.5,
        entropy_lambda=0.25, var_target=0.2, var_lambda=1.0,
    ):  # fmt: skip
        super().__init__()
        if n_actions < 2 or n_actions & (n_actions - 1):
            raise ValueError(f"n_actions must be a power of two (2, 4, 8, …), got {n_actions}")
        action_dim = n_actions.bit_length() - 1
        sizes = (frame_size, patch_size, embed_dim, hidden_dim, n_heads, n_blocks, context_length)
        self.n_actions, self.unit_rms, self.soft_rate = n_actions, unit_rms, soft_rate
        self.entropy_lambda, self.var_target, self.var_lambda = entropy_lambda, var_target, var_lambda
        self.encoder = LatentActionsEncoder(*sizes, action_dim, encoder)
        self.quantizer = FiniteScalarQuantizer([2] * action_dim)
        self.decoder = LatentActionsDecoder(*sizes, action_dim, keep_rate, decoder)

    def latents(self, frames):
        """frames → pre-quantised actions (B, T-1, A), each vector with a mean square of 1 (if A > 1 and unit_rms)."""
        z = self.encoder(frames).float()
        return F.rms_norm(z, z.shape[-1:]) if self.unit_rms and z.shape[-1] > 1 else z  # a single number would become ±1

    def collapse_penalty(self, soft_bits):
        """soft_bits (B, T-1, A) in (-1, 1): the article's variance penalty minus the entropy bonus, a scalar."""
        soft_bits = of_all_ranks(soft_bits.flatten(0, 1))  # (M, A)
        variance = soft_bits.var(dim=0, correction=0)
        codes = self.quantizer.indices_to_codes(torch.arange(self.n_actions, device=soft_bits.device))  # (n_actions, A)
        share = ((1 + soft_bits.unsqueeze(1) * codes) / 2).prod(dim=-1).mean(dim=0)  # (n_actions,), sums to 1
        # Bit by bit all may look well while two bits say the same; the entropy of the joint code sees that.
        entropy = -(share * share.clamp_min(1e-9).log()).sum()
        return self.var_lambda * F.relu(self.var_target - variance).mean() - self.entropy_lambda * entropy

    def forward(self, frames):
        """frames → (loss, logs): squared error relative to copying the last frame, codes used, variance of the bits."""
        latents = self.latents(frames)
        codes, soft_bits = self.quantizer(latents), self.quantizer.bound(latents)  # (B, T-1, A): ±1, and between
        actions = codes
        if self.training:
            actions = torch.where(rand(*codes.shape, device=codes.device) < self.soft_rate, soft_bits, codes)
        error = F.mse_loss(self.decoder(frames[:, :-1], actions), frames[:, 1:])
        copy_error = mean_over_ranks(F.mse_loss(frames[:, :-1], frames[:, 1:])).clamp_min(1e-8)  # a still clip has none
        loss = error / copy_error + self.collapse_penalty(soft_bits)
        logs = {
            "error_over_copy": (error / copy_error).detach(),
            "codes_used": self.quantizer.codes_to_indices(codes.detach()).unique().numel(),
            "bit_variance": soft_bits.detach().flatten(0, 1).var(dim=0, correction=0).mean(),
        }
        return loss, logs

    def infer(self, frames):
        """frames (B, T, 3, H, W) → action indices (B, T-1)."""
        return self.quantizer.codes_to_indices(self.quantizer(self.latents(frames)))

    def predict(self, frames, actions):
        """frames (B, T, 3, H, W) and action indices (B, T-1) → the decoder's frames 1 … T-1 (B, T-1, 3, H, W)."""
        return self.decoder(frames[:, :-1], self.quantizer.indices_to_codes(actions)).clamp(-1, 1)
