"""Record VizDoom in the format of VPT's recordings.

It writes tar shards of NAME.mp4 and NAME.jsonl. vpt.py reads them just as it reads Minecraft's.

    python -m extras.vjepa_ac.doom --out data/vpt/train --ticks 40000 --shards 4
    python -m extras.vjepa_ac.doom --out data/vpt/test --ticks 8000 --shards 2 --seed 1000

The mouse turns and tilts the view (0.15 degrees per pixel). w a s d walk, space jumps, left shift
ducks, left control runs, mouse buttons attack and use, the number keys choose weapons. The player
acts at random, with one rule: it turns when walking does not move it. The places are three of
VizDoom's scenarios.
"""

import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from utils.cli import UserError, option, parse_options, print_user_errors
from utils.hardening.files import make_folder

import cv2
import numpy as np
from tqdm import tqdm

from extras.vjepa_ac.vpt import DEGREES_PER_PIXEL, RATE

PLACES = ["my_way_home", "health_gathering_supreme", "deathmatch"]
SIZE = (640, 360)  # as VPT's files
TICS = (2, 2, 2, 1)  # Doom runs at 35 tics a second: 7 tics in 4 ticks are 20 ticks a second
BUTTONS = {
    "w": "MOVE_FORWARD",
    "s": "MOVE_BACKWARD",
    "a": "MOVE_LEFT",
    "d": "MOVE_RIGHT",
    "space": "JUMP",
    "left.shift": "CROUCH",
    "left.control": "SPEED",
    0: "ATTACK",
    1: "USE",
    **{str(i): f"SELECT_WEAPON{i}" for i in range(1, 8)},
}
VARIABLES = ["ANGLE", "PITCH", "POSITION_X", "POSITION_Y", "POSITION_Z"]


