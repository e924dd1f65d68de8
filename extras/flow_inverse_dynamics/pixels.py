"""Frames of a recorded game instead of states: which button was pressed between these two?

    python extras/flow_inverse_dynamics/pixels.py --checkpoint checkpoints/shipped/doom-maze --data-path data/doom-maze.h5 --test data/doom-maze-test.h5

A state is the 64 FSQ codes that the world's tokenizer finds in a frame; an action is the button as a relaxed vector, 1 at its place and 0 elsewhere, and the
largest entry of a sample is the guess. Beside the flow: a classifier on the same input, the most frequent button, and the latent action model, which
has seen no button: its codes are translated by the best mapping, as validate.py does.
"""
import json
import sys
from argparse import Namespace
from pathlib import Path

import h5py
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import metrics  # noqa: E402
from config import Parser, UserError, make_folder, print_user_errors  # noqa: E402
from data_utils import Clips, n_buttons, open_footage, to_float  # noqa: E402
from extras.flow_inverse_dynamics import train  # noqa: E402
from extras.flow_inverse_dynamics.evaluate import mlp  # noqa: E402
from models.world_model import WorldModel  # noqa: E402
from speedrun import describe_device, git_commit  # noqa: E402

VOTES = 16  # samples per pair


@torch.no_grad()
def pairs_of(world, path, n_clips, part):
    """Clips of a recording → codes of frame and next frame (n, N·D), buttons (n,) and latent actions (n,)."""
    footage = open_footage(Namespace(data_path=path, data_type="auto", use_dummy_data=False, frame_size=world.frame_size[0]))
    if footage.actions is None:
        raise UserError(f"{path} holds no actions to compare with; record.py records them")
    length = world.dynamics.transformer.context_length
    frames, buttons = Clips(footage, part, length, val_fraction=0.9 if part == "val" else 0.1).spread(n_clips)
    codes, latent = [], []
    for clip in frames.split(16):
        video = to_float(clip, world.device)
        found = world.tokenizer.quantizer.indices_to_codes(world.tokenizer.encode(video))  # (B, T, N, D)
        codes.append(found.flatten(2).cpu())
        latent.append(world.lam.infer(video).cpu())
    codes = torch.cat(codes)
    return codes[:, :-1].flatten(0, 1), codes[:, 1:].flatten(0, 1), buttons.flatten().long(), torch.cat(latent).flatten(), n_buttons(footage)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder of a world of that game")
    parser.add_argument("--data-path", required=True, help="recording with buttons to learn from")
    parser.add_argument("--test", required=True, help="recording with buttons that the world has not seen")
    parser.add_argument("--out", default="checkpoints/flow/pixels")
    parser.add_argument("--clips", type=int, default=3000, help="of the recording to learn from [3000]")
    parser.add_argument("--num-epochs", type=int, default=20)
    parser.add_argument("--json", default="", metavar="FILE", help="add the numbers to this file")
    args = parser.parse_args(argv)
    if args.clips < 1:
        raise UserError(f"--clips must be positive, got {args.clips}")
    world = WorldModel.load(args.checkpoint)
    if world.lam is None:
        raise UserError(f"{args.checkpoint} was trained on true actions; take a world with a latent action model")
    s, s_next, buttons, _, n = pairs_of(world, args.data_path, args.clips, "train")
    test_s, test_next, truth, latent, _ = pairs_of(world, args.test, max(1, args.clips // 6), "val")
    print(f"{len(s):,} pairs of frames to learn from, {len(test_s):,} to test on; {n} buttons")
    make_folder(args.out)
    file = Path(args.out) / "triplets.h5"
    with h5py.File(file, "w") as out:
        out["s"], out["s_next"], out["a"] = s.numpy(), s_next.numpy(), F.one_hot(buttons, n)[:, None].float().numpy()
    train.main(["--triplets", str(file), "--out", args.out, "--num-epochs", str(args.num_epochs)])
    flow = train.load_flow(Path(args.out) / f"{train.STAGE}.pt", s.shape[1], n)

    dice = torch.Generator().manual_seed(0)
    drawn = torch.stack([flow.sample(test_s, test_next, 20, generator=dice)[:, 0].argmax(-1) for _ in range(VOTES)])  # (VOTES, n)
    pair = flow.embed(s, s_next)
    guesses = {"flow, one sample": drawn[0], f"flow, most frequent of {VOTES}": drawn.mode(dim=0).values}
    classify = mlp(pair, F.one_hot(buttons, n)[:, None].float(), loss=lambda scores, wanted: F.cross_entropy(scores.flatten(1), wanted.flatten(1)))
    guesses["classifier (MLP)"] = classify(flow.embed(test_s, test_next))[:, 0].argmax(-1)
    report = {}
    for name, guess in guesses.items():
        report[f"{name}/accuracy"] = float((guess == truth).float().mean())
        report[f"{name}/nmi"] = float(metrics.nmi_above_chance(guess, truth))
    report["latent action model, no buttons/accuracy"] = float(metrics.best_mapping_accuracy(latent, truth))
    report["latent action model, no buttons/nmi"] = float(metrics.nmi_above_chance(latent, truth))
    report["most frequent button/accuracy"] = float(metrics.shares(truth, n).max())
    report["most frequent button/nmi"] = 0.0
    for key, value in report.items():
        print(f"{key:52} {value:8.3f}")
    if args.json:
        make_folder(Path(args.json).parent)
        old = json.loads(Path(args.json).read_text()) if Path(args.json).exists() else {}
        made = {"device": describe_device(), "commit": git_commit(), "command": "the commands of extras/flow_inverse_dynamics/README.md"}
        Path(args.json).write_text(json.dumps(old | {f"pixels/{key}": value for key, value in report.items()} | made, indent=1) + "\n")
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
