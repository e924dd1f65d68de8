import itertools
import json

from utils.checkpoint import load_world
from utils.cli import CheckpointError, UserError

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import play
from player import session as player_session
from player.session import Session, key_table, play_loop, read_run
from player.window import ARROWS, draw


def options(world_dir, *more):
    return ["--checkpoint", world_dir, *more]


def press_all(session, actions):
    return [session.press(action) for action in actions]


def test_a_gif_and_a_film_without_a_display(world_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    gif, film = str(tmp_path / "out.gif"), str(tmp_path / "out.mp4")
    play.main(options(world_dir, "--actions", "0,3,3,1", "--save", gif))
    assert Image.open(gif).n_frames >= 2
    play.main(options(world_dir, "--actions", "0,3,3,1", "--save", film))
    assert cv2.VideoCapture(film).get(cv2.CAP_PROP_FRAME_COUNT) == 5


def test_the_first_frame_can_be_a_picture(world_dir, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    start, gif = str(tmp_path / "start.png"), str(tmp_path / "a.gif")
    Image.fromarray(picture).save(start)
    play.main(options(world_dir, "--frame", start, "--actions", "1", "--save", gif))
    first = np.asarray(Image.open(gif).convert("RGB"))[2::4, 2::4]
    assert np.abs(first.astype(int) - picture).mean() < 25  # GIF has 256 colours


def test_the_same_game_again(world_dir):
    world = load_world(world_dir)
    starts = world.start_frames.numpy()
    assert starts.shape[1:] == (4, 64, 64, 3)
    session = Session(world, starts, seed=3)
    first = press_all(session, (0, 1, 2))
    assert session.actions == [0, 1, 2]
    session.restart()
    assert session.actions == []
    assert not np.array_equal(session.frame, starts[0][-1])  # another place
    world = load_world(world_dir, temperature=2.0)
    four, five = (Session(world, starts, seed=seed) for seed in (4, 5))
    assert not np.array_equal(four.press(0), five.press(0))  # the seed counts
    again = Session(load_world(world_dir), starts, seed=3)
    assert np.array_equal(press_all(again, (0, 1, 2)), first)


def test_the_way_back_is_exact_and_branches(world_dir):
    """Frames after a way back are bit for bit those of playing the same from the start.

    Far from the start and near it.
    """
    world = load_world(world_dir, temperature=0.5)
    clip = world.start_frames[:1].numpy()
    pressed = [int(a) for a in np.random.default_rng(0).integers(0, 8, 2 * world.reach + 8)]
    for n in (0, 3, world.reach, world.reach + 5, len(pressed)):
        session, other = (Session(world, clip, seed=1) for _ in range(2))
        frames = [session.frame, *press_all(session, pressed)]
        assert np.array_equal(session.rewind(n), frames[n])
        assert session.actions == pressed[:n]
        press_all(other, pressed[:n])
        branch = [7, 0, 2, 2, 5]
        assert np.array_equal(press_all(session, branch), press_all(other, branch))
        assert [t.tolist() for t in session.tokens] == [t.tolist() for t in other.tokens]
    with pytest.raises(ValueError, match="cannot go back to frame 99; this session has 0 … "):
        session.rewind(99)


def test_a_saved_run_plays_again(world_dir, tmp_path):
    run, gif = str(tmp_path / "run.json"), str(tmp_path / "again.gif")
    sampling = ["--seed", "7", "--temperature", "0.9", "--steps", "3"]
    play.main(options(world_dir, "--actions", "4,4,1", "--save", run, *sampling))
    session, actions = read_run(run, load_world(world_dir))
    assert actions == [4, 4, 1]
    world = load_world(world_dir, temperature=0.9, steps=3)
    first = Session(world, world.start_frames.numpy(), seed=7)
    assert np.array_equal(press_all(session, actions), press_all(first, actions))
    play.main(options(world_dir, "--replay", run, "--save", gif))
    assert Image.open(gif).n_frames >= 2


def test_a_saved_run_knows_the_number_of_threads(world_dir, tmp_path):
    """Sums over more threads round differently."""
    run, world = tmp_path / "run.json", load_world(world_dir, temperature=0.9, steps=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = Session(world, world.start_frames.numpy())
        frames = press_all(first, range(8))
        run.write_text(json.dumps(first.to_json()))
        torch.set_num_threads(2)
        session, actions = read_run(run, load_world(world_dir))
        assert np.array_equal(press_all(session, actions), frames)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_saved_run_is_checked(world_dir, tmp_path):
    run, gif = tmp_path / "run.json", str(tmp_path / "again.gif")
    play.main(options(world_dir, "--actions", "4,4,1", "--save", str(run)))
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
            play.main(options(world_dir, "--replay", str(run), "--save", gif))


def test_a_run_with_its_tokens_shows_them_until_another_key_is_pressed(world_dir, tmp_path):
    """As the page in the browser saves it, whose random numbers are not ours."""
    world = load_world(world_dir, temperature=2.0)
    path, first = tmp_path / "run.json", Session(world, world.start_frames.numpy(), seed=7)
    frames = press_all(first, (1, 2, 3, 4))
    tokens = [frame[0].tolist() for frame in first.tokens[1:]]
    # with this seed the world would go another way
    run = first.to_json() | {"seed": 8, "tokens": tokens}
    path.write_text(json.dumps(run))
    session, actions = read_run(path, world)
    assert np.array_equal(press_all(session, actions), frames)
    session, _ = read_run(path, world)
    assert np.array_equal(press_all(session, (1, 2)), frames[:2])
    assert not np.array_equal(session.press(0), frames[2])
    assert not np.array_equal(session.press(4), frames[3])
    assert session.actions == [1, 2, 0, 4]
    session, _ = read_run(path, world)
    press_all(session, (1, 2))
    session.rewind(1)
    # after a way back it is the world that goes on
    assert not np.array_equal(session.press(2), frames[1])
    for wrong, message in [
        ([[0]] * 4, "tokens that this world does not know"),
        ([[1024] * 64] * 4, "tokens that this world does not know"),
        ([[float("inf")] * 64], "is not a run"),
        ("no", "is not a run"),
        ([3], "is not a run"),
    ]:
        path.write_text(json.dumps(run | {"tokens": wrong}))
        with pytest.raises(UserError, match=message):
            read_run(path, world)


def test_the_keys_of_every_player(world_dir, monkeypatch):
    """play_loop, with keys that come at once and a clock that runs by a quarter of a frame."""
    world, clock = load_world(world_dir), iter(np.arange(0, 1000, 0.025))
    monkeypatch.setattr(player_session.time, "perf_counter", lambda: next(clock))
    session, played, shown = Session(world, world.start_frames.numpy()), [], []
    press = session.press
    monkeypatch.setattr(session, "press", lambda action: played.append(action) or press(action))
    pressed = [None, "5", None, "?", None, "up", None, "backspace"]
    keys = iter([*pressed, None, None, "r", None, "7", None, "q"])

    def show(rate, held):
        shown.append((rate, held))

    idle = player_session.idle_action(world)
    up = player_session.arrow_actions(world)["up"]
    saved = min(set(range(8)) - {idle, up, 5, 7})
    play_loop(session, 10, show, lambda seconds: next(keys), actions=[saved, saved])

    def without_repeats(actions):
        return [action for action, _ in itertools.groupby(actions)]

    assert without_repeats(played) == without_repeats([saved, 5, up, 7])
    assert 5 in {held for _, held in shown} and saved not in played[2:]
    assert idle is not None
    assert session.round == 1 and session.actions[-1] == 7  # R went to another start
    assert 5 < np.mean([rate for rate, _ in shown]) < 15


def test_without_display_and_terminal_a_film_shows_what_the_keys_do(
    world_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISPLAY", ":87")  # there is no such X server
    monkeypatch.setattr("player.start.has_terminal", lambda: False)
    play.main(options(world_dir, "--fps", "4"))
    film, world = Image.open("world.gif"), load_world(world_dir)
    assert film.n_frames == 4 and film.info["duration"] == 250
    assert film.size == (8 * 132 - 4, 24 + 2 * 132 - 4)
    last = []
    for clip in world.start_frames[:2].numpy():
        frames = [*player_session.legend_frames(world, clip, film.n_frames)]
        last.append(frames[-1])
    film.seek(film.n_frames - 1)
    shown = np.asarray(film.convert("RGB")).astype(int)
    for row, column in ((0, 0), (1, 7)):
        y, x = 24 + 132 * row, 132 * column
        cell = shown[y : y + 128 : 2, x : x + 128 : 2]
        assert np.abs(cell - last[row][column]).mean() < 12  # of 256 colours
    said = capsys.readouterr().out
    assert "world.gif" in said and "--web" in said and "terminal" in said


def test_action_frame_rate_and_keys_are_on_screen(world_dir):
    world = load_world(world_dir)
    session = Session(world, world.start_frames.numpy())
    table = key_table(session.world)
    assert len(table) == 8
    assert all(line.startswith(f"{i}  ") for i, line in table.items())
    named = {arrow for line in table.values() for arrow in ARROWS if f"(arrow {arrow})" in line}
    assert named == set(ARROWS)
    one, two = draw(session, 15, table, 0, 8), draw(session, 15, table, 1, 8)
    assert len(one) == 512 and (one[:, -10:] == 30).all()  # no text is cut off
    frame = cv2.cvtColor(session.frame, cv2.COLOR_RGB2BGR)
    assert (one[:, :512] == frame.repeat(8, 0).repeat(8, 1)).all()
    slow = draw(session, 9, table, 0, 8)
    assert (one[:, 512:] != two[:, 512:]).any()
    assert (one[:, 512:] != slow[:, 512:]).any()


def test_bad_input(world_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr("player.start.has_terminal", lambda: False)
    monkeypatch.setattr("player.terminal.has_terminal", lambda: False)
    text, none, run = (str(tmp_path / name) for name in ("text.png", "none", "none.json"))
    save = ["--save", str(tmp_path / "x.gif")]
    one = ["--actions", "0"]
    (tmp_path / "text.png").write_text("no picture")
    for more, message in [
        (save, "no display and no terminal .* --save out.gif"),
        (["--replay", run], "no display and no terminal .* --save out.gif"),
        (["--terminal"], "--terminal needs a terminal"),
        (["--terminal", "--web"], "are not for the page"),
        (["--actions", "0,8", *save], "unknown action 8; this world has 0 … 7"),
        (["--actions", "left", *save], "--actions must be numbers .* 'left'"),
        (one, "--actions needs --save"),
        ([*one, "--replay", "run.json", *save], "both say what to play"),
        ([*one, "--save", f"{none}.txt"], "use a name that ends in .gif, .mp4 or .json"),
        (["--replay", run, *save], "is not a run that this project saved"),
        (["--web", "--port", "70000"], "--port must be at most 65,535, got 70000"),
        (["--web", "--games", "0"], "--games must be at least 1, got 0"),
        (["--web", "--export-web", "x"], "leave one out"),
        (["--web", *save], "are not for the page"),
        (["--replay", "x", *save, "--steps", "3"], "a saved run holds its own"),
        (["--beside", world_dir], "--beside needs --web or --export-web"),
        ([*one, *save, "--frame", text], "not a picture that can be read"),
        ([*one, *save, "--frame", f"{none}.png"], "no such file: .*; check --frame"),
        ([*one, "--save", f"{text}/x.gif"], "cannot write to .*text.png"),
        ([*one, *save, "--checkpoint", none], "no world at .*none"),
    ]:
        with pytest.raises((UserError, CheckpointError), match=message) as error:
            play.main(options(world_dir, *more))
        assert "\n" not in str(error.value) and not (tmp_path / "x.gif").exists()
