import cv2
import numpy as np
import pytest
from PIL import Image

import play
from config import UserError
from models.checkpoint import CheckpointError
from models.world_model import WorldModel
from play import ARROWS, Game, draw, key_table


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
    again = Game(world, starts, seed=3)
    assert all(np.array_equal(again.press(a), frame) for a, frame in zip((0, 1, 2), first))


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
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    out = str(tmp_path / "x.gif")
    (tmp_path / "text.png").write_text("no picture")
    for more, message in [
        ([], "no display .* --save out.gif"),
        (["--actions", "0,8", "--save", out], "unknown action 8; this world has 0 … 7"),
        (["--actions", "left", "--save", out], "--actions must be numbers .* 'left'"),
        (["--actions", "0"], "--actions and --save belong together"),
        (["--actions", "0", "--save", str(tmp_path / "x.txt")], "use a name that ends in .gif or .mp4"),
        (["--actions", "0", "--save", out, "--frame", str(tmp_path / "text.png")], "not a picture that can be read"),
        (["--actions", "0", "--save", out, "--frame", str(tmp_path / "none.png")], "not a picture that can be read"),
        (["--actions", "0", "--save", str(tmp_path / "text.png" / "x.gif")], "cannot write to .*text.png"),
        (["--actions", "0", "--save", out, "--checkpoint", str(tmp_path / "none")], "no world at .*none"),
    ]:
        with pytest.raises((UserError, CheckpointError), match=message) as error:
            play.main(options(world_dir, *more))
        assert "\n" not in str(error.value) and not (tmp_path / "x.gif").exists()
