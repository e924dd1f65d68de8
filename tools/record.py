"""Record a dataset from a real game (data_utils.py describes the format).

    python -m tools.record pong --frames 40000 --out data/pong.h5
    python -m tools.record doom-arena --frames 40000 --out data/arena.h5 --seed 1
    python -m tools.record atari:freeway --crop 14:196,8:160 --out data/freeway.h5
    python -m tools.record gym:CartPole-v1 --out data/cartpole.h5

Actions are random, each held for 1-8 steps. They are recorded too, for evaluation: training does
not use them by default. The frames are divided into shards. Each shard has a game and a seed of its
own, so any number of processes records the same frames. Another --seed gives other games. For
coinrun it also gives other levels (10,000 per seed), so that test data is new.

atari:NAME is any game of ale-py, with the actions that do something in it. gym:ID is any Gymnasium
environment with pictures (render_mode="rgb_array") and discrete actions. Both are squeezed into a
square; --crop keeps the playfield, --skip repeats each action.
"""

import importlib.util
import itertools
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from utils.cli import Parser, UserError, print_user_errors
from utils.hardening.videos import DatasetWriter

import cv2
import numpy as np
from tqdm import tqdm

SIZE = 64  # pixels; frames shrink by area averaging, so that a thin paddle dims but stays visible
SHARD = 1000  # frames


class Atari:
    """An Atari game in its emulator (ale-py), cropped to the field; `skip` emulator steps a frame.

    emulator_actions: by default those that do something in this game.
    """

    def __init__(self, rom, emulator_actions, crop, seed, skip=4):
        from ale_py import ALEInterface, LoggerMode, roms

        ALEInterface.setLoggerMode(LoggerMode.Error)
        self.ale = ALEInterface()
        self.ale.setInt("random_seed", seed)
        self.ale.setInt("frame_skip", skip)
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(rom))
        self.emulator_actions = emulator_actions or self.ale.getMinimalActionSet()
        self.crop = crop
        self.screen = np.empty((210, 160, 3), dtype=np.uint8)
        self.begin()

    def begin(self):
        self.ale.reset_game()
        self.ale.act(0)  # past the title screen, which has other colours

    def frame(self):
        self.ale.getScreenRGB(self.screen)
        return self.screen[self.crop]

    def step(self, action):
        """→ True if the episode has ended; a new one has then begun."""
        self.ale.act(self.emulator_actions[action])
        over = self.ale.game_over()
        if over:
            self.begin()
        return over


class Crafter:
    """A small game like Minecraft, always by day.

    The player is never hungry, thirsty or tired, because with random actions it would soon starve.
    It can walk over anything but lava. Otherwise random actions soon lead between trees and water,
    where half of them do nothing, and a step against a tree looks like no step. A new map comes
    every 500 steps, before the player reaches the edge. The usual view of 9×9 tiles makes tiles of
    7 pixels. With 8×8 each tile would be one patch: easy to learn, but with only some hundred
    tokens in use.
    """

    def __init__(self, seed):
        import crafter

        # Crafter picks creatures from sets of objects. Their order follows memory addresses, so the
        # same seed would give another game each time. Numbered objects have a fixed order.
        numbers = itertools.count()
        crafter.objects.Object.__hash__ = lambda thing: vars(thing).setdefault(
            "number", next(numbers)
        )
        crafter.objects.Player.walkable = [
            material for material in crafter.constants.materials if material != "lava"
        ]
        self.env = crafter.Env(size=(SIZE, SIZE), seed=seed, length=500)
        self.env._update_time = lambda: setattr(self.env._world, "daylight", 1.0)
        self.env._sem_view = lambda: None  # takes time and is not used
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
    """Procgen's platformer in hard mode, with 10,000 levels."""

    def __init__(self, seed, first_level):
        from procgen import ProcgenGym3Env

        self.env = ProcgenGym3Env(
            num=1,
            env_name="coinrun",
            start_level=first_level,
            num_levels=10_000,
            distribution_mode="hard",
            rand_seed=seed,
        )

    def frame(self):
        return self.env.observe()[1]["rgb"][0]

    def step(self, action):
        self.env.act(np.array([action], dtype=np.int32))
        return bool(self.env.observe()[2][0])


class Doom:
    """A VizDoom scenario on the free assets, 2 tics per frame.

    Weapon, status bar and red flashes are off. A turn is 5 degrees per frame, which moves the
    picture by 3 to 6 of its 64 pixels. Doom's own turn commands start at 3.5 degrees and end at 7;
    with those and 4 tics per frame no latent action was found for turning.
    presses: for each action its VizDoom button and the value of it, or None for no button.
    """

    def __init__(self, scenario, presses, seed):
        import vizdoom

        self.game = game = vizdoom.DoomGame()
        game.load_config(os.path.join(vizdoom.scenarios_path, f"{scenario}.cfg"))
        # by default it is written into the working folder
        game.set_doom_config_path(os.path.join(tempfile.gettempdir(), "_vizdoom.ini"))
        game.set_window_visible(False)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_render_hud(False)
        game.set_render_weapon(False)
        game.set_render_crosshair(False)
        game.set_render_screen_flashes(False)
        buttons = sorted({press[0] for press in presses if press})
        game.set_available_buttons([getattr(vizdoom.Button, name) for name in buttons])
        game.set_seed(seed)
        # in tics; a new episode starts elsewhere, because a random walk ends facing a wall
        game.set_episode_timeout(300)
        game.init()
        self.presses = [
            [press[1] if press and press[0] == button else 0.0 for button in buttons]
            for press in presses
        ]

    def frame(self):
        return self.game.get_state().screen_buffer

    def step(self, action):
        self.game.make_action(self.presses[action], 2)
        over = self.game.is_episode_finished()
        if over:
            self.game.new_episode()
        return over


