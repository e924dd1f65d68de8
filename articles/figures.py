"""Draw every picture of the articles, write their numbers to results/articles.json and into the text: two minutes on two cores, the same each time.

    python articles/figures.py               # articles/figures/*.png, from the shipped Doom maze and a game that it has never seen
    python articles/figures.py --measure     # the speed of single products, too, for article 5; else what was measured before is drawn

Pictures of training (the collapse) come from two short trainings, with a LAM half as wide as the shipped one.
"""
import json
import re
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import metrics  # noqa: E402
import record  # noqa: E402
import train_lam  # noqa: E402
from action_table import optical_flow  # noqa: E402
from config import Parser, make_folder, print_user_errors  # noqa: E402
from data_utils import Clips, open_footage, to_float, to_uint8  # noqa: E402
from extras.flow_inverse_dynamics.model import FlowInverseDynamics  # noqa: E402
from extras.vjepa_ac.model import ActionPredictor, Encoder  # noqa: E402
from models.checkpoint import build_model, load_checkpoint  # noqa: E402
from models.dynamics import maskgit_decode  # noqa: E402
from models.fsq import FiniteScalarQuantizer  # noqa: E402
from models.latent_action_model import MOVES  # noqa: E402
from models.st_transformer import SpatioTemporalPositionalEncoding, SpatioTemporalTransformer  # noqa: E402
from models.world_model import WorldModel  # noqa: E402
from pictures import grid, labelled_grid, save_png  # noqa: E402
from speedrun import describe_device, git_commit  # noqa: E402
from validate import SAMPLING, unit  # noqa: E402
from video_features import smallnet_features  # noqa: E402

WORLD, OUT, NUMBERS = ROOT / "checkpoints/shipped/doom-maze", ROOT / "articles/figures", ROOT / "results/articles.json"
GRAY = 128


def results(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def plot(name, size, draw, **grid_of):
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(**grid_of))
    figure.savefig(OUT / f"{name}.png", dpi=90, metadata={"Software": None})


def patches(mask):
    """Boolean (…, 64) of tokens → (…, 64, 64, 1) of pixels."""
    return mask.reshape(*mask.shape[:-1], 8, 8).repeat_interleave(8, -2).repeat_interleave(8, -1)[..., None]


