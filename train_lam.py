"""Stage 2: train the latent action model.

In:   video; recorded actions, if there are any, are looked at with --label-weight only.
Out:  OUT/lam.pt; OUT/actions.json: what each action does to the picture, the legend of play.py;
      in OUT/lam/: metrics.jsonl, loss.png and pictures (last frames, predictions, truths;
      actions.png: the change that each action makes).

    python train_lam.py --data-path data/pong.h5 --out checkpoints/pong
    python train_lam.py --data-path videos/ --out checkpoints/mine --n-actions 16

Watch error_over_copy (below 1: the actions explain something), codes_used (n_actions: no
collapse) and shuffled (error with wrong codes over error; 1: the codes are ignored).
"""

from config import LatentActionConfig, parse_config  # before torch: utils/__init__.py says why
from utils.checkpoint import CheckpointSaver
from utils.cli import print_user_errors
from utils.device import parallelize, set_up, sync_gradients
from utils.hardening.forecast import check_model, plan_updates
from utils.hardening.steps import StepGuard, StopSignal
from utils.log import TrainLog, data_option, progress, statistics_text, validation_logs
from utils.optimizer import count_parameters, lr_at, make_optimizer, set_lr
from utils.pictures import grid

import torch

from data_utils import open_clips, to_float, to_uint8
from evaluation import news, stages
from evaluation.metrics import print_warnings
from models.latent_action_model import LatentActionModel


def main(argv=None):
    cfg = parse_config(LatentActionConfig, "lam", __doc__, argv)
    device, autocast = set_up(cfg)

    # --- data
    train, val = open_clips(cfg)

    def get_batch(clips, step):
        frames, lessons = clips.batch(step)
        return to_float(frames, device), *news.taught(clips, lessons, device)  # (B, T, 3, H, W)

    # --- model and optimizer
    model_args = dict(frame_size=train.frame_size, patch_size=cfg.patch_size)
    model_args |= cfg.transformer_sizes() | cfg.lam_args()
    check_model(LatentActionModel, model_args, device)
    model = LatentActionModel(**model_args).to(device)
    network = parallelize(model, cfg)
    optimizer = make_optimizer(model, cfg)
    print(f"model: {count_parameters(model):,} parameters, {cfg.n_actions} latent actions")

    n_updates = plan_updates(cfg, model, train, network, optimizer, autocast, get_batch)
    val_batches = [get_batch(val, i) for i in range(4)]

    # --- output folder and resume
    saver = CheckpointSaver(cfg, "lam", model, optimizer, model_args=model_args)
    start_step, n_updates = saver.resume(n_updates)
    stop = StopSignal()
    log = TrainLog(cfg, "lam", start_step, n_updates, stop)
    guard = StepGuard(log, start_step, cfg.max_skipped)
    train, lesson = news.teach(train, cfg, device, autocast)  # what the past does not foretell

    # --- loop
    done = start_step
    bar = progress(start_step, n_updates, "lam")
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
            logs["shuffled"] = stages.with_shuffled_codes(model, val_batches[0][0][:4], autocast)
            log.write(done, loss=loss.detach(), grad_norm=grad_norm, **logs)
            text = "loss {:.3f}, {error_over_copy:.2f} of copy, {codes_used} codes".format(
                loss, **logs
            )
            bar.set_postfix_str(text + statistics_text(logs), refresh=False)
        if done % cfg.sample_every == 0 or last:
            frames = val_batches[0][0][:8]
            with torch.no_grad(), torch.random.fork_rng(), autocast():
                log.write(done, **validation_logs(model, val_batches))
                predicted = model.predict(frames, model.infer(frames))
            rows = (frames[:, -2], predicted[:, -1], frames[:, -1])
            log.picture(done, grid([to_uint8(row) for row in rows]))
        if done % cfg.save_every == 0 or last:
            saver.save(done, log, guard)
        if last:
            break

    # --- finish
    measured = news.report_codes(model.eval(), saver.path, train, val, cfg, autocast, lesson)
    print_warnings(log.latest("error_over_copy", "latent_variance") | measured)
    next_command = f"python train_dynamics.py {data_option(cfg)} --out {cfg.out}"
    saver.finish(done, log, guard, next_command)


if __name__ == "__main__":
    print_user_errors()
    main()
