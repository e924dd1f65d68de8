"""Stage 1: train the video tokenizer.

In:   footage (a folder of videos, one video, an HDF5 file, or --use-dummy-data).
Out:  OUT/tokenizer.pt; in OUT/tokenizer/: metrics.jsonl, loss.png and pictures (originals over reconstructions).

    python train_tokenizer.py --data-path data/pong.h5 --out checkpoints/pong
    python train_tokenizer.py --data-path videos/ --out checkpoints/mine --minutes 30
    python train_tokenizer.py --use-dummy-data --out checkpoints/dummy --preset tiny

The loss is the plain squared error; nothing else is needed, see models/video_tokenizer.py.
"""
from config import TokenizerConfig, parse_config, print_user_errors

import torch
from tqdm import tqdm

from data_utils import open_footage, to_float, to_uint8
from metrics import print_warnings
from models.video_tokenizer import VideoTokenizer
from optimizer import make_optimizer, rate_at
from pictures import grid
from train_utils import Run, check_memory, make_model, open_clips, plan, set_up, validation_logs, wrap


def main(argv=None):
    # --- settings and set-up
    cfg = parse_config(TokenizerConfig, "tokenizer", __doc__, argv)
    device, autocast = set_up(cfg)

    # --- data
    train, val = open_clips(open_footage(cfg), cfg)

    def batch_of(clips, step):
        frames, _ = clips.batch(step)
        return (to_float(frames, device),)  # (B, T, 3, H, W)

    # --- model
    model_args = dict(
        frame_size=train.frame_size, patch_size=cfg.patch_size, embed_dim=cfg.embed_dim, hidden_dim=cfg.hidden_dim,
        n_heads=cfg.n_heads, n_blocks=cfg.n_blocks, levels=list(cfg.levels), context_length=cfg.context_length,
    )  # fmt: skip
    model = make_model(VideoTokenizer, model_args, device)
    network = wrap(model, cfg)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {model.quantizer.codebook_size:,} codes")

    # --- optimizer and schedule
    optimizer = make_optimizer(model, cfg)

    def trial():
        with autocast():
            loss, _ = network(*batch_of(train, 0))
        loss.backward()
        optimizer.zero_grad()

    check_memory(cfg, model, train, trial)
    n_updates = plan(cfg, train, trial)
    val_batches = [batch_of(val, i) for i in range(4)]

    # --- output folder and resume
    run = Run(cfg, "tokenizer")
    first, n_updates = run.open(model, optimizer, n_updates, model_args=model_args)
    done = first

    # --- loop
    bar = tqdm(range(first, n_updates), initial=first, total=n_updates, unit="step", desc="tokenizer", mininterval=1, disable=not run.first)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, n_updates, cfg)
        for part in range(cfg.accumulate):
            network.require_backward_grad_sync = part == cfg.accumulate - 1  # DDP: processes meet once per step
            with autocast():
                loss, logs = network(*batch_of(train, step * cfg.accumulate + part))
            (loss / cfg.accumulate).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if run.sound(step, loss, norm, train):
            optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        last = done == n_updates or run.stopped(done)
        if done % 10 == 0 or last:
            run.log(done, loss=loss.detach(), grad_norm=norm, **logs)
            bar.set_postfix_str(f"loss {loss:.5f}, {logs['psnr']:.1f} dB", refresh=False)
        if done % cfg.sample_every == 0 or last:
            frames = val_batches[0][0][:8]
            with torch.no_grad(), torch.random.fork_rng(), autocast():
                run.log(done, **validation_logs(model, val_batches))
                rebuilt = model.decode(model.encode(frames))
            run.picture(done, grid([to_uint8(frames[:, -1]), to_uint8(rebuilt[:, -1])]))
        if done % cfg.save_every == 0 or last:
            run.save(model, optimizer, done, n_updates, model_args=model_args)
        if last:
            break

    # --- finish
    if not run.first:
        return
    print_warnings({"tokenizer/codes_used": run.latest("val_codes_used")})
    run.finish(done, n_updates, f"python train_lam.py {run.data_option} --out {cfg.out}")


if __name__ == "__main__":
    print_user_errors()
    main()
