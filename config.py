"""Settings: one dataclass for what the three stages share, one per stage, presets as one table.

A value comes from the command line, else from the preset, else from the dataclass; the preset comes from the device.
The comment behind a field is its --help text.
"""
import argparse
import dataclasses
import errno
import inspect
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# OpenMP's threads spin while they wait for each other. For how long, its library reads once, when torch loads it; so every program imports this
# module before torch. By default they spin so long that two trainings on the same cores slow each other tenfold and more; with a short spin
# it is about twofold, and a training alone is as fast (bench.py --beside). What the user has set stands; other OpenMP libraries do not look.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch  # noqa: E402


class UserError(ValueError):
    """Something the user can mend: printed as one line, exit code 2."""


@dataclass
class Config:
    data_path: str = ""  # a folder of videos, one video, or an HDF5 file
    data_type: str = "auto"  # auto, folder, video, h5 or dummy
    use_dummy_data: bool = False  # a small procedural world instead of --data-path
    frame_size: int = 64  # side of the square that videos are resized to; HDF5 frames stay as they are
    out: str = ""  # folder of the world, for example checkpoints/pong
    preset: str = ""  # tiny, cpu or gpu; by default what the device suggests
    n_updates: int = 0  # the budget: optimizer steps
    num_epochs: float = 0.0  # or passes over the training frames
    minutes: float = 0.0  # or minutes, turned into updates once, at the start
    batch_size: int = 8  # clips per process and backward pass
    accumulate: int = 1  # backward passes per step
    context_length: int = 8  # frames per clip, and how far back attention sees
    optimizer: str = "muon"  # muon: for the matrices of the blocks, AdamW for the rest; adamw: for all (the article)
    learning_rate: float = 4e-3  # peak; 50 steps of warm-up, then linear decay to a twentieth
    grad_clip: float = 1.0  # largest gradient norm
    max_skipped: int = 20  # steps in a row without a finite loss and gradient; then training stops
    embed_dim: int = 128  # width of the transformer
    hidden_dim: int = 512  # width of its feed-forward layers
    n_heads: int = 4  # attention heads
    n_blocks: int = 2  # spatio-temporal blocks (in encoder and decoder each)
    sample_every: int = 500  # steps between validation lines with a picture
    save_every: int = 500  # steps between checkpoints
    seed: int = 0  # fixes initial weights, batches and masks
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # auto, float32 or bfloat16 (auto: bfloat16 where it is faster)
    compile: bool = False  # torch.compile the model: a minute to begin, then a quarter to a half faster
    recompute: bool = False  # recompute activations in the backward pass: less memory, one more forward pass
    resume: bool = False  # go on from the checkpoint in --out


@dataclass
class TokenizerConfig(Config):
    patch_size: int = 8  # pixels per side of a token
    levels: tuple = (4, 4, 4, 4, 4)  # FSQ levels per dimension; 4,4,4,4,4 makes 1,024 codes


@dataclass
class LatentActionConfig(Config):
    patch_size: int = 8  # pixels per side of a patch
    n_actions: int = 8  # how many latent actions; a power of two
    keep_rate: float = 1.0  # share of the history that the decoder's transformer sees (1: Genie; 0: first frame only, the article)
    encoder: str = "matches"  # matches: pairs, and how they match when moved; pairs: both frames in a patch; frames: pooled (the article)
    decoder: str = "warp"  # warp: moves the last frame's patches, then adds; change: only adds; frame: draws it anew (the article)
    latent_norm: str = "rms"  # of actions before quantisation: rms, or none (the article)
    soft_rate: float = 0.5  # share of action bits that pass unrounded in training (0: the article)
    entropy_lambda: float = 0.25  # weight of the bonus for using all actions
    var_target: float = 0.2  # variance of each action bit below which the penalty begins
    var_lambda: float = 1.0  # weight of that penalty


