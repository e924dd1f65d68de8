"""Stage 3: train the dynamics model on the tokens of stage 1 and the actions of stage 2.

In:   footage, OUT/tokenizer.pt and OUT/lam.pt (or --video-tokenizer-path, --lam-path).
Out:  OUT/dynamics.pt; in OUT/dynamics/: metrics.jsonl, loss.png and pictures (truth over context and prediction).

    python train_dynamics.py --data-path data/pong.h5 --out checkpoints/pong
    python train_dynamics.py --data-path data/pong.h5 --out checkpoints/pong --objective mse    # the trainer of seed 002
    python train_dynamics.py --data-path data/pong.h5 --out checkpoints/true --actions true \\
        --video-tokenizer-path checkpoints/pong/tokenizer.pt    # the skyline: real buttons instead of latent actions

Both earlier stages stay frozen and run once over the footage (TokenClips in data_utils.py); masks, loss and decoding are in models/dynamics.py.
"""
import shutil
from pathlib import Path

from config import DynamicsConfig, UserError, parse_config, print_user_errors

import numpy as np
import torch
from tqdm import tqdm

from data_utils import TokenClips, n_buttons, open_footage, to_float
from metrics import print_warnings
from models.checkpoint import build_model, check_fit, fingerprint, load_checkpoint, save_checkpoint
from models.distributed import rand
from models.dynamics import DynamicsModel
from models.world_model import WorldModel
from optimizer import make_optimizer, rate_at
from pictures import grid
from train_utils import Run, check_memory, make_model, open_clips, plan, set_up, validation_logs, wrap


