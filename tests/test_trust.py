"""Nothing lost, the same numbers twice: determinism, checkpoints under kill and damage, numbers that are none, limits."""
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

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # torchrun starts this file, too

from test_checkpoint import saved  # noqa: E402
from test_data_utils import film, options, write_video  # noqa: E402
from test_distributed import torchrun  # noqa: E402

import data_utils  # noqa: E402
import train_dynamics  # noqa: E402
import train_lam  # noqa: E402
import train_tokenizer  # noqa: E402
import train_utils  # noqa: E402
from config import UserError  # noqa: E402
from data_utils import Clips, Footage, dummy_world, open_footage  # noqa: E402
from models.checkpoint import CheckpointError, load_checkpoint, previous_of, save_checkpoint  # noqa: E402
from models.latent_action_model import LatentActionModel  # noqa: E402
from train_utils import Run  # noqa: E402

SCRIPTS = {"tokenizer": train_tokenizer, "lam": train_lam, "dynamics": train_dynamics}
KILLS = int(os.environ.get("TRUST_KILLS", 200))
SMALL = ["--preset", "tiny", "--batch-size", "4", "--embed-dim", "16", "--hidden-dim", "32", "--device", "cpu"]


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
    """A few steps of a stage. cut: the power fails in the step after that many; interrupt: somebody presses Ctrl-C in it."""
    script = SCRIPTS[stage]
    rate_at, handlers = script.rate_at, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def rate_or_trouble(step, *args):
        if step == cut:
            raise PowerCut
        if step == interrupt and signal.getsignal(signal.SIGINT) != signal.SIG_DFL:  # once
            os.kill(os.getpid(), signal.SIGINT)
        return rate_at(step, *args)

    script.rate_at = rate_or_trouble
    try:
        script.main([*SMALL, "--out", str(out), "--n-updates", "12", "--save-every", "6", "--sample-every", "3", *more])
    except PowerCut:
        pass
    finally:
        script.rate_at = rate_at
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)


def assert_the_same_training(one, two, stage):
    for kind in ("", ".best"):
        a, b = (load_checkpoint(Path(folder) / f"{stage}{kind}.pt", stage) for folder in (one, two))
        assert a["step"] == b["step"] == 12 or kind
        assert all(same(a[name], b[name]) for name in ("model", "optimizer", "rng", "metrics", "step"))
    assert all((Path(one) / stage / name).read_text() == (Path(two) / stage / name).read_text() for name in ("metrics.jsonl", "odd_batches.jsonl"))


def train_whole_and_cut(recording, folder, frozen="", stages=tuple(SCRIPTS)):
    """One run of each stage is whole; the other loses power in step 8, and goes on from step 6. frozen: a world, if it is not the whole one."""
    whole, cut = Path(folder) / "whole", Path(folder) / "cut"
    for stage in stages:
        options = ["--data-path", str(recording)]
        if stage == "dynamics":
            options += [f"--video-tokenizer-path={frozen or whole}/tokenizer.pt", f"--lam-path={frozen or whole}/lam.pt"]
        train(stage, whole, *options)
        train(stage, cut, *options, cut=8)
        assert load_checkpoint(cut / f"{stage}.pt", stage)["step"] == 6
        train(stage, cut, *options, "--resume")
    return whole, cut


@pytest.mark.parametrize("stages", [["dynamics"], pytest.param(list(SCRIPTS), marks=pytest.mark.slow)], ids=["dynamics", "all"])
def test_the_same_command_gives_the_same_bits_with_and_without_a_power_cut(recording, world_dir, tmp_path, stages):
    whole, cut = train_whole_and_cut(recording, tmp_path, "" if "lam" in stages else world_dir, stages)
    for stage in stages:
        assert_the_same_training(whole, cut, stage)


def test_and_so_does_one_that_was_interrupted(recording, tmp_path):
    data = ["--data-path", recording]
    train("lam", tmp_path / "whole", *data)
    train("lam", tmp_path / "stopped", *data, interrupt=6)
    assert load_checkpoint(tmp_path / "stopped/lam.pt", "lam")["step"] == 7
    train("lam", tmp_path / "stopped", *data, "--resume")
    assert_the_same_training(tmp_path / "whole", tmp_path / "stopped", "lam")


@pytest.mark.slow
def test_so_do_several_processes(recording, tmp_path):
    result = torchrun(__file__, recording, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 processes" in result.stdout
    for stage in SCRIPTS:
        assert_the_same_training(tmp_path / "whole", tmp_path / "cut", stage)


def test_the_last_two_and_the_best_are_kept(recording, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 9.0])
    monkeypatch.setattr(train_lam, "validation_logs", lambda *_: {"val_loss": next(losses), "val_error_over_copy": 1.0})
    train("lam", tmp_path, "--data-path", recording, "--sample-every", "4", "--save-every", "4")
    steps = {name: load_checkpoint(tmp_path / f"{name}.pt", "lam")["step"] for name in ("lam", "lam.previous", "lam.best")}
    assert steps == {"lam": 12, "lam.previous": 8, "lam.best": 8}
    train("lam", tmp_path, "--data-path", recording, "--n-updates", "2")  # --resume was forgotten: nothing is lost, nothing taken for the new one's
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["lam.best.pt", "lam.earlier.best.pt", "lam.earlier.pt", "lam.pt"]
    assert load_checkpoint(tmp_path / "lam.earlier.pt", "lam")["step"] == 12 and load_checkpoint(tmp_path / "lam.best.pt", "lam")["step"] == 2


