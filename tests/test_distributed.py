"""Two processes with a batch of 2 against one with a batch of 4: same curves, same checkpoints.

`torchrun` starts this file too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from utils.checkpoint import load_world

import pytest
import torch

import train_dynamics
import train_lam
import train_tokenizer

TESTS = Path(__file__).resolve().parent
# The learning rate is a quarter of the usual one: the sums of two processes round differently, and
# at a high rate a latent action can flip because of that.
OPTIONS = "--preset tiny --n-updates 12 --dtype float32 --device cpu --sample-every 10".split()
OPTIONS += ["--learning-rate", "1e-3"]


def train(data_path, out, frozen, stages, *options):
    """A few steps of the first stage, or of all three where `stages` is "all".

    The third stage takes the other two from `frozen`. Several processes also train it sharded.
    """
    same = ["--data-path", data_path, *OPTIONS, *options]
    train_tokenizer.main([*same, "--out", f"{out}/tokenizer"])
    if stages != "all":
        return
    train_lam.main([*same, "--out", f"{out}/lam"])
    same += [f"--video-tokenizer-path={frozen}/tokenizer/tokenizer.pt"]
    same += [f"--lam-path={frozen}/lam/lam.pt"]
    train_dynamics.main([*same, "--out", f"{out}/dynamics"])
    if torch.distributed.is_initialized():
        train_dynamics.main([*same, "--out", f"{out}/fsdp", "--fsdp"])
        # nothing is left to do but to load the checkpoint
        train_dynamics.main([*same, "--out", f"{out}/fsdp", "--fsdp", "--resume"])


def torchrun(*arguments):
    """Run a script of this folder in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(argument) for argument in arguments]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def two_and_one(recording, tmp_path_factory, stages):
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    train(recording, one, one, stages, "--batch-size", "4")
    result = torchrun(__file__, recording, two, one, stages)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("next: python train_lam.py") == 1  # only one process prints
    assert "a step sees 4 clips" in result.stdout
    return two, one


@pytest.fixture(scope="module")
def all_stages(recording, tmp_path_factory):
    return two_and_one(recording, tmp_path_factory, "all")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "val_loss")
    return torch.tensor([line[name] for line in lines for name in names if name in line])


def check_the_losses(two, one, kind):
    stage = kind.replace("fsdp", "dynamics")
    expected = losses(one / stage / stage)
    assert len(expected) == 4 and expected[0] != expected[2]
    assert torch.allclose(losses(two / kind / stage), expected, atol=1e-4, rtol=0)


def test_two_processes_learn_as_one_with_twice_the_batch(recording, tmp_path_factory):
    check_the_losses(*two_and_one(recording, tmp_path_factory, "tokenizer"), "tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lam", "dynamics", "fsdp"])
def test_so_do_they_in_every_stage(all_stages, kind):
    check_the_losses(*all_stages, kind)


@pytest.mark.slow
def test_checkpoints_load_whatever_the_number_of_processes(all_stages, recording):
    two, one = all_stages
    for kind in ("dynamics", "fsdp"):
        world = load_world(two / kind)
        world.reset(world.start_frames[0])
        assert world.step(0).shape == (64, 64, 3)
    options = ["--data-path", recording, "--preset", "tiny", "--n-updates", "12"]
    train_dynamics.main([*options, "--device", "cpu", "--out", f"{two}/fsdp", "--resume"])
    ours, theirs = (
        torch.load(path, weights_only=True)["optimizer"]
        for path in (two / "fsdp/dynamics.pt", one / "dynamics/dynamics.pt")
    )
    for a, b in zip(ours, theirs, strict=True):
        for i, values in b["state"].items():
            for name, value in values.items():
                assert torch.allclose(a["state"][i][name], value, atol=1e-2)


if __name__ == "__main__":
    train(*sys.argv[1:], "--batch-size", "2")
