"""Ablation: change one choice of the recipe at a time; mean and deviation over seeds.

    python -m tools.ablate --world checkpoints/doom-maze --data-path data/doom-maze-40000.h5 \\
        --test data/doom-maze-24000-test.h5
    python -m tools.ablate ... --only lam            or dynamics

Each row trains one stage on the CPU with the preset cpu, for seeds 0, 1 and 2. All rows have the
same small number of updates of 4 clips; the earlier stages are those of --world. A row is a set of
flags for the training script; two rows are classes below instead. Each result is written to --json
at once. Results that are there already are not trained again.
"""

import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from unittest import mock

from utils.checkpoint import MODELS, build_model, load_checkpoint, load_world
from utils.cli import Parser, UserError, print_user_errors
from utils.device import autocast_on
from utils.hardening.files import make_folder

import torch
import torch.nn.functional as F
from torch import nn

import train_dynamics
import train_lam
import validate
from data_utils import Clips, open_dataset
from evaluation import stages
from evaluation.video_features import smallnet_features
from models.fsq import log_statistics
from models.latent_action_model import LatentActionModel
from tools.speedrun import describe_device, git_commit


class WarmUp(LatentActionModel):
    """All action bits are continuous in the first half of training and rounded in the second."""

    n_updates, steps = 0, 0

    def forward(self, frames):
        if self.training:
            self.steps += 1
            self.soft_rate = 1.0 if self.steps <= self.n_updates // 2 else 0.0
        return super().forward(frames)


class TokenTarget(LatentActionModel):
    """The decoder predicts the tokens of the next frame, so the tokenizer must be trained first.

    The loss is their cross-entropy relative to that of a uniform guess. The error in pixels
    includes the tokenizer's own error, so compare this row by nmi.
    """

    tokenizer = None  # a frozen VideoTokenizer, kept out of the weights

    def __init__(self, **sizes):
        super().__init__(**{**sizes, "decoder": "frame"})
        self.decoder.frame_head = nn.Linear(
            sizes["embed_dim"], self.tokenizer[0].quantizer.codebook_size
        )

    def forward(self, frames):
        latents = self.latents(frames)
        codes, soft_bits = self.quantizer(latents), self.quantizer.bound(latents)
        actions = (
            torch.where(torch.rand_like(codes) < self.soft_rate, soft_bits, codes)
            if self.training
            else codes
        )
        with torch.no_grad():
            tokens = self.tokenizer[0].encode(frames)  # (B, T, N)
        logits = self.decoder(frames[:, :-1], actions)  # (B, T-1, N, codebook_size)
        error = F.cross_entropy(logits.flatten(0, 2), tokens[:, 1:].flatten()) / math.log(
            logits.shape[-1]
        )
        logs = {
            "error_over_copy": error.detach(),
            "codes_used": self.quantizer.codes_to_indices(codes.detach()).unique().numel(),
        }
        logs |= log_statistics(soft_bits, logits)
        return error + self.collapse_penalty(soft_bits), logs

    def predict(self, frames, actions):
        logits = self.decoder(frames[:, :-1], self.quantizer.indices_to_codes(actions))
        tokens = torch.cat(
            [self.tokenizer[0].encode(frames)[:, :1], logits.argmax(-1)], dim=1
        )  # (B, T, N)
        return self.tokenizer[0].decode(tokens)[:, 1:]