@dataclass
class DynamicsConfig(Config):
    n_blocks: int = 4
    video_tokenizer_path: str = ""  # default: tokenizer.pt in --out
    lam_path: str = ""  # default: lam.pt in --out
    objective: str = "ce"  # ce: masked tokens, cross-entropy; mse: next latents, squared error (seed 002)
    actions: str = "latent"  # latent: inferred by the LAM; true: recorded buttons, the skyline; random: dice, the floor
    context: str = "clean"  # earlier frames in training: clean, as at play; masked: like the frame itself (Genie)
    token_kernel: int = 3  # how many tokens across the embedding of a token sees; 1: itself alone (Genie)
    conditioning: str = "adaln"  # how the action enters: adaln, or add: added to every token (Genie)
    fsdp: bool = False  # under torchrun: share the weights out over the processes instead of copying them
    steps: int = 2  # MaskGIT passes per frame at play
    temperature: float = 1.0  # of sampling at play; 1 is the model's own; with less the likeliest tokens soon fill the picture


# What departs from the defaults above. The first entry of a preset is for all stages.
PRESETS = {
    "tiny": (  # seconds; for tests and for seeing that everything runs
        dict(n_updates=150, batch_size=32, context_length=4, embed_dim=64, hidden_dim=128, n_blocks=1, sample_every=100),
        dict(tokenizer=dict(), lam=dict(batch_size=16), dynamics=dict()),
    ),
    "cpu": (  # two CPU cores, ten minutes for the three stages
        dict(),
        dict(tokenizer=dict(minutes=2.8), lam=dict(minutes=2.4), dynamics=dict(minutes=4.4)),
    ),
    "gpu": (  # one CUDA GPU
        dict(batch_size=64, context_length=16, embed_dim=256, hidden_dim=1024, n_heads=8, learning_rate=1e-3),
        dict(tokenizer=dict(minutes=6.0, n_blocks=4), lam=dict(minutes=4.0, n_blocks=4), dynamics=dict(minutes=10.0, n_blocks=8)),
    ),
}
CHOICES = {
    "data_type": ("auto", "folder", "video", "h5", "dummy"),
    "dtype": ("auto", "float32", "bfloat16"),
    "optimizer": ("muon", "adamw"),
    "encoder": ("matches", "pairs", "frames"),
    "decoder": ("warp", "change", "frame"),
    "latent_norm": ("rms", "none"),
    "objective": ("ce", "mse"),
    "actions": ("latent", "true", "random"),
    "context": ("clean", "masked"),
    "conditioning": ("adaln", "add"),
}
BUDGETS = ("n_updates", "num_epochs", "minutes")


def print_user_errors():
    """From here on a UserError or CheckpointError that nobody caught is one line on stderr and exit code 2."""

    def hook(kind, error, traceback):
        if kind.__name__ in ("UserError", "CheckpointError"):
            print(f"error: {error}", file=sys.stderr)
            sys.stderr.flush()
            raise SystemExit(2)
        if issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"error: cannot write {error.filename or ''} ({error.strerror}); make room, then go on with --resume", file=sys.stderr)
            raise SystemExit(2)
        if kind is KeyboardInterrupt:
            raise SystemExit(130)
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line, `_` and `-` alike in option names, no abbreviations."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; see --help")

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else list(argv)
        return super().parse_args([re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), a) for a in argv])


def choose_device(name):
    """"auto", "cpu", "cuda" or "cuda:1" → torch.device. Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported here")
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.set_float32_matmul_precision("high")  # products in TF32, several times faster: 10 bits of mantissa instead of 23
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); use cpu or cuda") from None
    return device


def integers(text):
    """ "4,4,4" → (4, 4, 4)."""
    return tuple(int(part) for part in text.split(","))


def make_folder(path):
    """Create the folder `path` where it is missing. Raises UserError if that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another place") from None


def help_of(kind):
    """Field name → the comment behind it, over the class and its bases."""
    lines = "".join(inspect.getsource(base) for base in reversed(kind.__mro__[:-1])).splitlines()
    found = (re.match(r"    (\w+): .* = .*?  # (.*)", line) for line in lines)
    return {m[1]: m[2] for m in found if m}


