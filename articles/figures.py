"""Draw the pictures of the articles and update every measured number in their text.

    python -m articles.figures             # articles/figures/*.png: two minutes on two cores
    python -m articles.figures --measure   # also measure the speed of single products

The pictures show the shipped Doom maze, on a recording that its training did not contain. Every run
draws the same pictures. The numbers go to docs/results/articles.json, and from there into the text.
The speed of single products (article 5) is taken from that file unless --measure is given.

The picture of collapse comes from two short training runs of a LAM half as wide as the shipped one.
"""

import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from utils.checkpoint import build_model, load_checkpoint, load_world
from utils.cli import Parser, print_user_errors
from utils.hardening.files import make_folder
from utils.pictures import grid, save_png

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import train_lam
from data_utils import Clips, open_dataset, to_float, to_uint8
from evaluation import metrics
from evaluation.action_table import optical_flow
from evaluation.stages import unit
from evaluation.video_features import smallnet_features
from extras.flow_inverse_dynamics.model import FlowInverseDynamics
from extras.vjepa_ac.model import ActionPredictor, Encoder
from models.dynamics import DynamicsModel, maskgit_decode
from models.fsq import FiniteScalarQuantizer
from models.latent_action_model import MOVES
from models.st_transformer import SpatioTemporalTransformer, apply_rope, rope_angles
from models.world_model import WorldModel
from player.film import labelled_grid
from tools import record
from tools.speedrun import describe_device, git_commit
from validate import SAMPLING

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "checkpoints/shipped/doom-maze"
OUT = ROOT / "articles/figures"
RESULTS = ROOT / "docs/results"
NUMBERS = RESULTS / "articles.json"
GRAY = 128


# --- helpers ---------------------------------------------------------------------------------
def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def plot(name: str, size: tuple, draw: Callable, **subplots) -> None:
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(**subplots))
    figure.savefig(OUT / f"{name}.png", dpi=90, metadata={"Software": None})


def patches(mask: Tensor) -> Tensor:
    """Boolean (…, 64) of tokens → (…, 64, 64, 1) of pixels."""
    mask = mask.reshape(*mask.shape[:-1], 8, 8)
    return mask.repeat_interleave(8, -2).repeat_interleave(8, -1)[..., None]


