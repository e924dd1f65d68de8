"""How good after how many minutes, and what more would buy: the numbers behind a large world. Made for a GPU; --preset tiny runs it anywhere.

    python record.py coinrun --frames 10000000 --out data/coinrun.h5
    python record.py coinrun --frames 24000 --seed 1000 --out data/coinrun-test.h5
    python extras/flagship.py --data-path data/coinrun.h5 --test data/coinrun-test.h5 --out checkpoints/coinrun --minutes 2 5 10 20 --json results/flagship-coinrun.json
    python extras/flagship.py ... --widths 128 256 512 --n-updates 4000          # also: loss against compute

Each budget of --minutes is a whole training of its own, shared out among the three stages, since a rate that falls to zero at the end belongs to
its length; OUT/MINUTES is its world. --widths trains dynamics models on the last world's tokens and actions, on all of the footage and on a quarter.
Each result is written to --json at once, and what is there already is not trained again. It only types commands, and prints each of them.
"""
import json
import shutil
import sys
import time
from pathlib import Path

import h5py
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS, Parser, UserError, make_folder, print_user_errors  # noqa: E402
from data_utils import DatasetWriter  # noqa: E402
from models.checkpoint import build_model, load_checkpoint  # noqa: E402
from speedrun import describe_device, git_commit, run  # noqa: E402

SHARES = {"tokenizer": 0.3, "lam": 0.2, "dynamics": 0.5}  # of the minutes
QUARTER = 0.25


def validated(world, test):
    run("validate.py", "--checkpoint", world, "--data-path", test, "--val-fraction", 0.5, "--save-images", world / "report", "--json", world / "report" / "report.json")
    return json.loads((world / "report" / "report.json").read_text())


def world_in(minutes, world, args):
    """Train the three stages in so many minutes. → the report of validate.py, and the minutes that it really took."""
    began = time.perf_counter()
    for stage, share in SHARES.items():
        run(f"train_{stage}.py", "--data-path", args.data_path, "--out", world, "--preset", args.preset, "--minutes", share * minutes)
    took = (time.perf_counter() - began) / 60
    return validated(world, args.test) | {"wall_minutes": took}


def part_of(path, share):
    """A file with the first share of the footage, beside it."""
    out = Path(path).with_suffix(f".{share:g}.h5")
    if not out.exists():
        with h5py.File(path) as file:
            n, names = int(share * len(file["frames"])), {name: value for name, value in file.attrs.items()}
            with DatasetWriter(out, file["frames"].shape[1:3], with_actions="actions" in file, **names) as writer:
                for i in range(0, n, 4096):
                    writer.append(file["frames"][i : min(n, i + 4096)], file["actions"][i : min(n, i + 4096)] if "actions" in file else None)
                writer.starts = [int(start) for start in file.get("episode_starts", ()) if start < n]
    return out


