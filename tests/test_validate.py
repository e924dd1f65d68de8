import json
import math
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

from utils.checkpoint import load_world
from utils.cli import CheckpointError, UserError
from utils.device import autocast_on
from utils.hardening.files import data_fingerprint
from utils.hardening.videos import DatasetWriter

import numpy as np
import pytest
import torch

import train_dynamics
import validate
from data_utils import Clips, Dataset, open_dataset
from evaluation import metrics, stages
from evaluation.report import was_trained_on
from evaluation.video_features import i3d_features

EXPECTED = """
tokenizer/psnr tokenizer/psnr_changing tokenizer/copy_psnr_changing tokenizer/codebook_usage
tokenizer/perplexity
lam/psnr lam/copy_psnr lam/actions_used lam/n_actions lam/largest_share lam/nmi
lam/nmi_classifier lam/accuracy lam/majority lam/consistency
dynamics/masked_ce dynamics/token_accuracy_changing
dynamics/delta_psnr_t4 dynamics/delta_psnr_null_t4 dynamics/delta_psnr_marginal_t4
dynamics/delta_psnr_t4_changing dynamics/delta_psnr_null_t4_changing
dynamics/delta_psnr_marginal_t4_changing
dynamics/delta_psnr_min_t4 dynamics/delta_psnr_min_t4_low dynamics/delta_psnr_min_t4_high
dynamics/delta_psnr_button_t4 dynamics/delta_psnr_button_t4_per_clip dynamics/clips_for_0.3_db
""".split()
EXPECTED += [f"dynamics/{name}_psnr_t{t}" for name in ("rollout", "copy") for t in range(1, 17)]


