"""What surrounds the training loop: device, dtype and processes, the budget, the log, an interrupt. Nothing that learns."""
import atexit
import ctypes
import json
import math
import os
import signal
import statistics
import sys
import time
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from config import UserError, make_folder
from data_utils import Clips
from models.checkpoint import CheckpointError, load_checkpoint, previous_of, read_checkpoint, save_checkpoint
from models.distributed import mean_over_ranks, n_ranks, rank
from models.st_transformer import SpatioTemporalTransformer
from optimizer import part_of, whole
from pictures import save_curves, save_png


def set_up(cfg):
    """Seed everything, join the other processes of torchrun; → (device, autocast: a context for the model, made anew by each call)."""
    torch.manual_seed(cfg.seed)
    device = torch.device(cfg.device)
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            cfg.device = str(device)
        if not dist.is_initialized():
            join_processes("nccl" if device.type == "cuda" else "gloo")
        print(f"{n_ranks()} processes; a step sees {n_ranks() * cfg.accumulate * cfg.batch_size} clips")
    if getattr(cfg, "fsdp", False) and n_ranks() == 1:
        raise UserError("--fsdp shares the weights out over processes, but there is one; start with torchrun --nproc-per-node=K, or leave it out")
    reuse_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if n_ranks() > 1 and cfg.dtype == "auto":  # it is timed, and all must agree
        choice = [fast_dtype(device)]
        dist.broadcast_object_list(choice, device=device)
        cfg.dtype = str(choice[0]).removeprefix("torch.")
    autocast = autocast_on(device, cfg.dtype)
    cfg.dtype = "bfloat16" if autocast.keywords["enabled"] else "float32"
    print(f"matrix products in {cfg.dtype}")
    return device, autocast


def join_processes(backend):
    """Become one of the processes that torchrun has started; the first speaks for all."""
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # the others wait while the first reads videos
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot talk over {backend} ({str(error).splitlines()[0]}); start without torchrun") from None
    atexit.register(dist.destroy_process_group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def reuse_memory():
    """Tell malloc to keep large blocks (glibc only). By default it returns them, and each large tensor costs a page fault per 4 KiB again."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its maximum
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def autocast_on(device, dtype="auto"):
    """→ autocast(), in which matrix products run in bfloat16: if dtype says so, or for "auto" if that is faster here."""
    bfloat16 = dtype == "bfloat16" or dtype == "auto" and fast_dtype(device) == torch.bfloat16
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bfloat16)  # one object must not be nested


@cache
def fast_dtype(device):
    """bfloat16 where a matrix product in it is clearly faster: any recent GPU, but only some CPUs (AVX512-BF16, AMX)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {torch.float32: [], torch.bfloat16: []}
    for _ in range(8):  # by turns, and the best counts: on a busy machine, too, the answer is to be the same each time
        for dtype, times in seconds.items():
            a = torch.ones(512, 512, dtype=dtype)
            a @ a
            began = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - began)
        if times[-1] > 50 * seconds[torch.float32][-1]:  # bfloat16 is only imitated: no need to look again, for a second each time
            break
    return torch.bfloat16 if min(seconds[torch.bfloat16]) < 0.67 * min(seconds[torch.float32]) else torch.float32


def open_clips(footage, cfg):
    """Training and validation clips of the footage, once its frames are known to divide into patches."""
    train = Clips(footage, "train", cfg.context_length, cfg.batch_size, cfg.seed)
    val = Clips(footage, "val", cfg.context_length, cfg.batch_size, cfg.seed)
    H, W = train.frame_size
    P = getattr(cfg, "patch_size", 1)  # the dynamics model never sees pixels
    if H % P or W % P:
        raise UserError(f"frames of {H}×{W} pixels do not divide into --patch-size {P}; use a divisor of both sides")
    needed, free = 12 * cfg.batch_size * cfg.context_length * H * W, free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise UserError(f"a batch of frames of {H}×{W} alone needs {gigabytes(needed)} of memory, {gigabytes(free)} are free; record at a smaller size, or take a smaller --batch-size")
    print(f"data: {train.n_frames:,} frames of {H}×{W} to train on, {val.n_frames:,} to validate; {len(train.starts):,} clips")
    return train, val


