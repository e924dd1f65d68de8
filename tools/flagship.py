"""Measure how good a world is by minutes of training, and how the loss falls with compute.

    python -m tools.record coinrun --frames 10000000 --out data/coinrun.h5
    python -m tools.record coinrun --frames 24000 --seed 1000 --out data/coinrun-test.h5
    python -m tools.flagship --data-path data/coinrun.h5 --test data/coinrun-test.h5 \\
        --out checkpoints/coinrun --minutes 2 5 10 20 --json docs/results/flagship-coinrun.json
    python -m tools.flagship ... --widths 128 256 512 --n-updates 4000    # loss against compute

This is for a GPU; --preset tiny runs it anywhere. Each budget of --minutes is divided among the
three stages and has training runs of its own, because the learning rate falls over the length of
a run. Its world is OUT/MINUTES. --widths trains dynamics models on the tokens and latent actions
of the last world, on all of the data and on a quarter. Each result is written to --json at once.
Results that are there already are not trained again. Every command that it runs is printed.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from config import PRESETS
from utils.checkpoint import build_model, load_checkpoint
from utils.cli import Parser, UserError, print_user_errors
from utils.hardening.files import make_folder
from utils.hardening.settings import preset_values
from utils.hardening.videos import DatasetWriter
from utils.optimizer import count_parameters

import h5py
import numpy as np
from matplotlib.figure import Figure

from tools.speedrun import describe_device, git_commit, run

SHARES = {"tokenizer": 0.3, "lam": 0.2, "dynamics": 0.5}  # of the minutes
QUARTER = 0.25


def validated(world, test):
    report = world / "report" / "report.json"
    words = ("--checkpoint", world, "--data-path", test, "--val-fraction", 0.5)
    run("validate.py", *words, "--save-images", world / "report", "--json", report)
    return json.loads(report.read_text())


def world_in(minutes, world, args):
    """Train the three stages for `minutes` in total. → the report, with the minutes it took."""
    began = time.perf_counter()
    for stage, share in SHARES.items():
        words = ("--data-path", args.data_path, "--out", world, "--preset", args.preset)
        run(f"train_{stage}.py", *words, "--minutes", share * minutes)
    took = (time.perf_counter() - began) / 60
    return validated(world, args.test) | {"wall_minutes": took}


def first_part(path, share):
    """Write the first `share` of the data to a file beside it. → its path"""
    out = Path(path).with_suffix(f".{share:g}.h5")
    if out.exists():
        return out
    with h5py.File(path) as file:
        frames, actions = file["frames"], file.get("actions")
        n, names = int(share * len(frames)), dict(file.attrs.items())
        with DatasetWriter(out, frames.shape[1:3], actions is not None, **names) as writer:
            for i in range(0, n, 4096):
                rows = slice(i, min(n, i + 4096))
                writer.append(frames[rows], None if actions is None else actions[rows])
            starts = [int(start) for start in file.get("episode_starts", ())]
            writer.episode_starts = [start for start in starts if start < n]
    return out


def scaled(width, share, world, args):
    """Train a dynamics model of a width on a share of the data. → its size, compute and loss.

    It has the tokenizer and the latent actions of `world`.
    """
    out = Path(args.out) / f"width-{width}-data-{share:g}"
    make_folder(out)
    for stage in ("tokenizer", "lam"):
        shutil.copy(world / f"{stage}.pt", out)
    data = args.data_path if share == 1 else first_part(args.data_path, share)
    words = ("--data-path", data, "--out", out, "--preset", args.preset)
    sizes = ("--embed-dim", width, "--hidden-dim", 4 * width, "--n-heads", max(1, width // 32))
    run("train_dynamics.py", *words, "--n-updates", args.n_updates, *sizes)
    saved = load_checkpoint(out / "dynamics.pt", "dynamics")
    config, (h, w) = saved["config"], saved["model_args"]["grid"]
    parameters = count_parameters(build_model(saved))
    frames = 2 * (config["context_length"] - 1)  # each clip passes twice, clean and masked
    tokens = args.n_updates * config["batch_size"] * frames * h * w
    report = validated(out, args.test)
    return {
        "parameters": parameters,
        "pflops": 6 * parameters * tokens / 1e15,  # arXiv:2001.08361, §2.1
        "loss": report["dynamics/masked_ce"],
        "delta_psnr_min_t4": report["dynamics/delta_psnr_min_t4"],
    }


def line(results):
    """Fit log10 loss = a + b·log10 PFLOPs to the models trained on all of the data. → (a, b)"""
    points = [
        (results[name.replace("/loss", "/pflops")], value)
        for name, value in results.items()
        if name.startswith("scaling/") and name.endswith("/1/loss")
    ]
    b, a = np.polyfit(*np.log10(points).T, 1)
    return float(a), float(b)


def plot(results, path):
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    budgets = sorted(
        (value, name.split("/")[1])
        for name, value in results.items()
        if name.startswith("curve/") and name.endswith("wall_minutes")
    )
    for ax, names in (
        (axes[0], ("rollout_psnr_t4", "copy_psnr_t4")),
        (axes[1], ("delta_psnr_min_t4", "delta_psnr_button_t4")),
    ):
        for name in names:
            ax.plot(
                [wall for wall, _ in budgets],
                [results[f"curve/{budget}/dynamics/{name}"] for _, budget in budgets],
                "o-",
                label=name,
            )
        ax.set(xlabel="minutes of training", ylabel="dB")
        ax.legend(frameon=False)
    for share, marker in ((1, "o"), (QUARTER, "s")):
        points = sorted(
            (results[name.replace("/loss", "/pflops")], value)
            for name, value in results.items()
            if name.startswith("scaling/") and name.endswith(f"/{share:g}/loss")
        )
        if points:
            label = "all data" if share == 1 else "a quarter of the data"
            axes[2].loglog(*zip(*points, strict=True), marker, label=label)
    if "scaling/slope" in results:
        x = np.geomspace(*axes[2].get_xlim(), 20)
        axes[2].plot(
            x,
            10 ** results["scaling/intercept"] * x ** results["scaling/slope"],
            "k:",
            label=f"slope {results['scaling/slope']:.3f}",
        )
        axes[2].legend(frameon=False)
    axes[2].set(xlabel="PFLOPs", ylabel="masked cross-entropy")
    figure.savefig(path, dpi=90)


def parse(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data-path", required=True, help="data in HDF5")
    add("--test", required=True, help="data of another seed, with true actions")
    add("--out", required=True, help="folder for the worlds")
    add("--minutes", type=float, nargs="+", default=[2, 5, 10, 20], help="budgets [2 5 10 20]")
    add("--widths", type=int, nargs="*", default=[], help="of dynamics models to compare [none]")
    add("--n-updates", type=int, default=4000, help="updates of each of those models [4000]")
    add("--preset", default="gpu", help="preset of the training scripts [gpu]")
    add("--json", required=True, metavar="FILE", help="results; a plot is saved beside them")
    args = parser.parse_args(argv)
    preset_values(PRESETS, args.preset, "tokenizer")  # raises for an unknown one
    if min(args.minutes) <= 0 or min([*args.widths, args.n_updates]) < 1:
        raise UserError(
            f"--minutes {args.minutes}, --widths {args.widths} and --n-updates {args.n_updates}"
            " must be positive"
        )
    for path in (args.data_path, args.test):
        if not h5py.is_hdf5(path):
            raise UserError(
                f"{path} is no HDF5 file; record one with: python -m tools.record GAME --out {path}"
            )
    return args


def main(argv=None):
    args = parse(argv)
    path = Path(args.json)
    make_folder(path.parent)
    typed = sys.argv[1:] if argv is None else argv
    results = {
        "device": describe_device(),
        "commit": git_commit(),
        "command": " ".join(["python -m tools.flagship", *typed]),
    }
    if path.exists():
        results = json.loads(path.read_text())

    def note(prefix, make):
        if not any(name.startswith(prefix + "/") for name in results):
            results.update({f"{prefix}/{name}": value for name, value in make().items()})
            path.write_text(json.dumps(results, indent=1) + "\n")

    for minutes in sorted(args.minutes):
        world = Path(args.out) / f"{minutes:g}"
        note(
            f"curve/{minutes:g}",
            lambda minutes=minutes, world=world: world_in(minutes, world, args),
        )
    for share in (1, QUARTER) if args.widths else ():
        for width in args.widths:
            note(
                f"scaling/{width}/{share:g}",
                lambda width=width, share=share: scaled(width, share, world, args),
            )
    if len(args.widths) > 1:
        results["scaling/intercept"], results["scaling/slope"] = line(results)
        path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    print_user_errors()
    main()