def striking(clips: Clips, n: int, among: int = 128) -> Tensor:
    """n clips, out of the half of `among` clips that has more contrast.

    The other half mostly shows a wall from near.
    """
    frames = clips.evenly_spaced(among)[0]
    contrast = frames.float().mean(-1).var(dim=(1, 2, 3))
    best = contrast.argsort(descending=True, stable=True)[: len(frames) // 2]
    return frames[best[torch.linspace(0, len(best) - 1, n).long()]]


def infer(world: WorldModel, frames: Tensor) -> Tensor:
    """Latent actions (B, T-1) of clips (B, T, H, W, 3)."""
    return torch.cat([world.lam.infer(to_float(batch)) for batch in frames.split(32)])


def numbered_names(world: WorldModel) -> list[str]:
    return [f"{i}  {name}" for i, name in enumerate(world.action_names)]


# --- 0: overview -----------------------------------------------------------------------------
def keys(world, clips):
    """One clip per row, one latent action per column, held for four frames."""
    initial = striking(clips, 4)[:, :4]
    columns = [initial[:, -1].numpy()]
    for action in range(world.n_actions):
        world.generator.manual_seed(0)
        world.reset(initial)
        columns.append([world.step([action] * len(initial)) for _ in range(4)][-1])
    names = ["initial frame", *world.action_names]
    save_png(labelled_grid(np.stack(columns, axis=1), names), OUT / "0_keys.png")
    return {}


# --- 1: video tokenizer ----------------------------------------------------------------------
def reconstruction(world, clips):
    frames = striking(clips, 8)
    tokens = world.tokenizer.encode(to_float(frames))  # (8, T, 64)
    rebuilt = to_uint8(world.tokenizer.decode(tokens))
    codes = world.tokenizer.quantizer.indices_to_codes(tokens[:, -1])  # (8, 64, 5)
    # the first three of five dimensions as red, green and blue
    colours = ((codes[..., :3] + 1) * 127.5).byte().view(8, 8, 8, 3)
    colours = colours.repeat_interleave(8, 1).repeat_interleave(8, 2)
    error = (rebuilt[:, -1].int() - frames[:, -1].int()).abs().mul(4).clamp(max=255).byte()
    save_png(grid([frames[:, -1], colours, rebuilt[:, -1], error]), OUT / "1_tokens.png")
    return {}


def straight_through(world, clips):
    """Rounding to four levels, and the slope that the backward pass uses instead."""
    quantizer = FiniteScalarQuantizer([4])
    z = torch.linspace(-3, 3, 601)[:, None].requires_grad_()
    codes = quantizer(z)
    (slope,) = torch.autograd.grad(codes.sum(), z)

    def draw(axes):
        axes[0].plot(z.detach(), torch.tanh(z.detach()), "k:", label="tanh(z)")
        axes[0].plot(z.detach(), codes.detach(), "C0", label="code (four levels)")
        axes[1].plot(z.detach(), slope, "C1", label="slope used in training: that of tanh")
        axes[1].plot(z.detach(), torch.zeros_like(slope), "k:", label="true slope of rounding")
        for ax in axes:
            ax.set_xlabel("z")
            ax.legend(frameon=False)

    plot("1_straight_through", (8, 3), draw, ncols=2)
    return straight_through_by_hand(quantizer)


def straight_through_by_hand(quantizer) -> dict:
    """Every step of the gradient for two numbers."""
    z = torch.tensor([[0.3], [-1.2]], requires_grad=True)
    target = torch.tensor([[1.0], [-1 / 3]])
    code = quantizer(z)
    ((code - target) ** 2).sum().backward()
    bounded = torch.tanh(z)
    found = {
        "tanh": bounded,
        "y": 1.5 * (bounded + 1),
        "code": code,
        "outer": 2 * (code - target),
        "slope": 1 - bounded**2,
        "gradient": z.grad,
    }
    numbers = {}
    for name, value in found.items():
        for i in range(2):
            numbers[f"hand/{name}_{i}"] = float(value[i].detach())
    return numbers


def codebook(world, clips):
    frames = clips.read(clips.non_overlapping)[0]
    tokens = torch.cat([world.tokenizer.encode(to_float(batch)) for batch in frames.split(32)])
    share = np.sort(metrics.shares(tokens, 1024))[::-1]

    def draw(axes):
        axes.semilogy(np.arange(1, 1025), np.maximum(share, 1e-7), "C0")
        axes.axhline(1 / 1024, color="k", linestyle=":", label="if all codes were equally frequent")
        axes.set(xlabel="codes, by frequency", ylabel="share of all tokens", ylim=(1e-7, 1))
        axes.legend(frameon=False)

    plot("1_codebook", (5, 3), draw)
    return {
        "codebook/frames": frames.shape[0] * frames.shape[1],
        "codebook/used": int((share > 0).sum()),
        "codebook/perplexity": metrics.perplexity(share),
        "codebook/largest_share": float(share[0]),
    }


def attention(world, clips):
    """What can influence one token after one block and after two.

    Measured by the gradient in a network with random weights.
    """
    blue, light, red = (torch.tensor(c) for c in ((70, 130, 220), (235, 235, 235), (220, 60, 50)))
    rows = []
    for n_blocks in (1, 2):
        torch.manual_seed(0)
        stack = SpatioTemporalTransformer(32, 64, 2, n_blocks, context_length=3)
        for weight in stack.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        x = torch.randn(1, 6, 64, 32, requires_grad=True)
        stack(x)[0, 4, 27].sum().backward()
        seen = patches(x.grad.abs().amax(-1)[0] > 0)  # (6, 64, 64, 1)
        picture = torch.where(seen, blue, light).byte()
        row, column = divmod(27, 8)
        picture[4, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = red.byte()
        rows.append(picture)
    names = [f"frame {t}" for t in range(6)]
    save_png(labelled_grid(np.stack(rows), names), OUT / "1_attention.png")
    return {}


def rotary(world, clips):
    """One query and one key, the same in every frame, rotated by the angles of their frames.

    Their product depends only on the distance between the frames.
    """
    torch.manual_seed(0)
    dim, frames = world.dynamics.transformer.head_dim, torch.arange(24)
    rope = rope_angles(frames, dim)
    q, k = (apply_rope(x.expand(24, dim), rope) for x in torch.randn(2, 1, dim))

    def draw(axes):
        cos, _ = rope
        for j in range(0, dim // 2, dim // 6):
            axes[0].plot(frames, cos[:, j], label=f"pair {j}")
        axes[0].set(xlabel="frame m", ylabel="cos of the angle")
        axes[0].legend(frameon=False)
        axes[1].imshow(q @ k.T)
        axes[1].set(xlabel="frame of the key", ylabel="frame of the query")

    plot("1_rotary", (8, 3), draw, ncols=2)
    return {}


# --- 2: inverse dynamics ---------------------------------------------------------------------
def actions(world, clips):
    """For each action, the mean flow of its transitions, and one transition as an example."""
    frames = striking(clips, 128, among=256)
    codes = infer(world, frames).flatten().numpy()
    before, after = frames[:, :-1].flatten(0, 1).numpy(), frames[:, 1:].flatten(0, 1).numpy()
    flows = [optical_flow(a, b) for a, b in zip(before, after, strict=True)]
    flows = np.stack(flows)  # (M, H, W, 2)
    contrast = before.mean(axis=-1).std(axis=(1, 2))

    def draw(axes):
        for action, (arrows, first, second) in enumerate(axes.T):
            at = np.flatnonzero(codes == action)
            mean = flows[at].mean(axis=0).reshape(8, 8, 8, 8, 2)
            mean = mean.mean(axis=(1, 3))  # one arrow per patch
            across, down = mean[::-1, :, 0], mean[::-1, :, 1]
            size = dict(angles="xy", scale_units="xy", scale=4, width=0.02)
            arrows.quiver(across, -down, **size)
            arrows.set_title(f"{action}  {world.action_names[action]}", fontsize=9)
            arrows.set(xlim=(-1, 8), ylim=(-1, 8), aspect="equal")
            i = at[np.argsort(contrast[at], kind="stable")[int(0.9 * len(at))]]
            first.imshow(before[i])
            second.imshow(after[i])
            for ax in (arrows, first, second):
                ax.set(xticks=[], yticks=[])

    plot("2_actions", (14, 5.6), draw, nrows=3, ncols=8)
    return {}


def movement(world, clips):
    """How the encoder measures which way a texture moved, and what the decoder predicts."""
    frames = striking(clips, 128, among=256)
    codes = infer(world, frames)  # (B, T-1)
    fits = [world.lam.encoder.mismatch(batch) for batch in to_float(frames).split(32)]
    fits = torch.cat(fits)  # (B, T-1, N, 34)
    turns = [strongest(world, side) for side in ("left", "right")]

    def draw(axes):
        for action in turns:
            across = fits[codes == action].mean(dim=(0, 1))[: len(MOVES)]
            axes.plot(MOVES, across, "o-", label=f"{action}  {world.action_names[action]}")
        axes.set(xlabel="horizontal shift of frame t, pixels", ylabel="mismatch with frame t+1")
        axes.legend(frameon=False)

    plot("2_matches", (5, 3), draw)
    video = to_float(frames)
    rows = []
    for action in turns:  # the transition of this action with the largest change
        change = (video.diff(dim=1) ** 2).mean(dim=(2, 3, 4)) * (codes == action)  # (B, T-1)
        clip, t = divmod(int(change.argmax()), change.shape[1])
        rows.append(warp_and_correct(world.lam, video[clip][None], codes[clip][None], t))
    names = ["frame t", "shifted", "correction x2", "sum", "frame t+1"]
    save_png(labelled_grid(to_uint8(torch.stack(rows)), names), OUT / "2_warp.png")
    return {}


def strongest(world: WorldModel, side: str) -> int:
    """The action whose name has the largest movement to that side."""
    found = []
    for action, name in enumerate(world.action_names):
        if side in name:
            found.append((float(name.split()[-1]), action))
    return max(found)[1]


def warp_and_correct(lam, video: Tensor, codes: Tensor, t: int) -> Tensor:
    """Frame t, its patches shifted, the correction (twice), their sum, and frame t+1."""
    corrections = []
    hook = lam.decoder.frame_head.register_forward_hook(
        lambda module, inputs, out: corrections.append(out)
    )
    predicted = lam.decoder(video[:, :-1], lam.quantizer.indices_to_codes(codes))[:, t]
    hook.remove()
    added = corrections[0][:, t]
    return torch.cat([video[:, t], predicted - added, 2 * added, predicted, video[:, t + 1]])


def agreement(world, clips):
    """How often each true action occurs with each code."""
    frames, true_actions = clips.evenly_spaced(256)
    codes = infer(world, frames)
    counts = metrics.contingency(codes, true_actions)
    share = counts / counts.sum(1, keepdims=True)
    names = clips.dataset.action_names

    def draw(axes):
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_yticks(range(len(counts)), numbered_names(world))
        axes.set_xticks(range(len(names)), names, rotation=20)
        for i, j in np.ndindex(*counts.shape):
            color = "w" if share[i, j] > 0.6 else "k"
            axes.text(j, i, f"{share[i, j]:.2f}", ha="center", va="center", color=color)

    plot("2_agreement", (4.6, 4.6), draw)
    return {
        "agreement/nmi": metrics.nmi_above_chance(codes, true_actions),
        "agreement/accuracy": metrics.best_mapping_accuracy(codes, true_actions),
        "agreement/majority": float(metrics.shares(true_actions, len(names)).max()),
    }


LAM_ROWS = {  # name in the text → row of docs/results/ablation.json
    "shipped": "as shipped",
    "pairs": "encoder: both frames in a patch, not how they match",
    "pooled": "encoder: mean-pooled frames compared (article)",
    "adds": "decoder: adds, cannot move patches",
    "draws": "decoder: draws the frame anew",
    "first frame": "decoder: draws it anew, from the first frame (article, keep-rate 0)",
    "rounded": "rounded from the start (article)",
    "no norm": "no normalisation before rounding (article)",
    "no entropy": "no entropy bonus (article)",
    "article": "all of the article's choices together",
}
DYNAMICS_ROWS = {
    "shipped": "as shipped",
    "masked": "context masked (Genie, the article)",
    "added": "action added to the tokens (Genie)",
    "kernel": "a token's embedding sees itself alone (Genie)",
}


def choices(world, clips):
    """Means over three seeds of docs/results/ablation.json, for the text."""
    found, numbers = results("ablation"), {}

    def values(row, metric):
        return np.array([found[f"{row}/{seed}/{metric}"] for seed in range(3)])

    for short, row in LAM_ROWS.items():
        row = f"lam/{row}"
        for metric in ("nmi", "actions_used", "largest_share"):
            numbers[f"choices/{short}/{metric}"] = float(values(row, metric).mean())
        error = 10 ** ((values(row, "copy_psnr") - values(row, "psnr")) / 10)
        numbers[f"choices/{short}/error"] = float(error.mean())
    delta = {}
    for short, row in DYNAMICS_ROWS.items():
        delta[short] = float(values(f"dynamics/{row}", "delta_psnr_t4").mean())
        numbers[f"choices/{short}/delta"] = delta[short]
        numbers[f"choices/{short}/loss_of_delta"] = delta["shipped"] - delta[short]
    return numbers


SMALL_LAM = (
    "--preset cpu --batch-size 4 --embed-dim 64 --hidden-dim 256 --dtype float32 --device cpu"
)
NOTHING = (
    "--encoder frames --decoder change --latent-norm none"
    " --soft-rate 0 --entropy-lambda 0 --var-lambda 0"
)


def collapse(world, clips, n_updates=200):
    """The LAM of this project, and one without any of the measures that keep codes in use."""
    numbers, shares = {"collapse/updates": n_updates}, {}
    options = f"{SMALL_LAM} --n-updates {n_updates}".split()
    frames = clips.evenly_spaced(64)[0]
    for name, more in (("shipped", ""), ("nothing", NOTHING)):
        with tempfile.TemporaryDirectory() as out:
            train_lam.main(
                ["--data-path", clips.dataset.name, "--out", out, *options, *more.split()]
            )
            lam = build_model(load_checkpoint(f"{out}/lam.pt", "lam"))
        shares[name], found = use_of_codes(lam, frames)
        numbers |= {f"collapse/{name}/{key}": value for key, value in found.items()}

    def draw(axes):
        titles = ("as shipped", "no measure against collapse")
        for i, (title, share) in enumerate(zip(titles, shares.values(), strict=True)):
            axes[i].bar(range(8), np.sort(share)[::-1], color=f"C{i}")
            labels = dict(xlabel="codes, by frequency", ylabel="share of transitions")
            axes[i].set(title=title, ylim=(0, 1), **labels)

    plot("2_collapse", (7, 2.8), draw, ncols=2)
    return numbers


@torch.no_grad()
def use_of_codes(lam, frames: Tensor) -> tuple[np.ndarray, dict]:
    """→ the share of each code, and how much the codes help the decoder."""
    video = to_float(frames)
    codes = lam.infer(video)
    own, others = (lam.predict(video, given) for given in (codes, codes.roll(1, 0)))
    truth, before = video[:, 1:], video[:, :-1]
    copy = float(F.mse_loss(before, truth))
    share = metrics.shares(codes, 8)
    return share, {
        "used": int((share > 0).sum()),
        "largest_share": float(share.max()),
        "error_over_copy": float(F.mse_loss(own, truth)) / copy,
        "error_with_others": float(F.mse_loss(others, truth)) / copy,
    }


# --- 3: dynamics -----------------------------------------------------------------------------
def masking(world, clips):
    """A frame as the model sees it in training: half, three quarters or all tokens masked."""
    frame = striking(clips, 1)[0, -1]
    torch.manual_seed(0)
    drawn = torch.rand(64)
    rates = (0.0, 0.5, 0.75, 1.0)
    masked = [torch.where(patches(drawn < rate), GRAY, frame).byte() for rate in rates]
    names = ["clean", "rate 0.5", "rate 0.75", "rate 1"]
    save_png(labelled_grid(np.stack(masked)[None], names), OUT / "3_masking.png")
    return {}


def modulation(world, clips):
    """How the eight actions scale the norms of the dynamics model."""
    scales = []  # (8, E) for each norm
    for block in world.dynamics.modulations(torch.arange(world.n_actions)[None]):
        scales += [scale[0, :, 0] - 1 for scale, _ in block]
    blocks = range(1, len(scales) // 3 + 1)

    def draw(axes):
        last = scales[-1]
        channels = last.var(0).argsort(descending=True, stable=True)[:48]
        limit = last.abs().max()
        colors = dict(cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axes[0].imshow(last[:, channels], **colors)
        axes[0].set_yticks(range(world.n_actions), numbered_names(world), fontsize=8)
        axes[0].set(xlabel="channels of the last block's third norm", xticks=[])
        for i, name in enumerate(("space", "time", "feed-forward")):
            deviations = [scale.std(dim=0).mean() for scale in scales[i::3]]
            axes[1].plot(blocks, deviations, "o-", label=name)
        axes[1].set(xlabel="block", xticks=blocks)
        axes[1].set(ylabel="standard deviation\nof γ over actions", ylim=(0, None))
        axes[1].legend(frameon=False)

    plot("3_modulation", (9, 2.8), draw, ncols=2)
    return {}


def decoding(world, clips, passes=8):
    """MaskGIT on one real frame: the tokens that are filled after each pass."""
    frames = striking(clips, 1)
    tokens, previous_actions = world.encode(frames[:, :5])  # (1, 5, 64), (1, 5)
    before = tokens[:, :4]
    dynamics = world.dynamics
    mask_index = dynamics.mask_index
    cache = dynamics.new_cache()
    dynamics.prefill(before, previous_actions, cache)
    known = []

    def logits_of(now):
        known.append(now.clone())
        action = previous_actions[:, 4:]
        states = dynamics.hidden_states(now.unsqueeze(1), action, cache=cache)
        return dynamics.head(states)[:, 0].float()

    masked = torch.full_like(tokens[:, 4], mask_index)
    known.append(maskgit_decode(logits_of, masked, mask_index, passes, temperature=0.0))
    shown, filled = [], {}
    for k, now in enumerate(known):
        visible = now != mask_index
        clip = torch.cat([before, now.masked_fill(~visible, 0).unsqueeze(1)], dim=1)
        pixels = to_uint8(world.tokenizer.decode(clip))[0, -1]
        shown.append(torch.where(patches(visible[0]), pixels, GRAY).byte())
        filled[f"decoding/filled_after_{k}"] = int(visible.sum())
    row = np.stack([frames[0, 3], *shown, frames[0, 4]])
    names = ["before", "masked", *(f"pass {k}" for k in range(1, passes + 1)), "truth"]
    save_png(labelled_grid(row[None], names), OUT / "3_decoding.png")
    return filled


def passes(world, clips):
    """PSNR of a rollout after four frames, with 1, 2 and 8 MaskGIT passes per frame."""
    frames = Clips(clips.dataset, "val", 8, val_fraction=0.9).evenly_spaced(128)[0]
    codes = infer(world, frames)
    numbers = {"default/temperature": world.temperature}
    for steps in (1, 2, 8):
        measured = world.twin()
        measured.steps = steps
        measured.reset(frames[:, :4], codes[:, :3])
        last = [measured.step(codes[:, t]) for t in range(3, 7)][-1]
        error = ((unit(last) - unit(frames[:, 7])) ** 2).mean()
        numbers[f"passes/{steps}/psnr_t4"] = metrics.psnr(error)
    return numbers


def rollout(world, clips):
    frames = striking(Clips(clips.dataset, "val", 20, val_fraction=0.9), 3)
    at = [0, 1, 2, 4, 8, 16]
    codes = world.lam.infer(to_float(frames))
    world.generator.manual_seed(0)
    world.reset(frames[:, :4], codes[:, :3])
    played = [frames[:, 3], *(world.step(codes[:, t]) for t in range(3, 19))]
    played = np.stack(played, axis=1)
    rows = []
    for clip in range(3):
        rows += [frames[clip, 3:][at].numpy(), played[clip, at]]
    names = ["last known", *(f"t = {t}" for t in at[1:])]
    save_png(labelled_grid(np.stack(rows), names), OUT / "3_rollout.png")
    report = results("doom-maze")

    def draw(axes):
        times = range(1, 17)
        known = [report[f"dynamics/rollout_psnr_t{t}"] for t in times]
        copied = [report[f"dynamics/copy_psnr_t{t}"] for t in times]
        axes.plot(times, known, "C0", label="rollout")
        axes.plot(times, copied, "k:", label="copy of the last known frame")
        axes.set(xlabel="frames after the last known one", ylabel="PSNR, dB")
        axes.legend(frameon=False)

    plot("3_drift", (5, 3), draw)
    return {}


# --- 4: evaluation ---------------------------------------------------------------------------
def blur(frames: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of uint8 (…, H, W, 3)."""
    x = torch.as_tensor(frames).float().movedim(-1, -3)
    radius = int(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    flat = F.pad(x.reshape(-1, 1, *x.shape[-2:]), (radius,) * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel), kernel.transpose(2, 3))
    return flat.view(x.shape).movedim(-3, -1).round().byte()


def blind_spots(world, clips):
    """Five wrong versions of one frame, and their value in each metric."""

    def change(pair):
        return float(metrics.changed(unit(pair[1]), unit(pair[0])).float().mean())

    before, truth = max((clip[-2:] for clip in clips.evenly_spaced(64)[0]), key=change)
    torch.manual_seed(0)
    noisy = (truth.float() + 16 * torch.randn(truth.shape)).clamp(0, 255).byte()
    tokens = world.tokenizer.encode(to_float(truth[None, None]))
    wrong = {
        "copy": before,
        "blurred": blur(truth, 2.0),
        "shifted": truth.roll(2, 1),
        "noisy": noisy,
        "rebuilt": to_uint8(world.tokenizer.decode(tokens))[0, 0],
    }
    mask = metrics.changed(unit(truth), unit(before))
    numbers = {}
    for name, picture in wrong.items():
        predicted, known = unit(picture), unit(truth)
        numbers[f"blind/{name}/psnr"] = metrics.psnr(((predicted - known) ** 2).mean())
        numbers[f"blind/{name}/psnr_changing"] = metrics.masked_psnr(predicted, known, mask)
    row = np.stack([truth, *wrong.values()])
    save_png(labelled_grid(row[None], ["truth", *wrong]), OUT / "4_blind_spots.png")
    return numbers


def frechet(world, clips):
    """Fréchet distances of real clips to other real clips, and to clips degraded in one way each.

    The features are those of the small network.
    """
    frames = Clips(clips.dataset, "val", 16, val_fraction=0.9).evenly_spaced(256)[0]
    real, other = frames[::2], frames[1::2]
    torch.manual_seed(0)
    degraded = {
        "other real clips": other,
        "blurred a little": blur(other, 1.0),
        "blurred": blur(other, 2.0),
        "frames in random order": torch.stack([clip[torch.randperm(16)] for clip in other]),
        "the first frame, again and again": other[:, :1].expand_as(other),
    }
    features = smallnet_features(real)
    numbers = {}
    for name, videos in degraded.items():
        distance = metrics.frechet_distance(features, smallnet_features(videos))
        numbers[f"fvd/{name}"] = distance
    return numbers


CONTROL_ROWS = {  # name in the text → row of docs/results/ablation.json
    "dice": "no actions (random instead): the random baseline",
    "shipped": "as shipped",
    "buttons": "true actions: the oracle",
}


def control(world, clips):
    """ΔPSNR of the random baseline, of latent actions and of the oracle, over three seeds."""
    found, numbers = results("ablation"), {}
    for short, row in CONTROL_ROWS.items():
        for key, metric in (("random", "delta_psnr_t4"), ("frequent", "delta_psnr_null_t4")):
            start, end = f"dynamics/{row}/", f"/{metric}"
            values = [v for k, v in found.items() if k.startswith(start) and k.endswith(end)]
            numbers[f"control/{short}/{key}"] = float(np.mean(values))
            numbers[f"control/{short}/{key}_std"] = float(np.std(values, ddof=1))

    def draw(axes):
        labels = {"random": "against random actions", "frequent": "against the most frequent"}
        for i, (key, label) in enumerate(labels.items()):
            heights = [numbers[f"control/{short}/{key}"] for short in CONTROL_ROWS]
            deviations = [numbers[f"control/{short}/{key}_std"] for short in CONTROL_ROWS]
            axes.bar(np.arange(3) + 0.4 * i - 0.2, heights, 0.4, yerr=deviations, label=label)
        bars = ["random actions:\nthe baseline", "latent actions", "true actions:\nthe oracle"]
        axes.set_xticks(range(3), bars)
        axes.set(ylabel="ΔPSNR after four frames, dB", ylim=(-0.3, 3.2))
        axes.legend(frameon=False)

    plot("4_control", (5, 3), draw)
    return numbers


# --- 5: speed --------------------------------------------------------------------------------
def cache_work(world, clips, n=36):
    """How many frames pass through the transformer for each new one, with and without the cache.

    Both ways decode the same tokens.
    """
    count = []
    hook = world.dynamics.transformer.register_forward_hook(
        lambda module, inputs, out: count.append(out.shape[1])
    )
    history, previous_actions = world.encode(striking(clips, 1)[:, :4])
    held = torch.arange(n)[None] // 4 % world.n_actions  # each action for four frames
    actions = torch.cat([previous_actions, held], dim=1)
    work, tokens = {}, {}
    for name, draw_frames in (("with the cache", cached), ("without", uncached)):
        tokens[name], work[name] = draw_frames(world, history, actions, count)
    hook.remove()

    def draw(axes):
        for name, counts in work.items():
            axes.plot(range(4, 4 + n), counts, label=name)
        axes.set(xlabel="new frame", ylabel="frames through\nthe transformer")
        axes.set(ylim=(0, None))
        axes.legend(frameon=False)

    plot("5_cache", (5, 2.6), draw)
    same = tokens["with the cache"] == tokens["without"]
    return {
        "cache/with": work["with the cache"][-1],
        "cache/without": work["without"][-1],
        "cache/same_tokens": float(same.float().mean()),
    }


def cached(world: WorldModel, tokens: Tensor, actions: Tensor, count: list):
    """Continue tokens (1, 4, N) greedily. → all tokens, and the count for each new frame."""
    dynamics, work = world.dynamics, []
    cache = dynamics.new_cache()
    dynamics.prefill(tokens[:, :-1], actions[:, :4], cache)
    for t in range(4, actions.shape[1]):
        count.clear()
        before, now = actions[:, t - 1], actions[:, t]
        sampling = dict(steps=world.steps, temperature=0.0)
        new = dynamics.next_frame(tokens[:, -1], before, now, cache, **sampling)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        work.append(sum(count))
    return tokens, work


def uncached(world: WorldModel, tokens: Tensor, actions: Tensor, count: list):
    """As `cached`, but every pass runs over the whole history."""
    dynamics, work = world.dynamics, []
    for t in range(4, actions.shape[1]):
        count.clear()
        new = whole_history_decode(dynamics, tokens, actions[:, : t + 1], world.steps)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        work.append(sum(count))
    return tokens, work


def whole_history_decode(dynamics: DynamicsModel, tokens: Tensor, actions: Tensor, steps: int):
    def logits_of(now):
        frames = torch.cat([tokens, now[:, None]], dim=1)
        return dynamics.head(dynamics.hidden_states(frames, actions))[:, -1].float()

    masked = torch.full_like(tokens[:, 0], dynamics.mask_index)
    return maskgit_decode(logits_of, masked, dynamics.mask_index, steps, temperature=0.0)


PRODUCTS = {  # batch, m, k, n
    "attention scores, time": (2048, 8, 32, 8),
    "attention scores, space": (256, 64, 32, 64),
    "qkv": (1, 4096, 128, 384),
    "feed-forward": (1, 4096, 128, 512),
    "output head": (1, 4096, 128, 1024),
}


def measure() -> dict:
    """GFLOP/s of the products of one training step in float32, and GB/s of memory.

    The step has 8 clips of 8 frames, 4 heads and width 128.
    """

    def fastest(action, repeats):
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
        return min(times)

    def measure_product(batch, m, k, n):
        """→ FLOP per second, FLOP per byte."""
        a, b = torch.randn(batch, m, k), torch.randn(batch, k, n)
        out = torch.empty(batch, m, n)
        flops, moved = 2 * batch * m * k * n, 4 * (a.numel() + b.numel() + out.numel())
        return flops / fastest(lambda: torch.bmm(a, b, out=out), 100), flops / moved

    numbers = {}
    for name, sizes in {**PRODUCTS, "one large product": (1, 2048, 2048, 2048)}.items():
        speed, intensity = measure_product(*sizes)
        numbers[f"roofline/{name}/gflops"] = speed / 1e9
        numbers[f"roofline/{name}/intensity"] = intensity
    a, b = torch.randn(1 << 26), torch.empty(1 << 26)
    numbers["roofline/memory_gb_per_s"] = 8 * a.numel() / fastest(lambda: b.copy_(a), 10) / 1e9
    return numbers


def roofline(numbers: dict) -> None:
    peak = max(value for name, value in numbers.items() if name.endswith("gflops"))
    memory = numbers["roofline/memory_gb_per_s"]

    def draw(axes):
        x = np.logspace(-0.5, 3, 100)
        label = f"roof: {memory:.0f} GB/s, {peak:.0f} GFLOP/s"
        axes.loglog(x, np.minimum(peak, memory * x), "k", label=label)
        for i, name in enumerate(PRODUCTS):
            intensity = numbers[f"roofline/{name}/intensity"]
            speed = numbers[f"roofline/{name}/gflops"]
            axes.plot(intensity, speed, "o", color=f"C{i}", label=name)
        axes.set(xlabel="FLOP per byte moved", ylabel="GFLOP per second")
        axes.legend(frameon=False, fontsize=8)

    plot("5_roofline", (5.5, 3.6), draw)


def growth() -> None:
    """Time of a pass for one new frame, by frames in the window and by patches per frame."""
    bench = results("bench")
    frames, patches_per_frame = (8, 16, 32, 64), (64, 256, 1024)
    times = (
        [bench[f"growth/pass_T{T}_N64_ms"] for T in frames],
        [bench[f"growth/pass_T8_N{N}_ms"] for N in patches_per_frame],
    )
    labels = ("frames in the window", "patches per frame")

    def draw(axes):
        ticks = (2, 5, 10, 20, 50)
        for i, values in enumerate((frames, patches_per_frame)):
            axes[i].loglog(values, times[i], "o-")
            axes[i].set(xlabel=labels[i], xticks=values, xticklabels=values)
            axes[i].set(ylabel="one pass, ms", ylim=(2, 60), yticks=ticks, yticklabels=ticks)
            axes[i].minorticks_off()

    plot("5_growth", (7, 2.8), draw, ncols=2)


# --- 6 and 7: related methods ----------------------------------------------------------------
def distances() -> None:
    """Wasserstein distances of the flow and its baselines to a known distribution."""
    flow = results("flow_inverse_dynamics")
    labels = {
        "another draw of the truth": "the truth,\nresampled",
        "flow": "flow",
        "MLP": "regression\n(MLP)",
        "nearest neighbour": "nearest\nneighbour",
        "least squares": "regression\n(least squares)",
    }
    systems = {"two_branch": "two branches", "pendulum_clipped": "clipped pendulum"}

    def draw(axes):
        for i, (system, label) in enumerate(systems.items()):
            heights = [flow[f"{system}/{name}/wasserstein"] for name in labels]
            axes.bar(np.arange(len(labels)) + 0.4 * i - 0.2, heights, 0.4, label=label)
        axes.set_xticks(range(len(labels)), labels.values(), fontsize=8)
        axes.set_ylabel("Wasserstein distance to the truth")
        axes.legend(frameon=False)

    plot("6_distances", (5.5, 3), draw)


def branches(world, clips, n_updates=1500):
    """A flow that learns s' = s + a², and the paths from noise to action for one pair (s, s')."""
    torch.manual_seed(0)
    s, a = torch.randn(20000, 1), torch.randn(20000, 1, 1)
    flow = FlowInverseDynamics(1, 1)
    flow.fit_scales(s, a, s + a[:, 0] ** 2)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3)
    for batch in torch.randint(len(s), (n_updates, 256)):
        flow(s[batch], a[batch], s[batch] + a[batch, 0] ** 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = flow.path(torch.zeros(200, 1), torch.ones(200, 1), torch.randn(200, 1, 1))
    path = path[..., 0, 0] * flow.action_std + flow.action_mean  # (101, 200)

    def draw(axes):
        axes.plot(torch.linspace(0, 1, len(path)), path, "C0", alpha=0.2, linewidth=0.8)
        axes.axhline(0, color="C1", linestyle="--", label="prediction of a regression")
        axes.set(xlabel="τ: from noise (0) to action (1)", ylabel="action")
        axes.legend(frameon=False)

    plot("6_branches", (5, 3), draw)
    return {
        "branches/median_distance": float((path[-1].abs() - 1).abs().median()),
        "branches/upper_share": float((path[-1] > 0).float().mean()),
    }


def peeking(world, clips):
    """Which frames influence a feature and a prediction: by gradient, with random weights."""
    torch.manual_seed(0)
    encoder, predictor = Encoder(32, 24, 2, 2), ActionPredictor(2, 24, 13, 24, 2, 2)
    for weight in [*encoder.parameters(), *predictor.parameters()]:
        torch.nn.init.normal_(weight, std=0.2)
    video = torch.randn(1, 8, 3, 32, 32, requires_grad=True)  # four tubelets
    alone = encoder.each_tubelet(video)
    outputs = {
        "clip encoded at once": encoder(video).view(1, 4, 4, 24),
        "each tubelet alone": alone,
        "prediction of the next": predictor(alone, torch.randn(1, 4, 13), torch.randn(1, 4, 2)),
    }

    def seen_by(output):
        """Boolean (4,): which tubelets have a gradient."""
        (gradient,) = torch.autograd.grad(output.square().sum(), video, retain_graph=True)
        return gradient.abs().view(4, -1).amax(1) > 0

    def draw(axes):
        for ax, (name, out) in zip(axes, outputs.items(), strict=True):
            seen = torch.stack([seen_by(out[0, t]) for t in range(4)])
            ax.imshow(seen, cmap="Blues", vmin=0, vmax=1.5)
            first = 2 if "next" in name else 1
            ax.set(title=name, xlabel="frames of tubelet")
            ax.set(xticks=range(4), xticklabels=range(1, 5))
            ax.set(yticks=range(4), yticklabels=range(first, first + 4))
        axes[0].set_ylabel("features of tubelet")

    plot("7_peeking", (8, 2.8), draw, ncols=3)
    return {}


# --- the text --------------------------------------------------------------------------------
# 0.41<!--ablation:lam/nmi--> is the number of that name in docs/results/ablation.json
CITED = re.compile(r"(−?[\d,]*\.?\d+)<!--([\w./-]+):([^>]+?)( x100)?-->")


def shown(match: re.Match) -> str:
    """The current number from the result files, with as many decimals as it has in the text."""
    number, file, name, percent = match.groups()
    value = results(file)[name] * (100 if percent else 1)
    return f"{value:,.{len(number.partition('.')[2])}f}".replace("-", "−")


def update_text() -> None:
    def replaced(match):
        return shown(match) + match[0][len(match[1]) :]

    for path in sorted((ROOT / "articles").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        path.write_text(CITED.sub(replaced, text), encoding="utf-8")


PICTURES = (
    keys,
    reconstruction,
    straight_through,
    codebook,
    attention,
    rotary,
    actions,
    movement,
    agreement,
    choices,
    collapse,
    masking,
    modulation,
    decoding,
    passes,
    rollout,
    blind_spots,
    frechet,
    control,
    cache_work,
    branches,
    peeking,
)
TRAIN = (straight_through, attention, collapse, branches, peeking)  # these need gradients


def main(argv=None):
    parser = Parser(description=__doc__)
    help = "frames to record for the pictures [6000]"
    parser.add_argument("--frames", type=int, default=6000, help=help)
    help = "also measure single products, for the roofline"
    parser.add_argument("--measure", action="store_true", help=help)
    args = parser.parse_args(argv)
    began = time.perf_counter()
    make_folder(OUT)
    torch.manual_seed(0)
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    numbers = {name: value for name, value in numbers.items() if name.startswith("roofline/")}
    if args.measure or not numbers:
        numbers = measure()
    roofline(numbers)
    growth()
    distances()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/doom-maze.h5"
        record.main(["doom-maze", "--frames", str(args.frames), "--seed", "3000", "--out", path])
        clips = Clips(open_dataset(path, "h5"), "val", 8, val_fraction=0.9)
        world = load_world(WORLD, **SAMPLING)  # sampled as for measured numbers
        for picture in PICTURES:
            with torch.set_grad_enabled(picture in TRAIN):
                numbers |= picture(world, clips)
    bench = results("bench")
    ratio = bench["ceiling/bfloat16_gflops"] / bench["ceiling/float32_gflops"]
    numbers["bfloat16_over_float32"] = ratio
    numbers["device"] = describe_device()
    numbers["commit"] = git_commit()
    numbers["command"] = "python -m articles.figures"
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    update_text()
    minutes = (time.perf_counter() - began) / 60
    print(f"{OUT.relative_to(ROOT)} and {NUMBERS.relative_to(ROOT)}: {minutes:.1f} minutes")


if __name__ == "__main__":
    print_user_errors()
    main()
