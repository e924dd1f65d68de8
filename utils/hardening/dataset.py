"""What a video or HDF5 file from a stranger may hold: checked before any of it is read.

Raises UserError with one line that names the file, the reason and the remedy.
"""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.cli import UserError

import cv2
import h5py
import numpy as np

# OpenCV reads these with the first video: no lines of the decoder, no lists of other files.
FORMATS = "format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", FORMATS)

SUFFIXES = (".avi", ".gif", ".mkv", ".mp4", ".webm")
MOST_EXPANSION = 2000  # frames unpack to at most so many times what is stored; games to ten times
MOST_ACTIONS, LARGEST_SIDE, LARGEST_CHUNK = 1024, 8192, 1 << 28


@contextmanager
def explained_errors(path: str | Path) -> Iterator[None]:
    """Turn what h5py raises for a foreign or damaged file into one line. UserErrors pass."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if "Can't synchronously read" in str(error):
            text = f"{path} is damaged: not all of it can be read; make it again"
        else:
            text = f"{path} is neither a video ({', '.join(SUFFIXES)}) nor a readable HDF5 file;"
            text += " convert it to one of them"
        raise UserError(text) from None
    except (RuntimeError, TypeError, KeyError, ValueError) as error:  # HDF5 has many words for it
        raise UserError(
            f"{path} is damaged, or not as h5py writes it ({first_line(error)!r}); make it again"
        ) from None


def existing(data_path: str) -> Path:
    """The path that the user gave. Raises UserError if there is none, or nothing at it."""
    if not data_path:
        raise UserError(
            "no data given: use --data-path with a folder, a video or an HDF5 file,"
            " or --use-dummy-data"
        )
    path = Path(data_path).resolve()
    if not path.exists():
        raise UserError(f"no such file or folder: {data_path}; check --data-path")
    return path


def check_disk(videos: list[Path], out: Path, frame_size: tuple[int, int]) -> None:
    """Print how much disk converted videos can take. Raises UserError if less is free."""
    n = 0
    for video in videos:
        capture = cv2.VideoCapture(str(video))
        claimed = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        n += min(claimed, video.stat().st_size)  # a header can say anything
        capture.release()
    H, W = frame_size
    needed, free = n * H * W * 3 / 2**20, shutil.disk_usage(out.parent).free / 2**20
    print(
        f"disk: {n:,} frames of {H}×{W} take at most {needed:,.1f} MB, mostly a tenth of that;"
        f" {free:,.1f} MB are free"
    )
    if needed > free:
        raise UserError(
            f"{out} may need {needed:,.1f} MB, but {free:,.1f} MB are free;"
            " make room, or take fewer videos or a smaller --frame-size"
        )


def check_video(capture: cv2.VideoCapture) -> None:
    """Raise ValueError for frames that would not fit into memory."""
    width, height = (capture.get(p) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > LARGEST_SIDE**2:
        raise ValueError(f"its frames have {width * height:,.0f} pixels")


def checked_datasets(file: h5py.File, path: Path) -> tuple:
    """→ frames, actions and episode starts of an open file; None for what it does not have."""
    found = [member(file, name, path) for name in ("frames", "actions", "episode_starts")]
    frames, actions, starts = found
    if frames is None or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        what = f"{frames.dtype} {frames.shape}" if frames else f"only {sorted(file)[:10]}"
        raise UserError(
            f"{path} must hold a dataset `frames`, uint8 (N, H, W, 3), but has {what};"
            " store RGB frames so"
        )
    if not 1 <= min(frames.shape) <= max(frames.shape[1:3]) <= LARGEST_SIDE:
        raise UserError(
            f"{path} has frames of the shape {frames.shape}; each side must have"
            f" 1 … {LARGEST_SIDE:,} pixels, and there must be some"
        )
    if actions is not None:
        check_actions(actions, frames, path)
    if starts is not None:
        whole_numbers = starts.ndim == 1 and starts.dtype.kind in "iu"
        if not whole_numbers or len(starts) > len(frames):
            raise UserError(
                f"{path} has {starts.dtype} {starts.shape} episode_starts;"
                " store a list of frame numbers, or none"
            )
    return frames, actions, starts


def check_actions(actions: h5py.Dataset, frames: h5py.Dataset, path: Path) -> None:
    if actions.shape != frames.shape[:1] or actions.dtype.kind not in "iu":
        raise UserError(
            f"{path} has {actions.dtype} {actions.shape} actions for {len(frames)} frames;"
            " store one whole number per frame, or none"
        )
    low, high = actions[:].min(), actions[:].max()
    if not -1 <= low <= high < MOST_ACTIONS:
        wrong = low if low < -1 else high
        raise UserError(
            f"{path} has an action {wrong}; number the actions from 0, up to {MOST_ACTIONS - 1:,},"
            " and write -1 where one is not known"
        )


def member(file: h5py.File, name: str, path: Path) -> h5py.Dataset | None:
    """The dataset `name`, or None.

    Refuses one that lies in another file, or unpacks to far more than is stored.
    """
    if not isinstance(file.get(name, getlink=True), h5py.HardLink | None):
        raise UserError(f"{path}: `{name}` is a link to elsewhere; store the data itself")
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        return None
    if found.external or found.is_virtual:
        raise UserError(f"{path}: `{name}` takes its data from another file; store them here")
    chunk = math.prod(found.chunks or (0,)) * found.dtype.itemsize  # is unpacked whole
    claimed = max(found.nbytes, chunk) if found.size else 0
    stored = found.id.get_storage_size()
    if claimed > MOST_EXPANSION * max(1, stored) or chunk > LARGEST_CHUNK:
        raise UserError(
            f"{path}: `{name}` would unpack to {claimed:,} bytes, but {stored:,} are stored;"
            " it is refused"
        )
    return found


def attributes(file: h5py.File) -> dict:
    """action_names and fps of an open file, as far as they are there and make sense."""

    def names(values):
        return tuple(str(name) for name in np.atleast_1d(values)[:MOST_ACTIONS])

    def rate(fps):
        return float(fps) if 0 < float(fps) <= 1000 else 15.0

    found = {}
    for name, read in (("action_names", names), ("fps", rate)):
        try:
            if name in file.attrs:
                found[name] = read(file.attrs[name])
        except (OSError, TypeError, ValueError, OverflowError):  # something else: as if missing
            continue
    return found


def first_line(error: Exception, length: int = 100) -> str:
    return (str(error).splitlines() or [""])[0][:length]
