from argparse import Namespace

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import data_utils
from config import UserError
from data_utils import Clips, DatasetWriter, Footage, TokenClips, dummy_world, held_actions, open_footage, to_float, to_uint8


def options(path, **changes):
    return Namespace(**{**dict(data_path=str(path), data_type="auto", use_dummy_data=False, frame_size=32), **changes})


def film(n, size=(48, 64)):
    """n frames (n, H, W, 3) whose brightness rises with time."""
    return np.broadcast_to((np.linspace(20, 230, n)[:, None, None, None]), (n, *size, 3)).astype(np.uint8)


def write_video(path, frames):
    if path.suffix == ".gif":
        first, *rest = map(Image.fromarray, frames)
        first.save(path, save_all=True, append_images=rest, duration=66)
        return
    code = {".mp4": "mp4v", ".avi": "MJPG", ".webm": "VP80", ".mkv": "mp4v"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 15, frames.shape[2:0:-1])
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mkv", ".gif"])
def test_one_video_of_each_kind(tmp_path, suffix):
    write_video(tmp_path / f"film{suffix}", film(30))
    footage = open_footage(options(tmp_path / f"film{suffix}"))
    assert footage.frames.shape == (30, 32, 32, 3) and footage.frames.dtype == np.uint8
    assert np.abs(footage.frames.mean(axis=(1, 2, 3)) - film(30)[:, 0, 0, 0]).max() < 12  # in order, apart from compression


