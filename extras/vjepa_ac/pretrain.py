"""Pre-train the encoder on recordings, without their actions (V-JEPA).

The encoder learns to predict the features of hidden patches from the visible ones.

    DATA='data/vpt/train-*.tar'
    python -m extras.vjepa_ac.pretrain --data "$DATA" --size nano --out checkpoints/vjepa
    python -m extras.vjepa_ac.pretrain --data "$DATA" --out checkpoints/vjepa   # ViT-L/16, for GPUs

Writes OUT/pretrain.pt; in OUT/pretrain/: metrics.jsonl and loss.png. A falling loss proves nothing
here, because targets that are all the same are the easiest to predict. So the log also has
feature_std and effective_rank of the target encoder.
"""

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

from utils.checkpoint import CheckpointSaver, load_checkpoint
from utils.cli import Parser, UserError, check_ranges, option, print_user_errors
from utils.device import choose_device, parallelize, set_up
from utils.hardening.files import files_fingerprint
from utils.hardening.settings import resumed
from utils.hardening.steps import StepGuard, StopSignal
from utils.log import TrainLog, progress
from utils.optimizer import count_parameters, lr_at, make_optimizer, set_lr

import torch
import torch.distributed as dist
from torch import Tensor, nn

from extras.vjepa_ac.model import (
    MASKS,
    PATCH,
    SIZES,
    TUBELET,
    Encoder,
    MaskedPredictor,
    block_masks,
    normalised,
    std_and_rank,
    vicreg_penalty,
)
from extras.vjepa_ac.vpt import Clips, ProcessVPT, batches, find_shards
from models.distributed import n_ranks

STAGE = "pretrain"
STAGES = {"pretrain": STAGE, "train": "action_predictor"}  # script → checkpoint


