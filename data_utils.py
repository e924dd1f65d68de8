"""From any footage to clips: one HDF5 form, one reader.

  * sources: a folder of videos, one video, an HDF5 file (as record.py writes it, or with `frames` alone), a dummy world
  * videos are read once, front to back, into an HDF5 file beside the source; later runs find it there
  * the last part of the footage is for validation; no clip crosses that border or the border of an episode
  * which clips a training step sees is a function of (seed, step): a resumed run sees what it would have seen

The form: `frames` uint8 (N, H, W, 3) RGB; optional `actions` int64 (N,), actions[i] pressed between frames i and i+1;
optional `episode_starts` int64; attributes fps, game, action_names.
"""
import json
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from config import UserError

import h5py
import numpy as np
import torch
from tqdm import tqdm

from models.distributed import n_ranks, rank

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a broken video gets our one line, not the decoder's twenty
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif")  # no lists of other files
import cv2  # noqa: E402

VIDEO_SUFFIXES = {".mp4", ".webm", ".avi", ".mkv", ".gif"}
IN_MEMORY = 2 << 30  # bytes; a larger dataset is read clip by clip from disk
BOMB = 2000  # times that frames may unpack to; game footage shrinks tenfold, a black film a few hundred times
MOST_ACTIONS, LARGEST_SIDE, LARGEST_CHUNK = 1024, 8192, 1 << 28


@contextmanager
def first_alone():
    """The first process passes the block before the others, who then find the files that it has made."""
    if rank() > 0:
        torch.distributed.barrier()
    yield
    if rank() == 0 and n_ranks() > 1:
        torch.distributed.barrier()


# --- writing -----------------------------------------------------------------------------------------------------
class DatasetWriter:
    """Writes the HDF5 form block by block. The file takes its name only when the `with` block ends without an error."""

    def __init__(self, path, frame_size, with_actions=False, **attributes):
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        try:
            if self.path.is_dir():
                raise UserError(f"cannot write {self.path}: it is a folder; give the name of an HDF5 file")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = h5py.File(self.part, "w")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; choose a place and a name that can be written") from None
        shape = (*frame_size, 3)
        # 16 frames a chunk: a clip touches one or two; lzf shrinks game footage about tenfold and unpacks faster than disks read
        self.frames = self.file.create_dataset(
            "frames", (0, *shape), maxshape=(None, *shape), dtype="uint8", chunks=(16, *shape), compression="lzf"
        )
        self.actions = self.file.create_dataset("actions", (0,), maxshape=(None,), dtype="int64") if with_actions else None
        self.starts = []
        self.file.attrs.update(attributes)

    def __len__(self):
        return len(self.frames)

    def append(self, frames, actions=None):
        """frames uint8 (n, H, W, 3), actions int64 (n,)."""
        n = len(self.frames)
        try:
            self.frames.resize(n + len(frames), axis=0)
            self.frames[n:] = frames
            if self.actions is not None:
                self.actions.resize(n + len(frames), axis=0)
                self.actions[n:] = actions
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.part} after {n:,} frames ({str(error).splitlines()[0][:200]}); make room and start again") from None

    def cut_back(self, n):
        self.frames.resize(n, axis=0)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.file["episode_starts"] = np.array(self.starts, dtype="int64")
            self.file.close()
            if kind is None:
                os.replace(self.part, self.path)
        except (OSError, RuntimeError) as error:
            if kind is None:
                raise UserError(f"cannot write {self.path} ({str(error).splitlines()[0][:200]}); make room and start again") from None
        finally:
            self.part.unlink(missing_ok=True)


