"""Measure a world: every metric of every stage, each beside its trivial baseline, as a table, JSON and pictures.

    python validate.py --checkpoint checkpoints/pong --data-path data/pong-test.h5 --val-fraction 0.5
    python validate.py --checkpoint checkpoints/pong/tokenizer.pt --data-path data/pong-test.h5 --save-images report

Everything is measured on the last --val-fraction of the footage, but for codebook use, which wants all of it. Recorded buttons, where the footage has them, serve
as the yardstick for the latent actions: the ceiling is a classifier of the LAM encoder's size, trained on the buttons of the
rest of the footage. PSNR in dB over pictures in [0, 1]; "_changing" counts only pixels that differ from the last known frame.

Rollouts are sampled at a low temperature (--temperature), since PSNR wants the mean of what may come; a world is played at a higher one, for the mean
soon becomes an endless lawn. The report says which (dynamics/temperature, dynamics/steps); the action pictures are sampled as in play.
"""
import copy
import json
from functools import partial
from pathlib import Path

from config import LatentActionConfig, Parser, UserError, check_sampling, choose_device, make_folder, print_user_errors

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import metrics
from data_utils import Clips, n_buttons, open_footage, to_float, to_uint8
from models.checkpoint import MODELS, build_model, check_fit, load_checkpoint
from models.latent_action_model import LatentActionsEncoder
from models.world_model import WorldModel
from optimizer import make_optimizer, rate_at
from pictures import enlarge, grid, labelled_grid, save_png, save_video
from train_utils import autocast_on, reuse_memory
from video_features import i3d_features, load_i3d, smallnet_features

CONTEXT, HORIZON = 4, 16  # frames that a rollout is given, and frames that it plays
FVD_CLIPS = 64  # fewer would make the covariance a guess
SAMPLING = dict(steps=2, temperature=0.2)  # of the rollouts that are measured
USAGE_FRAMES = 20_480  # at most; codebook use is counted over all of the footage


def unit(frames):
    """uint8 (…) → float in [0, 1]."""
    return torch.as_tensor(frames).float() / 255


def tokenizer_metrics(tokenizer, clips, many, device, folder):
    """clips for quality; `many`, whatever the footage has, for codebook use: rare codes need many frames to be seen."""
    frames, _ = clips
    rebuilt = [to_uint8(tokenizer.decode(tokenizer.encode(to_float(batch, device)))) for batch in frames.split(16)]
    tokens = [tokenizer.encode(to_float(batch, device)).cpu() for batch in tqdm(many.split(16), desc="codebook", leave=False)]
    truth, predicted = unit(frames[:, 1:]), unit(torch.cat(rebuilt)[:, 1:])
    mask = metrics.changed(truth, unit(frames[:, :-1]))
    use = metrics.shares(torch.cat(tokens), tokenizer.quantizer.codebook_size)
    if folder:
        save_png(grid([frames[:8, -1], torch.cat(rebuilt)[:8, -1]]), folder / "reconstructions.png")
    return {
        "psnr": metrics.psnr(((predicted - truth) ** 2).mean()),
        "copy_psnr": metrics.psnr(((unit(frames[:, :-1]) - truth) ** 2).mean()),
        "psnr_changing": metrics.masked_psnr(predicted, truth, mask),
        "copy_psnr_changing": metrics.masked_psnr(unit(frames[:, :-1]), truth, mask),
        "codebook_usage": float((use > 0).mean()),
        "codebook_frames": many.shape[0] * many.shape[1],
        "perplexity": metrics.perplexity(use),
    }


def lam_metrics(lam, clips, device):
    frames, buttons = clips
    codes = torch.cat([lam.infer(to_float(batch, device)).cpu() for batch in frames.split(16)])  # (B, T-1)
    truth = unit(frames[:, 1:])

    def error_with(actions):  # of the next frame
        pairs = zip(frames.split(16), actions.to(device).split(16))
        predicted = torch.cat([to_uint8(lam.predict(to_float(batch, device), now)) for batch, now in pairs])
        return ((unit(predicted) - truth) ** 2).mean()

    use = metrics.shares(codes, lam.n_actions)
    changes = (to_float(frames)[:, 1:] - to_float(frames)[:, :-1]).flatten(0, 1)  # (M, 3, H, W)
    changes = F.adaptive_avg_pool2d(changes, 16).flatten(1)
    clip_of = torch.arange(len(frames)).repeat_interleave(codes.shape[1])
    same, chance = metrics.consistency(changes, codes.flatten(), clip_of)
    result = {
        "psnr": metrics.psnr(error_with(codes)),
        "psnr_shuffled": metrics.psnr(error_with(codes.roll(1, 0))),  # told another clip's codes
        "copy_psnr": metrics.psnr(((unit(frames[:, :-1]) - truth) ** 2).mean()),
        "n_actions": lam.n_actions,
        "actions_used": int((use > 0).sum()),
        "perplexity": metrics.perplexity(use),
        "largest_share": float(use.max()),
        "consistency": same,
        "consistency_chance": chance,
    }
    if buttons is not None:
        result |= {
            "nmi": metrics.nmi_above_chance(codes, buttons),
            "accuracy": metrics.best_mapping_accuracy(codes, buttons),
            "majority": float(metrics.shares(buttons, int(buttons.max()) + 1).max()),
        }
    return result


