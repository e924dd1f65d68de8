"""Settings of a training run: from the command line, a preset or a checkpoint; and their limits."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from utils.cli import CheckpointError, Parser, UserError, check_ranges, flag

BUDGETS = ("n_updates", "num_epochs", "minutes")
SOURCE = ("data_path", "data_type", "use_dummy_data")  # the data's fingerprint must be the same
# What may differ from the run that is resumed: it changes how training runs, not what is learned.
FREE = ("device", "dtype", "compile", "recompute", "fsdp", "sample_every", "save_every")
FREE += ("max_skipped", "steps", "temperature", "video_tokenizer_path", "lam_path", *SOURCE)
FREE += ("triplets", "dataset_config", "max_problems")  # of the extras


def read_settings(
    kind: type, stage: str, description: str, argv: list[str] | None, presets: dict
) -> Any:
    """The command line → an instance of `kind` (config.py), complete and checked, and printed."""
    from utils.device import choose_device  # here, so that --help does not wait for torch

    parser = Parser(description=description)
    parser.add_fields(kind)
    typed = vars(parser.parse_args(argv))
    given = typed | {"out": typed.get("out") or default_out(typed)}
    device = choose_device(given.get("device", "auto"))
    if given.get("resume"):
        cfg = resumed(kind, stage, given, device)
    else:
        preset = given.get("preset") or ("gpu" if device.type == "cuda" else "cpu")
        values = preset_values(presets, preset, stage)
        if any(name in given for name in BUDGETS):
            values = {name: value for name, value in values.items() if name not in BUDGETS}
        cfg = kind(**values | given | {"preset": preset, "device": str(device)})
    if getattr(cfg, "latent_dim", 0) and hasattr(cfg, "levels"):
        if given.get("levels", (4,) * cfg.latent_dim) != (4,) * cfg.latent_dim:
            raise UserError(
                f"--latent-dim {cfg.latent_dim} stands for as many levels of 4,"
                f" but --levels are {cfg.levels}; give one of the two"
            )
        cfg.levels = (4,) * cfg.latent_dim
    check_settings(cfg)
    shown = [f"{name}={value}" for name, value in typed.items() if name not in ("preset", "device")]
    print(f"{stage}: preset {cfg.preset} on {cfg.device}, into {cfg.out}; " + ", ".join(shown))
    return cfg


def preset_values(presets: dict, preset: str, stage: str) -> dict:
    """What a preset sets for a stage. Raises UserError for an unknown preset."""
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}; there are {', '.join(presets)}")
    return presets[preset].get("all", {}) | presets[preset].get(stage, {})


def default_out(given: dict) -> str:
    """checkpoints/NAME, by the name of the data; "" where no data is named."""
    if given.get("use_dummy_data") or given.get("data_type") == "dummy":
        return "checkpoints/dummy"
    path = Path(given.get("data_path", "")).absolute()
    name = path.stem if path.is_file() else path.name
    return f"checkpoints/{name}" if given.get("data_path") else ""


def resumed(kind: type, stage: str, given: dict, device: Any) -> Any:
    """The settings of the run that is resumed, and what was typed beside --resume where it may be.

    Raises UserError, with both values, for an option that would make another run of it.
    """
    from utils.checkpoint import load_checkpoint

    if not given["out"]:
        raise UserError("say which world to resume, for example --out checkpoints/pong")
    path = Path(given["out"]) / f"{stage}.pt"
    saved = load_checkpoint(path, stage)
    before = config_of(kind, saved, path)
    now = {"out": given["out"], "device": str(device), "resume": True, "data_fingerprint": ""}
    if torchrun_processes() == 1:  # a run that was sharded goes on in one process
        now["fsdp"] = False
    values = before | {name: value for name, value in now.items() if name in before}
    if device.type != before["device"].split(":")[0]:
        values["dtype"] = "auto"
    if any(name in given for name in SOURCE):
        values |= {f.name: f.default for f in dataclasses.fields(kind) if f.name in SOURCE}
    if "n_updates" in given:
        before["n_updates"] = saved.get("n_updates", before["n_updates"])  # planned, by minutes too
        values |= {name: 0.0 for name in BUDGETS[1:] if name in before}
    for name in [name for name in given if name not in ("out", "resume", "device")]:
        was, now = before[name], given[name]
        longer = name == "n_updates" and now > was  # the schedule is stretched
        if now != was and not longer and name not in FREE:
            raise UserError(
                f"cannot resume {path}: {name} was {was}, now it is {now};"
                f" leave {flag(name)} out, or leave out --resume"
            )
        if now != was:
            print(f"resuming with {flag(name)} {now} (before: {was})")
        values[name] = now
    return kind(**values)


def config_of(kind: type, saved: dict, path: Path) -> dict:
    """The settings in a checkpoint; the default for an option that there was not yet."""
    config, result = saved.get("config", {}), {}
    for field in dataclasses.fields(kind):
        value = config.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if type(field.default) is float and type(value) is int else value
        if field.default is not None and type(value) is not type(field.default):
            raise CheckpointError(
                f"cannot resume {path}: its {field.name} is {value!r:.40}; train it again"
            )
        result[field.name] = value
    return result


def torchrun_processes() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_settings(cfg: Any) -> None:
    """Raise UserError, before any work, if a value of cfg (config.py) cannot be meant."""
    check_ranges(cfg)
    budgets = [name for name in BUDGETS if getattr(cfg, name)]
    if len(budgets) != 1:
        options, found = "--n-updates, --num-epochs and --minutes", " and ".join(budgets) or "none"
        raise UserError(f"give exactly one of {options}, not {found}")
    budget = getattr(cfg, budgets[0])
    if not budget > 0:
        raise UserError(f"{flag(budgets[0])} must be positive, got {budget}")
    if not cfg.out:
        raise UserError(
            "no data given: use --data-path with a folder, a video or an HDF5 file,"
            " or --use-dummy-data"
        )
    if cfg.embed_dim % (2 * cfg.n_heads):
        raise UserError(
            f"--embed-dim {cfg.embed_dim} must be an even multiple of --n-heads {cfg.n_heads}"
        )
    if getattr(cfg, "fsdp", False) and torchrun_processes() == 1:
        raise UserError(
            "--fsdp shards the weights over processes, but there is one;"
            " start with torchrun --nproc-per-node=K, or leave it out"
        )
    if hasattr(cfg, "levels"):
        check_levels(cfg.levels)
    if hasattr(cfg, "n_actions") and (cfg.n_actions < 2 or cfg.n_actions & (cfg.n_actions - 1)):
        raise UserError(f"--n-actions must be a power of two (2, 4, 8, 16, …), got {cfg.n_actions}")
    if hasattr(cfg, "token_kernel") and cfg.token_kernel % 2 == 0:
        raise UserError(f"--token-kernel must be odd (1, 3, 5), got {cfg.token_kernel}")


def check_levels(levels: tuple[int, ...]) -> None:
    n_codes = math.prod(levels)
    if min(levels, default=0) < 2:
        raise UserError(f"--levels must be integers of at least 2, got {levels}")
    if n_codes > 2**20:
        raise UserError(f"--levels must make at most 1,048,576 codes, got {n_codes:,}")
