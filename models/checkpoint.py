"""Checkpoints: written whole or not at all, read without running code, and enough to rebuild the model by themselves.

One .pt file per stage: stage, model_args, config, model (weights), optimizer, step, n_updates, rng, metrics; dynamics.pt adds
inputs (fingerprints of the two others), fps, start_frames and action_names.
"""
import hashlib
import os
import pickle
from pathlib import Path

import torch

from models.dynamics import DynamicsModel
from models.latent_action_model import LatentActionModel
from models.video_tokenizer import VideoTokenizer

MODELS = {"tokenizer": VideoTokenizer, "lam": LatentActionModel, "dynamics": DynamicsModel}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another stage, or does not fit the others; one line for the user."""


def save_checkpoint(path, checkpoint: dict):
    """Write to a temporary file, flush to disk, rename: at every moment `path` is absent, old or new, never half."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path, stage: str) -> dict:
    """The dict that save_checkpoint wrote, on the CPU. Raises CheckpointError if it is missing, broken or of another stage."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; train it first with: python train_{stage}.py --out {path.parent}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found, _, _ = (checkpoint[name] for name in ("stage", "model_args", "model"))
    except (OSError, EOFError, IndexError, KeyError, TypeError, RuntimeError, ValueError, pickle.UnpicklingError):
        raise CheckpointError(f"{path} is not a checkpoint of this project, or it is damaged; train it again") from None
    if found != stage:
        raise CheckpointError(f"{path} is a {found} checkpoint, but a {stage} checkpoint is needed here")
    return checkpoint


def build_model(checkpoint: dict, path="the checkpoint"):
    """The trained model, in evaluation mode, from its saved sizes alone."""
    try:
        model = MODELS[checkpoint["stage"]](**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the weights in {path} do not fit the sizes saved with them ({reason}); train it again") from None
    return model.eval()


def fingerprint(checkpoint: dict) -> str:
    """Eight hex digits of the weights: tokens mean nothing to a dynamics model that learned from another tokenizer."""
    digest = hashlib.sha256()
    for name, weight in sorted(checkpoint["model"].items()):
        digest.update(name.encode() + weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def check_fit(tokenizer: dict, lam: dict | None, dynamics: dict | None = None):
    """Refuse checkpoints that do not belong together. Raises CheckpointError naming both values."""
    ours, theirs = tokenizer["model_args"], lam and lam["model_args"]
    if lam and ours["frame_size"] != theirs["frame_size"]:
        raise CheckpointError(f"the tokenizer is for frames of {ours['frame_size']}, the LAM for {theirs['frame_size']}; train one again")
    if dynamics is None:
        return
    sizes = dynamics["model_args"]
    H, W = ours["frame_size"]
    grid = [H // ours["patch_size"], W // ours["patch_size"]]
    pairs = [("patches per frame", grid, sizes.get("grid")), ("codebook levels", ours["levels"], sizes["levels"])]
    if lam:
        pairs.append(("n_actions", theirs["n_actions"], sizes["n_actions"]))
    for stage, checkpoint in (("tokenizer", tokenizer), ("lam", lam)):
        if checkpoint and stage in dynamics["inputs"]:
            pairs.append((f"{stage} weights", fingerprint(checkpoint), dynamics["inputs"][stage]))
    for what, found, needed in pairs:
        if found != needed:
            raise CheckpointError(f"the dynamics model was trained with {what} {needed}, but finds {found}; run train_dynamics.py again")
