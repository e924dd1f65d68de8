"""Stage 1: train the video tokenizer.

In:   video (a folder, one file, an HDF5 dataset, or --use-dummy-data).
Out:  OUT/tokenizer.pt; in OUT/tokenizer/: metrics.jsonl, loss.png and pictures (originals over
      reconstructions).

    python train_tokenizer.py --data-path data/pong.h5 --out checkpoints/pong
    python train_tokenizer.py --data-path videos/ --out checkpoints/mine --minutes 30
    python train_tokenizer.py --use-dummy-data --out checkpoints/dummy --preset tiny
"""

from config import TokenizerConfig, parse_config  # before torch: utils/__init__.py says why
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
from evaluation.metrics import print_warnings
from models.video_tokenizer import VideoTokenizer


def main(argv=None):
    cfg = parse_config(TokenizerConfig, "tokenizer", __doc__, argv)
    device, autocast = set_up(cfg)

    # --- data
    train, val = open_clips(cfg)

    def get_batch(clips, step):
        frames, _ = clips.batch(step)
        return (to_float(frames, device),)  # (B, T, 3, H, W)

    # --- model and optimizer
    model_args = dict(frame_size=train.frame_size, patch_size=cfg.patch_size)
    model_args |= dict(levels=list(cfg.levels)) | cfg.transformer_sizes()
    check_model(VideoTokenizer, model_args, device)
    model = VideoTokenizer(**model_args).to(device)
    network = parallelize(model, cfg)
    optimizer = make_optimizer(model, cfg)
    print(f"model: {count_parameters(model):,} parameters, {model.quantizer.codebook_size:,} codes")

    n_updates = plan_updates(cfg, model, train, network, optimizer, autocast, get_batch)
    val_batches = [get_batch(val, i) for i in range(4)]

    # --- output folder and resume
    saver = CheckpointSaver(cfg, "tokenizer", model, optimizer, model_args=model_args)
    start_step, n_updates = saver.resume(n_updates)
    stop = StopSignal()
    log = TrainLog(cfg, "tokenizer", start_step, n_updates, stop)
    guard = StepGuard(log, start_step, cfg.max_skipped)

    # --- loop
    done = start_step
    bar = progress(start_step, n_updates, "tokenizer")
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
            log.write(done, loss=loss.detach(), grad_norm=grad_norm, **logs)
            text = f"loss {loss:.5f}, {logs['psnr']:.1f} dB"
            bar.set_postfix_str(text + statistics_text(logs), refresh=False)
        if done % cfg.sample_every == 0 or last:
            frames = val_batches[0][0][:8]
            with torch.no_grad(), autocast():
                log.write(done, **validation_logs(model, val_batches))
                rebuilt = model.decode(model.encode(frames))
            log.picture(done, grid([to_uint8(frames[:, -1]), to_uint8(rebuilt[:, -1])]))
        if done % cfg.save_every == 0 or last:
            saver.save(done, log, guard)
        if last:
            break

    # --- finish
    print_warnings(log.latest("codes_used"))
    next_command = f"python train_lam.py {data_option(cfg)} --out {cfg.out}"
    saver.finish(done, log, guard, next_command)


if __name__ == "__main__":
    print_user_errors()
    main()