def striking(clips, n, among=128):
    """n clips from the half of many whose pictures have more contrast: a wall from near teaches nobody anything."""
    frames = clips.spread(among)[0]
    best = frames.float().mean(-1).var(dim=(1, 2, 3)).argsort(descending=True, stable=True)[: len(frames) // 2]
    return frames[best[torch.linspace(0, len(best) - 1, n).long()]]


# --- 0: overview -------------------------------------------------------------------------------------------------
def keys(world, clips):
    """One beginning per row, one latent action per column, held for four frames."""
    starts = striking(clips, 4)[:, :4]
    columns = [starts[:, -1].numpy()]
    for action in range(world.n_actions):
        world.generator.manual_seed(0)
        world.reset(starts)
        columns.append([world.step([action] * len(starts)) for _ in range(4)][-1])
    save_png(labelled_grid(np.stack(columns, axis=1), ["start", *world.action_names]), OUT / "0_keys.png")
    return {}


# --- 1: video tokenizer ------------------------------------------------------------------------------------------
def reconstruction(world, clips):
    frames = striking(clips, 8)
    tokens = world.tokenizer.encode(to_float(frames))  # (8, T, 64)
    rebuilt = to_uint8(world.tokenizer.decode(tokens))
    codes = world.tokenizer.quantizer.indices_to_codes(tokens[:, -1])[..., :3]  # the first three of five dimensions, as red, green and blue
    colours = ((codes + 1) * 127.5).byte().view(8, 8, 8, 3).repeat_interleave(8, 1).repeat_interleave(8, 2)
    error = (rebuilt[:, -1].int() - frames[:, -1].int()).abs().mul(4).clamp(max=255).byte()
    save_png(grid([frames[:, -1], colours, rebuilt[:, -1], error]), OUT / "1_tokens.png")
    return {}


def straight_through(world, clips):
    """The staircase of four levels, and the slope that the gradient sees; and two numbers worked through."""
    quantizer = FiniteScalarQuantizer([4])
    z = torch.linspace(-3, 3, 601)[:, None].requires_grad_()
    codes = quantizer(z)
    (slope,) = torch.autograd.grad(codes.sum(), z)

    def draw(axes):
        axes[0].plot(z.detach(), torch.tanh(z.detach()), "k:", label="tanh(z)")
        axes[0].plot(z.detach(), codes.detach(), "C0", label="code, of four levels")
        axes[1].plot(z.detach(), slope, "C1", label="slope that training uses: that of tanh")
        axes[1].plot(z.detach(), torch.zeros_like(slope), "k:", label="slope of the staircase")
        for ax in axes:
            ax.set_xlabel("z")
            ax.legend(frameon=False)

    plot("1_straight_through", (8, 3), draw, ncols=2)
    two, target = torch.tensor([[0.3], [-1.2]], requires_grad=True), torch.tensor([[1.0], [-1 / 3]])
    code = quantizer(two)
    ((code - target) ** 2).sum().backward()
    bounded = torch.tanh(two)
    found = {"tanh": bounded, "y": 1.5 * (bounded + 1), "code": code, "outer": 2 * (code - target), "slope": 1 - bounded**2, "gradient": two.grad}
    return {f"hand/{name}_{i}": float(value[i].detach()) for name, value in found.items() for i in range(2)}


def codebook(world, clips):
    frames = clips.at(clips.end_to_end)[0]
    tokens = torch.cat([world.tokenizer.encode(to_float(batch)) for batch in frames.split(32)])
    share = np.sort(metrics.shares(tokens, 1024))[::-1]

    def draw(axes):
        axes.semilogy(np.arange(1, 1025), np.maximum(share, 1e-7), "C0")
        axes.axhline(1 / 1024, color="k", linestyle=":", label="if all were equally frequent")
        axes.set(xlabel="codes, by frequency", ylabel="share of all tokens", ylim=(1e-7, 1))
        axes.legend(frameon=False)

    plot("1_codebook", (5, 3), draw)
    use = {"frames": frames.shape[0] * frames.shape[1], "used": int((share > 0).sum()), "perplexity": metrics.perplexity(share), "largest_share": float(share[0])}
    return {f"codebook/{name}": value for name, value in use.items()}


def attention(world, clips):
    """What one token can be influenced by, after one block and after two: by gradient, in a network with random weights."""
    rows = []
    for n_blocks in (1, 2):
        torch.manual_seed(0)
        stack = SpatioTemporalTransformer(32, 64, 2, n_blocks, context_length=3)
        for weight in stack.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        x = torch.randn(1, 6, 64, 32, requires_grad=True)
        stack(x)[0, 4, 27].sum().backward()
        seen = patches(x.grad.abs().amax(-1)[0] > 0)  # (6, 64, 64, 1)
        picture = torch.where(seen, torch.tensor([70, 130, 220]), torch.tensor([235, 235, 235])).byte()
        row, column = divmod(27, 8)
        picture[4, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.tensor([220, 60, 50], dtype=torch.uint8)
        rows.append(picture)
    save_png(labelled_grid(np.stack(rows), [f"frame {t}" for t in range(6)]), OUT / "1_attention.png")
    return {}


def rotary(world, clips):
    """One query and one key, the same in every frame, turned by the angles of their frames: the product knows the distance alone."""
    torch.manual_seed(0)
    dim, frames = world.dynamics.transformer.head_dim, torch.arange(24)
    cos, sin = SpatioTemporalPositionalEncoding.rotation(frames, dim)
    q, k = (SpatioTemporalPositionalEncoding.rotate(x.expand(24, dim), (cos, sin)) for x in torch.randn(2, 1, dim))

    def draw(axes):
        for j in range(0, dim // 2, dim // 6):
            axes[0].plot(frames, cos[:, j], label=f"pair {j}")
        axes[0].set(xlabel="frame m", ylabel="cos of the angle")
        axes[0].legend(frameon=False)
        axes[1].imshow(q @ k.T)
        axes[1].set(xlabel="frame of the key", ylabel="frame of the query")

    plot("1_rotary", (8, 3), draw, ncols=2)
    return {}


# --- 2: inverse dynamics -----------------------------------------------------------------------------------------
def actions(world, clips):
    """Per action: where the content of the picture goes, on the mean of all its transitions, and one of them."""
    frames = striking(clips, 128, among=256)
    codes = torch.cat([world.lam.infer(to_float(batch)) for batch in frames.split(32)]).flatten().numpy()
    before, after = frames[:, :-1].flatten(0, 1).numpy(), frames[:, 1:].flatten(0, 1).numpy()
    flows = np.stack([optical_flow(a, b) for a, b in zip(before, after)])  # (M, H, W, 2)
    contrast = before.mean(axis=-1).std(axis=(1, 2))

    def draw(axes):
        for action, (arrows, first, second) in enumerate(axes.T):
            at = np.flatnonzero(codes == action)
            mean = flows[at].mean(axis=0).reshape(8, 8, 8, 8, 2).mean(axis=(1, 3))  # one arrow per patch
            arrows.quiver(mean[::-1, :, 0], -mean[::-1, :, 1], angles="xy", scale_units="xy", scale=4, width=0.02)
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
    """What shows the encoder which way a texture went, and what the decoder makes of it: patches moved, then what was missing."""
    frames = striking(clips, 128, among=256)
    flat = to_float(frames).split(32)
    codes, fits = torch.cat([world.lam.infer(x) for x in flat]), torch.cat([world.lam.encoder.mismatch(x) for x in flat])  # (B, T-1), (B, T-1, N, 34)
    sides = [max((float(name.split()[-1]), i) for i, name in enumerate(world.action_names) if side in name)[1] for side in ("left", "right")]

    def draw(axes):
        for action in sides:
            axes.plot(MOVES, fits[codes == action].mean(dim=(0, 1))[: len(MOVES)], "o-", label=f"{action}  {world.action_names[action]}")
        axes.set(xlabel="last frame moved across by, pixels", ylabel="mismatch with the next frame")
        axes.legend(frameon=False)

    plot("2_matches", (5, 3), draw)
    corrections, rows = [], []
    hook = world.lam.decoder.frame_head.register_forward_hook(lambda module, inputs, out: corrections.append(out))
    for action in sides:
        change = (to_float(frames).diff(dim=1) ** 2).mean(dim=(2, 3, 4)) * (codes == action)  # (B, T-1)
        clip, t = divmod(int(change.argmax()), change.shape[1])
        past, told = to_float(frames[clip][None]), codes[clip][None]
        told = world.lam.decoder(past[:, :-1], world.lam.quantizer.indices_to_codes(told))
        rows.append(torch.cat([past[:, t], (told - corrections[-1])[:, t], 2 * corrections[-1][:, t], told[:, t], past[:, t + 1]]))
    hook.remove()
    save_png(labelled_grid(to_uint8(torch.stack(rows)), ["frame t", "moved", "missing, x2", "sum", "frame t+1"]), OUT / "2_warp.png")
    return {}


def passes(world, clips):
    """PSNR of a rollout four frames on, with 1, 2 and 8 MaskGIT passes a frame."""
    frames = Clips(clips.footage, "val", 8, val_fraction=0.9).spread(128)[0]
    codes = torch.cat([world.lam.infer(to_float(batch)) for batch in frames.split(32)])
    numbers, usual = {}, world.steps
    for world.steps in (1, 2, 8):
        world.generator.manual_seed(0)
        world.reset(frames[:, :4], codes[:, :3])
        last = [world.step(codes[:, t]) for t in range(3, 7)][-1]
        numbers[f"passes/{world.steps}/psnr_t4"] = metrics.psnr(((unit(last) - unit(frames[:, 7])) ** 2).mean())
    world.steps = usual
    return numbers | {"default/temperature": world.temperature}


def agreement(world, clips):
    frames, buttons = clips.spread(256)
    codes = torch.cat([world.lam.infer(to_float(batch)) for batch in frames.split(32)])
    counts = metrics.contingency(codes, buttons)
    names = clips.footage.action_names

    def draw(axes):
        axes.imshow(counts / counts.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
        axes.set_yticks(range(len(counts)), [f"{i}  {name}" for i, name in enumerate(world.action_names)])
        axes.set_xticks(range(len(names)), names, rotation=20)
        for i, j in np.ndindex(*counts.shape):
            axes.text(j, i, f"{counts[i, j] / counts[i].sum():.2f}", ha="center", va="center", color="w" if counts[i, j] > 0.6 * counts[i].sum() else "k")

    plot("2_agreement", (4.6, 4.6), draw)
    return {"agreement/nmi": metrics.nmi_above_chance(codes, buttons), "agreement/accuracy": metrics.best_mapping_accuracy(codes, buttons),
            "agreement/majority": float(metrics.shares(buttons, len(names)).max())}  # fmt: skip


ROWS = {
    "shipped": "as shipped", "pairs": "encoder: both frames in a patch, not how they match", "pooled": "encoder: mean-pooled frames compared (article)",
    "adds": "decoder: adds, cannot move patches", "draws": "decoder: draws the frame anew", "first frame": "decoder: draws it anew, from the first frame (article, keep-rate 0)",
    "rounded": "rounded from the start (article)", "no norm": "no normalisation before rounding (article)", "no entropy": "no entropy bonus (article)",
    "article": "all of the article's choices together",
}  # fmt: skip


def choices(world, clips):
    """Means over three seeds of results/ablation.json, for the text: one change at a time."""
    found, numbers = results("ablation"), {}
    for short, row in ROWS.items():
        runs = [{m: found[f"lam/{row}/{seed}/{m}"] for m in ("psnr", "copy_psnr", "nmi", "actions_used", "largest_share")} for seed in range(3)]
        numbers |= {f"choices/{short}/{m}": float(np.mean([run[m] for run in runs])) for m in ("nmi", "actions_used", "largest_share")}
        numbers[f"choices/{short}/error"] = float(np.mean([10 ** ((run["copy_psnr"] - run["psnr"]) / 10) for run in runs]))
    delta = {}
    for short, row in {"shipped": "as shipped", "masked": "context masked (Genie, the article)", "added": "action added to the tokens (Genie)", "kernel": "a token's embedding sees itself alone (Genie)"}.items():
        delta[short] = float(np.mean([found[f"dynamics/{row}/{seed}/delta_psnr_t4"] for seed in range(3)]))
        numbers |= {f"choices/{short}/delta": delta[short], f"choices/{short}/loss_of_delta": delta["shipped"] - delta[short]}
    return numbers


COLLAPSE = ["--encoder", "frames", "--decoder", "change", "--latent-norm", "none", "--soft-rate", "0", "--entropy-lambda", "0", "--var-lambda", "0"]


def collapse(world, clips, n_updates=200):
    """The LAM of this project, and one without all that keeps codes alive: the same clips, the same number of updates."""
    numbers, shares = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in (("as shipped", []), ("nothing against collapse", COLLAPSE)):
            out = Path(folder) / name
            train_lam.main(["--data-path", clips.footage.name, "--out", str(out), "--preset", "cpu", "--n-updates", str(n_updates), "--batch-size", "4", "--embed-dim", "64",
                            "--hidden-dim", "256", "--dtype", "float32", "--device", "cpu", *options])  # fmt: skip
            lam = build_model(load_checkpoint(out / "lam.pt", "lam"))
            frames = clips.spread(64)[0]
            codes = lam.infer(to_float(frames))
            told = [lam.predict(to_float(frames), actions) for actions in (codes, codes.roll(1, 0))]
            truth, before = to_float(frames)[:, 1:], to_float(frames)[:, :-1]
            copy = float(F.mse_loss(before, truth))
            shares[name] = metrics.shares(codes, 8)
            kind = "shipped" if name == "as shipped" else "nothing"
            numbers |= {f"collapse/{kind}/used": int((shares[name] > 0).sum()), f"collapse/{kind}/largest_share": float(shares[name].max()),
                        f"collapse/{kind}/error_over_copy": float(F.mse_loss(told[0], truth)) / copy, f"collapse/{kind}/error_with_others": float(F.mse_loss(told[1], truth)) / copy}  # fmt: skip

    def draw(axes):
        for ax, (name, share) in zip(axes, shares.items()):
            ax.bar(range(8), np.sort(share)[::-1], color="C0" if name == "as shipped" else "C1")
            ax.set(title=name, ylim=(0, 1), xlabel="codes, by frequency", ylabel="share of transitions")

    plot("2_collapse", (7, 2.8), draw, ncols=2)
    return numbers | {"collapse/updates": n_updates}


# --- 3: dynamics -------------------------------------------------------------------------------------------------
def masking(world, clips):
    """A frame as the dynamics model sees it in training: half, three quarters, all of its tokens replaced."""
    frame = striking(clips, 1)[0, -1]
    torch.manual_seed(0)
    dice = torch.rand(64)
    masked = [torch.where(patches(dice < rate), GRAY, frame).byte() for rate in (0.0, 0.5, 0.75, 1.0)]
    save_png(labelled_grid(np.stack(masked)[None], ["clean", "rate 0.5", "rate 0.75", "rate 1"]), OUT / "3_masking.png")
    return {}


def modulation(world, clips):
    """What the eight actions do to the norms of the dynamics model."""
    scales = [norm[0][0, :, 0] - 1 for block in world.dynamics.condition(torch.arange(world.n_actions)[None])[1] for norm in block]  # (8, E) for each norm

    def draw(axes):
        last = scales[-1]
        axes[0].imshow(last[:, last.var(0).argsort(descending=True, stable=True)[:48]], cmap="RdBu", vmin=-last.abs().max(), vmax=last.abs().max(), aspect="auto")
        axes[0].set_yticks(range(world.n_actions), [f"{i}  {name}" for i, name in enumerate(world.action_names)], fontsize=8)
        axes[0].set(xlabel="channels of the last block's third norm", xticks=[])
        for i, name in enumerate(("space", "time", "feed-forward")):
            axes[1].plot(range(1, len(scales) // 3 + 1), [scale.std(dim=0).mean() for scale in scales[i::3]], "o-", label=name)
        axes[1].set(xlabel="block", ylabel="spread of γ over actions", ylim=(0, None), xticks=range(1, len(scales) // 3 + 1))
        axes[1].legend(frameon=False)

    plot("3_modulation", (9, 2.8), draw, ncols=2)
    return {}


def decoding(world, clips, passes=8):
    """MaskGIT on one real frame: after each pass, what is filled."""
    frames = striking(clips, 1)
    tokens, led_to = world.encode(frames[:, :5])  # (1, 5, 64)
    known, dynamics = [], world.dynamics
    cache = dynamics.new_cache()
    dynamics.prefill(tokens[:, :4], led_to, cache)
    condition = dynamics.condition(led_to[:, 4:])

    def logits_of(now):
        known.append(now.clone())
        return dynamics.head(dynamics.states(now.unsqueeze(1), condition, cache=cache))[:, 0].float()

    start = torch.full_like(tokens[:, 4], dynamics.mask_index)
    known.append(maskgit_decode(logits_of, start, dynamics.mask_index, passes, temperature=0.0))
    shown = []
    for now in known:
        pixels = to_uint8(world.tokenizer.decode(torch.cat([tokens[:, :4], now.masked_fill(now == dynamics.mask_index, 0).unsqueeze(1)], dim=1)))[0, -1]
        shown.append(torch.where(patches(now[0] != dynamics.mask_index), pixels, GRAY).byte())
    truth, before = frames[0, 4], frames[0, 3]
    save_png(labelled_grid(np.stack([before, *shown, truth])[None], ["before", "masked", *(f"pass {k}" for k in range(1, passes + 1)), "truth"]), OUT / "3_decoding.png")
    return {f"decoding/filled_after_{k}": int((now != dynamics.mask_index).sum()) for k, now in enumerate(known)}


def rollout(world, clips):
    frames, at = striking(Clips(clips.footage, "val", 20, val_fraction=0.9), 3), (0, 1, 2, 4, 8, 16)
    codes = world.lam.infer(to_float(frames))
    world.generator.manual_seed(0)
    world.reset(frames[:, :4], codes[:, :3])
    played = np.stack([frames[:, 3]] + [world.step(codes[:, t]) for t in range(3, 19)], axis=1)
    rows = [row for clip in range(3) for row in (frames[clip, [3 + t for t in at]].numpy(), played[clip, list(at)])]
    save_png(labelled_grid(np.stack(rows), ["last known", *(f"t = {t}" for t in at[1:])]), OUT / "3_rollout.png")
    report = results("doom-maze")

    def draw(axes):
        t = range(1, 17)
        axes.plot(t, [report[f"dynamics/rollout_psnr_t{i}"] for i in t], "C0", label="rollout")
        axes.plot(t, [report[f"dynamics/copy_psnr_t{i}"] for i in t], "k:", label="the last known frame, again and again")
        axes.set(xlabel="frames after the last known one", ylabel="PSNR, dB")
        axes.legend(frameon=False)

    plot("3_drift", (5, 3), draw)
    return {}


# --- 4: evaluation -----------------------------------------------------------------------------------------------
def blur(frames, sigma):
    """Gaussian blur of uint8 (…, H, W, 3)."""
    x = torch.as_tensor(frames).float().movedim(-1, -3)
    radius = int(3 * sigma)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    flat = F.pad(x.reshape(-1, 1, *x.shape[-2:]), (radius,) * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel), kernel.transpose(2, 3))
    return flat.view(x.shape).movedim(-3, -1).round().byte()


def blind_spots(world, clips):
    """Five wrong pictures of one frame, with the numbers that each metric gives them."""
    pair = max((clip[-2:] for clip in clips.spread(64)[0]), key=lambda p: float(metrics.changed(unit(p[1]), unit(p[0])).float().mean()))
    before, truth = pair
    torch.manual_seed(0)
    noisy = (truth.float() + 16 * torch.randn(truth.shape)).clamp(0, 255).byte()
    wrong = {"copy": before, "blurred": blur(truth, 2.0), "shifted": truth.roll(2, 1), "noisy": noisy, "rebuilt": to_uint8(world.tokenizer.decode(world.tokenizer.encode(to_float(truth[None, None]))))[0, 0]}
    mask = metrics.changed(unit(truth), unit(before))
    numbers = {}
    for name, picture in wrong.items():
        error = ((unit(picture) - unit(truth)) ** 2).mean()
        numbers |= {f"blind/{name}/psnr": metrics.psnr(error), f"blind/{name}/psnr_changing": metrics.masked_psnr(unit(picture), unit(truth), mask)}
    save_png(labelled_grid(np.stack([truth, *wrong.values()])[None], ["truth", *wrong]), OUT / "4_blind_spots.png")
    return numbers


def frechet(world, clips):
    """Fréchet distances on the small network's features: of real clips to other real clips, and to clips spoiled in one way each."""
    frames = Clips(clips.footage, "val", 16, val_fraction=0.9).spread(256)[0]
    real, other = frames[::2], frames[1::2]
    torch.manual_seed(0)
    spoiled = {
        "other real clips": other, "blurred a little": blur(other, 1.0), "blurred": blur(other, 2.0),
        "frames in random order": torch.stack([clip[torch.randperm(16)] for clip in other]), "the first frame, again and again": other[:, :1].expand_as(other),
    }  # fmt: skip
    features = smallnet_features(real)
    return {f"fvd/{name}": metrics.frechet_distance(features, smallnet_features(x)) for name, x in spoiled.items()}


def control(world, clips):
    """ΔPSNR of the floor, of worlds with latent actions, and of the skyline, over three seeds (results/ablation.json)."""
    found, names = results("ablation"), {"dice": "no actions (dice instead): the floor", "shipped": "as shipped", "buttons": "true buttons: the skyline"}
    numbers = {}
    for short, row in names.items():
        for key, metric in (("random", "delta_psnr_t4"), ("frequent", "delta_psnr_null_t4")):
            values = [value for name, value in found.items() if name.startswith(f"dynamics/{row}/") and name.endswith("/" + metric)]
            numbers |= {f"control/{short}/{key}": float(np.mean(values)), f"control/{short}/{key}_std": float(np.std(values, ddof=1))}

    def draw(axes):
        for i, (key, label) in enumerate((("random", "to random actions"), ("frequent", "to the most frequent"))):
            heights, spread = ([numbers[f"control/{short}/{key}{end}"] for short in names] for end in ("", "_std"))
            axes.bar(np.arange(3) + 0.4 * i - 0.2, heights, 0.4, yerr=spread, label=label)
        axes.set_xticks(range(3), ["dice: the floor", "latent actions", "true buttons:\nthe skyline"])
        axes.set(ylabel="ΔPSNR four frames on, dB", ylim=(-0.3, 3.2))
        axes.legend(frameon=False)

    plot("4_control", (5, 3), draw)
    return numbers


# --- 5: speed ----------------------------------------------------------------------------------------------------
def cache_work(world, clips, n=36):
    """Frames that pass through the transformer for one that is drawn, with the cache and without. Both draw the same tokens."""
    dynamics, count = world.dynamics, []
    hook = dynamics.transformer.register_forward_hook(lambda module, inputs, out: count.append(out.shape[1]))
    history, led_to = world.encode(striking(clips, 1)[:, :4])
    cache, tokens, work = dynamics.new_cache(), history, {"with the cache": [], "without": []}
    dynamics.prefill(tokens[:, :-1], led_to, cache)
    actions = torch.cat([led_to, torch.arange(n)[None] // 4 % world.n_actions], dim=1)
    for t in range(4, 4 + n):
        count.clear()
        new = dynamics.next_frame(tokens[:, -1], actions[:, t - 1], actions[:, t], cache, world.steps, temperature=0.0)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        work["with the cache"].append(sum(count))
    condition = [dynamics.condition(actions[:, : t + 1]) for t in range(4 + n)]
    for t in range(4, 4 + n):
        count.clear()

        def logits_of(now):
            return dynamics.head(dynamics.states(torch.cat([history, now[:, None]], dim=1), condition[t]))[:, -1].float()

        new = maskgit_decode(logits_of, torch.full_like(history[:, 0], dynamics.mask_index), dynamics.mask_index, world.steps, temperature=0.0)
        history = torch.cat([history, new[:, None]], dim=1)
        work["without"].append(sum(count))
    hook.remove()

    def draw(axes):
        for name, counts in work.items():
            axes.plot(range(4, 4 + n), counts, label=name)
        axes.set(xlabel="frame that is drawn", ylabel="frames through\nthe transformer", ylim=(0, None))
        axes.legend(frameon=False)

    plot("5_cache", (5, 2.6), draw)
    return {"cache/with": work["with the cache"][-1], "cache/without": work["without"][-1], "cache/same_tokens": float((tokens == history).float().mean())}


PRODUCTS = {"attention scores, time": (2048, 8, 32, 8), "attention scores, space": (256, 64, 32, 64), "qkv": (1, 4096, 128, 384), "feed-forward": (1, 4096, 128, 512), "output head": (1, 4096, 128, 1024)}


def measure():
    """GFLOP/s of the products of one training step (8 clips of 8 frames, 4 heads, width 128), in float32; and what memory gives."""
    numbers = {}
    for name, (batch, m, k, n) in {**PRODUCTS, "one large product": (1, 2048, 2048, 2048)}.items():
        a, b = torch.randn(batch, m, k), torch.randn(batch, k, n)
        out = torch.empty(batch, m, n)
        times = []
        for _ in range(100):
            began = time.perf_counter()
            torch.bmm(a, b, out=out)
            times.append(time.perf_counter() - began)
        flops, moved = 2 * batch * m * k * n, 4 * (a.numel() + b.numel() + out.numel())
        numbers |= {f"roofline/{name}/gflops": flops / min(times) / 1e9, f"roofline/{name}/intensity": flops / moved}
    a, b, times = torch.randn(1 << 26), torch.empty(1 << 26), []
    for _ in range(10):
        began = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - began)
    return numbers | {"roofline/memory_gb_per_s": 8 * a.numel() / min(times) / 1e9}


def roofline(numbers):
    peak, memory = max(value for name, value in numbers.items() if name.endswith("gflops")), numbers["roofline/memory_gb_per_s"]

    def draw(axes):
        x = np.logspace(-0.5, 3, 100)
        axes.loglog(x, np.minimum(peak, memory * x), "k", label=f"roof: {memory:.0f} GB/s, {peak:.0f} GFLOP/s")
        for i, name in enumerate(PRODUCTS):
            axes.plot(numbers[f"roofline/{name}/intensity"], numbers[f"roofline/{name}/gflops"], "o", color=f"C{i}", label=name)
        axes.set(xlabel="FLOP per byte moved", ylabel="GFLOP per second")
        axes.legend(frameon=False, fontsize=8)

    plot("5_roofline", (5.5, 3.6), draw)


def growth():
    bench = results("bench")

    def draw(axes):
        for ax, letter, values, fixed in ((axes[0], "T", (8, 16, 32, 64), "N64"), (axes[1], "N", (64, 256, 1024), "T8")):
            ax.loglog(values, [bench[f"growth/pass_T{v}_{fixed}_ms" if letter == "T" else f"growth/pass_{fixed}_N{v}_ms"] for v in values], "o-")
            ax.set(xlabel={"T": "frames in the window", "N": "patches per frame"}[letter], ylabel="one pass, ms", xticks=values, xticklabels=values, ylim=(2, 60), yticks=(2, 5, 10, 20, 50), yticklabels=(2, 5, 10, 20, 50))
            ax.minorticks_off()

    plot("5_growth", (7, 2.8), draw, ncols=2)


# --- 6: neighbours -------------------------------------------------------------------------------------------------
def distances():
    """What the flow measured: distances to a known distribution."""
    flow = results("flow_inverse_dynamics")
    names = ("another draw of the truth", "flow", "MLP", "nearest neighbour", "least squares")

    def bars(axes):
        for i, (system, label) in enumerate((("two_branch", "two branches"), ("pendulum_clipped", "clipped pendulum"))):
            axes.bar(np.arange(len(names)) + 0.4 * i - 0.2, [flow[f"{system}/{name}/wasserstein"] for name in names], 0.4, label=label)
        axes.set_xticks(range(len(names)), ["the truth,\ndrawn again", "flow", "regression\n(MLP)", "nearest\nneighbour", "regression\n(least squares)"], fontsize=8)
        axes.set_ylabel("Wasserstein distance to the truth")
        axes.legend(frameon=False)

    plot("6_distances", (5.5, 3), bars)


def branches(world, clips, n_updates=1500):
    """A flow that learns s' = s + a², and where it carries the noise for one pair (s, s')."""
    torch.manual_seed(0)
    s, a = torch.randn(20000, 1), torch.randn(20000, 1, 1)
    flow = FlowInverseDynamics(1, 1)
    flow.fit_scales(s, a, s + a[:, 0] ** 2)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3)
    for batch in torch.randint(len(s), (n_updates, 256)):
        flow(s[batch], a[batch], s[batch] + a[batch, 0] ** 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    path = flow.path(torch.zeros(200, 1), torch.ones(200, 1), torch.randn(200, 1, 1))[..., 0, 0]  # (101, 200)
    path = path * flow.action_std + flow.action_mean

    def draw(axes):
        axes.plot(torch.linspace(0, 1, len(path)), path, "C0", alpha=0.2, linewidth=0.8)
        axes.axhline(0, color="C1", linestyle="--", label="what a regression learns")
        axes.set(xlabel="τ: from noise (0) to action (1)", ylabel="action")
        axes.legend(frameon=False)

    plot("6_branches", (5, 3), draw)
    return {"branches/median_distance": float((path[-1].abs() - 1).abs().median()), "branches/upper_share": float((path[-1] > 0).float().mean())}


def peeking(world, clips):
    """Which pictures a feature, and a prediction, can know of: by gradient, with random weights."""
    torch.manual_seed(0)
    encoder, predictor = Encoder(32, 24, 2, 2), ActionPredictor(2, 24, 13, 24, 2, 2)
    for weight in [*encoder.parameters(), *predictor.parameters()]:
        torch.nn.init.normal_(weight, std=0.2)
    video = torch.randn(1, 8, 3, 32, 32, requires_grad=True)  # four tubelets
    alone = encoder.each_tubelet(video)
    outputs = {"clip encoded at once": encoder(video).view(1, 4, 4, 24), "each tubelet alone": alone, "prediction of the next": predictor(alone, torch.randn(1, 4, 13), torch.randn(1, 4, 2))}

    def draw(axes):
        for ax, (name, out) in zip(axes, outputs.items()):
            seen = [torch.autograd.grad(out[0, t].square().sum(), video, retain_graph=True)[0].abs().view(4, -1).amax(1) > 0 for t in range(4)]
            ax.imshow(torch.stack(seen), cmap="Blues", vmin=0, vmax=1.5)
            first = 2 if "next" in name else 1
            ax.set(title=name, xlabel="pictures of tubelet", xticks=range(4), xticklabels=range(1, 5), yticks=range(4), yticklabels=range(first, first + 4))
        axes[0].set_ylabel("features of tubelet")

    plot("7_peeking", (8, 2.8), draw, ncols=3)
    return {}


# --- the text ----------------------------------------------------------------------------------------------------
CITED = re.compile(r"(−?[\d,]*\.?\d+)<!--([\w./-]+):([^>]+?)( x100)?-->")  # 0.41<!--ablation:lam/nmi-->: the number of that name in results/ablation.json


def shown(match):
    """A number as the result files have it now, written with as many decimals as it stands in the text."""
    number, file, name, percent = match.groups()
    value = results(file)[name] * (100 if percent else 1)
    return f"{value:,.{len(number.partition('.')[2])}f}".replace("-", "−")


def update_text():
    for path in sorted((ROOT / "articles").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        path.write_text(CITED.sub(lambda match: shown(match) + match[0][len(match[1]) :], text), encoding="utf-8")


PICTURES = (
    keys, reconstruction, straight_through, codebook, attention, rotary, actions, movement, agreement, choices, collapse, masking, modulation, decoding, passes, rollout,
    blind_spots, frechet, control, cache_work, branches, peeking,
)  # fmt: skip
TRAIN = (straight_through, attention, collapse, branches, peeking)  # these need gradients


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--frames", type=int, default=6000, help="of the game that is recorded for the pictures [6000]")
    parser.add_argument("--measure", action="store_true", help="also measure single products, for the roofline")
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
        clips = Clips(open_footage(Namespace(data_path=path, data_type="h5", use_dummy_data=False, frame_size=64)), "val", 8, val_fraction=0.9)
        world = WorldModel.load(WORLD, **SAMPLING)  # as numbers are measured
        for picture in PICTURES:
            with torch.set_grad_enabled(picture in TRAIN):
                numbers |= picture(world, clips)
    made = {"device": describe_device(), "commit": git_commit(), "command": "python articles/figures.py"}
    bench = results("bench")
    numbers["bfloat16_over_float32"] = bench["ceiling/bfloat16_gflops"] / bench["ceiling/float32_gflops"]
    NUMBERS.write_text(json.dumps(numbers | made, indent=1) + "\n")
    update_text()
    print(f"{OUT.relative_to(ROOT)} and {NUMBERS.relative_to(ROOT)}: {(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    print_user_errors()
    main()
