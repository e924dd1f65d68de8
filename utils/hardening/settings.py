"""Settings of a training run that are out of range or contradict each other."""

import math
import os
from typing import Any

from utils.cli import UserError, check_ranges, flag

BUDGETS = ("n_updates", "num_epochs", "minutes")


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
        raise UserError("say where the world is to be saved, for example --out checkpoints/pong")
    if cfg.embed_dim % (2 * cfg.n_heads):
        raise UserError(
            f"--embed-dim {cfg.embed_dim} must be an even multiple of --n-heads {cfg.n_heads}"
        )
    if getattr(cfg, "fsdp", False) and int(os.environ.get("WORLD_SIZE", 1)) == 1:  # of torchrun
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
