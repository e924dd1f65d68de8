"""Record VizDoom in the form of VPT's recordings: tar shards of NAME.mp4 and NAME.jsonl that vpt.py cannot tell from Minecraft's.

    python extras/vjepa_ac/doom.py --out data/vpt/train --ticks 40000 --shards 4
    python extras/vjepa_ac/doom.py --out data/vpt/test --ticks 8000 --shards 2 --seed 1000

A mouse turns the view (0.15 degrees a pixel, to all sides), w a s d walk, space jumps, left shift ducks, left control runs, buttons attack and use, the
number keys choose weapons. The player is random but for one rule: when walking gets it nowhere, it turns. Places: three of VizDoom's scenarios.
"""
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Parser, UserError, make_folder, print_user_errors  # noqa: E402
from extras.vjepa_ac.vpt import DEGREES_PER_PIXEL, RATE  # noqa: E402

PLACES = ["my_way_home", "health_gathering_supreme", "deathmatch"]
SIZE = (640, 360)  # as VPT's files
TICS = (2, 2, 2, 1)  # Doom makes 35 tics a second: 7 in 4 ticks is 20 ticks a second
BUTTONS = {"w": "MOVE_FORWARD", "s": "MOVE_BACKWARD", "a": "MOVE_LEFT", "d": "MOVE_RIGHT", "space": "JUMP", "left.shift": "CROUCH", "left.control": "SPEED",
           0: "ATTACK", 1: "USE", **{str(i): f"SELECT_WEAPON{i}" for i in range(1, 8)}}  # fmt: skip
VARIABLES = ["ANGLE", "PITCH", "POSITION_X", "POSITION_Y", "POSITION_Z"]


class Doom:
    """A scenario with all weapons and a player that cannot die, in steps of a twentieth of a second."""

    def __init__(self, place, seed):
        import vizdoom

        self.game = vizdoom.DoomGame()
        self.game.load_config(os.path.join(vizdoom.scenarios_path, f"{place}.cfg"))
        self.game.set_doom_config_path(os.path.join(tempfile.gettempdir(), "_vizdoom.ini"))  # else it lands in this folder
        self.game.set_window_visible(False)
        self.game.set_screen_resolution(vizdoom.ScreenResolution.RES_640X360)
        self.game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        self.game.set_render_hud(False)
        self.game.set_render_screen_flashes(False)
        self.names = ["TURN_LEFT_RIGHT_DELTA", "LOOK_UP_DOWN_DELTA", *BUTTONS.values()]
        self.game.set_available_buttons([getattr(vizdoom.Button, name) for name in self.names])
        self.game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in VARIABLES])
        self.game.set_seed(seed)
        self.game.set_episode_timeout(0)
        self.game.add_game_args("+sv_cheats 1 +freelook 1")
        self.game.init()
        self.begin()

    def begin(self, seed=None):
        """Another beginning, or with a seed always the same."""
        if seed is not None:
            self.game.set_seed(seed)
        self.game.new_episode()
        for cheat in ("god", "notarget", "give weapons", "give ammo"):
            self.game.send_game_command(cheat)
        self.ticks, self.slot, self.yaw, self.angle = 0, 0, 0.0, None
        self.step({"keys": ["1"]})
        for _ in range(24):  # until the weapon is up
            self.step({})
        self.ticks, self.yaw, self.angle = 0, 0.0, None

    def observe(self):
        """→ (picture uint8 (360, 640, 3), dict of yaw, pitch, position and hotbar). Yaw goes on past 180°, as in Minecraft."""
        state = self.game.get_state()
        angle, pitch, x, y, z = state.game_variables
        if self.angle is None:
            self.yaw = -float(angle)
        else:
            self.yaw -= (angle - self.angle + 180) % 360 - 180  # Doom counts to the left, Minecraft to the right
        self.angle = angle
        return state.screen_buffer, {"yaw": self.yaw, "pitch": float(pitch), "position": (float(x), float(z), float(y)), "hotbar": self.slot}

    def step(self, inputs):
        """inputs: {"dx", "dy": pixels of the mouse, "keys": names without key.keyboard., "buttons": numbers}, all optional. → True at the end of the game."""
        tics = TICS[self.ticks % len(TICS)]
        pressed = {BUTTONS[key] for key in [*inputs.get("keys", []), *inputs.get("buttons", [])] if key in BUTTONS}
        turn = [DEGREES_PER_PIXEL * inputs.get("dx", 0) / tics, -DEGREES_PER_PIXEL * inputs.get("dy", 0) / tics]
        self.game.make_action([*turn, *(float(name in pressed) for name in self.names[2:])], tics)
        self.slot = next((int(key) - 1 for key in inputs.get("keys", []) if key in "1234567"), self.slot)
        self.ticks += 1
        return self.game.is_episode_finished()

    def close(self):
        self.game.close()