def read_video(path, frame_size):
    """Yield RGB frames (H, W, 3), resized by area. Raises ValueError with the reason if the video is broken."""
    capture = cv2.VideoCapture(str(path))
    n, expected = 0, capture.get(cv2.CAP_PROP_FRAME_COUNT)
    try:
        if (pixels := capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT)) > LARGEST_SIDE**2:
            raise ValueError(f"its frames have {pixels:,.0f} pixels")
        while True:
            ok, frame = capture.read()
            if not ok:
                break
            n += 1
            frame = cv2.resize(frame, (frame_size[1], frame_size[0]), interpolation=cv2.INTER_AREA)
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()
    if n == 0:
        raise ValueError("no frame can be read")
    if path.suffix.lower() in (".mp4", ".avi") and n < 0.9 * expected:  # other kinds do not store a count, it is guessed
        raise ValueError(f"it ends after {n} of {expected:.0f} frames")


def check_disk(videos, out, frame_size):
    """Print how much disk the converted videos can take and how much is free. Raises UserError if that is less."""
    n = 0
    for video in videos:
        capture = cv2.VideoCapture(str(video))
        n += min(max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))), video.stat().st_size)  # a header can say anything
        capture.release()
    needed, free = n * frame_size[0] * frame_size[1] * 3, shutil.disk_usage(out.parent).free
    print(f"disk: {n:,} frames of {frame_size[0]}×{frame_size[1]} take at most {needed / 2**20:,.1f} MB, mostly a tenth of that; {free / 2**20:,.1f} MB are free")
    if needed > free:
        raise UserError(f"{out} may need {needed / 2**20:,.1f} MB, but {free / 2**20:,.1f} MB are free; make room, or take fewer videos or a smaller --frame-size")


def convert_videos(videos, out, frame_size):
    """Videos → one HDF5 file; each video is an episode. A broken one is skipped with a line. Returns `out`."""
    stamp = json.dumps([frame_size, [(v.name, v.stat().st_size, v.stat().st_mtime_ns) for v in videos]])
    try:
        with h5py.File(out, "r") as file:
            if str(file.attrs.get("source")) == stamp:
                return out
    except (OSError, RuntimeError):  # there is none, or it is damaged
        pass
    capture = cv2.VideoCapture(str(videos[0]))
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if 1 <= fps <= 60 else 15.0  # what a header says can be anything
    capture.release()
    check_disk(videos, out, frame_size)
    with DatasetWriter(out, frame_size, fps=fps, game=out.stem, source=stamp) as writer:
        for video in tqdm(videos, desc="reading videos", unit="video", disable=None):
            start, block = len(writer), []
            try:
                for frame in read_video(video, frame_size):
                    block.append(frame)
                    if len(block) == 256:
                        writer.append(block)
                        block = []
                if block:
                    writer.append(block)
                writer.starts.append(start)
            except ValueError as reason:
                writer.cut_back(start)
                tqdm.write(f"skipped {video.name}: {reason}", file=sys.stderr)
        if not writer.starts:
            raise UserError(f"none of the {len(videos)} videos can be read ({videos[0]}, …); convert them to mp4 (H.264)")
    return out


# --- sources -----------------------------------------------------------------------------------------------------
def dummy_world(n_frames=2000, seed=0):
    """A world for tests: a still sprite amid a field of coloured tiles that scrolls 2 pixels as told.

    → frames uint8 (n, 64, 64, 3), actions int64 (n,): stay, left, right, up, down.
    """
    rng = np.random.default_rng(seed)
    moves = 2 * np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)])  # rows, columns
    actions = rng.integers(len(moves), size=n_frames)
    corners = np.concatenate([[(0, 0)], np.cumsum(moves[actions[:-1]], axis=0)]) % 128
    field = cv2.resize(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), (128, 128), interpolation=cv2.INTER_LINEAR)
    field = np.tile(field, (2, 2, 1))  # the field is a torus: the way never ends
    frames = np.stack([field[y : y + 64, x : x + 64] for y, x in corners])
    frames[:, 28:36, 28:36] = (250, 220, 60)
    return frames, actions


def held_actions(rng, n, n_actions):
    """n random actions, each held for 1-8 steps: a policy that looks at the picture would leave the code nothing to say."""
    holds = rng.integers(1, 9, size=n)
    return np.repeat(rng.integers(n_actions, size=n), holds)[:n]


