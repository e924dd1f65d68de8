"""VPT recordings: tar shards of NAME.mp4 and NAME.jsonl → clips with their actions, as a stream.

  * a shard is read front to back and never held whole; a recording is decoded once, front to back
  * shards are split over processes and workers; clips are mixed in a buffer; a resumed stream goes on with the very next clip
  * what is broken is counted, named and left out, and too much of it stops the run

Line i of NAME.jsonl was written with frame i, before its input took effect: the state in line i belongs to frame i, the input
in line i leads to frame i + 1 (minerllabs/minerl, scripts/mcp_patch.diff; facts about the fields are from openai/Video-Pre-Training).
"""
import glob
import itertools
import json
import os
import sys
import tarfile
import tempfile
from collections import Counter

import numpy as np
import torch

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "format_whitelist;mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif")  # no lists of other files
import cv2  # noqa: E402

from config import UserError  # noqa: E402
from models.distributed import n_ranks, rank  # noqa: E402

RATE = 20  # frames and lines per second of a recording
LARGEST = 1 << 30  # bytes of a member of a shard; a recording of five minutes has a hundredth
DEGREES_PER_PIXEL = 0.15  # how far the view turns when the mouse moves by one, as long as no menu is open

# The 38 numbers of an action. The seed calls its table 36-D, but it counts dimensions 0-37, and gives two names, shift and ctrl, to the three
# modifiers 22-24. Here the third is the right shift, `--action-dim 36` leaves out 24 and 37, and 13 (the seed's "current implementation")
# is the first 13: it has no w a s d, so that nothing in it says that the player walks.
#   0-3    mouse dx, dy (pixels, summed), turn in yaw and in pitch (degrees): real numbers, standardised with the data's mean and deviation
#   4-12   hotbar keys 1-9, also for a slot that was changed by the wheel        13-17  w a s d space        18-19  q (drop) f (swap)
#   20     e (inventory)     21  escape     22-24  left shift, left control, right shift     25-27  mouse buttons: left, right, middle
#   28-36  the slot of the hotbar at the start, one-hot                          37     a menu is open at the start
NAMES = [*"123456789", *"wasd", "space", "q", "f", "e", "escape", "left.shift", "left.control", "right.shift"]
KEYS = {f"key.keyboard.{name}": 4 + i for i, name in enumerate(NAMES)}
SIDES, BUTTON, SLOT, GUI = [KEYS["key.keyboard.a"], KEYS["key.keyboard.d"]], 25, 28, 37
LAYOUTS = {13: list(range(13)), 36: [i for i in range(38) if i not in (24, 37)], 38: list(range(38))}


class Problems:
    """What a reader has left out so far, each thing once. Raises UserError when it is more than `limit`."""

    def __init__(self, limit=100):
        self.limit, self.counts, self.known = limit, Counter(), set()

    def add(self, kind, what):
        if (kind, what) in self.known:  # the recordings come by again in each epoch
            return
        self.known.add((kind, what))
        self.counts[kind] += 1
        text = f"skipped {what}: {kind}"[:300]
        print("".join(c if c.isprintable() else "?" for c in text), file=sys.stderr)
        if self.counts.total() > self.limit:
            kinds = ", ".join(f"{n} × {kind}" for kind, n in self.counts.items())
            raise UserError(f"more than {self.limit} problems in the recordings ({kinds}); mend them, or raise --max-problems")


