"""Pictures to save: GIF and MP4 films, and grids with a name above each column."""

from pathlib import Path

from utils.cli import UserError
from utils.pictures import grid

import cv2
import numpy as np
from PIL import Image  # comes with matplotlib


def labelled_grid(rows, names: list[str]) -> np.ndarray:
    """A grid of pictures with a name above each column."""
    picture = grid(rows)
    header = np.full((24, picture.shape[1], 3), 255, dtype=np.uint8)
    font, black = cv2.FONT_HERSHEY_SIMPLEX, (0, 0, 0)
    for i, name in enumerate(names):
        place = (i * picture.shape[1] // len(names) + 4, 17)
        cv2.putText(header, ascii_arrows(name), place, font, 0.5, black, 1, cv2.LINE_AA)
    return np.concatenate([header, picture])


def ascii_arrows(text: str) -> str:
    """Replace arrows by characters that OpenCV's font can draw."""
    return text.translate(str.maketrans("←→↑↓", "<>^v"))


def save_video(frames: list, path, fps: float) -> None:
    """Save frames, uint8 (H, W, 3) each, as .gif (it loops) or .mp4, by the suffix of `path`.

    Raises ValueError for another suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in frames]
        duration = round(1000 / fps)  # milliseconds
        first.save(path, save_all=True, append_images=rest, duration=duration, loop=0)
    elif path.suffix.lower() == ".mp4":
        H, W = frames[0].shape[:2]
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (W, H))
        if not writer.isOpened():
            raise UserError(
                f"cannot write {path}: the file cannot be opened or OpenCV has no MPEG-4 encoder;"
                " try a .gif"
            )
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
    else:
        raise ValueError(f"cannot save a video as {path.name}; its name must end in .gif or .mp4")
