import copy
import io
import itertools
import json
import re
import tarfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

from utils.cli import CheckpointError, UserError
from utils.hardening.steps import StepGuard

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from extras.vjepa_ac import doom, evaluate, planning, pretrain, probes, train, vpt
from extras.vjepa_ac.model import (
    MASKS,
    ActionPredictor,
    Encoder,
    MaskedPredictor,
    block_masks,
    load_encoder,
    losses,
    normalised,
    positions,
    rope_angles,
    sincos,
    std_and_rank,
)
from extras.vjepa_ac.vpt import Clips, Problems, ProcessVPT, Ticks, batches, find_shards, shuffle

FOLDER = Path(vpt.__file__).parent


def tick(dx=0, dy=0, yaw=0.0, pitch=0.0, keys=(), buttons=(), new=(), hotbar=0, gui=False, **more):
    """One line as VPT's recorder writes it."""
    return json.dumps(
        {
            "mouse": {
                "x": 640.0,
                "y": 360.0,
                "dx": dx,
                "dy": dy,
                "dwheel": 0.0,
                "buttons": list(buttons),
                "newButtons": list(new),
            },
            "keyboard": {
                "keys": [f"key.keyboard.{key}" for key in keys],
                "newKeys": [],
                "chars": "",
            },
            "isGuiOpen": gui,
            "hotbar": hotbar,
            "yaw": yaw,
            "pitch": pitch,
            "tick": 0,
        }
        | more
    )


def numbers(lines):
    """17 ticks → the two actions of 8 ticks each, in pixels and degrees."""
    return ProcessVPT(action_dim=38).actions(Ticks("\n".join(lines)), 0, 2)


# --- from lines to actions
def test_sums_differences_and_logical_or():
    lines = [tick(dx=i, dy=-i, yaw=0.15 * i * (i - 1) / 2, pitch=10 - i) for i in range(17)]
    lines[3], lines[7], lines[8], lines[15] = (
        tick(dx=i, dy=-i, yaw=0.15 * i * (i - 1) / 2, pitch=10 - i, keys=keys, buttons=buttons)
        for i, keys, buttons in (
            (3, ["w", "left.control"], [1]),
            (7, ["1", "space"], []),
            (8, ["d"], [0, 2]),
            (15, ["right.shift", "escape"], []),
        )
    )
    first, second = numbers(lines)
    assert first[0] == sum(range(8)) and second[0] == sum(range(8, 16)) and first[1] == -first[0]
    assert first[2] == pytest.approx(0.15 * sum(range(8)), abs=1e-4)  # the mouse turns the view
    assert first[3] == second[3] == -8

    def names(row):
        keys = {name for name, at in vpt.KEYS.items() if row[at]}
        return keys | {i for i in range(3) if row[25 + i]}

    assert names(first) == {"key.keyboard." + k for k in ("w", "left.control", "1", "space")} | {1}
    assert names(second) == {"key.keyboard." + k for k in ("d", "right.shift", "escape")} | {0, 2}


def test_yaw_goes_round_and_pitch_does_not():
    first, second = numbers(
        [tick(yaw=359.5 + 0.25 * i, pitch=-30) for i in range(8)]
        + [tick(yaw=-3.5, pitch=60)]
        + [tick(yaw=7.0, pitch=60)] * 8
    )
    assert first[2] == pytest.approx(-3) and second[2] == pytest.approx(10.5) and first[3] == 90
    over = numbers([tick(yaw=179.0)] * 8 + [tick(yaw=-179.0)] * 9)
    assert over[0][2] == pytest.approx(2)
    assert Ticks(tick(yaw=725.0)).state[0].tolist() == [5.0, 0.0]


def test_hotbar():
    slots = [2] * 6 + [5] * 3 + [0] * 8  # by the wheel after tick 5; by a key in tick 8
    lines = [tick(hotbar=slot, gui=i == 8) for i, slot in enumerate(slots)]
    lines[8] = tick(hotbar=5, keys=["1"], gui=True)
    first, second = numbers(lines)
    # "6" is added where the wheel was turned
    assert first[4:13].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert second[4:13].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]  # the real key, once
    # at the start
    assert first[28:37].argmax() == 2 and second[28:37].argmax() == 5
    assert first[28:37].sum() == 1
    assert (first[37], second[37]) == (0, 1)
    ticks = Ticks("\n".join([tick(hotbar=3), tick(hotbar=4)]))
    # at the change, and nothing before the first line
    assert ticks.inputs[:, 4:13].sum() == 1 and ticks.inputs[0, 4 + 4] == 1
    # it shows in line 8, so its cause lies in line 7
    late = numbers([tick(hotbar=1)] * 8 + [tick(hotbar=7)] * 9)
    assert late[0][4 + 7] == 1 and late[1][4:13].sum() == 0


def test_a_button_that_is_stuck_from_the_start():
    stuck = (
        [tick(buttons=[0], new=[0])]
        + [tick(buttons=[0, 1])] * 8
        + [tick(buttons=[0], new=[0])]
        + [tick(buttons=[0])] * 7
    )
    first, second = numbers(stuck)
    assert first[25:28].tolist() == [0, 1, 0] and second[25] == 1
    assert numbers([tick(buttons=[0], new=[])] * 17)[0][25] == 1


def test_layouts_shapes_and_statistics():
    rng = np.random.default_rng(0)
    lines = [
        tick(dx=int(rng.integers(-9, 9)), yaw=float(i), keys=["w"] * (i % 2)) for i in range(61)
    ]
    ticks, frames = Ticks("\n".join(lines)), [np.zeros((32, 32, 3), np.uint8)] * 16
    for D in (13, 36, 38):
        sample = ProcessVPT(size=32, action_dim=D)(frames, ticks, 0)
        assert sample["video"].shape == (16, 3, 32, 32)
        assert sample["actions"].shape == (7, D) and sample["states"].shape == (8, 2)
        assert sample["actions"].dtype == np.float32
        assert (sample["actions"][:, 13] == 1).all() if D > 13 else True  # w
    full = ProcessVPT(size=32, action_dim=38)(frames, ticks, 0)["actions"]
    assert np.array_equal(
        ProcessVPT(size=32, action_dim=36)(frames, ticks, 0)["actions"],
        np.delete(full, [24, 37], axis=1),
    )
    assert np.array_equal(full[:, 2], np.full(7, 8.0, np.float32))
    scales = ([1, 0, 8, 0, 5, 0], [2, 1, 4, 1, 10, 1])
    scaled = ProcessVPT(size=32, statistics=scales)(frames, ticks, 0)
    assert np.allclose(scaled["actions"][:, 0], (full[:, 0] - 1) / 2)
    assert np.allclose(scaled["actions"][:, 2], 0)
    assert np.allclose(scaled["states"][:, 0], (np.arange(0, 64, 8) - 5) / 10)
    for wrong, message in (
        (dict(fps=7), "fps must divide 20"),
        (dict(action_dim=14), "--action-dim must be one of 13, 36, 38, got 14"),
    ):
        with pytest.raises(UserError, match=message):
            ProcessVPT(**wrong)