# --- one recording -----------------------------------------------------------------------------------------------
class Ticks:
    """The lines of a recording as arrays of its n ticks.

    inputs (n, 38): what the table above says, of each tick alone (columns 2 and 3 unused); state (n, 2): yaw in [-180, 180) and pitch;
    valid (n,): False where the line cannot be used.
    """

    def __init__(self, text, name="", problems=None):
        problems = problems or Problems()
        lines = text.rstrip("\n").split("\n")  # not splitlines: what was typed may hold other separators
        n = len(lines)
        self.inputs, self.state, self.valid = np.zeros((n, 38), np.float32), np.zeros((n, 2), np.float32), np.ones(n, bool)
        stuck, slot = False, None
        for i, line in enumerate(lines):
            try:
                tick = json.loads(line)
                mouse, keys = tick["mouse"] or {}, (tick["keyboard"] or {}).get("keys", [])  # null where nothing was recorded
                buttons, new = mouse.get("buttons", []), mouse.get("newButtons", [])
                now = tick.get("hotbar", 0)  # older recorders do not write it
                numbers = [float(x) for x in (mouse.get("dx", 0), mouse.get("dy", 0), tick["yaw"], tick["pitch"])]
                if not all(abs(x) < 1e6 for x in numbers) or now not in range(9) or not isinstance(buttons + new + keys, list):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                self.valid[i], slot = False, None
                problems.add("a line that is no line of VPT", f"line {i + 1} of {name}.jsonl")
                continue
            stuck = new == [0] if i == 0 else stuck and 0 not in new  # a recording that begins with a pressed button shows it until it is pressed again
            row = self.inputs[i]
            row[:2], self.state[i] = numbers[:2], (wrap(numbers[2]), numbers[3])
            row[SLOT + int(now)], row[GUI] = 1, bool(tick.get("isGuiOpen"))
            for key in map(str, keys):
                if key in KEYS:
                    row[KEYS[key]] = 1
                else:
                    problems.add("an unknown key", key)  # once, wherever it is pressed
            for button in (0, 1, 2):
                row[BUTTON + button] = button in buttons and not (button == 0 and stuck)
            if slot not in (None, now):
                # The wheel changes the slot without a key, so the key is put in, as the reference does; but where the cause lies, one line before
                # the slot shows (the reference puts it where it shows, and there a real key would count a second time).
                self.inputs[i - 1, 4 + int(now)] = 1
            slot = now

    def __len__(self):
        return len(self.valid)


def wrap(degrees):
    """An angle in [-180, 180)."""
    return (degrees + 180) % 360 - 180


class ProcessVPT:
    """A stretch of a recording → one sample.

    num_frames frames at `fps`, `frameskip` of them to a tubelet: with the defaults every 4th of 61 ticks, and 8 ticks from tubelet to tubelet.
    Sample: video uint8 (T, 3, S, S) · actions (T/2 − 1, action_dim), from tubelet to tubelet · states (T/2, 2), yaw and pitch at their first frames.
    `mean` and `std`, (4 + 2,), of mouse, turn and state in the data standardise them; without, they stay in pixels and degrees.
    """

    def __init__(self, num_frames=16, fps=5, frameskip=2, size=256, action_dim=13, statistics=None):
        if RATE % fps or num_frames % frameskip or num_frames < 2 * frameskip:
            raise UserError(f"{num_frames} frames at {fps} per second in tubelets of {frameskip}: fps must divide {RATE}, the tubelets the frames, at least twice")
        if action_dim not in LAYOUTS:
            raise UserError(f"--action-dim must be one of {', '.join(map(str, LAYOUTS))}, got {action_dim}")
        self.num_frames, self.frameskip, self.size, self.action_dim = num_frames, frameskip, size, action_dim
        self.stride = RATE // fps  # ticks from frame to frame
        self.skip = self.stride * frameskip  # ticks from tubelet to tubelet
        self.span = self.stride * (num_frames - 1) + 1
        self.mean, self.std = (np.array(x, np.float32) for x in statistics or ([0.0] * 6, [1.0] * 6))

    def actions(self, ticks, start=0, n=None):
        """→ (n, 38): of the `skip` ticks from `start` on, and from each following tubelet's. Not standardised."""
        n = self.num_frames // self.frameskip - 1 if n is None else n
        rows = start + np.arange(n)[:, None] * self.skip + np.arange(self.skip)  # (n, skip)
        inputs, ends = ticks.inputs[rows], ticks.state[start + np.arange(n + 1) * self.skip]
        actions = inputs.max(axis=1)  # keys and buttons: pressed at any time (logical OR)
        actions[:, :2] = inputs[:, :, :2].sum(axis=1)
        actions[:, 2], actions[:, 3] = wrap(np.diff(ends[:, 0])), np.diff(ends[:, 1])  # yaw is a circle, pitch is not
        actions[:, SLOT:] = inputs[:, 0, SLOT:]  # slot and menu: at the start
        return actions

    def standardise(self, actions, states):
        """actions (…, 38), states (…, 2) in pixels and degrees → as the model sees them, actions (…, action_dim)."""
        actions = actions.copy()
        actions[..., :4] = (actions[..., :4] - self.mean[:4]) / self.std[:4]
        return actions[..., LAYOUTS[self.action_dim]], (states - self.mean[4:]) / self.std[4:]

    def __call__(self, frames, ticks, start, mirrored=False):
        """frames: those of the sample, uint8 (T, S, S, 3). mirrored: left and right change places, in the pictures, the turn and the keys a and d."""
        tubelets = self.num_frames // self.frameskip
        video, actions, states = np.stack(frames), self.actions(ticks, start), ticks.state[start + np.arange(tubelets) * self.skip]
        if mirrored:
            video, states = video[:, :, ::-1], states * np.float32([-1, 1])
            actions[:, [0, 2]] *= -1
            actions[:, SIDES] = actions[:, SIDES[::-1]]
        actions, states = self.standardise(actions, states)
        return {"video": np.ascontiguousarray(video.transpose(0, 3, 1, 2)), "actions": actions, "states": states}


