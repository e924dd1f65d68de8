"""The game behind every player: a world, where it began, what was pressed, and the way back. It knows no window and no page.

The window (play.py) and the page's server (web/server.py) both play this one; the static page (web/local.js) does the same in the browser.
"""
import base64
import binascii
import copy
import json
import os
from pathlib import Path

import numpy as np
import torch

from config import UserError

ARROWS = ("left", "right", "up", "down")
KEYS = "0123456789abcdefghijklmnopstuvwxyz"  # one per action; without q and r


class Game:
    """One world being played from one of `starts`, uint8 (n, T, H, W, 3).

    The same start, seed and actions give the same frames, bit for bit, also after a way back: the dice of a frame depend on the seed and
    on its number alone. (Sums round by the number of threads, so a run remembers that, too.) Several games may share a world's networks; each keeps its own memory of what happened.
    """

    def __init__(self, world, starts, seed=0):
        self.world = copy.copy(world)
        self.world.generator, self.world.last = torch.Generator(world.device), world.last[:0]  # its own dice and its own memory
        self.starts, self.seed, self.round = starts, seed, -1
        self.restart()

    def restart(self):
        """Begin again from the next of the starts; → its last frame, uint8 (H, W, 3)."""
        self.round += 1
        return self.start(self.starts[self.round % len(self.starts)])

    def start(self, clip):
        """Begin after the frames of a clip, uint8 (T, H, W, 3); → the last of them."""
        self.clip, self.actions = np.array(clip), []
        self.begun = self.world.encode(self.clip)
        self.world.begin(*self.begun, single=True)
        self.tokens = [self.world.last.clone()]  # of the frame before each action, and of the last frame
        self.frame = self.clip[-1]
        return self.frame

    def press(self, action):
        """One step with a latent action in [0, n_actions); → the next frame."""
        self.world.generator.manual_seed((self.seed << 32) + len(self.actions))
        self.frame = self.world.step(action)
        self.actions.append(int(action))
        self.tokens.append(self.world.last.clone())
        return self.frame

    def rewind(self, n):
        """Back to where n actions had been pressed; → that frame. Raises ValueError unless 0 ≤ n ≤ len(actions)."""
        for _ in self.rewinding(n):
            pass
        return self.frame

    def rewinding(self, n):
        """`rewind`, pausing after each frame that it runs again: only those that the next step can still depend on."""
        if not 0 <= n <= len(self.actions):
            raise ValueError(f"cannot go back to frame {n}; this game has 0 … {len(self.actions)}")
        first = max(0, n - self.world.reach)
        if first == 0:
            self.world.begin(*self.begun, single=True)
        else:
            self.world.begin(self.tokens[first].unsqueeze(1), self._action(first - 1).unsqueeze(1), single=True)
        del self.actions[n:], self.tokens[n + 1 :]
        self.frame = self.clip[-1]
        for i in range(first, n):
            yield
            self.frame = self.world.follow(self.tokens[i + 1], self._action(i))

    def _action(self, i):
        return torch.tensor([self.actions[i]], device=self.world.device)

    def record(self):
        """What it takes to play the same again, for json.dump; `read_run` reads it."""
        return {
            "what": "nanoworld run", "world": self.world.identity, "shape": list(self.clip.shape),
            "clip": base64.b64encode(self.clip.tobytes()).decode(), "seed": self.seed, "steps": self.world.steps,
            "temperature": self.world.temperature, "actions": self.actions, "threads": torch.get_num_threads(),
        }  # fmt: skip


def read_run(path, world):
    """A file that `Game.record` made, or the page saved → (the Game at its beginning, the actions). Sets torch's threads. Raises UserError."""
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
        shape, actions, seed, steps, threads = run["shape"], run["actions"], run["seed"], run["steps"], run.get("threads", 1)
        clip = np.frombuffer(base64.b64decode(run["clip"], validate=True), dtype=np.uint8).reshape(shape)
        numbers = all(type(n) is int and 0 <= n < 2**31 for n in [seed, steps, threads, *actions, *shape])
        sound = run["what"] == "nanoworld run" and isinstance(actions, list) and len(shape) == 4 and 0 not in shape and shape[0] <= 64
        if not (sound and numbers and 1 <= steps <= 1000 and 1 <= threads <= 1024 and 0 <= run["temperature"] < float("inf")):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, binascii.Error, RecursionError):
        raise UserError(f"{path} is not a run that this project saved; save one with --save run.json or on the page") from None
    if run["world"] != world.identity:
        other = "".join(c for c in str(run["world"])[:40] if c.isprintable())
        raise UserError(f"{path} was played in world {other}, this is {world.identity}; name its folder with --checkpoint")
    if shape[1:] != [*world.frame_size, 3] or max(actions, default=0) >= world.n_actions:
        raise UserError(f"{path} has frames or actions that this world does not know")
    world = copy.copy(world)
    if run.get("half"):
        round_weights(world)
    if "threads" in run and threads <= 4 * os.cpu_count():  # with more than that a step would take seconds
        torch.set_num_threads(threads)
    world.steps, world.temperature = steps, run["temperature"]
    return Game(world, clip[None], seed), actions


def round_weights(world):
    """Round the weights to float16 in place, as the page in the browser has them (web/export.py); shipped worlds are that already."""
    for model in filter(None, (world.tokenizer, world.lam, world.dynamics)):
        for weight in model.parameters():
            weight.data = weight.data.half().to(weight.dtype)


def arrow_actions(world):
    """Arrow name → the most frequent action that moves that way; where no motion is known, the first four actions."""
    ways = {"left": "left", "right": "right", "up": "up", "forward": "up", "down": "down", "back": "down"}
    rows = sorted(world.action_table, key=lambda row: row["share"])
    return {ways[row["direction"]]: row["action"] for row in rows if row["direction"] in ways} or dict(zip(ARROWS, range(world.n_actions)))


def idle_action(world):
    """The most frequent action that moves nothing, what happens while no key is down; None where there is none."""
    still = [row for row in world.action_table if row["moves"] == "nothing"]
    return max(still, key=lambda row: row["share"])["action"] if still else None


def legend(world, clip, n_frames=8):
    """What each action does when it is held: uint8 (n_actions, n_frames, H, W, 3), all after the same clip (T, H, W, 3)."""
    world = copy.copy(world)
    world.generator, world.last = torch.Generator(world.device).manual_seed(0), world.last[:0]
    world.reset(np.repeat(np.asarray(clip)[None], world.n_actions, axis=0))
    return np.stack([world.step(range(world.n_actions)) for _ in range(n_frames)], axis=1)
