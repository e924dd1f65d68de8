"""What surrounds the training loop: device and dtype, the budget, the rate, the log, an interrupt. Nothing that learns."""
import json
import math
import os
import signal
import time
from functools import partial
from pathlib import Path

import torch

from config import UserError, make_folder
from data_utils import Clips
from models.checkpoint import load_checkpoint, save_checkpoint
from pictures import save_curves


def set_up(cfg):
    """Seed everything; → (device, autocast: a context to run the model in, made anew by each call)."""
    torch.manual_seed(cfg.seed)
    device = torch.device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    autocast = autocast_on(device, cfg.dtype)
    cfg.dtype = "bfloat16" if autocast.keywords["enabled"] else "float32"
    print(f"matrix products in {cfg.dtype}")
    return device, autocast


def autocast_on(device, dtype="auto"):
    """→ autocast(), in which matrix products run in bfloat16: if dtype says so, or for "auto" if that is faster here."""
    bfloat16 = dtype == "bfloat16" or dtype == "auto" and fast_dtype(device) == torch.bfloat16
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bfloat16)  # one object must not be nested


def fast_dtype(device):
    """bfloat16 where a matrix product in it is clearly faster: any recent GPU, but only some CPUs (AVX512-BF16, AMX)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        began = time.perf_counter()
        for _ in range(10):
            a @ a
        seconds[dtype] = time.perf_counter() - began
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.67 * seconds[torch.float32] else torch.float32


def open_clips(footage, cfg):
    """Training and validation clips of the footage, once its frames are known to divide into patches."""
    train = Clips(footage, "train", cfg.context_length, cfg.batch_size, cfg.seed)
    val = Clips(footage, "val", cfg.context_length, cfg.batch_size, cfg.seed)
    H, W = train.frame_size
    P = getattr(cfg, "patch_size", 1)  # the dynamics model never sees pixels
    if H % P or W % P:
        raise UserError(f"frames of {H}×{W} pixels do not divide into --patch-size {P}; use a divisor of both sides")
    print(f"data: {train.n_frames:,} frames of {H}×{W} to train on, {val.n_frames:,} to validate; {len(train.starts):,} clips")
    return train, val


def count_updates(cfg, train, trial):
    """The budget as a number of updates. For --minutes, `trial()` (a forward and backward pass) is timed once."""
    if cfg.n_updates:
        return cfg.n_updates
    if cfg.num_epochs:
        return math.ceil(cfg.num_epochs * train.n_frames / (cfg.batch_size * cfg.context_length))
    seconds = []
    with torch.random.fork_rng():  # the trial must not change what follows
        for _ in range(32):
            began = time.perf_counter()
            trial()
            if cfg.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    typical = sorted(seconds[16:])[8]  # the first dozen can be twice as slow: memory is new
    return max(1, int(60 * cfg.minutes / (1.1 * typical)))  # a tenth for optimizer, validation and pictures


def make_optimizer(model, cfg):
    """AdamW for everything (the article), or Muon for the matrices of the transformer blocks and AdamW for the rest."""
    adamw = partial(torch.optim.AdamW, lr=cfg.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    if cfg.optimizer == "adamw":
        return adamw(model.parameters())
    matrices = {name: p for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    # Muon steps along the nearest orthogonal matrix; match_rms_adamw scales it so that AdamW's learning rate fits (arXiv:2502.16982)
    muon = torch.optim.Muon(matrices.values(), lr=cfg.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return Optimizers(muon, adamw(others))


class Optimizers:
    """Several optimizers behind the interface of one."""

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
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def rate_at(step, n_updates, cfg):
    """Learning rate: 50 steps of linear warm-up, then linear decay to a twentieth."""
    return cfg.learning_rate * min((step + 1) / 50, 1 - 0.95 * step / n_updates)


@torch.no_grad()
def validation_logs(model, batches):
    """The mean of loss and logs over a fixed list of batches, with the same masks every time."""
    model.eval()
    total = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in batches:
            loss, logs = model(*batch)
            for name, value in {"loss": loss, **logs}.items():
                total[f"val_{name}"] = total.get(f"val_{name}", 0.0) + float(value) / len(batches)
    model.train()
    return total


class Run:
    """The output of one stage: the checkpoint out/stage.pt; metrics.jsonl, curves and pictures in out/stage/."""

    def __init__(self, cfg, stage):
        self.cfg, self.stage = cfg, stage
        self.folder, self.path = Path(cfg.out) / stage, Path(cfg.out) / f"{stage}.pt"
        self.stopped, self.lines = False, []
        dummy = cfg.use_dummy_data or cfg.data_type == "dummy"
        self.data_option = "--use-dummy-data" if dummy else f"--data-path {cfg.data_path}"  # for the next command

    def open(self, model, optimizer, n_updates, **same):
        """Create the folder; with --resume restore everything. → (first step, number of updates).

        `same` are entries of the checkpoint (model_args, inputs) that must not have changed.
        """
        step = 0
        if self.cfg.resume:
            saved = load_checkpoint(self.path, self.stage)
            config = {name: value for name, value in vars(self.cfg).items() if name in ("optimizer", "actions")}
            for kind, now in {**same, "config": config}.items():
                for name, value in now.items():
                    was = saved[kind].get(name)
                    if was != value:
                        raise UserError(f"cannot resume {self.path}: {name} was {was}, now it is {value}; leave out --resume")
            planned = saved["n_updates"]
            if self.cfg.n_updates not in (0, planned):
                raise UserError(f"cannot resume {self.path}: it was planned for {planned} updates, not {self.cfg.n_updates}; use that")
            if "optimizer" not in saved:
                raise UserError(f"cannot resume {self.path}: a shipped world has no optimizer state; train into another --out")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"]["cpu"])
            if saved["rng"]["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(saved["rng"]["cuda"])
            step, n_updates = saved["step"], planned
            print(f"resuming {self.path} at step {step:,} of {n_updates:,}")
        make_folder(self.folder)
        for picture in () if step else self.folder.glob("step_*.png"):  # of an earlier training
            picture.unlink()
        log = self.folder / "metrics.jsonl"
        if step and log.exists():
            self.lines = [line for line in map(json.loads, (x for x in log.read_text().splitlines() if x.endswith("}"))) if line["step"] <= step]
        log.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        for number in (signal.SIGINT, signal.SIGTERM):  # finish the step, save, leave; a second signal stops at once
            signal.signal(number, self.stop)
        return step, n_updates

    def stop(self, number, frame):
        self.stopped = True
        signal.signal(number, signal.SIG_DFL)

    def log(self, step, **values):
        line = {"step": step, **{name: round(float(value), 6) for name, value in values.items()}}
        self.lines.append(line)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def curves(self):
        save_curves(self.lines, self.folder / "loss.png")

    def save(self, model, optimizer, step, n_updates, **more):
        rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
        config = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self.cfg).items()}
        metrics = self.lines[-1] if self.lines else {}
        save_checkpoint(
            self.path,
            dict(stage=self.stage, config=config, model=model.state_dict(), optimizer=optimizer.state_dict(),
                 step=step, n_updates=n_updates, rng=rng, metrics=metrics, **more),
        )  # fmt: skip
        self.curves()

    def finish(self, done, n_updates, next_command):
        """Say what there is now and what to type next."""
        print(f"{self.path} ({os.path.getsize(self.path) / 2**20:.1f} MB), step {done:,} of {n_updates:,}; pictures in {self.folder}")
        print("stopped; the same command with --resume goes on" if done < n_updates else f"next: {next_command}")