def parse_config(kind, stage, description, argv=None):
    """The command line → an instance of `kind` (one of the dataclasses above), checked; prints what it settled on."""
    parser, texts = Parser(description=description), help_of(kind)
    for field in dataclasses.fields(kind):
        name, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, bool):
            options = dict(action="store_true")
        elif isinstance(default, tuple):
            options = dict(type=integers, metavar="4,4,…")
        else:
            options = dict(type=type(default), choices=CHOICES.get(field.name))
        shown = "" if default in ("", 0, 0.0, False) else f" [{default}]"
        parser.add_argument(name, default=argparse.SUPPRESS, help=texts.get(field.name, "") + shown, **options)
    given = vars(parser.parse_args(argv))

    device = choose_device(given.get("device", "auto"))
    preset = given.get("preset") or ("gpu" if device.type == "cuda" else "cpu")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    values = {**PRESETS[preset][0], **PRESETS[preset][1][stage]}
    if any(name in given for name in BUDGETS):
        values = {name: value for name, value in values.items() if name not in BUDGETS}
    cfg = kind(**{**values, **given, "preset": preset, "device": str(device)})
    check(cfg)
    departs = {name: value for name, value in given.items() if name not in ("preset", "device")}
    print(f"{stage}: preset {preset} on {device}; " + ", ".join(f"{k}={v}" for k, v in departs.items()))
    return cfg


def check(cfg):
    """Refuse settings that contradict themselves, before any work."""

    def need(condition, text):
        if not condition:
            raise UserError(text)

    budgets = [name for name in BUDGETS if getattr(cfg, name)]
    need(len(budgets) == 1, f"give exactly one of --n-updates, --num-epochs and --minutes, not {' and '.join(budgets) or 'none'}")
    for name in (*budgets, "batch_size", "accumulate", "patch_size", "embed_dim", "hidden_dim", "n_heads", "n_blocks", "learning_rate",
                 "grad_clip", "max_skipped", "sample_every", "save_every", "frame_size"):  # fmt: skip
        need(getattr(cfg, name, 1) > 0, f"--{name.replace('_', '-')} must be positive, got {getattr(cfg, name, 1)}")
        need(getattr(cfg, name, 1) < 2**31, f"--{name.replace('_', '-')} must be below 2,147,483,648, got {getattr(cfg, name, 1)}")
    need(cfg.seed >= 0, f"--seed must not be negative, got {cfg.seed}")
    need(cfg.seed < 2**63, f"--seed must fit into 64 bits, got {cfg.seed}")
    for name, largest in (("embed_dim", 65536), ("hidden_dim", 65536), ("context_length", 256), ("frame_size", 8192)):
        need(getattr(cfg, name) <= largest, f"--{name.replace('_', '-')} must be at most {largest:,}, got {getattr(cfg, name)}")
    need(cfg.out, "say where the world is to be saved, for example --out checkpoints/pong")
    need(cfg.context_length >= 2, f"--context-length must be at least 2 frames, got {cfg.context_length}")
    need(cfg.embed_dim % (2 * cfg.n_heads) == 0, f"--embed-dim {cfg.embed_dim} must be an even multiple of --n-heads {cfg.n_heads}")
    if hasattr(cfg, "levels"):
        need(cfg.levels and min(cfg.levels) >= 2, f"--levels must be integers of at least 2, got {cfg.levels}")
        need(math.prod(cfg.levels) <= 2**20, f"--levels must make at most 1,048,576 codes, got {math.prod(cfg.levels):,}")
    if hasattr(cfg, "n_actions"):
        n = cfg.n_actions
        need(n >= 2 and n & (n - 1) == 0, f"--n-actions must be a power of two (2, 4, 8, 16, …), got {n}")
        need(0 <= cfg.keep_rate <= 1, f"--keep-rate must lie in 0 … 1, got {cfg.keep_rate}")
        need(0 <= cfg.soft_rate <= 1, f"--soft-rate must lie in 0 … 1, got {cfg.soft_rate}")
    if hasattr(cfg, "temperature"):
        check_sampling(cfg)
        need(cfg.token_kernel % 2 == 1, f"--token-kernel must be odd (1, 3, 5), got {cfg.token_kernel}")


def check_sampling(args):
    """args.steps and args.temperature, each None or in range."""
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps must be at least 1, got {args.steps}")
    if args.temperature is not None and args.temperature < 0:
        raise UserError(f"--temperature must not be negative, got {args.temperature}")
