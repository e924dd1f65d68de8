"""Shared by the tests: small random models, a recording, and one small trained world.

The world is trained on the dummy data by the real scripts.
"""

import collections
import os

import utils  # noqa: F401  before torch, because it sets how long waiting threads spin
from utils.hardening.videos import DatasetWriter

import pytest
import torch

import train_dynamics
import train_lam
import train_tokenizer
from data_utils import dummy_world

SIZES = dict(embed_dim=32, hidden_dim=64, n_heads=2, n_blocks=2, context_length=4)


def randomise(model, seed=0):
    """Zero-initialised projections would hide every mistake behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """A short recording of the dummy world, with its true actions, in a file."""
    path = tmp_path_factory.mktemp("data") / "dummy.h5"
    names = ["stay", "left", "right", "up", "down"]
    with DatasetWriter(path, (64, 64), with_actions=True, fps=15.0, action_names=names) as writer:
        writer.append(*dummy_world(1000))
    return str(path)


@pytest.fixture(scope="session")
def world_dir(tmp_path_factory):
    """A world that follows the actions, trained on the dummy data in half a minute."""
    out = str(tmp_path_factory.mktemp("world") / "dummy")
    # many small steps at a high learning rate learn it fastest
    options = ["--use-dummy-data", "--out", out, "--preset", "tiny", "--batch-size", "8"]
    train_tokenizer.main([*options, "--n-updates", "60", "--learning-rate", "1e-2"])
    train_lam.main([*options, "--n-updates", "60", "--learning-rate", "8e-3"])
    train_dynamics.main([*options, "--n-updates", "110", "--learning-rate", "2e-2"])
    return out


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in two processes, each with half of the cores.

    Most tests keep only one core busy. `-n 0` asks for one process.
    """
    if hasattr(config, "workerinput") or config.option.usepdb:
        return
    whole_suite = config.args_source is config.ArgsSource.TESTPATHS
    if whole_suite and config.getoption("numprocesses", 0) is None:
        config.option.numprocesses = 2


def pytest_configure(config):
    if "gpu" not in config.option.markexpr:
        # all other tests are about the CPU, even where there is a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(max(1, torch.get_num_threads() // config.workerinput["workercount"]))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="GPU tests need a CUDA GPU and -m gpu"))


def pytest_terminal_summary(terminalreporter):
    """One line at the end: what was left out, how often, and what it would need."""
    reasons = [
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
    ]
    if reasons:
        counted = [f"{n} {reason}" for reason, n in collections.Counter(reasons).items()]
        terminalreporter.write_line("left out: " + "; ".join(counted))
