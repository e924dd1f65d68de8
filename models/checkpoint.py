"""Checkpoints: written whole or not at all, checked before they are used, read without running code, enough to rebuild the model by themselves.

One .pt file per stage: stage, model_args, config, model (weights), optimizer, step, n_updates, rng, metrics; dynamics.pt adds
inputs (fingerprints of the two others), fps, start_frames and action_names. Behind what torch.save wrote stands its SHA-256, so that
a file cut short or changed is told from a sound one; the checkpoint before it stays as STAGE.previous.pt and is then used instead.
"""
import hashlib
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import torch

from models.dynamics import DynamicsModel
from models.latent_action_model import LatentActionModel
from models.untrusted import check_buffers, check_contents, check_pickle, check_sizes
from models.video_tokenizer import VideoTokenizer

MODELS = {"tokenizer": VideoTokenizer, "lam": LatentActionModel, "dynamics": DynamicsModel}
MARK = b"sha256: "  # the last 40 bytes of a file: this, and the digest of all before
TAIL = len(MARK) + 32


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another stage, or does not fit the others; one line for the user."""


# --- writing -----------------------------------------------------------------------------------------------------
def previous_of(path):
    """Where the checkpoint before goes: tokenizer.pt → tokenizer.previous.pt."""
    return Path(path).with_suffix(".previous.pt")


def save_checkpoint(path, checkpoint: dict, keep_previous=False):
    """Write to a temporary file, flush to disk, rename: at every moment `path` is old or new, never half, and never gone.

    keep_previous: what was at `path` stays as previous_of(path). Raises CheckpointError where it cannot be written; then nothing has changed.
    """
    path = Path(path)
    part, spare = path.with_name(path.name + ".part"), previous_of(path).with_suffix(".part")
    content = io.BytesIO()
    torch.save(checkpoint, content)
    content.write(MARK + hashlib.sha256(content.getbuffer()).digest())
    try:
        with open(part, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and is_whole(path):
            spare.unlink(missing_ok=True)
            try:
                os.link(path, spare)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, spare)
            os.replace(spare, previous_of(path))
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):  # the new names must reach the disk, too
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        needed, free = content.tell() / 2**20, shutil.disk_usage(path.parent).free / 2**20
        raise CheckpointError(f"cannot save {path} ({error.strerror}): it needs {needed:,.1f} MB, {free:,.1f} MB are free; what was saved before is still there") from None
    finally:
        for leftover in (part, spare):
            leftover.unlink(missing_ok=True)


# --- reading -----------------------------------------------------------------------------------------------------
def load_checkpoint(path, stage: str) -> dict:
    """The dict that save_checkpoint wrote, on the CPU; where it is damaged, with a line that says so, the one before.

    Raises CheckpointError if there is none that is sound, or it is of another stage.
    """
    path, previous = Path(path), previous_of(path)
    if not path.is_file() and not previous.is_file():
        raise CheckpointError(f"no checkpoint at {path}; train it first with: python train_{stage}.py --out {path.parent}")
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        if not previous.is_file():
            raise
        try:
            checkpoint = read_checkpoint(previous)
        except CheckpointError:
            raise error from None
        print(f"{error}; using {previous}, step {checkpoint.get('step', '?')}, instead")
    if checkpoint["stage"] != stage:
        raise CheckpointError(f"{path} is a {checkpoint['stage']} checkpoint, but a {stage} checkpoint is needed here")
    return checkpoint


def check_digest(file):
    """→ the size of what the digest is of. Raises ValueError if the file is not as it was written."""
    size, digest = file.seek(0, os.SEEK_END) - TAIL, hashlib.sha256()
    file.seek(max(0, size))
    tail = file.read()
    if size < 0 or tail[: len(MARK)] != MARK:
        raise ValueError("it does not end with a checksum")
    file.seek(0)
    for start in range(0, size, 1 << 20):
        digest.update(file.read(min(1 << 20, size - start)))
    if digest.digest() != tail[len(MARK) :]:
        raise ValueError("its checksum is wrong")
    return size


def is_whole(path):
    try:
        with open(path, "rb") as file:
            return check_digest(file) > 0
    except (OSError, ValueError):
        return False


def repack(file, size):
    """The entries of a zip file as Python reads them, as a zip file anew: what torch reads is then what was checked. Raises ValueError."""
    archive, content = zipfile.ZipFile(file), io.BytesIO()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()) or sum(entry.file_size for entry in archive.infolist()) > size:
        raise ValueError("it would unpack to more than it is")
    with zipfile.ZipFile(content, "w") as again:
        for entry in archive.infolist():
            data = archive.read(entry)
            if entry.filename.endswith("/data.pkl"):
                check_pickle(data)
            again.writestr(entry.filename, data)
    content.seek(0)
    return content


def read_checkpoint(path) -> dict:
    """One file, checked: the digest, then what it unpacks to, then (no code is run) what kinds of things it holds. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            checkpoint = torch.load(repack(file, check_digest(file)), map_location="cpu", weights_only=True)
        check_contents(checkpoint)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is not a checkpoint of this project: it holds more than numbers and names, and is not opened") from None
    except Exception as error:  # whatever a foreign file may do to a reader
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{path} is not a checkpoint of this project, or it is damaged ({reason})") from None
    return checkpoint


def rebuild(make, checkpoint: dict, path="the checkpoint"):
    """make() → a model; → that model with the saved weights, in evaluation mode. It is made without memory first, to see whether they fit."""
    try:
        check_sizes(checkpoint["model_args"], len(checkpoint["model"]))
        with torch.device("meta"):
            sketch = make()
        check_buffers(sketch, checkpoint["model"])
        sketch.load_state_dict(checkpoint["model"], assign=True)
        model = make()
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # whatever foreign sizes may do to a model
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"the weights in {path} do not fit the sizes saved with them ({reason}); train it again") from None
    return model.eval()


def build_model(checkpoint: dict, path="the checkpoint"):
    """The trained model, in evaluation mode, from its saved sizes alone."""
    return rebuild(lambda: MODELS[checkpoint["stage"]](**checkpoint["model_args"]), checkpoint, path)


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
    pairs = [("patches per frame", grid, sizes.get("grid")), ("codebook levels", ours["levels"], sizes.get("levels"))]
    if lam:
        pairs.append(("n_actions", theirs["n_actions"], sizes.get("n_actions")))
    for stage, checkpoint in (("tokenizer", tokenizer), ("lam", lam)):
        if checkpoint and stage in dynamics["inputs"]:
            pairs.append((f"{stage} weights", fingerprint(checkpoint), dynamics["inputs"][stage]))
    for what, found, needed in pairs:
        if found != needed:
            raise CheckpointError(f"the dynamics model was trained with {what} {needed!r}, but finds {found!r}; run train_dynamics.py again")
