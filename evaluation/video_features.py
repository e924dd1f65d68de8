"""Features of short videos for the Fréchet distance in validate.py, from a small network.

    python -m evaluation.video_features --data-path data/pong.h5 data/crafter.h5 data/doom-maze.h5

This command trains evaluation/video_features.pt again.

Published FVD (arXiv:1812.01717) uses I3D, a network of 12 million weights trained on Kinetics. If
you have that file, pass it as --fvd-features i3d.pt; the distance is then named fvd_i3d. Otherwise
this network is used: a stack of 3-D convolutions, small enough to be kept with the code. It was
trained on recordings of games to tell which game 16 frames come from, and whether they are in
order, shuffled, reversed or at half the frame rate. Its distance is named fvd_smallnet. It ranks
worlds of one game, and must not be compared with published FVD.
"""

from pathlib import Path

from utils.checkpoint import save_checkpoint
from utils.cli import Parser, UserError, print_user_errors
from utils.optimizer import set_lr

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data_utils import Clips, open_dataset

WEIGHTS = Path(__file__).parent / "video_features.pt"
LENGTH, ORDERS = 16, ("in order", "shuffled", "reversed", "half the frame rate")


class VideoFeatures(nn.Module):
    """videos (n, T ≥ 16, 3, H, W) in [-1, 1] → features (n, 32)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(6, 24, 3, stride=(1, 2, 2)),
            nn.GELU(),
            nn.Conv3d(24, 48, 3, stride=2),
            nn.GELU(),
            nn.Conv3d(48, 64, 3, stride=2),
            nn.GELU(),
            nn.Conv3d(64, 32, (1, 3, 3)),
            nn.GELU(),
        )

    def forward(self, videos: Tensor) -> Tensor:
        changes = videos[:, 1:] - videos[:, :-1]
        pairs = torch.cat([videos[:, :-1], changes], dim=2)  # (n, T-1, 6, H, W)
        return self.layers(pairs.transpose(1, 2)).mean(dim=(2, 3, 4))


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def smallnet_features(videos) -> Tensor:
    """uint8 (n, T ≥ 16, H, W, 3) → (n, 32), on the CPU."""
    network = VideoFeatures()
    weights = torch.load(WEIGHTS, weights_only=True)["model"]
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    batches = [v.movedim(-1, 2).float() / 127.5 - 1 for v in torch.as_tensor(videos).split(16)]
    return torch.cat([network(batch) for batch in batches])


def load_i3d(path) -> torch.jit.ScriptModule:
    """Load the TorchScript I3D that FVD implementations share.

    Raises UserError unless it maps 16 frames to features.
    """
    try:
        network = torch.jit.load(path, map_location="cpu").eval()
        i3d_features(network, torch.full((1, LENGTH, 64, 64, 3), 255, dtype=torch.uint8))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--fvd-features {path} is not a TorchScript I3D ({reason})") from None
    return network


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def i3d_features(network, videos) -> Tensor:
    """uint8 (n, T, H, W, 3) → (n, 400), on the CPU.

    The network takes (n, 3, T, H, W) in 0-255 and resizes its input itself.
    """
    options = dict(rescale=True, resize=True, return_features=True)
    batches = [v.movedim(-1, 1).float() for v in torch.as_tensor(videos).split(4)]
    return torch.cat([network(batch, **options) for batch in batches]).flatten(1)


# --- training --------------------------------------------------------------------------------


def reorder(videos: Tensor, order: int, rng: np.random.Generator) -> Tensor:
    """videos uint8 (n, 2·LENGTH, H, W, 3) → (n, LENGTH, H, W, 3) in one of ORDERS."""
    steps = {
        0: np.arange(LENGTH),
        1: rng.permutation(LENGTH),
        2: np.arange(LENGTH)[::-1],
        3: np.arange(0, 2 * LENGTH, 2),
    }[order]
    return videos[:, steps.copy()]


def draw_batch(train: list[Clips], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """→ videos (n, LENGTH, 3, H, W) in [-1, 1], the game of each (n,) and its order (n,).

    Every game occurs in every order, so that neither can be inferred from the other.
    """
    rng = np.random.default_rng(step)
    videos, games, orders = [], [], []
    for game, clips in enumerate(train):
        for order, pair in enumerate(clips.batch(step)[0].split(2)):
            videos.append(reorder(pair, order, rng))
            games += [game] * 2
            orders += [order] * 2
    videos = torch.cat(videos).movedim(-1, 2).float() / 127.5 - 1
    return videos, torch.tensor(games), torch.tensor(orders)


def main(argv=None):
    parser = Parser(description=__doc__)
    data_help = "HDF5 recordings, one per game"
    parser.add_argument("--data-path", nargs="+", required=True, help=data_help)
    parser.add_argument("--out", default=str(WEIGHTS))
    parser.add_argument("--n-updates", type=int, default=600)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sources = [open_dataset(path, "h5") for path in args.data_path]
    train = [Clips(dataset, "train", 2 * LENGTH, 2 * len(ORDERS)) for dataset in sources]
    network = VideoFeatures()
    heads = nn.ModuleList([nn.Linear(32, len(sources)), nn.Linear(32, len(ORDERS))])
    optimizer = torch.optim.AdamW([*network.parameters(), *heads.parameters()], lr=2e-3, fused=True)
    bar = tqdm(range(args.n_updates), unit="step", mininterval=1)
    for step in bar:
        set_lr(optimizer, 2e-3 * min((step + 1) / 50, 1 - step / args.n_updates))
        videos, *truths = draw_batch(train, step)
        features = network(videos)
        pairs = [(head(features), truth) for head, truth in zip(heads, truths, strict=True)]
        loss = sum(F.cross_entropy(guess, truth) for guess, truth in pairs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        game, order = [(guess.argmax(1) == truth).float().mean() for guess, truth in pairs]
        text = f"loss {loss:.2f}, accuracy: game {game:.2f}, order {order:.2f}"
        bar.set_postfix_str(text, refresh=False)
    weights = {name: weight.half() for name, weight in network.state_dict().items()}
    save_checkpoint(args.out, {"model": weights})


if __name__ == "__main__":
    print_user_errors()
    main()
