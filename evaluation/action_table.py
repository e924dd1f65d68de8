"""A table of what each latent action does to the picture, made without labels; play.py shows it.

For each action the table gives how often it occurs and the motion that optical flow measures. If
much of the picture moves, the camera moves the opposite way ("view"). If little of it moves, an
object moves ("thing"). train_lam.py writes the table as OUT/actions.json. You may edit its labels.
"""

import json
from pathlib import Path

from utils.checkpoint import build_model, fingerprint, load_checkpoint
from utils.pictures import save_png

import cv2
import numpy as np
import torch
from torch import Tensor

from data_utils import to_float
from evaluation import metrics
from models.distributed import rank
from player.film import labelled_grid

ARROWS = {"left": "←", "right": "→", "up": "↑", "down": "↓", "forward": "↑", "back": "↓"}
MOVING = 0.5  # pixels per frame: a pixel with more flow has moved
VISIBLE = 0.002  # share of the picture that must move for a transition to count
CAMERA = 0.25  # share of the picture: if more of it moves, the camera does
STEADY = 0.5  # |mean motion| / mean |motion| over the transitions of an action: the least
LEAST = {"view": 0.5, "thing": 1.0}  # pixels per frame: below that no direction is named


def optical_flow(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Two uint8 frames (H, W, 3) → flow (H, W, 2) in pixels, (right, down).

    Dense inverse search, arXiv:1603.03590.
    """
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*gray, None)


def describe_motion(flows: np.ndarray) -> dict:
    """flows (M, H, W, 2) of one action → {"moves", "direction", "pixels"}: what moves and where.

    moves: "view", "thing" or "nothing". direction: a key of ARROWS, or "" if the motions do
    not agree.
    """
    moving = np.linalg.norm(flows, axis=-1) > MOVING  # (M, H, W)
    coverage = moving.mean(axis=(1, 2))  # (M,)
    if np.median(coverage) < VISIBLE:
        return {"moves": "nothing", "direction": "", "pixels": 0.0}
    moves = "view" if np.median(coverage) > CAMERA else "thing"
    seen = coverage > VISIBLE
    shift, zoom = shift_and_zoom(flows[seen], moving[seen, ..., None])
    motions = [(shift[:, 0], ("right", "left")), (shift[:, 1], ("down", "up"))]
    if moves == "view":  # the picture moves right when the camera turns left
        motions = [(motion, names[::-1]) for motion, names in motions]
        motions.append((zoom[:, 0], ("forward", "back")))
    candidates = {}
    for motion, names in motions:
        mean = float(motion.mean())
        steady = abs(mean) / max(float(np.abs(motion).mean()), 1e-6)
        if steady > STEADY and abs(mean) > LEAST[moves]:
            candidates[names[0] if mean > 0 else names[1]] = abs(mean)
    direction = max(candidates, key=candidates.get, default="")
    pixels = round(candidates.get(direction, 0.0), 1)
    return {"moves": moves, "direction": direction, "pixels": pixels}


def imitated_motion(down: float, right: float) -> dict:
    """A move in pixels per frame → what `describe_motion` says of a thing that moves so, label."""
    names = ("down", "up") if abs(down) >= abs(right) else ("right", "left")
    most = down if abs(down) >= abs(right) else right
    motion = {"moves": "nothing", "direction": "", "pixels": 0.0}
    if most:
        direction = names[0] if most > 0 else names[1]
        motion = {"moves": "thing", "direction": direction, "pixels": abs(most)}
    return motion | {"label": label_of(motion)}


def shift_and_zoom(flows: np.ndarray, moving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """→ the mean flow (M, 2) and the mean outward flow (M, 1) of the pixels that move.

    moving: boolean (M, H, W, 1). A positive outward flow means that the camera comes closer.
    """
    H, W = flows.shape[1:3]
    x, y = np.meshgrid(np.arange(W) - (W - 1) / 2, np.arange(H) - (H - 1) / 2)
    outward = np.stack([x, y], axis=-1)  # (H, W, 2)
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    count = moving.sum(axis=(1, 2))  # (M, 1)
    shift = (flows * moving).sum(axis=(1, 2)) / count  # (M, 2)
    outflow = (flows * outward).sum(axis=-1, keepdims=True)  # (M, H, W, 1)
    return shift, (outflow * moving).sum(axis=(1, 2)) / count


def label_of(motion: dict) -> str:
    """{"moves", "direction", "pixels"} → "← view left 3.4" (pixels per frame).

    "still" if nothing moves, "" if there is no common direction.
    """
    moves, direction = motion["moves"], motion["direction"]
    if moves == "nothing":
        return "still"
    if not direction:
        return ""
    return f"{ARROWS[direction]} {moves} {direction} {motion['pixels']}"


@torch.no_grad()
def describe_actions(lam, frames: Tensor, device) -> tuple[list[dict], np.ndarray]:
    """frames uint8 (B, T, H, W, 3) → (a row per action, a picture).

    The picture has a column per action: the mean change and two transitions.
    """
    codes = [lam.infer(to_float(batch, device)).cpu() for batch in frames.split(16)]
    codes = torch.cat(codes).flatten().numpy()  # (M,)
    before = frames[:, :-1].flatten(0, 1).numpy()  # (M, H, W, 3)
    after = frames[:, 1:].flatten(0, 1).numpy()
    rows, columns = [], []
    for action, share in enumerate(metrics.shares(codes, lam.n_actions)):
        at = np.flatnonzero(codes == action)
        row = {"action": action, "share": round(float(share), 4)}
        row |= {"moves": "", "direction": "", "pixels": 0.0, "label": "never used"}
        pictures = np.full((5, *frames.shape[2:]), 128, dtype=np.uint8)
        if len(at):
            row |= describe_motion(np.stack([optical_flow(before[i], after[i]) for i in at]))
            row["label"] = label_of(row) or "mixed"
            change = (after[at].astype(float) - before[at]).mean(axis=0)  # (H, W, 3)
            pictures[0] = np.clip(128 + change, 0, 255)
            for k, i in enumerate(at[[len(at) // 3, 2 * len(at) // 3]]):
                pictures[1 + 2 * k], pictures[2 + 2 * k] = before[i], after[i]
        rows.append(row)
        columns.append(pictures)
    names = [str(row["action"]) for row in rows]
    return rows, labelled_grid(np.stack(columns, axis=1), names)


def write_action_table(
    lam_path: Path, frames: Tensor, device, moves: np.ndarray | None = None
) -> list[dict]:
    """Describe the actions of the LAM in OUT/lam.pt. → the rows, which are also printed.

    moves: the move (down, right) in pixels that each action imitates. Where traffic hides a small
    player from optical flow, it says what the action does.
    Writes OUT/actions.json, which names that LAM by its fingerprint, and OUT/lam/actions.png.
    Only the process of rank 0 does this; the others return [].
    """
    if rank() > 0:
        return []
    checkpoint, out = load_checkpoint(lam_path, "lam"), lam_path.parent
    rows, picture = describe_actions(build_model(checkpoint).to(device), frames, device)
    for row, move in zip(rows, moves if moves is not None else (), strict=False):
        if row["label"] == "mixed":
            row |= imitated_motion(*move.tolist())
    save_png(picture, out / "lam" / "actions.png")
    table = {"lam": fingerprint(checkpoint), "picture": "lam/actions.png", "actions": rows}
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    (out / "actions.json").write_text(text, encoding="utf-8")
    for row in rows:
        print(f"action {row['action']}: {row['label']:20} {row['share']:4.0%} of transitions")
    return rows


def use_of_actions(rows: list[dict]) -> dict[str, float]:
    """How many actions occur, and the share of the most frequent one; {} if there are no rows."""
    if not rows:
        return {}
    shares = [row["share"] for row in rows]
    return {
        "lam/n_actions": len(rows),
        "lam/actions_used": sum(share > 0 for share in shares),
        "lam/largest_share": max(shares),
    }
