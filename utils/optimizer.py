"""What turns gradients into steps: AdamW, Muon, and the learning rate."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def make_optimizer(model: torch.nn.Module, cfg: Any) -> "Optimizers":
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""
    settings = dict(lr=cfg.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if cfg.optimizer == "adamw":
        return Optimizers(torch.optim.AdamW(model.parameters(), **settings))
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if "blocks." in name and p.ndim == 2 else others).append(p)
    muon = Muon(matrices, cfg.learning_rate, getattr(torch, cfg.dtype))
    return Optimizers(muon, torch.optim.AdamW(others, **settings))


def count_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def set_lr(optimizer: "Optimizers", lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_at(step: int, n_updates: int, cfg: Any) -> float:
    """Learning rate: 50 steps of linear warm-up, then linear decay to a twentieth."""
    return cfg.learning_rate * min((step + 1) / 50, 1 - 0.95 * step / n_updates)


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """n matrices x (n, h, w) → about the nearest with singular values 1 (torch.optim.Muon's)."""
    if x.shape[1] > x.shape[2]:
        return newton_schulz(x.mT, steps).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the momentum.

    They are scaled so that AdamW's learning rate fits (arXiv:2502.16982, §2.2). torch.optim.Muon
    always works in bfloat16, which a CPU without such instructions emulates slowly: a step took
    seconds. Here the dtype can be chosen, and matrices of one shape go together, eight at a time.
    """

    def __init__(self, matrices: list[Tensor], lr: float, dtype: torch.dtype):
        super().__init__(matrices, dict(lr=lr, momentum=0.95, weight_decay=0.01))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, decay = group["lr"], group["lr"] * group["weight_decay"]
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (h, w), weights in by_shape.items():
                rate = lr * 0.2 * max(h, w) ** 0.5
                for i in range(0, len(weights), 8):  # under FSDP each of them is unsharded
                    self.update(weights[i : i + 8], rate, decay, group["momentum"])

    def update(self, weights: list[Tensor], rate: float, decay: float, momentum: float) -> None:
        """One step of weights of one shape."""
        ahead = []  # Nesterov momentum
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            ahead.append(p.grad.lerp(average, momentum))
        updates = newton_schulz(torch.stack(unshard(ahead)).to(self.dtype))
        for p, update in zip(weights, updates, strict=True):
            p.mul_(1 - decay).sub_(shard_like(update, p, source=None), alpha=rate)


class Optimizers:
    """Several optimizers behind the interface of one.

    Their state is saved unsharded, however many processes share it.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        return unshard([optimizer.state_dict() for optimizer in self.optimizers])

    def load_state_dict(self, states: list | dict) -> None:
        states = states if isinstance(states, list) else [states]
        for optimizer, state in zip(self.optimizers, states, strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            for i, moments in state["state"].items():
                for name, value in moments.items():
                    if value.ndim:  # the count of steps has none
                        moments[name] = shard_like(value.expand_as(weights[i]), weights[i])
            optimizer.load_state_dict(state)


def unshard(state: Any) -> Any:
    """A nest of dicts and lists with every tensor that FSDP has sharded made whole again."""
    if isinstance(state, dict):
        return {name: unshard(value) for name, value in state.items()}
    if isinstance(state, list):
        return [unshard(value) for value in state]
    return state.full_tensor() if isinstance(state, DTensor) else state


def shard_like(tensor: Tensor, like: Tensor, source: int | None = 0) -> Tensor:
    """This process's shard of a whole tensor, where `like` is sharded.

    source: the process whose tensor counts; None: all have the same.
    """
    if not isinstance(like, DTensor):
        return tensor
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=source)
