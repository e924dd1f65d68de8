"""Shared by the tests: small random models, and one small world trained on the dummy data by the real scripts."""
import collections
import os

import pytest

import config  # isort: skip  before torch: two test runs at once then slow each other twofold, not tenfold
import torch

import train_dynamics
import train_lam
import train_tokenizer
from data_utils import DatasetWriter, dummy_world

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
    """A short recording of the dummy world, with its buttons, in a file."""
    path = tmp_path_factory.mktemp("data") / "dummy.h5"
    names = ["stay", "left", "right", "up", "down"]
    with DatasetWriter(path, (64, 64), with_actions=True, fps=15.0, action_names=names) as writer:
        writer.append(*dummy_world(1000))
    return str(path)


@pytest.fixture(scope="session")
def world_dir(tmp_path_factory):
    """A world that obeys, trained on the dummy data in half a minute."""
    out = str(tmp_path_factory.mktemp("world") / "dummy")
    options = ["--use-dummy-data", "--out", out, "--preset", "tiny", "--batch-size", "8"]  # many small steps at a high rate learn it fastest
    train_tokenizer.main([*options, "--n-updates", "60", "--learning-rate", "1e-2"])
    train_lam.main([*options, "--n-updates", "60", "--learning-rate", "8e-3"])
    train_dynamics.main([*options, "--n-updates", "110", "--learning-rate", "2e-2"])
    return out


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in two processes, half of the cores each (most tests wait for one core); `-n 0` asks for one."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and config.getoption("numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = 2


def pytest_configure(config):
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # elsewhere the tests are about the CPU, whatever else the machine has
    if hasattr(config, "workerinput"):
        torch.set_num_threads(max(1, torch.get_num_threads() // config.workerinput["workercount"]))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="GPU tests need a CUDA GPU and -m gpu"))


def pytest_terminal_summary(terminalreporter):
    """One line at the end: what was left out, how often, and what it takes."""
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    if reasons:
        terminalreporter.write_line("left out: " + "; ".join(f"{n} {reason}" for reason, n in collections.Counter(reasons).items()))