@dataclass
class Footage:
    """A dataset, opened: frames uint8 (N, H, W, 3), in memory or, if large, on disk; actions (N,) or None."""

    frames: object
    actions: np.ndarray | None = None
    episode_starts: tuple = ()
    action_names: tuple = ()
    fps: float = 15.0
    name: str = ""


def open_footage(cfg) -> Footage:
    """What cfg.data_path or cfg.use_dummy_data names, converted first where it is video, with its contents checked."""
    if cfg.use_dummy_data or cfg.data_type == "dummy":
        return Footage(*dummy_world(), action_names=("stay", "left", "right", "up", "down"), name="dummy data")
    if not cfg.data_path:
        raise UserError("no footage given: use --data-path with a folder, a video or an HDF5 file, or --use-dummy-data")
    path, suffixes = Path(cfg.data_path).resolve(), ", ".join(sorted(VIDEO_SUFFIXES))
    if not path.exists():
        raise UserError(f"no such file or folder: {cfg.data_path}; check --data-path")
    kind = cfg.data_type
    if kind == "auto":
        kind = "folder" if path.is_dir() else "video" if path.suffix.lower() in VIDEO_SUFFIXES else "h5"
    if kind != "h5":
        videos = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES) if kind == "folder" else [path]
        if not videos:
            raise UserError(f"no video in {path}; looked for {suffixes}")
        with first_alone():
            path = convert_videos(videos, path.with_name(f"{path.name}.{cfg.frame_size}px.h5"), (cfg.frame_size, cfg.frame_size))
    try:
        return read_footage(h5py.File(path, "r"), path)
    except UserError:
        raise
    except OSError as error:
        if "Can't synchronously read" in str(error):
            raise UserError(f"{path} is damaged: not all of it can be read; make it again") from None
        raise UserError(f"{path} is neither a video ({suffixes}) nor a readable HDF5 file; convert it to one of them") from None
    except (RuntimeError, TypeError, KeyError, ValueError) as error:  # HDF5 has many words for damage
        raise UserError(f"{path} is damaged, or not as h5py writes it ({(str(error).splitlines() or [''])[0][:100]!r}); make it again") from None


def read_footage(file, path) -> Footage:
    """What an open HDF5 file holds, its shapes, types and ranges checked before any of it is read."""
    frames, actions, starts = (member(file, name, path) for name in ("frames", "actions", "episode_starts"))
    if frames is None or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        found = f"{frames.dtype} {frames.shape}" if frames else f"only {sorted(file)[:10]}"
        raise UserError(f"{path} must hold a dataset `frames`, uint8 (N, H, W, 3), but has {found}; store RGB frames so")
    if not 1 <= min(frames.shape) <= max(frames.shape[1:3]) <= LARGEST_SIDE:
        raise UserError(f"{path} has frames of the shape {frames.shape}; each side must have 1 … {LARGEST_SIDE:,} pixels, and there must be some")
    if actions is not None and (actions.shape != frames.shape[:1] or actions.dtype.kind not in "iu"):
        raise UserError(f"{path} has {actions.dtype} {actions.shape} actions for {len(frames)} frames; store one whole number per frame, or none")
    if starts is not None and (starts.ndim != 1 or starts.dtype.kind not in "iu" or len(starts) > len(frames)):
        raise UserError(f"{path} has {starts.dtype} {starts.shape} episode_starts; store a list of frame numbers, or none")
    if actions is not None and not 0 <= actions[:].min() <= actions[:].max() < MOST_ACTIONS:
        wrong = actions[:].min() if actions[:].min() < 0 else actions[:].max()
        raise UserError(f"{path} has an action {wrong}; number the actions from 0, up to {MOST_ACTIONS - 1:,}")
    return Footage(
        frames[:] if frames.size <= IN_MEMORY else frames,
        None if actions is None else actions[:].astype(np.int64),
        () if starts is None else starts[:].astype(np.int64),
        attribute(file, "action_names", lambda names: tuple(str(name) for name in np.atleast_1d(names)[:MOST_ACTIONS]), ()),
        attribute(file, "fps", lambda fps: float(fps) if 0 < float(fps) <= 1000 else 15.0, 15.0),
        str(path),
    )