class Pretraining(nn.Module):
    """Encoder, predictor, and the target encoder, a moving average of the encoder.

    video uint8 (B, T, 3, S, S) → (loss, the targets (B, T/2·N, E)).

    spread: weight of a penalty on features that collapse into few directions. V-JEPA has none,
    with batches of 3,072 and days of training. Here a batch has 16 clips and training takes
    minutes. Without the penalty the features then ended with an effective rank of 4 of 192.
    """

    def __init__(
        self,
        size: int,
        tubelets: int,
        encoder: list[int],
        masked: list[int],
        spread: float = 0.0,
    ):
        super().__init__()
        self.encoder = Encoder(size, *encoder)
        self.predictor = MaskedPredictor(size // PATCH, tubelets, encoder[0], *masked)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.tubelets, self.spread = tubelets, spread

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            targets = normalised(self.target(video).float())  # (B, T/2·N, E)
        loss = 0.0
        for kind, mask in enumerate(MASKS):
            sizes = (len(video), self.tubelets, self.encoder.grid)
            shown, hidden = block_masks(*sizes, *mask, video.device)
            seen = self.encoder(video, shown)
            predicted = self.predictor(seen, shown, hidden, kind)
            truth = targets.gather(1, hidden[..., None].expand(-1, -1, targets.shape[2]))
            loss = loss + (predicted - truth).abs().mean() / len(MASKS)
            if self.spread:
                # centred per place: features that encode only their place have collapsed
                centred = normalised(seen.float()) - targets.mean(0)[shown]
                loss = loss + self.spread * vicreg_penalty(centred.flatten(0, 1)) / len(MASKS)
        return loss, targets

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the target encoder by 1 − momentum of the way to the encoder."""
        pairs = zip(self.target.parameters(), self.encoder.parameters(), strict=True)
        for slow, fast in pairs:
            slow.lerp_(fast, 1 - momentum)


# --- settings and clips, for train.py too ----------------------------------------------------


@dataclass
class VideoConfig:
    """The options that pretrain.py and train.py share.

    The defaults are those of the reference text. `--size nano` replaces some, see SIZES in
    model.py.
    """

    size: str = option("vit-l", "of the models; nano, for a CPU, has other defaults", tuple(SIZES))
    num_frames: int = option(16, "frames of a clip", above=0)
    fps: int = option(5, "frames per second of a clip", above=0)
    every: int = option(64, "ticks from the start of one clip to the start of the next", above=0)
    buffer: int = option(64, "clips in the shuffle buffer", low=0)
    mirror: float = option(0.0, "share of clips in which left and right are swapped", low=0, high=1)
    workers: int = option(1, "processes that read shards", above=0)
    max_problems: int = option(100, "stop after this many broken recordings or lines", above=0)
    n_updates: int = option(2000, "budget in optimizer steps", above=0)
    batch_size: int = option(8, "clips per process", above=0)
    learning_rate: float | None = option(None, "peak", above=0.0)
    optimizer: str = option("adamw", "muon needs fewer steps", ("adamw", "muon"))
    save_every: int = option(500, "steps between checkpoints", above=0)
    seed: int = option(0, "fixes initial weights, clips and masks", low=0)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "auto: the faster one", ("auto", "float32", "bfloat16"))
    resume: bool = option(False, "continue from the checkpoint in --out, with the next clip")


@dataclass
class PretrainConfig(VideoConfig):
    ema: float = option(0.99925, "momentum of the target encoder, per step")
    spread: float = option(0.0, "penalty on features that collapse into few directions", low=0)


def parse(kind: type, stage: str, description: str, argv: list[str] | None) -> Any:
    """The command line over the defaults of --size → an instance of `kind`, checked.

    It also has the fields that the spine's set_up and parallelize read.
    """
    parser = Parser(description=description)
    help = "shards of recordings; patterns are fine"
    parser.add_argument("--data", nargs="+", required=True, metavar="TAR", help=help)
    parser.add_argument("--out", required=True, help="folder, for example checkpoints/vjepa")
    parser.add_fields(kind)
    given = vars(parser.parse_args(argv))
    data, out = given.pop("data"), given.pop("out")
    device = choose_device(given.get("device", "auto"))
    if given.get("resume"):
        cfg = resumed(kind, STAGES[stage], {"out": out, **given}, device)
    else:
        cfg = kind(**SIZES[given.get("size", "vit-l")][stage] | given)
    check_ranges(cfg)
    if cfg.num_frames % TUBELET:
        raise UserError(f"--num-frames must be even, got {cfg.num_frames}: a tubelet has {TUBELET}")
    cfg.data, cfg.out, cfg.device = data, out, str(device)
    cfg.data_path, cfg.data_fingerprint = " ".join(data), files_fingerprint(find_shards(data))
    cfg.accumulate, cfg.compile, cfg.recompute = 1, False, False
    return cfg


def reader_settings(cfg: VideoConfig) -> dict:
    """A resumed stream continues with the next clip only if none of these has changed."""
    names = ("num_frames", "fps", "every", "buffer", "mirror", "workers", "seed")
    return {name: getattr(cfg, name) for name in names} | {"processes": n_ranks()}


class Stream:
    """Endless batches of clips on the device.

    It also measures how long the training loop waits for them, and the position of each reader.
    """

    def __init__(
        self,
        cfg: VideoConfig,
        process: ProcessVPT,
        shards: list[str],
        passed: dict | None = None,
        n_batches: int = 0,
    ):
        self.passed, self.device = dict(passed or {}), cfg.device
        self.waited, self.began = 0.0, time.perf_counter()
        clips = Clips(
            shards,
            process,
            cfg.every,
            cfg.buffer,
            cfg.seed,
            max_problems=cfg.max_problems,
            passed=self.passed,
            mirror=cfg.mirror,
            n_batches=n_batches,
        )
        self.batches = batches(clips, cfg.batch_size, cfg.workers)

    def positions(self) -> dict[str, int]:
        """Position of each reader of all processes, for the checkpoint."""
        if n_ranks() == 1:
            return dict(self.passed)
        everywhere = [None] * n_ranks()
        dist.all_gather_object(everywhere, self.passed)
        return {reader: n for passed in everywhere for reader, n in passed.items()}

    def next(self, *names: str) -> list[Tensor]:
        """These entries of the next batch."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began
        self.passed[str(int(batch["worker"][0]))] = int(batch["position"].max())
        return [batch[name].to(self.device, non_blocking=True) for name in names]

    def share_waited(self) -> float:
        """Share of the time since the last call that the loop spent waiting."""
        now = time.perf_counter()
        share = self.waited / (now - self.began)
        self.waited, self.began = 0.0, now
        return share


def resume_stream(
    cfg: VideoConfig,
    saver: CheckpointSaver,
    start_step: int,
    process: ProcessVPT,
    shards: list[str],
) -> Stream:
    """The clips of this training run; with --resume from the next unseen one on."""
    passed = load_checkpoint(saver.path, saver.stage)["passed"] if start_step else None
    return Stream(cfg, process, shards, passed, start_step)


# --- training --------------------------------------------------------------------------------


def model_args_of(cfg: PretrainConfig) -> dict:
    sizes = SIZES[cfg.size]
    return dict(
        size=sizes["size"],
        tubelets=cfg.num_frames // TUBELET,
        encoder=list(sizes["encoder"]),
        masked=list(sizes["masked"]),
        spread=cfg.spread,
    )


def describe_features(log: TrainLog, width: int) -> None:
    """Print in one line whether the features have collapsed."""
    found = log.latest("feature_std", "effective_rank").values()
    std, rank = found if len(found) == 2 else (math.nan, math.nan)
    remedy = ""
    if std < 0.1 or rank < 5:
        remedy = (
            "; they have collapsed:"
            " try a smaller --learning-rate, an --ema nearer to 1, or --spread"
        )
    print(f"features: standard deviation {std:.2f}, effective rank {rank:.1f} of {width}{remedy}")


def main(argv: list[str] | None = None) -> None:
    cfg = parse(PretrainConfig, STAGE, __doc__, argv)
    if not 0 <= cfg.ema < 1:
        raise UserError(f"--ema must be at least 0 and below 1, got {cfg.ema}")
    device, autocast = set_up(cfg)

    # --- data, model and optimizer
    shards, model_args = find_shards(cfg.data), model_args_of(cfg)
    process = ProcessVPT(cfg.num_frames, cfg.fps, TUBELET, model_args["size"])
    model = Pretraining(**model_args).to(device)
    network = parallelize(model, cfg)
    optimizer = make_optimizer(model, cfg)
    n_encoder, n_predictor = (count_parameters(m) for m in (model.encoder, model.predictor))
    print(f"model: {n_encoder:,} parameters in the encoder, {n_predictor:,} in the predictor")

    # --- output folder and resume
    same = dict(model_args=model_args, reading=reader_settings(cfg))
    saver = CheckpointSaver(cfg, STAGE, model, optimizer, **same)
    start_step, n_updates = saver.resume(cfg.n_updates)
    stop = StopSignal()
    log = TrainLog(cfg, STAGE, start_step, n_updates, stop)
    guard = StepGuard(log, start_step)
    stream = resume_stream(cfg, saver, start_step, process, shards)

    # --- loop
    done = start_step
    bar = progress(start_step, n_updates, STAGE)
    for step in bar:
        set_lr(optimizer, lr_at(step, n_updates, cfg))
        with autocast():
            loss, targets = network(*stream.next("video"))
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if guard.is_finite(step, loss, grad_norm, saved=saver.last_saved()):
            optimizer.step()
        optimizer.zero_grad()
        model.update_target(cfg.ema)

        done = step + 1
        last = done == n_updates or stop.asked
        if done % 20 == 0 or last:
            std, rank = std_and_rank(targets)
            values = dict(feature_std=std, effective_rank=rank, waited=stream.share_waited())
            log.write(done, loss=loss.detach(), grad_norm=grad_norm, **values)
            text = f"loss {loss:.3f}, features: std {std:.2f}, rank {rank:.0f}"
            bar.set_postfix_str(text, refresh=False)
        if done % cfg.save_every == 0 or last:
            saver.save(done, log, guard, passed=stream.positions())
        if last:
            break

    # --- finish
    describe_features(log, model.encoder.dim)
    options = f"--data {' '.join(cfg.data)} --size {cfg.size} --out {cfg.out}"
    next_command = f"python -m extras.vjepa_ac.train {options} --encoder {saver.path}"
    saver.finish(done, log, guard, next_command)


if __name__ == "__main__":
    print_user_errors()
    main()
