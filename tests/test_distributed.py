"""Two processes with a batch of 2 against one with a batch of 4: the same curves, the same checkpoints. `torchrun` starts this file, too."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_dynamics  # noqa: E402
import train_lam  # noqa: E402
import train_tokenizer  # noqa: E402
from models.world_model import WorldModel  # noqa: E402


def train(footage, out, frozen, stages, *options):
    """The first stage, or "all" three, in float32, for a few steps; `frozen` has the first two for the third. Several processes also share out weights.

    The rate is a quarter of the usual one: the sums of two processes round differently, and a latent action flips where that decides.
    """
    same = ["--data-path", footage, "--preset", "tiny", "--n-updates", "12", "--dtype", "float32", "--device", "cpu", "--sample-every", "10",
            "--learning-rate", "1e-3", *options]  # fmt: skip
    train_tokenizer.main([*same, "--out", f"{out}/tokenizer"])
    if stages != "all":
        return
    train_lam.main([*same, "--out", f"{out}/lam"])
    stages = [f"--video-tokenizer-path={frozen}/tokenizer/tokenizer.pt", f"--lam-path={frozen}/lam/lam.pt"]
    train_dynamics.main([*same, *stages, "--out", f"{out}/dynamics"])
    if torch.distributed.is_initialized():
        train_dynamics.main([*same, *stages, "--out", f"{out}/fsdp", "--fsdp"])
        train_dynamics.main([*same, *stages, "--out", f"{out}/fsdp", "--fsdp", "--resume"])  # nothing is left to do but to load


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=300)


def two_and_one(recording, tmp_path_factory, stages):
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    train(recording, one, one, stages, "--batch-size", "4")
    result = torchrun(__file__, recording, two, one, stages)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("next: python train_lam.py") == 1 and "a step sees 4 clips" in result.stdout  # one process speaks for all
    return two, one


@pytest.fixture(scope="module")
def all_stages(recording, tmp_path_factory):
    return two_and_one(recording, tmp_path_factory, "all")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line[name] for line in lines for name in ("loss", "val_loss") if name in line])


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
        world = WorldModel.load(two / kind)
        world.reset(world.start_frames[0])
        assert world.step(0).shape == (64, 64, 3)
    train_dynamics.main(["--data-path", recording, "--preset", "tiny", "--n-updates", "12", "--device", "cpu", "--out", f"{two}/fsdp", "--resume"])
    ours, theirs = (torch.load(path, weights_only=True)["optimizer"] for path in (two / "fsdp/dynamics.pt", one / "dynamics/dynamics.pt"))
    for a, b in zip(ours, theirs, strict=True):
        for i, values in b["state"].items():
            assert all(torch.allclose(a["state"][i][name], value, atol=1e-2) for name, value in values.items())


if __name__ == "__main__":
    train(*sys.argv[1:], "--batch-size", "2")
