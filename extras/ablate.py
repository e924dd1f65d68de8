"""One change at a time: what each choice of the recipe is worth, with the spread over seeds.

    python extras/ablate.py --world checkpoints/doom-maze --data-path data/doom-maze-40000.h5 --test data/doom-maze-24000-test.h5
    python extras/ablate.py ... --only lam            or dynamics

Every row trains one stage anew, on the CPU with the preset cpu but fewer updates of 4 clips, the same number for all rows, and
everything else as in --world; seeds 0, 1, 2. Rows are flags of the training scripts; the two that are not are classes below.
Each result is written to --json at once, and what is there already is not trained again.
"""
import json
import math
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_dynamics  # noqa: E402
import train_lam  # noqa: E402
import validate  # noqa: E402
from config import Parser, UserError, make_folder, print_user_errors  # noqa: E402
from models.checkpoint import MODELS, build_model, load_checkpoint  # noqa: E402
from models.latent_action_model import LatentActionModel  # noqa: E402
from speedrun import describe_device, git_commit  # noqa: E402


class WarmUp(LatentActionModel):
    """All action bits continuous in the first half of training, all rounded in the second."""

    n_updates, steps = 0, 0

    def forward(self, frames):
        if self.training:
            self.steps += 1
            self.soft_rate = 1.0 if self.steps <= self.n_updates // 2 else 0.0
        return super().forward(frames)


class TokenTarget(LatentActionModel):
    """The decoder predicts the tokens of the next frame, and so needs the tokenizer first. The loss is their cross-entropy,
    1 for a blind guess, as copying is for the pixel loss. Its error in pixels contains the tokenizer's own: compare by nmi."""

    tokenizer = None  # a frozen VideoTokenizer, kept out of the weights

    def __init__(self, **sizes):
        super().__init__(**{**sizes, "decoder": "frame"})
        self.decoder.frame_head = nn.Linear(sizes["embed_dim"], self.tokenizer[0].quantizer.codebook_size)

    def forward(self, frames):
        latents = self.latents(frames)
        codes, soft_bits = self.quantizer(latents), self.quantizer.bound(latents)
        actions = torch.where(torch.rand_like(codes) < self.soft_rate, soft_bits, codes) if self.training else codes
        with torch.no_grad():
            tokens = self.tokenizer[0].encode(frames)  # (B, T, N)
        logits = self.decoder(frames[:, :-1], actions)  # (B, T-1, N, codebook_size)
        error = F.cross_entropy(logits.flatten(0, 2), tokens[:, 1:].flatten()) / math.log(logits.shape[-1])
        logs = {"error_over_copy": error.detach(), "codes_used": self.quantizer.codes_to_indices(codes.detach()).unique().numel()}
        return error + self.collapse_penalty(soft_bits), logs

    def predict(self, frames, actions):
        logits = self.decoder(frames[:, :-1], self.quantizer.indices_to_codes(actions))
        tokens = torch.cat([self.tokenizer[0].encode(frames)[:, :1], logits.argmax(-1)], dim=1)  # (B, T, N)
        return self.tokenizer[0].decode(tokens)[:, 1:]


LAM_ROWS = {  # name → flags, what replaces what
    "as shipped": ([], None),
    "encoder: both frames in a patch, not how they match": (["--encoder", "pairs"], None),
    "encoder: mean-pooled frames compared (article)": (["--encoder", "frames"], None),
    "decoder: adds, cannot move patches": (["--decoder", "change"], None),
    "decoder: draws the frame anew": (["--decoder", "frame"], None),
    "decoder: draws it anew, from the first frame (article, keep-rate 0)": ("--decoder frame --keep-rate 0".split(), None),
    "decoder: draws the frame's tokens, not its pixels": ([], TokenTarget),
    "rounded from the start (article)": (["--soft-rate", "0"], None),
    "continuous first half, then rounded": ([], WarmUp),
    "no normalisation before rounding (article)": (["--latent-norm", "none"], None),
    "no entropy bonus (article)": (["--entropy-lambda", "0"], None),
    "all of the article's choices together": (
        "--encoder frames --decoder frame --keep-rate 0 --soft-rate 0 --latent-norm none --entropy-lambda 0".split()
        + "--optimizer adamw --learning-rate 2e-3".split(),
        None,
    ),
}
DYNAMICS_ROWS = {
    "as shipped": ([], None),
    "context masked (Genie, the article)": (["--context", "masked"], None),
    "action added to the tokens (Genie)": (["--conditioning", "add"], None),
    "a token's embedding sees itself alone (Genie)": (["--token-kernel", "1"], None),
    "AdamW for all weights (article), rate 0.002": ("--optimizer adamw --learning-rate 2e-3".split(), None),
    "no actions (dice instead): the floor": (["--actions", "random"], None),
    "true buttons: the skyline": (["--actions", "true"], None),
}
LAM_METRICS = ("psnr", "psnr_shuffled", "copy_psnr", "nmi", "accuracy", "actions_used", "largest_share")
DYNAMICS_METRICS = ("delta_psnr_t4", "delta_psnr_null_t4", "rollout_psnr_t4", "copy_psnr_t4", "token_accuracy_changing")


def finished(out, stage):
    """The checkpoint in `out`. A training stopped by Ctrl-C must not count as one that ended."""
    checkpoint = load_checkpoint(out / f"{stage}.pt", stage)
    if checkpoint["step"] < checkpoint["n_updates"]:
        raise KeyboardInterrupt
    return checkpoint


