"""Train the action predictor: features so far and an action → features of the next tubelet.

This is V-JEPA 2-AC (arXiv:2506.09985, §3) on recordings in VPT's format.

    DATA='data/vpt/train-*.tar'
    python -m extras.vjepa_ac.train --data "$DATA" --size nano --out checkpoints/vjepa \\
        --encoder checkpoints/vjepa/pretrain.pt
    python -m extras.vjepa_ac.train --data "$DATA" --out checkpoints/vjepa \\
        --encoder-checkpoint vitl.pt                                          # Meta's weights

Writes OUT/action_predictor.pt, which also holds the frozen encoder; in OUT/action_predictor/:
metrics.jsonl and loss.png. Both also show the error of copying the last features (copy).
"""

from dataclasses import dataclass
from pathlib import Path

from utils.checkpoint import CheckpointSaver, load_checkpoint
from utils.cli import CheckpointError, UserError, option, print_user_errors
from utils.device import parallelize, set_up
from utils.hardening.files import previous_of
from utils.hardening.steps import StepGuard, StopSignal
from utils.hardening.untrusted import rebuild_untrusted
from utils.log import TrainLog, progress
from utils.optimizer import count_parameters, lr_at, make_optimizer, set_lr

import torch
from torch import Tensor, nn

from extras.vjepa_ac.model import SIZES, TUBELET, ActionPredictor, Encoder, load_encoder, losses
from extras.vjepa_ac.pretrain import (
    STAGES,
    Pretraining,
    VideoConfig,
    parse,
    reader_settings,
    resume_stream,
)
from extras.vjepa_ac.vpt import Problems, ProcessVPT, find_shards, statistics

STAGE = STAGES["train"]