@pytest.mark.parametrize("clips", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_every_metric_of_every_stage(world_dir, tmp_path, monkeypatch, clips):
    monkeypatch.setattr(stages, "FVD_CLIPS", min(clips, stages.FVD_CLIPS))
    out, images = tmp_path / "deep" / "report.json", tmp_path / "images"
    options = ["--checkpoint", world_dir, "--use-dummy-data", "--val-fraction", "0.65"]
    options += ["--clips", str(clips), "--steps", "1", "--classifier-updates", "100"]
    validate.main([*options, "--save-images", str(images), "--json", str(out)])
    report = json.loads(out.read_text())
    assert set(EXPECTED) <= set(report) and "dynamics/fvd_i3d" not in report
    assert report["dynamics/fvd_smallnet"] < report["dynamics/fvd_smallnet_copy"]
    assert all(isinstance(value, float) and math.isfinite(value) for value in report.values())
    assert report["lam/accuracy"] >= 0.8 > 0.5 > report["lam/majority"]
    assert report["lam/nmi"] > 0.5 and 0.9 < report["lam/nmi_classifier"] <= 1
    assert report["lam/consistency"] > 1.2 * report["lam/consistency_chance"]
    assert report["lam/psnr"] > max(report["lam/copy_psnr"], report["lam/psnr_shuffled"])
    assert report["tokenizer/psnr"] > 15 and report["tokenizer/codebook_usage"] > 0.1
    assert report["dynamics/delta_psnr_t4"] > 0 and report["dynamics/delta_psnr_button_t4"] > 0
    three = [report[f"dynamics/delta_psnr{kind}_t4"] for kind in ("", "_null", "_marginal")]
    assert report["dynamics/delta_psnr_min_t4"] == min(three)
    found = {path.name for path in images.iterdir()}
    assert {"reconstructions.png", "rollouts.png", "actions.png", "actions.gif"} <= found
    assert {"lam_predictions.png", "lam_actions.png"} <= found
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


def test_the_best_and_the_previous_checkpoint_and_pictures_in_the_worlds_own_folder(
    world_dir, tmp_path
):
    world = tmp_path / "world"
    shutil.copytree(world_dir, world)
    for stage in ("lam", "dynamics"):
        shutil.copy(world / f"{stage}.pt", world / f"{stage}.best.pt")
        shutil.copy(world / f"{stage}.pt", world / f"{stage}.previous.pt")
    (world / "dynamics.pt").write_bytes(b"is not looked at")
    few = ["--use-dummy-data", "--clips", "4", "--classifier-updates", "0", "--steps", "1"]
    for name in ("lam.best.pt", "lam.previous.pt", "lam.pt"):
        report = validate.main(["--checkpoint", str(world / name), *few, "--save-images"])
        assert report["lam/n_actions"] == 8 and all(key.startswith("lam/") for key in report)
    assert {path.name for path in (world / "report").glob("lam*")} == {
        "lam_predictions.png",
        "lam_actions.png",
    }
    report = validate.main(["--checkpoint", str(world / "dynamics.best.pt"), *few])
    assert report["dynamics/clips"] == 4 and all(key.startswith("dynamics/") for key in report)


def test_measuring_on_what_was_trained_on_is_said(world_dir, capsys):
    few = ["--checkpoint", f"{world_dir}/lam.pt", "--use-dummy-data", "--clips", "4"]
    few += ["--classifier-updates", "0"]
    validate.main(few)  # on the last tenth, which training left out
    assert "learned from" not in capsys.readouterr().out
    validate.main([*few, "--val-fraction", "0.5"])
    assert "warning: lam learned from the first 90 % of dummy data" in capsys.readouterr().out


def test_known_by_its_frames_wherever_it_lies(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    dataset = Dataset(frames, name=str(tmp_path / "here.h5"))
    saved = {"config": {"data_path": "there.h5", "data_fingerprint": data_fingerprint(frames)}}
    assert was_trained_on(saved, dataset)
    assert not was_trained_on(saved, Dataset(frames[:99], name=str(tmp_path / "here.h5")))
    older = {"config": {"data_path": str(tmp_path / "here.h5")}}
    assert was_trained_on(older, dataset)
    assert not was_trained_on({"config": {"data_path": "there.h5"}}, dataset)


def test_where_nothing_moves_the_data_is_to_blame_and_the_json_has_null(
    world_dir, tmp_path, capsys
):
    still = str(tmp_path / "still.h5")
    with DatasetWriter(still, (64, 64)) as writer:
        writer.append(np.full((300, 64, 64, 3), 90, np.uint8))
    options = ["--checkpoint", world_dir, "--data-path", still, "--clips", "4", "--steps", "1"]
    validate.main([*options, "--json", str(tmp_path / "report.json")])
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and f"nothing moves in the 4 clips of {still}" in warnings[0]
    text = (tmp_path / "report.json").read_text()
    report = json.loads(text)
    assert "NaN" not in text and report["tokenizer/psnr_changing"] is None
    assert report["dynamics/delta_psnr_min_t4"] is None


def test_the_classifier_keeps_what_it_knew_before_it_learned_by_heart(monkeypatch):
    """Labels are noise: each update makes it worse on other clips, so the first check is kept."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (600, 16, 16, 3), dtype=np.uint8)
    dataset = Dataset(frames, rng.integers(0, 4, 600), action_names=tuple("abcd"))
    sizes = dict(frame_size=[16, 16], patch_size=8, embed_dim=32, hidden_dim=64)
    sizes |= dict(n_heads=2, n_blocks=1, context_length=4)
    clips = Clips(dataset, "val", 4, val_fraction=0.3).evenly_spaced(64)
    autocast = autocast_on(torch.device("cpu"))
    seen, cross_entropy = [], stages.cross_entropy

    def watch(*args):
        seen.append(cross_entropy(*args))
        return seen[-1]

    monkeypatch.setattr(stages, "cross_entropy", watch)
    rest = Clips(dataset, "train", 4, batch_size=16, val_fraction=0.3)
    encoder = stages.train_classifier(sizes, rest, "cpu", autocast, 200)
    assert len(seen) == 4 and seen[-1] > min(seen)  # it does learn by heart
    assert cross_entropy(encoder, *clips, "cpu", autocast) < math.log(4) + 0.3
    options = Namespace(classifier_updates=200, val_fraction=0.3)
    found = stages.classifier_nmi(options, dataset, {"model_args": sizes}, clips, "cpu", autocast)[
        "nmi_classifier"
    ]
    truth = metrics.entropy(metrics.shares(clips[1], 4))
    assert math.isclose(found, 1 - seen[-1] / truth, rel_tol=1e-6)


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
