"""VPT recordings: tar shards of NAME.mp4 and NAME.jsonl → clips with their actions, as a stream.

  * A shard is read front to back and is never in memory as a whole. A recording is decoded once,
    front to back.
  * Shards are split over processes and workers, and clips are shuffled in a buffer. A resumed
    stream continues with the very next clip.
  * Broken files and lines are counted, named and left out. Too many of them stop the reader.

Line i of NAME.jsonl was written with frame i, before its input took effect. So the state in line i
belongs to frame i, and the input in line i leads to frame i + 1 (minerllabs/minerl,
scripts/mcp_patch.diff). The meaning of the fields is from openai/Video-Pre-Training.
"""

import glob
import itertools
import json
import os
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator

from utils.cli import UserError

import numpy as np
import torch

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault(  # without formats that list other files to open
    "OPENCV_FFMPEG_CAPTURE_OPTIONS",
    "format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif",
)
import cv2

from models.distributed import n_ranks, rank

RATE = 20  # frames and lines per second of a recording
# bytes of a member of a shard; a recording of five minutes has about a hundredth of that
LARGEST = 1 << 30
DEGREES_PER_PIXEL = 0.15  # how far the view turns per pixel of the mouse, if no menu is open

# The 38 numbers of an action. The reference text calls its table 36-D, but numbers the dimensions
# from 0 to 37. It names two modifiers, shift and ctrl, for the three dimensions 22-24. Here the
# third is the right shift, and `--action-dim 36` leaves out 24 and 37. `--action-dim 13`, the
# "current implementation" of that text, is the first 13. It has no w a s d, so it cannot say that
# the player walks.
#   0-3    mouse dx, dy (pixels, summed), turn in yaw and in pitch (degrees). These are real
#          numbers, standardised with mean and standard deviation of the data.
#   4-12   hotbar keys 1-9, also for a slot that was changed by the wheel
#   13-17  w a s d space
#   18-19  q (drop) f (swap)
#   20     e (inventory)
#   21     escape
#   22-24  left shift, left control, right shift
#   25-27  mouse buttons: left, right, middle
#   28-36  the slot of the hotbar at the start, one-hot
#   37     a menu is open at the start
NAMES = [*"123456789", *"wasd", "space", "q", "f", "e", "escape"]
NAMES += ["left.shift", "left.control", "right.shift"]
KEYS = {f"key.keyboard.{name}": 4 + i for i, name in enumerate(NAMES)}
SIDES, BUTTON, SLOT, GUI = [KEYS["key.keyboard.a"], KEYS["key.keyboard.d"]], 25, 28, 37
LAYOUTS = {
    13: list(range(13)),
    36: [i for i in range(38) if i not in (24, 37)],
    38: list(range(38)),
}


class Problems:
    """What a reader has left out so far, each thing once.

    Raises UserError when there are more than `limit`.
    """

    def __init__(self, limit: int = 100):
        self.limit, self.counts, self.known = limit, Counter(), set()

    def add(self, kind: str, what: str) -> None:
        if (kind, what) in self.known:  # each epoch meets it again
            return
        self.known.add((kind, what))
        self.counts[kind] += 1
        text = f"skipped {what}: {kind}"[:300]
        print("".join(c if c.isprintable() else "?" for c in text), file=sys.stderr)
        if self.counts.total() > self.limit:
            kinds = ", ".join(f"{n} times: {kind}" for kind, n in self.counts.items())
            raise UserError(
                f"more than {self.limit} problems in the recordings ({kinds});"
                " repair them, or raise --max-problems"
            )


