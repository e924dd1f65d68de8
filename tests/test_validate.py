import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import train_dynamics
import validate
from config import UserError
from data_utils import DatasetWriter
from models.checkpoint import CheckpointError

EXPECTED = """tokenizer/psnr tokenizer/psnr_changing tokenizer/copy_psnr_changing tokenizer/codebook_usage tokenizer/perplexity
lam/psnr lam/copy_psnr lam/actions_used lam/n_actions lam/largest_share lam/nmi lam/nmi_ceiling lam/accuracy lam/majority
lam/consistency dynamics/masked_ce dynamics/token_accuracy_changing dynamics/delta_psnr_t4 dynamics/delta_psnr_null_t4
dynamics/delta_psnr_marginal_t4 dynamics/delta_psnr_t4_changing dynamics/delta_psnr_null_t4_changing
dynamics/delta_psnr_marginal_t4_changing""".split()
EXPECTED += [f"dynamics/{name}_psnr_t{t}" for name in ("rollout", "copy") for t in range(1, 17)]


@pytest.mark.parametrize("clips", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_every_metric_of_every_stage(world_dir, tmp_path, monkeypatch, clips):
    monkeypatch.setattr(validate, "FVD_CLIPS", min(clips, validate.FVD_CLIPS))
    out = tmp_path / "deep" / "report.json"
    options = ["--checkpoint", world_dir, "--use-dummy-data", "--val-fraction", "0.65", "--clips", str(clips), "--steps", "1", "--classifier-updates", "30"]
    validate.main([*options, "--save-images", str(tmp_path / "images"), "--json", str(out)])
    report = json.loads(out.read_text())
    assert set(EXPECTED) <= set(report) and "dynamics/fvd_i3d" not in report
    assert report["dynamics/fvd_smallnet"] < report["dynamics/fvd_smallnet_copy"]
    assert all(isinstance(value, float) and math.isfinite(value) for value in report.values())
    assert report["lam/accuracy"] >= 0.8 > 0.5 > report["lam/majority"]
    assert report["lam/nmi"] > 0.5 and 0.9 < report["lam/nmi_ceiling"] <= 1
    assert report["lam/consistency"] > 1.2 * report["lam/consistency_chance"]
    assert report["lam/psnr"] > max(report["lam/copy_psnr"], report["lam/psnr_shuffled"])
    assert report["tokenizer/psnr"] > 15 and report["tokenizer/codebook_usage"] > 0.1
    assert report["dynamics/delta_psnr_t4"] > 0
    images = tmp_path / "images"
    assert {"reconstructions.png", "rollouts.png", "actions.png", "actions.gif"} <= {path.name for path in images.iterdir()}
    assert len(list(images.glob("action_*.gif"))) == 8


def test_one_stage_alone(world_dir):
    report = validate.main(["--checkpoint", f"{world_dir}/tokenizer.pt", "--use-dummy-data", "--clips", "8"])
    assert report and all(name.startswith("tokenizer/") for name in report)


def test_the_same_dice_for_the_same_actions_and_a_name_for_each_distance(world_dir, monkeypatch):
    monkeypatch.setattr(validate, "FVD_CLIPS", 12)
    world = validate.WorldModel.load(world_dir, temperature=1.0)
    footage = validate.open_footage(Namespace(data_path="", data_type="dummy", use_dummy_data=True, frame_size=64))
    world_clips = validate.Clips(footage, "val", 20, val_fraction=0.9).spread(12)
    actions = torch.zeros(12, 19, dtype=torch.long)
    first, second = (validate.rollout(world, world_clips[0], actions) for _ in range(2))
    assert torch.equal(first, second)

    def mean_colours(videos, rescale, resize, return_features):  # stands for I3D
        return videos.mean(dim=(2, 3, 4))

    report = validate.dynamics_metrics(world, world_clips, "cpu", None, mean_colours)
    assert "fvd_i3d" in report and "fvd_smallnet" not in report


def test_a_world_that_ignores_its_keys_is_reported(world_dir, tmp_path, capsys):
    for name in ("tokenizer.pt", "lam.pt"):
        shutil.copy(Path(world_dir) / name, tmp_path)
    train_dynamics.main(["--use-dummy-data", "--preset", "tiny", "--out", str(tmp_path), "--n-updates", "1"])
    assert "warning: dynamics/action_gain is" in capsys.readouterr().out
    validate.main(["--checkpoint", str(tmp_path), "--use-dummy-data", "--val-fraction", "1.0", "--clips", "8"])
    assert "warning: dynamics/delta_psnr_t4 is" in capsys.readouterr().out


def test_bad_input(world_dir, tmp_path):
    with DatasetWriter(tmp_path / "wide.h5", (64, 96)) as writer:
        writer.append(np.zeros((80, 64, 96, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "lam.pt").write_bytes(Path(world_dir, "tokenizer.pt").read_bytes())
    dummy = ["--use-dummy-data"]
    for options, message in [
        (["--checkpoint", str(tmp_path / "none"), *dummy], "no such checkpoint: .*none"),
        (["--checkpoint", str(tmp_path / "empty"), *dummy], "no checkpoint in .*empty; expected tokenizer.pt"),
        (["--checkpoint", str(tmp_path / "lam.pt"), *dummy], "is a tokenizer checkpoint, but a lam"),
        (["--checkpoint", world_dir], "no footage given"),
        (["--checkpoint", world_dir, "--data-path", str(tmp_path / "wide.h5")], "frames of 64×96"),
        (["--checkpoint", world_dir, *dummy, "--val-fraction", "2"], "--val-fraction must lie above 0 .* got 2"),
        (["--checkpoint", world_dir, *dummy, "--json", str(tmp_path)], "--json .* is a folder"),
        (["--checkpoint", world_dir, *dummy, "--fvd-features", str(tmp_path / "lam.pt")], "is not a TorchScript I3D"),
    ]:
        with pytest.raises((UserError, CheckpointError), match=message) as error:
            validate.main(options)
        assert "\n" not in str(error.value)
