"""Record a real game into a dataset (data_utils.py describes the form).

    python record.py pong --frames 40000 --out data/pong.h5
    python record.py doom-arena --frames 40000 --out data/arena.h5 --seed 1

Buttons are pressed at random and held for 1-8 steps. They are recorded too, for evaluation only: training never looks.
The footage is cut into shards, each played by its own game with its own seed, so any number of processes records the
same frames. Another --seed means other games; for coinrun also other levels (10,000 per seed), so that test footage is new.
"""
import importlib.util
import itertools
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from tqdm import tqdm

from config import Parser, UserError, print_user_errors
from data_utils import DatasetWriter, held_actions

SIZE = 64  # pixels; frames are shrunk by area, so that a thin paddle dims instead of vanishing
SHARD = 1000  # frames


class Atari:
    """The emulator itself (ale-py), without Gymnasium; frames of 4 emulator steps, cropped to the playfield."""

    def __init__(self, rom, buttons, crop, seed):
        from ale_py import ALEInterface, LoggerMode, roms

        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.ale = ALEInterface()
        self.ale.setInt("random_seed", seed)
        self.ale.setInt("frame_skip", 4)
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(rom))
        self.buttons, self.crop, self.screen = buttons, crop, np.empty((210, 160, 3), dtype=np.uint8)
        self.begin()

    def begin(self):
        self.ale.reset_game()
        self.ale.act(0)  # past the title screen, which has other colours

    def frame(self):
        self.ale.getScreenRGB(self.screen)
        return self.screen[self.crop]

    def step(self, action):
        """→ True when the episode has ended and a new one begun."""
        self.ale.act(self.buttons[action])
        over = self.ale.game_over()
        if over:
            self.begin()
        return over


class Crafter:
    """A small Minecraft, always day; the player is never hungry, thirsty or tired, or a random one would soon starve.

    It walks over anything but lava: else random buttons soon end between trees and water, half of them do nothing, and no
    picture tells a step against a tree from no step. A new world comes every 500 steps, before it reaches the edge.
    The usual view of 9×9 tiles makes tiles of 7 pixels. With 8×8 each tile would be one patch: easy to learn, but then some
    hundred tokens are all that ever occur.
    """

    def __init__(self, seed):
        import crafter

        # Crafter picks creatures from sets of objects, whose order follows memory addresses: the same seed would give
        # another game each time. Numbered objects bring the sets into a fixed order.
        numbers = itertools.count()
        crafter.objects.Object.__hash__ = lambda thing: vars(thing).setdefault("number", next(numbers))
        crafter.objects.Player.walkable = [material for material in crafter.constants.materials if material != "lava"]
        self.env = crafter.Env(size=(SIZE, SIZE), seed=seed, length=500)
        self.env._update_time = lambda: setattr(self.env._world, "daylight", 1.0)
        self.env._sem_view = lambda: None  # costs time and goes unused
        self.picture = self.env.reset()

    def frame(self):
        return self.picture

    def step(self, action):
        player = self.env._player
        player._hunger = player._thirst = player._fatigue = 0
        self.picture, _, over, _ = self.env.step(action)
        if over:
            self.picture = self.env.reset()
        return over


class CoinRun:
    """Procgen's platformer, hard mode, 10,000 levels."""

    def __init__(self, seed, first_level):
        from procgen import ProcgenGym3Env

        self.env = ProcgenGym3Env(
            num=1, env_name="coinrun", start_level=first_level, num_levels=10_000, distribution_mode="hard", rand_seed=seed
        )

    def frame(self):
        return self.env.observe()[1]["rgb"][0]

    def step(self, action):
        self.env.act(np.array([action], dtype=np.int32))
        return bool(self.env.observe()[2][0])


class Doom:
    """A VizDoom scenario on the free assets, without weapon, status bar and red flashes, 2 tics a frame.

    Turns are 5 degrees a frame, which moves the picture by 3 to 6 of its 64 pixels. Doom's own turning buttons start at 3.5 and
    end at 7; with those and 4 tics a frame no latent action was found for turning.
    presses: for each action the button that it presses and how hard, or None for nothing.
    """

    def __init__(self, scenario, presses, seed):
        import vizdoom

        self.game = vizdoom.DoomGame()
        self.game.load_config(os.path.join(vizdoom.scenarios_path, f"{scenario}.cfg"))
        self.game.set_doom_config_path(os.path.join(tempfile.gettempdir(), "_vizdoom.ini"))  # else it lands in this folder
        self.game.set_window_visible(False)
        self.game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
        self.game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        self.game.set_render_hud(False)
        self.game.set_render_weapon(False)
        self.game.set_render_crosshair(False)
        self.game.set_render_screen_flashes(False)
        buttons = sorted({button for button, _ in filter(None, presses)})
        self.game.set_available_buttons([getattr(vizdoom.Button, name) for name in buttons])
        self.game.set_seed(seed)
        self.game.set_episode_timeout(300)  # tics, then another place: who walks at random ends up with his nose to a wall
        self.game.init()
        self.presses = [[press[1] if press and press[0] == button else 0.0 for button in buttons] for press in presses]

    def frame(self):
        return self.game.get_state().screen_buffer

    def step(self, action):
        self.game.make_action(self.presses[action], 2)
        over = self.game.is_episode_finished()
        if over:
            self.game.new_episode()
        return over


