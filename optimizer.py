"""What turns gradients into steps: AdamW, Muon, and the learning rate."""
from functools import partial

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def make_optimizer(model, cfg):
    """AdamW for everything (the article), or Muon for the matrices of the transformer blocks and AdamW for the rest."""
    adamw = partial(torch.optim.AdamW, lr=cfg.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if cfg.optimizer == "adamw":
        return Optimizers(adamw(model.parameters()))
    matrices = {name: p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    return Optimizers(Muon(matrices.values(), cfg.learning_rate, getattr(torch, cfg.dtype)), adamw(others))


def rate_at(step, n_updates, cfg):
    """Learning rate: 50 steps of linear warm-up, then linear decay to a twentieth."""
    return cfg.learning_rate * min((step + 1) / 50, 1 - 0.95 * step / n_updates)


def orthogonal(x, steps=5):
    """x (n, h, w): n matrices → about the nearest ones whose singular values are all 1, by Newton-Schulz iteration."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT, steps).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the momentum, scaled so that AdamW's learning rate fits (arXiv:2502.16982, sec. 2.2).

    torch.optim.Muon always works in bfloat16, which a CPU without such instructions imitates: there a step took seconds. Here the dtype can be
    chosen, and matrices of one shape go together, eight at a time.
    """

    def __init__(self, matrices, lr, dtype, momentum=0.95, weight_decay=0.01):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (h, w), weights in shapes.items():
                for i in range(0, len(weights), 8):  # no more: under FSDP each is put together whole
                    self.turn(weights[i : i + 8], group["lr"] * 0.2 * max(h, w) ** 0.5, group["lr"] * group["weight_decay"], group["momentum"])

    def turn(self, weights, rate, decay, momentum):
        """One step of weights of one shape."""
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        ahead = [p.grad.lerp(self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum), momentum) for p in weights]  # Nesterov
        for p, update in zip(weights, orthogonal(torch.stack(whole(ahead)).to(self.dtype))):
            p.mul_(1 - decay).sub_(part_of(update, p, source=None), alpha=rate)


class Optimizers:
    """Several optimizers behind the interface of one. Their state is saved whole, however many processes share it."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self):
        return whole([optimizer.state_dict() for optimizer in self.optimizers])

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states if isinstance(states, list) else [states], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            for i, values in state["state"].items():
                if any(v.ndim and v.shape != weights[i].shape for v in values.values()):
                    raise ValueError("the optimizer's moments have other shapes than the weights")
                state["state"][i] = {k: part_of(v, weights[i]) if v.shape == weights[i].shape else v for k, v in values.items()}
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def whole(state):
    """A state dict (or any nest of dicts and lists) with every tensor that FSDP has shared out put together again."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state.full_tensor() if isinstance(state, DTensor) else state


def part_of(tensor, like, source=0):
    """This process's part of a whole tensor, where `like` is shared out over processes. source: whose tensor counts; None: all have the same."""
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=source) if isinstance(like, DTensor) else tensor