# --- one recording ---------------------------------------------------------------------------
class Ticks:
    """The lines of a recording as arrays of its n ticks.

    inputs (n, 38): the table above for each single tick (columns 2 and 3 are unused)
    state (n, 2): yaw in [-180, 180) and pitch
    valid (n,): False where the line cannot be used
    """

    def __init__(self, text: str, name: str = "", problems: Problems | None = None):
        problems = problems or Problems()
        # not splitlines, because typed text in a line may hold other separators
        lines = text.rstrip("\n").split("\n")
        n = len(lines)
        self.inputs, self.state = np.zeros((n, 38), np.float32), np.zeros((n, 2), np.float32)
        self.valid = np.ones(n, bool)
        stuck, slot = False, None
        for i, line in enumerate(lines):
            try:
                tick, numbers, keys, buttons, new, now = read_tick(line)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                self.valid[i], slot = False, None
                problems.add("a line that is no line of VPT", f"line {i + 1} of {name}.jsonl")
                continue
            # A left button newly pressed in line 1 is listed in all lines up to its next press.
            stuck = new == [0] if i == 0 else stuck and 0 not in new
            row = self.inputs[i]
            row[:2], self.state[i] = numbers[:2], (wrap(numbers[2]), numbers[3])
            row[SLOT + int(now)], row[GUI] = 1, bool(tick.get("isGuiOpen"))
            for key in map(str, keys):
                if key in KEYS:
                    row[KEYS[key]] = 1
                else:
                    problems.add("an unknown key", key)  # once, however often it is pressed
            for button in (0, 1, 2):
                row[BUTTON + button] = button in buttons and not (button == 0 and stuck)
            if slot not in (None, now):
                # The wheel changes the slot without a key, so the key is added, as in OpenAI's
                # loader. That loader adds it to the line that shows the new slot. Here it goes
                # into the line before, where the input happened; a real key is there already and
                # then counts once.
                self.inputs[i - 1, 4 + int(now)] = 1
            slot = now

    def __len__(self):
        return len(self.valid)


def read_tick(line: str) -> tuple[dict, list[float], list, list, list, int]:
    """→ (the line, [dx, dy, yaw, pitch], keys, buttons, newly pressed buttons, slot).

    Raises some error (see Ticks) for a line that is not in VPT's format.
    """
    tick = json.loads(line)
    mouse, keyboard = tick["mouse"] or {}, tick["keyboard"] or {}  # null: nothing was recorded
    keys, buttons = keyboard.get("keys", []), mouse.get("buttons", [])
    new = mouse.get("newButtons", [])
    slot = tick.get("hotbar", 0)  # older recorders do not write it
    numbers = [mouse.get("dx", 0), mouse.get("dy", 0), tick["yaw"], tick["pitch"]]
    numbers = [float(x) for x in numbers]
    if not all(abs(x) < 1e6 for x in numbers) or slot not in range(9):
        raise ValueError
    if not isinstance(buttons + new + keys, list):
        raise ValueError
    return tick, numbers, keys, buttons, new, slot


def wrap(degrees: float | np.ndarray) -> float | np.ndarray:
    """An angle in [-180, 180)."""
    return (degrees + 180) % 360 - 180


