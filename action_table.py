"""What each latent action does to the picture, found without labels: the legend that play.py shows.

For each action: how often it occurs, the mean change it makes, and the motion that optical flow sees in it. Where much of
the picture moves it is the camera that turns, the other way; where little moves, a thing moves. train_lam.py writes the
table as OUT/actions.json; its labels may be edited.
"""
import json

import cv2
import numpy as np
import torch

import metrics
from data_utils import to_float
from models.checkpoint import build_model, fingerprint, load_checkpoint
from pictures import labelled_grid, save_png

ARROWS = {"left": "←", "right": "→", "up": "↑", "down": "↓", "forward": "↑", "back": "↓"}
MOVING, CAMERA, STEADY = 0.5, 0.25, 0.5  # pixels per frame; share of the picture; share of motion that is common to all
LEAST = {"view": 0.5, "thing": 1.0}  # pixels per frame that deserve a direction


def optical_flow(before, after):
    """Two uint8 frames (H, W, 3) → flow (H, W, 2) in pixels, (right, down) (dense inverse search, arXiv:1603.03590)."""
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*gray, None)


def describe_motion(flows):
    """flows (M, H, W, 2) of one action → what moves and where to: {"moves", "direction", "pixels"}.

    moves: "view", "thing" or "nothing"; direction: a key of ARROWS or "" where the motions do not agree.
    """
    M, H, W, _ = flows.shape
    moving = np.linalg.norm(flows, axis=-1) > MOVING  # (M, H, W)
    coverage = moving.mean(axis=(1, 2))  # (M,)
    if np.median(coverage) < 0.002:
        return {"moves": "nothing", "direction": "", "pixels": 0.0}
    moves = "view" if np.median(coverage) > CAMERA else "thing"
    flows, moving = flows[coverage > 0.002], moving[coverage > 0.002, ..., None]
    outward = np.stack(np.meshgrid(np.arange(W) - (W - 1) / 2, np.arange(H) - (H - 1) / 2), axis=-1)  # (H, W, 2)
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    count = moving.sum(axis=(1, 2))  # (M, 1)
    shift = (flows * moving).sum(axis=(1, 2)) / count  # (M, 2)
    zoom = ((flows * outward).sum(axis=-1, keepdims=True) * moving).sum(axis=(1, 2)) / count  # (M, 1): > 0 comes closer
    candidates = {}
    for motion, names in ((shift[:, :1], ("right", "left")), (shift[:, 1:], ("down", "up")), (zoom, ("forward", "back"))):
        mean = float(motion.mean())
        steady = abs(mean) / max(float(np.abs(motion).mean()), 1e-6)
        if moves == "view" and motion is not zoom:  # the picture goes right when the camera turns left
            names = names[::-1]
        if steady > STEADY and abs(mean) > LEAST[moves] and (moves == "view" or motion is not zoom):
            candidates[names[0] if mean > 0 else names[1]] = abs(mean)
    direction = max(candidates, key=candidates.get, default="")
    return {"moves": moves, "direction": direction, "pixels": round(candidates.get(direction, 0.0), 1)}


def label_of(motion):
    """{"moves", "direction", "pixels"} → "← view left 3.4" (pixels per frame), "still" or "" (nothing common to say)."""
    if motion["moves"] == "nothing":
        return "still"
    if not motion["direction"]:
        return ""
    return f"{ARROWS[motion['direction']]} {motion['moves']} {motion['direction']} {motion['pixels']}"


@torch.no_grad()
def describe_actions(lam, frames, device):
    """frames uint8 (B, T, H, W, 3) → (a row per action, a picture: per action the mean change and two transitions)."""
    codes = torch.cat([lam.infer(to_float(batch, device)).cpu() for batch in frames.split(16)]).flatten().numpy()  # (M,)
    before, after = frames[:, :-1].flatten(0, 1).numpy(), frames[:, 1:].flatten(0, 1).numpy()  # (M, H, W, 3)
    rows, columns = [], []
    for action, share in enumerate(metrics.shares(codes, lam.n_actions)):
        at = np.flatnonzero(codes == action)
        row = {"action": action, "share": round(float(share), 4), "moves": "", "direction": "", "pixels": 0.0, "label": "never used"}
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
    return rows, labelled_grid(np.stack(columns, axis=1), [str(row["action"]) for row in rows])


def write_action_table(lam_path, frames, device):
    """Write actions.json beside OUT/lam.pt, naming the LAM that it describes, and OUT/lam/actions.png; → the rows, printed."""
    checkpoint, out = load_checkpoint(lam_path, "lam"), lam_path.parent
    rows, picture = describe_actions(build_model(checkpoint).to(device), frames, device)
    save_png(picture, out / "lam" / "actions.png")
    table = {"lam": fingerprint(checkpoint), "picture": "lam/actions.png", "actions": rows}
    (out / "actions.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in rows:
        print(f"action {row['action']}: {row['label']:20} {row['share']:4.0%} of transitions")
    return rows
