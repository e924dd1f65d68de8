import re
from functools import partial

from utils.cli import UserError
from utils.device import autocast_on

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_dynamics
import train_lam
import train_tokenizer
import validate
from data_utils import Clips, Dataset, dummy_world, open_dataset
from evaluation import metrics, news, stages

PLAIN = (torch.device("cpu"), autocast_on(torch.device("cpu"), "float32"))


def street(n=1500, seed=0):
    """Traffic that scrolls by itself, and a small player below it: stay, left, right.

    → frames uint8 (n, 32, 32, 3), actions (n,), columns of the player (n,).
    """
    rng = np.random.default_rng(seed)
    cars = rng.integers(0, 256, (3, 8, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    actions = np.repeat(rng.integers(3, size=n), rng.integers(1, 5, size=n))[:n]
    frames, columns, x = np.zeros((n, 32, 32, 3), np.uint8), np.zeros(n, int), 14
    for t in range(n):
        columns[t] = x
        frames[t, 2:14] = np.roll(cars, 3 * t, axis=1)
        frames[t, 22:26, x : x + 4] = (250, 220, 60)
        x = int(np.clip(x + (0, -2, 2)[actions[t]], 0, 28))
    return frames, actions, columns


@pytest.fixture(scope="module")
def foretold():
    """The street, and a predictor of it."""
    frames, actions, _ = street()
    clips = Clips(Dataset(frames, actions), "train", 8)
    return clips, news.train_history(clips, 160, *PLAIN)


def test_the_errors_of_all_moves_are_those_of_shifting_one_by_one():
    before, after = torch.rand(2, 2, 3, 8, 12)
    weights, moves = torch.rand(2, 8, 12), np.array([[0, 0], [3, -2], [-5, 1]])
    found = news.move_errors(before, after, weights, moves)
    up = partial(F.interpolate, scale_factor=news.FINENESS, mode="bilinear")
    for k, (down, right) in enumerate(moves.tolist()):
        shifted = up(before).roll((down, right), (-2, -1))
        error = (up(weights[:, None]) * (shifted - up(after)) ** 2).sum(dim=(1, 2, 3))
        assert torch.allclose(found[:, k], error, rtol=1e-4)


def test_moves_that_fit_best_together_are_chosen():
    errors = torch.full((90, 40), 5.0)
    for k, move in enumerate((7, 20, 33)):  # each fits a third of the transitions
        errors[30 * k : 30 * k + 30, move] = 0.0
    errors[:, 11] = 2.0  # fits all of them a little
    errors[:10, 20] = errors[:10, 7]
    assert {7, 20, 33} <= set(news.choose_moves(errors, 4, stay=0))


def test_a_window_never_reaches_into_another_episode():
    frames = np.arange(60, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    clips = Clips(Dataset(frames, episode_starts=[40]), "train", 4, val_fraction=0.01)
    assert {39, 59} & set(news.transitions(clips)) == set()
    windows = news.read_windows(clips, np.array([20, 42]))[..., 0, 0, 0].tolist()
    assert windows[0] == list(range(5, 22))
    assert windows[1] == [40] * 14 + [41, 42, 43]


def test_thumbnails_have_even_sides_and_keep_small_frames():
    assert news.thumbnails(torch.zeros(1, 2, 3, 360, 640)).shape[-2:] == (36, 64)
    small = torch.rand(1, 2, 3, 32, 48)
    assert news.thumbnails(small) is small


def test_moves_follow_the_player_and_not_the_traffic(foretold):
    clips, model = foretold
    codes, moves = news.find_moves(model, clips, 4, *PLAIN)
    actions, known = clips.dataset.actions, codes >= 0
    assert metrics.nmi_above_chance(codes[known], actions[known]) > 0.6  # the walls hide some
    assert {(0, -2), (0, 2), (0, 0)} <= {tuple(move) for move in moves.tolist()}


def test_news_is_what_codes_tell_beyond_the_past(foretold):
    clips, model = foretold
    held_out = Clips(clips.dataset, "val", 8)

    class Codes:  # a latent action model that reads the player's place
        n_actions, context_length = 4, 2

        def __init__(self, useful):
            self.useful = useful

        def infer(self, video):
            place = (video[:, :, 0, 22:26] > 0.9).float().argmax(dim=-1).float().mean(dim=-1)
            moved = place.diff(dim=1).sign().long() + 1
            return moved if self.useful else torch.zeros_like(moved)

    measured = {}
    for useful in (True, False):
        values, picture = news.news_of_codes(
            Codes(useful), clips, held_out, 60, *PLAIN, begin=model.state_dict()
        )
        measured[useful] = values["news"]
    assert measured[True] > 0.3 > 0.1 > abs(measured[False])
    assert 0 < values["unforetold"] < 0.2 and picture.shape[2] == 3


def test_a_click_is_followed_and_its_surroundings_count():
    frames, _, columns = street(300)
    clips = Clips(Dataset(frames), "train", 8, val_fraction=0.1)
    centres = news.track(clips, "15,23")
    away = np.abs(32 * centres[:, 1] - (columns + 1.5))  # the click was 0.5 beside the middle
    assert (away <= 1).mean() > 0.98
    weights = news.near(torch.tensor([[0.5, 0.25]]), (32, 64))
    assert divmod(int(weights.argmax()), 64) in [(15, 15), (15, 16), (16, 15), (16, 16)]
    for wrong in ("40,3", "3", "a,b"):
        with pytest.raises(UserError, match="must be X,Y, a pixel of 32×32 frames"):
            news.track(clips, wrong)


def test_labels_take_the_place_of_moves_where_they_are_known():
    codes = np.array([3, 3, 1, 1, 1, 2, 2, 2])
    actions = np.array([0, 0, 1, -1, 1, -1, 2, -1])
    assert news.codes_of_labels(codes, actions, 4).tolist() == [3, 3, 1, -1, 1, -1, 2, -1]
    # more actions than codes: some share one
    assert set(news.codes_of_labels(np.arange(4) % 2, np.arange(4), 2)) == {0, 1}
    frames = np.zeros((400, 8, 8, 3), np.uint8)
    clips = Clips(Dataset(frames), "train", 4, batch_size=8, val_fraction=0.1)
    labelled = np.zeros(400, bool)
    labelled[100] = True
    targets = np.stack([np.arange(400), labelled], axis=1).astype(np.float32)
    found = [news.TaughtClips(clips, targets, labelled).batch(i)[1] for i in range(4)]
    assert found[0].shape == (8, 3, 2)
    assert all((batch[..., 1] > 0).any(dim=1).sum() >= 2 for batch in found)


def test_training_takes_labels_and_a_click(tmp_path, recording, capsys, monkeypatch):
    monkeypatch.setattr(news, "SAMPLE", 100)
    monkeypatch.setattr(news, "MOST", 200)
    options = ["--data-path", recording, "--preset", "tiny", "--n-updates", "2", "--device", "cpu"]
    options += ["--out", str(tmp_path), "--history-updates", "4", "--teach-weight", "1"]
    train_lam.main([*options, "--label-weight", "1", "--player", "32,32"])
    assert "moves that explain it" in capsys.readouterr().out
    kept = (tmp_path / "lam" / "moves.h5").stat().st_mtime_ns
    train_lam.main([*options, "--label-weight", "1", "--player", "32,32"])
    assert (tmp_path / "lam" / "moves.h5").stat().st_mtime_ns == kept  # and used again
    with pytest.raises(UserError, match="--player '99,1' must be X,Y"):
        train_lam.main([*options, "--player", "99,1"])
    capsys.readouterr()
    train_lam.main(options)  # after four updates all is new, and on a large part of the picture
    text = capsys.readouterr().out
    assert re.search(r"the past leaves \d+% of the change, on \d\d+\.\d% of the pict", text)
    assert "moves that explain it" not in text


def test_a_model_that_ignores_its_actions_has_a_shuffle_ratio_of_one():
    actions = torch.arange(12).view(3, 4) % 4
    assert stages.shuffle_ratio(lambda given: torch.rand(1), actions) == 1
    truth = actions.float()
    assert stages.shuffle_ratio(lambda given: 1 + ((given - truth) ** 2).mean(), actions) > 1.2


def test_moves_of_a_camera_are_found_without_a_past():
    frames, actions = dummy_world(300)
    clips = Clips(Dataset(frames, actions), "train", 4)
    blind = lambda frames: (frames[:, -1], torch.ones(len(frames), 64, 64))  # noqa: E731
    codes, moves = news.find_moves(blind, clips, 8, *PLAIN)
    known = codes >= 0
    assert metrics.nmi_above_chance(codes[known], actions[known]) > 0.85


def test_an_unknown_action_is_minus_one(tmp_path):
    frames, path = dummy_world(60)[0], tmp_path / "some.h5"
    actions = np.full(60, -1)
    actions[50:] = 1
    with h5py.File(path, "w") as file:
        file["frames"], file["actions"] = frames, actions
    assert open_dataset(str(path)).actions.tolist() == actions.tolist()
    lam = tmp_path / "lam.pt"
    options = ["--data-path", str(path), "--preset", "tiny", "--out", str(tmp_path), "--n-updates"]
    taught = ["--label-weight", "1", "--teach-weight", "1", "--history-updates", "2"]
    train_lam.main([*options, "1", *taught])
    train_tokenizer.main([*options, "1"])
    with pytest.raises(UserError, match="unknown action .-1.; .*--label-weight"):
        train_dynamics.main([*options, "1", "--actions", "true"])
    measure = ["--checkpoint", str(lam), "--data-path", str(path), "--val-fraction", "0.5"]
    report = validate.main([*measure, "--classifier-updates", "2"])
    assert report["lam/majority"] == 1  # of those that are known