class Gym:
    """A Gymnasium environment with pictures and discrete actions; each action `skip` times."""

    def __init__(self, id, crop, seed, skip=1):
        import gymnasium

        try:
            self.env = gymnasium.make(id, render_mode="rgb_array")
            self.n_actions = int(self.env.action_space.n)
            self.env.reset(seed=seed)
            self.env.render()[crop]
        except Exception as error:  # whatever the environment raises
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"gym:{id} cannot be recorded ({reason}); it must have discrete actions and"
                ' render_mode="rgb_array"'
            ) from None
        self.crop, self.skip = crop, skip

    def frame(self):
        return self.env.render()[self.crop]

    def step(self, action):
        for _ in range(self.skip):
            _, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                self.env.reset()
                return True
        return False


@dataclass
class GameSpec:
    """How to record a game."""

    package: str
    fps: float
    actions: list[str]  # names; their indices are recorded
    start: Callable  # (seed of the shard, --seed) → a game with frame() and step(action)


INSTALL = {
    "ale_py": "pip install ale-py",
    "gymnasium": "pip install gymnasium, and what the environment needs",
    "crafter": "pip install crafter",
    "vizdoom": "pip install vizdoom",
    "procgen": "pip install procgen-mirror 'numpy<2' in an environment of its own",
}
FIELD = np.s_[34:194, :]  # Atari: below the score, above the border
TURNS = [("TURN_LEFT_RIGHT_DELTA", -2.5), ("TURN_LEFT_RIGHT_DELTA", 2.5)]  # degrees per tic


# Emulator actions: 0 noop, 1 fire, 3 right (in Pong: up), 4 left (down).
def start_pong(shard_seed, seed):
    return Atari("pong", [0, 3, 4], FIELD, shard_seed)


def start_breakout(shard_seed, seed):
    return Atari("breakout", [0, 1, 3, 4], FIELD, shard_seed)


def start_crafter(shard_seed, seed):
    return Crafter(shard_seed)


def start_coinrun(shard_seed, seed):
    return CoinRun(shard_seed, 10_000 * seed)


def start_doom_arena(shard_seed, seed):
    return Doom("defend_the_center", [None, *TURNS, ("ATTACK", 1)], shard_seed)


def start_doom_maze(shard_seed, seed):
    return Doom("my_way_home", [None, *TURNS, ("MOVE_FORWARD", 1)], shard_seed)


# Crafter: the first five of seventeen actions; others rarely show. CoinRun: the first nine.
CRAFTER = ["noop", "left", "right", "up", "down"]
COINRUN = "left-down left left-up down noop up right-down right right-up".split()
DOOM = ["noop", "turn left", "turn right"]
GAMES = {
    "pong": GameSpec("ale_py", 15, ["noop", "up", "down"], start_pong),
    "breakout": GameSpec("ale_py", 15, ["noop", "fire", "right", "left"], start_breakout),
    "crafter": GameSpec("crafter", 10, CRAFTER, start_crafter),
    "coinrun": GameSpec("procgen", 15, COINRUN, start_coinrun),
    "doom-arena": GameSpec("vizdoom", 17.5, [*DOOM, "attack"], start_doom_arena),
    "doom-maze": GameSpec("vizdoom", 17.5, [*DOOM, "forward"], start_doom_maze),
}


def find_game(name: str, crop: str = "", skip: int = 0) -> GameSpec:
    """One of GAMES, atari:NAME or gym:ID.

    crop: rows and columns that are kept, "14:196,8:160". skip: steps of the game per frame, 0: 4 in
    Atari, else 1. Raises UserError for a game that is not there, or that cannot be opened.
    """
    kind, _, id = name.partition(":")
    if kind not in ("atari", "gym"):
        if name not in GAMES:
            known = ", ".join([*GAMES, "atari:NAME", "gym:ID"])
            raise UserError(f"unknown game {name!r}; there are {known}")
        if crop or skip:
            raise UserError(f"--crop and --skip are for atari:NAME and gym:ID, not for {name}")
        return check_installed(name, GAMES[name])
    window = re.fullmatch(r"(\d*):(\d*),(\d*):(\d*)", crop or ":,:")
    if not window or skip < 0:
        raise UserError(
            f"--crop {crop!r} must be like 14:196,8:160 (rows, columns), --skip {skip} not negative"
        )
    top, bottom, left, right = (int(part) if part else None for part in window.groups())
    field = np.s_[top:bottom, left:right]
    check_installed(name, GameSpec({"atari": "ale_py", "gym": "gymnasium"}[kind], 0, [], None))
    return atari_spec(id, field, skip or 4) if kind == "atari" else gym_spec(id, field, skip or 1)


