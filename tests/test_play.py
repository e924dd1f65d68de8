import itertools
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import game as games
import play
from config import UserError
from game import Game, key_table, play_loop, read_run
from models.checkpoint import CheckpointError
from models.world_model import WorldModel
from play import ARROWS, draw


def options(world_dir, *more):
    return ["--checkpoint", world_dir, *more]


def test_a_gif_and_a_film_without_a_display(world_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    play.main(options(world_dir, "--actions", "0,3,3,1", "--save", str(tmp_path / "out.gif")))
    assert Image.open(tmp_path / "out.gif").n_frames >= 2
    play.main(options(world_dir, "--actions", "0,3,3,1", "--save", str(tmp_path / "out.mp4")))
    capture = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5


def test_the_first_frame_can_be_a_picture(world_dir, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "start.png")
    play.main(options(world_dir, "--frame", str(tmp_path / "start.png"), "--actions", "1", "--save", str(tmp_path / "a.gif")))
    first = np.asarray(Image.open(tmp_path / "a.gif").convert("RGB"))[2::4, 2::4]
    assert np.abs(first.astype(int) - picture).mean() < 25  # GIF has 256 colours


def test_the_same_game_again(world_dir):
    world = WorldModel.load(world_dir)
    starts = world.start_frames.numpy()
    assert starts.shape[1:] == (4, 64, 64, 3)
    game = Game(world, starts, seed=3)
    first = [game.press(a) for a in (0, 1, 2)]
    assert game.actions == [0, 1, 2]
    game.restart()
    assert game.actions == [] and not np.array_equal(game.frame, starts[0][-1])  # another place
    other = Game(WorldModel.load(world_dir, temperature=2.0), starts, seed=4)
    assert not np.array_equal(other.press(0), Game(other.world, starts, seed=5).press(0))  # the seed counts
    again = Game(world, starts, seed=3)
    assert all(np.array_equal(again.press(a), frame) for a, frame in zip((0, 1, 2), first))


def test_the_way_back_is_exact_and_branches(world_dir):
    """Frames after a way back, far from the beginning and near it, are bit for bit those of playing the same from the start."""
    world = WorldModel.load(world_dir, temperature=0.5)
    clip = world.start_frames[:1].numpy()
    pressed = [int(a) for a in np.random.default_rng(0).integers(0, 8, 2 * world.reach + 8)]
    for n in (0, 3, world.reach, world.reach + 5, len(pressed)):
        game, other = (Game(world, clip, seed=1) for _ in range(2))
        frames = [game.frame] + [game.press(a) for a in pressed]
        assert np.array_equal(game.rewind(n), frames[n]) and game.actions == pressed[:n]
        for a in pressed[:n]:
            other.press(a)
        branch = [7, 0, 2, 2, 5]
        assert np.array_equal([game.press(a) for a in branch], [other.press(a) for a in branch])
        assert [t.tolist() for t in game.tokens] == [t.tolist() for t in other.tokens]
    with pytest.raises(ValueError, match="cannot go back to frame 99; this game has 0 … "):
        game.rewind(99)


def test_a_saved_run_plays_again_and_is_checked(world_dir, tmp_path):
    run, gif = tmp_path / "run.json", tmp_path / "again.gif"
    play.main(options(world_dir, "--actions", "4,4,1", "--save", str(run), "--seed", "7", "--temperature", "0.9", "--steps", "3"))
    game, actions = read_run(run, WorldModel.load(world_dir))
    assert actions == [4, 4, 1]
    world = WorldModel.load(world_dir, temperature=0.9, steps=3)
    first = Game(world, world.start_frames.numpy(), seed=7)
    assert all(np.array_equal(game.press(a), first.press(a)) for a in actions)
    play.main(options(world_dir, "--replay", str(run), "--save", str(gif)))
    assert Image.open(gif).n_frames >= 2
    before = torch.get_num_threads()
    try:  # sums over more threads round differently; a run knows how many there were
        torch.set_num_threads(1)
        first = Game(world, world.start_frames.numpy())
        frames = [first.press(a) for a in range(8)]
        run.write_text(json.dumps(first.record()))
        torch.set_num_threads(2)
        game, actions = read_run(run, WorldModel.load(world_dir))
        assert np.array_equal([game.press(a) for a in actions], frames) and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    saved = json.loads(run.read_text())
    for change, message in [
        ({"world": "00000000"}, "was played in world 00000000, this is"),
        ({"actions": [8]}, "that this world does not know"),
        ({"actions": [-1]}, "is not a run"),
        ({"actions": "0"}, "is not a run"),
        ({"clip": saved["clip"][:-8]}, "is not a run"),
        ({"shape": [4, 64, 64]}, "is not a run"),
        ({"temperature": None}, "is not a run"),
        ({"temperature": float("inf")}, "is not a run"),
        ({"seed": 2**33}, "is not a run"),
        ({"steps": True}, "is not a run"),
        ({"actions": {}}, "is not a run"),
        ({"threads": 0}, "is not a run"),
        ({"what": "song"}, "is not a run"),
    ]:
        run.write_text(json.dumps(saved | change))
        with pytest.raises(UserError, match=message):
            play.main(options(world_dir, "--replay", str(run), "--save", str(gif)))


def test_a_run_with_its_tokens_shows_them_until_another_key_is_pressed(world_dir, tmp_path):
    """As the page in the browser saves it, whose random numbers are not ours."""
    world = WorldModel.load(world_dir, temperature=2.0)
    path, first = tmp_path / "run.json", Game(world, world.start_frames.numpy(), seed=7)
    frames = [first.press(a) for a in (1, 2, 3, 4)]
    tokens = [frame[0].tolist() for frame in first.tokens[1:]]
    run = first.record() | {"seed": 8, "tokens": tokens}  # with this seed the world would go another way
    path.write_text(json.dumps(run))
    game, actions = read_run(path, world)
    assert np.array_equal([game.press(a) for a in actions], frames)
    game, _ = read_run(path, world)
    assert np.array_equal([game.press(1), game.press(2)], frames[:2]) and not np.array_equal(game.press(0), frames[2])
    assert not np.array_equal(game.press(4), frames[3]) and game.actions == [1, 2, 0, 4]
    game, _ = read_run(path, world)
    game.press(1), game.press(2), game.rewind(1)
    assert not np.array_equal(game.press(2), frames[1])  # on the way back it is the world that goes on
    for wrong, message in [([[0]] * 4, "tokens that this world does not know"), ([[1024] * 64] * 4, "tokens that this world does not know"),
                           ([[float("inf")] * 64], "is not a run"), ("no", "is not a run"), ([3], "is not a run")]:  # fmt: skip
        path.write_text(json.dumps(run | {"tokens": wrong}))
        with pytest.raises(UserError, match=message):
            read_run(path, world)


def test_the_keys_of_every_player(world_dir, monkeypatch):
    """play_loop, with keys that come at once and a clock that runs by a quarter of a frame."""
    world, clock, shown = WorldModel.load(world_dir), iter(np.arange(0, 1000, 0.025)), []
    monkeypatch.setattr(games.time, "perf_counter", lambda: next(clock))
    game = Game(world, world.start_frames.numpy())
    keys = iter([None, "5", None, "?", None, "up", None, "backspace", None, None, "r", None, "7", None, "q"])
    played = []
    monkeypatch.setattr(game, "press", lambda action, press=game.press: played.append(action) or press(action))
    play_loop(game, 10, lambda rate, held: shown.append((rate, held)), lambda seconds: next(keys), actions=[3, 3])
    idle, up = games.idle_action(world) or 0, games.arrow_actions(world)["up"]
    assert [action for action, _ in itertools.groupby(played)] == [action for action, _ in itertools.groupby([3, 5, up, 7])]
    assert 5 in {held for _, held in shown} and 3 not in played[2:] and idle is not None
    assert game.round == 1 and game.actions[-1] == 7  # R went to another beginning
    assert 5 < np.mean([rate for rate, _ in shown]) < 15


def test_without_display_and_terminal_a_film_shows_what_the_keys_do(world_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISPLAY", ":87")  # there is no such X server
    monkeypatch.setattr(play, "has_terminal", lambda: False)
    play.main(options(world_dir, "--fps", "4"))
    film, world = Image.open("world.gif"), WorldModel.load(world_dir)
    assert film.n_frames == 4 and film.info["duration"] == 250 and film.size == (8 * 132 - 4, 24 + 2 * 132 - 4)
    last = []
    for clip in world.start_frames[:2].numpy():
        frames = [*games.legend_frames(world, clip, film.n_frames)]
        last.append(frames[-1])
    film.seek(film.n_frames - 1)
    shown = np.asarray(film.convert("RGB")).astype(int)
    for row, column in ((0, 0), (1, 7)):
        y, x = 24 + 132 * row, 132 * column
        assert np.abs(shown[y : y + 128 : 2, x : x + 128 : 2] - last[row][column]).mean() < 12  # of 256 colours
    said = capsys.readouterr().out
    assert "world.gif" in said and "--web" in said and "terminal" in said


def test_action_frame_rate_and_keys_are_on_screen(world_dir):
    game = Game(WorldModel.load(world_dir), WorldModel.load(world_dir).start_frames.numpy())
    table = key_table(game.world)
    assert len(table) == 8 and all(line.startswith(f"{i}  ") for i, line in enumerate(table))
    assert {arrow for line in table for arrow in ARROWS if f"(arrow {arrow})" in line} == set(ARROWS)
    one, two = draw(game, 15, table, 0, 8), draw(game, 15, table, 1, 8)
    assert len(one) == 512 and (one[:, -10:] == 30).all()  # no text is cut off
    assert (one[:, :512] == cv2.cvtColor(game.frame, cv2.COLOR_RGB2BGR).repeat(8, 0).repeat(8, 1)).all()
    assert (one[:, 512:] != two[:, 512:]).any() and (one[:, 512:] != draw(game, 9, table, 0, 8)[:, 512:]).any()


def test_bad_input(world_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(play, "has_terminal", lambda: False)
    monkeypatch.setattr("player.terminal.has_terminal", lambda: False)
    out = str(tmp_path / "x.gif")
    (tmp_path / "text.png").write_text("no picture")
    for more, message in [
        (["--save", out], "no display and no terminal .* --save out.gif"),
        (["--replay", str(tmp_path / "none.json")], "no display and no terminal .* --save out.gif"),
        (["--terminal"], "--terminal needs a terminal"),
        (["--terminal", "--web"], "are not for the page"),
        (["--actions", "0,8", "--save", out], "unknown action 8; this world has 0 … 7"),
        (["--actions", "left", "--save", out], "--actions must be numbers .* 'left'"),
        (["--actions", "0"], "--actions needs --save"),
        (["--actions", "0", "--replay", "run.json", "--save", out], "both say what to play"),
        (["--actions", "0", "--save", str(tmp_path / "x.txt")], "use a name that ends in .gif, .mp4 or .json"),
        (["--replay", str(tmp_path / "none.json"), "--save", out], "is not a run that this project saved"),
        (["--web", "--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--web", "--games", "0"], "--games must be at least 1, got 0"),
        (["--web", "--export-web", "x"], "leave one out"),
        (["--web", "--save", out], "are not for the page"),
        (["--replay", "x", "--save", out, "--steps", "3"], "a saved run says itself"),
        (["--beside", world_dir], "--beside needs --web or --export-web"),
        (["--actions", "0", "--save", out, "--frame", str(tmp_path / "text.png")], "not a picture that can be read"),
        (["--actions", "0", "--save", out, "--frame", str(tmp_path / "none.png")], "not a picture that can be read"),
        (["--actions", "0", "--save", str(tmp_path / "text.png" / "x.gif")], "cannot write to .*text.png"),
        (["--actions", "0", "--save", out, "--checkpoint", str(tmp_path / "none")], "no world at .*none"),
    ]:
        with pytest.raises((UserError, CheckpointError), match=message) as error:
            play.main(options(world_dir, *more))
        assert "\n" not in str(error.value) and not (tmp_path / "x.gif").exists()
