import json
import math
from pathlib import Path

import numpy as np
import pytest

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


def test_every_metric_of_every_stage(world_dir, tmp_path):
    out = tmp_path / "deep" / "report.json"
    options = ["--checkpoint", world_dir, "--use-dummy-data", "--val-fraction", "0.5", "--clips", "24", "--steps", "4"]
    validate.main([*options, "--save-images", str(tmp_path / "images"), "--json", str(out)])
    report = json.loads(out.read_text())
    assert set(EXPECTED) <= set(report)
    assert all(isinstance(value, float) and math.isfinite(value) for value in report.values())
    assert report["lam/accuracy"] >= 0.8 > 0.5 > report["lam/majority"]
    assert report["lam/nmi"] > 0.5 and 0.9 < report["lam/nmi_ceiling"] <= 1
    assert report["lam/consistency"] > 1.2 * report["lam/consistency_chance"]
    assert report["lam/psnr"] > report["lam/copy_psnr"]
    assert report["tokenizer/psnr"] > 15 and report["tokenizer/codebook_usage"] > 0.1
    assert report["dynamics/delta_psnr_t4"] > 0
    images = tmp_path / "images"
    assert {"reconstructions.png", "rollouts.png", "actions.png", "actions.gif"} <= {path.name for path in images.iterdir()}
    assert len(list(images.glob("action_*.gif"))) == 8


def test_one_stage_alone(world_dir):
    report = validate.main(["--checkpoint", f"{world_dir}/tokenizer.pt", "--use-dummy-data", "--clips", "8"])
    assert report and all(name.startswith("tokenizer/") for name in report)


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
    ]:
        with pytest.raises((UserError, CheckpointError), match=message) as error:
            validate.main(options)
        assert "\n" not in str(error.value)