def check_installed(name: str, game: GameSpec) -> GameSpec:
    if importlib.util.find_spec(game.package) is None:
        install = INSTALL[game.package]
        raise UserError(f"{name} needs the package {game.package}; install it with: {install}")
    return game


def atari_spec(rom: str, field: tuple, skip: int) -> GameSpec:
    from ale_py import roms

    known = roms.get_all_rom_ids()
    if rom not in known:
        raise UserError(f"ale-py has no game {rom!r}; it has {', '.join(known)}")
    game = Atari(rom, None, field, 0, skip)
    check_field(f"atari:{rom}", game)
    names = [action.name.lower() for action in game.emulator_actions]
    return GameSpec(
        "ale_py", 60 / skip, names, lambda shard, seed: Atari(rom, None, field, shard, skip)
    )


def gym_spec(id: str, field: tuple, skip: int) -> GameSpec:
    game = Gym(id, field, 0, skip)
    check_field(f"gym:{id}", game)
    fps = (game.env.metadata.get("render_fps") or 30) / skip
    names = [str(i) for i in range(game.n_actions)]
    return GameSpec("gymnasium", fps, names, lambda shard, seed: Gym(id, field, shard, skip))


def check_field(name: str, game: Atari | Gym) -> None:
    if 0 in game.frame().shape:
        raise UserError(f"{name}: --crop leaves nothing of the picture")


def held_actions(rng: np.random.Generator, n: int, n_actions: int) -> np.ndarray:
    """n random actions, each held for 1-8 steps.

    If they came from a policy that sees the picture, they could be predicted from it, and a latent
    action would add no information.
    """
    holds = rng.integers(1, 9, size=n)
    return np.repeat(rng.integers(n_actions, size=n), holds)[:n]


def record_shard(name, seed, n_frames, shard, crop="", skip=0):
    """→ frames uint8 (n, 64, 64, 3), actions int64 (n,), episode starts within the shard."""
    cv2.setNumThreads(1)
    rng, spec = np.random.default_rng([seed, shard]), find_game(name, crop, skip)
    game = spec.start(int(rng.integers(2**31 - 1)), seed)
    n = min(SHARD, n_frames - shard * SHARD)
    actions = held_actions(rng, n, len(spec.actions))
    frames, starts = np.empty((n, SIZE, SIZE, 3), dtype=np.uint8), [0]
    for i, action in enumerate(actions):
        frames[i] = cv2.resize(game.frame(), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        if game.step(action):
            starts.append(i + 1)
    return frames, actions, [start for start in starts if start < n]


def record(name, n_frames, out, seed=0, workers=1, crop="", skip=0):
    """Record n_frames of a game into `out`.

    Raises UserError for an unknown game or a package that is not installed.
    """
    game = find_game(name, crop, skip)
    if n_frames < 1 or workers < 1 or seed < 0:
        raise UserError(
            f"--frames {n_frames} and --workers {workers} must be positive,"
            f" --seed {seed} not negative"
        )
    shards = range(-(-n_frames // SHARD))
    shard_of = partial(record_shard, name, seed, n_frames, crop=crop, skip=skip)
    attributes = dict(fps=game.fps, game=name, action_names=game.actions, seed=seed)
    with DatasetWriter(out, (SIZE, SIZE), with_actions=True, **attributes) as writer:
        bar = tqdm(total=n_frames, unit="frame", desc=f"recording {name}", mininterval=1)
        with multiprocessing.get_context("spawn").Pool(min(workers, len(shards))) as pool:
            for frames, actions, starts in pool.imap(shard_of, shards):
                writer.episode_starts += [len(writer) + start for start in starts]
                writer.append(frames, actions)
                bar.update(len(frames))
        bar.close()


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("game", help=", ".join([*GAMES, "atari:NAME", "gym:ID"]))
    parser.add_argument("--frames", type=int, default=40_000, help="frames to record [40000]")
    parser.add_argument(
        "--out", required=True, help="the HDF5 file to write, for example data/pong.h5"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the actions and the games [0]")
    parser.add_argument("--crop", default="", help="rows and columns to keep, like 14:196,8:160")
    parser.add_argument("--skip", type=int, default=0, help="steps per frame [4 in Atari, else 1]")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="number of processes [one per core]"
    )
    args = parser.parse_args(argv)
    began = time.perf_counter()
    record(args.game, args.frames, args.out, args.seed, args.workers, args.crop, args.skip)
    print(
        f"{args.out}: {args.frames:,} frames of {args.game},"
        f" {args.frames / (time.perf_counter() - began):,.0f} frames/s"
    )


if __name__ == "__main__":
    print_user_errors()
    main()