# --- damage ------------------------------------------------------------------------------------------------------
def test_a_thousand_damaged_checkpoints(tmp_path):
    """Cut short, or with one to three bits flipped, anywhere: each is found out."""
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
    assert "checksum" in (line := capsys.readouterr().out) and "lam.previous.pt, step 1, instead" in line and line.count("\n") == 1
    save_checkpoint(path, {**saved("lam"), "step": 3}, keep_previous=True)  # a damaged file never takes the place of a sound one
    assert load_checkpoint(previous_of(path), "lam")["step"] == 1
    path.unlink()
    assert load_checkpoint(path, "lam")["step"] == 1


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path):
    path = tmp_path / "lam.pt"
    save_checkpoint(path, {**saved("lam"), "step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond 100 kB
    try:
        with pytest.raises(CheckpointError, match=r"cannot save .*lam.pt \(.*\): it needs 0.3 MB, [\d,.]+ MB are free; what was saved before is still there"):
            save_checkpoint(path, {**saved("lam"), "step": 2}, keep_previous=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path, "lam")["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["lam.pt"]


def train_until_killed(recording, out, pipe):
    """In a process of its own: train on, saving after every step, and tell of the step it began with and of each one saved."""
    torch.set_num_threads(1)
    save, opened = Run.save, Run.open

    def save_and_tell(run, model, optimizer, step, *args, **more):
        save(run, model, optimizer, step, *args, **more)
        pipe.send(step)

    def open_and_tell(*args, **more):
        first, n_updates = opened(*args, **more)
        pipe.send(first)
        return first, n_updates

    Run.save, Run.open, Run.curves = save_and_tell, open_and_tell, lambda run: None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resume = ["--resume"] if (Path(out) / "tokenizer.pt").exists() else []
    train_tokenizer.main([*SMALL, "--data-path", recording, "--out", out, "--n-updates", "100000", "--save-every", "1", "--dtype", "float32", *resume])


def heard(pipe):
    """All that a process has said before it died."""
    said = []
    try:
        while True:
            said.append(pipe.recv())
    except EOFError:
        return said


@pytest.mark.parametrize("kills", [3, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_loses_no_saved_step(recording, tmp_path, capfd, kills):
    processes, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    processes.set_forkserver_preload(["train_tokenizer"])
    path, last, in_saving = tmp_path / "tokenizer.pt", 0, 0
    for _ in range(kills):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=train_until_killed, args=(recording, str(tmp_path), theirs))
        process.start()
        theirs.close()
        told = last
        if rng.random() < 0.9:  # while it trains and saves; else perhaps before it has begun
            assert ours.recv() == last  # it goes on where the last one was
            told = ours.recv() if last == 0 else last
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        told = max([told, *heard(ours)])
        in_saving += path.with_name(path.name + ".part").exists()
        assert path.exists() or last == 0
        last = load_checkpoint(path, "tokenizer")["step"] if path.exists() else 0
        assert told <= last <= told + 1  # saved, but not told of
    assert last > kills // 2 and "instead" not in capfd.readouterr().out  # the file itself was whole each time
    assert kills < 50 or in_saving > kills / 50  # some struck while a file was being written
    assert load_checkpoint(previous_of(path), "tokenizer")["step"] in (last, last - 1)
    lines = [json.loads(line) for line in (tmp_path / "tokenizer/metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    steps = [(line["step"], "val_loss" in line) for line in lines]
    assert steps == sorted(set(steps))  # no line twice, none out of order


def test_a_second_signal_is_not_waited_for(tmp_path):
    run, before = Run(Namespace(out=str(tmp_path), resume=False, use_dummy_data=True), "lam"), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        run.open(None, None, 5)
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stopped(1)
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)


# --- numbers that are none ---------------------------------------------------------------------------------------
def spoil(monkeypatch, bad):
    """The LAM's loss becomes NaN in the calls of training that `bad` names; → the sum of the weights at each call."""
    forward, seen = LatentActionModel.forward, []

    def spoiled(self, frames):
        loss, logs = forward(self, frames)
        if self.training and len(frames) == 4 and torch.is_grad_enabled():
            seen.append(float(sum(weight.detach().double().sum() for weight in self.parameters())))
            if len(seen) - 2 in bad:  # the first call looks at the memory, with one clip; the second whether a batch fits
                loss = loss * math.nan
        return loss, logs

    monkeypatch.setattr(LatentActionModel, "forward", spoiled)
    return seen


def test_a_step_without_a_number_is_skipped_and_its_batch_named(recording, tmp_path, monkeypatch, capsys):
    seen = spoil(monkeypatch, {5, 6})
    train("lam", tmp_path, "--data-path", recording)
    weights = seen[1:]  # before step 0, 1, …
    assert weights[4] != weights[5] == weights[6] == weights[7] != weights[8]
    lines = [json.loads(line) for line in (tmp_path / "lam/odd_batches.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["skipped"]) for line in lines] == [(6, "nan", True), (7, "nan", True)]
    clips = Clips(open_footage(options(recording)), "train", 4, batch_size=4)
    for line in lines:
        assert torch.equal(clips.at(line["first_frames"])[0], clips.batch(line["step"] - 1)[0])
    assert "2 steps were skipped" in capsys.readouterr().out
    assert all(weight.isfinite().all() for weight in load_checkpoint(tmp_path / "lam.pt", "lam")["model"].values())


def test_many_such_steps_in_a_row_end_the_training_with_the_last_good_checkpoint(recording, tmp_path, monkeypatch):
    spoil(monkeypatch, range(8, 100))
    with pytest.raises(UserError, match=r"no finite number 3 steps in a row, up to step 11; the last good checkpoint is .*lam.pt, step 8"):
        train("lam", tmp_path, "--data-path", recording, "--max-skipped", "3", "--save-every", "2")  # none at step 10: the weights may be what is broken
    assert load_checkpoint(tmp_path / "lam.pt", "lam")["step"] == 8


def test_a_leap_of_the_loss_is_written_down_and_taken(tmp_path):
    run, clips = Run(Namespace(out=str(tmp_path), use_dummy_data=True, accumulate=2), "lam"), Clips(Footage(*dummy_world(100)), "train", 4, batch_size=3)
    run.folder.mkdir()
    run.lines = [{"step": 10 * i, "loss": -0.1 + 0.01 * i} for i in range(20)]  # the LAM's bonus makes its loss negative
    assert run.sound(200, torch.tensor(0.4), torch.tensor(1.0), clips) and not run.odd
    assert run.sound(201, torch.tensor(2.5), torch.tensor(1.0), clips)
    (line,) = run.odd
    assert json.loads((run.folder / "odd_batches.jsonl").read_text()) == line
    assert (line["step"], line["loss"], line["skipped"]) == (202, 2.5, False)
    assert torch.equal(clips.at(line["first_frames"])[0], torch.cat([clips.batch(402)[0], clips.batch(403)[0]]))


# --- limits ------------------------------------------------------------------------------------------------------
def test_memory_is_counted_before_it_is_used(recording, tmp_path, monkeypatch, capsys):
    train("lam", tmp_path / "enough", "--data-path", recording)
    assert "memory: about 0." in capsys.readouterr().out
    monkeypatch.setattr(train_utils, "free_memory", lambda device: 150 << 20)
    with pytest.raises(UserError, match=r"--batch-size 500 needs about [\d.]+ GB of memory, 0.15 GB are free; \d+ should fit"):
        train("lam", tmp_path / "w", "--data-path", recording, "--batch-size", "500")
    with pytest.raises(UserError, match=r"this model needs [\d,.]+ GB for weights, gradients and optimizer, 0.15 GB are free"):
        train("lam", tmp_path / "w", "--data-path", recording, "--embed-dim", "8192")
    assert not (tmp_path / "w").exists()


def test_what_a_pass_keeps_is_counted_per_clip():
    """A linear layer keeps its input, if that wants a gradient its weights, too, and ReLU its output, which is the next one's input."""
    first, second, batches = torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(1000, 1000, bias=False), Namespace(batch_size=7)
    sizes = []

    def trial():
        sizes.append(batches.batch_size)
        second(first(torch.randn(batches.batch_size, 1000)).relu()).sum().backward()

    assert train_utils.memory_of_a_pass(batches, trial) == (second.weight.nbytes, 2 * 4 * 1000)
    assert sizes == [1, 2] and batches.batch_size == 7


def test_disk_is_counted_before_videos_are_converted(tmp_path, monkeypatch, capsys):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "a.mp4", film(30))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data_utils.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"may need 0.1 MB, but 0.0 MB are free; make room, or take fewer videos or a smaller --frame-size"):
        open_footage(options(tmp_path / "v"))
    assert [p.name for p in tmp_path.iterdir()] == ["v"]
    monkeypatch.undo()
    assert len(open_footage(options(tmp_path / "v")).frames) == 30
    assert "disk: 30 frames of 32×32 take at most 0.1 MB" in capsys.readouterr().out


if __name__ == "__main__":
    train_whole_and_cut(*sys.argv[1:])
