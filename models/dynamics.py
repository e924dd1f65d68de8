"""Stage 3, the dynamics model: given the tokens so far and an action, the tokens of the next frame.

Training follows Genie (arXiv:2402.15391, §2.1): tokens are masked at a rate drawn from U(0.5, 1)
and the masked ones predicted with cross-entropy. Decoding is MaskGIT (arXiv:2202.04200, §3.2): all
tokens at once, keep the confident ones, repeat. Two things are easy to get wrong, and then the
actions do nothing or rollouts fall apart:
  * action t lies between frames t and t+1, so it conditions frame t+1; frame 0 gets a learned
    "no action"
  * when playing, the past is clean. So (`clean_context`) each clip is shown twice, once clean and
    once masked: a masked frame sees itself and clean earlier frames, never masked ones (MAGI,
    arXiv:2501.12389), and every frame trains as it will be played
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.distributed import mean_over_ranks, rand
from models.fsq import FiniteScalarQuantizer, log_statistics
from models.st_transformer import SpatialPositions, SpatioTemporalTransformer, causal_band


class DynamicsModel(nn.Module):
    """tokens (B, T, N) in [0, codebook_size), actions (B, T-1) in [0, n_actions) → (loss, logs).

    N = grid rows × columns. A token enters as its FSQ code together with the codes around it
    (`token_kernel`): where the camera moves, what comes next at a place is beside it now, and
    attention over the frames of one place would not find it. sizes: of the transformer.
    """

    def __init__(
        self,
        grid: list[int],
        levels: list[int],
        n_actions: int,
        embed_dim: int,
        objective: str = "ce",
        clean_context: bool = True,
        adaln: bool = True,
        token_kernel: int = 3,
        **sizes: int,
    ):
        super().__init__()
        self.grid, self.n_actions, self.objective = grid, n_actions, objective
        self.clean_context, self.adaln = clean_context, adaln
        self.quantizer = FiniteScalarQuantizer(levels)
        self.mask_index, self.null_action = self.quantizer.codebook_size, n_actions
        self.positions = SpatialPositions(grid[0] * grid[1], embed_dim)
        self.embed_codes = nn.Conv2d(len(levels), embed_dim, token_kernel, padding="same")
        self.mask_token = nn.Parameter(0.02 * torch.randn(embed_dim))
        self.embed_action = nn.Embedding(n_actions + 1, embed_dim)
        self.head = nn.Linear(embed_dim, self.quantizer.codebook_size)
        cond_dim = embed_dim if adaln else None
        self.transformer = SpatioTemporalTransformer(embed_dim, cond_dim=cond_dim, **sizes)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T, N), mask_index where masked → (B, T, N, E)."""
        masked = (tokens == self.mask_index).unsqueeze(-1)  # (B, T, N, 1)
        codes = self.quantizer.indices_to_codes(tokens).masked_fill(masked, 0.0)  # (B, T, N, D)
        codes = rearrange(codes, "b t (h w) d -> (b t) d h w", h=self.grid[0])
        x = rearrange(self.embed_codes(codes), "(b t) e h w -> b t (h w) e", b=len(tokens))
        return self.positions(x + masked * self.mask_token)

    def modulations(self, actions: Tensor) -> list | None:
        """What the previous actions (B, T) do to the norms; None where they are added instead."""
        return self.transformer.modulations(self.embed_action(actions)) if self.adaln else None

    def hidden_states(
        self, tokens: Tensor, actions: Tensor, modulations: list | None = None, **options
    ) -> Tensor:
        """tokens (B, T, N) and the action before each frame (B, T) → (B, T, N, E).

        modulations: those of `actions`, if they are known already. options: the transformer's.
        """
        x = self.embed(tokens)
        if not self.adaln:
            x = x + self.embed_action(actions).unsqueeze(2)
        return self.transformer(x, modulations or self.modulations(actions), **options)

    def forward(self, tokens: Tensor, actions: Tensor) -> tuple[Tensor, dict]:
        B, T, N = tokens.shape
        rate = 0.5 + 0.5 * rand(B, T - 1, 1, device=tokens.device)  # U(0.5, 1), per frame
        masked = rand(B, T - 1, N, device=tokens.device) < rate  # of frames 1 … T-1
        if self.clean_context:
            states = self.masked_hidden_states(tokens, actions, masked)  # (B, T-1, N, E)
        else:
            inputs = tokens[:, 1:].masked_fill(masked, self.mask_index)
            inputs = torch.cat([tokens[:, :1], inputs], dim=1)
            states = self.hidden_states(inputs, self.previous_actions(actions))[:, 1:]
        targets = tokens[:, 1:][masked]
        logits = self.head(states[masked]).float()  # (number masked, codebook_size)
        loss = F.cross_entropy(logits, targets, reduction="sum") / mean_over_ranks(masked.sum())
        with torch.no_grad():
            right = logits.argmax(dim=1) == targets
            changed = targets != tokens[:, :-1][masked]  # a copy gets still patches right
            accuracy = (right & changed).sum() / changed.sum().clamp_min(1)
        logs = {"accuracy_changing": accuracy, "accuracy": right.float().mean()}
        return loss, logs | log_statistics(self.quantizer.indices_to_codes(tokens), logits)

    def previous_actions(self, actions: Tensor) -> Tensor:
        """Actions between frames (B, T-1) → the one before each frame (B, T); first is "none"."""
        return F.pad(actions, (1, 0), value=self.null_action)

    def masked_logits(self, tokens: Tensor, actions: Tensor, masked: Tensor) -> Tensor:
        """Logits (B, T-1, N, codebook_size) of frames 1 … T-1, each masked, their pasts clean."""
        return self.head(self.masked_hidden_states(tokens, actions, masked))

    def masked_hidden_states(self, tokens: Tensor, actions: Tensor, masked: Tensor) -> Tensor:
        """(B, T-1, N, E) of masked frames 1 … T-1, in one pass behind clean frames 0 … T-2."""
        T = tokens.shape[1]
        inputs = tokens[:, 1:].masked_fill(masked, self.mask_index)
        twice = torch.cat([tokens[:, :-1], inputs], dim=1)  # (B, 2(T-1), N)
        previous = torch.cat([self.previous_actions(actions[:, :-1]), actions], dim=1)
        frame = torch.arange(T, device=tokens.device)
        times = torch.cat([frame[:-1], frame[1:]])
        band = causal_band(T, T, self.transformer.context_length, tokens.device)
        before = band.tril(-1)  # a masked frame must not find its own answer in the clean copy
        self_only = torch.eye(T - 1, dtype=torch.bool, device=tokens.device)
        clean_rows = torch.cat([band[:-1, :-1], torch.zeros_like(self_only)], dim=1)
        masked_rows = torch.cat([before[1:, :-1], self_only], dim=1)
        mask = torch.cat([clean_rows, masked_rows])
        x = self.hidden_states(twice, previous, times=times, mask=mask)  # (B, 2(T-1), N, E)
        return x[:, T - 1 :]

    def new_cache(self) -> list:
        return self.transformer.new_cache()

    @torch.no_grad()
    def prefill(self, tokens: Tensor, actions: Tensor, cache: list) -> None:
        """Cache finished frames: tokens (B, T, N), actions (B, T+1), actions[:, t] precedes t."""
        self.hidden_states(tokens, actions[:, :-1], cache=cache, finished=True)

    @torch.no_grad()
    def next_frame(
        self, last: Tensor, last_action: Tensor, action: Tensor, cache: list, **sampling
    ) -> Tensor:
        """One frame: last (B, N), the action before it and the one after it (B,) → tokens (B, N).

        The cache holds the frames before `last`, which this call finishes. sampling: of
        maskgit_decode.
        """
        self.prefill(last.unsqueeze(1), torch.stack([last_action, action], dim=1), cache)
        action = action.unsqueeze(1)  # (B, 1)
        modulations = self.modulations(action)

        def logits_of(tokens):  # (B, N) → (B, N, codebook_size)
            states = self.hidden_states(tokens.unsqueeze(1), action, modulations, cache=cache)
            return self.head(states)[:, 0].float()

        masked = torch.full_like(last, self.mask_index)
        return maskgit_decode(logits_of, masked, self.mask_index, **sampling)