class ProcessVPT:
    """A part of a recording → one sample.

    It has num_frames frames at `fps`, and `frameskip` frames are a tubelet. With the defaults these
    are every 4th of 61 ticks, and 8 ticks from tubelet to tubelet. A sample has

      * video uint8 (T, 3, S, S)
      * actions (T/2 − 1, action_dim), each from a tubelet to the next
      * states (T/2, 2), yaw and pitch at the first frame of each tubelet

    statistics: mean and standard deviation, 6 numbers each, of mouse, turn and state in the data.
    They standardise actions and states, which otherwise stay in pixels and degrees.
    """

    def __init__(
        self,
        num_frames: int = 16,
        fps: int = 5,
        frameskip: int = 2,
        size: int = 256,
        action_dim: int = 13,
        statistics: tuple[list[float], list[float]] | None = None,
    ):
        if RATE % fps or num_frames % frameskip or num_frames < 2 * frameskip:
            raise UserError(
                f"{num_frames} frames at {fps} per second in tubelets of {frameskip}: fps must"
                f" divide {RATE}, and the frames must be at least two whole tubelets"
            )
        if action_dim not in LAYOUTS:
            known = ", ".join(map(str, LAYOUTS))
            raise UserError(f"--action-dim must be one of {known}, got {action_dim}")
        self.num_frames, self.frameskip = num_frames, frameskip
        self.size, self.action_dim = size, action_dim
        self.stride = RATE // fps  # ticks from frame to frame
        self.skip = self.stride * frameskip  # ticks from tubelet to tubelet
        self.span = self.stride * (num_frames - 1) + 1
        mean, std = statistics or ([0.0] * 6, [1.0] * 6)
        self.mean, self.std = np.array(mean, np.float32), np.array(std, np.float32)

    def actions(self, ticks: Ticks, start: int = 0, n: int | None = None) -> np.ndarray:
        """→ (n, 38), not standardised: the actions of n tubelets in a row, the first at `start`.

        Each covers `skip` ticks.
        """
        n = self.num_frames // self.frameskip - 1 if n is None else n
        rows = start + np.arange(n)[:, None] * self.skip + np.arange(self.skip)  # (n, skip)
        inputs, ends = ticks.inputs[rows], ticks.state[start + np.arange(n + 1) * self.skip]
        actions = inputs.max(axis=1)  # keys and buttons: pressed at any time (logical OR)
        actions[:, :2] = inputs[:, :, :2].sum(axis=1)
        # yaw is a circle, pitch is not
        actions[:, 2], actions[:, 3] = wrap(np.diff(ends[:, 0])), np.diff(ends[:, 1])
        actions[:, SLOT:] = inputs[:, 0, SLOT:]  # slot and menu: at the start
        return actions

    def standardise(self, actions: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """actions (…, 38), states (…, 2) in pixels and degrees → inputs of the model.

        These are actions (…, action_dim) and states (…, 2).
        """
        actions = actions.copy()
        actions[..., :4] = (actions[..., :4] - self.mean[:4]) / self.std[:4]
        return actions[..., LAYOUTS[self.action_dim]], (states - self.mean[4:]) / self.std[4:]

    def __call__(
        self, frames: list[np.ndarray], ticks: Ticks, start: int, mirrored: bool = False
    ) -> dict[str, np.ndarray]:
        """frames: the T frames of the sample, uint8 (S, S, 3) each.

        mirrored: swap left and right in the pictures, the mouse, the turn and the keys a and d.
        """
        first_ticks = start + np.arange(self.num_frames // self.frameskip) * self.skip
        video, actions = np.stack(frames), self.actions(ticks, start)
        states = ticks.state[first_ticks]
        if mirrored:
            video = video[:, :, ::-1]
            states = np.stack([wrap(-states[:, 0]), states[:, 1]], axis=1)
            actions[:, [0, 2]] *= -1
            actions[:, SIDES] = actions[:, SIDES[::-1]]
        actions, states = self.standardise(actions, states)
        video = np.ascontiguousarray(video.transpose(0, 3, 1, 2))
        return {"video": video, "actions": actions, "states": states}


# --- shards ----------------------------------------------------------------------------------
def find_shards(patterns: list[str]) -> list[str]:
    """Names and patterns (data/*.tar) → sorted paths.

    Raises UserError if there are none, or if a named one is missing.
    """
    remedy = "give tar files of NAME.mp4 and NAME.jsonl, for example data/vpt/train-*.tar"
    shards = set()
    for pattern in patterns:
        found = glob.glob(pattern)
        if not found:
            raise UserError(f"no shard is called {pattern}; {remedy}")
        shards.update(found)
    if not shards:
        raise UserError(f"the list of shards is empty; {remedy}")
    return sorted(shards)


class Member(tarfile.TarInfo):
    """A member whose damaged or missing header is an error.

    tarfile takes such a header for the end of the tar, unless it is the first one.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # two empty blocks: the true end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"header: {error}") from None


def recordings(
    shard: str, problems: Problems, want_video: bool = True
) -> Iterator[tuple[str, bytes | None, str]]:
    """Yield (name, bytes of the mp4 or None, text of the jsonl) of a shard.

    The shard is read as a stream, one member at a time.
    """
    name, parts = None, {}

    def complete():
        if len(parts) == 2:
            return True
        if parts:  # members of other kinds (NAME-options.json, .zip) do not count
            missing = "jsonl" if "mp4" in parts else "mp4"
            problems.add(f"it has no {missing} beside it", f"{name} in {shard}")

    try:
        with tarfile.open(shard, "r|*", tarinfo=Member) as tar:
            for member in tar:
                tar.members = []  # else tarfile keeps a record of each member
                stem, _, kind = member.name.rpartition(".")
                kind = kind.lower()
                if not member.isfile() or kind not in ("mp4", "jsonl"):
                    continue
                if stem != name:
                    if complete():
                        yield name, parts["mp4"], parts["jsonl"].decode(errors="replace")
                    name, parts = stem, {}
                place = f"{member.name} in {shard}"
                if kind in parts:
                    problems.add(f"a second {kind} of that name", place)
                # a small file can claim any size
                if member.issparse() or member.size > LARGEST:
                    problems.add(f"it claims {member.size:,} bytes", place)
                    continue
                content = tar.extractfile(member)
                parts[kind] = content.read() if want_video or kind == "jsonl" else None
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        reason = f"the tar ends early or is damaged ({error})"
        problems.add(reason, f"the rest of {shard}")
        parts = parts if len(parts) == 2 else {}
    if complete():
        yield name, parts["mp4"], parts["jsonl"].decode(errors="replace")


def statistics(
    shards: list[str], process: ProcessVPT, problems: Problems, limit: int = 1000
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of mouse, turn and state, 6 numbers each.

    They come from the lines of the first `limit` recordings. No video is decoded.
    """
    rows, skip = [], process.skip
    found = (r for shard in shards for r in recordings(shard, problems, want_video=False))
    for name, _, text in itertools.islice(found, limit):
        ticks = Ticks(text, name, problems)
        n = (len(ticks) - 1) // skip
        if n > 0:
            good = [ticks.valid[k * skip : (k + 1) * skip + 1].all() for k in range(n)]
            inputs, states = process.actions(ticks, 0, n)[:, :4], ticks.state[: n * skip : skip]
            rows.append(np.concatenate([inputs, states], axis=1)[good])
    if not sum(map(len, rows)):
        raise UserError(
            f"no recording in {len(shards)} shards from {shards[0]} on has {skip + 1} readable"
            " lines; give recordings in VPT's format"
        )
    rows = np.concatenate(rows)
    return rows.mean(axis=0).tolist(), np.maximum(rows.std(axis=0), 1e-3).tolist()


class Video:
    """The frames of an mp4, front to back.

    length: their number according to the header; at: the number of the frame that was read last.
    """

    def __init__(self, path: str, size: int):
        options = [cv2.CAP_PROP_N_THREADS, 1]
        self.capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, options)
        self.size, self.at = size, -1
        self.length = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def next(self) -> bool:
        """Read a frame. → False at the end, or at a damaged frame.

        The decoder skips a damaged frame, and then all later frames would belong to wrong lines.
        """
        if not self.capture.grab():
            return False
        number = self.capture.get(cv2.CAP_PROP_POS_MSEC) * RATE / 1000
        if abs(number - (self.at + 1)) > 0.5:
            return False
        self.at += 1
        return True

    def picture(self) -> np.ndarray:
        """The frame that was read last, uint8 (S, S, 3)."""
        # The whole picture is squeezed into a square, as for OpenAI's agent. A crop would cut off
        # the sides, where a turn shows something new.
        size = (self.size, self.size)
        small = cv2.resize(self.capture.retrieve()[1], size, interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(small, cv2.COLOR_BGR2RGB)


def shuffle(items: Iterable, size: int, rng: np.random.Generator) -> Iterator:
    """Items in random order, through a buffer of `size`: each new item replaces a random one.

    The order depends on the number of items and the seed alone, not on the items.
    """
    buffer = []
    for item in items:
        if not size:
            yield item
            continue
        if len(buffer) < size:
            buffer.append(item)
            continue
        i = int(rng.integers(size))
        item, buffer[i] = buffer[i], item
        yield item
    rng.shuffle(buffer)
    yield from buffer


class Clips(torch.utils.data.IterableDataset):
    """The samples of many shards as a stream, for a DataLoader with any number of workers.

    every: ticks from the start of one clip to the start of the next
    buffer: size of the shuffle buffer. 0 reads in order, from the first tick on. Otherwise shards
        come in random order, and the first clip of a recording starts at another tick in each epoch
    epochs: passes over the shards, or None for an endless stream
    mirror: share of the clips that are mirrored
    passed: {worker: position}, where a resumed stream continues
    n_batches: how many batches came before it; workers take turns, so this says whose turn it is

    A sample has three more entries: the `name` of its recording, its `worker`, and its `position`
    among the clips of that worker, counted from 1.
    """

    def __init__(
        self,
        shards: list[str],
        process: ProcessVPT,
        every: int = 64,
        buffer: int = 64,
        seed: int = 0,
        epochs: int | None = None,
        max_problems: int = 100,
        passed: dict[str, int] | None = None,
        mirror: float = 0.0,
        n_batches: int = 0,
    ):
        self.shards, self.process, self.every, self.buffer = shards, process, every, buffer
        self.seed, self.epochs, self.mirror = seed, epochs, mirror
        self.max_problems, self.passed, self.n_batches = max_problems, passed or {}, n_batches
        self.rank, self.n_ranks = rank(), n_ranks()
        # Here, before a DataLoader forks: OpenCV's threads do not survive that, and a worker that
        # changed their number would wait for them for ever.
        cv2.setNumThreads(1)

    def _rng(self, *numbers):
        return np.random.default_rng([self.seed, *numbers])

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        id, n = (worker.id, worker.num_workers) if worker else (0, 1)
        # a DataLoader asks its process 0 first, so that becomes the reader whose turn it is
        mine, readers = self.rank * n + (id + self.n_batches) % n, self.n_ranks * n
        if len(self.shards) < readers:
            raise UserError(
                f"{len(self.shards)} shards for {readers} readers;"
                " use fewer --workers, or write more and smaller shards"
            )
        # no warnings of OpenCV, because Problems prints one line for a broken video
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
        first = self.passed.get(str(mine), 0)
        # plain numbers, shuffled in the same way, tell which clips came before the resume
        numbers = shuffle(itertools.count(), self.buffer, self._rng(mine))
        out = set(itertools.islice(numbers, first))
        clips = enumerate(self.clips(mine, readers, out))
        numbered = (None if i in out else clip for i, clip in clips)
        for position, clip in enumerate(shuffle(numbered, self.buffer, self._rng(mine)), 1):
            if position <= first or clip is None:
                continue
            # assembled after the buffer, because clips in the buffer share their pictures
            name, *parts = clip
            mirrored = self._rng(mine, position).random() < self.mirror
            sample = self.process(*parts, mirrored)
            yield sample | {"name": name, "worker": mine, "position": position}

    def clips(self, mine: int, readers: int, out: set[int]) -> Iterator[tuple | None]:
        """Clips of reader `mine`, in the order of the shards.

        Yields None for a clip whose number is in `out`, and for a broken one.
        """
        problems, counted, empty = Problems(self.max_problems), 0, 0
        for epoch in itertools.count() if self.epochs is None else range(self.epochs):
            order = np.arange(len(self.shards))
            if self.buffer:
                order = self._rng(epoch).permutation(len(self.shards))
            before = counted
            for i in order[mine::readers]:
                for j, recording in enumerate(recordings(self.shards[i], problems)):
                    offset = 0
                    if self.buffer:
                        offset = int(self._rng(epoch, int(i), j).integers(self.every))
                    for clip in self.decode(*recording, offset, problems, out, counted):
                        yield clip
                        counted += 1
            empty = empty + 1 if counted == before else 0
            # not at once: in the next epoch this reader may get shards that are not broken
            if empty == (self.epochs or len(self.shards)):
                raise UserError(
                    f"not one clip of {self.process.span} ticks in {self.shards[order[mine]]} and"
                    " the reader's other shards; give longer recordings"
                )

    def decode(
        self,
        name: str,
        mp4: bytes,
        text: str,
        offset: int,
        problems: Problems,
        out: set[int],
        number: int,
    ) -> Iterator[tuple | None]:
        """The clips of one recording; `number` is that of the first."""
        ticks = Ticks(text, name, problems)
        stride, span = self.process.stride, self.process.span
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(mp4)
            file.flush()
            video = Video(file.name, self.process.size)
            n = video.length
            if n < 1:
                return problems.add("its video cannot be read", name)
            if abs(n - len(ticks)) > 1:  # VPT's recorder writes the last frame twice
                return problems.add(f"{n} frames, but {len(ticks)} lines", name)
            n = min(n, len(ticks))
            starts = range(offset % max(1, n - span + 1), n - span + 1, self.every)
            starts = [s for s in starts if ticks.valid[s : s + span].all()]
            wanted = {t for s in starts for t in range(s, s + span, stride)}
            frames = {}
            for i, start in enumerate(starts):
                if number + i in out:
                    yield None
                    continue
                while video.at < start + span - 1 and video.next():
                    if video.at in wanted and video.at >= start:
                        frames[video.at] = video.picture()
                if video.at < start + span - 1:
                    reason = f"its video ends or is damaged after {video.at + 1} of {n} frames"
                    problems.add(reason, name)
                    yield from [None] * (len(starts) - i)
                    return
                yield name, [frames[t] for t in range(start, start + span, stride)], ticks, start
                frames = {t: frame for t, frame in frames.items() if t > start}


def batches(clips: Clips, batch_size: int, workers: int, drop_last: bool = True) -> Iterator[dict]:
    """A stream of batches from `workers` processes.

    A UserError of a worker is raised again here, in one line.
    """
    loader = torch.utils.data.DataLoader(
        clips,
        batch_size,
        num_workers=workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the training run's random numbers
    )
    stream = iter(loader)
    while True:
        try:
            batch = next(stream)
        except StopIteration:
            return
        except UserError as error:
            text = str(error).strip().splitlines()[-1]
            raise UserError(text.split("UserError: ")[-1]) from None
        yield batch
