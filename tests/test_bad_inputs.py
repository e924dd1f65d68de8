"""Inputs that are broken, hostile or odd.

Each gets one line that names the value and the remedy. No code of theirs is run, and they take no
more memory than a sound file would.
"""

import base64
import hashlib
import io
import json
import math
import os
import pickle
import tarfile
import wave
import zipfile
from copy import deepcopy

from config import LatentActionConfig, parse_config
from utils.checkpoint import (
    build_model,
    fingerprint,
    load_checkpoint,
    load_world,
    save_checkpoint,
)
from utils.cli import CheckpointError, UserError
from utils.hardening.files import MARK

import cv2
import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint import saved
from test_data_utils import film, open_small, write_video

from data_utils import Clips
from extras.vjepa_ac.vpt import Problems, Ticks, find_shards, recordings
from player.session import Session, read_run

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 40))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


def world_files():
    """The checkpoints of a small world that has learned nothing."""
    files = {stage: saved(stage) for stage in ("tokenizer", "lam", "dynamics")}
    files["dynamics"] |= dict(
        inputs={stage: fingerprint(files[stage]) for stage in ("tokenizer", "lam")},
        config=dict(steps=2, temperature=0.0),
        fps=15.0,
        start_frames=torch.zeros(2, 3, 16, 16, 3, dtype=torch.uint8),
        action_names=None,
    )
    return files


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for stage, checkpoint in world_files().items():
        save_checkpoint(folder / f"{stage}.pt", checkpoint)
    return load_world(folder)


def one_line(error):
    assert "\n" not in str(error) and "\x1b" not in str(error) and len(str(error)) < 1000
    return str(error)


# --- checkpoints -----------------------------------------------------------------------------
def sealed(content):
    """Bytes with a right checksum, as an attacker would make them."""
    return content + MARK + hashlib.sha256(content).digest()


def torch_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("world-model-was-here",)


class Greedy:
    """bytearray(300 MB): torch.load allows that call."""

    def __reduce__(self):
        return bytearray, (300_000_000,)


def views(checkpoint):
    """All weights are views of one small storage."""
    one = torch.zeros(max(weight.numel() for weight in checkpoint["model"].values()))
    for name, weight in checkpoint["model"].items():
        checkpoint["model"][name] = one[: weight.numel()].view(weight.shape)