@dataclass
class Game:
    package: str
    install: str
    fps: float
    actions: list  # names; the index is what is recorded
    start: object  # (seed of the shard, --seed) → a game with frame() and step(action)


# Emulator buttons: 0 noop, 1 fire, 3 right (in Pong: up), 4 left (down).
FIELD = np.s_[34:194, :]  # Atari: below the score, above the border
ATARI, GAMES_EXTRA = "pip install ale-py", "pip install crafter vizdoom"
CRAFTER_ACTIONS = "noop left right up down".split()  # the first five of seventeen; the others rarely show
COINRUN_ACTIONS = "left-down left left-up down noop up right-down right right-up".split()  # Procgen's first nine
DOOM_TURNS = [("TURN_LEFT_RIGHT_DELTA", -2.5), ("TURN_LEFT_RIGHT_DELTA", 2.5)]  # degrees per tic, left and right
GAMES = {
    "pong": Game("ale_py", ATARI, 15, ["noop", "up", "down"], lambda s, _: Atari("pong", [0, 3, 4], FIELD, s)),
    "breakout": Game("ale_py", ATARI, 15, ["noop", "fire", "right", "left"], lambda s, _: Atari("breakout", [0, 1, 3, 4], FIELD, s)),
    "crafter": Game("crafter", GAMES_EXTRA, 10, CRAFTER_ACTIONS, lambda s, _: Crafter(s)),
    "coinrun": Game("procgen", "pip install procgen-mirror 'numpy<2' in an environment of its own", 15, COINRUN_ACTIONS,
                    lambda s, seed: CoinRun(s, 10_000 * seed)),  # fmt: skip
    "doom-arena": Game("vizdoom", GAMES_EXTRA, 17.5, ["noop", "turn left", "turn right", "attack"],
                       lambda s, _: Doom("defend_the_center", [None, *DOOM_TURNS, ("ATTACK", 1)], s)),  # fmt: skip
    "doom-maze": Game("vizdoom", GAMES_EXTRA, 17.5, ["noop", "turn left", "turn right", "forward"],
                      lambda s, _: Doom("my_way_home", [None, *DOOM_TURNS, ("MOVE_FORWARD", 1)], s)),  # fmt: skip
}


def record_shard(name, seed, n_frames, shard):
    """→ frames uint8 (n, 64, 64, 3), actions int64 (n,), episode starts within the shard."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, shard])
    game = GAMES[name].start(int(rng.integers(2**31 - 1)), seed)
    n = min(SHARD, n_frames - shard * SHARD)
    actions = held_actions(rng, n, len(GAMES[name].actions))
    frames, starts = np.empty((n, SIZE, SIZE, 3), dtype=np.uint8), [0]
    for i, action in enumerate(actions):
        frames[i] = cv2.resize(game.frame(), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        if game.step(action):
            starts.append(i + 1)
    return frames, actions, [start for start in starts if start < n]


def record(name, n_frames, out, seed=0, workers=1):
    """Record n_frames of a game into `out`. Raises UserError for an unknown game or a package that is not installed."""
    if name not in GAMES:
        raise UserError(f"unknown game {name!r}; there are {', '.join(GAMES)}")
    if importlib.util.find_spec(GAMES[name].package) is None:
        raise UserError(f"{name} needs the package {GAMES[name].package}; install it with: {GAMES[name].install}")
    if n_frames < 1 or workers < 1 or seed < 0:
        raise UserError(f"--frames {n_frames} and --workers {workers} must be positive, --seed {seed} not negative")
    shards = range(-(-n_frames // SHARD))
    attributes = dict(fps=GAMES[name].fps, game=name, action_names=GAMES[name].actions, seed=seed)
    with DatasetWriter(out, (SIZE, SIZE), with_actions=True, **attributes) as writer:
        bar = tqdm(total=n_frames, unit="frame", desc=f"recording {name}", mininterval=1)
        with multiprocessing.get_context("spawn").Pool(min(workers, len(shards))) as pool:
            for frames, actions, starts in pool.imap(partial(record_shard, name, seed, n_frames), shards):
                writer.starts += [len(writer) + start for start in starts]
                writer.append(frames, actions)
                bar.update(len(frames))
        bar.close()


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("game", help=", ".join(GAMES))
    parser.add_argument("--frames", type=int, default=40_000, help="how many to record [40000]")
    parser.add_argument("--out", required=True, help="the HDF5 file to write, for example data/pong.h5")
    parser.add_argument("--seed", type=int, default=0, help="of the buttons and the games [0]")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes [one per core]")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    record(args.game, args.frames, args.out, args.seed, args.workers)
    print(f"{args.out}: {args.frames:,} frames of {args.game}, {args.frames / (time.perf_counter() - began):,.0f} frames/s")


if __name__ == "__main__":
    print_user_errors()
    main()
