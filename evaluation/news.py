"""What the past foretells, and which moves explain the rest.

A video changes by what the player does and by what moves on its own: traffic, a ball, a march of
enemies. A latent action model writes both into its codes, and the larger one wins
(arXiv:2605.20223). So a small network first learns to foretell the next frame from the past alone,
and how wrong it will be in each pixel. What the past cannot foretell is where the player is.

  * `move_errors`: how badly a frame fits the next one, shifted by each move up to REACH pixels.
    A pixel counts by how wrong the past is there, as expected and in fact
  * `choose_moves`: the few moves that together fit best. They are searched, not trained, so there
    is no start from which the traffic wins
  * `find_moves`: the best of them for each transition, which train_lam.py teaches to its codes
  * `news_of_codes`: how much of the error that the past leaves do the codes remove?
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.cli import UserError
from utils.hardening.cache import read_cache, write_cache
from utils.hardening.files import make_folder
from utils.log import progress
from utils.pictures import enlarge, save_png

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_utils import Clips, main_process_first, to_float
from evaluation.action_table import use_of_actions, write_action_table
from models.distributed import rank
from player.film import labelled_grid

HISTORY = 16  # frames that the past is; enemies may march at every eighth
SIDE = 64  # pixels: larger frames are shrunk to that
REACH, FINENESS = 13, 2  # moves up to so many pixels, in steps of 1 / FINENESS pixel
SAMPLE, MOST = 4_000, 12_000  # transitions on which moves are chosen; that get one
BATCH = 16  # of transitions, to train the predictor
CAMERA = 0.02  # errors on a larger share of the picture are a camera's, which follows the player


class HistoryPredictor(nn.Module):
    """frames (B, HISTORY, 3, H, W) → the next frame (B, 3, H, W), expected error (B, H, W).

    The error is the root of the squared one, relative to the mean squared change. codes (B,): what
    happens in between, or n_codes for unknown. H and W are even.
    """

    def __init__(self, n_codes: int = 0, width: int = 64):
        super().__init__()

        def conv(outputs, inputs=width, apart=1):
            return nn.Conv2d(inputs, outputs, 3, padding=apart, dilation=apart)

        # two frames in colour and all changes in gray; four pixels become one with more channels
        self.first = conv(width, inputs=4 * (2 * 3 + HISTORY - 1))
        self.embed_code = nn.Embedding(n_codes + 1, width)
        nn.init.zeros_(self.embed_code.weight)  # a random start would spoil what is known already
        layers = [conv(width, apart=2), conv(width), conv(width)]
        body = [part for layer in layers for part in (nn.GELU(), layer)]
        self.rest = nn.Sequential(*body, nn.GELU(), conv(4 * 4))
        self.register_buffer("left", torch.ones(()))  # share of the change that it misses, lately
        self.register_buffer("area", torch.ones(()))  # share of the picture where that is

    def forward(self, frames: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        changes = frames.mean(dim=2).diff(dim=1)  # (B, HISTORY-1, H, W)
        known = torch.cat([frames[:, -2:].flatten(1, 2), 4 * changes], dim=1)
        hidden = self.first(F.pixel_unshuffle(known, 2))  # (B, width, H/2, W/2)
        if codes is not None:
            # times 30: so few updates hardly move a weight, and a code has much to say
            hidden = hidden + 30 * self.embed_code(codes)[:, :, None, None]
        output = F.pixel_shuffle(self.rest(hidden).float(), 2)  # (B, 4, H, W)
        return frames[:, -1] + output[:, :3], F.softplus(output[:, 3])


# --- windows: the past of a transition, and the frame after it ---------------------------------


def transitions(clips: Clips) -> np.ndarray:
    """Frame numbers i such that frame i+1 follows in the same episode, (M,)."""
    return np.concatenate([np.arange(first, end - 1) for first, end in clips.spans])


def read_windows(clips: Clips, numbers: np.ndarray) -> Tensor:
    """HISTORY frames up to each number and the one after it, uint8 (B, HISTORY+1, H, W, 3).

    Where an episode is younger, its first frame is repeated.
    """
    begins = np.array([first for first, _ in clips.spans])
    first = begins[np.searchsorted(begins, numbers, side="right") - 1]
    windows = []
    for low, i in zip(np.maximum(first, numbers - HISTORY + 1), numbers, strict=True):
        frames = clips.dataset.frames[low : i + 2]
        padding = HISTORY + 1 - len(frames)
        windows.append(np.concatenate([np.repeat(frames[:1], padding, axis=0), frames]))
    return torch.from_numpy(np.stack(windows))


def thumbnails(frames: Tensor) -> Tensor:
    """(B, T, 3, H, W) → the same with even sides of at most SIDE pixels."""
    H, W = frames.shape[-2:]
    scale = min(1.0, SIDE / max(H, W))
    size = [max(2, int(side * scale) // 2 * 2) for side in (H, W)]
    if size == [H, W]:
        return frames
    return F.interpolate(frames.flatten(0, 1), size=size, mode="area").unflatten(
        0, frames.shape[:2]
    )


def squared_error(predicted: Tensor, truth: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) → (B, H, W)."""
    return ((predicted - truth) ** 2).mean(dim=1)