@torch.enable_grad()
def classify_buttons(model_args, rest, frames, device, autocast, n_updates):
    """Train the LAM's encoder on the buttons of the clips in `rest`; → its guesses for frames, (B, T-1)."""
    sizes = {name: model_args[name] for name in ("frame_size", "patch_size", "embed_dim", "hidden_dim", "n_heads", "n_blocks",
                                                 "context_length")}  # fmt: skip
    torch.manual_seed(0)
    encoder = LatentActionsEncoder(**sizes, out_dim=n_buttons(rest.footage)).to(device)
    recipe = LatentActionConfig(dtype="bfloat16" if autocast.keywords["enabled"] else "float32")  # as the LAM is trained
    optimizer = make_optimizer(encoder, recipe)
    for step in tqdm(range(n_updates), desc="ceiling", unit="step", leave=False, mininterval=1):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, n_updates, recipe)
        batch, buttons = rest.batch(step)
        with autocast():
            loss = F.cross_entropy(encoder(to_float(batch, device)).flatten(0, 1), buttons.flatten().to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), autocast():
        return torch.cat([encoder(to_float(batch, device)).argmax(-1).cpu() for batch in frames.split(16)])


def rollout(world, frames, actions, seed=0):
    """Play on from the first CONTEXT frames of each clip (B, T, H, W, 3) with actions (B, T-1) → uint8 (B, T-CONTEXT, H, W, 3)."""
    world.generator.manual_seed(seed)  # the same dice for every set of actions
    played = []
    for start, pressed in tqdm(list(zip(frames.split(16), actions.split(16))), desc="rollout", leave=False):
        world.reset(start[:, :CONTEXT], pressed[:, : CONTEXT - 1])
        played.append(np.stack([world.step(pressed[:, t - 1]) for t in range(CONTEXT, frames.shape[1])], axis=1))
    return torch.from_numpy(np.concatenate(played))


