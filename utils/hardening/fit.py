"""Do checkpoints belong together, and to the training run that continues one of them?"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.cli import CheckpointError, UserError
from utils.hardening.files import fingerprint
from utils.hardening.untrusted import check_playable, reason_of


def check_fit(tokenizer: dict, lam: dict | None, dynamics: dict | None = None) -> None:
    """Raise CheckpointError, naming both values, if checkpoints do not belong together."""
    ours, theirs = tokenizer["model_args"], lam and lam["model_args"]
    if lam and ours["frame_size"] != theirs["frame_size"]:
        raise CheckpointError(
            f"the tokenizer is for frames of {ours['frame_size']},"
            f" the LAM for {theirs['frame_size']}; train one again"
        )
    if dynamics is None:
        return
    sizes = dynamics["model_args"]
    H, W = ours["frame_size"]
    grid = [H // ours["patch_size"], W // ours["patch_size"]]
    pairs = [
        ("patches per frame", grid, sizes.get("grid")),
        ("codebook levels", ours["levels"], sizes.get("levels")),
    ]
    if lam:
        pairs.append(("n_actions", theirs["n_actions"], sizes.get("n_actions")))
    for stage, checkpoint in (("tokenizer", tokenizer), ("lam", lam)):
        if checkpoint and stage in dynamics["inputs"]:
            needed = dynamics["inputs"][stage]
            pairs.append((f"{stage} weights", fingerprint(checkpoint), needed))
    for what, found, needed in pairs:
        if found != needed:
            raise CheckpointError(
                f"the dynamics model was trained with {what} {needed!r},"
                f" but finds {found!r}; run train_dynamics.py again"
            )


def check_world(
    folder: Path, tokenizer: dict, dynamics: dict, lam: dict | None = None
) -> list[dict]:
    """Raise CheckpointError if they are no world that can be played; → its action table."""
    try:
        check_playable(dynamics, tokenizer["model_args"]["frame_size"])
    except ValueError as error:
        raise CheckpointError(
            f"{folder / 'dynamics.pt'} {error}; run train_dynamics.py again"
        ) from None
    check_fit(tokenizer, lam, dynamics)
    return read_action_table(folder / "actions.json", lam)


def read_action_table(path: Path, lam: dict | None) -> list[dict]:
    """The rows of actions.json as train_lam.py wrote it; [] where there is none for this LAM."""
    if lam is None or not path.exists():
        return []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = [row | {"label": str(row["label"])} for row in table["actions"]]
        kinds = dict(share=(int, float), direction=str, moves=str)
        for i, row in enumerate(rows):
            right = all(isinstance(row[name], kind) for name, kind in kinds.items())
            if row["action"] != i or not right:
                raise ValueError("a row is not as it was written")
        if table["lam"] != fingerprint(lam):
            return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"{path} is not an action table; mend it, or remove it to play with numbers alone"
        ) from None
    n_actions = lam["model_args"]["n_actions"]
    if len(rows) != n_actions:
        raise CheckpointError(
            f"{path} names {len(rows)} actions of {n_actions};"
            " mend it, or remove it to play with numbers alone"
        )
    return rows


def action_names(table: list[dict], dynamics: dict) -> list[str]:
    """Names of the actions, without control characters, which a terminal may obey."""
    names = [row["label"] for row in table] or dynamics["action_names"] or []
    return ["".join(c if c.isprintable() else "?" for c in name) for name in names]


def check_same(path: Path, cfg: Any, saved: dict, same: dict[str, dict]) -> None:
    """Raise UserError if `saved` belongs to another run than the one that resumes it.

    same: entries of the checkpoint (model_args, inputs) that must not have changed.
    """
    if "optimizer" not in saved:
        raise UserError(
            f"cannot resume {path}: a shipped world has no optimizer state;"
            " train into another --out"
        )
    complete = {"config", "rng", *same} <= set(saved)
    if not complete or not 0 <= saved.get("step", -1) <= saved.get("n_updates", -1):
        raise CheckpointError(
            f"cannot resume {path}: it does not say how far it is; train it again"
        )
    for kind, values in same.items():
        for name, now in values.items():
            was = saved[kind].get(name, now)  # an older file has no word of a newer option
            if was != now:
                raise UserError(
                    f"cannot resume {path}: {name} was {was}, now it is {now};"
                    " set it as it was, or leave out --resume"
                )
    was, now = saved["config"].get("data_fingerprint"), cfg.data_fingerprint
    if was and was != now:  # older checkpoints do not know theirs
        raise UserError(
            f"cannot resume {path}: it learned from other data (fingerprint {was}) than"
            f" {cfg.data_path} holds ({now}); give --data-path as it was, or leave out --resume"
        )


@contextmanager
def explained_misfit(path: Path) -> Iterator[None]:
    """Turn whatever a foreign file may hold, and break, into one line."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"cannot resume {path}: what is saved does not fit"
            f" ({reason_of(error, 200)}); train it again"
        ) from None
