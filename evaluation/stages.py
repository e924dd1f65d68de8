"""The metrics of each stage, with the trivial baseline of each.

PSNR is in dB over pictures in [0, 1]. "_changing" counts only pixels that differ from the last
known frame.
"""

import math
from collections.abc import Callable
from pathlib import Path

from config import LatentActionConfig
from utils.log import validation_logs
from utils.optimizer import lr_at, make_optimizer, set_lr
from utils.pictures import enlarge, grid, save_png

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data_utils import Clips, TokenClips, to_float, to_uint8
from evaluation import control, metrics
from evaluation.action_table import describe_actions
from models.latent_action_model import LatentActionsEncoder
from models.world_model import WorldModel
from player.film import labelled_grid, save_video

CONTEXT, HORIZON = 4, 16  # frames that a rollout is given, and frames that it generates
FVD_CLIPS = 64  # with fewer clips the estimated covariance is too noisy


def unit(frames) -> Tensor:
    """uint8 (…) → float in [0, 1]."""
    return torch.as_tensor(frames).float() / 255


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).mean()


def tokenizer_metrics(tokenizer, frames: Tensor, all_frames: Tensor, device, folder=None) -> dict:
    """Quality on clips `frames`. Codebook use on `all_frames`, because rare codes need many."""
    rebuilt, tokens = [], []
    for batch in frames.split(16):
        rebuilt.append(to_uint8(tokenizer.decode(tokenizer.encode(to_float(batch, device)))))
    for batch in tqdm(all_frames.split(16), desc="codebook", leave=False):
        tokens.append(tokenizer.encode(to_float(batch, device)).cpu())
    rebuilt = torch.cat(rebuilt)
    truth, copy, predicted = unit(frames[:, 1:]), unit(frames[:, :-1]), unit(rebuilt[:, 1:])
    mask = metrics.changed(truth, copy)
    use = metrics.shares(torch.cat(tokens), tokenizer.quantizer.codebook_size)
    if folder:
        save_png(grid([frames[:8, -1], rebuilt[:8, -1]]), folder / "reconstructions.png")
    return {
        "psnr": metrics.psnr(squared_error(predicted, truth)),
        "copy_psnr": metrics.psnr(squared_error(copy, truth)),
        "psnr_changing": metrics.masked_psnr(predicted, truth, mask),
        "copy_psnr_changing": metrics.masked_psnr(copy, truth, mask),
        "codebook_usage": float((use > 0).mean()),
        "codebook_frames": all_frames.shape[0] * all_frames.shape[1],
        "perplexity": metrics.perplexity(use),
    }


def lam_metrics(lam, frames: Tensor, true_actions: Tensor | None, device, folder=None) -> dict:
    """How well codes explain what changes, and, where there are true actions, what they tell."""
    codes = [lam.infer(to_float(batch, device)).cpu() for batch in frames.split(16)]
    codes = torch.cat(codes)  # (B, T-1)
    truth, copy = unit(frames[:, 1:]), unit(frames[:, :-1])

    def error_with(actions):  # of the next frame
        predicted = []
        for batch, now in zip(frames.split(16), actions.to(device).split(16), strict=True):
            predicted.append(to_uint8(lam.predict(to_float(batch, device), now)))
        return squared_error(unit(torch.cat(predicted)), truth)

    use = metrics.shares(codes, lam.n_actions)
    changes = (to_float(frames)[:, 1:] - to_float(frames)[:, :-1]).flatten(0, 1)  # (M, 3, H, W)
    changes = F.adaptive_avg_pool2d(changes, 16).flatten(1)
    clip_of = torch.arange(len(frames)).repeat_interleave(codes.shape[1])
    same, chance = metrics.consistency(changes, codes.flatten(), clip_of)
    result = {
        "psnr": metrics.psnr(error_with(codes)),
        "psnr_shuffled": metrics.psnr(error_with(codes.roll(1, 0))),  # with another clip's codes
        "copy_psnr": metrics.psnr(squared_error(copy, truth)),
        "n_actions": lam.n_actions,
        "actions_used": int((use > 0).sum()),
        "perplexity": metrics.perplexity(use),
        "largest_share": float(use.max()),
        "consistency": same,
        "consistency_chance": chance,
    }
    known = None if true_actions is None else true_actions >= 0
    if known is not None and known.any():
        found, truth = codes[known], true_actions[known]
        result |= {
            "nmi": metrics.nmi_above_chance(found, truth),
            "accuracy": metrics.best_mapping_accuracy(found, truth),
            "majority": float(metrics.shares(truth, int(truth.max()) + 1).max()),
        }
    if folder:
        save_png(describe_actions(lam, frames, device)[1], folder / "lam_actions.png")
        seen, now = frames[:8], codes[:8].to(device)
        predicted = to_uint8(lam.predict(to_float(seen, device), now))
        rows = [seen[:, -2], predicted[:, -1], seen[:, -1]]  # the last known, predicted, true frame
        save_png(grid(rows), folder / "lam_predictions.png")
    return result


