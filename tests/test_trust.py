"""Nothing is lost, and the same command gives the same numbers twice.

Tested here: determinism, checkpoints when a process is killed or a file damaged, numbers that are
not finite, and limits of memory and disk.
"""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

from utils.checkpoint import CheckpointSaver, load_checkpoint, previous_of, save_checkpoint
from utils.cli import CheckpointError, UserError
from utils.hardening import dataset as dataset_limits
from utils.hardening import forecast
from utils.hardening.steps import StepGuard, StopSignal
from utils.log import TrainLog

import h5py
import pytest
import torch
from test_checkpoint import saved
from test_data_utils import film, open_small, write_video
from test_distributed import torchrun

import train_dynamics
import train_lam
import train_tokenizer
from data_utils import Clips, Dataset, dummy_world
from models.latent_action_model import LatentActionModel

SCRIPTS = {"tokenizer": train_tokenizer, "lam": train_lam, "dynamics": train_dynamics}
KILLS = int(os.environ.get("TRUST_KILLS", 200))
SMALL = "--preset tiny --batch-size 4 --embed-dim 16 --hidden-dim 32 --device cpu".split()
SHORT = "--n-updates 12 --save-every 6 --sample-every 3".split()
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers():
    """Puts the signal handlers back that were there before the test."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    restore(before)


def restore(handlers):
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class PowerCut(BaseException):
    pass


def train(stage, out, *more, cut=None, interrupt=None):
    """A few steps of a stage.

    cut: the power fails in the step after that many. interrupt: somebody presses Ctrl-C in it.
    """
    script = SCRIPTS[stage]
    lr_at, handlers = script.lr_at, [signal.getsignal(number) for number in SIGNALS]

    def rate_or_trouble(step, *args):
        if step == cut:
            raise PowerCut
        if step == interrupt and signal.getsignal(signal.SIGINT) != signal.SIG_DFL:  # once
            os.kill(os.getpid(), signal.SIGINT)
        return lr_at(step, *args)

    script.lr_at = rate_or_trouble
    try:
        script.main([*SMALL, *SHORT, "--out", str(out), *more])
    except PowerCut:
        pass
    finally:
        script.lr_at = lr_at
        restore(handlers)


def assert_the_same_training(one, two, stage):
    """Checkpoints and logs in two folders are equal to the last bit."""
    for kind in ("", ".best"):
        a, b = (load_checkpoint(Path(folder) / f"{stage}{kind}.pt", stage) for folder in (one, two))
        assert a["step"] == b["step"] == 12 or kind
        for name in ("model", "optimizer", "rng", "metrics", "step"):
            assert same(a[name], b[name]), name
    for name in ("metrics.jsonl", "odd_batches.jsonl"):
        a, b = ((Path(folder) / stage / name).read_text() for folder in (one, two))
        assert a == b, name


def train_whole_and_cut(recording, folder, frozen="", stages=tuple(SCRIPTS)):
    """Each stage runs twice: unbroken, and with a power cut in step 8, to continue from step 6.

    frozen: the world whose tokenizer and LAM the dynamics uses, if it is not the unbroken one.
    """
    whole, cut = Path(folder) / "whole", Path(folder) / "cut"
    for stage in stages:
        options = ["--data-path", str(recording)]
        if stage == "dynamics":
            options += [
                f"--video-tokenizer-path={frozen or whole}/tokenizer.pt",
                f"--lam-path={frozen or whole}/lam.pt",
            ]
        train(stage, whole, *options)
        train(stage, cut, *options, cut=8)
        assert load_checkpoint(cut / f"{stage}.pt", stage)["step"] == 6
        train(stage, cut, *options, "--resume")
    return whole, cut


@pytest.mark.parametrize(
    "stages",
    [["dynamics"], pytest.param(list(SCRIPTS), marks=pytest.mark.slow)],
    ids=["dynamics", "all"],
)
def test_the_same_command_gives_the_same_bits_with_and_without_a_power_cut(
    recording, world_dir, tmp_path, stages
):
    frozen = "" if "lam" in stages else world_dir
    whole, cut = train_whole_and_cut(recording, tmp_path, frozen, stages)
    for stage in stages:
        assert_the_same_training(whole, cut, stage)


def test_and_so_does_one_that_was_interrupted(recording, tmp_path):
    data = ["--data-path", recording]
    train("lam", tmp_path / "whole", *data)
    train("lam", tmp_path / "stopped", *data, interrupt=6)
    assert load_checkpoint(tmp_path / "stopped/lam.pt", "lam")["step"] == 7
    train("lam", tmp_path / "stopped", *data, "--resume")
    assert_the_same_training(tmp_path / "whole", tmp_path / "stopped", "lam")


UNUSUAL = "--learning-rate 0.001 --batch-size 2 --seed 3 --accumulate 2 --grad-clip 0.1"


def test_resume_alone_takes_every_setting_from_the_checkpoint(recording, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data-path", recording, *UNUSUAL.split()]
    train("lam", "whole", *options)
    train("lam", "cut", *options, cut=8)
    train_lam.main(["--resume", "--out", "cut"])
    assert_the_same_training("whole", "cut", "lam")


def test_what_is_typed_beside_resume_is_said_and_applied_or_refused(
    recording, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(recording, "moved.h5")
    train("lam", "w", "--data-path", recording)
    resume = ["--resume", "--out", "w"]
    with h5py.File("other.h5", "w") as other, h5py.File(recording) as file:
        other["frames"] = file["frames"][:][::-1]
    before = Path("w/lam.pt").read_bytes()
    for typed, message in [
        ("--learning-rate 1", "learning_rate was 0.004, now it is 1.0; leave --learning-rate out"),
        ("--batch-size 3", "batch_size was 4, now it is 3"),
        ("--seed 1", "seed was 0, now it is 1"),
        ("--preset cpu", "preset was tiny, now it is cpu"),
        ("--minutes 5", "minutes was 0.0, now it is 5.0"),
        ("--n-updates 11", "n_updates was 12, now it is 11"),
        ("--n-actions 4", "n_actions was 8, now it is 4"),
        ("--data-path other.h5", "it learned from other data .fingerprint"),
    ]:
        with pytest.raises(UserError, match=f"cannot resume w/lam.pt: {message}"):
            train_lam.main([*resume, *typed.split()])
    assert Path("w/lam.pt").read_bytes() == before
    asked, lr_at = [], train_lam.lr_at
    monkeypatch.setattr(train_lam, "lr_at", lambda *args: asked.append(args[:2]) or lr_at(*args))
    train_lam.main([*resume, "--data-path", "moved.h5", "--n-updates", "16", "--save-every", "4"])
    assert asked == [(12, 16), (13, 16), (14, 16), (15, 16)]  # the schedule is stretched
    printed = capsys.readouterr().out
    for line in (
        f"resuming with --data-path moved.h5 (before: {recording})",
        "resuming with --n-updates 16 (before: 12)",
        "at step 12 of 16",
    ):
        assert line in printed
    saved = load_checkpoint("w/lam.pt", "lam")
    assert saved["step"] == saved["n_updates"] == 16 and saved["config"]["save_every"] == 4


def test_an_older_checkpoint_can_be_resumed(recording, tmp_path):
    whole, tmp_path = tmp_path / "whole", tmp_path / "cut"
    train("lam", whole, "--data-path", recording)
    train("lam", tmp_path, "--data-path", recording, cut=8)
    saved = load_checkpoint(tmp_path / "lam.pt", "lam")
    for name in ("data_fingerprint", "masking"):  # there were none
        del saved["config"][name]
    del saved["model_args"]["masking"]
    save_checkpoint(tmp_path / "lam.pt", saved)
    train_lam.main(["--resume", "--out", str(tmp_path)])
    assert_the_same_training(whole, tmp_path, "lam")


@pytest.mark.slow
def test_so_do_several_processes(recording, tmp_path):
    result = torchrun(__file__, recording, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 processes" in result.stdout
    for stage in SCRIPTS:
        assert_the_same_training(tmp_path / "whole", tmp_path / "cut", stage)


def test_the_last_two_and_the_best_are_kept(recording, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 9.0])

    def validation_logs(*_):
        return {"val_loss": next(losses), "val_error_over_copy": 1.0}

    monkeypatch.setattr(train_lam, "validation_logs", validation_logs)
    train("lam", tmp_path, "--data-path", recording, "--sample-every", "4", "--save-every", "4")
    steps = {
        name: load_checkpoint(tmp_path / f"{name}.pt", "lam")["step"]
        for name in ("lam", "lam.previous", "lam.best")
    }
    assert steps == {"lam": 12, "lam.previous": 8, "lam.best": 8}
    # --resume was forgotten: nothing is lost, and nothing old passes for new
    train("lam", tmp_path, "--data-path", recording, "--n-updates", "2")
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "lam.best.pt",
        "lam.earlier.best.pt",
        "lam.earlier.pt",
        "lam.pt",
    ]
    assert load_checkpoint(tmp_path / "lam.earlier.pt", "lam")["step"] == 12
    assert load_checkpoint(tmp_path / "lam.best.pt", "lam")["step"] == 2


# --- damage ----------------------------------------------------------------------------------
def test_a_thousand_damaged_checkpoints(tmp_path):
    """Cut short, or with one to three bits flipped, anywhere: each is detected."""
    path, rng = tmp_path / "lam.pt", random.Random(0)
    save_checkpoint(path, saved("lam"))
    whole = path.read_bytes()
    for i in range(1000):
        content = bytearray(whole)
        if i % 2:
            del content[rng.randrange(len(whole)) :]
        else:
            for _ in range(rng.randint(1, 3)):
                content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        if content == whole:
            continue
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged") as error:
            load_checkpoint(path, "lam")
        assert "\n" not in str(error.value)


def test_damage_is_said_and_the_checkpoint_before_is_used(tmp_path, capsys):
    path = tmp_path / "lam.pt"
    for step in (1, 2):
        save_checkpoint(path, {**saved("lam", seed=step), "step": step}, keep_previous=True)
    assert load_checkpoint(path, "lam")["step"] == 2 and not capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    assert load_checkpoint(path, "lam")["step"] == 1
    line = capsys.readouterr().out
    assert "checksum" in line and "lam.previous.pt, step 1, instead" in line
    assert line.count("\n") == 1
    # a damaged file never takes the place of a sound one
    save_checkpoint(path, {**saved("lam"), "step": 3}, keep_previous=True)
    assert load_checkpoint(previous_of(path), "lam")["step"] == 1
    path.unlink()
    assert load_checkpoint(path, "lam")["step"] == 1


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path):
    path = tmp_path / "lam.pt"
    save_checkpoint(path, {**saved("lam"), "step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond 100 kB
    try:
        message = (
            r"cannot save .*lam.pt \(.*\): it needs 0.3 MB, [\d,.]+ MB are free;"
            " what was saved before is still there"
        )
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(path, {**saved("lam"), "step": 2}, keep_previous=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path, "lam")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["lam.pt"]


def train_until_killed(recording, out, pipe):
    """In a process of its own: train, and save after every step.

    Sends the step it began with and, after each save, the step that was saved.
    """
    torch.set_num_threads(1)
    save, resume = CheckpointSaver.save, CheckpointSaver.resume

    def save_and_tell(saver, step, *args, **more):
        save(saver, step, *args, **more)
        pipe.send(step)

    def resume_and_tell(*args, **more):
        start_step, n_updates = resume(*args, **more)
        pipe.send(start_step)
        return start_step, n_updates

    CheckpointSaver.save, CheckpointSaver.resume = save_and_tell, resume_and_tell
    TrainLog.curves = lambda log: None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    options = "--n-updates 100000 --save-every 1 --dtype float32".split()
    if (Path(out) / "tokenizer.pt").exists():
        options.append("--resume")
    train_tokenizer.main([*SMALL, *options, "--data-path", recording, "--out", out])


def received(pipe):
    """All that a process has sent before it was killed."""
    steps = []
    try:
        while True:
            steps.append(pipe.recv())
    except EOFError:
        return steps


@pytest.mark.parametrize("kills", [3, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_loses_no_saved_step(recording, tmp_path, capfd, kills):
    processes, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    processes.set_forkserver_preload(["train_tokenizer"])
    path, last, in_saving = tmp_path / "tokenizer.pt", 0, 0
    for _ in range(kills):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(
            target=train_until_killed, args=(recording, str(tmp_path), theirs)
        )
        process.start()
        theirs.close()
        told = last
        # mostly while it trains and saves; otherwise perhaps before it has begun
        if rng.random() < 0.9:
            assert ours.recv() == last  # it continues where the last one was
            told = ours.recv() if last == 0 else last
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        told = max([told, *received(ours)])
        in_saving += path.with_name(path.name + ".part").exists()
        assert path.exists() or last == 0
        last = load_checkpoint(path, "tokenizer")["step"] if path.exists() else 0
        assert told <= last <= told + 1  # one may be saved before it is told
    # the file itself was whole each time
    assert last > kills // 2 and "instead" not in capfd.readouterr().out
    assert kills < 50 or in_saving > kills / 50  # some came while a file was being written
    assert load_checkpoint(previous_of(path), "tokenizer")["step"] in (last, last - 1)
    lines = [
        json.loads(line)
        for line in (tmp_path / "tokenizer/metrics.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    steps = [(line["step"], "val_loss" in line) for line in lines]
    assert steps == sorted(set(steps))  # no line twice, none out of order


def test_a_second_signal_stops_at_once(handlers):
    stop = StopSignal()
    assert not stop.asked
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- numbers that are not finite -------------------------------------------------------------
def spoil(monkeypatch, bad):
    """The LAM's loss becomes NaN in the training steps `bad`.

    → a list that gets the sum of the weights at each call. The first call comes before step 0: it
    is the dry run that sees whether a batch fits into memory.
    """
    forward, seen = LatentActionModel.forward, []

    def spoiled(self, frames, *targets):
        loss, logs = forward(self, frames, *targets)
        if self.training and len(frames) == 4 and torch.is_grad_enabled():
            seen.append(float(sum(weight.detach().double().sum() for weight in self.parameters())))
            if len(seen) - 2 in bad:
                loss = loss * math.nan
        return loss, logs

    monkeypatch.setattr(LatentActionModel, "forward", spoiled)
    return seen


def test_a_step_without_a_number_is_skipped_and_its_batch_named(
    recording, tmp_path, monkeypatch, capsys
):
    seen = spoil(monkeypatch, {5, 6})
    train("lam", tmp_path, "--data-path", recording)
    weights = seen[1:]  # before step 0, 1, …
    assert weights[4] != weights[5] == weights[6] == weights[7] != weights[8]
    texts = (tmp_path / "lam/odd_batches.jsonl").read_text().splitlines()
    lines = [json.loads(text) for text in texts]
    found = [(line["step"], line["loss"], line["skipped"]) for line in lines]
    assert found == [(6, "nan", True), (7, "nan", True)]
    clips = Clips(open_small(recording), "train", 4, batch_size=4)
    for line in lines:
        assert torch.equal(clips.read(line["first_frames"])[0], clips.batch(line["step"] - 1)[0])
    assert "2 steps were skipped" in capsys.readouterr().out
    weights = load_checkpoint(tmp_path / "lam.pt", "lam")["model"].values()
    assert all(weight.isfinite().all() for weight in weights)


def test_many_such_steps_in_a_row_end_the_run_with_the_last_good_checkpoint(
    recording, tmp_path, monkeypatch
):
    spoil(monkeypatch, range(8, 100))
    options = ["--data-path", recording, "--max-skipped", "3", "--save-every", "2"]
    message = (
        "no finite number 3 steps in a row, up to step 11;"
        " the last good checkpoint is .*lam.pt, step 8"
    )
    # nothing is saved at step 10, because the weights themselves may be broken
    with pytest.raises(UserError, match=message):
        train("lam", tmp_path, *options)
    assert load_checkpoint(tmp_path / "lam.pt", "lam")["step"] == 8


def test_a_leap_of_the_loss_is_written_down_and_taken(tmp_path):
    cfg = Namespace(out=str(tmp_path), accumulate=2)
    clips = Clips(Dataset(*dummy_world(100)), "train", 4, batch_size=3)
    log = TrainLog(cfg, "lam", 0, 300, Namespace(received=False))
    guard = StepGuard(log, 0)
    # the LAM's bonus makes its loss negative
    log.lines = [{"step": 10 * i, "loss": -0.1 + 0.01 * i} for i in range(20)]
    assert guard.is_finite(200, torch.tensor(0.4), torch.tensor(1.0), clips) and not guard.lines
    assert guard.is_finite(201, torch.tensor(2.5), torch.tensor(1.0), clips)
    (line,) = guard.lines
    assert json.loads((log.folder / "odd_batches.jsonl").read_text()) == line
    assert (line["step"], line["loss"], line["skipped"]) == (202, 2.5, False)
    expected = torch.cat([clips.batch(402)[0], clips.batch(403)[0]])
    assert torch.equal(clips.read(line["first_frames"])[0], expected)


# --- limits ----------------------------------------------------------------------------------
def test_memory_is_counted_before_it_is_used(recording, tmp_path, monkeypatch, capsys):
    train("lam", tmp_path / "enough", "--data-path", recording)
    assert "memory: about 0." in capsys.readouterr().out
    monkeypatch.setattr(forecast, "free_memory", lambda device: 150 << 20)
    batch = r"--batch-size 500 needs about [\d.]+ GB of memory, 0.15 GB are free; \d+ should fit"
    with pytest.raises(UserError, match=batch):
        train("lam", tmp_path / "w", "--data-path", recording, "--batch-size", "500")
    model = r"this model needs [\d,.]+ GB for weights, gradients and optimizer, 0.15 GB are free"
    with pytest.raises(UserError, match=model):
        train("lam", tmp_path / "w", "--data-path", recording, "--embed-dim", "8192")
    assert not (tmp_path / "w").exists()


def test_what_a_pass_keeps_is_counted_per_clip():
    """A linear layer keeps its input and, if that needs a gradient, its weights.

    ReLU keeps its output, which is the input of the next layer.
    """
    first, second = (torch.nn.Linear(1000, 1000, bias=False) for _ in range(2))
    batches, sizes = Namespace(batch_size=7), []

    def dry_run():
        sizes.append(batches.batch_size)
        second(first(torch.randn(batches.batch_size, 1000)).relu()).sum().backward()

    assert forecast.saved_by_a_pass(batches, dry_run) == (second.weight.nbytes, 2 * 4 * 1000)
    assert sizes == [1, 2] and batches.batch_size == 7


def test_disk_is_counted_before_videos_are_converted(tmp_path, monkeypatch, capsys):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "a.mp4", film(30))
    little = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(dataset_limits.shutil, "disk_usage", lambda path: little)
    message = (
        "may need 0.1 MB, but 0.0 MB are free;"
        " make room, or take fewer videos or a smaller --frame-size"
    )
    with pytest.raises(UserError, match=message):
        open_small(tmp_path / "v")
    assert [p.name for p in tmp_path.iterdir()] == ["v"]
    monkeypatch.undo()
    assert len(open_small(tmp_path / "v").frames) == 30
    assert "disk: 30 frames of 32×32 take at most 0.1 MB" in capsys.readouterr().out


if __name__ == "__main__":
    train_whole_and_cut(*sys.argv[1:])
