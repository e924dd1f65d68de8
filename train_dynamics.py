"""Stage 3: train the dynamics model on the tokens of stage 1 and the actions of stage 2.

In:   video, OUT/tokenizer.pt and OUT/lam.pt (or --video-tokenizer-path, --lam-path).
Out:  OUT/dynamics.pt; in OUT/dynamics/: metrics.jsonl, loss.png and pictures (truth over context
      and prediction).

    python train_dynamics.py --data-path data/pong.h5 --out checkpoints/pong
    python train_dynamics.py --data-path data/pong.h5 --out checkpoints/true --actions true \\
        --video-tokenizer-path checkpoints/pong/tokenizer.pt    # an oracle: the true actions

Both earlier stages stay frozen and run once over the video (TokenClips in data_utils.py); masks,
loss and decoding are in models/dynamics.py.
"""

from config import DynamicsConfig, parse_config  # before torch: utils/__init__.py says why
from utils.checkpoint import CheckpointSaver
from utils.cli import print_user_errors
from utils.device import parallelize, set_up, sync_gradients
from utils.hardening.forecast import check_model, plan_updates
from utils.hardening.stages import complete_world, load_frozen
from utils.hardening.steps import StepGuard, StopSignal
from utils.log import TrainLog, progress, statistics_text
from utils.optimizer import count_parameters, lr_at, make_optimizer, set_lr

import torch

from data_utils import TokenClips, open_clips, to_float
from evaluation import stages
from evaluation.metrics import print_warnings
from models.distributed import rand
from models.dynamics import DynamicsModel
from models.next_latent import NextLatentModel
from models.world_model import WorldModel


def main(argv=None):
    cfg = parse_config(DynamicsConfig, "dynamics", __doc__, argv)
    device, autocast = set_up(cfg)

    # --- data: the frozen stages label it once
    clips = open_clips(cfg)
    frozen = load_frozen(cfg, clips[0], device)
    n_actions = frozen.n_actions

    def label(frames, true_actions):
        with torch.no_grad(), autocast():
            return frozen.label(to_float(frames, device), true_actions)  # (B, T, N), (B, T-1)

    inputs = frozen.inputs | {"dtype": cfg.dtype}
    train, val = TokenClips(clips[0], label, inputs), TokenClips(clips[1], label, inputs)

    def get_batch(clips, step):
        tokens, actions = clips.batch(step)  # (B, T, N), (B, T-1)
        if cfg.actions == "random":
            actions = (rand(*actions.shape, device=device) * n_actions).long()
        return tokens.to(device, non_blocking=True), actions.to(device, non_blocking=True)

    # --- model and optimizer
    model_args = dict(grid=frozen.grid, levels=frozen.levels, n_actions=n_actions)
    model_args |= cfg.transformer_sizes() | dict(adaln=cfg.conditioning == "adaln")
    model_args |= dict(objective=cfg.objective, clean_context=cfg.context == "clean")
    model_args |= dict(token_kernel=cfg.token_kernel)
    kind = DynamicsModel
    if cfg.objective == "mse":
        kind, model_args["action_codes"] = NextLatentModel, True
    check_model(kind, model_args, device)
    model = kind(**model_args).to(device)
    network = parallelize(model, cfg)
    optimizer = make_optimizer(model, cfg)
    print(f"model: {count_parameters(model):,} parameters, {n_actions} {cfg.actions} actions")

    n_updates = plan_updates(cfg, model, train, network, optimizer, autocast, get_batch)
    val_batches = [get_batch(val, i) for i in range(4)]

    # --- output folder and resume
    same = dict(model_args=model_args, inputs=frozen.inputs)
    saver = CheckpointSaver(cfg, "dynamics", model, optimizer, **same)
    start_step, n_updates = saver.resume(n_updates)
    stop = StopSignal()
    log = TrainLog(cfg, "dynamics", start_step, n_updates, stop)
    guard = StepGuard(log, start_step, cfg.max_skipped)
    complete_world(cfg, frozen)
    for_playing = dict(fps=clips[0].dataset.fps, action_names=frozen.action_names)
    for_playing["start_frames"] = clips[1].evenly_spaced(8)[0][:, :4].clone()

    # --- loop
    done = start_step
    bar = progress(start_step, n_updates, "dynamics")
    for step in bar:
        set_lr(optimizer, lr_at(step, n_updates, cfg))
        for micro_step in range(cfg.accumulate):
            sync_gradients(network, last=micro_step == cfg.accumulate - 1)
            with autocast():
                loss, logs = network(*get_batch(train, step * cfg.accumulate + micro_step))
            (loss / cfg.accumulate).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if guard.is_finite(step, loss, grad_norm, train, saver.last_saved()):
            optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        last = done == n_updates or stop.asked
        if done % 10 == 0 or last:
            few = (x[:4] for x in val_batches[0])
            logs["shuffled"] = stages.with_shuffled_actions(model, *few, autocast)
            log.write(done, loss=loss.detach(), grad_norm=grad_norm, **logs)
            text = f"loss {loss:.4f}, {logs['accuracy_changing']:.2f} of changed tokens"
            bar.set_postfix_str(text + statistics_text(logs), refresh=False)
        if done % cfg.sample_every == 0 or last:
            with torch.no_grad(), autocast():
                log.write(done, **stages.validation_with_wrong_actions(model, val_batches))
            sampling = dict(steps=cfg.steps, temperature=cfg.temperature)
            world = WorldModel(frozen.tokenizer, frozen.lam, model.eval(), **sampling)
            log.picture(done, stages.rollout_picture(world, val))
            model.train()
        if done % cfg.save_every == 0 or last:
            saver.save(done, log, guard, **for_playing)
        if last:
            break

    # --- finish
    print_warnings(log.latest("action_gain"))
    saver.finish(done, log, guard, f"python play.py --checkpoint {cfg.out}")


if __name__ == "__main__":
    print_user_errors()
    main()
