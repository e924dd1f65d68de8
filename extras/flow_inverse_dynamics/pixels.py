"""Inverse dynamics from pixels: which action was taken between two frames of a recorded game?

    python -m extras.flow_inverse_dynamics.pixels --checkpoint checkpoints/shipped/doom-maze \\
        --data-path data/doom-maze.h5 --test data/doom-maze-test.h5

A state is the FSQ codes of a frame, from the world's tokenizer. An action is the true action as a
one-hot vector, and the guess is the largest entry of a sample. Baselines:

  * a supervised classifier on the same input
  * the most frequent action
  * the latent action model, which has never seen a true action. Its codes are mapped to true
    actions by the best mapping, as in validate.py.
"""

import argparse
from pathlib import Path

from utils.checkpoint import load_world
from utils.cli import Parser, UserError, print_user_errors
from utils.hardening.files import make_folder

import h5py
import torch
import torch.nn.functional as F
from torch import Tensor

from data_utils import Clips, open_dataset, to_float
from evaluation import metrics
from extras.flow_inverse_dynamics import train
from extras.flow_inverse_dynamics.evaluate import add_to_json, mlp
from extras.flow_inverse_dynamics.model import FlowInverseDynamics
from models.world_model import WorldModel

VOTES = 16  # samples per pair


@torch.no_grad()
def pairs_of(
    world: WorldModel, path: str, n_clips: int, part: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Clips of a recording → pairs of a frame and the next one, with their actions.

    → (codes of the frame (n, N·D), codes of the next frame (n, N·D), true actions (n,), latent
    actions (n,), number of different true actions).
    """
    dataset = open_dataset(path, frame_size=world.frame_size[0])
    if dataset.actions is None:
        raise UserError(f"{path} holds no actions to compare with; tools/record.py records them")
    length = world.dynamics.transformer.context_length
    clips = Clips(dataset, part, length, val_fraction=0.9 if part == "val" else 0.1)
    frames, actions = clips.evenly_spaced(n_clips)
    codes, latent = [], []
    for clip in frames.split(16):
        video = to_float(clip, world.device)
        found = world.tokenizer.quantizer.indices_to_codes(world.tokenizer.encode(video))
        codes.append(found.flatten(2).cpu())  # (B, T, N·D)
        latent.append(world.lam.infer(video).cpu())
    codes, latent = torch.cat(codes), torch.cat(latent).flatten()
    s, s_next = codes[:, :-1].flatten(0, 1), codes[:, 1:].flatten(0, 1)
    return s, s_next, actions.flatten().long(), latent, dataset.n_true_actions()


def train_flow(
    args: argparse.Namespace, s: Tensor, s_next: Tensor, one_hot: Tensor
) -> FlowInverseDynamics:
    """The flow of train.py, trained on these pairs."""
    make_folder(args.out)
    path = Path(args.out) / "triplets.h5"
    with h5py.File(path, "w") as file:
        file["s"], file["s_next"], file["a"] = s.numpy(), s_next.numpy(), one_hot.numpy()
    train.main(["--triplets", str(path), "--out", args.out, "--num-epochs", str(args.num_epochs)])
    return train.load_flow(Path(args.out) / f"{train.STAGE}.pt", s.shape[1], one_hot.shape[2])


def guesses_of(
    flow: FlowInverseDynamics,
    s: Tensor,
    s_next: Tensor,
    one_hot: Tensor,
    test_s: Tensor,
    test_next: Tensor,
) -> dict[str, Tensor]:
    """Guesses (n,) of the flow and of a classifier on the same input, by name."""
    generator = torch.Generator().manual_seed(0)
    votes = []
    for _ in range(VOTES):
        sample = flow.sample(test_s, test_next, 20, generator=generator)
        votes.append(sample[:, 0].argmax(-1))

    def loss(scores, wanted):
        return F.cross_entropy(scores.flatten(1), wanted.flatten(1))

    classify = mlp(flow.embed(s, s_next), one_hot, loss=loss)
    return {
        "flow, one sample": votes[0],
        f"flow, most frequent of {VOTES}": torch.stack(votes).mode(dim=0).values,
        "classifier (MLP)": classify(flow.embed(test_s, test_next))[:, 0].argmax(-1),
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder of a world of this game")
    help = "recording with true actions to learn from"
    parser.add_argument("--data-path", required=True, help=help)
    help = "recording with true actions that the world has not seen"
    parser.add_argument("--test", required=True, help=help)
    help = "folder of the flow [checkpoints/flow/pixels]"
    parser.add_argument("--out", default="checkpoints/flow/pixels", help=help)
    help = "how many clips to learn from [3000]"
    parser.add_argument("--clips", type=int, default=3000, help=help)
    help = "passes over the pairs for the flow [20]"
    parser.add_argument("--num-epochs", type=int, default=20, help=help)
    parser.add_argument("--json", default="", metavar="FILE", help="add the numbers to this file")
    args = parser.parse_args(argv)
    if args.clips < 1:
        raise UserError(f"--clips must be positive, got {args.clips}")
    world = load_world(args.checkpoint)
    if world.lam is None:
        raise UserError(
            f"{args.checkpoint} was trained on true actions;"
            " choose a world with a latent action model"
        )
    s, s_next, actions, _, n = pairs_of(world, args.data_path, args.clips, "train")
    test_s, test_next, truth, latent, _ = pairs_of(world, args.test, max(1, args.clips // 6), "val")
    print(f"{len(s):,} pairs of frames to learn from, {len(test_s):,} to test on; {n} true actions")
    one_hot = F.one_hot(actions, n)[:, None].float()
    flow = train_flow(args, s, s_next, one_hot)
    report = {}
    for name, guess in guesses_of(flow, s, s_next, one_hot, test_s, test_next).items():
        report[f"{name}/accuracy"] = float((guess == truth).float().mean())
        report[f"{name}/nmi"] = float(metrics.nmi_above_chance(guess, truth))
    best = metrics.best_mapping_accuracy(latent, truth)
    report["latent action model, no buttons/accuracy"] = float(best)
    report["latent action model, no buttons/nmi"] = float(metrics.nmi_above_chance(latent, truth))
    report["most frequent button/accuracy"] = float(metrics.shares(truth, n).max())
    report["most frequent button/nmi"] = 0.0
    for key, value in report.items():
        print(f"{key:52} {value:8.3f}")
    if args.json:
        add_to_json(args.json, {f"pixels/{key}": value for key, value in report.items()})
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