class Player:
    """Holds what it does for 8 to 40 ticks. step(what Doom.observe says) → inputs."""

    def __init__(self, rng):
        self.rng, self.rate, self.goal, self.left, self.keys, self.buttons, self.places = rng, 0.0, 0.0, 0, set(), set(), []

    def step(self, seen):
        rng = self.rng
        self.places = [*self.places[-8:], np.array(seen["position"])]
        stuck = "w" in self.keys and len(self.places) > 8 and np.abs(self.places[-1] - self.places[0]).max() < 30  # free, it is 40 or more
        if stuck or self.left == 0:
            self.left, chance, turn = int(rng.integers(20 if stuck else 8, 41)), rng.random(12), rng.uniform(12 if stuck else 4, 18) * rng.choice([-1, 1])
            self.goal = turn if stuck or chance[0] < 0.75 else 0.0
            self.keys = {key for key, p, c in zip(["w", "s", "a", "d", "left.control", "left.shift"], [0.65, 0.1, 0.15, 0.15, 0.2, 0.05], chance[1:]) if c < p}
            self.keys -= {"w"} if stuck else {"s"} if "w" in self.keys else set()
            self.buttons = {button for button, p, c in zip([0, 1], [0.12, 0.05], chance[7:]) if c < p}
            self.pitch, self.places = rng.uniform(-12, 18), []
            self.tap = {key for key, c in (("space", chance[9]), (str(rng.integers(1, 8)), chance[10])) if c < 0.15}
        else:
            self.tap = set()
        self.left -= 1
        self.rate += 0.4 * (self.goal - self.rate)  # a hand does not start at once
        dy = np.clip(0.15 * (self.pitch - seen["pitch"]) / DEGREES_PER_PIXEL, -8, 8)
        return {"dx": round(float(self.rate)), "dy": round(float(dy)), "keys": sorted(self.keys | self.tap), "buttons": sorted(self.buttons)}


def line(i, seen, inputs, before):
    """What VPT's recorder writes with frame i: the state of that frame, and the inputs that lead to the next."""
    keys, buttons = [f"key.keyboard.{key}" for key in inputs.get("keys", [])], list(inputs.get("buttons", []))
    held_keys, held_buttons = [f"key.keyboard.{key}" for key in before.get("keys", [])], before.get("buttons", [])
    dx, dy = float(inputs.get("dx", 0)), float(inputs.get("dy", 0))
    x, y, z = seen["position"]
    return {
        "mouse": {"x": 640 + dx, "y": 360 + dy, "dx": dx, "dy": dy, "scaledX": dx, "scaledY": dy, "dwheel": 0.0, "buttons": buttons,
                  "newButtons": [button for button in buttons if button not in held_buttons]},
        "keyboard": {"keys": keys, "newKeys": [key for key in keys if key not in held_keys], "chars": ""},
        "isGuiOpen": False, "isGuiInventory": False, "hotbar": seen["hotbar"], "yaw": seen["yaw"], "pitch": seen["pitch"],
        "xpos": x, "ypos": y, "zpos": z, "tick": i, "milli": 1650000000000 + i * 1000 // RATE, "inventory": [],
        "serverTick": i, "serverTickDurationMs": 0.0, "stats": {},
    }  # fmt: skip


def play(game, player, n_ticks):
    """Yield (picture, line) of each tick, until n_ticks or the end of the game."""
    before = {}
    for i in range(n_ticks):
        picture, seen = game.observe()
        inputs = player.step(seen)
        yield picture, line(i, seen, inputs, before)
        before = inputs
        if game.step(inputs):
            return


def write_recording(tar, name, ticks):
    """Add the (picture uint8 (H, W, 3), line) of `ticks` to a tar as NAME.mp4 and NAME.jsonl. → how many there were."""
    with tempfile.TemporaryDirectory() as folder:
        path, lines, writer, frame = f"{folder}/video.mp4", [], None, None
        for picture, text in ticks:
            writer = writer or cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), RATE, picture.shape[1::-1])
            frame = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
            writer.write(frame)
            lines.append(text)
        writer.write(frame)  # VPT's recorder writes the last frame twice
        writer.release()
        for kind, content in (("mp4", Path(path).read_bytes()), ("jsonl", "".join(json.dumps(text) + "\n" for text in lines).encode())):
            member = tarfile.TarInfo(f"{name}.{kind}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return len(lines)


def record_shard(out, seed, n_ticks, length, shard):
    """Write OUT-00000N.tar: recordings of at most `length` ticks, in the places by turns. → its number of ticks."""
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
                games[place].begin()
            total += write_recording(tar, f"{place}-{seed}-{shard}-{i}", play(games[place], Player(rng), min(length, n_ticks - total)))
            if total >= n_ticks:
                break
    for game in games.values():
        game.close()
    os.replace(path + ".part", path)
    return total


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--out", required=True, help="beginning of the shards' names, for example data/vpt/train")
    parser.add_argument("--ticks", type=int, default=40_000, help="in all, 20 a second [40000]")
    parser.add_argument("--shards", type=int, default=4, help="[4]")
    parser.add_argument("--length", type=int, default=600, help="ticks of a recording [600]")
    parser.add_argument("--seed", type=int, default=0, help="of the player and the games [0]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes [one per core]")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("vizdoom") is None:
        raise UserError("this needs the package vizdoom; install it with: pip install vizdoom")
    if min(args.ticks, args.shards, args.length, args.workers) < 1 or args.ticks < args.shards or args.seed < 0:
        raise UserError(f"--ticks {args.ticks}, --shards {args.shards}, --length {args.length} and --workers {args.workers} must be positive, --seed {args.seed} not negative")
    make_folder(Path(args.out).parent)
    job = partial(record_shard, args.out, args.seed, args.ticks // args.shards, args.length)
    with multiprocessing.get_context("spawn").Pool(min(args.workers, args.shards)) as pool:
        total = sum(tqdm(pool.imap(job, range(args.shards)), total=args.shards, unit="shard", desc="recording Doom", mininterval=1))
    print(f"{args.out}-*.tar: {total:,} ticks, {total / RATE / 60:.0f} minutes, in {args.shards} shards")


if __name__ == "__main__":
    print_user_errors()
    main()