class Doom:
    """A scenario with all weapons and an immortal player, in steps of a twentieth of a second."""

    def __init__(self, place: str, seed: int):
        import vizdoom

        self.game = vizdoom.DoomGame()
        self.game.load_config(os.path.join(vizdoom.scenarios_path, f"{place}.cfg"))
        # else it is written into the working folder
        config = os.path.join(tempfile.gettempdir(), "_vizdoom.ini")
        self.game.set_doom_config_path(config)
        self.game.set_window_visible(False)
        self.game.set_screen_resolution(vizdoom.ScreenResolution.RES_640X360)
        self.game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        self.game.set_render_hud(False)
        self.game.set_render_screen_flashes(False)
        self.names = ["TURN_LEFT_RIGHT_DELTA", "LOOK_UP_DOWN_DELTA", *BUTTONS.values()]
        self.game.set_available_buttons([getattr(vizdoom.Button, name) for name in self.names])
        variables = [getattr(vizdoom.GameVariable, name) for name in VARIABLES]
        self.game.set_available_game_variables(variables)
        self.game.set_seed(seed)
        self.game.set_episode_timeout(0)
        self.game.add_game_args("+sv_cheats 1 +freelook 1")
        self.game.init()
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Start a new game. With a seed it is always the same one."""
        if seed is not None:
            self.game.set_seed(seed)
        self.game.new_episode()
        for cheat in ("god", "notarget", "give weapons", "give ammo"):
            self.game.send_game_command(cheat)
        self.ticks, self.slot, self.yaw, self.angle = 0, 0, 0.0, None
        self.step({"keys": ["1"]})
        for _ in range(24):  # until the weapon is raised
            self.step({})
        self.ticks, self.yaw, self.angle = 0, 0.0, None

    def observe(self) -> tuple[np.ndarray, dict]:
        """→ (picture uint8 (360, 640, 3), dict of yaw, pitch, position and hotbar).

        Angles are in degrees. Yaw is not wrapped, as in Minecraft.
        """
        state = self.game.get_state()
        angle, pitch, x, y, z = state.game_variables
        if self.angle is None:
            self.yaw = -float(angle)
        else:  # Doom's angle grows to the left, Minecraft's yaw to the right
            self.yaw -= (angle - self.angle + 180) % 360 - 180
        self.angle = angle
        return state.screen_buffer, {
            "yaw": self.yaw,
            "pitch": float(pitch),
            "position": (float(x), float(z), float(y)),
            "hotbar": self.slot,
        }

    def step(self, inputs: dict) -> bool:
        """One tick. → True at the end of the game.

        inputs, all optional: dx and dy in pixels of the mouse, keys by name without the prefix
        key.keyboard., buttons of the mouse by number.
        """
        tics = TICS[self.ticks % len(TICS)]
        keys = inputs.get("keys", [])
        pressed = {BUTTONS[key] for key in [*keys, *inputs.get("buttons", [])] if key in BUTTONS}
        turn = DEGREES_PER_PIXEL * inputs.get("dx", 0) / tics
        tilt = -DEGREES_PER_PIXEL * inputs.get("dy", 0) / tics
        others = [float(name in pressed) for name in self.names[2:]]
        self.game.make_action([turn, tilt, *others], tics)
        self.slot = next((int(key) - 1 for key in keys if key in "1234567"), self.slot)
        self.ticks += 1
        return self.game.is_episode_finished()

    def close(self) -> None:
        self.game.close()


class Player:
    """A random player, which holds each choice for 8 to 40 ticks.

    step(state from Doom.observe) → inputs for Doom.step.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng, self.rate, self.goal, self.left = rng, 0.0, 0.0, 0
        self.keys, self.buttons, self.places = set(), set(), []

    def step(self, state: dict) -> dict:
        self.places = [*self.places[-8:], np.array(state["position"])]
        stuck = False
        if "w" in self.keys and len(self.places) > 8:
            # a player that walks freely moves 40 units or more in this time
            stuck = np.abs(self.places[-1] - self.places[0]).max() < 30
        self.tap = set()
        if stuck or self.left == 0:
            self._decide(stuck)
        self.left -= 1
        self.rate += 0.4 * (self.goal - self.rate)  # smooth, as a hand moves
        dy = np.clip(0.15 * (self.pitch - state["pitch"]) / DEGREES_PER_PIXEL, -8, 8)
        return {
            "dx": round(float(self.rate)),
            "dy": round(float(dy)),
            "keys": sorted(self.keys | self.tap),
            "buttons": sorted(self.buttons),
        }

    def _decide(self, stuck):
        """Choose at random what to do for the next ticks."""
        rng = self.rng
        self.left, chance = int(rng.integers(20 if stuck else 8, 41)), rng.random(12)
        turn = rng.uniform(12 if stuck else 4, 18) * rng.choice([-1, 1])
        self.goal = turn if stuck or chance[0] < 0.75 else 0.0
        shares = {"w": 0.65, "s": 0.1, "a": 0.15, "d": 0.15}
        shares |= {"left.control": 0.2, "left.shift": 0.05}
        drawn = zip(shares.items(), chance[1:7], strict=True)
        self.keys = {key for (key, share), c in drawn if c < share}
        if stuck:
            self.keys -= {"w"}
        elif "w" in self.keys:
            self.keys -= {"s"}
        drawn = zip((0, 1), (0.12, 0.05), chance[7:9], strict=True)
        self.buttons = {button for button, share, c in drawn if c < share}
        self.pitch, self.places = rng.uniform(-12, 18), []
        taps = (("space", chance[9]), (str(rng.integers(1, 8)), chance[10]))
        self.tap = {key for key, c in taps if c < 0.15}


def line(i: int, state: dict, inputs: dict, before: dict) -> dict:
    """What VPT's recorder writes with frame i: its state, and the inputs that lead to the next.

    before: the inputs of the tick before, because a newly pressed key is listed twice.
    """
    keys = [f"key.keyboard.{key}" for key in inputs.get("keys", [])]
    buttons = list(inputs.get("buttons", []))
    held_keys = [f"key.keyboard.{key}" for key in before.get("keys", [])]
    held_buttons = before.get("buttons", [])
    dx, dy = float(inputs.get("dx", 0)), float(inputs.get("dy", 0))
    x, y, z = state["position"]
    return {
        "mouse": {
            "x": 640 + dx,
            "y": 360 + dy,
            "dx": dx,
            "dy": dy,
            "scaledX": dx,
            "scaledY": dy,
            "dwheel": 0.0,
            "buttons": buttons,
            "newButtons": [button for button in buttons if button not in held_buttons],
        },
        "keyboard": {
            "keys": keys,
            "newKeys": [key for key in keys if key not in held_keys],
            "chars": "",
        },
        "isGuiOpen": False,
        "isGuiInventory": False,
        "hotbar": state["hotbar"],
        "yaw": state["yaw"],
        "pitch": state["pitch"],
        "xpos": x,
        "ypos": y,
        "zpos": z,
        "tick": i,
        "milli": 1650000000000 + i * 1000 // RATE,
        "inventory": [],
        "serverTick": i,
        "serverTickDurationMs": 0.0,
        "stats": {},
    }


