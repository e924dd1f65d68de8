"""What a loss needs so that K processes with a batch of B learn as one with a batch of K·B.

DistributedDataParallel averages gradients, which is enough where the loss is a mean over clips.
Where it divides by a count or draws random numbers, the processes must count together and draw the
same numbers. With one process nothing is exchanged.
"""

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def n_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rand(batch: int, *shape: int, device: torch.device | None = None) -> torch.Tensor:
    """Uniform (batch, *shape): this process's part of one draw for the clips of all processes."""
    all_ranks = torch.rand(batch * n_ranks(), *shape, device=device)
    return all_ranks[rank() * batch : (rank() + 1) * batch]


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over processes; no gradient flows through it."""
    x = x.detach().clone()
    if n_ranks() > 1:
        dist.all_reduce(x)
        x = x / n_ranks()
    return x


def gather_ranks(x: torch.Tensor) -> torch.Tensor:
    """x (M, …) of every process, one after the other (K·M, …), with gradients."""
    return torch.cat(all_gather(x.contiguous())) if n_ranks() > 1 else x
