"""Stage 3, the dynamics model: given the tokens so far and an action, the tokens of the next frame.

Training follows Genie (arXiv:2402.15391, §2.1): tokens are masked at a rate drawn from U(0.5, 1) and the masked ones
predicted with cross-entropy. Decoding is MaskGIT (arXiv:2202.04200, §3.2): all tokens at once, keep the confident ones,
repeat. Two things are easy to get wrong, and then the actions do nothing or rollouts fall apart:
  * action t lies between frames t and t+1, so it conditions frame t+1; frame 0 gets a learned "no action"
  * at play the past is clean. So (`clean_context`) each clip is shown twice, once clean and once masked: a masked frame looks at itself and
    at clean earlier frames, never at masked ones (MAGI, arXiv:2501.12389), and every frame trains as it will be played
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from models.distributed import mean_over_ranks, rand
from models.fsq import FiniteScalarQuantizer
from models.st_transformer import SpatioTemporalPositionalEncoding, SpatioTemporalTransformer, causal_band


class DynamicsModel(nn.Module):
    """tokens (B, T, N) in [0, codebook_size) and actions (B, T-1) in [0, n_actions) → (loss, logs); N = grid rows × columns.

    A token enters as its FSQ code together with the codes around it (`token_kernel`): where the camera moves, what comes
    next at a place stands beside it now, and attention over the frames of one place would not find it.

    objective "ce" is the model above. "mse" is the article's first trainer (seed 002): the action's embedding is added
    to the tokens', and the numbers of the next frame's codes are regressed; no masks, no sampling, blurred where unsure.
    """

    def __init__(
        self, grid, levels, n_actions, embed_dim, hidden_dim, n_heads, n_blocks, context_length,
        objective="ce", clean_context=True, adaln=True, token_kernel=3,
    ):  # fmt: skip
        super().__init__()
        self.grid, self.objective, self.clean_context = grid, objective, clean_context
        self.adaln = adaln and objective == "ce"
        self.quantizer = FiniteScalarQuantizer(levels)
        self.mask_index, self.null_action = self.quantizer.codebook_size, n_actions
        self.positions = SpatioTemporalPositionalEncoding(grid[0] * grid[1], embed_dim)
        self.embed_codes = nn.Conv2d(len(levels), embed_dim, token_kernel, padding="same")
        self.mask_token = nn.Parameter(0.02 * torch.randn(embed_dim))
        self.embed_action = nn.Embedding(n_actions + 1, embed_dim)
        if objective == "ce":
            self.head = nn.Linear(embed_dim, self.quantizer.codebook_size)
        else:
            self.head = nn.Linear(embed_dim, len(levels))
        cond_dim = embed_dim if self.adaln else None
        self.transformer = SpatioTemporalTransformer(embed_dim, hidden_dim, n_heads, n_blocks, context_length, cond_dim)

    def embed(self, tokens):
        """tokens (B, T, N), mask_index where masked → (B, T, N, E)."""
        masked = (tokens == self.mask_index).unsqueeze(-1)  # (B, T, N, 1)
        codes = self.quantizer.indices_to_codes(tokens).masked_fill(masked, 0.0)  # (B, T, N, D)
        codes = rearrange(codes, "b t (h w) d -> (b t) d h w", h=self.grid[0])
        x = rearrange(self.embed_codes(codes), "(b t) e h w -> b t (h w) e", b=len(tokens))
        return self.positions(x + masked * self.mask_token)

    def condition(self, actions):
        """The action that led to each frame (B, T) → what is added to its tokens, and what modulates the norms."""
        action = self.embed_action(actions)  # (B, T, E)
        return (0, self.transformer.modulations(action)) if self.adaln else (action.unsqueeze(2), None)

    def states(self, tokens, condition, **options):
        """tokens (B, T, N) under a condition → the transformer's output (B, T, N, E); options are its own."""
        added, modulations = condition
        return self.transformer(self.embed(tokens) + added, modulations, **options)

    def forward(self, tokens, actions):
        if self.objective == "mse":
            return self._mse(tokens, actions)
        B, T, N = tokens.shape
        rate = 0.5 + 0.5 * rand(B, T - 1, 1, device=tokens.device)  # U(0.5, 1), per frame
        masked = rand(B, T - 1, N, device=tokens.device) < rate  # (B, T-1, N); the first frame is never masked
        if self.clean_context:
            states = self.masked_states(tokens, actions, masked)  # (B, T-1, N, E)
        else:
            hidden = torch.cat([tokens[:, :1], tokens[:, 1:].masked_fill(masked, self.mask_index)], dim=1)
            states = self.states(hidden, self.condition(self.led_to(actions)))[:, 1:]
        targets = tokens[:, 1:][masked]
        logits = self.head(states[masked]).float()  # (number masked, codebook_size)
        loss = F.cross_entropy(logits, targets, reduction="sum") / mean_over_ranks(masked.sum())
        with torch.no_grad():
            right = logits.argmax(dim=1) == targets
            changed = targets != tokens[:, :-1][masked]  # still patches are right for free
            accuracy = (right & changed).sum() / changed.sum().clamp_min(1)
        return loss, {"accuracy_changing": accuracy, "accuracy": right.float().mean()}

    def led_to(self, actions):
        """Actions between frames (B, T-1) → the action that led to each frame (B, T); for the first it is "none"."""
        return F.pad(actions, (1, 0), value=self.null_action)

    def masked_logits(self, tokens, actions, masked):
        """Logits (B, T-1, N, codebook_size) of frames 1 … T-1, each seen through masked (B, T-1, N), pasts clean."""
        return self.head(self.masked_states(tokens, actions, masked))

    def masked_states(self, tokens, actions, masked):
        B, T, N = tokens.shape
        hidden = tokens[:, 1:].masked_fill(masked, self.mask_index)
        twice = torch.cat([tokens[:, :-1], hidden], dim=1)  # (B, 2(T-1), N): clean 0 … T-2, masked 1 … T-1
        frame = torch.arange(T, device=tokens.device)
        times = torch.cat([frame[:-1], frame[1:]])
        past = causal_band(T, T, self.transformer.context_length, tokens.device)
        before = past.tril(-1)  # a masked frame must not find its own answer in the clean copy
        self_only = torch.eye(T - 1, dtype=torch.bool, device=tokens.device)
        clean_rows = torch.cat([past[:-1, :-1], torch.zeros_like(self_only)], dim=1)
        masked_rows = torch.cat([before[1:, :-1], self_only], dim=1)
        condition = self.condition(torch.cat([self.led_to(actions[:, :-1]), actions], dim=1))
        x = self.states(twice, condition, times=times, mask=torch.cat([clean_rows, masked_rows]))  # (B, 2(T-1), N, E)
        return x[:, T - 1 :]

    def _mse(self, tokens, actions):
        target = self.quantizer.indices_to_codes(tokens[:, 1:])  # (B, T-1, N, D)
        predicted = self._next_latents(tokens[:, :-1], actions).float()
        right = self.quantizer.codes_to_indices(self._snap(predicted.detach())) == tokens[:, 1:]
        changed = tokens[:, 1:] != tokens[:, :-1]
        logs = {"accuracy_changing": (right & changed).sum() / changed.sum().clamp_min(1), "accuracy": right.float().mean()}
        return F.mse_loss(predicted, target), logs

    def _next_latents(self, tokens, actions, cache=None):
        """Frames t (B, T, N) and the actions that follow them (B, T) → latents of frames t+1 (B, T, N, D)."""
        return self.head(self.states(tokens, self.condition(actions), cache=cache, finished=True))

    def _snap(self, latents):
        """The nearest point of the FSQ grid."""
        half = (self.quantizer.levels - 1) / 2
        return ((latents.clamp(-1, 1) + 1) * half).round() / half - 1

    def new_cache(self):
        return self.transformer.new_cache()

    @torch.no_grad()
    def prefill(self, tokens, actions, cache):
        """Begin with a history: tokens (B, T, N) of frames 0 … T-1 and actions (B, T+1), actions[t] led to frame t."""
        if self.objective == "mse":
            self._next_latents(tokens, actions[:, 1:], cache)
        else:
            self.states(tokens, self.condition(actions[:, :-1]), cache=cache, finished=True)

    @torch.no_grad()
    def next_frame(self, last, last_action, action, cache, steps=2, temperature=1.0, generator=None):
        """One frame of play. last (B, N) with the action that led to it (B,), and the action now (B,) → tokens (B, N).

        The cache holds the frames before `last`, which this call finishes. steps: MaskGIT passes; temperature 0 is
        greedy and deterministic, otherwise the tokens are sampled with `generator`.
        """
        if self.objective == "mse":
            latents = self._next_latents(last.unsqueeze(1), action.unsqueeze(1), cache)[:, 0]
            return self.quantizer.codes_to_indices(self._snap(latents.float()))
        self.prefill(last.unsqueeze(1), torch.stack([last_action, action], dim=1), cache)
        condition = self.condition(action.unsqueeze(1))

        def logits_of(tokens):  # (B, N) → (B, N, codebook_size)
            return self.head(self.states(tokens.unsqueeze(1), condition, cache=cache))[:, 0].float()

        return maskgit_decode(logits_of, torch.full_like(last, self.mask_index), self.mask_index, steps, temperature, generator)


