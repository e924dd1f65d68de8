from utils.cli import UserError
from utils.hardening.videos import DatasetWriter

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import data_utils
from data_utils import (
    Clips,
    Dataset,
    TokenClips,
    dummy_world,
    open_dataset,
    to_float,
    to_uint8,
)
from tools.record import held_actions


def open_small(path):
    """The dataset at `path`; videos are resized to 32×32."""
    return open_dataset(str(path), frame_size=32)


def film(n, size=(48, 64)):
    """n frames (n, H, W, 3) whose brightness rises with time."""
    brightness = np.linspace(20, 230, n)[:, None, None, None]
    return np.broadcast_to(brightness, (n, *size, 3)).astype(np.uint8)


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
    dataset = open_small(tmp_path / f"film{suffix}")
    assert dataset.frames.shape == (30, 32, 32, 3) and dataset.frames.dtype == np.uint8
    # in order; compression changes the brightness a little
    difference = dataset.frames.mean(axis=(1, 2, 3)) - film(30)[:, 0, 0, 0]
    assert np.abs(difference).max() < 12


def test_a_folder_is_converted_once_and_again_when_it_changes(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4", film(20))
    write_video(folder / "b.avi", film(30))
    (folder / "broken.mp4").write_bytes(b"not a video at all")
    write_video(folder / "cut.avi", film(200))
    whole = (folder / "cut.avi").read_bytes()
    (folder / "cut.avi").write_bytes(whole[: len(whole) // 2])
    dataset = open_small(folder)
    printed = capsys.readouterr().err
    assert "skipped broken.mp4: no frame can be read" in printed
    assert "skipped cut.avi: it ends after" in printed
    assert len(dataset.frames) == 50 and list(dataset.episode_starts) == [0, 20]
    converted = tmp_path / "videos.32px.h5"
    first = converted.stat().st_mtime_ns
    open_small(folder)
    assert converted.stat().st_mtime_ns == first
    (folder / "cut.avi").unlink()
    write_video(folder / "c.mp4", film(10))
    assert len(open_small(folder).frames) == 60
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
        ("", "no data given"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            open_small(path)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("**/*.part")) and not (tmp_path / "broken.32px.h5").exists()


def test_a_video_shorter_than_a_clip(tmp_path):
    write_video(tmp_path / "short.mp4", film(5))
    dataset = open_small(tmp_path / "short.mp4")
    with pytest.raises(UserError, match="no clip of 8 frames .* 5 frames in all.*--context-length"):
        Clips(dataset, "train", 8)


def counting(n, **more):
    """A dataset whose frame i holds the number i."""
    frames = np.zeros((n, 2, 2, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(n) % 256
    frames[:, 0, 0, 1] = np.arange(n) // 256
    return Dataset(frames, np.arange(n), **more)


def first_frame(clips):
    return clips[..., 0, 0, 0].astype(int) + 256 * clips[..., 0, 0, 1].astype(int)


def test_clips_never_cross_an_episode_or_the_border():
    episodes = (0, 100, 104, 250, 395)
    dataset = counting(400, episode_starts=episodes)
    expected = {"train": set(), "val": set()}
    for start in range(400 - 8 + 1):
        inside = set(range(start + 1, start + 8))
        if not inside & {*episodes, 360}:
            expected["train" if start < 360 else "val"].add(start)
    for part in expected:
        clips = Clips(dataset, part, 8, val_fraction=0.1)
        assert set(clips.starts) == expected[part]
        frames, actions = clips.read(clips.starts)
        numbers = first_frame(frames.numpy())
        assert (np.diff(numbers, axis=1) == 1).all()
        assert (actions.numpy() == numbers[:, :-1]).all()


def test_a_batch_is_a_function_of_seed_and_step():
    dataset = counting(400)
    a, b, other = (Clips(dataset, "train", 8, batch_size=16, seed=seed) for seed in (1, 1, 2))
    b.batch(3)
    assert (a.batch(7)[0] == b.batch(7)[0]).all() and (a.batch(7)[0] != a.batch(8)[0]).any()
    assert (a.batch(7)[0] != other.batch(7)[0]).any()


def test_a_dataset_on_disk_reads_as_in_memory(tmp_path, monkeypatch):
    frames, actions = dummy_world(300)
    attributes = dict(fps=7.0, action_names=["a", "b"])
    with DatasetWriter(tmp_path / "x.h5", (64, 64), with_actions=True, **attributes) as writer:
        writer.episode_starts = [0, 200]
        writer.append(frames[:200], actions[:200])
        writer.append(frames[200:], actions[200:])
    memory = open_small(tmp_path / "x.h5")
    monkeypatch.setattr(data_utils, "IN_MEMORY", 0)
    disk = open_small(tmp_path / "x.h5")
    assert isinstance(disk.frames, h5py.Dataset) and isinstance(memory.frames, np.ndarray)
    assert disk.fps == 7.0
    assert disk.action_names == ("a", "b")
    assert list(disk.episode_starts) == [0, 200]
    batches = [Clips(dataset, "train", 8, 4).batch(0) for dataset in (memory, disk)]
    for one, two in zip(*batches, strict=True):
        assert (one == two).all()
    assert (memory.frames == frames).all() and (memory.actions == actions).all()


def test_frames_alone_are_enough(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["frames"] = dummy_world(100)[0]
    frames, actions = Clips(open_small(tmp_path / "x.h5"), "train", 8).batch(0)
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
        # the view moves by (dy, dx): what was at (y + dy, x + dx) is now at (y, x)
        dy, dx = shifts[actions[i]]
        view = np.roll(frames[i], (-dy, -dx), axis=(0, 1))
        same = (view == frames[i + 1]).all(-1)[4:24, 4:60]  # away from the border and the sprite
        assert same.all()


def test_held_actions():
    actions = held_actions(np.random.default_rng(0), 10_000, 5)
    changes = np.flatnonzero(np.diff(actions)) + 1
    assert len(actions) == 10_000 and set(actions) == set(range(5))
    assert 4 < np.diff(changes).mean() < 7


def test_conversion_to_the_model_s_range_and_back():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    video = to_float(torch.from_numpy(frames))
    assert video.shape == (2, 3, 3, 4, 5) and video.min() >= -1 and video.max() <= 1
    assert (to_uint8(video).numpy() == frames).all()


def test_tokens_are_computed_once_per_dataset_and_anew_for_other_weights_or_frames(
    tmp_path, capsys
):
    path, calls = tmp_path / "game.h5", []

    def record(n):
        with DatasetWriter(path, (16, 16), with_actions=True) as writer:
            numbers = np.arange(n, dtype=np.uint8)[:, None, None, None]
            writer.append(numbers * np.ones((1, 16, 16, 3), np.uint8), np.arange(n) % 5)
            writer.episode_starts = [0, 30]

    def label(frames, true_actions):  # the token of a frame is its number
        calls.append(len(frames))
        return frames[:, :, 0, :4, 0].long(), true_actions

    def tokens(part, weights="a"):
        return TokenClips(Clips(open_small(path), part, 4, 6, seed=1), label, weights)

    record(100)
    train = tokens("train")
    # end to end, within episodes, without the last tenth
    starts = [*range(0, 27, 4), *range(30, 87, 4)]
    assert train.tokens[:, 0, 0].tolist() == starts
    chosen, actions = train.batch(3)
    assert chosen.shape == (6, 4, 4) and actions.shape == (6, 3) and chosen.dtype == torch.int64
    assert (actions == chosen[:, :-1, 0] % 5).all() and (chosen[:, 1:] - chosen[:, :-1] == 1).all()
    assert (train.frames([2])[0, :, 0, 0, 0] == torch.tensor([8, 9, 10, 11])).all()
    n = len(calls)
    assert torch.equal(tokens("train").batch(3)[0], chosen) and len(calls) == n  # from the file
    # the validation part has a file of its own
    assert len(tokens("val").tokens) == 2 and len(calls) == n + 1
    capsys.readouterr()
    tokens("train", "b")
    assert len(calls) == n + 2
    assert "game.train.tokens.h5 belongs to other weights" in capsys.readouterr().out
    record(104)
    assert len(tokens("train", "b").tokens) == 7 + 16 and len(calls) == n + 3
    (tmp_path / "game.train.tokens.h5").write_bytes(b"cut short")
    batches = [tokens("train", "b").batch(3)[0] for _ in range(2)]
    assert torch.equal(*batches) and len(calls) == n + 4
