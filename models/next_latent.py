"""A simpler dynamics model: regress the next frame's latents. Optional reading.

The latent action, as the code that the latent action model found, is added to the tokens', and the
loss is the squared error of the next frame's FSQ codes. The mean of what may come blurs. Masks and
sampling options do nothing here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dynamics import DynamicsModel
from models.fsq import FiniteScalarQuantizer, log_statistics


class NextLatentModel(DynamicsModel):
    """tokens (B, T, N) in [0, codebook_size), actions (B, T-1) in [0, n_actions) → (loss, logs)."""

    def __init__(self, action_codes: bool = False, **args):
        super().__init__(**{**args, "objective": "mse", "adaln": False})
        if action_codes:  # older checkpoints have a vector of its own per action
            bits = FiniteScalarQuantizer([2] * (self.n_actions - 1).bit_length())
            codes = bits.indices_to_codes(torch.arange(self.n_actions))  # (n_actions, A), ±1
            project = nn.Linear(codes.shape[1], args["embed_dim"])
            self.embed_action = nn.Sequential(nn.Embedding.from_pretrained(codes), project)
        self.head = nn.Linear(args["embed_dim"], len(self.quantizer.levels))

    def forward(self, tokens: Tensor, actions: Tensor) -> tuple[Tensor, dict]:
        target = self.quantizer.indices_to_codes(tokens[:, 1:])  # (B, T-1, N, D)
        predicted = self.next_latents(tokens[:, :-1], actions).float()
        nearest = self.quantizer.nearest(predicted.detach())
        right = self.quantizer.codes_to_indices(nearest) == tokens[:, 1:]
        changed = tokens[:, 1:] != tokens[:, :-1]
        accuracy = (right & changed).sum() / changed.sum().clamp_min(1)
        logs = {"accuracy_changing": accuracy, "accuracy": right.float().mean()}
        return F.mse_loss(predicted, target), logs | log_statistics(target, predicted)

    def next_latents(self, tokens: Tensor, actions: Tensor, cache: list | None = None) -> Tensor:
        """Frames t (B, T, N) and the actions after them (B, T) → latents of frames t+1."""
        return self.head(self.hidden_states(tokens, actions, cache=cache, finished=True))

    @torch.no_grad()
    def prefill(self, tokens: Tensor, actions: Tensor, cache: list) -> None:
        self.next_latents(tokens, actions[:, 1:], cache)

    @torch.no_grad()
    def next_frame(
        self, last: Tensor, last_action: Tensor, action: Tensor, cache: list, **sampling
    ) -> Tensor:
        latents = self.next_latents(last.unsqueeze(1), action.unsqueeze(1), cache)[:, 0]
        return self.quantizer.codes_to_indices(self.quantizer.nearest(latents.float()))
