"""From nothing to a world you can play, in one command.

    python speedrun.py                    record Doom, train the three stages, validate, report: checkpoints/doom-maze
    python speedrun.py pong               another game of record.py
    python speedrun.py --preset tiny      the same in one to three minutes, to see that everything runs

It only types the commands that you could type yourself, and prints each of them.
"""
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from config import PRESETS, Parser, UserError, choose_device, print_user_errors

import torch

from record import GAMES

FRAMES = {"tiny": (3_000, 1_000), "cpu": (40_000, 24_000), "gpu": (400_000, 24_000)}  # to train on, to validate on
TEST_SEED = 1000  # games (and CoinRun levels) that training never saw


def run(*words):
    """Type a command; its failure is ours."""
    print("\n$ python " + " ".join(map(str, words)), flush=True)
    script, *options = map(str, words)
    result = subprocess.run([sys.executable, str(Path(__file__).parent / script), *options])
    if result.returncode:
        sys.exit(result.returncode)


def describe_device():
    device = choose_device("auto")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores ({platform.machine()})"


def git_commit():
    try:
        words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        result = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("game", nargs="?", default="doom-maze", help=f"{', '.join(GAMES)} [doom-maze]")
    parser.add_argument("--preset", default="", help=f"{', '.join(PRESETS)} [what the device suggests]")
    parser.add_argument("--out", default="", help="folder of the world [checkpoints/GAME]")
    args = parser.parse_args(argv)
    if args.game not in GAMES:
        raise UserError(f"unknown game {args.game!r}; there are {', '.join(GAMES)}")
    preset = args.preset or ("gpu" if choose_device("auto").type == "cuda" else "cpu")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    out = Path(args.out or f"checkpoints/{args.game}")
    n_train, n_test = FRAMES[preset]
    data, test = f"data/{args.game}-{n_train}.h5", f"data/{args.game}-{n_test}-test.h5"
    report = out / "report"

    began, minutes, commit = time.perf_counter(), {}, git_commit()
    for name, command in {
        "record": ("record.py", args.game, "--frames", n_train, "--out", data),
        "record test": ("record.py", args.game, "--frames", n_test, "--out", test, "--seed", TEST_SEED),
        "tokenizer": ("train_tokenizer.py", "--data-path", data, "--out", out, "--preset", preset),
        "lam": ("train_lam.py", "--data-path", data, "--out", out, "--preset", preset),
        "dynamics": ("train_dynamics.py", "--data-path", data, "--out", out, "--preset", preset),
        "validate": ("validate.py", "--checkpoint", out, "--data-path", test, "--val-fraction", 0.5,
                     "--save-images", report, "--json", report / "report.json"),
    }.items():  # fmt: skip
        start = time.perf_counter()
        run(*command)
        minutes[name] = (time.perf_counter() - start) / 60
    total = (time.perf_counter() - began) / 60

    numbers = json.loads((report / "report.json").read_text())
    numbers |= {f"minutes/{name.replace(' ', '_')}": value for name, value in minutes.items()} | {"minutes/total": total}
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in numbers.items())
    numbers |= {"world": args.game, "command": " ".join(["python speedrun.py", *(sys.argv[1:] if argv is None else argv)]),
                "device": describe_device(), "commit": commit}  # fmt: skip
    (report / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (report / "report.md").write_text(f"# {args.game}, preset {preset}\n\n| metric | value |\n|---|---|\n{rows}")
    print(f"\n{total:.1f} minutes. The world is in {out}, the report (table, JSON, pictures, a GIF per action) in {report}.")
    print(f"Play it: python play.py --checkpoint {out}")


if __name__ == "__main__":
    print_user_errors()
    main()