# --- shards ------------------------------------------------------------------------------------------------------
def find_shards(patterns):
    """Names and patterns (data/*.tar) → sorted paths. Raises UserError if there is none, or a named one is missing."""
    shards = []
    for pattern in patterns:
        found = glob.glob(pattern)
        if not found:
            raise UserError(f"no shard is called {pattern}; give tar files of NAME.mp4 and NAME.jsonl, for example data/vpt/train-*.tar")
        shards += found
    if not shards:
        raise UserError("the list of shards is empty; give tar files of NAME.mp4 and NAME.jsonl, for example data/vpt/train-*.tar")
    return sorted(set(shards))


class Member(tarfile.TarInfo):
    """tarfile takes a damaged or missing header, but the first, for the end of the tar; here it is an error."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # two empty blocks: the true end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"header: {error}") from None


def recordings(shard, problems, want_video=True):
    """Yield (name, bytes of the mp4 or None, text of the jsonl) of a shard, which is read as a stream, a member at a time."""
    name, parts = None, {}

    def complete():
        if len(parts) == 2:
            return True
        if parts:  # members of other kinds (NAME-options.json, .zip) are none of ours
            problems.add(f"it has no {'jsonl' if 'mp4' in parts else 'mp4'} beside it", f"{name} in {shard}")

    try:
        with tarfile.open(shard, "r|*", tarinfo=Member) as tar:
            for member in tar:
                tar.members = []  # else it keeps a record of each member it has passed
                stem, _, kind = member.name.rpartition(".")
                if not member.isfile() or kind.lower() not in ("mp4", "jsonl"):
                    continue
                if stem != name:
                    if complete():
                        yield name, parts["mp4"], parts["jsonl"].decode(errors="replace")
                    name, parts = stem, {}
                if kind.lower() in parts:
                    problems.add(f"a second {kind} of that name", f"{member.name} in {shard}")
                if member.issparse() or member.size > LARGEST:  # a few bytes can claim to be any number of them
                    problems.add(f"it claims {member.size:,} bytes", f"{member.name} in {shard}")
                    continue
                content = tar.extractfile(member)
                parts[kind.lower()] = content.read() if want_video or kind.lower() == "jsonl" else None
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        problems.add(f"the tar ends early or is damaged ({error})", f"the rest of {shard}")
        parts = parts if len(parts) == 2 else {}
    if complete():
        yield name, parts["mp4"], parts["jsonl"].decode(errors="replace")


def statistics(shards, process, problems, limit=1000):
    """Mean and standard deviation of mouse, turn and state, ([6], [6]), from the lines of the first `limit` recordings; no video is decoded."""
    rows = []
    for name, _, text in itertools.islice((r for shard in shards for r in recordings(shard, problems, want_video=False)), limit):
        ticks = Ticks(text, name, problems)
        n = (len(ticks) - 1) // process.skip
        if n > 0:
            good = [ticks.valid[k * process.skip : (k + 1) * process.skip + 1].all() for k in range(n)]
            rows.append(np.concatenate([process.actions(ticks, 0, n)[:, :4], ticks.state[: n * process.skip : process.skip]], axis=1)[good])
    if not sum(map(len, rows)):
        raise UserError(f"no recording in {shards[0]} … has {process.skip + 1} lines that can be read; give recordings of VPT's form")
    rows = np.concatenate(rows)
    return rows.mean(axis=0).tolist(), np.maximum(rows.std(axis=0), 1e-3).tolist()


class Video:
    """The frames of an mp4, front to back. length: how many by its header; at: the number of the frame that was read last."""

    def __init__(self, path, size):
        self.capture, self.size, self.at = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), size, -1
        self.length = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def next(self):
        """Read a frame. → False at the end, or where a frame was damaged: the decoder leaves it out, and what follows would belong to other lines."""
        if not self.capture.grab() or abs(self.capture.get(cv2.CAP_PROP_POS_MSEC) * RATE / 1000 - (self.at + 1)) > 0.5:
            return False
        self.at += 1
        return True

    def picture(self):
        # The whole picture, squeezed into a square as OpenAI's agent sees it; a crop would cut off the sides, where turning brings news.
        return cv2.cvtColor(cv2.resize(self.capture.retrieve()[1], (self.size, self.size), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)


def shuffle(items, size, rng):
    """Items in a random order: each comes out when a later one takes its place in a buffer. Which one does not depend on what they are."""
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

    every: ticks from the start of one clip to the next one's; buffer: clips that are mixed, 0 to read in order, from the first tick on, instead of
    shards in random order and another beginning each epoch; epochs: how often, or None for ever; mirror: share of the clips that come mirrored.
    A sample has three entries more: `name` of its recording, `worker` and `position`, how many clips that worker has passed.
    `passed`, {worker: position}, goes on from there.
    """

    def __init__(self, shards, process, every=64, buffer=64, seed=0, epochs=None, max_problems=100, passed=None, mirror=0.0):
        self.shards, self.process, self.every, self.buffer, self.mirror = shards, process, every, buffer, mirror
        self.seed, self.epochs, self.max_problems, self.passed = seed, epochs, max_problems, passed or {}
        self.rank, self.n_ranks = rank(), n_ranks()

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        id, n = (worker.id, worker.num_workers) if worker else (0, 1)
        mine, readers = self.rank * n + id, self.n_ranks * n
        if len(self.shards) < readers:
            raise UserError(f"{len(self.shards)} shards for {readers} readers; use fewer --workers, or write more and smaller shards")
        cv2.setNumThreads(1)
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # no warnings: a broken video gets our one line
        first = self.passed.get(str(mine), 0)
        rngs = [np.random.default_rng([self.seed, mine]) for _ in range(2)]  # one for a trial with numbers: what has come out already?
        out = set(itertools.islice(shuffle(itertools.count(), self.buffer, rngs[0]), first))
        numbered = ((None if i in out else clip) for i, clip in enumerate(self.clips(mine, readers, out)))
        for position, clip in enumerate(shuffle(numbered, self.buffer, rngs[1]), 1):
            if position > first and clip is not None:  # only now is it put together: in the buffer, clips share their pictures
                name, *parts = clip
                mirrored = np.random.default_rng([self.seed, mine, position]).random() < self.mirror
                yield {**self.process(*parts, mirrored), "name": name, "worker": mine, "position": position}

    def clips(self, mine, readers, out):
        """This reader's clips in the order of the shards; None for one whose number is in `out`, or that turns out broken."""
        problems, number, empty = Problems(self.max_problems), 0, 0
        for epoch in itertools.count() if self.epochs is None else range(self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards)) if self.buffer else np.arange(len(self.shards))
            before = number
            for i in order[mine::readers]:
                for j, (name, mp4, text) in enumerate(recordings(self.shards[i], problems)):
                    offset = int(np.random.default_rng([self.seed, epoch, int(i), j]).integers(self.every)) if self.buffer else 0
                    for clip in self.decode(name, mp4, Ticks(text, name, problems), offset, problems, lambda: number in out):
                        yield clip
                        number += 1
            empty = empty + 1 if number == before else 0
            if empty == (self.epochs or len(self.shards)):  # not at once: this reader's only shard may be broken, but it gets another one next
                raise UserError(f"not one clip of {self.process.span} ticks in {self.shards[order[mine]]} …; give longer recordings")

    def decode(self, name, mp4, ticks, offset, problems, is_out):
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
            starts = [s for s in range(offset % max(1, n - span + 1), n - span + 1, self.every) if ticks.valid[s : s + span].all()]
            wanted = {t for s in starts for t in range(s, s + span, stride)}
            frames = {}
            for start in starts:
                if is_out():
                    yield None
                    continue
                while video.at < start + span - 1 and video.next():
                    if video.at in wanted and video.at >= start:
                        frames[video.at] = video.picture()
                if video.at < start + span - 1:
                    problems.add(f"its video ends or is damaged after {video.at + 1} of {n} frames", name)
                    yield from [None] * (len(starts) - starts.index(start))
                    return
                yield name, [frames[t] for t in range(start, start + span, stride)], ticks, start
                frames = {t: frame for t, frame in frames.items() if t > start}


def batches(clips, batch_size, workers, drop_last=True):
    """A stream of batches from `workers` processes. Errors of a worker come as themselves, in one line."""
    dice = torch.Generator()  # its own: else it would draw from those of the training
    loader = torch.utils.data.DataLoader(clips, batch_size, num_workers=workers, drop_last=drop_last, pin_memory=torch.cuda.is_available(), generator=dice)
    stream = iter(loader)
    while True:
        try:
            batch = next(stream)
        except StopIteration:
            return
        except UserError as error:
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None
        yield batch