@torch.enable_grad()
def train_classifier(sizes: dict, rest: Clips, device, autocast, n_updates: int):
    """A supervised classifier: the LAM's encoder, trained on the true actions of clips in `rest`.

    A tenth of `rest` is set aside. The weights with the least cross-entropy there are kept, because
    with few frames the classifier soon knows its training clips by heart.
    """
    torch.manual_seed(0)
    encoder = LatentActionsEncoder(**sizes, out_dim=rest.dataset.n_true_actions()).to(device)
    # the default optimizer and learning rate of LAM training
    cfg = LatentActionConfig(dtype="bfloat16" if autocast.keywords["enabled"] else "float32")
    optimizer = make_optimizer(encoder, cfg)
    border = max(1, len(rest.starts) * 9 // 10)
    aside = rest.starts[border + rest.length - 1 :]  # no frame in both
    aside = rest.read(aside[:: max(1, len(aside) // 64)]) if len(aside) else None
    if aside and (aside[1] < 0).all():
        aside = None
    rest.starts = rest.starts[:border]
    least, kept = math.inf, encoder.state_dict()
    bar = tqdm(range(n_updates), desc="classifier", unit="step", leave=False, mininterval=1)
    for step in bar:
        set_lr(optimizer, lr_at(step, n_updates, cfg))
        batch, true_actions = rest.batch(step)
        with autocast():
            logits = encoder(to_float(batch, device)).flatten(0, 1)
            truths = true_actions.flatten().to(device)
            loss = F.cross_entropy(logits, truths, ignore_index=-1, reduction="sum")
            loss = loss / (truths >= 0).sum().clamp_min(1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if aside and ((step + 1) % 50 == 0 or step + 1 == n_updates):
            now = cross_entropy(encoder, *aside, device, autocast)
            if now < least:
                least, kept = now, {n: w.clone() for n, w in encoder.state_dict().items()}
    encoder.load_state_dict(kept)
    return encoder


@torch.no_grad()
def cross_entropy(encoder, frames: Tensor, true_actions: Tensor, device, autocast) -> float:
    """Of the encoder's guesses of the true actions (B, T-1) of frames (B, T, H, W, 3), in nats."""
    with autocast():
        logits = [encoder(to_float(batch, device)).float().cpu() for batch in frames.split(16)]
    logits, truths = torch.cat(logits).flatten(0, 1), true_actions.flatten()
    return float(F.cross_entropy(logits[truths >= 0], truths[truths >= 0]))


def classifier_nmi(options, dataset, checkpoint: dict, clips, device, autocast) -> dict:
    """{"nmi_classifier": what a supervised classifier knows of the true actions}; {} without one.

    (H - cross-entropy) / H on the clips that are measured, the share of the actions' entropy H. It
    is what this much training finds, not an upper bound.
    """
    n_updates = options.classifier_updates
    if n_updates is None:
        n_updates = 50 if checkpoint.get("config", {}).get("preset") == "tiny" else 400
    frames, true_actions = clips
    if true_actions is None or options.val_fraction == 1 or n_updates == 0:
        return {}
    known = true_actions[true_actions >= 0]
    entropy = metrics.entropy(metrics.shares(known, dataset.n_true_actions()))
    if entropy == 0:
        return {}
    names = ("frame_size", "patch_size", "embed_dim", "hidden_dim", "n_heads", "n_blocks")
    sizes = {name: checkpoint["model_args"][name] for name in (*names, "context_length")}
    split = dict(batch_size=16, val_fraction=options.val_fraction)
    rest = Clips(dataset, "train", sizes["context_length"], **split)
    encoder = train_classifier(sizes, rest, device, autocast, n_updates)
    left = cross_entropy(encoder, frames, true_actions, device, autocast)
    return {"nmi_classifier": (entropy - left) / entropy}


def rollout(world: WorldModel, frames: Tensor, actions: Tensor, seed: int = 0) -> Tensor:
    """Continue the first CONTEXT frames of clips (B, T, H, W, 3) with actions (B, T-1).

    → uint8 (B, T-CONTEXT, H, W, 3).
    """
    world.generator.manual_seed(seed)  # the same random numbers for every set of actions
    played, pairs = [], list(zip(frames.split(16), actions.split(16), strict=True))
    for clip, given in tqdm(pairs, desc="rollout", leave=False):
        world.reset(clip[:, :CONTEXT], given[:, : CONTEXT - 1])
        steps = [world.step(given[:, t - 1]) for t in range(CONTEXT, frames.shape[1])]
        played.append(np.stack(steps, axis=1))
    return torch.from_numpy(np.concatenate(played))


def rollout_picture(world: WorldModel, val: TokenClips) -> np.ndarray:
    """Four validation clips. Below each, its second half is replaced by the world's rollout."""
    numbers = np.linspace(0, len(val) - 1, 4).astype(int)
    frames, actions = val.frames(numbers), val.select(numbers)[1]  # (4, T, H, W, 3), (4, T-1)
    T = frames.shape[1]
    half = T // 2
    world.reset(frames[:, :half], actions[:, : half - 1])
    played = [world.step(actions[:, t - 1]) for t in range(half, T)]
    below = np.concatenate([frames[:, :half], np.stack(played, axis=1)], axis=1)
    return grid([row for pair in zip(frames, below, strict=True) for row in pair])


def validation_with_wrong_actions(dynamics, batches: list[tuple]) -> dict[str, float]:
    """Validation logs, and in val_action_gain what it costs to be told wrong actions."""
    wrong = [(tokens, (actions + 1) % dynamics.n_actions) for tokens, actions in batches]
    logs = validation_logs(dynamics, batches)
    gain = validation_logs(dynamics, wrong)["val_loss"] / logs["val_loss"] - 1
    return logs | {"val_action_gain": gain}


@torch.no_grad()
def shuffle_ratio(loss_of: Callable, actions: Tensor) -> Tensor:
    """Loss with the actions of other transitions, over loss: 1 where actions are ignored.

    loss_of(actions) is called twice, with the same random masks.
    """
    losses = []
    order = torch.randperm(actions.numel(), generator=torch.Generator().manual_seed(0))
    for given in (actions.flatten()[order.to(actions.device)].view_as(actions), actions):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses.append(loss_of(given))
    return losses[0] / losses[1].clamp_min(1e-8)


@torch.no_grad()
def with_shuffled_codes(lam, frames: Tensor, autocast: Callable) -> Tensor:
    """The error of the next frames with the codes of other transitions, over that with their own.

    frames (B, T, 3, H, W) in [-1, 1].
    """

    def error_of(codes):
        return squared_error(lam.predict(frames, codes), frames[:, 1:])

    with autocast():
        return shuffle_ratio(error_of, lam.infer(frames))


def with_shuffled_actions(dynamics, tokens: Tensor, actions: Tensor, autocast: Callable) -> Tensor:
    """The loss of the dynamics model with the actions of other transitions, over that with its own.

    tokens (B, T, N), actions (B, T-1).
    """
    with autocast():
        return shuffle_ratio(lambda given: dynamics(tokens, given)[0], actions)


def one_step_metrics(dynamics, tokens: Tensor, actions: Tensor) -> dict:
    """Loss with random masks, and accuracy on changing tokens when whole frames are masked."""
    T = dynamics.transformer.context_length
    tokens, actions = tokens[:, :T], actions[:, : T - 1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss, _ = dynamics(tokens, actions)
    if dynamics.objective != "ce":
        return {"latent_mse": float(loss)}
    target, before = tokens[:, 1:], tokens[:, :-1]
    all_masked = torch.ones_like(target, dtype=torch.bool)
    guess = dynamics.masked_logits(tokens, actions, all_masked).argmax(-1)
    accuracy = (guess == target)[target != before].float().mean()
    return {"masked_ce": float(loss), "token_accuracy_changing": float(accuracy)}


def rollout_metrics(played: dict[str, Tensor], frames: Tensor) -> dict:
    """PSNR per horizon of the rollout with inferred actions, and of copying; ΔPSNR at the fourth.

    played: rollouts by kind of actions, "inferred" and those of control_metrics.
    """
    truth, copy = unit(frames[:, CONTEXT:]), unit(frames[:, CONTEXT - 1])
    result = {}
    for t in range(truth.shape[1]):
        predicted = unit(played["inferred"][:, t])
        result[f"rollout_psnr_t{t + 1}"] = metrics.psnr(squared_error(predicted, truth[:, t]))
        result[f"copy_psnr_t{t + 1}"] = metrics.psnr(squared_error(copy, truth[:, t]))
    now = truth[:, 3]
    mask = metrics.changed(now, copy)
    pictures = {name: unit(p[:, 3]) for name, p in played.items()}
    errors = {name: ((p - now) ** 2).mean(dim=(1, 2, 3)) for name, p in pictures.items()}
    moving = {name: metrics.masked_psnr(p, now, mask) for name, p in pictures.items()}
    result["rollout_psnr_t4_changing"] = moving["inferred"]
    result["copy_psnr_t4_changing"] = metrics.masked_psnr(copy, now, mask)
    for name, suffix in control.OTHERS.items():
        result[f"delta_psnr{suffix}_t4_changing"] = moving["inferred"] - moving[name]
    measured = control.control_metrics(errors)
    if not mask.any():  # then any action is right
        measured = dict.fromkeys(measured, math.nan)
    return result | measured


def video_distance(played: Tensor, frames: Tensor, name: str, features) -> dict:
    """Fréchet video distance of rollouts and, as a baseline, of a still picture."""
    real = features(frames[:, CONTEXT:])
    still = frames[:, CONTEXT - 1 : CONTEXT].expand(-1, HORIZON, -1, -1, -1)
    return {
        f"fvd_{name}": metrics.frechet_distance(features(played), real),
        f"fvd_{name}_copy": metrics.frechet_distance(features(still), real),
    }


def dynamics_metrics(world: WorldModel, clips, device, folder, features: tuple) -> dict:
    """clips: (frames, true actions). features: name and function for the video distance."""
    frames, true_actions = clips
    video = to_float(frames, device).split(16)
    tokens = torch.cat([world.tokenizer.encode(batch) for batch in video])  # (B, T, N)
    if world.lam:
        actions = torch.cat([world.lam.infer(batch) for batch in video])
    else:
        actions = true_actions.to(device)
    result = {"steps": world.steps, "temperature": world.temperature}
    result |= one_step_metrics(world.dynamics, tokens, actions)

    # all with the same clips and random numbers; actions between given frames are never replaced
    given = actions[:, : CONTEXT - 1]
    others = control.baseline_actions(actions, world.n_actions, CONTEXT - 1)
    labelled = true_actions is not None and bool((true_actions >= 0).all())
    if world.lam and labelled and len(frames) > 1:
        known = control.codes_of_true_actions(actions, true_actions)
        others["button"] = known[:, CONTEXT - 1 :]
    played = {"inferred": rollout(world, frames, actions)}
    for name, future in others.items():
        played[name] = rollout(world, frames, torch.cat([given, future.to(device)], dim=1))
    result |= rollout_metrics(played, frames)
    if len(frames) >= FVD_CLIPS and frames.shape[1] >= CONTEXT + HORIZON:
        result |= video_distance(played["inferred"], frames, *features)
    if folder:
        rows = []
        for i in (0, len(frames) // 2):
            rows.append(frames[i])
            rows += [torch.cat([frames[i, :CONTEXT], p[i]]) for p in played.values()]
        save_png(grid(rows), folder / "rollouts.png")
    return result


def save_action_pictures(world: WorldModel, clips: Tensor, actions, folder: Path, n_steps: int = 8):
    """The effect of each latent action: actions.png has a row per clip and a column per action.

    It shows the initial frame, and the frame after each action is held for 4 steps. actions.gif
    animates this table over n_steps, and action_K.gif one column of it.
    """
    first = clips[:, -1:].numpy()
    columns = [np.repeat(first, n_steps + 1, axis=1)]  # each (n, n_steps + 1, H, W, 3)
    for action in range(world.n_actions):
        world.generator.manual_seed(0)
        world.reset(clips, actions)
        steps = [world.step([action] * len(clips)) for _ in range(n_steps)]
        columns.append(np.concatenate([first, np.stack(steps, axis=1)], axis=1))
        side_by_side = np.concatenate(columns[-1], axis=2)  # (n_steps + 1, H, n·W, 3)
        video = [enlarge(frame, 2) for frame in side_by_side]
        save_video(video, folder / f"action_{action}.gif", fps=6)
    names = ["initial frame", *world.action_names]
    tables = []
    for t in range(n_steps + 1):
        rows = np.stack([column[:, t] for column in columns], axis=1)
        tables.append(labelled_grid(rows, names))
    save_png(tables[4], folder / "actions.png")
    save_video(tables, folder / "actions.gif", fps=6)