def member(file, name, path):
    """The dataset `name` of an HDF5 file, or None. Raises UserError where it lies in another file, or would unpack to far more than is stored."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink | None):
        raise UserError(f"{path}: `{name}` is a link to elsewhere; store the data itself")
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        return None
    if found.external or found.is_virtual:
        raise UserError(f"{path}: `{name}` takes its data from another file; store them here")
    chunk = math.prod(found.chunks or (0,)) * found.dtype.itemsize  # is unpacked whole
    claimed = max(found.nbytes, chunk) if found.size else 0
    if claimed > BOMB * max(1, found.id.get_storage_size()) or chunk > LARGEST_CHUNK:
        raise UserError(f"{path}: `{name}` would unpack to {claimed:,} bytes, but {found.id.get_storage_size():,} are stored; it is refused")
    return found


def attribute(file, name, read, default):
    """read(an attribute of the file), or the default where there is none or it is something else."""
    try:
        return read(file.attrs[name]) if name in file.attrs else default
    except (OSError, TypeError, ValueError, OverflowError):
        return default


def n_buttons(footage):
    """How many true actions there are: as named, else as seen."""
    return max(len(footage.action_names), int(footage.actions.max()) + 1)


# --- reading -----------------------------------------------------------------------------------------------------
class Batches:
    """Random batches of whatever has `starts`, where in the footage each clip begins, and a `pick` by their numbers. A thread prepares them one
    step ahead."""

    def __init__(self, batch_size, seed):
        self.batch_size, self.seed, self.pool, self.ahead = batch_size, seed, ThreadPoolExecutor(1), {}

    def batch(self, step):
        """The random batch of training step `step`; of K processes each gets its share of one draw."""
        now, following = (step, self.batch_size), (step + 1, self.batch_size)
        ahead = {key: self.ahead.get(key) or self.pool.submit(self._draw, *key) for key in (now, following)}
        self.ahead = {following: ahead[following]}
        return ahead[now].result()

    def __len__(self):
        return len(self.starts)

    def _chosen(self, step, size):
        return np.random.default_rng([self.seed, step]).choice(len(self), size * n_ranks())

    def first_frames(self, step, accumulate=1):
        """Where in the footage the clips begin that all processes see in training step `step`."""
        parts = range(step * accumulate, (step + 1) * accumulate)
        return np.concatenate([self.starts[self._chosen(part, self.batch_size)] for part in parts])

    def _draw(self, step, size):
        batch = self.pick(self._chosen(step, size)[rank() * size : (rank() + 1) * size])
        return tuple(x.pin_memory() if x is not None and torch.cuda.is_available() else x for x in batch)


class Clips(Batches):
    """Clips of `length` frames from one part of the footage: "train" is all but the last `val_fraction`, "val" the rest."""

    def __init__(self, footage, part, length, batch_size=1, seed=0, val_fraction=0.1):
        super().__init__(batch_size, seed)
        self.footage, self.part, self.length = footage, part, length
        n = len(footage.frames)
        border = max(0, n - max(length, int(n * val_fraction)))
        low, high = (0, border) if part == "train" else (border, n)
        edges = [low, *sorted({int(start) for start in footage.episode_starts if low < start < high}), high]
        spans = list(zip(edges, edges[1:]))  # clips cross none of their borders
        self.starts = np.concatenate([np.arange(a, b - length + 1) for a, b in spans]).astype(int)
        if len(self.starts) == 0:
            longest = max(b - a for a, b in spans)
            raise UserError(
                f"{footage.name}: no clip of {length} frames fits into the {part} part, its longest episode has {longest} "
                f"(of {n} frames in all); use longer footage, a smaller --context-length or, in validate.py, a larger --val-fraction"
            )
        self.end_to_end = np.concatenate([np.arange(a, b - length + 1, length) for a, b in spans]).astype(int)
        self.n_frames = high - low

    def pick(self, numbers):
        return self.at(self.starts[numbers])

    @property
    def frame_size(self):
        return list(self.footage.frames.shape[1:3])

    def at(self, starts):
        """Clips that begin at `starts`: frames uint8 (B, T, H, W, 3), true actions int64 (B, T-1) or None."""
        try:
            frames = torch.from_numpy(np.stack([self.footage.frames[s : s + self.length] for s in starts]))
        except OSError:
            raise UserError(f"{self.footage.name} is damaged: not all of its frames can be read; make it again") from None
        if self.footage.actions is None:
            return frames, None
        return frames, torch.from_numpy(np.stack([self.footage.actions[s : s + self.length - 1] for s in starts]))

    def spread(self, n):
        """Up to n clips, evenly spread over the part, apart by a clip's length where there is room."""
        n = max(1, min(n, self.n_frames // self.length))
        return self.at(self.starts[np.linspace(0, len(self.starts) - 1, n).astype(int)])


class TokenClips(Batches):
    """Clips as stages 1 and 2 see them: tokens (B, T, N) and actions (B, T-1), both int64, computed once per dataset.

    Tokens depend on the frames before them in their clip, so clips are labelled whole. They lie end to end: each frame is computed once,
    and the step from one clip to the next is not seen. label(frames uint8 (B, T, H, W, 3), buttons) → (tokens, actions). The result is
    kept beside the footage, in FOOTAGE.train.tokens.h5; one that was made with other weights, named by `weights`, with
    other footage or for clips of another length is made anew.
    """

    def __init__(self, clips, label, weights):
        super().__init__(clips.batch_size, clips.seed)
        self.clips, self.starts, self.n_frames, source = clips, clips.end_to_end, clips.n_frames, Path(clips.footage.name)
        stat = source.stat() if source.is_file() else None  # the dummy world is no file: nothing is kept
        path = source.with_suffix(f".{clips.part}.tokens.h5") if stat else None
        key = json.dumps([weights, clips.length, len(clips.end_to_end), stat and (stat.st_size, stat.st_mtime_ns)])
        with first_alone():
            if not (path and path.exists() and self._load(path, key)):
                self._make(label)
                if path and rank() == 0:
                    self._save(path, key)

    def _load(self, path, key):
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("key") == key:
                    self.tokens, self.actions = file["tokens"][:], file["actions"][:]
                    return True
        except (OSError, KeyError):
            pass
        print(f"{path} was made with other weights, other footage or another --context-length; making it anew")
        return False

    def _make(self, label):
        batches = np.array_split(self.clips.end_to_end, -(-len(self.clips.end_to_end) // 32))
        pairs = [label(*self.clips.at(starts)) for starts in tqdm(batches, desc=f"tokens of {self.clips.part}", unit="batch", leave=False)]
        self.tokens, self.actions = (np.concatenate([x.cpu().numpy().astype("int32") for x in column]) for column in zip(*pairs))

    def _save(self, path, key):
        part = path.with_name(path.name + ".part")
        try:
            with h5py.File(part, "w") as file:
                file["tokens"], file["actions"], file.attrs["key"] = self.tokens, self.actions, key
            os.replace(part, path)
        except OSError:  # no place to keep it; it stays in memory
            part.unlink(missing_ok=True)

    def pick(self, numbers):
        return tuple(torch.from_numpy(x[numbers].astype("int64")) for x in (self.tokens, self.actions))

    def frames(self, numbers):
        return self.clips.at(self.clips.end_to_end[numbers])[0]


def to_float(frames, device=None):
    """uint8 (B, T, H, W, 3) → float (B, T, 3, H, W) in [-1, 1] on the device: only bytes travel."""
    return frames.to(device, non_blocking=True).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def to_uint8(frames):
    """float (…, 3, H, W) in [-1, 1] → uint8 (…, H, W, 3), on the CPU."""
    return ((frames + 1) * 127.5).round().clamp(0, 255).byte().movedim(-3, -1).cpu()
