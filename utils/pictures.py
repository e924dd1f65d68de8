"""Pictures from arrays: grids and curves. No mathematics."""

from pathlib import Path

import numpy as np
from PIL import Image  # comes with matplotlib


def grid(rows: list, scale: int = 2, gap: int = 2) -> np.ndarray:
    """Rows of frames, each uint8 (n, H, W, 3) → one picture, enlarged `scale` times."""
    rows = [np.asarray(row) for row in rows]
    H, W = rows[0].shape[1:3]
    height, width = len(rows) * (H + gap) - gap, max(map(len, rows)) * (W + gap) - gap
    picture = np.full((height, width, 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, frame in enumerate(row):
            y, x = r * (H + gap), c * (W + gap)
            picture[y : y + H, x : x + W] = frame
    return enlarge(picture, scale)


def enlarge(frame: np.ndarray, scale: int) -> np.ndarray:
    """Nearest-neighbour enlargement: pixels stay crisp."""
    return frame.repeat(scale, axis=0).repeat(scale, axis=1)


def save_png(picture: np.ndarray, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def save_curves(lines: list[dict], path: Path) -> None:
    """Lines of metrics.jsonl → a picture with a small plot for each number."""
    from matplotlib.figure import Figure  # here, because it takes half a second to import

    found = dict.fromkeys(name for line in lines for name in line)
    names = [name for name in found if not name.startswith(("val_", "step", "stopped"))]
    if not names:
        return
    figure = Figure(figsize=(3.6 * len(names), 2.8))
    plots = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(plots, names, strict=True):
        for key, label in ((name, "train"), (f"val_{name}", "validation")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=label)
        axes.set(title=name, xlabel="step")
        axes.legend(frameon=False)
    left, right = 0.17 / len(names), 1 - 0.05 / len(names)
    figure.subplots_adjust(left=left, right=right, bottom=0.18, top=0.89, wspace=0.25)
    figure.savefig(path, dpi=90)
