"""Checkpoints: one .pt file per stage, enough to rebuild the model and to continue its training.

It holds stage, model_args, config, model (weights), optimizer, step, n_updates, rng and metrics.
dynamics.pt adds inputs (fingerprints of the two others), fps, start_frames and action_names.
A model is rebuilt from model_args alone, so old checkpoints load whatever the defaults are now.
Files are written whole or not at all and carry a checksum (utils/hardening/files.py).
"""

import io
import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import CheckpointError
from utils.hardening.files import fingerprint, previous_of, write_whole
from utils.hardening.fit import action_names, check_same, check_world, explained_misfit
from utils.hardening.steps import StepGuard
from utils.hardening.untrusted import best_loss, read_newest, rebuild_untrusted
from utils.log import TrainLog
from utils.optimizer import Optimizers, shard_like, unshard

import torch

from models.distributed import rank

if TYPE_CHECKING:
    from models.world_model import WorldModel

# By name, because a script of stage 1 does not import stages 2 and 3.
MODELS = {
    "tokenizer": ("models.video_tokenizer", "VideoTokenizer"),
    "lam": ("models.latent_action_model", "LatentActionModel"),
    "dynamics": ("models.dynamics", "DynamicsModel"),
}


def save_checkpoint(path: str | Path, checkpoint: dict, keep_previous: bool = False) -> None:
    """Raises CheckpointError where it cannot be written; then nothing has changed.

    keep_previous: the file that was there stays as STAGE.previous.pt.
    """
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_whole(Path(path), content.getvalue(), keep_previous)


def load_checkpoint(path: str | Path, stage: str) -> dict:
    """What save_checkpoint wrote, on the CPU; where it is damaged, the one before, with a line.

    Raises CheckpointError if none is whole, or it is of another stage.
    """
    path = Path(path)
    if not path.is_file() and not previous_of(path).is_file():
        raise CheckpointError(
            f"no checkpoint at {path};"
            f" train it first with: python train_{stage}.py --out {path.parent}"
        )
    checkpoint = read_newest(path)
    found = checkpoint["stage"]
    if found != stage:
        raise CheckpointError(
            f"{path} is a {found} checkpoint, but a {stage} checkpoint is needed here"
        )
    return checkpoint


def build_model(checkpoint: dict, path: str | Path = "the checkpoint") -> torch.nn.Module:
    """The trained model, in evaluation mode, from its saved model_args alone."""

    def make():
        module, name = MODELS[checkpoint["stage"]]
        if checkpoint["model_args"].get("objective") == "mse":
            module, name = "models.next_latent", "NextLatentModel"
        return getattr(import_module(module), name)(**checkpoint["model_args"])

    return rebuild_untrusted(make, checkpoint, path)


def load_world(
    path: str | Path,
    device: str | torch.device = "cpu",
    capture: Callable | None = None,
    file: str = "dynamics.pt",
    **settings: float | None,
) -> "WorldModel":
    """The WorldModel in folder `path` (tokenizer.pt, lam.pt, and dynamics.pt or another `file`).

    settings: steps, temperature and seed; a missing one, or None, is the world's own.
    Raises CheckpointError if a file is missing or they do not fit together.
    """
    from models.world_model import WorldModel  # here, because stage 1 does not import stage 3

    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"no world at {path}: it must be a folder with tokenizer.pt, lam.pt and dynamics.pt"
        )
    dynamics = load_checkpoint(path / file, "dynamics")
    saved = {"tokenizer": load_checkpoint(path / "tokenizer.pt", "tokenizer")}
    if "lam" in dynamics.get("inputs", {}):
        saved["lam"] = load_checkpoint(path / "lam.pt", "lam")
    saved["dynamics"] = dynamics
    models = {s: build_model(saved[s], path / f"{s}.pt").to(device) for s in saved}
    table = check_world(path, **saved)
    values = {name: dynamics["config"][name] for name in ("steps", "temperature")}
    values |= {name: value for name, value in settings.items() if value is not None}
    return WorldModel(
        models["tokenizer"],
        models.get("lam"),
        models["dynamics"],
        start_frames=dynamics["start_frames"],
        action_names=action_names(table, dynamics),
        action_table=table,
        fps=dynamics["fps"],
        identity=fingerprint(dynamics),
        capture=capture,
        **values,
    )


