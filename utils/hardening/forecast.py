"""What a training run will need, told before it begins: memory, and steps for a budget of time."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from utils.cli import UserError

import torch

from models.distributed import mean_over_ranks, n_ranks


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        free = 1024 * int(available.split()[1])
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        if limit.exists() and limit.read_text().strip() != "max":
            lines = limit.with_name("memory.stat").read_text().splitlines()
            cached = [int(line.split()[1]) for line in lines if line.startswith("inactive_file")]
            # cached files are given up when memory is short
            free = min(free, int(limit.read_text()) - int(used.read_text()) + sum(cached[:1]))
        return free
    except (OSError, StopIteration, ValueError):
        return None


def gigabytes(n: float | None) -> str:
    return "an unknown amount" if n is None else f"{n / 2**30:,.2f} GB"


def check_batch(cfg: Any, H: int, W: int) -> None:
    """Raise UserError if frames of H×W pixels do not suit the patches, or a batch the memory."""
    P = getattr(cfg, "patch_size", 1)  # the dynamics model never sees pixels
    if H % P or W % P:
        raise UserError(
            f"frames of {H}×{W} pixels do not divide into --patch-size {P};"
            " use a divisor of both sides"
        )
    needed = 12 * cfg.batch_size * cfg.context_length * H * W
    free = free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise UserError(
            f"a batch of frames of {H}×{W} alone needs {gigabytes(needed)} of memory,"
            f" {gigabytes(free)} are free; record at a smaller size, or take a smaller --batch-size"
        )


def refuse_short(name: str, part: str, length: int, longest: int, n: int) -> NoReturn:
    raise UserError(
        f"{name}: no clip of {length} frames fits into the {part} part, its"
        f" longest episode has {longest} (of {n} frames in all); use longer videos,"
        " a smaller --context-length or, in validate.py, a larger --val-fraction"
    )


def check_model(kind: type, model_args: dict, device: torch.device) -> None:
    """Raise UserError if kind(**model_args), its gradients and two moments exceed the memory."""
    with torch.device("meta"):
        weights = sum(weight.nbytes for weight in kind(**model_args).parameters())
    needed, free = (4 if n_ranks() == 1 else 1) * weights, free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"this model needs {gigabytes(needed)} for weights, gradients and optimizer,"
            f" {gigabytes(free)} are free; take a smaller --embed-dim or --n-blocks"
        )


def dry_run_of(
    network: Callable, optimizer: Any, autocast: Callable, get_batch: Callable, train: Any
) -> Callable:
    """→ a call that makes a forward and a backward pass over the first batch, and no step."""

    def dry_run():
        with autocast():
            loss, _ = network(*get_batch(train, 0))
        loss.backward()
        optimizer.zero_grad()

    return dry_run


def saved_by_a_pass(train: Any, dry_run: Callable) -> tuple[int, int]:
    """→ (bytes, bytes per clip) kept for the backward pass, from passes over one and two clips."""
    kept, size = [], train.batch_size

    def keep(x):
        kept[-1][x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    try:
        for train.batch_size in (1, 2):
            kept.append({})
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                dry_run()
    finally:
        train.batch_size = size
    one, two = (sum(storages.values()) for storages in kept)
    return 2 * one - two, two - one


def check_training(cfg: Any, model: torch.nn.Module, train: Any, dry_run: Callable) -> None:
    """Print what training needs and what is free. `dry_run()` is a forward and a backward pass.

    Raises UserError if it does not fit, naming the largest batch that does.
    """
    with torch.random.fork_rng():  # dry runs must not change what follows
        forecast(cfg, model, train, dry_run)
        if fits(dry_run):
            return
        good, bad = 0, cfg.batch_size
        while n_ranks() == 1 and bad - good > 1:
            train.batch_size = (good + bad) // 2
            if fits(dry_run):
                good = train.batch_size
            else:
                bad = train.batch_size
    remedy = "take a smaller one, or a smaller model"
    if good:
        remedy = f"{good} does; --accumulate makes up for it"
    raise UserError(
        f"--batch-size {cfg.batch_size} does not fit into the memory of {cfg.device}; {remedy}"
    )


def forecast(cfg: Any, model: torch.nn.Module, train: Any, dry_run: Callable) -> None:
    """Print what training needs and what is free. Raises UserError if that is less."""
    if cfg.compile or n_ranks() > 1:  # one clip would be compiled for itself; ranks share weights
        return
    found = []
    if not fits(lambda: found.extend(saved_by_a_pass(train, dry_run))):
        return  # not even two clips fit
    fixed, clip = found
    # gradients and two moments; the weights are there already
    fixed += 3 * sum(weight.nbytes for weight in model.parameters())
    clip = 3 * clip // 2  # temporary tensors take half as much again
    needed, free = fixed + clip * cfg.batch_size, free_memory(torch.device(cfg.device))
    print(f"memory: about {gigabytes(needed)} needed, {gigabytes(free)} free")
    if free is None or needed <= free:
        return
    good = max(0, (free - fixed) // clip)
    remedy = "take a smaller one, or a smaller model"
    if good:
        remedy = f"{good} should fit; --accumulate makes up for it"
    raise UserError(
        f"--batch-size {cfg.batch_size} needs about {gigabytes(needed)} of memory,"
        f" {gigabytes(free)} are free; {remedy}"
    )


def fits(dry_run: Callable) -> bool:
    """Call dry_run(); False if it runs out of memory."""
    try:
        dry_run()
        return True
    except (torch.OutOfMemoryError, MemoryError):
        return False
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).splitlines()[0]
        text = f"--compile does not work here ({reason}); install a C++ compiler, or leave it out"
        raise UserError(text) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return False


def plan_updates(cfg: Any, model: torch.nn.Module, train: Any, *step: Any) -> int:
    """How many updates the budget in cfg is. Raises UserError if a step needs too much memory.

    step: network, optimizer, autocast and get_batch, of which a step is made.
    """
    dry_run = dry_run_of(*step, train)
    check_training(cfg, model, train, dry_run)
    return updates_for_budget(cfg, train, dry_run)


def updates_for_budget(cfg: Any, train: Any, dry_run: Callable) -> int:
    """--n-updates, --num-epochs or --minutes as a number of updates.

    For minutes it times `dry_run()`, a forward and a backward pass.
    """
    if cfg.n_updates:
        return cfg.n_updates
    if cfg.num_epochs:
        frames = cfg.batch_size * cfg.context_length * cfg.accumulate * n_ranks()
        return math.ceil(cfg.num_epochs * train.n_frames / frames)
    seconds = []
    with torch.random.fork_rng():  # dry runs must not change what follows
        for _ in range(32):
            began = time.perf_counter()
            dry_run()
            if cfg.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    # the first dozen can be twice as slow because memory is new
    typical = sorted(seconds[16:])[8] * cfg.accumulate
    typical = float(mean_over_ranks(torch.tensor(typical, device=cfg.device)))
    # a tenth is for the optimizer, validation and pictures
    n_updates = max(1, int(60 * cfg.minutes / (1.1 * typical)))
    print(
        f"{cfg.minutes:g} minutes are {n_updates:,} updates here;"
        f" --n-updates {n_updates} is the same training run again"
    )
    return n_updates