def dynamics_metrics(world, clips, device, folder, i3d=None):
    frames, buttons = clips
    video = to_float(frames, device)
    tokens = torch.cat([world.tokenizer.encode(batch) for batch in video.split(16)])  # (B, T, N)
    actions = torch.cat([world.lam.infer(batch) for batch in video.split(16)]) if world.lam else buttons.to(device)
    result = {"steps": world.steps, "temperature": world.temperature}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        length = world.dynamics.transformer.context_length
        loss, _ = world.dynamics(tokens[:, :length], actions[:, : length - 1])
    result["masked_ce" if world.dynamics.objective == "ce" else "latent_mse"] = float(loss)
    if world.dynamics.objective == "ce":
        all_masked = torch.ones_like(tokens[:, 1:length], dtype=torch.bool)
        guess = world.dynamics.masked_logits(tokens[:, :length], actions[:, : length - 1], all_masked).argmax(-1)
        moved = tokens[:, 1:length] != tokens[:, : length - 1]
        result["token_accuracy_changing"] = float((guess == tokens[:, 1:length])[moved].float().mean())

    # The same clips and dice with other actions; the frames given stay labelled as they are.
    generator = torch.Generator().manual_seed(0)
    future = actions[:, CONTEXT - 1 :].cpu()
    use = torch.from_numpy(metrics.shares(actions.cpu(), world.n_actions))
    others = {
        "": torch.randint(world.n_actions, future.shape, generator=generator),
        "_null": torch.full_like(future, int(use.argmax())),
        "_marginal": torch.multinomial(use, future.numel(), replacement=True, generator=generator).view(future.shape),
    }
    played = {"inferred": rollout(world, frames, actions)}
    for name, replacement in others.items():
        played[name] = rollout(world, frames, torch.cat([actions[:, : CONTEXT - 1], replacement.to(device)], dim=1))

    truth, copy = unit(frames[:, CONTEXT:]), unit(frames[:, CONTEXT - 1 : CONTEXT])
    for t in range(truth.shape[1]):
        now = truth[:, t]
        mask = metrics.changed(now, copy[:, 0])
        whole = {name: metrics.psnr(((unit(p[:, t]) - now) ** 2).mean()) for name, p in played.items()}
        moving = {name: metrics.masked_psnr(unit(p[:, t]), now, mask) for name, p in played.items()}
        result[f"rollout_psnr_t{t + 1}"] = whole["inferred"]
        result[f"copy_psnr_t{t + 1}"] = metrics.psnr(((copy[:, 0] - now) ** 2).mean())
        if t + 1 == 4:
            result["rollout_psnr_t4_changing"] = moving["inferred"]
            result["copy_psnr_t4_changing"] = metrics.masked_psnr(copy[:, 0], now, mask)
            for name in others:
                result[f"delta_psnr{name}_t4"] = whole["inferred"] - whole[name]
                result[f"delta_psnr{name}_t4_changing"] = moving["inferred"] - moving[name]
    if len(frames) >= FVD_CLIPS and len(truth[0]) >= HORIZON:
        name, features = "smallnet", smallnet_features
        if i3d is not None:
            name, features = "i3d", partial(i3d_features, i3d)
        real = features(frames[:, CONTEXT:])
        result[f"fvd_{name}"] = metrics.frechet_distance(features(played["inferred"]), real)
        still = frames[:, CONTEXT - 1 : CONTEXT].expand(-1, HORIZON, -1, -1, -1)
        result[f"fvd_{name}_copy"] = metrics.frechet_distance(features(still), real)
    if folder:
        rows = [row for i in (0, len(frames) // 2) for row in (frames[i], *(torch.cat([frames[i, :CONTEXT], p[i]]) for p in played.values()))]
        save_png(grid(rows), folder / "rollouts.png")
    return result


def save_action_pictures(world, starts, actions, folder, n_steps=8):
    """What a player gets: the action table (rows: start frames; columns: the start, then each latent action held for 4 steps); actions.gif is the
    table in motion over 8 steps, action_K.gif one column of it."""
    columns = [np.repeat(starts[:, -1:].numpy(), n_steps + 1, axis=1)]  # each (n, n_steps + 1, H, W, 3)
    for action in range(world.n_actions):
        world.generator.manual_seed(0)
        world.reset(starts, actions)
        columns.append(np.stack([starts[:, -1].numpy()] + [world.step([action] * len(starts)) for _ in range(n_steps)], axis=1))
        side_by_side = np.concatenate(columns[-1], axis=2)  # (n_steps + 1, H, n·W, 3)
        save_video([enlarge(frame, 2) for frame in side_by_side], folder / f"action_{action}.gif", fps=6)
    tables = [labelled_grid(np.stack([c[:, t] for c in columns], axis=1), ["start", *world.action_names]) for t in range(n_steps + 1)]
    save_png(tables[4], folder / "actions.png")
    save_video(tables, folder / "actions.gif", fps=6)


@torch.no_grad()
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a world's folder, or one stage's .pt file in it")
    parser.add_argument("--data-path", default="", help="footage; best recorded with a seed that was never trained on")
    parser.add_argument("--data-type", default="auto", choices=("auto", "folder", "video", "h5", "dummy"))
    parser.add_argument("--use-dummy-data", action="store_true")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="share of the footage, at its end, to measure on [0.1]")
    parser.add_argument("--clips", type=int, default=128, help="clips to measure on, spread over that part [128]")
    parser.add_argument("--save-images", default="", metavar="DIR")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--fvd-features", default="", metavar="FILE", help="TorchScript I3D, for the published FVD [a small network of our own]")
    parser.add_argument("--classifier-updates", type=int, help="to train the classifier of buttons for; 0 leaves it out [400; 50 for a world of preset tiny]")
    parser.add_argument("--steps", type=int, default=SAMPLING["steps"], help="MaskGIT passes per frame of the rollouts [2]")
    parser.add_argument("--temperature", type=float, default=SAMPLING["temperature"], help="of their sampling; 0 is greedy [0.2]")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction <= 1:
        raise UserError(f"--val-fraction must lie above 0 and at most at 1, got {args.val_fraction}")
    if args.clips < 1:
        raise UserError(f"--clips must be positive, got {args.clips}")
    if args.classifier_updates is not None and args.classifier_updates < 0:
        raise UserError(f"--classifier-updates must not be negative, got {args.classifier_updates}")
    check_sampling(args)

    # --- checkpoints: which stages are there
    device, path = choose_device(args.device), Path(args.checkpoint)
    reuse_memory()
    if not path.exists():
        raise UserError(f"no such checkpoint: {path}; give a world's folder or one of its .pt files")
    found = [stage for stage in MODELS if path.is_dir() and (path / f"{stage}.pt").exists() or path.name == f"{stage}.pt"]
    if not found:
        raise UserError(f"no checkpoint in {path}; expected tokenizer.pt, lam.pt or dynamics.pt")
    folder = path if path.is_dir() else path.parent
    world = WorldModel.load(folder, device) if "dynamics" in found else None
    loaded = {stage: load_checkpoint(folder / f"{stage}.pt", stage) for stage in found if stage != "dynamics"}
    models = {stage: build_model(checkpoint, folder / f"{stage}.pt").to(device) for stage, checkpoint in loaded.items()}
    if "tokenizer" in loaded:
        check_fit(loaded["tokenizer"], loaded.get("lam"))

    # --- footage
    frame_size = world.frame_size if world else next(iter(loaded.values()))["model_args"]["frame_size"]
    args.frame_size = frame_size[0]
    footage = open_footage(args)
    images = Path(args.save_images) if args.save_images else None
    H, W = footage.frames.shape[1:3]
    if frame_size != [H, W]:
        raise UserError(f"{footage.name} has frames of {H}×{W}, {path} is for {frame_size[0]}×{frame_size[1]}; record at that size")

    def clips_of(length):
        return Clips(footage, "val", length, val_fraction=args.val_fraction).spread(args.clips)

    clips_for = {stage: clips_of(checkpoint["model_args"]["context_length"]) for stage, checkpoint in loaded.items()}
    if world:
        clips_for["dynamics"] = clips_of(CONTEXT + HORIZON)
        if world.lam is None and (footage.actions is None or footage.actions.max() >= world.n_actions):
            raise UserError(f"{path} was trained on true actions 0 … {world.n_actions - 1}; {footage.name} must have the same ones")

    i3d = load_i3d(args.fvd_features) if args.fvd_features else None
    if i3d is not None and (world is None or len(clips_for["dynamics"][0]) < FVD_CLIPS):
        raise UserError(f"--fvd-features needs a dynamics model and {FVD_CLIPS} clips of {CONTEXT + HORIZON} frames; use more footage or --clips")
    if Path(args.json).is_dir() and args.json:
        raise UserError(f"--json {args.json} is a folder; give the name of a file")
    for place in [images] * bool(images) + [Path(args.json).parent] * bool(args.json):
        make_folder(place)

    # --- measure
    report, autocast = {}, autocast_on(device)
    for stage, checkpoint in loaded.items():
        sizes, clips = checkpoint["model_args"], clips_for[stage]
        model = models[stage]
        with autocast():
            if stage == "tokenizer":
                many = Clips(footage, "val", sizes["context_length"], val_fraction=1.0).spread(USAGE_FRAMES // sizes["context_length"])[0]
                values = tokenizer_metrics(model, clips, many, device, images)
            else:
                values = lam_metrics(model, clips, device)
        n_updates = args.classifier_updates
        if n_updates is None:
            n_updates = 50 if checkpoint.get("config", {}).get("preset") == "tiny" else 400
        if stage == "lam" and clips[1] is not None and args.val_fraction < 1 and n_updates:
            rest = Clips(footage, "train", sizes["context_length"], batch_size=16, val_fraction=args.val_fraction)
            values["nmi_ceiling"] = metrics.nmi_above_chance(classify_buttons(sizes, rest, clips[0], device, autocast, n_updates), clips[1])
        report |= {f"{stage}/{name}": value for name, value in values.items()}
    if world:
        measured, (frames, buttons) = copy.copy(world), clips_for["dynamics"]
        measured.steps, measured.temperature, measured.last = args.steps, args.temperature, world.last[:0]
        with autocast():
            values = dynamics_metrics(measured, (frames, buttons), device, images, i3d)
            if images:
                some = slice(None, None, max(1, len(frames) // 4))
                save_action_pictures(world, frames[some][:4, :CONTEXT], None if world.lam else buttons[some][:4, : CONTEXT - 1], images)
        report |= {f"dynamics/{name}": value for name, value in values.items()}

    # --- report
    for name, value in report.items():
        print(f"{name:36} {value:10.4g}")
    metrics.print_warnings(report)
    if args.json:
        Path(args.json).write_text(json.dumps({name: float(value) for name, value in report.items()}, indent=1) + "\n")
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