def bomb():
    """A zip whose entries unpack to a thousand times their size."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(50_000_000))
    return file.getvalue()


def without(name):
    def change(checkpoint):
        del checkpoint[name]

    return change


def put(*way):
    """put("model_args", "embed_dim", 7): a change of one value deep in a checkpoint."""
    *names, last, value = way

    def change(checkpoint):
        for name in names:
            checkpoint = checkpoint[name]
        checkpoint[last] = value

    return change


def first_weight(value):
    def change(checkpoint):
        name = next(iter(checkpoint["model"]))
        checkpoint["model"][name] = value(checkpoint["model"][name])

    return change


def holds_itself(checkpoint):
    checkpoint["metrics"] = {"again": []}
    checkpoint["metrics"]["again"].append(checkpoint["metrics"])
    checkpoint["stage"] = "lamb"


RAW = {  # the bytes of dynamics.pt
    "empty": (lambda whole: b"", "does not end with a checksum"),
    "text": (lambda whole: b"hello", "does not end with a checksum"),
    "half": (lambda whole: whole[: len(whole) // 2], "does not end with a checksum"),
    "a bit flipped": (
        lambda whole: whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:],
        "its checksum is wrong",
    ),
    "no checksum": (lambda whole: whole[:-40], "does not end with a checksum"),
    "more behind it": (lambda whole: whole + b"x", "does not end with a checksum"),
    "a pickle": (
        lambda whole: sealed(pickle.dumps(Malicious())),
        "not a checkpoint of this project",
    ),
    "a hostile pickle": (
        lambda whole: sealed(
            torch_file({"stage": "dynamics", "model_args": {}, "model": Malicious()})
        ),
        "holds more than numbers and names",
    ),
    "a greedy pickle": (
        lambda whole: sealed(
            torch_file({"stage": "dynamics", "model_args": {}, "model": Greedy()})
        ),
        "holds more than numbers and names",
    ),
    "a whole module": (
        lambda whole: sealed(torch_file(torch.nn.Linear(2, 2))),
        "holds more than numbers and names",
    ),
    "a zip bomb": (lambda whole: sealed(bomb()), "would unpack to more than it is"),
    "a tensor": (
        lambda whole: sealed(torch_file(torch.zeros(3))),
        "not a checkpoint of this project",
    ),
    "a list": (lambda whole: sealed(torch_file([1, 2])), "not a checkpoint of this project"),
}
CHANGED = {  # of a sound dynamics.pt
    "no stage": (without("stage"), "no stage, no sizes or no weights|'stage'"),
    "a stage that is a number": (put("stage", 3), "stage is of the type int"),
    "another stage": (put("stage", "lam"), "a lam checkpoint, but a dynamics checkpoint"),
    "a stage of escape codes": (put("stage", "\x1b[2J"), "its stage is no name"),
    "sizes in a list": (put("model_args", [1, 2]), "model_args is of the type list"),
    "weights in a list": (put("model", [1, 2]), "model is of the type list"),
    "a weight of whole numbers": (first_weight(lambda w: w.long()), "is no weight"),
    "a complex weight": (first_weight(lambda w: w.to(torch.complex64)), "is no weight"),
    "a weight that is a text": (first_weight(lambda w: "zero"), "is no weight"),
    "a sparse weight": (first_weight(lambda w: w.to_sparse()), "holds more than numbers and names"),
    "a weight without storage": (
        first_weight(lambda w: torch.empty(w.shape, device="meta")),
        "holds more than numbers and names",
    ),
    "a weight that claims terabytes": (
        first_weight(lambda w: torch.zeros(1).expand(1 << 20, 1 << 20)),
        "claim more than is stored",
    ),
    "weights that share one storage": (views, "claim more than is stored"),
    "a weight too many": (
        put("model", "more", torch.zeros(2)),
        "do not fit the sizes .*more|do not fit the sizes",
    ),
    "a weight of another shape": (
        first_weight(lambda w: torch.zeros(3, 3)),
        "do not fit the sizes",
    ),
    "a negative size": (put("model_args", "embed_dim", -32), "embed_dim is -32"),
    "a huge size": (put("model_args", "embed_dim", 10**12), "embed_dim is 1000000000000"),
    "a huge size that may be": (put("model_args", "hidden_dim", 65536), "do not fit the sizes"),
    "a million layers": (put("model_args", "n_blocks", 1_000_000), "n_blocks is 1000000"),
    "too many layers": (put("model_args", "n_blocks", 20), "do not fit the sizes"),
    "no heads": (put("model_args", "n_heads", 0), "do not fit the sizes"),
    "seven heads": (put("model_args", "n_heads", 7), "n_heads 7 .* do not go together"),
    "no context": (put("model_args", "context_length", 1), "context_length 1 do not go together"),
    "a path as a size": (put("model_args", "embed_dim", "/etc/passwd"), "do not fit the sizes"),
    "an unknown size": (put("model_args", "wings", 2), "do not fit the sizes .*wings"),
    "a size is missing": (lambda c: c["model_args"].pop("levels"), "do not fit the sizes .*levels"),
    "an endless context": (put("model_args", "context_length", 1000), "context_length is 1000"),
    "no levels": (put("model_args", "levels", [0]), "do not fit the sizes"),
    "a hundred levels": (put("model_args", "levels", [60000] * 100), "do not fit the sizes"),
    "a grid of nothing": (put("model_args", "grid", [0, 0]), "do not fit the sizes"),
    "fps not a number": (put("fps", math.nan), "fps is nan"),
    "fps as text": (put("fps", "fast"), "fps is of the type str"),
    "first frames of floats": (
        put("start_frames", torch.zeros(2, 3, 16, 16, 3)),
        "start_frames are no frames",
    ),
    "no first frames": (
        put("start_frames", torch.zeros(0, 3, 16, 16, 3, dtype=torch.uint8)),
        "start_frames are no frames",
    ),
    "first frames of another size": (
        put("start_frames", torch.zeros(2, 3, 8, 8, 3, dtype=torch.uint8)),
        r"first frames of \[8, 8\], the tokenizer is for \[16, 16\]",
    ),
    "more names than actions": (put("action_names", list("abcdefg")), "names 7 actions but has 4"),
    "names that are numbers": (put("action_names", [1, 2]), "names 2 actions"),
    "a billion passes": (put("config", "steps", 10**9), "steps 1000000000"),
    "an infinite temperature": (put("config", "temperature", math.inf), "temperature inf"),
    "no settings": (without("config"), "has no config"),
    "of another tokenizer": (
        put("inputs", "tokenizer", "00000000"),
        "trained with tokenizer weights '00000000'",
    ),
    "it holds itself": (holds_itself, "a lamb checkpoint"),
}


@pytest.mark.parametrize("name", [*RAW, *CHANGED])
def test_bad_checkpoints(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    files, path = world_files(), tmp_path / "dynamics.pt"
    change, message = RAW.get(name) or CHANGED[name]
    if name in CHANGED:
        files["dynamics"] = deepcopy(files["dynamics"])
        change(files["dynamics"])
    for stage, checkpoint in files.items():
        save_checkpoint(tmp_path / f"{stage}.pt", checkpoint)
    if name in RAW:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as error:
        load_world(tmp_path)
    one_line(error.value)
    assert not os.path.exists("world-model-was-here")


BAD_ROW = {"action": 0, "label": "x", "share": "all", "direction": "", "moves": ""}
TABLES = ["", "{", "[]", '{"lam": 1}', '{"actions": [{"action": 0}]}', "[" * 100_000]
TABLES += [json.dumps({"lam": "x", "actions": [BAD_ROW]})]


@pytest.mark.parametrize("text", TABLES)
def test_bad_action_tables(world, tmp_path, text):
    for stage, checkpoint in world_files().items():
        save_checkpoint(tmp_path / f"{stage}.pt", checkpoint)
    (tmp_path / "actions.json").write_text(text)
    message = "actions.json is not an action table; mend it, or remove it"
    with pytest.raises(CheckpointError, match=message) as error:
        load_world(tmp_path)
    one_line(error.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4),
)


@fuzz
@given(
    stage=st.sampled_from(["tokenizer", "lam", "dynamics"]),
    name=st.sampled_from(sorted(saved("lam")["model_args"]) + ["levels", "grid"]),
    value=values,
)
def test_fuzz_checkpoint_sizes(tmp_path_factory, stage, name, value):
    checkpoint = saved(stage)
    checkpoint["model_args"][name] = value
    try:
        path = tmp_path_factory.mktemp("x") / f"{stage}.pt"
        save_checkpoint(path, checkpoint)
        build_model(load_checkpoint(path, stage))
    except CheckpointError as error:
        one_line(error)


@fuzz
@given(
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
    )
)
def test_fuzz_checkpoint_bytes(tmp_path_factory, places):
    """Damage under a right checksum reaches zip, pickle and weights.

    Nothing but a CheckpointError may come of it.
    """
    content = bytearray(torch_file(saved("dynamics")))
    for place, byte in places:
        content[int(place**4 * len(content))] = byte  # mostly in front, where the pickle is
    path = tmp_path_factory.mktemp("x") / "dynamics.pt"
    path.write_bytes(sealed(bytes(content)))
    try:
        build_model(load_checkpoint(path, "dynamics"))
    except CheckpointError as error:
        one_line(error)


# --- videos and HDF5 files -------------------------------------------------------------------
def h5(**datasets):
    """An HDF5 file with datasets, and attributes where the name begins with an underscore."""

    def write(path):
        with h5py.File(path, "w") as file:
            for name, value in datasets.items():
                if name.startswith("_"):
                    file.attrs[name[1:]] = value
                else:
                    file[name] = value

    return write


def frames(*shape):
    return np.ones(shape, np.uint8)


def never_written(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", (100_000_000, 64, 64, 3), "uint8", chunks=(1, 64, 64, 3))


def one_chunk(path):
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "frames",
            (20, 8, 8, 3),
            "uint8",
            chunks=(4_000_000, 8, 8, 3),
            maxshape=(None, 8, 8, 3),
            compression="gzip",
        )
        file["frames"].id.write_direct_chunk((0, 0, 0, 0), bytes(1_000_000))


def elsewhere(path):
    (path.parent / "secret").write_bytes(bytes(20 * 8 * 8 * 3))
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "frames",
            (20, 8, 8, 3),
            "uint8",
            external=[(str(path.parent / "secret"), 0, 20 * 8 * 8 * 3)],
        )


def virtual(path):
    h5(frames=frames(20, 8, 8, 3))(path.parent / "other.h5")
    layout = h5py.VirtualLayout((20, 8, 8, 3), "uint8")
    layout[:] = h5py.VirtualSource(str(path.parent / "other.h5"), "frames", (20, 8, 8, 3))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("frames", layout)


def link(kind):
    def write(path):
        h5(frames=frames(20, 8, 8, 3))(path.parent / "other.h5")
        with h5py.File(path, "w") as file:
            links = {
                "external": h5py.ExternalLink("other.h5", "/frames"),
                "soft": h5py.SoftLink("/there"),
            }
            file["frames"] = links[kind]

    return write


def group(path):
    with h5py.File(path, "w") as file:
        file.create_group("frames")


def cut(write, share=0.5):
    def cut_short(path):
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return cut_short


def bad_block(path):
    """The compressed frames are overwritten; the file's own structure is whole."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", data=noise, chunks=(40, 16, 16, 3), compression="gzip")
        place = file["frames"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    path.write_bytes(content)


def content(data):
    return lambda path: path.write_bytes(data)


def sound_only(path):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(16000))


