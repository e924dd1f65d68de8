"""K processes with a batch of B learn as one process with a batch of K·B: what a loss needs for that.

DistributedDataParallel averages gradients over processes. That is enough where the loss is a mean over clips; where it divides by
something counted over the batch, or throws dice, the processes must count together and throw the same dice. With one
process each function here does nothing.
"""
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def n_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def rand(batch, *shape, device=None):
    """Uniform (batch, *shape): this process's part of one throw for the clips of all processes."""
    return torch.rand(batch * n_ranks(), *shape, device=device)[rank() * batch : (rank() + 1) * batch]


def mean_over_ranks(x):
    """The mean of a tensor over processes; no gradient flows through it."""
    if n_ranks() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
        x = x / n_ranks()
    return x


def of_all_ranks(x):
    """x (M, …) of every process, one after the other (K·M, …), with gradients."""
    return torch.cat(all_gather(x.contiguous())) if n_ranks() > 1 else x