@torch.enable_grad()
def train_history(
    clips: Clips,
    n_updates: int,
    device: Any,
    autocast: Callable,
    lam: nn.Module | None = None,
    begin: dict | None = None,
) -> HistoryPredictor:
    """Train on random transitions of `clips`. With a lam, half of them come with its codes.

    begin: weights of a predictor without codes, to begin with.
    """
    with torch.random.fork_rng():
        torch.manual_seed(clips.seed)
        model = HistoryPredictor(lam.n_actions if lam else 0).to(device)
    if begin:
        begin = {name: weight for name, weight in begin.items() if "embed_code" not in name}
        model.load_state_dict(model.state_dict() | begin)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, max(2, n_updates))
    numbers, rng = transitions(clips), np.random.default_rng(clips.seed)
    for _ in progress(0, n_updates, "history"):
        video = to_float(read_windows(clips, rng.choice(numbers, BATCH)), device)
        codes = codes_of(lam, video, autocast) if lam else None
        if lam:
            codes = torch.where(
                torch.from_numpy(rng.random(BATCH) < 0.5).to(device), codes, lam.n_actions
            )
        frames = thumbnails(video)
        with autocast():
            predicted, expected = model(frames[:, :-1], codes)
        error = squared_error(predicted, frames[:, -1])
        change = squared_error(frames[:, -2], frames[:, -1]).mean().clamp_min(1e-8)
        root = (error / change).detach().sqrt()
        model.left.lerp_((root**2).mean(), 0.02)
        model.area.lerp_(((root**2).mean((1, 2)) ** 2 / (root**4).mean((1, 2))).median(), 0.02)
        loss = error.mean() / change + 0.1 * ((expected - root) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


# --- moves -----------------------------------------------------------------------------------


def all_moves() -> np.ndarray:
    """Every move (down, right) in steps, (n, 2)."""
    steps = np.arange(-REACH * FINENESS, REACH * FINENESS + 1)
    return np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)


def move_errors(before: Tensor, after: Tensor, weights: Tensor, moves: np.ndarray) -> Tensor:
    """How badly `before` fits `after` when it is shifted by each of `moves` (n, 2).

    before, after (B, 3, H, W), weights (B, H, W) → (B, n). The weighted squared error of a shift is
    a sum of correlations, so Fourier transforms give all shifts at once. A shift wraps around.
    """
    before, after = (
        F.interpolate(x, scale_factor=FINENESS, mode="bilinear") for x in (before, after)
    )
    weights = F.interpolate(weights[:, None], scale_factor=FINENESS, mode="bilinear")  # (B,1,H,W)
    size = before.shape[-2:]

    def correlation(a, b):  # sum over pixels of a(x) b(x - move), for every move
        product = torch.fft.rfft2(a) * torch.fft.rfft2(b).conj()
        return torch.fft.irfft2(product.sum(dim=1), s=size)

    squares = correlation(weights, (before**2).sum(dim=1, keepdim=True))
    products = correlation(weights * after, before)
    constant = (weights * after**2).sum(dim=(1, 2, 3))
    down, right = (torch.from_numpy(m) % n for m, n in zip(moves.T, size, strict=True))
    return constant[:, None] + (squares - 2 * products)[:, down, right]