class ActionTraining(nn.Module):
    """The frozen encoder and the predictor.

    (video uint8 (B, T, 3, S, S), actions (B, T/2 − 1, D), states (B, T/2, 2)) → (teacher-forced
    loss, rollout loss, error of copying the last features).

    remember: the features of how many tubelets are cached. Clips that begin every few ticks share
    most of their tubelets, and the encoder does not change.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: ActionPredictor,
        auto_steps: int,
        exponent: float,
        remember: int = 0,
    ):
        super().__init__()
        self.encoder, self.predictor = encoder.requires_grad_(False), predictor
        self.auto_steps, self.exponent = auto_steps, exponent
        self.remember, self.known = remember, {}

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """Encoder.each_tubelet, but cached tubelets are not encoded again."""
        if not self.remember:
            return self.encoder.each_tubelet(video)
        tubelets = video.unflatten(1, (-1, TUBELET)).flatten(0, 1)  # (B·T/2, 2, 3, S, S)
        keys = [hash(tubelet.tobytes()) for tubelet in tubelets.cpu().numpy()]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        if new:
            encoded = self.encoder.each_tubelet(tubelets[list(new.values())])[:, 0]
            self.known.update(zip(new, encoded, strict=True))
        x = torch.stack([self.known[key] for key in keys])  # (B·T/2, N, E)
        for key in list(self.known)[: -self.remember]:  # the oldest
            del self.known[key]
        return x.unflatten(0, (len(video), -1))

    def forward(self, video: Tensor, actions: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        features = self.features(video)  # (B, T/2, N, E): context, and targets one step later
        settings = (self.auto_steps, self.exponent)
        forced, rolled = losses(self.predictor, features, actions, states, *settings)
        change = (features[:, 1:] - features[:, :-1]).abs()
        return forced, rolled, (change**self.exponent).mean() / self.exponent


@dataclass
class TrainConfig(VideoConfig):
    encoder: str = option("", "the pretrain.pt that pretrain.py wrote")
    encoder_checkpoint: str = option("", "instead of it a public V-JEPA 2 checkpoint file")
    v_jepa_1: bool = option(False, "the public file is one of V-JEPA 1")
    action_dim: int = option(13, "13: mouse and hotbar; 36 or 38: all keys, see vpt.py")
    auto_steps: int = option(2, "tubelets of the rollout in the loss")
    # a tubelet takes 12 KB in nano and 1 MB in vit-l; it pays where --every makes clips overlap
    remember: int = option(0, "tubelets whose features are cached", low=0)
    loss_exponent: float = option(1.0, "1: absolute error; 2: squared (the reference text)")


def parse_config(argv: list[str] | None) -> TrainConfig:
    cfg = parse(TrainConfig, "train", __doc__, argv)
    tubelets = cfg.num_frames // TUBELET
    if not 1 <= cfg.auto_steps < tubelets:
        raise UserError(
            f"--auto-steps must lie in 1 to {tubelets - 1}, with {cfg.num_frames} frames;"
            f" got {cfg.auto_steps}"
        )
    if bool(cfg.encoder) == bool(cfg.encoder_checkpoint):
        raise UserError(
            "give one of --encoder (from pretrain.py) and --encoder-checkpoint (a public V-JEPA"
            " file)"
        )
    return cfg


def load_saved(path: str | Path, stage: str, module: str) -> dict:
    """What that module of this folder has saved. Raises CheckpointError where there is nothing."""
    if not (Path(path).is_file() or previous_of(Path(path)).is_file()):
        raise CheckpointError(
            f"no checkpoint at {path}; make one with: python -m extras.vjepa_ac.{module}"
        )
    return load_checkpoint(path, stage)


def pretrained(path: str | Path) -> Encoder:
    """The target encoder of pretrain.py."""
    saved = load_saved(path, "pretrain", "pretrain")
    return rebuild_untrusted(lambda: Pretraining(**saved["model_args"]), saved, path).target


def load_model(
    path: str | Path, device: str = "cpu"
) -> tuple[Encoder, ActionPredictor, ProcessVPT]:
    """→ (encoder, predictor, ProcessVPT as in training), in evaluation mode.

    Raises CheckpointError for any other file.
    """
    saved = load_saved(path, STAGE, "train")
    sizes = saved["model_args"]

    def make():
        encoder, predictor = Encoder(**sizes["encoder"]), ActionPredictor(**sizes["predictor"])
        return ActionTraining(encoder, predictor, 1, 1)

    model = rebuild_untrusted(make, saved, path).to(device)
    return model.encoder, model.predictor, ProcessVPT(**saved["process"])


def frozen_encoder(cfg: TrainConfig) -> Encoder:
    if cfg.encoder:
        return pretrained(cfg.encoder)
    return load_encoder(cfg.encoder_checkpoint, "sinusoid" if cfg.v_jepa_1 else "rotary-public")


def process_settings(cfg: TrainConfig, encoder: Encoder, shards: list[str]) -> dict:
    """The arguments of ProcessVPT, with the statistics of these shards."""
    settings = dict(
        num_frames=cfg.num_frames,
        fps=cfg.fps,
        frameskip=TUBELET,
        size=encoder.size,
        action_dim=cfg.action_dim,
    )
    found = statistics(shards, ProcessVPT(**settings), Problems(cfg.max_problems))
    return settings | {"statistics": found}


def build_training(cfg: TrainConfig, encoder: Encoder) -> tuple[ActionTraining, dict]:
    """→ (ActionTraining, the arguments of its two models)."""
    dim, depth, heads = SIZES[cfg.size]["predictor"]
    encoder_args = dict(
        size=encoder.size,
        dim=encoder.dim,
        depth=len(encoder.blocks),
        heads=encoder.blocks[0].attn.heads,
        kind=encoder.kind,
        hidden=encoder.blocks[0].mlp.fc1.out_features,
    )
    predictor_args = dict(
        grid=encoder.grid,
        encoder_dim=encoder.dim,
        action_dim=cfg.action_dim,
        dim=dim,
        depth=depth,
        heads=heads,
    )
    predictor = ActionPredictor(**predictor_args)
    settings = (cfg.auto_steps, cfg.loss_exponent, cfg.remember)
    model = ActionTraining(encoder, predictor, *settings).to(cfg.device)
    size, encoder_size = count_parameters(predictor), count_parameters(encoder)
    print(f"model: {size:,} parameters, on an encoder of {encoder_size:,}")
    return model, dict(encoder=encoder_args, predictor=predictor_args)


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    _, autocast = set_up(cfg)

    # --- data, model and optimizer
    encoder, shards = frozen_encoder(cfg), find_shards(cfg.data)
    settings = process_settings(cfg, encoder, shards)
    process = ProcessVPT(**settings)
    model, model_args = build_training(cfg, encoder)
    network = parallelize(model, cfg)
    optimizer = make_optimizer(model.predictor, cfg)

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
        video, actions, states = stream.next("video", "actions", "states")
        with autocast():
            forced, rolled, copy = network(video, actions, states)
        loss = forced + rolled
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.predictor.parameters(), 1.0)
        if guard.is_finite(step, loss, grad_norm, saved=saver.last_saved()):
            optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        last = done == n_updates or stop.asked
        if done % 50 == 0 or last:
            # the error with another clip's actions: if it is the same, actions have no effect yet
            with torch.no_grad(), autocast():
                other = model(video, actions.roll(1, 0), states)[0]
            errors = dict(forced=forced.detach(), rollout=rolled.detach())
            errors |= dict(other_actions=other, copy=copy, grad_norm=grad_norm)
            log.write(done, loss=loss.detach(), **errors, waited=stream.share_waited())
            text = f"one step {forced:.3f}, with other actions {other:.3f}, copy {copy:.3f}"
            bar.set_postfix_str(text, refresh=False)
        if done % cfg.save_every == 0 or last:
            saver.save(done, log, guard, process=settings, passed=stream.positions())
        if last:
            break

    # --- finish
    options = f"--checkpoint {saver.path} --data {' '.join(cfg.data)} --test TAR"
    saver.finish(done, log, guard, f"python -m extras.vjepa_ac.evaluate {options}")


if __name__ == "__main__":
    print_user_errors()
    main()