CANVAS = b"GIF89a\x80>\x80>\x80\x00\x00\x00\x00\x00\xff\xff\xff,\x00\x00\x00\x00\x01\x00\x01"
CANVAS += b"\x00\x00\x02\x02D\x01\x00;"
DATASETS = {  # name of the file, how it is written, what is said
    "text": ("x.h5", content(b"hello"), "neither a video .* nor a readable HDF5 file"),
    "nothing": ("x.h5", content(b""), "neither a video .* nor a readable HDF5 file"),
    "an HDF5 file cut short": (
        "x.h5",
        cut(h5(frames=frames(50, 16, 16, 3))),
        "neither a video .* nor a readable HDF5 file",
    ),
    "a damaged block": ("x.h5", bad_block, "is damaged: not all of it can be read"),
    "no frames": ("x.h5", h5(pictures=frames(5, 8, 8, 3)), r"only \['pictures'\]"),
    "a group of frames": ("x.h5", group, "must hold a dataset `frames`"),
    "frames of floats": ("x.h5", h5(frames=np.zeros((5, 8, 8, 3))), r"has float64 \(5, 8, 8, 3\)"),
    "frames without colour": ("x.h5", h5(frames=frames(5, 8, 8)), r"has uint8 \(5, 8, 8\)"),
    "four channels": ("x.h5", h5(frames=frames(5, 8, 8, 4)), r"has uint8 \(5, 8, 8, 4\)"),
    "channels first": ("x.h5", h5(frames=frames(5, 3, 8, 8)), r"has uint8 \(5, 3, 8, 8\)"),
    "a single number": ("x.h5", h5(frames=np.uint8(3)), r"has uint8 \(\)"),
    "zero frames": ("x.h5", h5(frames=frames(0, 8, 8, 3)), r"frames of the shape \(0, 8, 8, 3\)"),
    "frames of no width": (
        "x.h5",
        h5(frames=frames(5, 8, 0, 3)),
        r"frames of the shape \(5, 8, 0, 3\)",
    ),
    "frames too wide": (
        "x.h5",
        h5(frames=frames(1, 1, 10_000, 3)),
        r"each side must have 1 … 8,192 pixels",
    ),
    "terabytes that were never written": (
        "x.h5",
        never_written,
        "would unpack to 1,228,800,000,000 bytes, but 0 are stored",
    ),
    "a chunk that unpacks to gigabytes": (
        "x.h5",
        one_chunk,
        r"would unpack to 768,000,000 bytes, but [\d,]+ are stored",
    ),
    "frames in another file": ("x.h5", elsewhere, "takes its data from another file"),
    "frames made up of other files": ("x.h5", virtual, "takes its data from another file"),
    "a link to another file": ("x.h5", link("external"), "is a link to elsewhere"),
    "a link to nowhere": ("x.h5", link("soft"), "is a link to elsewhere"),
    "too few actions": (
        "x.h5",
        h5(frames=frames(5, 8, 8, 3), actions=np.zeros(3, int)),
        r"\(3,\) actions for 5 frames",
    ),
    "actions of floats": (
        "x.h5",
        h5(frames=frames(5, 8, 8, 3), actions=np.zeros(5)),
        "float64 .* one whole number per frame",
    ),
    "a negative action": (
        "x.h5",
        h5(frames=frames(2, 8, 8, 3), actions=np.array([0, -4])),
        "an action -4; number the actions from 0",
    ),
    "an endless list of actions": (
        "x.h5",
        h5(frames=frames(2, 8, 8, 3), actions=np.array([0, 2**40])),
        "an action 1099511627776; .* up to 1,023",
    ),
    "episodes that are texts": (
        "x.h5",
        h5(frames=frames(2, 8, 8, 3), episode_starts=["a", "b"]),
        "store a list of frame numbers",
    ),
    "a text as a video": ("x.mp4", content(b"hello"), "none of the 1 videos can be read"),
    "an empty video": ("x.mp4", content(b""), "none of the 1 videos can be read"),
    "sound alone": ("x.avi", sound_only, "none of the 1 videos can be read"),
    "a video cut short": (
        "x.avi",
        cut(lambda path: write_video(path, film(60))),
        "none of the 1 videos can be read",
    ),
    "a broken gif": ("x.gif", content(b"GIF89a" + bytes(50)), "none of the 1 videos can be read"),
    "a list of other videos": (
        "x.mp4",
        content(b"ffconcat version 1.0\nfile 'other.avi'\n"),
        "none of the 1 videos can be read",
    ),
    "a canvas of 16,000 by 16,000": (
        "x.gif",
        content(CANVAS),
        "none of the 1 videos can be read",
    ),
    "more episodes than frames": (
        "x.h5",
        h5(frames=frames(2, 8, 8, 3), episode_starts=np.arange(5)),
        "store a list of frame numbers",
    ),
    "a name too long": (
        "x" * 246 + ".avi",
        lambda path: write_video(path, film(20)),
        "cannot write .*[Nn]ame too long; choose a place and a name",
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_bad_datasets(tmp_path, capfd, name):
    file, write, message = DATASETS[name]
    write(tmp_path / file)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        open_small(tmp_path / file)
    one_line(error.value)
    assert sorted(tmp_path.iterdir()) == before and "Traceback" not in capfd.readouterr().err


def turned(path):
    """An mp4 whose header asks players to turn it by 90 degrees."""
    half = film(20)
    half[:, :, 32:] = 0  # bright on the left
    write_video(path, half)
    content = path.read_bytes()
    at = content.index(b"tkhd") + 4 + 40  # the matrix of a track header of version 0
    matrix = np.frombuffer(content[at : at + 36], ">i4")
    assert list(matrix) == [65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30]
    quarter_turn = np.array([0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30], ">i4")
    path.write_bytes(content[:at] + quarter_turn.tobytes() + content[at + 36 :])


ODD = {
    "one pixel": ("x.h5", h5(frames=frames(40, 1, 1, 3)), (40, 1, 1, 3)),
    "as large as a cinema's": (
        "x.avi",
        lambda path: write_video(path, film(3, (4320, 7680))),
        (3, 32, 32, 3),
    ),
    "turned": ("x.mp4", turned, (20, 32, 32, 3)),
    "letters of other scripts": (
        "фильм — 映画 🎬.mp4",
        lambda path: write_video(path, film(20)),
        (20, 32, 32, 3),
    ),
    "a long name": ("x" * 230 + ".avi", lambda path: write_video(path, film(20)), (20, 32, 32, 3)),
    "strange attributes": (
        "x.h5",
        h5(frames=frames(4, 8, 8, 3), _fps="fast", _action_names=7),
        (4, 8, 8, 3),
    ),
    "fps without sense": ("x.h5", h5(frames=frames(4, 8, 8, 3), _fps=-math.inf), (4, 8, 8, 3)),
    "episodes beyond the end": (
        "x.h5",
        h5(frames=frames(40, 8, 8, 3), episode_starts=np.array([-5, 3, 2**62])),
        (40, 8, 8, 3),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_datasets_that_are_no_error(tmp_path, name):
    file, write, shape = ODD[name]
    write(tmp_path / file)
    dataset = open_small(tmp_path / file)
    if name == "turned":  # what was left is above now
        assert dataset.frames[-1, :8].mean() > dataset.frames[-1, -8:].mean() + 50
    assert dataset.frames.shape == shape and dataset.fps > 0
    if len(dataset.frames) == 40:
        Clips(dataset, "train", 4)


def test_videos_of_several_sizes_are_one_world(tmp_path):
    for i, size in enumerate([(48, 64), (64, 48), (2, 2), (360, 640)]):
        write_video(tmp_path / f"{i}.avi", film(10, size))
    dataset = open_small(tmp_path)
    assert dataset.frames.shape == (40, 32, 32, 3)
    assert list(dataset.episode_starts) == [0, 10, 20, 30]


@fuzz
@given(
    name=st.sampled_from(["frames", "actions", "episode_starts"]),
    kind=st.sampled_from(["u1", "i1", "i8", "u8", "f2", "f8", "?", "c8", "S3"]),
    shape=st.lists(st.integers(0, 9), max_size=5),
    attributes=st.dictionaries(
        st.sampled_from(["fps", "action_names", "game"]),
        st.text(max_size=5) | st.floats() | st.integers(-9, 9),
    ),
)
def test_fuzz_hdf5(tmp_path_factory, name, kind, shape, attributes):
    path = tmp_path_factory.mktemp("x") / "x.h5"
    with h5py.File(path, "w") as file:
        file["frames"] = frames(9, 8, 8, 3)
        if name in file:
            del file[name]
        file[name] = np.zeros(shape, kind)
        for key, value in attributes.items():
            try:
                file.attrs[key] = value
            except (ValueError, TypeError):  # HDF5 has no such text
                pass
    try:
        Clips(open_small(path), "train", 2).batch(0)
    except UserError as error:
        one_line(error)


@fuzz
@given(
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
    )
)
def test_fuzz_hdf5_bytes(tmp_path_factory, places):
    path = tmp_path_factory.mktemp("x") / "x.h5"
    h5(frames=frames(9, 8, 8, 3), actions=np.zeros(9, int), _fps=15.0)(path)
    damaged = bytearray(path.read_bytes())
    for place, byte in places:
        damaged[int(place * len(damaged))] = byte
    path.write_bytes(damaged)
    try:
        Clips(open_small(path), "train", 2).batch(0)
    except UserError as error:
        one_line(error)


@fuzz
@given(
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20
    ),
    end=st.floats(0.1, 1),
)
def test_fuzz_video(tmp_path_factory, places, end):
    folder = tmp_path_factory.mktemp("x")
    write_video(folder / "a.avi", film(10, (16, 16)))
    damaged = bytearray((folder / "a.avi").read_bytes())
    for place, byte in places:
        damaged[int(place * len(damaged))] = byte
    (folder / "b.avi").write_bytes(damaged[: int(end * len(damaged))])
    dataset = open_small(folder)
    # the sound video is there in any case
    assert dataset.frames[:10].mean() > 0 and len(dataset.episode_starts) in (1, 2)


# --- recordings in VPT's form ----------------------------------------------------------------
def test_no_shards():
    for shards, message in (
        ([], "the list of shards is empty"),
        (["nowhere-*.tar"], "no shard is called nowhere"),
    ):
        with pytest.raises(UserError, match=message) as error:
            find_shards(shards)
        one_line(error.value)


def test_a_member_that_claims_to_be_huge_is_left_out(tmp_path, capsys):
    header = tarfile.TarInfo("a\x1b[2J.mp4")
    header.size = 5 << 30
    (tmp_path / "x.tar").write_bytes(header.tobuf() + bytes(2048))
    problems = Problems(100)
    assert list(recordings(str(tmp_path / "x.tar"), problems)) == [] and problems.counts
    assert "claims 5,368,709,120 bytes" in (said := capsys.readouterr().err) and "\x1b" not in said


@fuzz
@given(
    text=st.text()
    | st.lists(values, max_size=5).map(lambda lines: "\n".join(json.dumps(line) for line in lines)),
    key=st.sampled_from(["mouse", "keyboard", "hotbar", "yaw"]),
    value=values,
)
def test_fuzz_jsonl(text, key, value):
    sound = {
        "mouse": {"dx": 1, "dy": 2, "buttons": [], "newButtons": []},
        "keyboard": {"keys": []},
        "hotbar": 0,
        "yaw": 0,
        "pitch": 0,
    }
    lines = [text, json.dumps(sound), json.dumps(sound | {key: value}), ""]
    ticks = Ticks("\n".join(lines), "x", Problems(10**9))
    assert ticks.valid[-2] and np.isfinite(ticks.inputs).all() and np.isfinite(ticks.state).all()


@fuzz
@given(
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=9),
    end=st.floats(0, 1),
)
def test_fuzz_tar(tmp_path_factory, places, end):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("a.mp4", "a.jsonl", "b.mp4", "b.jsonl"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(bytes(700)))
    damaged = bytearray(file.getvalue())
    for place, byte in places:
        damaged[int(place * len(damaged))] = byte
    path = tmp_path_factory.mktemp("x") / "x.tar"
    path.write_bytes(damaged[: int(end * len(damaged))])
    problems = Problems(100)
    found = list(recordings(str(path), problems))
    assert len(found) <= 2 and (len(found) == 2 or problems.counts or places)


# --- saved runs ------------------------------------------------------------------------------
def a_run(world):
    session = Session(world, world.start_frames.numpy(), 0)
    session.press(1)
    return session.to_json()


NO_RUN = "not a run that this project saved"


def with_values(**values):
    return lambda run: run | values


RUNS = {
    "text": (lambda run: "hello", NO_RUN),
    "a number": (lambda run: "3", NO_RUN),
    "brackets": (lambda run: "[" * 100_000, NO_RUN),
    "of something else": (with_values(what="a cake"), NO_RUN),
    "a part is missing": (lambda run: {k: v for k, v in run.items() if k != "clip"}, NO_RUN),
    "actions of floats": (with_values(actions=[0.5]), NO_RUN),
    "actions as text": (with_values(actions="0,1"), NO_RUN),
    "a negative seed": (with_values(seed=-1), NO_RUN),
    "a million passes": (with_values(steps=10**6), NO_RUN),
    "a million threads": (with_values(threads=10**6), NO_RUN),
    "a temperature of nothing": (with_values(temperature=None), NO_RUN),
    "a clip that is none": (with_values(clip="????"), NO_RUN),
    "a clip too short": (with_values(clip=base64.b64encode(b"abc").decode()), NO_RUN),
    "a clip of a thousand frames": (
        with_values(shape=[1000, 16, 16, 3], clip=base64.b64encode(bytes(768_000)).decode()),
        NO_RUN,
    ),
    "a negative shape": (with_values(shape=[-1, 16, 16, 3]), NO_RUN),
    "a shape of texts": (with_values(shape=list("abcd")), NO_RUN),
    "of another world": (
        with_values(world="00000000"),
        "was played in world 00000000, this is",
    ),
    "a world of escape codes": (with_values(world="\x1b[2J"), "was played in world"),
    "an action that is not there": (
        with_values(actions=[99]),
        "frames or actions that this world does not know",
    ),
    "frames of another size": (
        with_values(shape=[1, 48, 16, 3]),
        "frames or actions that this world does not know",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_bad_runs(world, tmp_path, name):
    change, message = RUNS[name]
    changed, threads = change(a_run(world)), torch.get_num_threads()
    (tmp_path / "run.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError, match=message) as error:
        read_run(tmp_path / "run.json", world)
    one_line(error.value)
    assert torch.get_num_threads() == threads


@fuzz
@given(
    name=st.sampled_from(
        "what world shape clip seed steps temperature actions threads half".split()
    ),
    value=values,
)
def test_fuzz_runs(world, tmp_path_factory, name, value):
    path, threads = tmp_path_factory.mktemp("x") / "run.json", torch.get_num_threads()
    path.write_text(json.dumps(a_run(world) | {name: value}))
    try:
        session, actions = read_run(path, world)
        assert session.frame.shape == (16, 16, 3)
        assert all(0 <= action < world.n_actions for action in actions)
    except UserError as error:
        one_line(error)
    finally:
        torch.set_num_threads(threads)


# --- the command line ------------------------------------------------------------------------
@fuzz
@given(
    name=st.sampled_from(
        "n-updates minutes batch-size context-length embed-dim n-heads learning-rate seed"
        " n-actions keep-rate max-skipped".split()
    ),
    value=st.integers() | st.floats() | st.text(max_size=9),
)
def test_fuzz_options(name, value):
    argv = ["--out", "x", "--device", "cpu", "--preset", "tiny", f"--{name}={value}"]
    try:
        parse_config(LatentActionConfig, "lam", "", argv)
    except UserError as error:
        one_line(error)


def test_cv2_says_nothing_of_its_own(tmp_path, capfd):
    (tmp_path / "x.mp4").write_bytes(b"hello")
    assert not cv2.VideoCapture(str(tmp_path / "x.mp4")).isOpened()
    assert "moov" not in capfd.readouterr().err
