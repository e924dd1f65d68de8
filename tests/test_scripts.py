import copy
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from config import PRESETS, DynamicsConfig, LatentActionConfig, TokenizerConfig, parse_config
from utils.checkpoint import CheckpointSaver, build_model, load_checkpoint, load_world
from utils.cli import CheckpointError, UserError
from utils.hardening.forecast import updates_for_budget
from utils.hardening.videos import DatasetWriter
from utils.optimizer import Muon, make_optimizer, newton_schulz

import numpy as np
import pytest
import torch
from conftest import SIZES

import train_dynamics
import train_lam
import train_tokenizer
from data_utils import Batches, Clips, Dataset, dummy_world, to_float
from evaluation.metrics import print_warnings
from models.dynamics import DynamicsModel
from models.fsq import log_statistics
from models.latent_action_model import LatentActionModel
from models.next_latent import NextLatentModel

ROOT = Path(__file__).parent.parent
SCRIPTS = {"tokenizer": train_tokenizer, "lam": train_lam, "dynamics": train_dynamics}
TINY = ["--use-dummy-data", "--preset", "tiny"]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_each_stage_learns(world_dir, stage):
    folder = Path(world_dir)
    lines = [
        json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02
    assert any("val_loss" in line for line in lines)
    assert (folder / stage / "loss.png").exists() and list((folder / stage).glob("step_*.png"))
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_checkpoint_gives_the_outputs_of_the_model_that_was_trained(
    world_dir, tmp_path, monkeypatch, stage
):
    trained, save = [], CheckpointSaver.save

    def keep(saver, *args, **more):
        trained.append(saver.model)
        save(saver, *args, **more)

    monkeypatch.setattr(CheckpointSaver, "save", keep)
    files = [
        "--video-tokenizer-path",
        f"{world_dir}/tokenizer.pt",
        "--lam-path",
        f"{world_dir}/lam.pt",
    ]
    SCRIPTS[stage].main(
        [*TINY, "--out", str(tmp_path), "--n-updates", "3", *(files if stage == "dynamics" else [])]
    )
    if stage == "dynamics":
        inputs = torch.randint(1024, (2, 4, 64)), torch.randint(8, (2, 3))
    else:
        inputs = (to_float(Clips(Dataset(*dummy_world(100)), "val", 4).evenly_spaced(2)[0]),)
    losses = []
    for model in (
        trained[-1].eval(),
        build_model(load_checkpoint(tmp_path / f"{stage}.pt", stage)),
    ):
        torch.manual_seed(0)
        losses.append(float(model(*inputs)[0].detach()))
    assert losses[0] == losses[1]


def test_the_gpu_preset_runs_in_small(recording, tmp_path):
    small = [
        "--data-path",
        recording,
        "--preset",
        "gpu",
        "--device",
        "cpu",
        "--n-updates",
        "1",
        "--batch-size",
        "2",
        "--context-length",
        "4",
        "--n-blocks",
        "1",
        "--embed-dim",
        "64",
        "--out",
        str(tmp_path),
    ]
    for script in SCRIPTS.values():
        script.main(small)
    world = load_world(tmp_path)
    world.reset(world.start_frames[0])
    assert world.step(0).shape == (64, 64, 3)


def weights(folder, stage="lam"):
    return load_checkpoint(Path(folder) / f"{stage}.pt", stage)


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path):
    command = [
        sys.executable,
        "train_tokenizer.py",
        *TINY,
        "--out",
        str(tmp_path),
        "--n-updates",
        "100000",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    log = tmp_path / "tokenizer" / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        assert process.poll() is None
        os.sched_yield()
    process.terminate()
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "--resume continues" in printed
    assert weights(tmp_path, "tokenizer")["step"] > 0


def test_true_actions_and_the_squared_error_objective(world_dir, tmp_path):
    files = ["--video-tokenizer-path", f"{world_dir}/tokenizer.pt"]
    train_dynamics.main(
        [*TINY, *files, "--actions", "true", "--out", str(tmp_path / "true"), "--n-updates", "3"]
    )
    saved = weights(tmp_path / "true", "dynamics")
    assert (
        saved["model_args"]["n_actions"] == 5
        and saved["action_names"][1] == "left"
        and "lam" not in saved["inputs"]
    )
    files += ["--lam_path", f"{world_dir}/lam.pt"]
    train_dynamics.main(
        [*TINY, *files, "--objective", "mse", "--out", str(tmp_path / "mse"), "--n_updates", "3"]
    )
    assert weights(tmp_path / "mse", "dynamics")["model_args"]["objective"] == "mse"
    assert (tmp_path / "mse" / "lam.pt").exists()  # the world is complete


TEXTS = dict(context_length=4, batch_size=32, embed_dim=128, hidden_dim=512, n_heads=4, n_blocks=2)
TEXTS |= dict(optimizer="adamw", learning_rate=1e-4, n_updates=10_000, frame_size=128)
LAM_TEXTS = dict(n_actions=8, encoder="frames", decoder="frame", keep_rate=0.0)
LAM_TEXTS |= dict(masking="training", latent_norm="none", soft_rate=0.0, entropy_lambda=0.0)


def test_the_article_preset_is_what_the_texts_say_and_trains(tmp_path):
    own = {TokenizerConfig: dict(patch_size=8, levels=(4,) * 5), LatentActionConfig: LAM_TEXTS}
    own[DynamicsConfig] = dict(context="masked", token_kernel=1)
    options = ["--use-dummy-data", "--preset", "article", "--out", str(tmp_path)]
    for stage, kind in zip(SCRIPTS, own, strict=True):
        cfg = vars(parse_config(kind, stage, "", options))
        assert {name: cfg[name] for name in TEXTS | own[kind]} == TEXTS | own[kind]
    for script in SCRIPTS.values():
        script.main([*options, "--n-updates", "1", "--batch-size", "2"])
    world = load_world(tmp_path)
    world.reset(world.start_frames[0])
    assert world.step(0).shape == (64, 64, 3)


def test_the_decoder_of_the_texts_sees_all_frames_in_evaluation_only():
    x = torch.rand(1, 4, 3, 16, 16) * 2 - 1
    sizes = dict(frame_size=[16, 16], patch_size=8, embed_dim=32, hidden_dim=64, n_heads=2)
    for masking, same in (("always", True), ("training", False)):
        torch.manual_seed(0)
        how = dict(n_blocks=1, context_length=4, n_actions=4, keep_rate=0.0, masking=masking)
        model = LatentActionModel(**sizes, **how, encoder="frames", decoder="frame")
        for weight in model.parameters():  # some begin at zero, and nothing would show
            weight.data.add_(0.1 * torch.randn_like(weight))
        actions, other = torch.zeros(1, 3, dtype=torch.long), x.clone()
        other[:, 1] = -other[:, 1]  # any frame but the first is hidden where masked
        for training in (True, False):
            model.train(training)
            one, two = (model.predict(frames, actions)[:, 1:] for frames in (x, other))
            assert torch.equal(one, two) == (training or same)


def test_latent_dim_is_a_short_form_of_levels(world_dir, tmp_path):
    options = ["--use-dummy-data", "--out", str(tmp_path)]
    cfg = parse_config(TokenizerConfig, "tokenizer", "", [*options, "--latent_dim", "3"])
    assert cfg.levels == (4, 4, 4)
    with pytest.raises(UserError, match="(?s)latent-dim.*7.*5"):
        train_dynamics.main(
            [*TINY, "--out", str(tmp_path), "--latent-dim", "7"]
            + ["--video-tokenizer-path", f"{world_dir}/tokenizer.pt"]
            + ["--lam-path", f"{world_dir}/lam.pt"]
        )


def test_without_out_the_world_is_named_after_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_lam.main(["--use-dummy-data", "--num-epochs", "0.001", "--preset", "tiny"])
    assert "into checkpoints/dummy" in capsys.readouterr().out
    assert Path("checkpoints/dummy/lam.pt").exists()
    Path("my game.mp4").touch()
    for name in ("my game.mp4", "../" + tmp_path.name):  # a file; a folder
        cfg = parse_config(LatentActionConfig, "lam", "", ["--data-path", name])
        assert cfg.out == f"checkpoints/{Path(name).stem}"


def test_the_squared_error_adds_the_lams_own_codes():
    sizes = dict(grid=[2, 2], levels=[4, 4], n_actions=8, embed_dim=16, hidden_dim=32, n_heads=2)
    sizes |= dict(n_blocks=1, context_length=4, token_kernel=1)
    model = NextLatentModel(**sizes, action_codes=True)
    added = model.embed_action(torch.arange(8))  # (8, E): a linear map of three bits
    assert torch.allclose(added[0] + added[7], added[3] + added[4], atol=1e-6)
    assert not torch.allclose(added[0], added[7])
    older = NextLatentModel(**sizes)  # checkpoints made before this had a vector per action
    assert older.embed_action.weight.shape == (9, 16)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_latents_and_outputs_are_described_every_ten_steps(world_dir, stage):
    lines = (Path(world_dir) / stage / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [*range(10, steps[-1], 10), steps[-1]]
    names = ("latent_variance", "output_mean", "output_std")
    assert all(math.isfinite(line[name]) for line in lines if "loss" in line for name in names)


def test_the_statistics_of_a_log_are_numpys():
    latents, outputs = torch.randn(4, 3, 5), torch.randn(7, 2)
    found = log_statistics(latents, outputs)
    variance = latents.reshape(-1, 5).numpy().var(axis=0).mean()
    assert float(found["latent_variance"]) == pytest.approx(variance, rel=1e-5)
    assert float(found["output_mean"]) == pytest.approx(outputs.numpy().mean(), abs=1e-6)
    assert float(found["output_std"]) == pytest.approx(outputs.numpy().std(ddof=1), rel=1e-5)


def test_latents_without_variance_have_the_remedy_of_the_texts(capsys):
    print_warnings({"lam/latent_variance": 0.01})
    assert "--var-lambda" in capsys.readouterr().out
    print_warnings({"lam/latent_variance": 0.5})
    assert capsys.readouterr().out == ""


def test_settings_come_from_the_command_line_then_the_preset_then_the_default(capsys):
    cfg = parse_config(
        LatentActionConfig,
        "lam",
        "",
        ["--out", "x", "--preset", "tiny", "--keep_rate", "0.5", "--device", "cpu"],
    )
    assert (cfg.keep_rate, cfg.embed_dim, cfg.n_actions) == (
        0.5,
        PRESETS["tiny"]["all"]["embed_dim"],
        8,
    )
    assert "preset tiny on cpu" in capsys.readouterr().out
    cfg = parse_config(
        LatentActionConfig,
        "lam",
        "",
        ["--out", "x", "--preset", "cpu", "--n-updates", "7", "--device", "cpu"],
    )
    assert cfg.n_updates == 7 and cfg.minutes == 0  # one budget, the given one


def test_every_budget_becomes_a_number_of_updates():
    clips = Clips(Dataset(np.zeros((1000, 2, 2, 3), np.uint8)), "train", 10)  # 900 frames
    given = dict(
        n_updates=0,
        num_epochs=0,
        minutes=0,
        batch_size=6,
        context_length=10,
        accumulate=1,
        device="cpu",
    )

    def count(dry_run=lambda: None, **budget):
        return updates_for_budget(Namespace(**{**given, **budget}), clips, dry_run)

    assert count(n_updates=7) == 7
    assert (
        count(num_epochs=2) == 30 and count(num_epochs=2, accumulate=3) == 10
    )  # 2 · 900 frames, 60 a step, or 180
    before = torch.get_rng_state()
    updates = count(lambda: (torch.rand(3), time.sleep(0.02)), minutes=1)
    assert (
        60 / 0.02 * 0.5 < updates <= 60 / 0.02
    )  # a tenth is kept for the rest; a busy machine sleeps longer
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--n-actions", "6"], "--n-actions must be a power of two .* got 6"),
        (["--preset", "huge"], "unknown preset 'huge'; there are tiny, cpu, gpu, article"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--n-updates", "5", "--minutes", "5"], "exactly one of .* not n_updates and minutes"),
        (["--batch-size", "-1"], "--batch-size must be positive, got -1"),
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--patch-size", "7"], "64×64 pixels do not divide into --patch-size 7"),
        (["--context-length", "1"], "--context-length must be at least 2"),
        (["--embed-dim", "30"], "--embed-dim 30 must be an even multiple of --n-heads"),
        (["--data-path", "nowhere"], "no such file or folder: nowhere"),
        (["--keep-rate", "2"], "--keep-rate must lie in 0 … 1, got 2"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--data-path", ""], "no data given: use --data-path"),
        (["--masking", "never"], "invalid choice: 'never'"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--resume"], "no checkpoint at .*lam.pt"),
    ],
)
def test_bad_options_write_nothing(tmp_path, options, message):
    data = [] if "--data-path" in options else ["--use-dummy-data"]
    with pytest.raises((UserError, CheckpointError), match=message) as error:
        train_lam.main(["--preset", "tiny", "--out", str(tmp_path / "w"), *data, *options])
    assert "\n" not in str(error.value) and not (tmp_path / "w").exists()


def test_stages_that_do_not_fit_write_nothing(world_dir, tmp_path):
    out, files = (
        ["--out", str(tmp_path / "w")],
        [
            "--video-tokenizer-path",
            f"{world_dir}/tokenizer.pt",
            "--lam-path",
            f"{world_dir}/lam.pt",
        ],
    )
    with DatasetWriter(tmp_path / "wide.h5", (64, 96)) as writer:
        writer.append(np.zeros((80, 64, 96, 3), np.uint8))
        writer.episode_starts = [0]
    wide = ["--data-path", str(tmp_path / "wide.h5"), "--preset", "tiny"]
    with pytest.raises(UserError, match="lam.pt is another lam than"):  # a world has one of each
        other = str(tmp_path / "other")
        train_lam.main([*TINY, "--out", other, "--n-updates", "2"])
        train_dynamics.main([*TINY, "--out", other, "--n-updates", "2", *files])
    with pytest.raises(UserError, match="cannot resume .*keep_rate was 1.0, now it is 0.5"):
        train_lam.main(
            [*TINY, "--out", other, "--n-updates", "4", "--keep-rate", "0.5", "--resume"]
        )
    with pytest.raises(UserError, match="cannot resume .*optimizer was muon, now it is adamw"):
        train_lam.main(
            [*TINY, "--out", other, "--n-updates", "2", "--optimizer", "adamw", "--resume"]
        )
    with pytest.raises(UserError, match="cannot resume .*n_updates was 2, now it is 1"):
        train_lam.main([*TINY, "--out", other, "--n-updates", "1", "--resume"])
    for options, message in [
        ([*TINY], "no checkpoint at .*tokenizer.pt; train it first"),
        (
            [*TINY, "--video-tokenizer-path", f"{world_dir}/lam.pt"],
            "is a lam checkpoint, but a tokenizer",
        ),
        ([*wide, *files], r"frames of \[64, 64\], the data has \[64, 96\]"),
        ([*wide, *files, "--actions", "true"], "no recorded actions"),
    ]:
        with pytest.raises((UserError, CheckpointError), match=message) as error:
            train_dynamics.main([*options, *out])
        assert "\n" not in str(error.value) and not (tmp_path / "w").exists()


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    commands = (
        ["train_lam.py", "--n-actions", "6", "--out", "x"],
        ["play.py", "--checkpoint", str(tmp_path), "--bad"],
    )
    pipes = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for process in [subprocess.Popen([sys.executable, *command], **pipes) for command in commands]:
        stdout, stderr = process.communicate()
        assert process.returncode == 2 and stdout == ""
        assert stderr.startswith("error: ") and stderr.count("\n") == 1


def test_tokenizer_and_lam_scripts_are_nearly_the_same_script():
    import difflib

    texts = [
        (ROOT / f"train_{stage}.py").read_text().splitlines() for stage in ("tokenizer", "lam")
    ]
    assert sum(line[0] in "+-" for line in difflib.ndiff(*texts)) <= 60


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = DynamicsModel(grid=[2, 2], levels=[4, 4], n_actions=4, **SIZES)
    muon, adamw = make_optimizer(
        model, Namespace(optimizer="muon", learning_rate=1e-3, dtype="float32")
    ).optimizers
    assert (
        muon.dtype == torch.float32
    )  # not torch's bfloat16, which is slow where it is only imitated
    per_block = 4 + 2 + 3  # qkv and out in space and time, the feed-forward, the AdaLN projections
    assert (
        isinstance(muon, Muon)
        and len(muon.param_groups[0]["params"]) == per_block * SIZES["n_blocks"]
    )
    rest = {id(p) for p in adamw.param_groups[0]["params"]}
    assert id(model.head.weight) in rest and id(model.embed_action.weight) in rest
    assert len(rest) + per_block * SIZES["n_blocks"] == len(list(model.parameters()))
    (adamw,) = make_optimizer(model, Namespace(optimizer="adamw", learning_rate=1e-3)).optimizers
    assert isinstance(adamw, torch.optim.AdamW) and len(adamw.param_groups[0]["params"]) == len(
        list(model.parameters())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_torchs_muon(dtype):
    torch.manual_seed(0)
    shapes = [(8, 32), (32, 8), (8, 32), (16, 16)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = (
        Muon(ours, 0.1, dtype),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.step()
    distance = max(
        float((a - b).norm() / (b - 1).norm()) for a, b in zip(ours, theirs, strict=True)
    )
    assert distance < 0.02  # torch's works in bfloat16
    assert distance > 1e-4 or dtype == torch.bfloat16  # and ours does not
    optimizers[0].load_state_dict(
        copy.deepcopy(optimizers[1].state_dict())
    )  # as checkpoints from before have it
    assert all(
        torch.equal(
            optimizers[0].state[a]["momentum_buffer"], optimizers[1].state[b]["momentum_buffer"]
        )
        for a, b in zip(ours, theirs, strict=True)
    )


def test_orthogonal_is_the_nearest_orthogonal_matrix():
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    near = newton_schulz(x)
    singular = torch.linalg.svdvals(near)
    assert (
        0.6 < singular.min() and singular.max() < 1.3
    )  # the iteration is tuned for speed, not to reach 1
    assert ((near - u @ vh).norm(dim=(1, 2)) < 0.3 * vh.norm(dim=(1, 2))).all()


def test_a_batch_that_does_not_fit_names_the_largest_that_does(tmp_path, monkeypatch):
    forward = LatentActionModel.forward

    def small_memory(self, frames, *targets):
        if len(frames) > 11:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, frames, *targets)

    monkeypatch.setattr(LatentActionModel, "forward", small_memory)
    with pytest.raises(
        UserError, match="--batch-size 16 does not fit into the memory of cpu; 11 does"
    ):
        train_lam.main([*TINY, "--out", str(tmp_path / "w"), "--batch-size", "16"])
    assert not (tmp_path / "w").exists()
    train_lam.main([*TINY, "--out", str(tmp_path / "w"), "--batch-size", "11", "--n-updates", "2"])


def test_accumulated_batches_learn_as_one_of_their_size(tmp_path, monkeypatch):
    """Two passes of 4 clips against one of 8: the tokenizer's loss is a mean over clips."""
    weights = []
    draw = Batches._draw

    def halves(self, step, size):  # step 2k and 2k + 1 of size 4 are the halves of step k of size 8
        if size == 8:
            return draw(self, step, size)
        frames, buttons = draw(self, step // 2, 8)
        return frames[4 * (step % 2) :][:4], buttons[4 * (step % 2) :][:4]

    monkeypatch.setattr(Batches, "_draw", halves)
    for options in (
        ["--batch-size", "8"],
        ["--batch-size", "4", "--accumulate", "2"],
        ["--batch-size", "8", "--recompute"],
    ):
        train_tokenizer.main(
            [
                *TINY,
                "--out",
                str(tmp_path / "w"),
                "--n-updates",
                "4",
                "--dtype",
                "float32",
                "--learning-rate",
                "1e-3",
                *options,
            ]
        )
        weights.append(
            torch.load(tmp_path / "w/tokenizer.pt", weights_only=True)["model"]["to_latent.weight"]
        )
    assert torch.allclose(weights[0], weights[1], atol=1e-5) and torch.allclose(
        weights[0], weights[2], atol=1e-6
    )


def test_the_context_must_not_be_longer_than_the_stages_before_have_seen(world_dir, tmp_path):
    files = [
        "--video-tokenizer-path",
        f"{world_dir}/tokenizer.pt",
        "--lam-path",
        f"{world_dir}/lam.pt",
    ]
    with pytest.raises(
        UserError,
        match="--context-length 6, but tokenizer and lam learned from clips of 4; use that",
    ):
        train_dynamics.main([*TINY, *files, "--out", str(tmp_path / "w"), "--context-length", "6"])
    with pytest.raises(UserError, match="--fsdp shards .* there is one; start with torchrun"):
        train_dynamics.main([*TINY, *files, "--out", str(tmp_path / "w"), "--fsdp"])
