import importlib.util

from utils.cli import UserError

import h5py
import numpy as np
import pytest

from data_utils import Clips, open_dataset
from tools import record
from tools.record import GAMES, GameSpec, record_shard


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