# The rows of the latent action model compare what it finds by itself, without taught moves.
ALONE = "--teach-weight 0 --history-updates 1"
ADAMW = "--optimizer adamw --learning-rate 2e-3"
LAM_ROWS = {  # name → flags, and the class that replaces the model
    "as shipped": ("", None),
    "encoder: both frames in a patch, not how they match": ("--encoder pairs", None),
    "encoder: mean-pooled frames compared (article)": ("--encoder frames", None),
    "decoder: adds, cannot move patches": ("--decoder change", None),
    "decoder: draws the frame anew": ("--decoder frame", None),
    "decoder: draws it anew, from the first frame (article, keep-rate 0)": (
        "--decoder frame --keep-rate 0",
        None,
    ),
    "decoder: draws the frame's tokens, not its pixels": ("", TokenTarget),
    "rounded from the start (article)": ("--soft-rate 0", None),
    "continuous first half, then rounded": ("", WarmUp),
    "no normalisation before rounding (article)": ("--latent-norm none", None),
    "no entropy bonus (article)": ("--entropy-lambda 0", None),
    "all of the article's choices together": (
        "--encoder frames --decoder frame --keep-rate 0 --soft-rate 0 --latent-norm none"
        f" --entropy-lambda 0 {ADAMW}",
        None,
    ),
}
DYNAMICS_ROWS = {
    "as shipped": ("", None),
    "context masked (Genie, the article)": ("--context masked", None),
    "action added to the tokens (Genie)": ("--conditioning add", None),
    "a token's embedding sees itself alone (Genie)": ("--token-kernel 1", None),
    "AdamW for all weights (article), rate 0.002": (ADAMW, None),
    "no actions (random instead): the random baseline": ("--actions random", None),
    "true actions: the oracle": ("--actions true", None),
}
LAM_METRICS = (
    "psnr",
    "psnr_shuffled",
    "copy_psnr",
    "nmi",
    "accuracy",
    "actions_used",
    "largest_share",
)
DYNAMICS_METRICS = (
    "delta_psnr_t4",
    "delta_psnr_null_t4",
    "delta_psnr_marginal_t4",
    "delta_psnr_button_t4",
    "rollout_psnr_t4",
    "copy_psnr_t4",
    "token_accuracy_changing",
)


def finished(out, stage):
    """The checkpoint in `out`. Raises KeyboardInterrupt if Ctrl-C ended the training run early."""
    checkpoint = load_checkpoint(out / f"{stage}.pt", stage)
    if checkpoint["step"] < checkpoint["n_updates"]:
        raise KeyboardInterrupt
    return checkpoint


def train_row(stage, name, seed, args, clips, out):
    """Train and measure one row. → {metric: value}"""
    flags, other = (LAM_ROWS if stage == "lam" else DYNAMICS_ROWS)[name]
    n_updates = args.lam_updates if stage == "lam" else args.dynamics_updates
    settings = f"--preset {args.preset} --device cpu --batch-size 4 --seed {seed}"
    settings += f" --n-updates {n_updates} --sample-every 1000000 --save-every 1000000 {flags}"
    settings += f" {ALONE}" if stage == "lam" else ""
    options = ["--data-path", args.data_path, "--out", str(out), *settings.split()]
    began, autocast = time.perf_counter(), autocast_on(torch.device("cpu"))
    if stage == "lam":
        kind = other or LatentActionModel
        WarmUp.n_updates = n_updates
        tokenizer = load_checkpoint(Path(args.world) / "tokenizer.pt", "tokenizer")
        TokenTarget.tokenizer = [build_model(tokenizer)]
        replaced = mock.patch.object(train_lam, "LatentActionModel", kind)
        rebuilt = mock.patch.dict(MODELS, lam=(kind.__module__, kind.__name__))
        with replaced, rebuilt:
            with torch.enable_grad():
                train_lam.main(options)
            minutes = (time.perf_counter() - began) / 60
            lam = build_model(finished(out, "lam"))
        with autocast():
            values = stages.lam_metrics(lam, *clips, "cpu")
        return {metric: float(values[metric]) for metric in LAM_METRICS} | {"minutes": minutes}
    shutil.copy(Path(args.world) / "tokenizer.pt", out)
    if "true" not in flags:
        shutil.copy(Path(args.world) / "lam.pt", out)
    with torch.enable_grad():
        train_dynamics.main(options)
    minutes = (time.perf_counter() - began) / 60
    finished(out, "dynamics")
    features = ("smallnet", smallnet_features)
    with autocast():
        world = load_world(out, **validate.SAMPLING)
        values = stages.dynamics_metrics(world, clips, "cpu", None, features)
    # without a LAM there is no code of a button
    measured = [metric for metric in DYNAMICS_METRICS if metric in values]
    return {metric: float(values[metric]) for metric in measured} | {"minutes": minutes}


