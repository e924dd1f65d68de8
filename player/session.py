"""One session of playing a world: its initial clip, its actions, and how to go back.

The window, the terminal and the page's server all use this class. The exported page does the same
in the browser (web/local.js).
"""

import base64
import binascii
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.cli import UserError
from utils.hardening.files import make_folder
from utils.pictures import enlarge

import numpy as np
import torch

from models.world_model import WorldModel
from player.film import labelled_grid, save_video

DEFAULT = Path(__file__).parents[1] / "checkpoints" / "shipped" / "crafter"  # a world's folder
ARROWS = ("left", "right", "up", "down")
KEYS = "0123456789abcdefghijklmnopstuvwxyz"  # one per action; without q and r


class Session:
    """A world that is played from one of the clips in `starts`, uint8 (n, T, H, W, 3).

    The same clip, seed and actions give the same frames, bit for bit, also after a rewind: the
    random numbers of a frame depend only on the seed and the frame's number. Sums round
    differently with another number of threads, so a saved run holds that number too. Several
    sessions may share a world's networks; each has its own caches.
    """

    def __init__(self, world: WorldModel, starts: np.ndarray, seed: int = 0):
        self.world = world.twin()
        self.starts, self.seed, self.round = starts, seed, -1
        self.restart()

    def restart(self) -> np.ndarray:
        """Start from the next clip of `starts`. → its last frame, uint8 (H, W, 3)."""
        self.round += 1
        return self.start(self.starts[self.round % len(self.starts)])

    def start(self, clip: np.ndarray) -> np.ndarray:
        """Start after the frames of a clip, uint8 (T, H, W, 3). → its last frame."""
        self.clip, self.actions, self.known = np.array(clip), [], []
        self.prompt = self.world.encode(self.clip)
        self.world.prime(*self.prompt, single=True)
        # the tokens of the frame before each action, and of the current frame
        self.tokens = [self.world.last.clone()]
        self.frame = self.clip[-1]
        return self.frame

    def press(self, action: int) -> np.ndarray:
        """Take a step with a latent action in [0, n_actions). → the next frame."""
        expected, tokens = self.known.pop(0) if self.known else (None, None)
        if expected == action:
            self.frame = self.world.teacher_force(tokens, self._tensor(action))
        else:
            self.known = []  # from here on, the actions differ from the saved run
            # torch's CPU generator uses 32 bits of a seed
            seed = (self.seed * 0x9E3779B1 + len(self.actions)) % 2**32
            self.world.generator.manual_seed(seed)
            self.frame = self.world.step(action)
        self.actions.append(int(action))
        self.tokens.append(self.world.last.clone())
        return self.frame

    def rewind(self, n: int) -> np.ndarray:
        """Go back to the frame after n actions. Raises ValueError unless 0 ≤ n ≤ len(actions)."""
        for _ in self.rewinding(n):
            pass
        return self.frame

    def rewinding(self, n: int) -> Iterator:
        """Like `rewind`, but yields before each frame that it recomputes.

        It recomputes only the frames that the next step depends on.
        """
        if not 0 <= n <= len(self.actions):
            now = len(self.actions)
            raise ValueError(f"cannot go back to frame {n}; this session has 0 … {now}")
        first = max(0, n - self.world.reach)
        if first == 0:
            self.world.prime(*self.prompt, single=True)
        else:
            previous = self._tensor(self.actions[first - 1]).unsqueeze(1)
            self.world.prime(self.tokens[first].unsqueeze(1), previous, single=True)
        del self.actions[n:], self.tokens[n + 1 :]
        self.known = []
        self.frame = self.clip[-1]
        for i in range(first, n):
            yield
            self.frame = self.world.teacher_force(self.tokens[i + 1], self._tensor(self.actions[i]))

    def _tensor(self, action):
        return torch.tensor([action], device=self.world.device)

    def to_json(self) -> dict:
        """The saved run: all that is needed to replay this session. `read_run` reads it."""
        return {
            "what": "nanoworld run",
            "version": 2,
            "world": self.world.identity,
            "shape": list(self.clip.shape),
            "clip": base64.b64encode(self.clip.tobytes()).decode(),
            "seed": self.seed,
            "steps": self.world.steps,
            "temperature": self.world.temperature,
            "actions": self.actions,
            "threads": torch.get_num_threads(),
        }


