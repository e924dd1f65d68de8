"""What a training run says of itself: log, progress bar and validation."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.hardening.files import append_line, keep_lines, make_folder
from utils.optimizer import unshard
from utils.pictures import save_curves, save_png

import numpy as np
import torch
from tqdm import tqdm

from models.distributed import mean_over_ranks, rank


class TrainLog:
    """metrics.jsonl, loss curves and pictures of one stage, in cfg.out/stage/.

    Lines up to start_step stay; a run that begins anew removes all. stop: a StopSignal.
    """

    def __init__(self, cfg: Any, stage: str, start_step: int, n_updates: int, stop: Any):
        self.cfg, self.stop, self.n_updates = cfg, stop, n_updates
        self.folder = Path(cfg.out) / stage
        self.lines = []
        if rank() > 0:
            return
        make_folder(self.folder)
        if start_step == 0:
            for picture in self.folder.glob("step_*.png"):
                picture.unlink()
        self.lines = keep_lines(self.folder / "metrics.jsonl", start_step)

    def write(self, step: int, **values) -> None:
        """Write a line of numbers, each the mean over processes."""
        numbers = [float(unshard(value)) for value in values.values()]
        means = mean_over_ranks(torch.tensor(numbers, device=self.cfg.device)).tolist()
        named = zip(values, means, strict=True)
        line = {"step": step} | {name: round(x, 6) for name, x in named if math.isfinite(x)}
        regular = self.cfg.sample_every if "val_loss" in values else 10
        if self.stop.asked and step < self.n_updates and step % regular:
            line["stopped"] = True  # --resume drops this line: an unbroken run has none here
        self.lines.append(line)
        if rank() == 0:
            append_line(self.folder / "metrics.jsonl", line)

    def latest(self, *names: str) -> dict[str, float]:
        """STAGE/NAME → the newest of these numbers, of validation where there is one."""
        seen = {name.removeprefix("val_"): x for line in self.lines for name, x in line.items()}
        return {f"{self.folder.name}/{name}": seen[name] for name in names if name in seen}

    def picture(self, step: int, picture: np.ndarray) -> None:
        if rank() == 0:
            save_png(picture, self.folder / f"step_{step:06d}.png")

    def curves(self) -> None:
        save_curves(self.lines, self.folder / "loss.png")


def progress(start_step: int, n_updates: int, stage: str) -> tqdm:
    """The steps of a training run, with a progress bar in the first process."""
    look = dict(desc=stage, unit="step", mininterval=1, disable=rank() > 0)
    return tqdm(range(start_step, n_updates), initial=start_step, total=n_updates, **look)


@torch.no_grad()
def validation_logs(model: torch.nn.Module, batches: Sequence[tuple]) -> dict[str, float]:
    """Loss and logs averaged over fixed batches, with the same random masks every time."""
    model.eval()
    means = {}  # over batches and processes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in batches:
            loss, logs = model(*batch)
            for name, value in {"loss": loss, **logs}.items():
                value = torch.as_tensor(value, dtype=torch.float32, device=loss.device)
                mean = float(mean_over_ranks(value)) / len(batches)
                means[f"val_{name}"] = means.get(f"val_{name}", 0.0) + mean
    model.train()
    return means


def statistics_text(logs: dict) -> str:
    """For the bar: what wrong actions do, how much latents vary, where the model's outputs lie."""
    wrong = f", loss × {logs['shuffled']:.2f} if shuffled" if "shuffled" in logs else ""
    variance, mean, std = (logs[n] for n in ("latent_variance", "output_mean", "output_std"))
    return f"{wrong}, latents vary {variance:.2f}, outputs {mean:.2f} ± {std:.2f}"


def data_option(cfg: Any) -> str:
    """How the user named the data, for the next command to type."""
    if cfg.use_dummy_data or cfg.data_type == "dummy":
        return "--use-dummy-data"
    return f"--data-path {cfg.data_path}"
