"""Features of short videos for the Fréchet distance in validate.py, from a network small enough to ship.

    python video_features.py --data-path data/pong.h5 data/crafter.h5 data/doom-maze.h5      trains video_features.pt again

Published FVD (arXiv:1812.01717) uses I3D, a network of 12 million weights trained on Kinetics. Where that file is at hand, pass
it as --fvd-features i3d.pt and the distance is named fvd_i3d. Else this network is used: 3-D convolutions that learned, from
recordings of games, which game 16 frames come from and whether they are in order, shuffled, reversed or at half speed. Its
distance is named fvd_smallnet, ranks worlds of one game, and must not be compared with published FVD.
"""
from argparse import Namespace
from pathlib import Path

from config import Parser, UserError, print_user_errors

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data_utils import Clips, open_footage
from models.checkpoint import save_checkpoint

WEIGHTS = Path(__file__).parent / "video_features.pt"
LENGTH, ORDERS = 16, ("as it was", "shuffled", "reversed", "half speed")


class VideoFeatures(nn.Module):
    """videos (n, T ≥ 16, 3, H, W) in [-1, 1] → features (n, 32)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(6, 24, 3, stride=(1, 2, 2)), nn.GELU(),
            nn.Conv3d(24, 48, 3, stride=2), nn.GELU(),
            nn.Conv3d(48, 64, 3, stride=2), nn.GELU(),
            nn.Conv3d(64, 32, (1, 3, 3)), nn.GELU(),
        )  # fmt: skip

    def forward(self, videos):
        pairs = torch.cat([videos[:, :-1], videos[:, 1:] - videos[:, :-1]], dim=2)  # (n, T-1, 6, H, W): pictures and changes
        return self.layers(pairs.transpose(1, 2)).mean(dim=(2, 3, 4))


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def smallnet_features(videos):
    """uint8 (n, T ≥ 16, H, W, 3) → (n, 32), on the CPU."""
    network = VideoFeatures()
    network.load_state_dict({name: weight.float() for name, weight in torch.load(WEIGHTS, weights_only=True)["model"].items()})
    return torch.cat([network(v.movedim(-1, 2).float() / 127.5 - 1) for v in torch.as_tensor(videos).split(16)])


def load_i3d(path):
    """The TorchScript I3D that FVD implementations share. Raises UserError unless it turns 16 frames into features."""
    try:
        network = torch.jit.load(path, map_location="cpu").eval()
        i3d_features(network, torch.full((1, LENGTH, 64, 64, 3), 255, dtype=torch.uint8))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--fvd-features {path} is not a TorchScript I3D ({str(error).splitlines()[0]})") from None
    return network


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def i3d_features(network, videos):
    """uint8 (n, T, H, W, 3) → (n, 400), on the CPU; the network takes (n, 3, T, H, W) in 0-255 and resizes by itself."""
    batches = [v.movedim(-1, 1).float() for v in torch.as_tensor(videos).split(4)]  # (n, 3, T, H, W)
    return torch.cat([network(v, rescale=True, resize=True, return_features=True) for v in batches]).flatten(1)


def reorder(videos, order, rng):
    """videos uint8 (n, 2·LENGTH, H, W, 3) → (n, LENGTH, H, W, 3) in one of ORDERS."""
    steps = {0: np.arange(LENGTH), 1: rng.permutation(LENGTH), 2: np.arange(LENGTH)[::-1], 3: np.arange(0, 2 * LENGTH, 2)}[order]
    return videos[:, steps.copy()]


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--data-path", nargs="+", required=True, help="HDF5 recordings, one per game")
    parser.add_argument("--out", default=str(WEIGHTS))
    parser.add_argument("--n-updates", type=int, default=600)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sources = [open_footage(Namespace(data_path=path, data_type="h5", use_dummy_data=False)) for path in args.data_path]
    train = [Clips(footage, "train", 2 * LENGTH, batch_size=2 * len(ORDERS)) for footage in sources]
    network = VideoFeatures()
    heads = nn.ModuleList([nn.Linear(32, len(sources)), nn.Linear(32, len(ORDERS))])
    optimizer = torch.optim.AdamW([*network.parameters(), *heads.parameters()], lr=2e-3, fused=True)
    bar = tqdm(range(args.n_updates), unit="step", mininterval=1)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 50, 1 - step / args.n_updates)
        rng = np.random.default_rng(step)
        videos, games, orders = [], [], []
        for game, clips in enumerate(train):  # every game in every order, or the one would betray the other
            for order, pair in enumerate(clips.batch(step)[0].split(2)):
                videos.append(reorder(pair, order, rng))
                games += [game] * 2
                orders += [order] * 2
        features = network(torch.cat(videos).movedim(-1, 2).float() / 127.5 - 1)
        guesses = [head(features) for head in heads]
        loss = sum(F.cross_entropy(guess, torch.tensor(truth)) for guess, truth in zip(guesses, (games, orders)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right = [(guess.argmax(1) == torch.tensor(truth)).float().mean() for guess, truth in zip(guesses, (games, orders))]
        bar.set_postfix_str(f"loss {loss:.2f}, right: game {right[0]:.2f}, order {right[1]:.2f}", refresh=False)
    save_checkpoint(args.out, {"model": {name: weight.half() for name, weight in network.state_dict().items()}})


if __name__ == "__main__":
    print_user_errors()
    main()