def table(results, stage, rows, columns):
    """A Markdown table of mean ± standard deviation over seeds.

    columns: heading → function of the metrics of one seed. results: "stage/row/seed/metric" →
    value, and the settings.
    """
    lines = [f"| {stage} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in rows:
        start, runs = f"{stage}/{name}/", {}
        for seed, metric in (
            key[len(start) :].split("/") for key in results if key.startswith(start)
        ):
            runs.setdefault(seed, {})[metric] = results[f"{start}{seed}/{metric}"]
        found = list(runs.values())
        cells = []
        for value_of in columns.values() if found else ():
            values = torch.tensor([value_of(result) for result in found])
            cells.append(
                f"{values.mean():.2f} ± {values.std():.2f}"
                if len(found) > 1
                else f"{values[0]:.2f}"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(results):
    lam = {
        "error relative to copying": lambda r: 10 ** ((r["copy_psnr"] - r["psnr"]) / 10),
        "… with another clip's codes": lambda r: 10 ** ((r["copy_psnr"] - r["psnr_shuffled"]) / 10),
        "nmi with the true actions": lambda r: r["nmi"],
        "largest share": lambda r: r["largest_share"],
        "actions used": lambda r: r["actions_used"],
    }
    dynamics = {
        "ΔPSNR@4 against random": lambda r: r["delta_psnr_t4"],
        "against the most frequent": lambda r: r["delta_psnr_null_t4"],
        "rollout − copy, t = 4": lambda r: r["rollout_psnr_t4"] - r["copy_psnr_t4"],
        "accuracy on changed tokens": lambda r: r["token_accuracy_changing"],
    }
    return (
        table(results, "lam", LAM_ROWS, lam)
        + "\n\n"
        + table(results, "dynamics", DYNAMICS_ROWS, dynamics)
    )


def open_results(args, path):
    """The results in --json so far. Raises UserError if they were made with other settings."""
    names = ("world", "data_path", "test", "preset", "lam_updates", "dynamics_updates")
    settings = {name: getattr(args, name) for name in names}
    if not path.exists():
        made = {"commit": git_commit(), "device": describe_device()}
        return settings | made | {"command": "python -m tools.ablate"}
    results = json.loads(path.read_text())
    for name, value in settings.items():
        if results[name] != value:
            raise UserError(
                f"{path} was made with {name} {results[name]}, not {value}; use another --json"
            )
    return results


def parse(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--world", required=True, help="folder of a trained world: its tokenizer and LAM are used")
    add("--data-path", required=True, help="data to train on, with recorded actions")
    add("--test", required=True, help="data to measure on")
    add("--json", default="docs/results/ablation.json", help="results [docs/results/ablation.json]")
    add("--only", default="", choices=("", "lam", "dynamics"), help="train one stage only [both]")
    add("--lam-updates", type=int, default=250, help="updates per row of the LAM [250]")
    add("--dynamics-updates", type=int, default=250, help="updates per row of the dynamics [250]")
    add("--seeds", type=int, default=3, help="seeds per row [3]")
    add("--preset", default="cpu", help="preset of the training scripts [cpu]")
    args = parser.parse_args(argv)
    if not all((Path(args.world) / f"{stage}.pt").exists() for stage in ("tokenizer", "lam")):
        raise UserError(
            f"no tokenizer.pt and lam.pt in {args.world};"
            " train them first: python -m tools.speedrun"
        )
    return args


@torch.no_grad()
def main(argv=None):
    args = parse(argv)
    path = Path(args.json)
    make_folder(path.parent)
    results = open_results(args, path)
    dataset = open_dataset(args.test)
    if dataset.actions is None:
        raise UserError(
            f"{args.test} has no recorded actions to measure against; use data of tools/record.py"
        )
    for stage, rows, length in (
        ("lam", LAM_ROWS, 8),
        ("dynamics", DYNAMICS_ROWS, stages.CONTEXT + 4),
    ):
        clips = Clips(dataset, "val", length, val_fraction=0.5).evenly_spaced(96)
        for seed in range(args.seeds if args.only in ("", stage) else 0):
            for name in rows:
                key = f"{stage}/{name}/{seed}"
                if any(done.startswith(key + "/") for done in results):
                    continue
                print(f"\n=== {key}", flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    measured = train_row(stage, name, seed, args, clips, Path(folder))
                results |= {f"{key}/{metric}": value for metric, value in measured.items()}
                path.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    print_user_errors()
    main()