# --- shards
def numbered_ticks(n, first=0):
    """Pictures and lines that encode their own number.

    The picture has it in twelve large black or white fields, the line in dx.
    """
    for i in range(first, first + n):
        bits = np.array([255 * (i >> b & 1) for b in range(12)], np.uint8).reshape(3, 4)
        picture = cv2.resize(bits, (64, 48), interpolation=cv2.INTER_NEAREST)
        line = json.loads(tick(dx=i, yaw=float(i % 360)))
        yield np.repeat(picture[..., None], 3, axis=2), line


def number_of(frame):
    fields = cv2.resize(frame, (4, 3), interpolation=cv2.INTER_AREA)[..., 0].flatten()
    return sum(int(x > 127) << b for b, x in enumerate(fields))


def write_shard(path, *recordings, extra=()):
    with tarfile.open(path, "w") as tar:
        for name, n, first in recordings:
            doom.write_recording(tar, name, numbered_ticks(n, first))
        for name, content in extra:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return [
        write_shard(
            folder / f"s-{i}.tar",
            *((f"r{i}{j}", 130 + 10 * j, 1000 * i + 300 * j) for j in range(3)),
        )
        for i in range(3)
    ]


def test_pictures_and_lines_stay_in_step(shards):
    process = ProcessVPT(size=32, action_dim=38)
    clips = list(Clips(shards[:1], process, every=10, buffer=0, epochs=1))
    assert len(clips) == 7 + 8 + 9
    for clip in clips:
        seen = [number_of(frame) for frame in clip["video"].transpose(0, 2, 3, 1)]
        assert seen == list(range(seen[0], seen[0] + 61, 4))
        assert clip["actions"][:, 0].tolist() == [
            sum(range(seen[0] + 8 * k, seen[0] + 8 * k + 8)) for k in range(7)
        ]
        assert np.allclose(clip["states"][:, 0], vpt.wrap(np.array(seen[::2]) % 360.0))


def test_a_mirrored_clip_is_a_clip_of_the_mirrored_game(shards):
    rng = np.random.default_rng(1)
    frames, swap = list(rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)), {"a": "d", "d": "a"}
    played = [
        dict(
            dx=int(rng.integers(-9, 9)),
            dy=i,
            yaw=3.0 * i,
            pitch=i / 2,
            keys=[str(rng.choice(["a", "d", "w"]))],
            buttons=[0],
            hotbar=2,
        )
        for i in range(61)
    ]
    other = [
        {
            **line,
            "dx": -line["dx"],
            "yaw": -line["yaw"],
            "keys": [swap.get(key, key) for key in line["keys"]],
        }
        for line in played
    ]
    original = Ticks("\n".join(tick(**line) for line in played))
    swapped = Ticks("\n".join(tick(**line) for line in other))
    flipped = [frame[:, ::-1] for frame in frames]
    scales = ([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7])
    for D in (13, 38):
        process = ProcessVPT(size=32, action_dim=D, statistics=scales)
        mirrored = process(frames, original, 0, mirrored=True)
        expected = process(flipped, swapped, 0)
        assert all(np.allclose(mirrored[name], expected[name], atol=1e-5) for name in expected)

    def some(mirror):
        settings = dict(every=10, buffer=3, epochs=1, mirror=mirror)
        clips = Clips(shards[:1], ProcessVPT(size=32), **settings)
        return [clip["video"][0, 0] for clip in clips]

    plain, half, all_of_them = some(0.0), some(0.5), some(1.0)
    assert all(np.array_equal(a, b[:, ::-1]) for a, b in zip(plain, all_of_them, strict=True))
    turned = [np.array_equal(a, b[:, ::-1]) for a, b in zip(plain, half, strict=True)]
    assert 0.2 < np.mean(turned) < 0.8
    assert all(t or np.array_equal(a, b) for t, a, b in zip(turned, plain, half, strict=True))


def firsts(stream):
    found = []
    for batch in stream:
        frames = batch["video"][:, 0].permute(0, 2, 3, 1).numpy()
        pairs = zip(batch["name"], frames, strict=True)
        found += [(name, number_of(frame)) for name, frame in pairs]
    return found


def test_each_clip_comes_once_however_many_read_it(shards, monkeypatch):
    def clips(**more):
        return Clips(shards, ProcessVPT(size=32), epochs=1, every=20, **more)

    alone = sorted(firsts(batches(clips(buffer=0), 4, 0, drop_last=False)))
    assert len(alone) == len(set(alone)) == 3 * (4 + 4 + 5)
    assert sorted(firsts(batches(clips(buffer=0), 4, 3, drop_last=False))) == alone
    mixed = firsts(batches(clips(buffer=5, seed=1), 4, 2, drop_last=False))
    names = [name for name, _ in mixed]
    assert len(mixed) == len(set(mixed)) and names != sorted(names)
    parts = []
    for r in range(3):  # three processes
        monkeypatch.setattr(vpt, "rank", lambda r=r: r)
        monkeypatch.setattr(vpt, "n_ranks", lambda: 3)
        parts += firsts(batches(clips(buffer=0), 4, 0, drop_last=False))
    assert sorted(parts) == alone
    monkeypatch.setattr(vpt, "n_ranks", lambda: 6)
    with pytest.raises(UserError, match="3 shards for 6 readers; use fewer --workers"):
        list(clips())


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_two_readers_resume_with_the_one_whose_turn_it_is(shards, stopped_after):
    def stream(passed=None, n_batches=0):
        settings = dict(every=20, buffer=5, seed=3, mirror=0.5)
        clips = Clips(shards, ProcessVPT(size=32), passed=passed, n_batches=n_batches, **settings)
        return batches(clips, 2, workers=2)

    unbroken = list(itertools.islice(stream(), 6))
    passed = {str(int(b["worker"][0])): int(b["position"][-1]) for b in unbroken[:stopped_after]}
    resumed = itertools.islice(stream(passed, stopped_after), 6 - stopped_after)
    for one, two in zip(unbroken[stopped_after:], resumed, strict=True):
        assert one["name"] == two["name"] and torch.equal(one["position"], two["position"])
        assert torch.equal(one["video"], two["video"])