def maskgit_decode(logits_of, tokens, mask_index, steps, temperature=1.0, generator=None):
    """Fill every mask_index in tokens (B, N) in `steps` passes; what is filled, or was given, is never changed.

    After pass k of K a share cos(π/2·k/K) of the tokens is still masked (MaskGIT §3.3). Which tokens stay is decided
    by their log-probability plus Gumbel noise that fades out, as in the reference code: pure confidence order clusters.
    """
    B, N = tokens.shape
    for k in range(1, steps + 1):
        logits = logits_of(tokens)  # (B, N, codebook_size)
        if temperature > 0:
            p = (logits / temperature).softmax(dim=-1)
            cdf = p.cumsum(dim=-1)
            dice = torch.rand(B, N, 1, device=p.device, generator=generator) * cdf[..., -1:]
            sampled = torch.searchsorted(cdf, dice, right=True)[..., 0].clamp_max(p.shape[-1] - 1)  # a sample of p, without a sync
            confidence = p.gather(-1, sampled.unsqueeze(-1)).squeeze(-1).log()  # (B, N)
            noise = torch.empty_like(confidence).exponential_(generator=generator)
            confidence = confidence - temperature * (1 - k / steps) * noise.log()
        else:  # in float64: a sure token has p = 1 in float32, and which of several goes first would be anybody's guess
            confidence, sampled = logits.double().log_softmax(dim=-1).max(dim=-1)
        known = tokens != mask_index
        still_masked = 0 if k == steps else math.floor(N * math.cos(math.pi / 2 * k / steps))
        best = confidence.masked_fill(known, float("inf")).topk(N - still_masked, dim=-1).indices  # (B, N - still_masked)
        tokens = tokens.scatter(1, best, torch.where(known, tokens, sampled).gather(1, best))
    return tokens