def test_a_folder_is_converted_once_and_again_when_it_changes(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4", film(20))
    write_video(folder / "b.avi", film(30))
    (folder / "broken.mp4").write_bytes(b"not a video at all")
    write_video(folder / "cut.avi", film(200))
    whole = (folder / "cut.avi").read_bytes()
    (folder / "cut.avi").write_bytes(whole[: len(whole) // 2])
    footage = open_footage(options(folder))
    printed = capsys.readouterr().err
    assert "skipped broken.mp4: no frame can be read" in printed and "skipped cut.avi: it ends after" in printed
    assert len(footage.frames) == 50 and list(footage.episode_starts) == [0, 20]
    converted = tmp_path / "videos.32px.h5"
    first = converted.stat().st_mtime_ns
    open_footage(options(folder))
    assert converted.stat().st_mtime_ns == first
    (folder / "cut.avi").unlink()
    write_video(folder / "c.mp4", film(10))
    assert len(open_footage(options(folder)).frames) == 60
    assert not list(tmp_path.glob("*.part"))


def test_bad_sources(tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.mp4").write_bytes(b"nothing")
    (tmp_path / "text.h5").write_text("nothing")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["pictures"] = np.zeros((3, 8, 8, 3), np.uint8)
    with h5py.File(tmp_path / "float.h5", "w") as file:
        file["frames"] = np.zeros((3, 8, 8, 3), np.float32)
    with h5py.File(tmp_path / "actions.h5", "w") as file:
        file["frames"], file["actions"] = np.zeros((3, 8, 8, 3), np.uint8), np.zeros(7, int)
    for path, message in [
        (tmp_path / "missing", "no such file or folder"),
        (empty, "no video in .*empty; looked for"),
        (broken, "none of the 1 videos can be read"),
        (tmp_path / "text.h5", "neither a video .* nor a readable HDF5"),
        (tmp_path / "other.h5", "only \\['pictures'\\]"),
        (tmp_path / "float.h5", "float32 \\(3, 8, 8, 3\\)"),
        (tmp_path / "actions.h5", "\\(7,\\) actions for 3 frames"),
        ("", "no footage given"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            open_footage(options(path))
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("**/*.part")) and not (tmp_path / "broken.32px.h5").exists()


def test_a_video_shorter_than_a_clip(tmp_path):
    write_video(tmp_path / "short.mp4", film(5))
    footage = open_footage(options(tmp_path / "short.mp4"))
    with pytest.raises(UserError, match="no clip of 8 frames .* 5 frames in all.*--context-length"):
        Clips(footage, "train", 8)


def counting(n, **more):
    """Footage whose frame i holds the number i."""
    frames = np.zeros((n, 2, 2, 3), np.uint8)
    frames[:, 0, 0, 0], frames[:, 0, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    return Footage(frames, np.arange(n), **more)


def first_frame(clips):
    return clips[..., 0, 0, 0].astype(int) + 256 * clips[..., 0, 0, 1].astype(int)


def test_clips_never_cross_an_episode_or_the_border():
    episodes = (0, 100, 104, 250, 395)
    footage = counting(400, episode_starts=episodes)
    expected = {"train": set(), "val": set()}
    for start in range(400 - 8 + 1):
        inside = set(range(start + 1, start + 8))
        if not inside & {*episodes, 360}:
            expected["train" if start < 360 else "val"].add(start)
    for part in expected:
        clips = Clips(footage, part, 8, val_fraction=0.1)
        assert set(clips.starts) == expected[part]
        frames, actions = clips.at(clips.starts)
        numbers = first_frame(frames.numpy())
        assert (np.diff(numbers, axis=1) == 1).all() and (actions.numpy() == numbers[:, :-1]).all()


def test_a_batch_is_a_function_of_seed_and_step():
    footage = counting(400)
    a, b = Clips(footage, "train", 8, batch_size=16, seed=1), Clips(footage, "train", 8, batch_size=16, seed=1)
    b.batch(3)
    assert (a.batch(7)[0] == b.batch(7)[0]).all() and (a.batch(7)[0] != a.batch(8)[0]).any()
    assert (a.batch(7)[0] != Clips(footage, "train", 8, batch_size=16, seed=2).batch(7)[0]).any()


def test_footage_on_disk_reads_as_in_memory(tmp_path, monkeypatch):
    frames, actions = dummy_world(300)
    with DatasetWriter(tmp_path / "x.h5", (64, 64), with_actions=True, fps=7.0, action_names=["a", "b"]) as writer:
        writer.starts = [0, 200]
        writer.append(frames[:200], actions[:200])
        writer.append(frames[200:], actions[200:])
    memory = open_footage(options(tmp_path / "x.h5"))
    monkeypatch.setattr(data_utils, "IN_MEMORY", 0)
    disk = open_footage(options(tmp_path / "x.h5"))
    assert isinstance(disk.frames, h5py.Dataset) and isinstance(memory.frames, np.ndarray)
    assert disk.fps == 7.0 and disk.action_names == ("a", "b") and list(disk.episode_starts) == [0, 200]
    for one, two in zip(Clips(memory, "train", 8, 4).batch(0), Clips(disk, "train", 8, 4).batch(0)):
        assert (one == two).all()
    assert (memory.frames == frames).all() and (memory.actions == actions).all()


def test_frames_alone_are_enough(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["frames"] = dummy_world(100)[0]
    frames, actions = Clips(open_footage(options(tmp_path / "x.h5")), "train", 8).batch(0)
    assert frames.shape == (1, 8, 64, 64, 3) and actions is None


def test_a_failed_recording_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        with DatasetWriter(tmp_path / "x.h5", (8, 8)) as writer:
            writer.append(np.zeros((3, 8, 8, 3), np.uint8))
            raise RuntimeError("the game crashed")
    assert not list(tmp_path.iterdir())


def test_the_dummy_world_moves_as_told():
    frames, actions = dummy_world(200)
    shifts = {1: (0, -2), 2: (0, 2), 3: (-2, 0), 4: (2, 0)}
    for i in range(100):
        if actions[i] == 0:
            assert (frames[i] == frames[i + 1]).all()
            continue
        dy, dx = shifts[actions[i]]  # the view moves by (dy, dx): what was at (y + dy, x + dx) is now at (y, x)
        view = np.roll(frames[i], (-dy, -dx), axis=(0, 1))
        same = (view == frames[i + 1]).all(-1)[4:24, 4:60]  # away from the border and the sprite
        assert same.all()


def test_held_actions():
    actions = held_actions(np.random.default_rng(0), 10_000, 5)
    changes = np.flatnonzero(np.diff(actions)) + 1
    assert len(actions) == 10_000 and set(actions) == set(range(5)) and 4 < np.diff(changes).mean() < 7


def test_conversion_to_the_model_s_range_and_back():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    import torch

    video = to_float(torch.from_numpy(frames))
    assert video.shape == (2, 3, 3, 4, 5) and video.min() >= -1 and video.max() <= 1
    assert (to_uint8(video).numpy() == frames).all()


def test_tokens_are_computed_once_per_dataset_and_anew_for_other_weights_or_footage(tmp_path, capsys):
    path, calls = tmp_path / "game.h5", []

    def record(n):
        with DatasetWriter(path, (16, 16), with_actions=True) as writer:
            writer.append(np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8), np.arange(n) % 5)
            writer.starts = [0, 30]

    def label(frames, buttons):  # the token of a frame is its number, the action what was pressed
        calls.append(len(frames))
        return frames[:, :, 0, :4, 0].long(), buttons

    def tokens(part, weights="a"):
        return TokenClips(Clips(open_footage(options(path)), part, 4, batch_size=6, seed=1), label, weights)

    record(100)
    train = tokens("train")
    assert train.tokens[:, 0, 0].tolist() == [*range(0, 27, 4), *range(30, 87, 4)]  # end to end, within episodes, without the last tenth
    chosen, actions = train.batch(3)
    assert chosen.shape == (6, 4, 4) and actions.shape == (6, 3) and chosen.dtype == torch.int64
    assert (actions == chosen[:, :-1, 0] % 5).all() and (chosen[:, 1:] - chosen[:, :-1] == 1).all()
    assert (train.frames([2])[0, :, 0, 0, 0] == torch.tensor([8, 9, 10, 11])).all()
    n = len(calls)
    assert torch.equal(tokens("train").batch(3)[0], chosen) and len(calls) == n  # from the file
    assert len(tokens("val").tokens) == 2 and len(calls) == n + 1  # the other part has a file of its own
    capsys.readouterr()
    tokens("train", "b")
    assert len(calls) == n + 2 and "game.train.tokens.h5 was made with other weights" in capsys.readouterr().out
    record(104)
    assert len(tokens("train", "b").tokens) == 7 + 16 and len(calls) == n + 3
    (tmp_path / "game.train.tokens.h5").write_bytes(b"cut short")
    assert torch.equal(tokens("train", "b").batch(3)[0], tokens("train", "b").batch(3)[0]) and len(calls) == n + 4