def choose_moves(errors: Tensor, n: int, stay: int) -> list[int]:
    """Which n of all moves fit best together; errors (M, moves), `stay` is the first one.

    The sum over transitions of the least error falls with each one that is added, and then with
    each that is exchanged for a better one (k-medoids).
    """
    chosen = [stay]
    for k in [*range(1, n), *list(range(1, n)) * 3]:
        others = [move for i, move in enumerate(chosen) if i != k]
        least = errors[:, others].amin(dim=1, keepdim=True)
        chosen[k : k + 1] = [int(torch.minimum(errors, least).sum(dim=0).argmin())]
    return chosen


@torch.no_grad()
def find_moves(
    model: HistoryPredictor,
    clips: Clips,
    n: int,
    device: Any,
    autocast: Callable,
    centres: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best of n moves for each frame's transition, int64 (N,), -1 where it has none.

    centres: where the player is in each frame (of `track`), if that is known. → these, and the
    moves in pixels of the (shrunk) frame, down and right, (n, 2).
    """

    def errors_of(numbers, moves):
        errors, changes = [], []
        for part in np.array_split(numbers, max(1, len(numbers) // 32)):
            frames = thumbnails(to_float(read_windows(clips, part), device))
            with autocast():
                predicted, expected = model(frames[:, :-1])
            before, after = frames[:, -2], frames[:, -1]
            weights = expected**2 * squared_error(predicted, after)
            if centres is not None:
                weights = weights * near(torch.from_numpy(centres[part]), frames.shape[-2:]).to(
                    device
                )
            errors.append(move_errors(before, after, weights, moves).cpu())
            changes.append((weights * squared_error(before, after)).sum(dim=(1, 2)).cpu())
        return torch.cat(errors), torch.cat(changes)

    numbers, moves = transitions(clips), all_moves()
    sample = np.random.default_rng(clips.seed).permutation(numbers)[:SAMPLE]
    errors, changes = errors_of(sample, moves)
    errors = errors / (changes + 0.3 * changes.mean() + 1e-8)[:, None]  # large changes do not rule
    moves = moves[choose_moves(errors, n, stay=len(moves) // 2)]
    codes = np.full(len(clips.dataset.frames), -1)
    blocks = numbers[(numbers // HISTORY) % max(1, -(-len(numbers) // MOST)) == 0]
    codes[blocks] = errors_of(blocks, moves)[0].argmin(dim=1).numpy()
    return codes, moves / FINENESS


# --- one click: where is the player? --------------------------------------------------------------


def track(clips: Clips, player: str) -> np.ndarray:
    """ "X,Y" in pixels of the first frame → (row, column) in each frame, as shares of its sides.

    (N, 2). The player is looked for as it looked last, at most REACH thumbnail pixels away, and
    everywhere at the first frame of an episode. Raises UserError for a pixel that is not there.
    """
    frames, size = clips.dataset.frames, np.array(clips.frame_size)
    found = re.fullmatch(r"(\d+),(\d+)", player)
    at = np.array([int(found[2]), int(found[1])]) if found else size
    if (at >= size).any():
        raise UserError(f"--player {player!r} must be X,Y, a pixel of {size[1]}×{size[0]} frames")
    half = max(2, size.max() // 16)  # the patch that is followed has a side of 2 half + 1
    reach = size.max() * REACH // SIDE

    def padded(frame):
        return cv2.copyMakeBorder(frame, *[half] * 4, cv2.BORDER_REPLICATE)

    first = padded(frames[0]).astype(np.float32)
    patch = first[at[0] : at[0] + 2 * half + 1, at[1] : at[1] + 2 * half + 1].copy()
    centres = np.zeros((len(frames), 2), np.float32)
    begins = {first for first, _ in clips.spans}
    for i in range(len(frames)):
        low = np.zeros(2, int) if i in begins and i else np.maximum(at - reach, 0)
        high = size if i in begins and i else np.minimum(at + reach + 1, size)
        part = padded(frames[i])[low[0] : high[0] + 2 * half, low[1] : high[1] + 2 * half]
        distance = cv2.matchTemplate(part.astype(np.float32), patch, cv2.TM_SQDIFF)
        at = low + np.array(np.unravel_index(distance.argmin(), distance.shape))
        centres[i] = (at + 0.5) / size
    return centres


def near(centres: Tensor, size: tuple[int, int]) -> Tensor:
    """Centres (B, 2) as shares of the sides → (B, H, W): 1 there, falling off over REACH / 2."""
    rows, columns = (torch.arange(side) + 0.5 for side in size)
    down = rows[None, :, None] - size[0] * centres[:, 0, None, None]
    right = columns[None, None, :] - size[1] * centres[:, 1, None, None]
    return torch.exp(-(down**2 + right**2) / (2 * (REACH / 2) ** 2))


# --- what train_lam.py and validate.py ask for ---------------------------------------------------


def teach(train: Clips, cfg: Any, device: Any, autocast: Callable) -> tuple:
    """`train` with a code to imitate, and its weight, in place of true actions: (B, T-1, 2).

    It is the code of the best move, with --teach-weight, where the past misses a small part of the
    picture. Where it misses much, a camera follows the player, and the codes find that untaught.
    Where a true action is known, it is the code of that, with --label-weight. → also, as the
    lesson, the move of each code (n, 2), None with labels or if untaught, and the weights of the
    HistoryPredictor; OUT/lam/moves.h5 keeps both for --resume.
    """
    if not (cfg.teach_weight or cfg.label_weight):
        return train, (None, {})
    path, n = Path(cfg.out) / "lam" / "moves.h5", cfg.n_actions
    key = json.dumps([cfg.data_fingerprint, n, cfg.seed, cfg.history_updates, cfg.player, CAMERA])
    with main_process_first():
        found = read_cache(path, key)
        if found is None:
            centres = track(train, cfg.player) if cfg.player else None
            model = train_history(train, cfg.history_updates, device, autocast)
            found = {name: weight.cpu().numpy() for name, weight in model.state_dict().items()}
            codes = np.full(len(train.dataset.frames), -1)
            if cfg.player or model.area < CAMERA:
                codes, found["moves"] = find_moves(model, train, n, device, autocast, centres)
            found["codes"] = codes
            if rank() == 0:
                make_folder(path.parent)
                write_cache(path, key, found)
    codes, moves = found.pop("codes"), found.pop("moves", None)
    text = "the past leaves {left:.0%} of the change, on {area:.1%} of the picture"
    print(text.format(**found))
    if moves is not None:
        share = np.bincount(codes[codes >= 0], minlength=n) / max(1, np.sum(codes >= 0))
        rows = [f"{y:g} {x:g}: {part:.0%}" for (y, x), part in zip(moves, share, strict=True)]
        print("moves that explain it (pixels down and right: share): " + ", ".join(rows))
    weights = np.where(codes >= 0, cfg.teach_weight, 0.0)
    actions = train.dataset.actions
    labelled = np.zeros(len(codes), bool)
    if cfg.label_weight and actions is not None:
        labelled = actions >= 0
        codes = np.where(labelled, codes_of_labels(codes, actions, n), codes)
        weights = np.where(labelled, cfg.label_weight, weights)
    lesson = None if labelled.any() else moves, {k: torch.as_tensor(x) for k, x in found.items()}
    if not weights.any():
        return train, lesson
    targets = np.stack([codes.clip(0), weights], axis=1).astype(np.float32)
    return TaughtClips(train, targets, labelled), lesson


def codes_of_labels(codes: np.ndarray, actions: np.ndarray, n_codes: int) -> np.ndarray:
    """True actions (N,), -1 where unknown → the code that each shall have, (N,).

    An action gets the code that comes with it most often. While there are enough codes, each
    action has one of its own.
    """
    known = (codes >= 0) & (actions >= 0)
    n_true = int(actions.max()) + 1
    counts = np.zeros((n_true, n_codes))
    np.add.at(counts, (actions[known], codes[known]), 1)
    free, code_of = counts + 1e-3, np.zeros(n_true, dtype=np.int64)
    for action in np.argsort(-counts.max(axis=1)):
        code_of[action] = (free if free[action].max() > 0 else counts)[action].argmax()
        free[:, code_of[action]] = 0
    return np.where(actions >= 0, code_of[actions], -1)


class TaughtClips(Clips):
    """Clips with targets (N, 2) for actions. A quarter of a batch has labels, if any frame has."""

    def __init__(self, clips: Clips, targets: np.ndarray, labelled: np.ndarray):
        dataset = replace(clips.dataset, actions=targets)
        super().__init__(dataset, clips.part, clips.length, clips.batch_size, clips.seed)
        before = np.concatenate([[0], np.cumsum(labelled)])
        self.labelled = np.flatnonzero(before[self.starts + self.length - 1] - before[self.starts])

    def _chosen(self, step, size):
        chosen = super()._chosen(step, size)
        if len(self.labelled):
            rng = np.random.default_rng([self.seed, step, 1])
            chosen[::4] = rng.choice(self.labelled, len(chosen[::4]))
        return chosen


def taught(clips: Clips, targets: Tensor, device: Any) -> list[Tensor]:
    """[what a batch of `clips` is to imitate (B, T-1, 2)], or [] where nothing is taught."""
    return [targets.to(device)] if isinstance(clips, TaughtClips) else []


def codes_of(lam: nn.Module, video: Tensor, autocast: Callable) -> Tensor:
    """The code of the last transition of each video (B, HISTORY+1, 3, H, W), (B,)."""
    with torch.no_grad(), autocast():
        return lam.infer(video[:, -min(4, lam.context_length) :])[:, -1]


@torch.no_grad()
def news_of_codes(
    lam: nn.Module, rest: Clips, held_out: Clips, *how: Any, begin: dict | None = None
) -> tuple[dict[str, float], np.ndarray]:
    """ "news": the share of the error of a history-only predictor that the codes remove.

    One network learns both on `rest`, because in half of the cases the code is hidden; `held_out`
    measures. "unforetold" is the share of the change that the past leaves. how: n_updates, device
    and autocast of `train_history`. → these, and a picture of where: the change, what the past
    cannot foretell, and what of that the codes explain.
    """
    model = train_history(rest, *how, lam, begin)
    numbers, (_, device, autocast) = transitions(held_out), how
    numbers = numbers[:: max(1, len(numbers) // 1000)]
    maps = 0.0
    for part in np.array_split(numbers, max(1, len(numbers) // 32)):
        video = to_float(read_windows(held_out, part), device)
        frames, codes = thumbnails(video), codes_of(lam, video, autocast)
        with autocast():
            given = (torch.full_like(codes, lam.n_actions), codes)
            guesses = [frames[:, -2], *(model(frames[:, :-1], code)[0] for code in given)]
        errors = [squared_error(guess, frames[:, -1]).sum(dim=0).cpu() for guess in guesses]
        maps = maps + torch.stack(errors) / len(numbers)  # (3, H, W)
    change, past, both = maps.sum(dim=(1, 2)).clamp_min(1e-8).tolist()
    shown = torch.stack([maps[0], maps[1], (maps[1] - maps[2]).clamp_min(0)])
    shown = (shown / shown[[0, 1, 1]].amax(dim=(1, 2), keepdim=True).clamp_min(1e-8)).sqrt()
    pictures = [cv2.applyColorMap(x, cv2.COLORMAP_INFERNO) for x in (255 * shown).byte().numpy()]
    names = ["change", "not foretold", "told by codes"]
    rows = np.stack([enlarge(picture[..., ::-1], 4) for picture in pictures])[None]
    return {"news": 1 - both / past, "unforetold": past / change}, labelled_grid(rows, names)


def report_codes(
    lam: nn.Module,
    path: Path,
    train: Clips,
    val: Clips,
    cfg: Any,
    autocast: Callable,
    lesson: tuple,
) -> dict[str, float]:
    """At the end of training: what the codes do, as OUT/actions.json and lines, and their news.

    path: OUT/lam.pt. lesson: of `teach`. → metrics for the warnings, as lam/NAME; "lam/news" is
    not there if too little was spent on foretelling.
    """
    (moves, begin), device = lesson, torch.device(cfg.device)
    with autocast():
        table = write_action_table(path, val.evenly_spaced(128)[0], device, moves)
    measured = use_of_actions(table)
    if cfg.history_updates < 100 or cfg.preset == "tiny":
        return measured
    how = (cfg.history_updates // (4 if begin else 2), device, autocast)
    news, picture = news_of_codes(lam, train, val, *how, begin=begin)
    if rank() == 0:
        save_png(picture, path.parent / "lam" / "news.png")
        text = "the past leaves {unforetold:.0%} of the change, and of that codes tell {news:.1%}"
        print(text.format(**news))
    return measured | {"lam/news": news["news"]}
