import json
import math
import shutil
from functools import partial
from pathlib import Path

from utils.checkpoint import load_world
from utils.cli import CheckpointError, UserError
from utils.hardening.videos import DatasetWriter

import numpy as np
import pytest
import torch

import train_dynamics
import validate
from data_utils import Clips, open_dataset
from evaluation import stages
from evaluation.video_features import i3d_features

EXPECTED = """
tokenizer/psnr tokenizer/psnr_changing tokenizer/copy_psnr_changing tokenizer/codebook_usage
tokenizer/perplexity
lam/psnr lam/copy_psnr lam/actions_used lam/n_actions lam/largest_share lam/nmi lam/nmi_ceiling
lam/accuracy lam/majority lam/consistency
dynamics/masked_ce dynamics/token_accuracy_changing
dynamics/delta_psnr_t4 dynamics/delta_psnr_null_t4 dynamics/delta_psnr_marginal_t4
dynamics/delta_psnr_t4_changing dynamics/delta_psnr_null_t4_changing
dynamics/delta_psnr_marginal_t4_changing
""".split()
EXPECTED += [f"dynamics/{name}_psnr_t{t}" for name in ("rollout", "copy") for t in range(1, 17)]


@pytest.mark.parametrize("clips", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_every_metric_of_every_stage(world_dir, tmp_path, monkeypatch, clips):
    monkeypatch.setattr(stages, "FVD_CLIPS", min(clips, stages.FVD_CLIPS))
    out, images = tmp_path / "deep" / "report.json", tmp_path / "images"
    options = ["--checkpoint", world_dir, "--use-dummy-data", "--val-fraction", "0.65"]
    options += ["--clips", str(clips), "--steps", "1", "--classifier-updates", "30"]
    validate.main([*options, "--save-images", str(images), "--json", str(out)])
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
    found = {path.name for path in images.iterdir()}
    assert {"reconstructions.png", "rollouts.png", "actions.png", "actions.gif"} <= found
    assert len(list(images.glob("action_*.gif"))) == 8


def test_one_stage_alone(world_dir):
    options = ["--checkpoint", f"{world_dir}/tokenizer.pt", "--use-dummy-data", "--clips", "8"]
    report = validate.main(options)
    assert report and all(name.startswith("tokenizer/") for name in report)


@torch.no_grad()
def test_the_same_seed_gives_the_same_rollout_and_each_distance_has_a_name(world_dir, monkeypatch):
    monkeypatch.setattr(stages, "FVD_CLIPS", 12)
    world = load_world(world_dir, temperature=1.0)
    dataset = open_dataset("", "dummy", use_dummy_data=True)
    clips = Clips(dataset, "val", 20, val_fraction=0.9).evenly_spaced(12)
    actions = torch.zeros(12, 19, dtype=torch.long)
    first, second = (stages.rollout(world, clips[0], actions) for _ in range(2))
    assert torch.equal(first, second)

    def mean_colours(videos, rescale, resize, return_features):  # stands for I3D
        return videos.mean(dim=(2, 3, 4))

    features = ("i3d", partial(i3d_features, mean_colours))
    report = stages.dynamics_metrics(world, clips, "cpu", None, features)
    assert "fvd_i3d" in report and "fvd_smallnet" not in report


def test_a_world_that_ignores_its_keys_is_reported(world_dir, tmp_path, capsys):
    for name in ("tokenizer.pt", "lam.pt"):
        shutil.copy(Path(world_dir) / name, tmp_path)
    dummy = ["--use-dummy-data"]
    sizes = ["--preset", "tiny", "--n-updates", "1"]
    train_dynamics.main([*dummy, *sizes, "--out", str(tmp_path)])
    assert "warning: dynamics/action_gain is" in capsys.readouterr().out
    part = ["--val-fraction", "1.0", "--clips", "8"]
    validate.main(["--checkpoint", str(tmp_path), *dummy, *part])
    assert "warning: dynamics/delta_psnr_t4 is" in capsys.readouterr().out


def test_bad_input(world_dir, tmp_path):
    wide, lam = str(tmp_path / "wide.h5"), str(tmp_path / "lam.pt")
    with DatasetWriter(wide, (64, 96)) as writer:
        writer.append(np.zeros((80, 64, 96, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    Path(lam).write_bytes(Path(world_dir, "tokenizer.pt").read_bytes())
    none, empty, dummy = str(tmp_path / "none"), str(tmp_path / "empty"), ["--use-dummy-data"]
    for checkpoint, options, message in [
        (none, dummy, "no such checkpoint: .*none"),
        (empty, dummy, "no checkpoint in .*empty; expected tokenizer.pt"),
        (lam, dummy, "is a tokenizer checkpoint, but a lam"),
        (world_dir, [], "no data given"),
        (world_dir, ["--data-path", wide], "frames of 64×96"),
        (world_dir, [*dummy, "--val-fraction", "2"], "--val-fraction must be at most 1, got 2"),
        (world_dir, [*dummy, "--json", str(tmp_path)], "--json .* is a folder"),
        (world_dir, [*dummy, "--fvd-features", lam], "is not a TorchScript I3D"),
    ]:
        with pytest.raises((UserError, CheckpointError), match=message) as error:
            validate.main(["--checkpoint", checkpoint, *options])
        assert "\n" not in str(error.value)
