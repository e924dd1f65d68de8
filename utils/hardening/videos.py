"""Videos → one HDF5 file, written whole or not at all. A broken video costs a line, not the rest.

The form of the file is described in data_utils.py.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.hardening.dataset import SUFFIXES, check_disk, check_video, first_line

import cv2
import h5py
import numpy as np
from tqdm import tqdm


class DatasetWriter:
    """Writes the HDF5 form block by block.

    The file takes its name only when the `with` block ends without an error.
    """

    def __init__(
        self,
        path: str | Path,
        frame_size: tuple[int, int],
        with_actions: bool = False,
        **attributes: Any,
    ):
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        with self._written("choose a place and a name that can be written"):
            if self.path.is_dir():
                raise UserError(
                    f"cannot write {self.path}: it is a folder; give the name of an HDF5 file"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = h5py.File(self.part, "w")
        shape = (*frame_size, 3)
        # 16 frames a chunk: a clip touches one or two. lzf shrinks games about tenfold and unpacks
        # faster than disks read.
        options = dict(dtype="uint8", chunks=(16, *shape), compression="lzf")
        self.frames = self.file.create_dataset(
            "frames", (0, *shape), maxshape=(None, *shape), **options
        )
        self.actions = None
        if with_actions:
            self.actions = self.file.create_dataset("actions", (0,), "int64", maxshape=(None,))
        self.episode_starts = []
        self.file.attrs.update(attributes)

    def __len__(self):
        return len(self.frames)

    def append(self, frames: Sequence, actions: Sequence | None = None) -> None:
        """frames uint8 (n, H, W, 3), actions int64 (n,)."""
        n = len(self.frames)
        with self._written(f"{n:,} frames were written; make room and start again"):
            self.frames.resize(n + len(frames), axis=0)
            self.frames[n:] = frames
            if self.actions is not None:
                self.actions.resize(n + len(frames), axis=0)
                self.actions[n:] = actions
            self.file.flush()

    def cut_back(self, n: int) -> None:
        self.frames.resize(n, axis=0)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                with self._written("make room and start again"):
                    self.file["episode_starts"] = np.array(self.episode_starts, dtype="int64")
                    self.file.close()
                    os.replace(self.part, self.path)
            else:
                self.file.close()
        finally:
            self.part.unlink(missing_ok=True)

    @contextmanager
    def _written(self, remedy):
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or first_line(error, 200)
            raise UserError(f"cannot write {self.path}: {reason}; {remedy}") from None


def read_video(path: Path, frame_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield RGB frames (H, W, 3), resized by area. Raises ValueError if the video is broken."""
    capture = cv2.VideoCapture(str(path))
    n, expected = 0, capture.get(cv2.CAP_PROP_FRAME_COUNT)
    try:
        check_video(capture)
        while True:
            ok, frame = capture.read()
            if not ok:
                break
            n += 1
            frame = cv2.resize(frame, frame_size[::-1], interpolation=cv2.INTER_AREA)
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()
    if n == 0:
        raise ValueError("no frame can be read")
    # other formats do not store a count, it is guessed
    if path.suffix.lower() in (".mp4", ".avi") and n < 0.9 * expected:
        raise ValueError(f"it ends after {n} of {expected:.0f} frames")


def append_video(writer: DatasetWriter, video: Path, frame_size: tuple[int, int]) -> None:
    """Append a video as an episode. A broken one is skipped with a line."""
    start, block = len(writer), []
    try:
        for frame in read_video(video, frame_size):
            block.append(frame)
            if len(block) == 256:
                writer.append(block)
                block = []
        if block:
            writer.append(block)
        writer.episode_starts.append(start)
    except UserError:  # the disk is full
        raise
    except ValueError as reason:
        writer.cut_back(start)
        tqdm.write(f"skipped {video.name}: {reason}", file=sys.stderr)


def is_video(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in SUFFIXES


def find_videos(path: Path) -> list[Path]:
    """A video itself, or all videos in a folder and below."""
    if not path.is_dir():
        return [path]
    videos = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not videos:
        raise UserError(f"no video in {path}; looked for {', '.join(SUFFIXES)}")
    return videos


def convert_videos(videos: list[Path], out: Path, frame_size: tuple[int, int]) -> Path:
    """Videos → one HDF5 file, unless it is there already; each video is an episode. → out"""
    stamps = [(v.name, v.stat().st_size, v.stat().st_mtime_ns) for v in videos]
    source = json.dumps([frame_size, stamps])
    try:
        with h5py.File(out, "r") as file:
            if str(file.attrs.get("source")) == source:
                return out
    except (OSError, RuntimeError):  # there is none, or it is damaged
        pass
    capture = cv2.VideoCapture(str(videos[0]))
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if 1 <= fps <= 60 else 15.0  # a header can say anything
    capture.release()
    check_disk(videos, out, frame_size)
    with DatasetWriter(out, frame_size, fps=fps, game=out.stem, source=source) as writer:
        for video in tqdm(videos, desc="reading videos", unit="video", disable=None):
            append_video(writer, video, frame_size)
        if not writer.episode_starts:
            raise UserError(
                f"none of the {len(videos)} videos can be read ({videos[0]}, …);"
                " convert them to mp4 (H.264)"
            )
    return out