def play(game: Doom, player: Player, n_ticks: int) -> Iterator[tuple[np.ndarray, dict]]:
    """Yield (picture, line) of each tick, until n_ticks or the end of the game."""
    before = {}
    for i in range(n_ticks):
        picture, state = game.observe()
        inputs = player.step(state)
        yield picture, line(i, state, inputs, before)
        before = inputs
        if game.step(inputs):
            return


def write_recording(
    tar: tarfile.TarFile, name: str, ticks: Iterable[tuple[np.ndarray, dict]]
) -> int:
    """Add (picture uint8 (H, W, 3), line) of each tick to a tar as NAME.mp4 and NAME.jsonl.

    → the number of ticks.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, lines, writer, frame = f"{folder}/video.mp4", [], None, None
        for picture, text in ticks:
            if writer is None:
                codec = cv2.VideoWriter_fourcc(*"mp4v")
                writer = cv2.VideoWriter(path, codec, RATE, picture.shape[1::-1])
            frame = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
            writer.write(frame)
            lines.append(text)
        writer.write(frame)  # VPT's recorder writes the last frame twice
        writer.release()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        for kind, content in (("mp4", Path(path).read_bytes()), ("jsonl", text.encode())):
            member = tarfile.TarInfo(f"{name}.{kind}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return len(lines)


def record_shard(out: str, seed: int, n_ticks: int, length: int, shard: int) -> int:
    """Write OUT-00000N.tar: recordings of at most `length` ticks, in each place in turn.

    → its number of ticks.
    """
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, shard])
    games, total = {}, 0
    path = f"{out}-{shard:06d}.tar"
    with tarfile.open(path + ".part", "w") as tar:
        for i in itertools.count():
            place = PLACES[(shard + i) % len(PLACES)]
            if place not in games:
                games[place] = Doom(place, int(rng.integers(2**31 - 1)))
            else:
                games[place].reset()
            ticks = play(games[place], Player(rng), min(length, n_ticks - total))
            total += write_recording(tar, f"{place}-{seed}-{shard}-{i}", ticks)
            if total >= n_ticks:
                break
    for game in games.values():
        game.close()
    os.replace(path + ".part", path)
    return total


@dataclass
class RecordConfig:
    out: str = option("", "prefix of the shards, for example data/vpt/train")
    ticks: int = option(40_000, "length of all recordings together, 20 ticks a second", above=0)
    shards: int = option(4, "number of tar files", above=0)
    length: int = option(600, "largest length of a recording, in ticks", above=0)
    seed: int = option(0, "of the player and the games", low=0)
    workers: int = option(os.cpu_count(), "processes that record", above=0)


def main(argv: list[str] | None = None) -> None:
    cfg = parse_options(RecordConfig, __doc__, argv)
    if not cfg.out:
        raise UserError("give the prefix of the shards, for example --out data/vpt/train")
    if importlib.util.find_spec("vizdoom") is None:
        raise UserError("recording needs vizdoom; install it with: pip install vizdoom")
    if cfg.ticks < cfg.shards:
        raise UserError(f"--ticks {cfg.ticks} must be at least --shards {cfg.shards}")
    make_folder(Path(cfg.out).parent)
    job = partial(record_shard, cfg.out, cfg.seed, cfg.ticks // cfg.shards, cfg.length)
    with multiprocessing.get_context("spawn").Pool(min(cfg.workers, cfg.shards)) as pool:
        bar = dict(total=cfg.shards, unit="shard", desc="recording Doom", mininterval=1)
        total = sum(tqdm(pool.imap(job, range(cfg.shards)), **bar))
    minutes = total / RATE / 60
    print(f"{cfg.out}-*.tar: {total:,} ticks, {minutes:.0f} minutes, in {cfg.shards} shards")


if __name__ == "__main__":
    print_user_errors()
    main()
