"""The game behind every player: a world, where it began, what was pressed, and the way back. It knows no window and no page.

The window (play.py), the terminal (player/terminal.py) and the page's server (web/server.py) all play this one; the static page (web/local.js)
does the same in the browser.
"""
import base64
import binascii
import copy
import json
import math
import os
import time
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
        self.clip, self.actions, self.outcomes = np.array(clip), [], []
        self.begun = self.world.encode(self.clip)
        self.world.begin(*self.begun, single=True)
        self.tokens = [self.world.last.clone()]  # of the frame before each action, and of the last frame
        self.frame = self.clip[-1]
        return self.frame

    def press(self, action):
        """One step with a latent action in [0, n_actions); → the next frame."""
        known = self.outcomes.pop(0) if self.outcomes else (None, None)
        if known[0] == action:
            self.frame = self.world.follow(known[1], torch.tensor([action], device=self.world.device))
        else:
            self.outcomes = []  # another way than the saved run's
            self.world.generator.manual_seed((self.seed * 0x9E3779B1 + len(self.actions)) % 2**32)  # on a CPU, torch takes no more bits
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
        self.outcomes = []
        self.frame = self.clip[-1]
        for i in range(first, n):
            yield
            self.frame = self.world.follow(self.tokens[i + 1], self._action(i))

    def _action(self, i):
        return torch.tensor([self.actions[i]], device=self.world.device)

    def record(self):
        """What it takes to play the same again, for json.dump; `read_run` reads it."""
        return {
            "what": "nanoworld run", "version": 2, "world": self.world.identity, "shape": list(self.clip.shape),
            "clip": base64.b64encode(self.clip.tobytes()).decode(), "seed": self.seed, "steps": self.world.steps,
            "temperature": self.world.temperature, "actions": self.actions, "threads": torch.get_num_threads(),
        }  # fmt: skip


def read_run(path, world):
    """A file that `Game.record` made, or the page saved → (the Game at its beginning, the actions). Sets torch's threads. Raises UserError.

    The page in the browser has a random generator of its own, so its runs also hold the tokens of each frame: those the Game then shows,
    as long as the same actions are pressed.
    """
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
        shape, actions, seed, steps, threads = run["shape"], run["actions"], run["seed"], run["steps"], run.get("threads", 1)
        tokens = [[int(token) for token in frame] for frame in run.get("tokens", [])]
        clip = np.frombuffer(base64.b64decode(run["clip"], validate=True), dtype=np.uint8).reshape(shape)
        numbers = all(type(n) is int and 0 <= n < 2**31 for n in [seed, steps, threads, *actions, *shape])
        sound = run["what"] == "nanoworld run" and isinstance(actions, list) and len(shape) == 4 and 0 not in shape and shape[0] <= 64
        if not (sound and numbers and 1 <= steps <= 1000 and 1 <= threads <= 1024 and 0 <= run["temperature"] < float("inf")):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, OverflowError, binascii.Error, RecursionError):
        raise UserError(f"{path} is not a run that this project saved; save one with --save run.json or on the page") from None
    if run["world"] != world.identity:
        other = "".join(c for c in str(run["world"])[:40] if c.isprintable())
        raise UserError(f"{path} was played in world {other}, this is {world.identity}; name its folder with --checkpoint")
    if shape[1:] != [*world.frame_size, 3] or max(actions, default=0) >= world.n_actions:
        raise UserError(f"{path} has frames or actions that this world does not know")
    n_patches, n_codes = math.prod(world.dynamics.grid), world.dynamics.mask_index
    if not all(len(frame) == n_patches and all(0 <= token < n_codes for token in frame) for frame in tokens):
        raise UserError(f"{path} has tokens that this world does not know")
    world = copy.copy(world)
    if run.get("half"):
        round_weights(world)
    if "threads" in run and threads <= 4 * os.cpu_count():  # with more than that a step would take seconds
        torch.set_num_threads(threads)
    world.steps, world.temperature = steps, run["temperature"]
    game = Game(world, clip[None], seed if run.get("version") == 2 else 0)  # before version 2 all seeds gave the same random numbers
    game.outcomes = [(action, torch.tensor([frame], device=world.device)) for action, frame in zip(actions, tokens)]
    return game, actions


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


def legend_frames(world, clip, n_frames=8):
    """What each action does when it is held, frame by frame: uint8 (n_actions, H, W, 3), all after the same clip (T, H, W, 3)."""
    world = copy.copy(world)
    world.generator, world.last = torch.Generator(world.device).manual_seed(0), world.last[:0]
    world.reset(np.repeat(np.asarray(clip)[None], world.n_actions, axis=0))
    for _ in range(n_frames):
        yield world.step(range(world.n_actions))


def key_table(world):
    """A line per action: its key, its name if it has one, its arrow key if it has one, such as "2  ← view left  (arrow left)"."""
    arrows = {action: f"(arrow {arrow})" for arrow, action in arrow_actions(world).items()}
    names = ["" if name == str(i) else name for i, name in enumerate(world.action_names)]
    return ["  ".join(part for part in (KEYS[i : i + 1], name, arrows.get(i, "")) if part) for i, name in enumerate(names)]


def play_loop(game, fps, show, next_key, actions=()):
    """Play with keys, one frame per 1/fps seconds, the newest key counts; first the actions of a run, if any, then yours.

    show(rate, held) draws the game's frame, the frame rate and the action held. next_key(seconds) waits at most that long for a key
    → a character, an arrow's name, "backspace", "q", which ends the loop, or None.
    """
    arrows, held, rate, actions = arrow_actions(game.world), idle_action(game.world) or 0, fps, list(actions)
    due = last = time.perf_counter()
    while True:
        show(rate, held)
        key = next_key(max(0.0, due - time.perf_counter()))
        if key == "q":
            return
        if key == "r":
            game.restart()
        if key == "backspace":
            game.rewind(max(0, len(game.actions) - round(fps)))
        if key is not None:
            actions = []  # the rest of the run gives way to you
        if key in arrows:
            held = arrows[key]
        elif key in tuple(KEYS[: game.world.n_actions]):
            held = KEYS.index(key)
        if time.perf_counter() < due:  # a key came early: wait for the frame's time
            continue
        now = time.perf_counter()
        rate, last = 0.9 * rate + 0.1 / (now - last), now
        due = max(due + 1 / fps, now)  # never hurry to catch up
        held = actions.pop(0) if actions else held
        game.press(held)