class CheckpointSaver:
    """OUT/stage.pt with stage.previous.pt and stage.best.pt beside it: save and resume.

    same: entries of the checkpoint (model_args, inputs) that must not change when it is resumed.
    """

    def __init__(
        self, cfg: Any, stage: str, model: torch.nn.Module, optimizer: Optimizers, **same: dict
    ):
        self.cfg, self.stage, self.same = cfg, stage, same
        self.model, self.optimizer = model, optimizer
        self.path = Path(cfg.out) / f"{stage}.pt"
        self.best_path = self.path.with_suffix(".best.pt")
        self.best = math.inf  # least val_loss so far
        self.saved_step = None

    def resume(self, n_updates: int) -> tuple[int, int]:
        """With --resume restore everything, else make room. → (start step, number of updates)."""
        if self.cfg.resume:
            return self._restore()
        if rank() == 0:
            for path in filter(Path.exists, (self.path, self.best_path)):  # the last run's
                name = path.name.replace(self.stage, f"{self.stage}.earlier", 1)
                os.replace(path, path.with_name(name))
            previous_of(self.path).unlink(missing_ok=True)
        self.n_updates = n_updates
        return 0, n_updates

    def _restore(self):
        saved = load_checkpoint(self.path, self.stage)
        check_same(self.path, self.cfg, saved, self.same)
        with explained_misfit(self.path):
            own = self.model.state_dict()
            weights = {name: shard_like(w, own[name]) for name, w in saved["model"].items()}
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["rng"]["cpu"])
            if saved["rng"]["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(saved["rng"]["cuda"])
        self.saved_step, self.best = saved["step"], best_loss(self.best_path)
        self.n_updates = max(saved["n_updates"], self.cfg.n_updates)
        print(
            f"resuming {self.path} at step {saved['step']:,} of {self.n_updates:,}, in"
            f" {getattr(self.cfg, 'dtype', None)} (before: {saved['config'].get('dtype')})"
        )
        return saved["step"], self.n_updates

    def save(self, step: int, log: TrainLog, guard: StepGuard, **more: Any) -> None:
        """Save the checkpoint, and as the best one if it has the least val_loss so far.

        While steps are being skipped nothing is saved: the weights themselves may be broken.
        """
        if guard.skipped_in_a_row:
            return
        metrics = log.lines[-1] if log.lines else {}
        config = vars(self.cfg)
        cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        checkpoint = dict(
            stage=self.stage,
            config={n: list(v) if isinstance(v, tuple) else v for n, v in config.items()},
            model=unshard(self.model.state_dict()),
            optimizer=self.optimizer.state_dict(),
            step=step,
            n_updates=self.n_updates,
            rng={"cpu": torch.get_rng_state(), "cuda": cuda_rng},
            metrics=metrics,
            **self.same,
            **more,
        )
        if rank() == 0:
            validated = metrics.get("step") == step and "stopped" not in metrics
            if validated and metrics.get("val_loss", math.inf) < self.best:
                self.best = metrics["val_loss"]
                save_checkpoint(self.best_path, checkpoint)  # first: a kill then costs nothing
            save_checkpoint(self.path, checkpoint, keep_previous=self.saved_step is not None)
            log.curves()
        self.saved_step = step
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # what one has saved, the others may read

    def last_saved(self) -> str:
        if not self.saved_step:
            return "nothing was saved yet"
        return f"the last good checkpoint is {self.path}, step {self.saved_step:,}"

    def finish(self, step: int, log: TrainLog, guard: StepGuard, next_command: str) -> None:
        """Say what there is now and what to type next."""
        if not self.path.exists():
            print(f"nothing was saved: no step had a finite loss and gradient; see {guard.path}")
            return
        size, saved = os.path.getsize(self.path) / 2**20, self.saved_step or step
        print(f"{self.path} ({size:.1f} MB), step {saved:,} of {self.n_updates:,}")
        print(f"pictures in {log.folder}")
        guard.report()
        stopped = "stopped; the same command with --resume continues"
        print(stopped if step < self.n_updates else f"next: {next_command}")
