"""Stage 2: train the latent action model.

In:   footage; recorded buttons, if the footage has any, are not looked at.
Out:  OUT/lam.pt; OUT/actions.json: what each action does to the picture, the legend of play.py; in OUT/lam/: metrics.jsonl,
      loss.png and pictures (frames, predictions of the next, the next; actions.png: the change that each action makes).

    python train_lam.py --data-path data/pong.h5 --out checkpoints/pong
    python train_lam.py --data-path videos/ --out checkpoints/mine --n-actions 16
    python train_lam.py --use-dummy-data --out checkpoints/dummy --preset tiny --decoder frame --keep-rate 0    # the article's decoder

Watch error_over_copy (below 1: the actions explain something) and codes_used (n_actions: no collapse).
"""
from config import LatentActionConfig, parse_config, print_user_errors

import torch
from tqdm import tqdm

from action_table import write_action_table
from data_utils import open_footage, to_float, to_uint8
from metrics import print_warnings
from models.latent_action_model import LatentActionModel
from optimizer import make_optimizer, rate_at
from pictures import grid
from train_utils import Run, check_memory, make_model, open_clips, plan, set_up, validation_logs, wrap


def main(argv=None):
    # --- settings and set-up
    cfg = parse_config(LatentActionConfig, "lam", __doc__, argv)
    device, autocast = set_up(cfg)

    # --- data
    train, val = open_clips(open_footage(cfg), cfg)

    def batch_of(clips, step):
        frames, _ = clips.batch(step)
        return (to_float(frames, device),)  # (B, T, 3, H, W)

    # --- model
    model_args = dict(
        frame_size=train.frame_size, patch_size=cfg.patch_size, embed_dim=cfg.embed_dim, hidden_dim=cfg.hidden_dim,
        n_heads=cfg.n_heads, n_blocks=cfg.n_blocks, context_length=cfg.context_length, n_actions=cfg.n_actions,
        encoder=cfg.encoder, decoder=cfg.decoder, keep_rate=cfg.keep_rate,
        unit_rms=cfg.latent_norm == "rms", soft_rate=cfg.soft_rate, entropy_lambda=cfg.entropy_lambda,
        var_target=cfg.var_target, var_lambda=cfg.var_lambda,
    )  # fmt: skip
    model = make_model(LatentActionModel, model_args, device)
    network = wrap(model, cfg)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {cfg.n_actions} latent actions")

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
    run = Run(cfg, "lam")
    first, n_updates = run.open(model, optimizer, n_updates, model_args=model_args)
    done = first

    # --- loop
    bar = tqdm(range(first, n_updates), initial=first, total=n_updates, unit="step", desc="lam", mininterval=1, disable=not run.first)
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
            bar.set_postfix_str(f"loss {loss:.3f}, {logs['error_over_copy']:.2f} of copy, {logs['codes_used']} codes", refresh=False)
        if done % cfg.sample_every == 0 or last:
            frames = val_batches[0][0][:8]
            with torch.no_grad(), torch.random.fork_rng(), autocast():
                run.log(done, **validation_logs(model, val_batches))
                predicted = model.predict(frames, model.infer(frames))
            run.picture(done, grid([to_uint8(f[:, -1]) for f in (frames[:, :-1], predicted, frames)]))
        if done % cfg.save_every == 0 or last:
            run.save(model, optimizer, done, n_updates, model_args=model_args)
        if last:
            break

    # --- finish
    if not run.first:
        return
    with autocast():
        rows = write_action_table(run.path, val.spread(128)[0], device)
    print_warnings({"lam/error_over_copy": run.latest("val_error_over_copy"), "lam/n_actions": cfg.n_actions,
                    "lam/actions_used": sum(row["share"] > 0 for row in rows), "lam/largest_share": max(row["share"] for row in rows)})  # fmt: skip
    run.finish(done, n_updates, f"python train_dynamics.py {run.data_option} --out {cfg.out}")


if __name__ == "__main__":
    print_user_errors()
    main()