def free_memory(device):
    """Bytes that can still be had: of the GPU, or what Linux and the container's limit say; None on other systems."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = 1024 * next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        if limit.exists() and limit.read_text().strip() != "max":
            cached = next((int(line.split()[1]) for line in limit.with_name("memory.stat").read_text().splitlines() if line.startswith("inactive_file")), 0)
            free = min(free, int(limit.read_text()) - int(used.read_text()) + cached)  # files that were read are given up when memory is short
        return free
    except (OSError, StopIteration, ValueError):
        return None


def gigabytes(n):
    return "an unknown amount" if n is None else f"{n / 2**30:,.2f} GB"


def make_model(kind, model_args, device):
    """kind(**model_args) on the device. Raises UserError before memory is spent, if weights, gradients and two moments of them do not fit."""
    with torch.device("meta"):
        needed = (4 if n_ranks() == 1 else 1) * sum(weight.nbytes for weight in kind(**model_args).parameters())
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(f"this model needs {gigabytes(needed)} for weights, gradients and optimizer, {gigabytes(free)} are free; take a smaller --embed-dim or --n-blocks")
    return kind(**model_args).to(device)


def wrap(model, cfg):
    """The model as the loop calls it: shared out (FSDP2), compiled, or one of several processes' (DDP). The weights stay `model`'s."""
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
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    return network


def memory_of_a_pass(train, trial):
    """→ (bytes, bytes per clip) that a pass keeps for the backward pass: from passes over one clip and over two."""
    kept, size = [], train.batch_size

    def keep(x):
        kept[-1][x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    try:
        for train.batch_size in (1, 2):
            kept.append({})
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                trial()
    finally:
        train.batch_size = size
    one, two = (sum(storages.values()) for storages in kept)
    return 2 * one - two, two - one


def check_memory(cfg, model, train, trial):
    """Print what training needs and what is free. Raises UserError if that is less, naming the largest batch that fits."""
    if cfg.compile or n_ranks() > 1:  # a single clip would be compiled for itself; processes share weights or memory in other ways
        return
    found = []
    with torch.random.fork_rng():
        if not fits(lambda: found.extend(memory_of_a_pass(train, trial))):
            return  # not even two clips fit; plan() says so
    fixed, clip = found
    fixed += 3 * sum(weight.nbytes for weight in model.parameters())  # gradients and two moments; the weights are there already
    clip = 3 * clip // 2  # half as much again comes and goes
    needed, free = fixed + clip * cfg.batch_size, free_memory(torch.device(cfg.device))
    print(f"memory: about {gigabytes(needed)} needed, {gigabytes(free)} free")
    if free is not None and needed > free:
        good = max(0, (free - fixed) // clip)
        remedy = f"{good} should fit; --accumulate makes up for it" if good else "take a smaller one, or a smaller model"
        raise UserError(f"--batch-size {cfg.batch_size} needs about {gigabytes(needed)} of memory, {gigabytes(free)} are free; {remedy}")


def plan(cfg, train, trial):
    """The budget as a number of updates. `trial()` is a forward and a backward pass: does it fit, and for --minutes, how long does it take?

    Raises UserError if a batch does not fit into memory, naming the largest that does, or if --compile finds no compiler.
    """
    with torch.random.fork_rng():  # the trials must not change what follows
        if not fits(trial):
            good, bad = 0, cfg.batch_size
            while n_ranks() == 1 and bad - good > 1:
                train.batch_size = (good + bad) // 2
                good, bad = (train.batch_size, bad) if fits(trial) else (good, train.batch_size)
            remedy = f"{good} does; --accumulate makes up for it" if good else "take a smaller one, or a smaller model"
            raise UserError(f"--batch-size {cfg.batch_size} does not fit into the memory of {cfg.device}; {remedy}")
        if cfg.n_updates:
            return cfg.n_updates
        if cfg.num_epochs:
            return math.ceil(cfg.num_epochs * train.n_frames / (cfg.batch_size * cfg.context_length * cfg.accumulate * n_ranks()))
        seconds = []
        for _ in range(32):
            began = time.perf_counter()
            trial()
            if cfg.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    typical = sorted(seconds[16:])[8] * cfg.accumulate  # the first dozen can be twice as slow: memory is new
    typical = float(mean_over_ranks(torch.tensor(typical, device=cfg.device)))
    n_updates = max(1, int(60 * cfg.minutes / (1.1 * typical)))  # a tenth for optimizer, validation and pictures
    print(f"{cfg.minutes:g} minutes are {n_updates:,} updates here; --n-updates {n_updates} is the same training again")
    return n_updates


def fits(trial):
    """Run trial(); False if it runs out of memory."""
    try:
        trial()
        return True
    except (torch.OutOfMemoryError, MemoryError):
        return False
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(f"--compile does not work here ({str(error).splitlines()[0]}); install a C++ compiler, or leave it out") from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return False


@torch.no_grad()
def validation_logs(model, batches):
    """The mean of loss and logs over a fixed list of batches, with the same masks every time."""
    model.eval()
    total = {}  # over batches, and of each the mean over processes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in batches:
            loss, logs = model(*batch)
            for name, value in {"loss": loss, **logs}.items():
                value = torch.as_tensor(value, dtype=torch.float32, device=loss.device)
                total[f"val_{name}"] = total.get(f"val_{name}", 0.0) + float(mean_over_ranks(value)) / len(batches)
    model.train()
    return total


class Run:
    """The output of one stage: out/stage.pt, stage.previous.pt and stage.best.pt; metrics.jsonl, curves and pictures in out/stage/."""

    def __init__(self, cfg, stage):
        self.cfg, self.stage = cfg, stage
        self.folder, self.path = Path(cfg.out) / stage, Path(cfg.out) / f"{stage}.pt"
        self.best_path, self.best, self.saved, self.planned = self.path.with_suffix(".best.pt"), math.inf, None, math.inf  # saved: the last step that was
        self.interrupted, self.asked, self.lines, self.odd, self.skipped, self.first = False, False, [], [], 0, rank() == 0
        dummy = cfg.use_dummy_data or cfg.data_type == "dummy"
        self.data_option = "--use-dummy-data" if dummy else f"--data-path {cfg.data_path}"  # for the next command

    def open(self, model, optimizer, n_updates, **same):
        """Create the folder; with --resume restore everything. → (first step, number of updates).

        `same` are entries of the checkpoint (model_args, inputs) that must not have changed.
        """
        step = 0
        if self.cfg.resume:
            saved = load_checkpoint(self.path, self.stage)
            if "optimizer" not in saved:
                raise UserError(f"cannot resume {self.path}: a shipped world has no optimizer state; train into another --out")
            if not {"config", "rng", *same} <= set(saved) or not 0 <= saved.get("step", -1) <= saved.get("n_updates", -1):
                raise CheckpointError(f"cannot resume {self.path}: it does not say how far it is; train it again")
            config = {name: value for name, value in vars(self.cfg).items() if name in ("optimizer", "actions")}
            for kind, now in {**same, "config": config}.items():
                for name, value in now.items():
                    was = saved[kind].get(name)
                    if was != value:
                        raise UserError(f"cannot resume {self.path}: {name} was {was}, now it is {value}; set it as it was, or leave out --resume")
            planned = saved["n_updates"]
            if self.cfg.n_updates not in (0, planned):
                raise UserError(f"cannot resume {self.path}: it was planned for {planned} updates, not {self.cfg.n_updates}; use that")
            own = model.state_dict()
            try:
                model.load_state_dict({name: part_of(weight, own[name]) for name, weight in saved["model"].items()})
                optimizer.load_state_dict(saved["optimizer"])
                torch.set_rng_state(saved["rng"]["cpu"])
                if saved["rng"]["cuda"] is not None and torch.cuda.is_available():
                    torch.cuda.set_rng_state(saved["rng"]["cuda"])
            except Exception as error:  # whatever a foreign file may hold
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                raise CheckpointError(f"cannot resume {self.path}: what is saved does not fit ({reason}); train it again") from None
            step, n_updates, self.saved = saved["step"], planned, saved["step"]
            was, now = saved["config"].get("dtype"), getattr(self.cfg, "dtype", None)
            print(f"resuming {self.path} at step {step:,} of {n_updates:,}" + f", in {now} instead of {was}" * (was != now))
            try:
                self.best = float(read_checkpoint(self.best_path)["metrics"]["val_loss"])
            except (CheckpointError, KeyError, TypeError, ValueError):  # there is none, or it is damaged
                pass
        if self.first:
            make_folder(self.folder)
            if not step:  # nothing of an earlier training is taken for this one's, or lost
                for path in filter(Path.exists, (self.path, self.best_path)):
                    os.replace(path, path.with_name(path.name.replace(self.stage, f"{self.stage}.earlier", 1)))
                previous_of(self.path).unlink(missing_ok=True)
            for picture in () if step else self.folder.glob("step_*.png"):  # of an earlier training
                picture.unlink()
            self.lines, self.odd = (self.keep_lines(name, step) for name in ("metrics.jsonl", "odd_batches.jsonl"))
        for number in (signal.SIGINT, signal.SIGTERM):  # finish the step, save, leave; a second signal stops at once
            signal.signal(number, self.interrupt)
        self.planned = n_updates
        return step, n_updates

    def keep_lines(self, name, step):
        """The lines of an earlier run's log up to `step`; the others go."""
        log, lines = self.folder / name, []
        if step and log.exists():
            for text in log.read_text(errors="replace").splitlines():
                try:
                    lines += [line] if (line := json.loads(text))["step"] <= step and "stopped" not in line else []
                except (ValueError, KeyError, TypeError):  # cut short, or not ours
                    pass
        part = log.with_name(name + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(part, log)
        return lines

    def interrupt(self, number, frame):
        self.interrupted = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def stopped(self, done):
        """Has somebody asked to stop? Several processes agree on it in `sound`."""
        return self.interrupted if n_ranks() == 1 else self.asked

    def sound(self, step, loss, norm, train=None):
        """May this step be taken? Not if its loss or gradient is no finite number.

        Such a batch, and one whose loss leaps far above the last ones, goes to odd_batches.jsonl, with the numbers of the frames
        in the footage at which its clips begin. Raises UserError after --max-skipped such steps in a row.
        """
        loss, norm, asked = mean_over_ranks(torch.stack([loss.detach().float(), whole(norm.detach()).float(), loss.new_tensor(self.interrupted).float()])).tolist()
        self.asked = asked > 0
        finite = math.isfinite(loss) and math.isfinite(norm)
        usual = [line["loss"] for line in self.lines[-40:] if "loss" in line][-20:]
        middle = statistics.median(usual or [0])
        leap = max(abs(middle), 10 * statistics.median([abs(x - middle) for x in usual] or [0]))
        if not finite or len(usual) == 20 and loss > middle + leap:
            where = train.first_frames(step, self.cfg.accumulate).tolist() if train else []
            line = dict(step=step + 1, loss=loss if finite else str(loss), grad_norm=norm if finite else str(norm), skipped=not finite, first_frames=where)
            self.odd.append(line)
            if self.first:
                with open(self.folder / "odd_batches.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped == getattr(self.cfg, "max_skipped", 20):
            good = f"the last good checkpoint is {self.path}, step {self.saved:,}" if self.saved else "nothing was saved yet"
            raise UserError(f"loss or gradient was no finite number {self.skipped} steps in a row, up to step {step + 1:,}; {good}; "
                            f"look at {self.folder / 'odd_batches.jsonl'}, and try a smaller --learning-rate or --dtype float32")  # fmt: skip
        return finite

    def log(self, step, **values):
        """Write a line of numbers, each the mean over processes."""
        numbers = torch.tensor([float(whole(value)) for value in values.values()], device=self.cfg.device)
        line = {"step": step, **{name: round(value, 6) for name, value in zip(values, mean_over_ranks(numbers).tolist()) if math.isfinite(value)}}
        if self.stopped(step) and step < self.planned and step % (self.cfg.sample_every if "val_loss" in values else 10):
            line["stopped"] = True  # out of turn: a training that was not stopped does not have this line, so --resume drops it
        self.lines.append(line)
        if self.first:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def latest(self, name):
        """The newest number of that name in the log, or nan."""
        return next((line[name] for line in reversed(self.lines) if name in line), math.nan)

    def picture(self, step, picture):
        if self.first:
            save_png(picture, self.folder / f"step_{step:06d}.png")

    def curves(self):
        save_curves(self.lines, self.folder / "loss.png")

    def save(self, model, optimizer, step, n_updates, **more):
        """The checkpoint; the one before stays beside it, and the best: of those saved right after a validation, the one with the least val_loss.

        While steps are being skipped nothing is saved: the weights themselves may be what is broken.
        """
        if self.skipped:
            return
        rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
        config = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self.cfg).items()}
        metrics = self.lines[-1] if self.lines else {}
        checkpoint = dict(stage=self.stage, config=config, model=whole(model.state_dict()), optimizer=optimizer.state_dict(),
                          step=step, n_updates=n_updates, rng=rng, metrics=metrics, **more)  # fmt: skip
        if self.first:
            if metrics.get("step") == step and "stopped" not in metrics and metrics.get("val_loss", math.inf) < self.best:
                self.best = metrics["val_loss"]
                save_checkpoint(self.best_path, checkpoint)  # first: after a kill between the two it is made again
            save_checkpoint(self.path, checkpoint, keep_previous=self.saved is not None)
            self.curves()
        self.saved = step
        if n_ranks() > 1:
            dist.barrier()  # what one has saved, the others may read

    def finish(self, done, n_updates, next_command):
        """Say what there is now and what to type next."""
        if not self.path.exists():
            return print(f"nothing was saved: no step up to {done:,} had a finite loss and gradient; see {self.folder / 'odd_batches.jsonl'}")
        print(f"{self.path} ({os.path.getsize(self.path) / 2**20:.1f} MB), step {self.saved or done:,} of {n_updates:,}; pictures in {self.folder}")
        if skipped := sum(line["skipped"] for line in self.odd):
            print(f"{skipped} steps were skipped, since loss or gradient was no finite number; see {self.folder / 'odd_batches.jsonl'}")
        print("stopped; the same command with --resume goes on" if done < n_updates else f"next: {next_command}")
