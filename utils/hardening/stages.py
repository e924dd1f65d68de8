"""Do the stages of a world fit together? Loading the frozen ones before stage 3 trains on them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoint import build_model, load_checkpoint, save_checkpoint
from utils.cli import UserError
from utils.hardening.files import fingerprint
from utils.hardening.fit import check_fit

import torch

from models.distributed import rank


@dataclass
class Frozen:
    """Stages 1 and 2 as stage 3 uses them; lam is None for true actions."""

    tokenizer: torch.nn.Module
    lam: torch.nn.Module | None
    n_actions: int
    grid: list[int]  # rows and columns of tokens
    levels: list[int]
    inputs: dict[str, str]  # fingerprints
    action_names: list[str] | None  # of true actions
    checkpoints: dict[str, dict]

    def label(self, frames: torch.Tensor, true_actions: torch.Tensor | None) -> tuple:
        """frames (B, T, 3, H, W) → tokens (B, T, N) and actions (B, T-1)."""
        actions = self.lam.infer(frames) if self.lam else true_actions
        return self.tokenizer.encode(frames), actions


def load_frozen(cfg: Any, clips: Any, device: torch.device) -> Frozen:
    """Load the stages that cfg names. Raises UserError if they do not fit together."""
    paths = {"tokenizer": Path(cfg.video_tokenizer_path or Path(cfg.out) / "tokenizer.pt")}
    if cfg.actions != "true":
        paths["lam"] = Path(cfg.lam_path or Path(cfg.out) / "lam.pt")
    elif clips.dataset.actions is None:
        raise UserError(
            f"--actions true, but {cfg.data_path} has no recorded actions;"
            " leave it out to use latent ones"
        )
    elif clips.dataset.actions.min() < 0:
        raise UserError(
            f"--actions true, but {cfg.data_path} has frames with an unknown action (-1);"
            " leave it out: train_lam.py --label-weight 1 uses those that are known"
        )
    saved = {stage: load_checkpoint(path, stage) for stage, path in paths.items()}
    check_fit(saved["tokenizer"], saved.get("lam"))
    for stage, path in paths.items():
        home = Path(cfg.out) / f"{stage}.pt"
        if home.exists() and fingerprint(load_checkpoint(home, stage)) != fingerprint(saved[stage]):
            raise UserError(
                f"{home} is another {stage} than {path};"
                " a world has one of each, so use another --out"
            )
    longest = min(checkpoint["model_args"]["context_length"] for checkpoint in saved.values())
    if cfg.context_length > longest:
        raise UserError(
            f"--context-length {cfg.context_length}, but {' and '.join(saved)} learned from clips"
            f" of {longest}; use that, or train them with more"
        )
    sizes = saved["tokenizer"]["model_args"]
    frame_size = sizes["frame_size"]
    if frame_size != clips.frame_size:
        raise UserError(
            f"{paths['tokenizer']} is for frames of {frame_size}, the data has {clips.frame_size}"
        )
    if cfg.latent_dim not in (0, len(sizes["levels"])):
        raise UserError(
            f"--latent-dim {cfg.latent_dim}, but the tokens of {paths['tokenizer']} have"
            f" {len(sizes['levels'])} dimensions; give that, or leave it out"
        )
    models = {name: build_model(saved[name], paths[name]).to(device) for name in saved}
    lam = models.get("lam")
    return Frozen(
        tokenizer=models["tokenizer"],
        lam=lam,
        n_actions=lam.n_actions if lam else clips.dataset.n_true_actions(),
        grid=[side // sizes["patch_size"] for side in frame_size],
        levels=sizes["levels"],
        inputs={name: fingerprint(checkpoint) for name, checkpoint in saved.items()},
        action_names=None if lam else list(clips.dataset.action_names),
        checkpoints=saved,
    )


def complete_world(cfg: Any, frozen: Frozen) -> None:
    """Copy checkpoints that were trained elsewhere into --out: a world has all three."""
    for stage, checkpoint in frozen.checkpoints.items() if rank() == 0 else ():
        home = Path(cfg.out) / f"{stage}.pt"
        if home.exists():
            continue
        save_checkpoint(home, checkpoint)
        table = Path(cfg.lam_path).parent / "actions.json"
        if stage == "lam" and table.exists():
            shutil.copy(table, cfg.out)
