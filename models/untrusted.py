"""What a checkpoint from a stranger may hold. torch.load(weights_only=True) runs no code; here the rest is checked before it is used.

Each function raises ValueError with the reason.
"""
import pickletools

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
KINDS = dict(stage=str, model_args=dict, model=dict, config=dict, optimizer=(list, dict), step=int, n_updates=int, rng=dict, metrics=dict,
             inputs=dict, fps=(int, float), start_frames=torch.Tensor, action_names=(list, type(None)))  # fmt: skip
LARGEST = 1 << 16  # no size in model_args is meant to be larger
CALLS = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2")  # what the pickle of a checkpoint may call, beside torch's storages


def check_pickle(data):
    """data: the pickle in a checkpoint. torch.load allows more calls than a checkpoint needs, among them such that ask for memory."""
    for opcode, name, _ in pickletools.genops(data):
        if opcode.name == "STACK_GLOBAL" or opcode.name in ("GLOBAL", "INST") and name not in CALLS and not (name.startswith("torch ") and name.endswith("Storage")):
            raise ValueError(f"it holds more than numbers and names: {name or 'a call'!r}")


def check_contents(checkpoint):
    """Raise ValueError for anything that save_checkpoint cannot have written: other kinds of values, tensors that claim more than is stored."""
    for name, kind in KINDS.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise ValueError(f"{name} is of the type {type(checkpoint[name]).__name__}")
    if not all(isinstance(checkpoint[name], KINDS[name]) for name in ("stage", "model_args", "model")):
        raise ValueError("no stage, no sizes or no weights")
    if not checkpoint["stage"].isidentifier() or len(checkpoint["stage"]) > 40:
        raise ValueError("its stage is no name")
    for name, weight in checkpoint["model"].items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor) or weight.dtype not in FLOATS:
            raise ValueError(f"{str(name)[:40]!r} is no weight")
    todo, seen, claimed, stored = [checkpoint], set(), 0, {}
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list, tuple)):
            if id(value) not in seen:  # it may hold itself
                seen.add(id(value))
                todo += [*value.keys(), *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError("a tensor without storage")
            claimed += value.nbytes
            stored[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"a value of the type {type(value).__name__}")
    if claimed > sum(stored.values()):
        raise ValueError("its tensors claim more than is stored")
    if not 0 < checkpoint.get("fps", 15) <= 1000:
        raise ValueError(f"fps is {checkpoint['fps']}")
    frames = checkpoint.get("start_frames")
    if frames is not None and (frames.dtype != torch.uint8 or frames.ndim != 5 or 0 in frames.shape or frames.shape[-1] != 3 or frames.shape[1] > 64):
        raise ValueError("start_frames are no frames")


def check_sizes(sizes, n_weights):
    """Raise ValueError for a number in model_args that would keep even a sketch of the model busy."""
    limits = {"n_blocks": n_weights, "depth": n_weights, "context_length": 256, 1: max(n_weights, 256)}  # 1: in a list, mostly a depth
    for name, value in sizes.items() if isinstance(sizes, dict) else enumerate(sizes):
        if isinstance(value, (dict, list)):
            check_sizes(value, n_weights)
        elif type(value) is int and not 0 <= value <= limits.get(name, LARGEST):
            raise ValueError(f"{name} is {value}")
    if isinstance(sizes, dict) and {"embed_dim", "n_heads", "context_length"} <= set(sizes):  # a model of the spine
        if sizes["embed_dim"] % (2 * sizes["n_heads"]) or sizes["context_length"] < 2:
            raise ValueError(f"embed_dim {sizes['embed_dim']}, n_heads {sizes['n_heads']} and context_length {sizes['context_length']} do not go together")
        if any(side % sizes["patch_size"] or side < 1 for side in sizes.get("frame_size", ())):
            raise ValueError(f"frames of {sizes['frame_size']} do not divide into patches of {sizes['patch_size']}")


def check_buffers(sketch, weights):
    """A model without memory, and its saved weights: tables that are not saved must not be large either."""
    if sum(buffer.nbytes for buffer in sketch.buffers()) > sum(weight.nbytes for weight in weights.values()) + (64 << 20):
        raise ValueError("its tables would need more memory than its weights")


def check_at_play(dynamics, frame_size):
    """Refuse a dynamics checkpoint that lacks what play takes from it, or has what cannot be. Raises ValueError."""
    if missing := [name for name in ("config", "inputs", "fps", "start_frames", "action_names") if name not in dynamics]:
        raise ValueError(f"has no {', '.join(missing)}")
    steps, temperature = (dynamics["config"].get(name) for name in ("steps", "temperature"))
    names, frames = dynamics["action_names"] or [], dynamics["start_frames"]
    if not (type(steps) is int and 1 <= steps <= 1000 and type(temperature) in (int, float) and 0 <= temperature < float("inf")):
        raise ValueError(f"has steps {steps!r} and temperature {temperature!r}")
    if len(names) > dynamics["model_args"]["n_actions"] or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names {len(names)} actions but has {dynamics['model_args']['n_actions']}")
    if list(frames.shape[2:4]) != list(frame_size):
        raise ValueError(f"has first frames of {list(frames.shape[2:4])}, the tokenizer is for {list(frame_size)}")
