"""From any video to clips: one HDF5 form, one reader.

  * sources: a folder of videos, one video, an HDF5 file, a dummy world
  * videos are read once, front to back, into an HDF5 file beside the source
  * the last part of the frames is for validation; no clip crosses a border of parts or episodes
  * which clips a training step sees is a function of (seed, step): a resumed run sees what an
    unbroken one would have seen

The form: `frames` uint8 (N, H, W, 3) RGB; optional `actions` int64 (N,), where actions[i] was
pressed between frames i and i+1; optional `episode_starts` int64; attributes fps, game,
action_names.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.hardening.cache import read_cache, write_cache
from utils.hardening.dataset import attributes, checked_datasets, existing, explained_errors
from utils.hardening.files import data_fingerprint
from utils.hardening.forecast import check_batch, refuse_short
from utils.hardening.videos import convert_videos, find_videos, is_video

import cv2
import h5py
import numpy as np
import torch
from tqdm import tqdm

from models.distributed import n_ranks, rank

IN_MEMORY = 2 << 30  # bytes; a larger dataset is read clip by clip from disk


@contextmanager
def main_process_first():
    """The first process passes the block before the others, who then find the files it made."""
    if rank() > 0:
        torch.distributed.barrier()
    yield
    if rank() == 0 and n_ranks() > 1:
        torch.distributed.barrier()


def dummy_world(n_frames: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A world for tests: a still sprite on a field of colours that scrolls 2 pixels a frame.

    → frames uint8 (n, 64, 64, 3), actions int64 (n,): stay, left, right, up, down.
    """
    rng = np.random.default_rng(seed)
    moves = 2 * np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)])  # rows, columns
    actions = rng.integers(len(moves), size=n_frames)
    corners = np.concatenate([[(0, 0)], np.cumsum(moves[actions[:-1]], axis=0)]) % 128
    field = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    field = cv2.resize(field, (128, 128), interpolation=cv2.INTER_LINEAR)
    field = np.tile(field, (2, 2, 1))  # the field is a torus: it never ends
    frames = np.stack([field[y : y + 64, x : x + 64] for y, x in corners])
    frames[:, 28:36, 28:36] = (250, 220, 60)
    return frames, actions


@dataclass
class Dataset:
    """frames uint8 (N, H, W, 3), in memory or, if large, on disk; actions (N,) or None."""

    frames: np.ndarray | h5py.Dataset
    actions: np.ndarray | None = None
    episode_starts: tuple | np.ndarray = ()
    action_names: tuple = ()
    fps: float = 15.0
    name: str = ""

    def n_true_actions(self) -> int:
        """How many true actions there are: as named, else as seen."""
        return max(len(self.action_names), int(self.actions.max()) + 1)


def open_dataset(
    data_path: str, data_type: str = "auto", use_dummy_data: bool = False, frame_size: int = 64
) -> Dataset:
    """Any source as a dataset, converted first where it is video, with its contents checked."""
    if use_dummy_data or data_type == "dummy":
        names = ("stay", "left", "right", "up", "down")
        return Dataset(*dummy_world(), action_names=names, name="dummy data")
    path = existing(data_path)
    if data_type in ("folder", "video") or (data_type == "auto" and is_video(path)):
        out = path.with_name(f"{path.name}.{frame_size}px.h5")
        with main_process_first():
            path = convert_videos(find_videos(path), out, (frame_size, frame_size))
    with explained_errors(path):
        return read_dataset(h5py.File(path, "r"), path)


def read_dataset(file: h5py.File, path: Path) -> Dataset:
    """What an open HDF5 file holds, checked before any of it is read."""
    frames, actions, starts = checked_datasets(file, path)
    return Dataset(
        frames[:] if frames.size <= IN_MEMORY else frames,
        None if actions is None else actions[:].astype(np.int64),
        () if starts is None else starts[:].astype(np.int64),
        name=str(path),
        **attributes(file),
    )