def maskgit_decode(
    logits_of: Callable,
    tokens: Tensor,
    mask_index: int,
    steps: int = 2,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill every mask_index in tokens (B, N) in `steps` passes; given tokens never change.

    After pass k of K a share cos(π/2·k/K) of the tokens is still masked (MaskGIT §3.3). The tokens
    with the highest log-probability plus Gumbel noise stay. The noise fades out over the passes,
    as in the reference code: without it, the kept tokens cluster. temperature 0 is greedy.
    """
    B, N = tokens.shape
    for k in range(1, steps + 1):
        logits = logits_of(tokens)  # (B, N, codebook_size)
        if temperature > 0:
            p = (logits / temperature).softmax(dim=-1)
            cdf = p.cumsum(dim=-1)
            # torch.multinomial would wait for the GPU
            threshold = torch.rand(B, N, 1, device=p.device, generator=generator) * cdf[..., -1:]
            sampled = torch.searchsorted(cdf, threshold, right=True)[..., 0]
            sampled = sampled.clamp_max(p.shape[-1] - 1)  # (B, N)
            confidence = p.gather(-1, sampled.unsqueeze(-1)).squeeze(-1).log()  # (B, N)
            gumbel = -torch.empty_like(confidence).exponential_(generator=generator).log()
            confidence = confidence + temperature * (1 - k / steps) * gumbel
        else:  # float64, because in float32 several tokens would tie at probability 1
            confidence, sampled = logits.double().log_softmax(dim=-1).max(dim=-1)
        known = tokens != mask_index
        n_masked = 0 if k == steps else math.floor(N * math.cos(math.pi / 2 * k / steps))
        best = confidence.masked_fill(known, float("inf")).topk(N - n_masked, dim=-1).indices
        tokens = tokens.scatter(1, best, torch.where(known, tokens, sampled).gather(1, best))
    return tokens