def load_frozen(cfg, clips, device):
    """Stages 1 and 2 as cfg names them. → (tokenizer, LAM or None for true actions, sizes for the model, their checkpoints)."""
    files = {"tokenizer": Path(cfg.video_tokenizer_path or Path(cfg.out) / "tokenizer.pt")}
    if cfg.actions != "true":
        files["lam"] = Path(cfg.lam_path or Path(cfg.out) / "lam.pt")
    elif clips.footage.actions is None:
        raise UserError(f"--actions true, but {cfg.data_path} has no recorded actions; leave it out to use latent ones")
    saved = {stage: load_checkpoint(path, stage) for stage, path in files.items()}
    models = {stage: build_model(checkpoint, files[stage]).to(device) for stage, checkpoint in saved.items()}
    check_fit(saved["tokenizer"], saved.get("lam"))
    for stage in saved:
        home = Path(cfg.out) / f"{stage}.pt"
        if home.exists() and fingerprint(load_checkpoint(home, stage)) != fingerprint(saved[stage]):
            raise UserError(f"{home} is another {stage} than {files[stage]}; a world has one of each, so use another --out")
    sizes = saved["tokenizer"]["model_args"]
    longest = min(checkpoint["model_args"]["context_length"] for checkpoint in saved.values())
    if cfg.context_length > longest:
        raise UserError(f"--context-length {cfg.context_length}, but {' and '.join(saved)} learned from clips of {longest}; use that, or train them with more")
    if sizes["frame_size"] != clips.frame_size:
        raise UserError(f"{files['tokenizer']} is for frames of {sizes['frame_size']}, the footage has {clips.frame_size}")
    (H, W), P = sizes["frame_size"], sizes["patch_size"]
    n_actions = saved["lam"]["model_args"]["n_actions"] if "lam" in saved else n_buttons(clips.footage)
    model_sizes = dict(grid=[H // P, W // P], levels=sizes["levels"], n_actions=n_actions)
    return models["tokenizer"], models.get("lam"), model_sizes, list(saved.values())


def rollout_picture(world, frames, actions):
    """Per clip of frames uint8 (B, T, H, W, 3): the truth, and below it the first half, played on with its actions."""
    T = frames.shape[1]
    world.reset(frames[:, : T // 2], actions[:, : T // 2 - 1])
    played = np.stack([world.step(actions[:, t - 1]) for t in range(T // 2, T)], axis=1)  # (B, T - T//2, H, W, 3)
    below = np.concatenate([frames[:, : T // 2], played], axis=1)
    return grid([row for pair in zip(frames, below) for row in pair])


def main(argv=None):
    # --- settings and set-up
    cfg = parse_config(DynamicsConfig, "dynamics", __doc__, argv)
    device, autocast = set_up(cfg)

    # --- data
    clips = open_clips(open_footage(cfg), cfg)

    # --- frozen stages: they label the footage once
    tokenizer, lam, sizes, frozen = load_frozen(cfg, clips[0], device)
    inputs = {checkpoint["stage"]: fingerprint(checkpoint) for checkpoint in frozen}

    @torch.no_grad()
    def label(frames, buttons):
        frames = to_float(frames, device)  # (B, T, 3, H, W)
        with autocast():
            return tokenizer.encode(frames), lam.infer(frames) if lam else buttons  # (B, T, N), (B, T-1)

    train, val = (TokenClips(part, label, {**inputs, "dtype": cfg.dtype}) for part in clips)

    def batch_of(clips, step):
        tokens, actions = (x.to(device, non_blocking=True) for x in clips.batch(step))
        if cfg.actions == "random":
            actions = (rand(*actions.shape, device=device) * sizes["n_actions"]).long()
        return tokens, actions

    # --- model
    model_args = dict(
        **sizes, embed_dim=cfg.embed_dim, hidden_dim=cfg.hidden_dim, n_heads=cfg.n_heads, n_blocks=cfg.n_blocks,
        context_length=cfg.context_length, objective=cfg.objective,
        clean_context=cfg.context == "clean", adaln=cfg.conditioning == "adaln", token_kernel=cfg.token_kernel,
    )  # fmt: skip
    model = make_model(DynamicsModel, model_args, device)
    network = wrap(model, cfg)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {sizes['n_actions']} {cfg.actions} actions")

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
    run = Run(cfg, "dynamics")
    first, n_updates = run.open(model, optimizer, n_updates, model_args=model_args, inputs=inputs)
    done = first
    for checkpoint in frozen if run.first else ():  # a world is complete: bring stages that were trained elsewhere
        home = Path(cfg.out) / f"{checkpoint['stage']}.pt"
        if not home.exists():
            save_checkpoint(home, checkpoint)
            table = Path(cfg.lam_path).parent / "actions.json"
            if checkpoint["stage"] == "lam" and table.exists():
                shutil.copy(table, cfg.out)
    more = dict(
        model_args=model_args, inputs=inputs, fps=clips[0].footage.fps,
        start_frames=clips[1].spread(8)[0][:, :4].clone(), action_names=list(clips[0].footage.action_names) if not lam else None,
    )  # fmt: skip
    shown = np.linspace(0, len(val) - 1, 4).astype(int)

    # --- loop
    bar = tqdm(range(first, n_updates), initial=first, total=n_updates, unit="step", desc="dynamics", mininterval=1, disable=not run.first)
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
            bar.set_postfix_str(f"loss {loss:.4f}, {logs['accuracy_changing']:.2f} of changed tokens", refresh=False)
        if done % cfg.sample_every == 0 or last:
            with torch.no_grad(), autocast():
                logs = validation_logs(model, val_batches)
                others = validation_logs(model, [(tokens, (actions + 1) % sizes["n_actions"]) for tokens, actions in val_batches])
            action_gain = others["val_loss"] / logs["val_loss"] - 1  # what it costs to be told wrong actions
            run.log(done, **logs, val_action_gain=action_gain)
            world = WorldModel(tokenizer, lam, model.eval(), steps=cfg.steps, temperature=cfg.temperature, capture=False)
            run.picture(done, rollout_picture(world, val.frames(shown), val.pick(shown)[1]))
            model.train()
        if done % cfg.save_every == 0 or last:
            run.save(model, optimizer, done, n_updates, **more)
        if last:
            break

    # --- finish
    if not run.first:
        return
    if done == n_updates > first:
        print_warnings({"dynamics/action_gain": action_gain})
    run.finish(done, n_updates, f"python play.py --checkpoint {cfg.out}")


if __name__ == "__main__":
    print_user_errors()
    main()
