import importlib.util
from pathlib import Path

from utils.cli import UserError

import gymnasium
import h5py
import numpy as np
import pytest

from data_utils import Clips, open_dataset
from tools import record, speedrun
from tools.record import GAMES, GameSpec, record_shard
from tools.speedrun import commands


def test_the_same_seed_records_the_same_frames_with_any_number_of_processes(tmp_path, monkeypatch):
    for name, workers in (("a", 1), ("b", 2)):
        record.record("pong", 2200, tmp_path / f"{name}.h5", seed=3, workers=workers)
    a, b = (open_dataset(tmp_path / f"{name}.h5") for name in "ab")
    assert a.frames.shape == (2200, 64, 64, 3) and a.actions.shape == (2200,)
    assert (a.frames == b.frames).all() and (a.actions == b.actions).all()
    assert (a.frames[:200] != record_shard("pong", 4, 200, 0)[0]).any()
    assert {0, 1000, 2000} <= set(a.episode_starts) == set(b.episode_starts)
    assert a.action_names == ("noop", "up", "down") and a.fps == 15
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["game"] == "pong"
    assert Clips(a, "train", 8).batch(0)[1].shape == (1, 7)


def test_the_recorded_button_is_the_one_that_moves_the_paddle():
    frames, actions, _ = record_shard("pong", 0, 1000, 0)
    right = frames[:, :, 52:].astype(int)
    paddle = (right[..., 1] > 120) & (right[..., 0] < 120)  # green
    height = (paddle.sum(2) * np.arange(64)).sum(1) / np.maximum(paddle.sum((1, 2)), 1)
    moved = np.diff(height)
    inside = (paddle.sum((1, 2))[1:] > 8) & (paddle.sum((1, 2))[:-1] > 8)
    mean = [moved[inside & (actions[:-1] == a)].mean() for a in range(3)]
    assert mean[1] < -1 < mean[0] < 1 < mean[2]  # up, noop, down


@pytest.mark.parametrize("name", GAMES)
def test_every_game_records(name):
    if importlib.util.find_spec(GAMES[name].package) is None:
        with pytest.raises(UserError, match=f"{name} needs the package .*pip install"):
            record.record(name, 100, "never.h5")
        return
    frames, actions, starts = record_shard(name, 0, 60, 0)
    again = record_shard(name, 0, 60, 0)
    assert frames.shape == (60, 64, 64, 3) and frames.std() > 3 and starts[0] == 0
    assert len(np.unique(frames.reshape(60, -1), axis=0)) > 5  # it moves
    assert set(actions) <= set(range(len(GAMES[name].actions)))
    assert (frames == again[0]).all() and (actions == again[1]).all()


def test_any_atari_game_with_its_own_actions(tmp_path):
    options = ["--frames", "300", "--workers", "1", "--skip", "2", "--crop", "14:196,8:160"]
    record.main(["atari:freeway", "--out", str(tmp_path / "f.h5"), *options])
    data = open_dataset(tmp_path / "f.h5")
    assert data.action_names == ("noop", "up", "down") and data.fps == 30
    yellow = (data.frames[..., 0] > 200) & (data.frames[..., 2] < 120)
    assert yellow[:, :, 12:20].any(axis=(1, 2)).mean() > 0.9  # the player, where the crop puts it


def test_a_gymnasium_environment_is_recorded_as_it_renders(tmp_path):
    class Clock(gymnasium.Env):
        """Brighter by 10 with each step; an episode has 7. Action 1 paints the left half black."""

        metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
        action_space = gymnasium.spaces.Discrete(2)
        observation_space = gymnasium.spaces.Box(0, 1, (1,))

        def __init__(self, render_mode):
            self.render_mode = render_mode

        def reset(self, seed=None, options=None):
            self.t, self.left = 0, 1
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t, self.left = self.t + 1, 1 - action
            return np.zeros(1, np.float32), 0.0, self.t == 7, False, {}

        def render(self):
            picture = np.full((40, 40, 3), 10 * self.t + 50, np.uint8)
            picture[:, :20] *= np.uint8(self.left)
            return picture

    gymnasium.register("Clock-v0", Clock)
    frames, actions, starts = record_shard("gym:Clock-v0", 0, 60, 0)
    assert starts == [t for t in range(60) if t % 7 == 0]
    assert (frames[:, 0, -1, 0] == [10 * (t % 7) + 50 for t in range(60)]).all()
    black = frames[1:, 0, 0, 0] == 0
    assert (black == (actions[:-1] == 1))[np.arange(1, 60) % 7 != 0].all()
    frames, _, starts = record_shard("gym:Clock-v0", 0, 20, 0, "0:40,20:40", 2)
    assert starts == [0, 4, 8, 12, 16] and (frames[:4, 0, 0, 0] == [50, 70, 90, 110]).all()


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("atari:chess2", {}, "ale-py has no game 'chess2'; it has adventure, "),
        ("gym:Nope-v0", {}, "gym:Nope-v0 cannot be recorded \\(.*Nope.*must have discrete actions"),
        ("gym:Pendulum-v1", {}, "gym:Pendulum-v1 cannot be recorded"),
        ("atari:pong", {"crop": "a"}, "--crop 'a' must be like 14:196,8:160"),
        ("atari:pong", {"crop": "300:400,0:9"}, "--crop leaves nothing of the picture"),
        ("atari:pong", {"skip": -1}, "--skip -1 not negative"),
        ("pong", {"skip": 2}, "--crop and --skip are for atari:NAME and gym:ID, not for pong"),
    ],
)
def test_games_that_cannot_be_recorded(tmp_path, name, options, message):
    with pytest.raises(UserError, match=message):
        record.record(name, 10, tmp_path / "x.h5", **options)
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown game 'chess'; there are pong"):
        record.record("chess", 10, tmp_path / "x.h5")
    monkeypatch.setitem(GAMES, "go", GameSpec("not_installed", 1, ["a"], None))
    monkeypatch.setitem(record.INSTALL, "not_installed", "pip install it")
    with pytest.raises(
        UserError, match="go needs the package not_installed; install it with: pip install it"
    ):
        record.record("go", 10, tmp_path / "x.h5")
    with pytest.raises(UserError, match="--frames 0"):
        record.record("pong", 0, tmp_path / "x.h5")
    assert not list(tmp_path.iterdir())


def test_a_speedrun_records_any_game_with_its_options():
    made = commands("atari:freeway", "tiny", Path("w"), "--crop", "14:196,8:160")
    assert "atari:freeway" in made["record"] and "--crop" in made["record test"]
    assert "data/atari-freeway-3000.h5" in made["record"] + made["lam"]
    with pytest.raises(UserError, match="unknown game 'atarix:freeway'"):
        speedrun.main(["atarix:freeway"])
