"""Where a training step runs: device, dtype, and the processes of torchrun."""

import atexit
import os
import sys
import time
from datetime import timedelta
from functools import cache, partial
from typing import Any

from utils.cli import UserError

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from models.distributed import n_ranks, rank
from models.st_transformer import SpatioTemporalTransformer


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:1" → the device. Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported here")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}); use cpu or cuda") from None
    if device.type == "cuda":
        # float32 products in TF32: 10 bits of mantissa instead of 23, several times faster
        torch.set_float32_matmul_precision("high")
    return device


def set_up(cfg: Any) -> tuple[torch.device, partial]:
    """Seed everything and join the other processes of torchrun.

    → (device, autocast: each call makes a context for the model). cfg.device and cfg.dtype become
    what was found, because checkpoints store them.
    """
    torch.manual_seed(cfg.seed)
    device = torch.device(cfg.device)
    if dist.is_torchelastic_launched():
        device = join_processes(device)
        clips = n_ranks() * cfg.accumulate * cfg.batch_size
        print(f"{n_ranks()} processes; a step sees {clips} clips")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cfg.device = str(device)
    if cfg.dtype == "auto":
        choice = [str(fast_dtype(device)).removeprefix("torch.")]
        if n_ranks() > 1:  # it was timed, and all processes must agree
            dist.broadcast_object_list(choice, device=device)
        cfg.dtype = choice[0]
    print(f"matrix products in {cfg.dtype}")
    return device, autocast_on(device, cfg.dtype)


def join_processes(device: torch.device) -> torch.device:
    """Join the processes that torchrun has started; → the device of this one. The first prints."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            # the others wait while the first reads videos
            dist.init_process_group(backend, timeout=timedelta(hours=12))
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            text = f"the processes cannot talk over {backend} ({reason}); start without torchrun"
            raise UserError(text) from None
        atexit.register(dist.destroy_process_group)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def autocast_on(device: torch.device, dtype: str = "auto") -> partial:
    """→ autocast(), a context in which matrix products run in `dtype`; auto: the faster one."""
    bfloat16 = dtype == "bfloat16"
    if dtype == "auto":
        bfloat16 = fast_dtype(device) == torch.bfloat16
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bfloat16)


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its matrix products are clearly faster.

    That is any recent GPU, but only some CPUs (AVX512-BF16, AMX).
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    seconds = {torch.float32: [], torch.bfloat16: []}
    for _ in range(8):  # in turn, and the best counts: the answer must not depend on other work
        for dtype, times in seconds.items():
            a = torch.ones(512, 512, dtype=dtype)
            a @ a
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        if times[-1] > 50 * seconds[torch.float32][-1]:  # emulated: measuring again takes seconds
            break
    faster = min(seconds[torch.bfloat16]) < 0.67 * min(seconds[torch.float32])
    return torch.bfloat16 if faster else torch.float32


def parallelize(model: torch.nn.Module, cfg: Any) -> torch.nn.Module:
    """The model as the loop calls it: sharded (FSDP2), compiled, or replicated (DDP).

    The weights stay those of `model`.
    """
    for module in model.modules():
        if isinstance(module, SpatioTemporalTransformer):
            module.recompute = cfg.recompute
    if getattr(cfg, "fsdp", False):
        for block in model.transformer.blocks:
            fully_shard(block)
            register_fsdp_forward_method(block, "modulations")
        fully_shard(model)
        for name in ("prefill", "next_frame"):
            register_fsdp_forward_method(model, name)
    network = torch.compile(model) if cfg.compile else model
    if n_ranks() > 1 and not getattr(cfg, "fsdp", False):
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=ids)
    return network


def sync_gradients(network: torch.nn.Module, last: bool) -> None:
    """Average gradients over processes only in the last backward pass of a step."""
    if isinstance(network, DistributedDataParallel):
        network.require_backward_grad_sync = last
    elif isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
