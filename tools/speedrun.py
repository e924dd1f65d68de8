"""Make a playable world from nothing, in one command.

    python -m tools.speedrun                 record Doom, train the three stages, validate, report
    python -m tools.speedrun pong            another game of tools/record.py
    python -m tools.speedrun atari:freeway --crop 14:196,8:160
    python -m tools.speedrun --preset tiny   the same in one to three minutes, as a test

The world is saved in checkpoints/GAME. This script only runs other commands, and prints each of
them, so that you can run it yourself.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from config import PRESETS
from utils.cli import Parser, print_user_errors
from utils.device import choose_device
from utils.hardening.settings import preset_values

import torch

from tools.record import GAMES, find_game

# frames for training and for validation
FRAMES = {"tiny": (3_000, 1_000), "cpu": (40_000, 24_000), "gpu": (400_000, 24_000)}
ROOT = Path(__file__).resolve().parents[1]
TEST_SEED = 1000  # gives games (and CoinRun levels) that training never saw


def run(*words):
    """Run a script at the root, or a tool as -m tools.NAME. If it fails, exit with its code."""
    words = [str(word) for word in words]
    print("\n$ python " + " ".join(words), flush=True)
    if words[0] != "-m":
        words[0] = str(ROOT / words[0])
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # for -m from another folder
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, *words], env=environment)
    if result.returncode:
        sys.exit(result.returncode)


def describe_device():
    device = choose_device("auto")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def git_commit():
    try:
        words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def name_of(game):
    """The game as a part of a file's name: atari:freeway → atari-freeway."""
    return re.sub(r"[^\w.-]+", "-", game)


def commands(game, preset, out, *more):
    """→ {name: words of the command}, in order. more: words for tools.record."""
    n_train, n_test = FRAMES[preset]
    data, test = (f"data/{name_of(game)}-{n}.h5" for n in (n_train, f"{n_test}-test"))
    record = ("-m", "tools.record", game, *more)
    training = ("--data-path", data, "--out", out, "--preset", preset)
    report = out / "report"
    measure = ("--checkpoint", out, "--data-path", test, "--val-fraction", 0.5)
    results = ("--save-images", report, "--json", report / "report.json")
    return {
        "record": (*record, "--frames", n_train, "--out", data),
        "record test": (*record, "--frames", n_test, "--out", test, "--seed", TEST_SEED),
        "tokenizer": ("train_tokenizer.py", *training),
        "lam": ("train_lam.py", *training),
        "dynamics": ("train_dynamics.py", *training),
        "validate": ("validate.py", *measure, *results),
    }


def main(argv=None):
    parser = Parser(description=__doc__)
    games, presets = ", ".join([*GAMES, "atari:NAME", "gym:ID"]), ", ".join(PRESETS)
    parser.add_argument("game", nargs="?", default="doom-maze", help=f"{games} [doom-maze]")
    parser.add_argument("--crop", default="", help="as in tools.record")
    parser.add_argument("--skip", type=int, default=0, help="as in tools.record")
    parser.add_argument("--preset", default="", help=f"{presets} [by device: cpu or gpu]")
    parser.add_argument("--out", default="", help="folder for the world [checkpoints/GAME]")
    args = parser.parse_args(argv)
    find_game(args.game, args.crop, args.skip)  # raises for an unknown one
    recording = ["--crop", args.crop] if args.crop else []
    recording += ["--skip", args.skip] if args.skip else []
    preset = args.preset or ("gpu" if choose_device("auto").type == "cuda" else "cpu")
    preset_values(PRESETS, preset, "tokenizer")  # raises for an unknown one
    out = Path(args.out or f"checkpoints/{name_of(args.game)}")

    began, minutes, commit = time.perf_counter(), {}, git_commit()
    for name, words in commands(args.game, preset, out, *recording).items():
        start = time.perf_counter()
        run(*words)
        minutes[f"minutes/{name.replace(' ', '_')}"] = (time.perf_counter() - start) / 60
    total = (time.perf_counter() - began) / 60

    report = out / "report"
    numbers = json.loads((report / "report.json").read_text())
    numbers |= minutes | {"minutes/total": total}
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in numbers.items())
    typed = sys.argv[1:] if argv is None else argv
    numbers |= {
        "world": args.game,
        "command": " ".join(["python -m tools.speedrun", *typed]),
        "device": describe_device(),
        "commit": commit,
    }
    (report / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    table = f"| metric | value |\n|---|---|\n{rows}"
    (report / "report.md").write_text(f"# {args.game}, preset {preset}\n\n{table}")
    print(f"\n{total:.1f} minutes. The world is in {out}.")
    print(f"The report (table, JSON, pictures, a GIF per action) is in {report}.")
    print(f"Play it: python play.py --checkpoint {out}")


if __name__ == "__main__":
    print_user_errors()
    main()