def train_row(stage, name, seed, args, clips, out):
    """Train one row and measure it → flat dict of floats."""
    flags, other = (LAM_ROWS if stage == "lam" else DYNAMICS_ROWS)[name]
    n_updates = args.lam_updates if stage == "lam" else args.dynamics_updates
    options = ["--data-path", args.data_path, "--out", str(out), "--preset", args.preset, "--device", "cpu", "--batch-size", "4", "--seed", str(seed),
               "--n-updates", str(n_updates), "--sample-every", "1000000", "--save-every", "1000000", *flags]  # fmt: skip
    began = time.perf_counter()
    if stage == "lam":
        kind = other or LatentActionModel
        WarmUp.n_updates = n_updates
        TokenTarget.tokenizer = [build_model(load_checkpoint(Path(args.world) / "tokenizer.pt", "tokenizer"))]
        with mock.patch.object(train_lam, "LatentActionModel", kind), mock.patch.dict(MODELS, lam=kind):
            with torch.enable_grad():
                train_lam.main(options)
            minutes = (time.perf_counter() - began) / 60
            lam = build_model(finished(out, "lam"))
        with validate.autocast_on(torch.device("cpu"))():
            values = validate.lam_metrics(lam, clips, "cpu")
        return {metric: float(values[metric]) for metric in LAM_METRICS} | {"minutes": minutes}
    for part in ["tokenizer.pt"] + ["lam.pt"] * ("true" not in flags):
        shutil.copy(Path(args.world) / part, out)
    with torch.enable_grad():
        train_dynamics.main(options)
    minutes = (time.perf_counter() - began) / 60
    finished(out, "dynamics")
    with validate.autocast_on(torch.device("cpu"))():
        values = validate.dynamics_metrics(validate.WorldModel.load(out, **validate.SAMPLING), clips, "cpu", None)
    return {metric: float(values[metric]) for metric in DYNAMICS_METRICS} | {"minutes": minutes}


def table(results, stage, rows, columns):
    """A Markdown table of mean ± standard deviation over seeds; columns: heading → function of one run's metrics.

    results: "stage/row/seed/metric" → value, beside the settings.
    """
    lines = [f"| {stage} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in rows:
        start, runs = f"{stage}/{name}/", {}
        for seed, metric in (key[len(start) :].split("/") for key in results if key.startswith(start)):
            runs.setdefault(seed, {})[metric] = results[f"{start}{seed}/{metric}"]
        found = list(runs.values())
        cells = []
        for value_of in columns.values() if found else ():
            values = torch.tensor([value_of(result) for result in found])
            cells.append(f"{values.mean():.2f} ± {values.std():.2f}" if len(found) > 1 else f"{values[0]:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(results):
    lam = {
        "error, of copying's": lambda r: 10 ** ((r["copy_psnr"] - r["psnr"]) / 10),
        "with another clip's codes": lambda r: 10 ** ((r["copy_psnr"] - r["psnr_shuffled"]) / 10),
        "nmi with the buttons": lambda r: r["nmi"],
        "largest share": lambda r: r["largest_share"],
        "actions used": lambda r: r["actions_used"],
    }
    dynamics = {
        "ΔPSNR@4 to random": lambda r: r["delta_psnr_t4"],
        "to the most frequent": lambda r: r["delta_psnr_null_t4"],
        "rollout − copy, t = 4": lambda r: r["rollout_psnr_t4"] - r["copy_psnr_t4"],
        "changed tokens right": lambda r: r["token_accuracy_changing"],
    }
    return table(results, "lam", LAM_ROWS, lam) + "\n\n" + table(results, "dynamics", DYNAMICS_ROWS, dynamics)


@torch.no_grad()
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--world", required=True, help="folder of a trained world: its tokenizer and LAM are used")
    parser.add_argument("--data-path", required=True, help="footage to train on, with recorded buttons")
    parser.add_argument("--test", required=True, help="footage to measure on")
    parser.add_argument("--json", default="results/ablation.json")
    parser.add_argument("--only", default="", choices=("", "lam", "dynamics"))
    parser.add_argument("--lam-updates", type=int, default=250)
    parser.add_argument("--dynamics-updates", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", default="cpu")
    args = parser.parse_args(argv)
    if not all((Path(args.world) / f"{stage}.pt").exists() for stage in ("tokenizer", "lam")):
        raise UserError(f"no tokenizer.pt and lam.pt in {args.world}; train them first: python speedrun.py")
    path = Path(args.json)
    make_folder(path.parent)
    settings = {name: getattr(args, name) for name in ("world", "data_path", "test", "preset", "lam_updates", "dynamics_updates")}
    results = json.loads(path.read_text()) if path.exists() else {**settings, "commit": git_commit(), "device": describe_device(), "command": "python extras/ablate.py"}
    for name, value in settings.items():
        if results[name] != value:
            raise UserError(f"{path} was made with {name} {results[name]}, not {value}; use another --json")
    footage = validate.open_footage(Namespace(data_path=args.test, data_type="auto", use_dummy_data=False, frame_size=64))
    if footage.actions is None:
        raise UserError(f"{args.test} has no recorded buttons to measure against; use footage of record.py")
    for stage, rows, length in (("lam", LAM_ROWS, 8), ("dynamics", DYNAMICS_ROWS, validate.CONTEXT + 4)):
        clips = validate.Clips(footage, "val", length, val_fraction=0.5).spread(96)
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
