"""What a checkpoint from a stranger may hold.

torch.load(weights_only=True) runs no code; the rest is checked here before it is used. The check_*
functions raise ValueError with the reason, read_untrusted and rebuild_untrusted CheckpointError.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from utils.cli import CheckpointError
from utils.hardening.files import check_digest, previous_of

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
KINDS = dict(
    stage=str,
    model_args=dict,
    model=dict,
    config=dict,
    optimizer=(list, dict),
    step=int,
    n_updates=int,
    rng=dict,
    metrics=dict,
    inputs=dict,
    fps=(int, float),
    start_frames=torch.Tensor,
    action_names=(list, type(None)),
)
LARGEST = 1 << 16  # no size in model_args is meant to be larger
# what the pickle of a checkpoint may call, beside torch's storages
CALLS = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2")


def check_pickle(data: bytes) -> None:
    """torch.load allows more calls than a checkpoint needs, some of which ask for memory."""
    for opcode, name, _ in pickletools.genops(data):
        called = opcode.name in ("GLOBAL", "INST") and name not in CALLS
        storage = called and name.startswith("torch ") and name.endswith("Storage")
        if opcode.name == "STACK_GLOBAL" or (called and not storage):
            raise ValueError(f"it holds more than numbers and names: {name or 'a call'!r}")


def check_contents(checkpoint: dict) -> None:
    """Refuse what save_checkpoint cannot have written."""
    for name, kind in KINDS.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise ValueError(f"{name} is of the type {type(checkpoint[name]).__name__}")
    required = ("stage", "model_args", "model")
    if not all(isinstance(checkpoint[name], KINDS[name]) for name in required):
        raise ValueError("no stage, no sizes or no weights")
    if not checkpoint["stage"].isidentifier() or len(checkpoint["stage"]) > 40:
        raise ValueError("its stage is no name")
    for name, weight in checkpoint["model"].items():
        tensor = isinstance(name, str) and isinstance(weight, torch.Tensor)
        if not tensor or weight.dtype not in FLOATS:
            raise ValueError(f"{str(name)[:40]!r} is no weight")
    check_values(checkpoint)
    if not 0 < checkpoint.get("fps", 15) <= 1000:
        raise ValueError(f"fps is {checkpoint['fps']}")
    frames = checkpoint.get("start_frames")
    if frames is not None:
        shape = tuple(frames.shape)
        video = frames.dtype == torch.uint8 and len(shape) == 5 and shape[-1] == 3
        if not video or 0 in shape or shape[1] > 64:
            raise ValueError("start_frames are no frames")


def check_values(checkpoint: dict) -> None:
    """Only dicts, lists, numbers, names and tensors, and no tensor beyond what is stored."""
    todo, seen, claimed, stored = [checkpoint], set(), 0, {}
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list | tuple):
            if id(value) in seen:  # it may contain itself
                continue
            seen.add(id(value))
            todo += [*value.keys(), *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError("a tensor without storage")
            claimed += value.nbytes
            stored[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif not isinstance(value, str | int | float | None):
            raise ValueError(f"a value of the type {type(value).__name__}")
    if claimed > sum(stored.values()):
        raise ValueError("its tensors claim more than is stored")


def check_sizes(sizes: dict | list, n_weights: int) -> None:
    """Refuse a number in model_args that would keep even a sketch of the model busy."""
    limits = {"n_blocks": n_weights, "depth": n_weights, "context_length": 256}
    if not isinstance(sizes, dict):
        sizes, limits = dict(enumerate(sizes)), {1: max(n_weights, 256)}  # mostly a depth
    for name, value in sizes.items():
        if isinstance(value, dict | list):
            check_sizes(value, n_weights)
        elif type(value) is int and not 0 <= value <= limits.get(name, LARGEST):
            raise ValueError(f"{name} is {value}")
    if not {"embed_dim", "n_heads", "context_length"} <= set(sizes):
        return
    width, heads, length = (sizes[n] for n in ("embed_dim", "n_heads", "context_length"))
    if width % (2 * heads) or length < 2:
        raise ValueError(
            f"embed_dim {width}, n_heads {heads} and context_length {length} do not go together"
        )
    frame_size = sizes.get("frame_size", ())
    if any(side % sizes["patch_size"] or side < 1 for side in frame_size):
        patch = sizes["patch_size"]
        raise ValueError(f"frames of {frame_size} do not divide into patches of {patch}")


def check_buffers(sketch: torch.nn.Module, weights: dict) -> None:
    """Tables that are not saved must not be much larger than the saved weights."""
    tables = sum(buffer.nbytes for buffer in sketch.buffers())
    if tables > sum(weight.nbytes for weight in weights.values()) + (64 << 20):
        raise ValueError("its tables would need more memory than its weights")


def check_playable(dynamics: dict, frame_size: list[int]) -> None:
    """Refuse a dynamics checkpoint that lacks what playing takes from it."""
    needed = ("config", "inputs", "fps", "start_frames", "action_names")
    missing = [name for name in needed if name not in dynamics]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}")
    steps, temperature = (dynamics["config"].get(name) for name in ("steps", "temperature"))
    right_steps = type(steps) is int and 1 <= steps <= 1000
    number = type(temperature) in (int, float)
    if not right_steps or not number or not 0 <= temperature < float("inf"):
        raise ValueError(f"has steps {steps!r} and temperature {temperature!r}")
    names, n_actions = dynamics["action_names"] or [], dynamics["model_args"]["n_actions"]
    if len(names) > n_actions or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names {len(names)} actions but has {n_actions}")
    found = list(dynamics["start_frames"].shape[2:4])
    if found != list(frame_size):
        raise ValueError(f"has first frames of {found}, the tokenizer is for {list(frame_size)}")


def reason_of(error: Exception, length: int) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:length]


def repack(file: BinaryIO, size: int) -> io.BytesIO:
    """A zip file as Python reads it, written anew: what torch reads is then what was checked.

    Raises ValueError.
    """
    archive, content = zipfile.ZipFile(file), io.BytesIO()
    entries = archive.infolist()
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if compressed or sum(entry.file_size for entry in entries) > size:
        raise ValueError("it would unpack to more than it is")
    with zipfile.ZipFile(content, "w") as again:
        for entry in entries:
            data = archive.read(entry)
            if entry.filename.endswith("/data.pkl"):
                check_pickle(data)
            again.writestr(entry.filename, data)
    content.seek(0)
    return content


def read_untrusted(path: Path) -> dict:
    """One checkpoint file, checked: digest, size unpacked, kinds of values. No code is run."""
    try:
        with open(path, "rb") as file:
            content = repack(file, check_digest(file))
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        check_contents(checkpoint)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is not a checkpoint of this project:"
            " it holds more than numbers and names, and is not opened"
        ) from None
    except Exception as error:  # whatever a foreign file may do to a reader
        raise CheckpointError(
            f"{path} is not a checkpoint of this project, or it is damaged"
            f" ({reason_of(error, 120)})"
        ) from None
    return checkpoint


def read_newest(path: Path) -> dict:
    """The checkpoint at `path`; where it is damaged, the one before it, with a line."""
    previous = previous_of(path)
    try:
        return read_untrusted(path)
    except CheckpointError as error:
        if not previous.is_file():
            raise
        try:
            checkpoint = read_untrusted(previous)
        except CheckpointError:
            raise error from None
        print(f"{error}; using {previous}, step {checkpoint.get('step', '?')}, instead")
        return checkpoint


def best_loss(path: Path) -> float:
    """The val_loss of a STAGE.best.pt; inf where there is none, or it is damaged."""
    try:
        return float(read_untrusted(path)["metrics"]["val_loss"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return math.inf


def rebuild_untrusted(make: Callable, checkpoint: dict, path: str | Path) -> torch.nn.Module:
    """make() → a model; → that model with the saved weights, in evaluation mode.

    It is made without memory first, to see whether the weights fit.
    """
    try:
        check_sizes(checkpoint["model_args"], len(checkpoint["model"]))
        with torch.device("meta"):
            sketch = make()
        check_buffers(sketch, checkpoint["model"])
        sketch.load_state_dict(checkpoint["model"], assign=True)
        model = make()
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # whatever foreign sizes may do to a model
        raise CheckpointError(
            f"the weights in {path} do not fit the sizes saved with them"
            f" ({reason_of(error, 200)}); train it again"
        ) from None
    return model.eval()