def test_an_angle_stays_in_its_range_when_left_and_right_are_swapped(shards):
    name, mp4, text = next(vpt.recordings(shards[0], Problems(100)))
    ticks = Ticks(text, name, Problems(100))
    ticks.state[:] = (-180.0, 5.0)
    frames = [np.zeros((32, 32, 3), np.uint8)] * 16
    state = ProcessVPT(size=32, action_dim=38)(frames, ticks, 0, mirrored=True)["states"]
    assert np.allclose(state, (-180.0, 5.0))


def test_the_interval_of_a_share_is_wilsons():
    # both ends solve (share - p)² = z²·p·(1 - p)/n
    for n_good, n in ((12, 20), (0, 20), (77, 100)):
        for p in planning.wilson_interval(n_good, n):
            assert (n_good / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)


def test_a_resumed_stream_continues_with_the_next_clip(shards):
    def stream(passed):
        settings = dict(every=20, buffer=7, seed=3, passed=passed)
        for clip in itertools.islice(Clips(shards, ProcessVPT(size=32), **settings), 90):
            number = number_of(clip["video"][0].transpose(1, 2, 0))
            yield clip["name"], number, clip["position"]

    whole = list(stream({}))
    assert len(set(whole[:50])) > 30 and whole[-1][2] == 90  # more than one epoch
    for cut in (1, 11, 47):
        rest = list(stream({"0": cut}))
        assert rest[: 90 - cut] == whole[cut:]
    mixed = list(shuffle(range(100), 10, np.random.default_rng(0)))
    assert sorted(mixed) == list(range(100)) and mixed != sorted(mixed)


