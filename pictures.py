"""Pictures from arrays: grids, curves, GIF and MP4. No mathematics."""
from pathlib import Path

import cv2
import numpy as np
from PIL import Image  # comes with matplotlib

from config import UserError


def grid(rows, scale=2, gap=2):
    """rows: a list of (n, H, W, 3) uint8 arrays of the same frame size → one picture, a row each, enlarged `scale` times."""
    rows = [np.asarray(row) for row in rows]
    H, W = rows[0].shape[1:3]
    picture = np.full((len(rows) * (H + gap) - gap, max(map(len, rows)) * (W + gap) - gap, 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, frame in enumerate(row):
            picture[r * (H + gap) : r * (H + gap) + H, c * (W + gap) : c * (W + gap) + W] = frame
    return enlarge(picture, scale)


def labelled_grid(rows, names):
    """A grid with the names of its columns above."""
    picture = grid(rows)
    header = np.full((24, picture.shape[1], 3), 255, dtype=np.uint8)
    for i, name in enumerate(names):
        cv2.putText(header, plain(name), (i * picture.shape[1] // len(names) + 4, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([header, picture])


def plain(text):
    """Arrows as OpenCV's font can draw them."""
    return text.translate(str.maketrans("←→↑↓", "<>^v"))


def enlarge(frame, scale):
    """Nearest-neighbour enlargement: pixels stay crisp."""
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)


def save_png(picture, path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def save_video(frames, path, fps):
    """frames: list of uint8 (H, W, 3); the ending of `path` decides: .gif (loops) or .mp4. Raises ValueError for another."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in frames]
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    elif path.suffix.lower() == ".mp4":
        H, W = frames[0].shape[:2]
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (W, H))
        if not writer.isOpened():
            raise UserError(f"cannot write {path}: no place or no MPEG-4 encoder; try a .gif")
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
    else:
        raise ValueError(f"cannot save a video as {path.name}; use a name that ends in .gif or .mp4")


def save_curves(lines, path):
    """metrics.jsonl lines (dicts with `step`) → a picture: the loss, and one small plot for each other number."""
    from matplotlib.figure import Figure  # here, since it takes half a second, and players draw no curves

    names = [name for name in dict.fromkeys(n for line in lines for n in line) if not name.startswith(("val_", "step", "stopped"))]
    figure = Figure(figsize=(3.6 * len(names), 2.8))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0] if names else [], names):
        for key, label in ((name, "train"), (f"val_{name}", "validation")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points), label=label) if points else None
        axes.set(title=name, xlabel="step")
        axes.legend(frameon=False)
    if names:
        figure.subplots_adjust(left=0.17 / len(names), right=1 - 0.05 / len(names), bottom=0.18, top=0.89, wspace=0.25)
        figure.savefig(path, dpi=90)