# --- saved runs ------------------------------------------------------------------------------


def read_run(path, world: WorldModel) -> tuple[Session, list[int]]:
    """Read a run that `Session.to_json` or the page made. → (a session at frame 0, the actions).

    Sets torch's number of threads. The exported page has its own random generator, so its runs
    also hold the tokens of each frame; the session shows those while the actions are the same.
    Raises UserError for a file that is not a saved run, or is of another world.
    """
    run, clip, tokens = parse_run(path)
    actions, steps, threads = run["actions"], run["steps"], run.get("threads")
    if run["world"] != world.identity:
        other = "".join(c for c in str(run["world"])[:40] if c.isprintable())
        raise UserError(
            f"{path} was played in world {other}, this is {world.identity};"
            " name its folder with --checkpoint"
        )
    unknown_action = max(actions, default=0) >= world.n_actions
    if list(clip.shape[1:]) != [*world.frame_size, 3] or unknown_action:
        raise UserError(f"{path} has frames or actions that this world does not know")
    n_patches, n_codes = math.prod(world.dynamics.grid), world.dynamics.mask_index
    for frame in tokens:
        if len(frame) != n_patches or not all(0 <= token < n_codes for token in frame):
            raise UserError(f"{path} has tokens that this world does not know")
    world = copy.copy(world)
    if run.get("half"):
        round_weights(world)
    if threads and threads <= 4 * os.cpu_count():  # more threads would make a step take seconds
        torch.set_num_threads(threads)
    world.steps, world.temperature = steps, run["temperature"]
    # before version 2 all seeds gave the same random numbers
    session = Session(world, clip[None], run["seed"] if run.get("version") == 2 else 0)
    session.known = [
        (action, torch.tensor([frame], device=world.device))
        for action, frame in zip(actions, tokens, strict=False)
    ]
    return session, actions


def parse_run(path) -> tuple[dict, np.ndarray, list]:
    """Read a file and check all that needs no world. → (its JSON object, its clip, its tokens)."""
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
        shape, actions = run["shape"], run["actions"]
        tokens = [[int(token) for token in frame] for frame in run.get("tokens", [])]
        data = base64.b64decode(run["clip"], validate=True)
        clip = np.frombuffer(data, dtype=np.uint8).reshape(shape)
        steps, threads = run["steps"], run.get("threads", 1)
        numbers = [run["seed"], steps, threads, *actions, *shape]
        valid = (
            run["what"] == "nanoworld run"
            and isinstance(actions, list)
            and all(type(n) is int and 0 <= n < 2**31 for n in numbers)
            and len(shape) == 4
            and 0 not in shape
            and shape[0] <= 64
            and 1 <= steps <= 1000
            and 1 <= threads <= 1024
            and 0 <= run["temperature"] < float("inf")
        )
        if not valid:
            raise ValueError
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        OverflowError,
        binascii.Error,
        RecursionError,
    ):
        raise UserError(
            f"{path} is not a run that this project saved;"
            " save one with --save run.json or on the page"
        ) from None
    return run, clip, tokens


def round_weights(world: WorldModel) -> None:
    """Round the weights to float16 in place, as in the exported page."""
    for model in (world.tokenizer, world.lam, world.dynamics):
        if model is not None:
            for weight in model.parameters():
                weight.data = weight.data.half().to(weight.dtype)


