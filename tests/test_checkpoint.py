import ast
import os
import pickle
from pathlib import Path

from utils.checkpoint import build_model, load_checkpoint, save_checkpoint
from utils.cli import CheckpointError
from utils.hardening.files import fingerprint
from utils.hardening.fit import check_fit

import pytest
import torch
from conftest import SIZES, randomise

import models
from models.dynamics import DynamicsModel
from models.latent_action_model import LatentActionModel
from models.video_tokenizer import VideoTokenizer

KINDS = {"tokenizer": VideoTokenizer, "lam": LatentActionModel, "dynamics": DynamicsModel}
FRAMES = dict(frame_size=[16, 16], patch_size=8)


def saved(stage, seed=0, **changes):
    """A checkpoint of a small model with random weights."""
    sizes = {
        "tokenizer": dict(levels=[4, 4], **FRAMES),
        "lam": dict(n_actions=4, **FRAMES),
        "dynamics": dict(grid=[2, 2], levels=[4, 4], n_actions=4),
    }[stage]
    model_args = {**SIZES, **sizes, **changes}
    model = randomise(KINDS[stage](**model_args), seed)
    return {"stage": stage, "model_args": model_args, "model": model.state_dict()}


def test_a_model_comes_back_the_same(tmp_path):
    for stage, kind in KINDS.items():
        save_checkpoint(tmp_path / "x.pt", saved(stage))
        loaded = load_checkpoint(tmp_path / "x.pt", stage)
        model = build_model(loaded)
        assert isinstance(model, kind) and not model.training
        assert all(torch.equal(a, loaded["model"][name]) for name, a in model.state_dict().items())
        assert fingerprint(loaded) == fingerprint(saved(stage)) != fingerprint(saved(stage, seed=1))


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, saved("lam"))
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(path, {"stage": "lam", "model": lambda: None})  # cannot be pickled
    assert path.read_bytes() == before


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("/tmp/world-model-was-here",)


def test_files_that_are_not_ours(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no checkpoint at .*train_lam.py"):
        load_checkpoint(path, "lam")
    save_checkpoint(path, saved("lam"))
    whole = path.read_bytes()
    message = "not a checkpoint of this project, or it is damaged"
    for content in (b"", b"hello", whole[: len(whole) // 2], pickle.dumps(Malicious())):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, "lam")
    torch.save({"stage": "lam", "model": Malicious()}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, "lam")
    assert not os.path.exists("/tmp/world-model-was-here")
    save_checkpoint(path, saved("tokenizer"))
    message = "a tokenizer checkpoint, but a lam checkpoint is needed"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, "lam")
    wrong = saved("lam")
    wrong["model_args"]["embed_dim"] = 64
    with pytest.raises(CheckpointError, match="do not fit the sizes"):
        build_model(wrong)


def test_checkpoints_that_do_not_belong_together():
    tokenizer, lam, dynamics = saved("tokenizer"), saved("lam"), saved("dynamics")
    dynamics["inputs"] = {"tokenizer": fingerprint(tokenizer), "lam": fingerprint(lam)}
    check_fit(tokenizer, lam, dynamics)
    for stage, name, value, message in [
        ("tokenizer", "frame_size", [24, 16], r"\[24, 16\].*\[16, 16\]"),
        ("lam", "n_actions", 8, "n_actions 4, but finds 8"),
        ("dynamics", "grid", [2, 3], r"patches per frame \[2, 3\], but finds \[2, 2\]"),
        ("dynamics", "levels", [8, 5], r"levels \[8, 5\], but finds \[4, 4\]"),
    ]:
        trio = {"tokenizer": tokenizer, "lam": lam, "dynamics": dynamics}
        sizes = trio[stage]["model_args"] | {name: value}
        trio[stage] = trio[stage] | {"model_args": sizes}
        with pytest.raises(CheckpointError, match=message):
            check_fit(**trio)
    with pytest.raises(CheckpointError, match="tokenizer weights"):  # same sizes, trained again
        check_fit(saved("tokenizer", seed=1), lam, dynamics)


def test_models_import_nothing_but_torch_einops_and_themselves():
    allowed = {"torch", "einops", "numpy", "models", "math", "collections", "copy", "typing"}
    for path in Path(models.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path