def scaled(width, share, world, args):
    """A dynamics model of that width on a share of the footage, with the tokenizer and the latent actions of `world`. → its size, compute and loss."""
    out = Path(args.out) / f"width-{width}-data-{share:g}"
    make_folder(out)
    for stage in ("tokenizer", "lam"):
        shutil.copy(world / f"{stage}.pt", out)
    data = args.data_path if share == 1 else part_of(args.data_path, share)
    run("train_dynamics.py", "--data-path", data, "--out", out, "--preset", args.preset, "--n-updates", args.n_updates,
        "--embed-dim", width, "--hidden-dim", 4 * width, "--n-heads", max(1, width // 32))  # fmt: skip
    saved = load_checkpoint(out / "dynamics.pt", "dynamics")
    config, (h, w) = saved["config"], saved["model_args"]["grid"]
    parameters = sum(p.numel() for p in build_model(saved).parameters())
    tokens = args.n_updates * config["batch_size"] * 2 * (config["context_length"] - 1) * h * w  # each clip passes twice, clean and masked
    report = validated(out, args.test)
    flops = 6 * parameters * tokens  # arXiv:2001.08361, §2.1
    return {"parameters": parameters, "pflops": flops / 1e15, "loss": report["dynamics/masked_ce"], "delta_psnr_t4": report["dynamics/delta_psnr_t4"]}


def line(results):
    """log10 loss = a + b·log10 PFLOPs over the models that saw all of the footage. → (a, b)"""
    points = [(results[name.replace("/loss", "/pflops")], value) for name, value in results.items() if name.startswith("scaling/") and name.endswith("/1/loss")]
    b, a = np.polyfit(*np.log10(points).T, 1)
    return float(a), float(b)


def plot(results, path):
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    budgets = sorted((value, name.split("/")[1]) for name, value in results.items() if name.startswith("curve/") and name.endswith("wall_minutes"))
    for ax, names in ((axes[0], ("rollout_psnr_t4", "copy_psnr_t4")), (axes[1], ("delta_psnr_t4", "delta_psnr_null_t4"))):
        for name in names:
            ax.plot([wall for wall, _ in budgets], [results[f"curve/{budget}/dynamics/{name}"] for _, budget in budgets], "o-", label=name)
        ax.set(xlabel="minutes of training", ylabel="dB")
        ax.legend(frameon=False)
    for share, marker in ((1, "o"), (QUARTER, "s")):
        points = sorted((results[name.replace("/loss", "/pflops")], value) for name, value in results.items() if name.startswith("scaling/") and name.endswith(f"/{share:g}/loss"))
        if points:
            axes[2].loglog(*zip(*points), marker, label="all footage" if share == 1 else "a quarter")
    if "scaling/slope" in results:
        x = np.geomspace(*axes[2].get_xlim(), 20)
        axes[2].plot(x, 10 ** results["scaling/intercept"] * x ** results["scaling/slope"], "k:", label=f"slope {results['scaling/slope']:.3f}")
        axes[2].legend(frameon=False)
    axes[2].set(xlabel="PFLOPs", ylabel="masked cross-entropy")
    figure.savefig(path, dpi=90)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--data-path", required=True, help="footage in HDF5")
    parser.add_argument("--test", required=True, help="footage of another seed, with buttons")
    parser.add_argument("--out", required=True, help="folder of the worlds")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 5, 10, 20], help="budgets [2 5 10 20]")
    parser.add_argument("--widths", type=int, nargs="*", default=[], help="of dynamics models, for loss against compute [none]")
    parser.add_argument("--n-updates", type=int, default=4000, help="of each of those [4000]")
    parser.add_argument("--preset", default="gpu", help="[gpu]")
    parser.add_argument("--json", required=True, metavar="FILE", help="results, and a picture beside it")
    args = parser.parse_args(argv)
    if args.preset not in PRESETS:
        raise UserError(f"unknown preset {args.preset!r}; there are {', '.join(PRESETS)}")
    if min(args.minutes) <= 0 or min([*args.widths, args.n_updates]) < 1:
        raise UserError(f"--minutes {args.minutes}, --widths {args.widths} and --n-updates {args.n_updates} must be positive")
    for path in (args.data_path, args.test):
        if not h5py.is_hdf5(path):
            raise UserError(f"{path} is no HDF5 file; record one with: python record.py GAME --out {path}")
    path = Path(args.json)
    make_folder(path.parent)
    results = json.loads(path.read_text()) if path.exists() else {"device": describe_device(), "commit": git_commit(),
                                                                  "command": " ".join(["python extras/flagship.py", *(sys.argv[1:] if argv is None else argv)])}  # fmt: skip

    def note(prefix, make):
        if not any(name.startswith(prefix + "/") for name in results):
            results.update({f"{prefix}/{name}": value for name, value in make().items()})
            path.write_text(json.dumps(results, indent=1) + "\n")

    for minutes in sorted(args.minutes):
        world = Path(args.out) / f"{minutes:g}"
        note(f"curve/{minutes:g}", lambda minutes=minutes, world=world: world_in(minutes, world, args))
    for share in (1, QUARTER) if args.widths else ():
        for width in args.widths:
            note(f"scaling/{width}/{share:g}", lambda width=width, share=share: scaled(width, share, world, args))
    if len(args.widths) > 1:
        results["scaling/intercept"], results["scaling/slope"] = line(results)
        path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    print_user_errors()
    main()