def save_session(session: Session, path: str, fps: float, frames=()) -> None:
    """Save as JSON for --replay, or as GIF or MP4. Without `frames`, these are recomputed."""
    if Path(path).suffix.lower() == ".json":
        Path(path).write_text(json.dumps(session.to_json()), encoding="utf-8")
    else:
        if not frames:
            again = Session(session.world, session.clip[None], session.seed)
            frames = [again.frame] + [again.press(action) for action in session.actions]
        scale = max(1, 256 // frames[0].shape[0])
        save_video([enlarge(frame, scale) for frame in frames], path, fps)
    print(f"{path}: {len(session.actions) + 1} frames")


# --- what the keys do ------------------------------------------------------------------------


def arrow_actions(world: WorldModel) -> dict[str, int]:
    """Arrow name → the most frequent action that moves that way, else the first four actions."""
    ways = dict(left="left", right="right", up="up", forward="up", down="down", back="down")
    rows = sorted(world.action_table, key=lambda row: row["share"])
    known = {ways[row["direction"]]: row["action"] for row in rows if row["direction"] in ways}
    return known or dict(zip(ARROWS, range(world.n_actions), strict=False))


def idle_action(world: WorldModel) -> int | None:
    """The most frequent action that moves nothing, used while no key is down; None if none."""
    still = [row for row in world.action_table if row["moves"] == "nothing"]
    return max(still, key=lambda row: row["share"])["action"] if still else None


def twins(world: WorldModel) -> dict[int, int]:
    """Action → a more frequent one that does the same, as the action table measured it.

    The same is: nothing moves, or the same kind of thing moves the same way, at any speed.
    """
    found, first = {}, {}
    for row in sorted(world.action_table, key=lambda row: -row["share"]):
        effect = (row["moves"], row["direction"])
        if row["share"] > 0 and (row["moves"] == "nothing" or row["direction"]):
            twin = first.setdefault(effect, row["action"])
            found |= {row["action"]: twin} if twin != row["action"] else {}
    return found


def legend_frames(world: WorldModel, clip, n_frames: int = 8) -> Iterator[np.ndarray]:
    """Hold each action for n_frames: yields n_frames times uint8 (n_actions, H, W, 3)."""
    world = world.twin()
    world.reset(np.repeat(np.asarray(clip)[None], world.n_actions, axis=0))
    for _ in range(n_frames):
        yield world.step(range(world.n_actions))


def save_demo(world: WorldModel, starts: np.ndarray, path: str) -> None:
    """Save a film of each latent action (columns) held for a second, from two clips (rows)."""
    table = key_table(world)
    names = [table[action].partition("  (")[0] for action in range(world.n_actions)]
    rows = [legend_frames(world, clip, max(1, round(world.fps))) for clip in starts[:2]]
    pictures = [labelled_grid(frames, names) for frames in zip(*rows, strict=True)]
    make_folder(Path(path).parent)
    save_video(pictures, path, world.fps)
    print(
        f"there is no display and no terminal, so {path} shows what the keys do:"
        " a column per latent action, held for a second from two initial frames\n"
        "to play: use a terminal, or --web for a page,"
        " or --actions 0,3,3,1 --save out.gif for your own film"
    )


def key_table(world: WorldModel) -> dict[int, str]:
    """Action → its line: key, name, arrow key, such as "2  ← view left  (arrow left)".

    First come actions with effects of their own, then their twins: "5  ← view left  (like 2)".
    """
    notes = {action: f"(arrow {arrow})" for arrow, action in arrow_actions(world).items()}
    same = twins(world)
    notes |= {action: f"(like {KEYS[twin]})" for action, twin in same.items()}
    names = ["" if name == str(i) else name for i, name in enumerate(world.action_names)]
    lines = [(KEYS[i : i + 1], name, notes.get(i, "")) for i, name in enumerate(names)]
    order = sorted(range(world.n_actions), key=lambda action: action in same)
    return {action: "  ".join(filter(None, lines[action])) for action in order}


def play_loop(session: Session, fps: float, show: Callable, next_key: Callable, actions=()) -> None:
    """Play with keys, one frame per 1/fps seconds, after the actions of a saved run, if any.

    show(rate, held) draws the frame, the frame rate and the held action. next_key(seconds) waits
    at most that long. → a character, an arrow's name, "backspace", "q" (ends the loop) or None.
    """
    arrows, actions = arrow_actions(session.world), list(actions)
    keys = KEYS[: session.world.n_actions]
    held, rate = idle_action(session.world) or 0, fps
    due = last = time.perf_counter()
    while True:
        show(rate, held)
        key = next_key(max(0.0, due - time.perf_counter()))
        if key == "q":
            return
        if key == "r":
            session.restart()
        if key == "backspace":
            session.rewind(max(0, len(session.actions) - round(fps)))
        if key is not None:
            actions = []  # a key ends the saved run
        if key in arrows:
            held = arrows[key]
        elif key in tuple(keys):
            held = KEYS.index(key)
        if time.perf_counter() < due:  # a key came early; wait until the frame is due
            continue
        now = time.perf_counter()
        rate, last = 0.9 * rate + 0.1 / (now - last), now
        due = max(due + 1 / fps, now)  # after a delay, do not catch up
        held = actions.pop(0) if actions else held
        session.press(held)