class Damaged:
    """One good recording, and shards in which something is broken."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys, self.process = folder, capsys, ProcessVPT(size=32)
        extra = [("a.b-options.json", b"{}"), ("note.txt", b"")]
        self.good = write_shard(folder / "good.tar", ("a.b", 70, 0), extra=extra)
        with tarfile.open(self.good) as tar:
            self.mp4, lines = (tar.extractfile(f"a.b.{kind}").read() for kind in ("mp4", "jsonl"))
        self.lines = lines.decode().splitlines()
        self.jsonl = "\n".join(self.lines).encode()

    def read(self, path, limit=100):
        settings = dict(every=4, buffer=0, epochs=1, max_problems=limit)
        clips = list(Clips([str(path)], self.process, **settings))
        return [clip["name"] for clip in clips], self.capsys.readouterr().err

    def shard(self, *members):
        """A shard of these members, followed by a good recording called z."""
        members = [*members, ("z.mp4", self.mp4), ("z.jsonl", self.jsonl)]
        return Path(write_shard(self.folder / "bad.tar", extra=members))

    def with_line(self, i, text):
        return "\n".join([*self.lines[:i], text, *self.lines[i + 1 :]]).encode()


@pytest.fixture
def damaged(tmp_path, capsys):
    return Damaged(tmp_path, capsys)


def test_broken_files_and_lines_are_counted_named_and_left_out(damaged):
    mp4 = damaged.mp4
    names, said = damaged.read(damaged.good)
    assert names == ["a.b"] * 3 and said == ""
    for jsonl, n, message in [
        ("\n".join(damaged.lines[:60]).encode(), 0, "skipped x: 71 frames, but 60 lines"),
        # only the clips that need this line are lost
        (
            damaged.with_line(62, "{"),
            1,
            "skipped line 63 of x.jsonl: a line that is no line of VPT",
        ),
        (damaged.with_line(62, tick(yaw=float("nan"))), 1, "line 63 of x.jsonl"),
        (damaged.with_line(62, tick(hotbar=9)), 1, "line 63 of x.jsonl"),
        (damaged.with_line(62, tick(hotbar=[1])), 1, "line 63 of x.jsonl"),
        (damaged.with_line(62, "null"), 1, "line 63 of x.jsonl"),
        (
            damaged.with_line(62, tick(keys=["f13", "w"])),
            3,
            "skipped key.keyboard.f13: an unknown key",
        ),
        (damaged.with_line(62, tick(mouse=None, keyboard=None)), 3, ""),
    ]:
        names, said = damaged.read(damaged.shard(("x.mp4", mp4), ("x.jsonl", jsonl)))
        assert names == ["x"] * n + ["z"] * 3, (message, said)
        assert message in said and said.count("\n") == bool(message), (message, said)
    for members, message in [
        ([("x.mp4", mp4[:2000]), ("x.jsonl", b"")], "skipped x: "),
        ([("x.mp4", b""), ("x.jsonl", b"{}")], "skipped x: its video cannot be read"),
        ([("x.mp4", mp4)], "it has no jsonl beside it"),
        ([("x.jsonl", b"{}")], "it has no mp4 beside it"),
    ]:
        names, said = damaged.read(damaged.shard(*members))
        assert names == ["z"] * 3 and message in said, (message, said)


def test_a_damaged_tar_is_read_up_to_the_damage(damaged, tmp_path):
    path = damaged.shard(("x.mp4", damaged.mp4), ("x.jsonl", damaged.jsonl))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        at, content = tar.getmember("z.mp4").offset, tar.getmember("z.jsonl").offset_data
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: content + 10])
    names, said = damaged.read(cut)
    assert names == ["x"] * 3
    assert f"skipped the rest of {cut}: the tar ends early or is damaged" in said
    # between members, in a header, a wrong header
    wrong_header = whole[: at + 150] + b"#" + whole[at + 151 :]
    for content in (whole[:at], whole[: at + 100], wrong_header):
        cut.write_bytes(content)
        names, said = damaged.read(cut)
        assert names == ["x"] * 3 and "the tar ends early or is damaged" in said, said


def test_too_many_problems_stop_the_reader(damaged, tmp_path):
    (tmp_path / "none.tar").write_bytes(b"no tar")
    many = damaged.shard(*((f"x{i}.mp4", damaged.mp4) for i in range(5)))
    stream = Clips([str(many)], damaged.process, max_problems=3)
    for call, message in [
        (lambda: damaged.read(many, limit=3), "more than 3 problems in the recordings"),
        (
            lambda: list(batches(stream, 2, 1)),
            "^more than 3 problems in the recordings.*--max-problems$",
        ),
        (lambda: damaged.read(tmp_path / "none.tar"), "not one clip of 61 ticks"),
        (lambda: find_shards([]), "the list of shards is empty"),
        (lambda: find_shards([str(tmp_path / "*.tgz")]), "no shard is called .*tgz"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert len(find_shards([str(tmp_path / "*.tar"), damaged.good])) == 3
    again = Problems(2)
    for _ in range(9):  # each epoch says the same
        again.add("a line", "line 3 of x")
    assert again.counts.total() == 1


def test_a_picture_that_the_decoder_leaves_out_ends_the_video(tmp_path):
    class Capture:
        times = iter([0, 50, 100, 200, 250])  # the fourth frame is missing

        def grab(self):
            self.now = next(self.times)
            return True

        def get(self, what):
            return self.now

    video = vpt.Video(tmp_path / "none.mp4", 32)
    video.capture = Capture()
    assert [video.next() for _ in range(4)] == [True, True, True, False] and video.at == 2


def test_a_shard_is_never_held_whole(tmp_path):
    large = [
        (f"{i}.{kind}", bytes(n))
        for i in range(20)
        for kind, n in (("mp4", 2**20), ("jsonl", 9), ("zip", 2**20))
    ]
    shard = write_shard(tmp_path / "large.tar", extra=large)
    tracemalloc.start()
    assert sum(len(mp4) for _, mp4, _ in vpt.recordings(shard, Problems())) == 20 * 2**20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20  # of 40


class FakeGame:
    """A game that turns with the mouse and counts its pictures."""

    def __init__(self):
        self.i, self.yaw, self.slot = 0, 170.0, 0

    def observe(self):
        return next(numbered_ticks(1, self.i))[0], {
            "yaw": self.yaw,
            "pitch": 0.0,
            "position": (float(self.i), 0.0, 0.0),
            "hotbar": self.slot,
        }

    def step(self, inputs):
        self.i += 1
        self.yaw += 0.15 * inputs["dx"]
        self.slot = next((int(key) - 1 for key in inputs["keys"] if key in "1234567"), self.slot)


def test_the_recorder_writes_what_the_reader_reads(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        player = doom.Player(np.random.default_rng(0))
        assert doom.write_recording(tar, "d", doom.play(FakeGame(), player, 400)) == 400
    with tarfile.open(tmp_path / "d.tar") as tar:
        lines = [json.loads(line) for line in tar.extractfile("d.jsonl")]
    public = {
        "mouse",
        "keyboard",
        "isGuiOpen",
        "isGuiInventory",
        "hotbar",
        "yaw",
        "pitch",
        "xpos",
        "ypos",
        "zpos",
        "tick",
        "milli",
        "inventory",
        "serverTick",
        "serverTickDurationMs",
        "stats",
    }
    assert set(lines[0]) == public and set(lines[0]["mouse"]) == {
        "x",
        "y",
        "dx",
        "dy",
        "scaledX",
        "scaledY",
        "dwheel",
        "buttons",
        "newButtons",
    }
    turned = np.diff([line["yaw"] for line in lines])
    assert (
        np.allclose(turned, [0.15 * line["mouse"]["dx"] for line in lines[:-1]], atol=1e-4)
        and np.abs(turned).max() > 2
    )
    process = ProcessVPT(size=32, action_dim=38)
    for clip in Clips([str(tmp_path / "d.tar")], process, every=50, buffer=0, epochs=1):
        first = number_of(clip["video"][0].transpose(1, 2, 0))
        assert np.allclose(clip["actions"][:, 2], 0.15 * clip["actions"][:, 0], atol=1e-3)
        held = [
            any("key.keyboard.w" in line["keyboard"]["keys"] for line in lines[k : k + 8])
            for k in range(first, first + 56, 8)
        ]
        assert clip["actions"][:, 13].tolist() == held
    digits = [key[-1] for line in lines for key in line["keyboard"]["keys"] if key[-1].isdigit()]
    assert digits and [line["hotbar"] for line in lines][-1] == int(digits[-1]) - 1


def test_doom_turns_looks_and_walks_by_its_inputs():
    vizdoom = pytest.importorskip("vizdoom")
    game = doom.Doom("my_way_home", 0)
    game.reset(7)
    picture, start = game.observe()
    assert picture.shape == (360, 640, 3)
    for _ in range(40):
        game.step({"dx": 10, "dy": 4})
    _, turned = game.observe()
    assert turned["yaw"] - start["yaw"] == pytest.approx(60, abs=0.5) and turned[
        "pitch"
    ] == pytest.approx(24, abs=0.5)  # right and down
    game.step({"keys": ["3"]})
    assert game.observe()[1]["hotbar"] == 2
    for _ in range(30):
        game.step({})
    assert game.game.get_game_variable(vizdoom.GameVariable.SELECTED_WEAPON) == 3
    game.reset(7)
    again, _ = game.observe()
    assert np.array_equal(again, picture)  # the same initial view
    for _ in range(10):
        game.step({"keys": ["w"]})
    assert np.abs(np.subtract(game.observe()[1]["position"], start["position"])).max() > 20
    game.close()


# --- model
def small_encoder():
    torch.manual_seed(0)
    encoder = Encoder(32, 48, 2, 2)
    for p in encoder.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return encoder


def small_predictor(action_dim=13):
    torch.manual_seed(0)
    predictor = ActionPredictor(2, 48, action_dim, 48, 2, 2)
    for p in predictor.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return predictor


def test_sizes_are_the_public_ones(shards):
    with torch.device("meta"):
        encoder = Encoder()
        assert (
            len(list(encoder.parameters())) == 292
            and round(sum(p.numel() for p in encoder.parameters()) / 1e5) == 3039
        )  # ViT-L/16, 303.9 M
        predictor = ActionPredictor(16)
    assert (
        len(predictor.blocks) == 24
        and predictor.blocks[0].attn.qkv.in_features == 1024
        and predictor.blocks[0].attn.heads == 16
    )
    args = ["--data", shards[0], "--out", "y"]
    cfg = pretrain.parse(train.TrainConfig, "train", "", args)
    sizes = (cfg.num_frames, cfg.fps, cfg.batch_size, cfg.learning_rate, cfg.size)
    assert sizes == (16, 5, 8, 4.25e-4, "vit-l")
    args += ["--size", "nano", "--batch-size", "3"]
    small = pretrain.parse(train.TrainConfig, "train", "", args)
    assert (small.batch_size, small.optimizer, cfg.optimizer) == (3, "muon", "adamw")


def public_weights(D):
    """The public layout with random weights."""
    torch.manual_seed(0)
    shapes = {"norm": (64,), "patch_embed.proj": (64, 3, 2, 16, 16)}
    for i in range(3):
        shapes |= {
            f"blocks.{i}.norm1": (D,),
            f"blocks.{i}.norm2": (D,),
            f"blocks.{i}.attn.qkv": (3 * D, D),
            f"blocks.{i}.attn.proj": (D, D),
            f"blocks.{i}.mlp.fc1": (4 * D, D),
            f"blocks.{i}.mlp.fc2": (D, 4 * D),
        }
    weights = {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    return weights | {f"{name}.bias": torch.randn(shape[0]) * 0.1 for name, shape in shapes.items()}


def public_encoder(weights, video, D, rope):
    """The public encoder, with its convolution and rotation computed in another way."""

    def norm(x, name):
        return F.layer_norm(x, (D,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    # channel 2i and 2i + 1 of each axis' 20, with angles as the public code lines them up
    def turned(y):
        z = y.clone()
        for axis, c in itertools.product(range(3), range(20)):
            angle = positions(2, 2, 2)[:, axis] / 10000 ** (c % 10 / 10)
            partner = -y[..., 20 * axis + c + 1] if c % 2 == 0 else y[..., 20 * axis + c - 1]
            z[..., 20 * axis + c] = y[..., 20 * axis + c] * angle.cos() + partner * angle.sin()
        return z

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = ((video / 255 - mean) / std).transpose(1, 2)
    kernel, bias = (weights[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
    x = F.conv3d(x, kernel, bias, (2, 16, 16)).flatten(2).transpose(1, 2)
    if not rope:
        x = x + sincos(positions(2, 2, 2), D)
    for i in range(3):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(D, dim=-1)
        q, k = (turned(q), turned(k)) if rope else (q, k)
        x = x + linear((q @ k.transpose(1, 2) / 8).softmax(-1) @ v, f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")


@pytest.mark.parametrize("rope", [True, False])
def test_public_checkpoints_load(rope, tmp_path):
    D = 64
    weights = public_weights(D)
    saved = weights | {"pos_embed": torch.zeros(1, 2048, D)}
    public = {f"module.backbone.{name}": weight for name, weight in saved.items()}
    other = {name: weight + 1 for name, weight in public.items()}
    content = {"encoder": other, "target_encoder": public, "epoch": 3, "opt": {}}
    torch.save(content, tmp_path / "v.pt")
    encoder = load_encoder(tmp_path / "v.pt", *[] if rope else ["sinusoid"])
    assert encoder.kind == ("rotary-public" if rope else "sinusoid")
    assert encoder.blocks[0].attn.heads == 1
    assert all(torch.equal(weight, weights[name]) for name, weight in encoder.state_dict().items())
    video = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    expected = public_encoder(weights, video, D, rope)
    assert torch.allclose(encoder(video), expected, atol=1e-3)
    torch.save({"encoder": {"x": torch.zeros(1)}}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="bad.pt is no public V-JEPA checkpoint"):
        load_encoder(tmp_path / "bad.pt")


def test_positions():
    """Rotary angles as the public code has them.

    Per axis 20 of 64 channels, frequencies repeated, and four channels left alone.
    """
    angles = rope_angles(torch.tensor([[3, 5, 7]]), 64, public=True)[0]
    for axis, place in enumerate((3, 5, 7)):
        part = [place / 10000 ** (k / 10) for k in range(10)]
        assert torch.allclose(angles[20 * axis : 20 * axis + 20], torch.tensor(part + part))
    assert (angles[60:] == 0).all()
    assert rope_angles(torch.tensor([[3, 5, 7]]), 64)[0, 20:24].tolist() == pytest.approx(
        [5, 5, 5 / 10000**0.1, 5 / 10000**0.1]
    )
    assert positions(2, 3, 4)[17].tolist() == [1, 1, 1]
    table = sincos(positions(8, 2, 2), 48)
    assert table.shape == (32, 48) and len({tuple(row.tolist()) for row in table}) == 32
    encoder = small_encoder()
    video = torch.randint(0, 256, (1, 4, 3, 32, 32), dtype=torch.uint8)
    moved = encoder.apply_blocks(
        torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(1)), positions(1, 2, 2)
    )
    later = encoder.apply_blocks(
        torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(1)),
        positions(1, 2, 2) + torch.tensor([2, 0, 0]),
    )
    other = encoder.apply_blocks(
        torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(1)),
        positions(1, 2, 2).flip(1),
    )
    assert torch.allclose(moved, later, atol=1e-5) and not torch.allclose(
        moved, other, atol=1e-3
    )  # rotary: only distances count
    shown = torch.tensor([[1, 4, 6]])
    assert encoder(video, shown).shape == (1, 3, 48)
    everything = torch.arange(8)[None]
    assert torch.allclose(encoder(video, everything), encoder(video), atol=1e-5)


def test_no_feature_has_seen_a_later_frame():
    """Checked by gradients, from pixels to the predictor's inputs.

    The clip encoded at once, as the reference text does it, would leak.
    """
    encoder = small_encoder()
    pixels = torch.rand(1, 6, 3, 32, 32) * 255
    pixels.requires_grad_()
    features = encoder.each_tubelet(pixels)  # (1, 3, 4, 48)
    for t in range(3):
        (grad,) = torch.autograd.grad(
            features[:, t].square().sum() + features[:, t].sum(), pixels, retain_graph=True
        )
        seen = grad.abs().sum(dim=(0, 2, 3, 4)) > 0
        assert seen.tolist() == [i // 2 == t for i in range(6)]
    at_once = normalised(encoder(pixels)).view(1, 3, 4, 48)
    (grad,) = torch.autograd.grad(at_once[:, 0, 0, 0], pixels)
    assert grad[:, 4:].abs().sum() > 0


def test_the_predictor_sees_no_future_frame_action_or_state():
    predictor = small_predictor()
    features, actions, states = (
        torch.randn(1, 4, 4, 48),
        torch.randn(1, 4, 13),
        torch.randn(1, 4, 2),
    )
    for x in (features, actions, states):
        x.requires_grad_()
    out = predictor(features, actions, states)
    assert out.shape == features.shape
    for t in range(4):
        grads = torch.autograd.grad(
            out[:, t, 1, :7].sum(), (features, actions, states), retain_graph=True
        )
        for grad in grads:
            influence = grad.flatten(2).abs().sum(dim=(0, 2))
            assert (influence[: t + 1] > 0).all() and (influence[t + 1 :] == 0).all()
    places = torch.autograd.grad(out[:, 0, 0, 3], features)[0][0, 0].abs().sum(-1)
    assert (places > 0).all()  # within a tubelet everything sees everything


def test_cached_tubelets_are_not_encoded_again():
    encoder, encoded = small_encoder(), []
    model = train.ActionTraining(encoder, small_predictor(), 2, 1, remember=4)
    encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    video = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    # 2 clips of 3 tubelets, 4 different ones each time
    clips = [torch.stack([video[i : i + 6], video[i + 2 : i + 8]]) for i in (0, 2, 10)]
    for clip in clips:
        assert torch.allclose(model.features(clip), encoder.each_tubelet(clip), atol=1e-5)
    assert encoded[::2] == [4, 1, 4]  # the second time one is new
    assert len(model.known) == 4
    actions, states = torch.randn(2, 2, 13), torch.randn(2, 3, 2)
    plain = train.ActionTraining(encoder, model.predictor, 2, 1)
    assert torch.allclose(
        torch.stack(model(clips[2], actions, states)),
        torch.stack(plain(clips[2], actions, states)),
        atol=1e-5,
    )


@torch.no_grad()
def test_rollout_and_losses_against_a_hand_unrolled_one():
    predictor = small_predictor()
    h, a, s = normalised(torch.randn(2, 5, 4, 48)), torch.randn(2, 4, 13), torch.randn(2, 5, 2)
    z1 = predictor(h[:, :1], a[:, :1], s[:, :1])[:, -1]
    z2 = predictor(torch.stack([h[:, 0], z1], 1), a[:, :2], s[:, :2])[:, -1]
    z3 = predictor(torch.stack([h[:, 0], z1, z2], 1), a[:, :3], s[:, :3])[:, -1]
    by_hand = torch.stack([z1, z2, z3], 1)
    assert torch.allclose(predictor.rollout(h[:, :1], a, s, 3), by_hand, atol=1e-5)
    assert torch.allclose(z1, F.layer_norm(z1, (48,)), atol=1e-3)
    forced, rolled = losses(predictor, h, a, s, auto_steps=3)
    assert rolled == pytest.approx(float((by_hand - h[:, 1:4]).abs().mean()), rel=1e-4)
    one_by_one = [predictor(h[:, :t], a[:, :t], s[:, :t])[:, -1] for t in range(1, 5)]
    assert forced == pytest.approx(
        float((torch.stack(one_by_one, 1) - h[:, 1:]).abs().mean()), rel=1e-4
    )
    assert losses(predictor, h, a, s, auto_steps=1)[1] == pytest.approx(
        float((z1 - h[:, 1]).abs().mean()), rel=1e-4
    )
    squared = losses(predictor, h, a, s, auto_steps=1, exponent=2)[1]
    assert squared == pytest.approx(float(((z1 - h[:, 1]) ** 2).mean()) / 2, rel=1e-4)
    grown = predictor.rollout(h[:, :2], a, s, 2)
    assert torch.allclose(grown[:, 0], predictor(h[:, :2], a[:, :2], s[:, :2])[:, -1], atol=1e-5)


def test_masks_and_pretraining():
    torch.manual_seed(0)
    for n_blocks, area in MASKS:
        shown, hidden = block_masks(6, 3, 8, n_blocks, area)
        for a, b in zip(shown, hidden, strict=True):
            both = torch.cat([a, b])
            assert len(both.unique()) == len(both) <= 192
            for part in (a, b):
                places = [set((part[part // 64 == t] % 64).tolist()) for t in range(3)]
                assert places[0] == places[1] == places[2]  # blocks go through the whole clip
        assert len({tuple(row.tolist()) for row in hidden}) > 1  # other places in each clip
        assert 0 < shown.shape[1] < 0.6 * 192
    model = pretrain.Pretraining(32, 2, (48, 2, 2), (48, 1, 2))
    video = torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8)
    loss, targets = model(video)
    loss.backward()
    assert all(p.grad is None for p in model.target.parameters()) and all(
        p.grad is not None for p in model.encoder.parameters()
    )
    before, after = copy.deepcopy(model.target), copy.deepcopy(model.encoder)
    for p in after.parameters():
        p.data += 1
    model.encoder = after
    model.update_target(0.75)
    three = (before.parameters(), model.target.parameters(), after.parameters())
    for old, new, own in zip(*three, strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * own, atol=1e-6)
    predictor, encoder = MaskedPredictor(2, 2, 48, 48, 1, 2), small_encoder()
    shown, hidden = torch.tensor([[0, 4]]), torch.tensor([[1, 2, 5]])
    changed = video[:1].clone()
    changed[:, :2, :, :16, 16:] = 0  # token 1, which is hidden
    x = [predictor(encoder(v, shown), shown, hidden, 0) for v in (video[:1], changed)]
    assert torch.equal(*x)


def test_collapse_shows():
    torch.manual_seed(0)
    std, rank = std_and_rank(torch.randn(64, 20, 16))
    assert std == pytest.approx(1, abs=0.1) and 15 < rank <= 16
    place = torch.randn(20, 16).expand(64, 20, 16)  # says where, never what
    assert std_and_rank(place + 1e-4 * torch.randn(64, 20, 16))[0] < 1e-3
    assert std_and_rank(place) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-3))
    assert std_and_rank(torch.randn(64, 20, 1) * torch.randn(16))[1] == pytest.approx(1, abs=0.01)


# --- planning, probes and both training scripts
def test_planning_finds_the_action():
    """Where the feature is the sum of all turns, the plan is the turn that is still missing."""

    class Sum:
        def rollout(self, features, actions, states, steps):
            return (features[:, :1] + actions[:, :, 2].cumsum(1)[:, -steps:, None, None]).expand(
                -1, -1, 4, 48
            )

    process = ProcessVPT()
    past = np.zeros((1, 38), np.float32)
    mouse, keys = planning.plan(
        Sum(),
        process,
        torch.zeros(1, 1, 4, 48),
        np.zeros(2),
        past,
        torch.full((4, 48), 40.0),
        3,
        n=64,
        iterations=8,
    )
    assert 0.15 * 8 * mouse[:, 0].sum() == pytest.approx(40, abs=2) and mouse.shape == (3, 2)

    class Walk(Sum):
        def rollout(self, features, actions, states, steps):
            return (features[:, :1] + actions[:, :, 13].cumsum(1)[:, -steps:, None, None]).expand(
                -1, -1, 4, 48
            )

    full = ProcessVPT(action_dim=38)
    for wanted in (0, 3):  # keys, too
        mouse, keys = planning.plan(
            Walk(),
            full,
            torch.zeros(1, 1, 4, 48),
            np.zeros(2),
            past,
            torch.full((4, 48), float(wanted)),
            3,
            ["w"],
            n=32,
        )
        assert keys.sum() == wanted and keys.shape == (3, 1)
    actions = planning.actions_of(np.array([[10.0, 0.0]]), np.array([[True]]), ["w"], process)
    ticks = Ticks("\n".join([tick(dx=10, yaw=1.5 * i, keys=["w"]) for i in range(9)]))
    assert np.allclose(
        actions, process.actions(ticks, 0, 1), atol=1e-4
    )  # the same as of a recording


def test_imagined_states_follow_the_actions():
    class Spy:
        def rollout(self, features, actions, states, steps):
            self.seen = actions, states, steps
            return features

    spy, process = Spy(), ProcessVPT(action_dim=38, statistics=([0] * 6, [1, 1, 1, 1, 10, 10]))
    actions = np.zeros((1, 3, 38), np.float32)
    actions[..., 2] = 100
    planning.imagine(spy, process, torch.zeros(1, 2, 4, 48), np.array([0.0, 0.0]), actions)
    assert spy.seen[2] == 2 and torch.allclose(
        spy.seen[1][0, :, 0], torch.tensor([0, 10, -16, -6.0])
    )


def test_codes_are_joined_into_blocks_as_large_as_patches():
    codes = torch.arange(2 * 64 * 5).view(2, 1, 64, 5)  # two frames of 8 × 8 codes of 5 numbers
    quantizer = SimpleNamespace(indices_to_codes=lambda tokens: codes)
    tokenizer = SimpleNamespace(frame_size=(64, 64), encode=lambda _: None, quantizer=quantizer)
    for grid, k in ((4, 2), (2, 4), (8, 1), (16, 1), (6, 1)):
        x = probes.inputs_of(SimpleNamespace(grid=grid, each_tubelet=None), tokenizer)[
            "tokenizer codes"
        ](torch.zeros(1, 2, 3, 96, 96, dtype=torch.uint8))
        n = 8 // k
        assert x.shape == (1, 1, n * n, 10 * k * k)
        row, column = n - 1, 0  # the lower left corner
        block = codes[:, 0].view(2, 8, 8, 5)[
            :, row * k : (row + 1) * k, column * k : (column + 1) * k
        ]
        assert torch.equal(x[0, 0, row * n + column], block.flatten())


def recordings(tmp_path, monkeypatch, n_shards):
    """Record Doom shards, and set a model size that trains in seconds.

    → the options of both trainers.
    """
    pytest.importorskip("vizdoom")
    small = dict(size=64, encoder=(48, 1, 2), masked=(48, 1, 2), predictor=(48, 1, 2))
    monkeypatch.setitem(pretrain.SIZES, "nano", pretrain.SIZES["nano"] | small)
    monkeypatch.setattr(doom, "PLACES", ["my_way_home"])
    for name, seed in (("train", 0), ("test", 1)):
        for i in range(n_shards):
            doom.record_shard(str(tmp_path / name), seed, 200, 100, i)
    options = "--size nano --batch-size 4 --buffer 6 --every 8 --learning-rate 3e-3".split()
    return ["--data", str(tmp_path / "train-*.tar"), "--out", str(tmp_path / "out"), *options]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_encoder_is_frozen(out):
    """The encoder in action_predictor.pt is still the target encoder of pretrain.pt."""
    saved = torch.load(f"{out}/pretrain.pt")
    target = pretrain.Pretraining(**saved["model_args"])
    target.load_state_dict(saved["model"])
    encoder, _, _ = train.load_model(f"{out}/action_predictor.pt")
    pairs = zip(encoder.parameters(), target.target.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class StopAfterThree(StepGuard):
    """Acts as if the user pressed Ctrl-C in the third step."""

    def is_finite(self, step, *args, **more):
        self.log.stop.received = step == 2
        return super().is_finite(step, *args, **more)


@pytest.mark.slow
def test_from_recordings_to_a_report(tmp_path, monkeypatch):
    options = recordings(tmp_path, monkeypatch, n_shards=2)
    data, out = str(tmp_path / "train-*.tar"), str(tmp_path / "out")
    options_of_pretrain = [*options, "--n-updates", "4", "--num-frames", "4"]
    pretrain.main(options_of_pretrain)
    lines = lines_of(Path(out, "pretrain", "metrics.jsonl"))
    assert lines[-1]["step"] == 4 and lines[-1]["effective_rank"] > 1
    parts = str(tmp_path / "parts")
    with monkeypatch.context() as patch:  # stopped in the middle, and continued
        patch.setattr(pretrain, "StepGuard", StopAfterThree)
        pretrain.main([*options_of_pretrain, "--out", parts])
    assert torch.load(f"{parts}/pretrain.pt")["step"] == 3
    pretrain.main([*options_of_pretrain, "--out", parts, "--resume"])
    both = [torch.load(Path(folder, "pretrain.pt"))["model"] for folder in (out, parts)]
    assert all(torch.equal(weight, both[1][name]) for name, weight in both[0].items())

    again = [*options, "--encoder", f"{out}/pretrain.pt", "--action-dim", "38", "--workers", "2"]
    train.main([*again, "--n-updates", "20"])
    lines = lines_of(Path(out, "action_predictor", "metrics.jsonl"))
    assert lines[-1]["forced"] < lines[-1]["copy"] * 1.5
    saved = torch.load(f"{out}/action_predictor.pt")
    assert saved["passed"].keys() == {"0", "1"} and len(saved["process"]["statistics"][0]) == 6
    check_encoder_is_frozen(out)
    train.main([*again, "--n-updates", "20", "--resume"])  # nothing left to do
    evaluate_quickly(tmp_path, monkeypatch, data, out)


def evaluate_quickly(tmp_path, monkeypatch, data, out):
    def fit(*args, fit=probes.fit, **more):
        return fit(*args, **more | {"n_updates": 10})

    monkeypatch.setattr(probes, "fit", fit)
    monkeypatch.setattr(probes, "PLACES", ["my_way_home"])
    monkeypatch.setattr(probes.ground_covered, "__defaults__", (1, 6))
    path, test_data = f"{out}/action_predictor.pt", str(tmp_path / "test-*.tar")
    options = ["--checkpoint", path, "--data", data, "--test", test_data]
    report = evaluate.main([*options, "--trials", "1", "--json", str(tmp_path / "r.json")])
    written = json.loads((tmp_path / "r.json").read_text())
    assert evaluate.tables(written)[0].count("|") > 20 and (tmp_path / "r.png").exists()
    encoder, _, process = train.load_model(path)
    kinds = {"V-JEPA features": encoder.each_tubelet}
    test = evaluate.collect(find_shards([test_data]), process, kinds)
    h = test["V-JEPA features"].float()
    copied = float((h[:, 5] - h[:, 3]).abs().mean())
    assert report["prediction/copy/step_2"] == pytest.approx(copied, rel=0.02)
    assert report["planning/plan/success"] in (0.0, 1.0)
    assert report["reader/frames_per_second/every frame"] > 0
    assert 0 <= report["reader/share_of_training_waited"] <= 1  # also of a log of one line


def test_both_trainers_train_and_refuse_what_is_wrong(tmp_path, monkeypatch):
    options, out = recordings(tmp_path, monkeypatch, n_shards=1), str(tmp_path / "out")
    pretrain.main([*options, "--n-updates", "2", "--num-frames", "4"])
    again = [*options, "--encoder", f"{out}/pretrain.pt", "--action-dim", "38"]
    train.main([*again, "--n-updates", "20"])
    lines = lines_of(Path(out, "action_predictor", "metrics.jsonl"))
    assert lines[-1]["forced"] < lines[-1]["copy"] * 1.5
    check_encoder_is_frozen(out)
    for argv, message in [
        (["--data", "none.tar"], "no shard is called none.tar"),
        (["--num-frames", "15"], "--num-frames must be even, got 15"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--fps", "0"], "--fps must be positive, got 0"),
        (["--ema", "1"], "--ema must be at least 0 and below 1, got 1"),
    ]:
        with pytest.raises(UserError, match=message):
            pretrain.main([*options, *argv])
    x, other = ["--encoder", "x.pt"], ["--encoder", f"{out}/pretrain.pt"]
    missing = "no checkpoint at x.pt; make one with: python -m extras.vjepa_ac.pretrain"
    for argv, message in [
        ([], "give one of --encoder"),
        ([*x, "--auto-steps", "8"], "--auto-steps must lie in 1 to 7, with 16 frames; got 8"),
        (x, missing),
        ([*x, "--remember", "-1"], "--remember must not be negative, got -1"),
        ([*other, "--action-dim", "14"], "--action-dim must be one of 13, 36, 38, got 14"),
        (
            [*again, "--n-updates", "20", "--resume", "--every", "9"],
            "cannot resume .*: every was 8, now it is 9",
        ),
    ]:
        with pytest.raises((UserError, CheckpointError), match=message):
            train.main([*options, *argv])


def test_the_numbers_of_its_readme_are_those_of_the_result_file():
    text = " ".join((FOLDER / "README.md").read_text().split())
    path = FOLDER.parents[1] / "docs" / "results" / "vjepa_ac.json"
    report = json.loads(path.read_text())
    assert all(" ".join(table.split()) in text for table in evaluate.tables(report))

    def below(other, step=1):
        """By how many per cent the error is below another one."""
        predicted = report[f"prediction/predicted/step_{step}"]
        return 100 * (1 - predicted / report[f"prediction/{other}/step_{step}"])

    said = re.search(
        r"One tubelet ahead the error is (\d+ %) below .*? and (\d+ %) below .*?actions", text
    ).groups()
    assert said == tuple(f"{below(other):.0f} %" for other in ("copy", "other actions"))
    later = [below("other actions", step) for step in (2, 3, 4)]
    assert "four tubelets ahead it is {:.0f}, {:.0f} and {:.0f} % below".format(*later) in text
    assert f"took {report['minutes/total']:.1f} minutes" in text
    names = ("every frame", "every fourth frame")
    every, fourth = (report[f"reader/frames_per_second/{name}"] for name in names)
    assert f"{every:,.0f} frames per second" in text
    assert f"one in four, as in training, it passes {fourth:,.0f} frames per second" in text