class Batches:
    """Random batches from whatever has `starts`, where its clips begin, and `select(numbers)`.

    A thread prepares them one step ahead (the memory forecast varies batch_size).
    """

    def __init__(self, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        self.pool, self.ahead = ThreadPoolExecutor(1), {}

    def batch(self, step: int) -> tuple:
        """The random batch of training step `step`; each process gets its share of one draw."""
        now = self.ahead.pop((step, self.batch_size), None) or self._prepare(step)
        self.ahead = {(step + 1, self.batch_size): self._prepare(step + 1)}
        return now.result()

    def _prepare(self, step):
        return self.pool.submit(self._draw, step, self.batch_size)

    def __len__(self):
        return len(self.starts)

    def _chosen(self, step, size):
        return np.random.default_rng([self.seed, step]).choice(len(self), size * n_ranks())

    def first_frames(self, step: int, accumulate: int = 1) -> np.ndarray:
        """Where the clips of all processes begin, as frame numbers, in training step `step`."""
        parts = range(step * accumulate, (step + 1) * accumulate)
        return np.concatenate([self.starts[self._chosen(p, self.batch_size)] for p in parts])

    def _draw(self, step, size):
        batch = self.select(self._chosen(step, size)[rank() * size : (rank() + 1) * size])
        pin = torch.cuda.is_available()
        return tuple(x.pin_memory() if pin and x is not None else x for x in batch)


class Clips(Batches):
    """Clips of `length` frames from one part of a dataset.

    "train" is all but the last `val_fraction`, "val" the rest.
    """

    def __init__(
        self,
        dataset: Dataset,
        part: str,
        length: int,
        batch_size: int = 1,
        seed: int = 0,
        val_fraction: float = 0.1,
    ):
        super().__init__(batch_size, seed)
        self.dataset, self.part, self.length = dataset, part, length
        n = len(dataset.frames)
        border = max(0, n - max(length, int(n * val_fraction)))
        low, high = (0, border) if part == "train" else (border, n)
        inside = {int(start) for start in dataset.episode_starts if low < start < high}
        edges = [low, *sorted(inside), high]
        self.spans = spans = list(zip(edges, edges[1:], strict=False))  # no clip crosses their ends

        def clip_starts(apart):
            return np.concatenate([np.arange(a, b - length + 1, apart) for a, b in spans])

        self.starts = clip_starts(1).astype(int)
        self.non_overlapping = clip_starts(length).astype(int)
        self.n_frames = high - low
        if len(self.starts) == 0:
            refuse_short(dataset.name, part, length, max(b - a for a, b in spans), n)

    @property
    def frame_size(self) -> list[int]:
        return list(self.dataset.frames.shape[1:3])

    def select(self, numbers) -> tuple:
        return self.read(self.starts[numbers])

    def read(self, starts) -> tuple[torch.Tensor, torch.Tensor | None]:
        """→ frames uint8 (B, T, H, W, 3), true actions int64 (B, T-1) or None."""
        frames, actions, T = self.dataset.frames, self.dataset.actions, self.length
        with explained_errors(self.dataset.name):
            clips = torch.from_numpy(np.stack([frames[s : s + T] for s in starts]))
        if actions is None:
            return clips, None
        return clips, torch.from_numpy(np.stack([actions[s : s + T - 1] for s in starts]))

    def evenly_spaced(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Up to n clips from all over the part, without overlap where there is room."""
        n = max(1, min(n, self.n_frames // self.length))
        return self.select(np.linspace(0, len(self.starts) - 1, n).astype(int))


def open_clips(cfg) -> tuple[Clips, Clips]:
    """Training and validation clips of the data that cfg names."""
    dataset = open_dataset(cfg.data_path, cfg.data_type, cfg.use_dummy_data, cfg.frame_size)
    sizes = (cfg.context_length, cfg.batch_size, cfg.seed)
    train, val = (Clips(dataset, part, *sizes) for part in ("train", "val"))
    H, W = train.frame_size
    check_batch(cfg, H, W)
    cfg.data_fingerprint = data_fingerprint(dataset.frames)
    print(
        f"data: {train.n_frames:,} frames of {H}×{W} to train on, {val.n_frames:,} to validate;"
        f" {len(train):,} clips"
    )
    return train, val


class TokenClips(Batches):
    """Clips as stages 1 and 2 see them: tokens (B, T, N) and actions (B, T-1), both int64.

    Tokens depend on the frames before them in their clip, so clips are labelled whole, and clips
    do not overlap, so each frame is labelled once. label(frames uint8 (B, T, H, W, 3), true
    actions) → (tokens, actions). The result is kept beside the dataset in
    DATASET.PART.tokens.h5, and rebuilt when `inputs` (fingerprints of the two stages, dtype), the
    dataset or the clip length change.
    """

    def __init__(self, clips: Clips, label: Callable, inputs: dict):
        super().__init__(clips.batch_size, clips.seed)
        self.clips, self.starts, self.n_frames = clips, clips.non_overlapping, clips.n_frames
        source, path, stamp = Path(clips.dataset.name), None, None
        if source.is_file():  # the dummy world is no file: nothing is kept
            path = source.with_suffix(f".{clips.part}.tokens.h5")
            stamp = (source.stat().st_size, source.stat().st_mtime_ns)
        key = json.dumps([inputs, clips.length, len(self.starts), stamp])
        with main_process_first():
            cached = read_cache(path, key)
            if cached is None:
                cached = self._label(label)
                if rank() == 0:
                    write_cache(path, key, cached)
        self.tokens, self.actions = cached["tokens"], cached["actions"]

    def _label(self, label):
        batches = [self.starts[i : i + 32] for i in range(0, len(self.starts), 32)]
        bar = tqdm(batches, desc=f"tokens of {self.clips.part}", unit="batch", leave=False)
        pairs = [[x.int().cpu() for x in label(*self.clips.read(starts))] for starts in bar]
        tokens, actions = (torch.cat(column).numpy() for column in zip(*pairs, strict=True))
        return dict(tokens=tokens, actions=actions)

    def select(self, numbers) -> tuple[torch.Tensor, torch.Tensor]:
        columns = (self.tokens, self.actions)
        return tuple(torch.from_numpy(x[numbers].astype("int64")) for x in columns)

    def frames(self, numbers) -> torch.Tensor:
        return self.clips.read(self.starts[numbers])[0]


def to_float(frames: torch.Tensor, device=None) -> torch.Tensor:
    """uint8 (B, T, H, W, 3) → float (B, T, 3, H, W) in [-1, 1]; bytes travel to the device."""
    return frames.to(device, non_blocking=True).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """float (…, 3, H, W) in [-1, 1] → uint8 (…, H, W, 3), on the CPU."""
    return ((frames + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).cpu()
