"""Measure an action predictor on recordings it has not seen, next to trivial baselines.

    python -m extras.vjepa_ac.evaluate --checkpoint checkpoints/vjepa/action_predictor.pt \\
        --data 'data/vpt/train-*.tar' --test 'data/vpt/test-*.tar' \\
        --json docs/results/vjepa_ac.json

  * prediction: mean absolute error of normalised features 1 to 4 tubelets ahead. Baselines: copying
    the last features, and the same predictor with another clip's actions.
  * probes (probes.py): inverse dynamics, anticipation, a cloned policy and classification; from
    features, from pixels and from tokenizer codes
  * planning (planning.py): turning to a goal picture. Baselines: random turns, and standing still.
  * speed of the reader
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from utils.checkpoint import build_model, load_checkpoint
from utils.cli import Parser, UserError, print_user_errors
from utils.device import autocast_on
from utils.hardening.files import make_folder

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from extras.vjepa_ac import planning, probes
from extras.vjepa_ac.doom import PLACES
from extras.vjepa_ac.model import ActionPredictor, Encoder
from extras.vjepa_ac.train import load_model
from extras.vjepa_ac.vpt import Clips, ProcessVPT, batches, find_shards
from tools.speedrun import describe_device, git_commit

CONTEXT, HORIZON = 4, 4  # tubelets that a rollout starts from, and that it predicts
SECTIONS = ("prediction", "probes", "planning", "reader")
ROOT = Path(__file__).resolve().parents[2]


@torch.no_grad()
def collect(
    shards: list[str], process: ProcessVPT, kinds: dict[str, Callable], limit: int = 10**9
) -> dict[str, Tensor]:
    """All clips of the shards, in order; kinds: functions from video to inputs, by name.

    → for each kind its inputs (n, T/2, N, D); "actions" (n, T/2 − 1, 38) and "states" (n, T/2, 2)
    in pixels and degrees; "place" (n,).
    """
    fps = 20 // process.stride
    plain = ProcessVPT(process.num_frames, fps, process.frameskip, process.size, action_dim=38)
    clips = Clips(shards, plain, buffer=0, epochs=1)
    found = {name: [] for name in (*kinds, "actions", "states", "place")}
    for batch in batches(clips, 16, workers=1, drop_last=False):
        for kind, function in kinds.items():
            x = function(batch["video"])
            found[kind].append(x if x.dtype == torch.uint8 else x.float())
        found["actions"].append(batch["actions"])
        found["states"].append(batch["states"])
        found["place"].append(torch.tensor([place_of(name) for name in batch["name"]]))
        if 16 * len(found["place"]) >= limit:
            break
    return {name: torch.cat(parts) for name, parts in found.items()}


def place_of(name: str) -> int:
    """Index of the place in which a recording was made."""
    return next((i for i, place in enumerate(PLACES) if name.startswith(place)), 0)


@torch.no_grad()
def prediction(
    predictor: ActionPredictor, process: ProcessVPT, test: dict[str, Tensor]
) -> dict[str, float]:
    """Errors by step: of the rollout, of copying the last known tubelet, and with other actions.

    Other actions are those of another clip, with the states that they would lead to.
    """
    features, known = test["V-JEPA features"], CONTEXT - 1
    actions, states = test["actions"].numpy(), test["states"].numpy()
    other = actions.copy()
    other[:, known:] = np.roll(actions, len(actions) // 2, axis=0)[:, known:]
    sums = {}
    for rows in np.array_split(np.arange(len(features)), -(-len(features) // 32)):
        x = features[rows].float()
        truth = x[:, CONTEXT : CONTEXT + HORIZON]
        guesses = {"copy": x[:, known:CONTEXT]}
        for name, which in (("predicted", actions), ("other actions", other)):
            given = which[rows, : CONTEXT + HORIZON - 1]
            start = (x[:, :CONTEXT], states[rows, :1])
            guesses[name] = planning.imagine(predictor, process, *start, given)
        for name, guess in guesses.items():
            sums[name] = sums.get(name, 0) + (guess - truth).abs().mean(dim=(2, 3)).sum(0)
    report = {}
    for name, values in sums.items():
        for i, value in enumerate(values, 1):
            report[f"{name}/step_{i}"] = float(value) / len(features)
    return report


def compare_probes(
    train: dict[str, Tensor],
    test: dict[str, Tensor],
    kinds: dict[str, Callable],
    process: ProcessVPT,
) -> dict[str, float]:
    """Each probe on each kind of input, and baselines that do not look at the video."""
    walk = test["actions"][..., probes.WALK].mean()
    report = {
        "walk_majority": float(max(walk, 1 - walk)),
        "place_majority": float(test["place"].bincount().max() / len(test["place"])),
    }

    def play(name, policy, inputs):
        key = f"policy/{name}/fields_per_minute"
        report[key] = probes.ground_covered(policy, inputs, process.size, process)

    for kind, inputs in kinds.items():
        for probe in (probes.inverse_dynamics, probes.anticipation, probes.classification):
            for key, value in probe(train, test, kind).items():
                report[f"{probe.__name__}/{kind}/{key}"] = value
        play(kind, probes.clone_behaviour(train, kind), inputs)
    play("without looking", probes.blind_policy(train), kinds["raw pixels"])
    play("the recorded player", None, kinds["raw pixels"])
    return report


def reader_speed(shards: list[str], limit: int = 1500) -> dict[str, float]:
    """Frames per second that one core reads, decodes and resizes to 256 × 256.

    Measured with every frame kept, and with one in four, as in training.
    """
    report = {}
    for name, fps in (("every frame", 20), ("every fourth frame", 5)):
        every = 16 * 20 // fps
        clips = Clips(shards, ProcessVPT(16, fps), every=every, buffer=0, epochs=1)
        began, n = time.perf_counter(), 0
        for _ in clips:
            n += every
            if n >= limit:
                break
        report[f"frames_per_second/{name}"] = n / (time.perf_counter() - began)
    return report


def share_waited(checkpoint: str) -> float:
    """Share of the time in which training waited for clips, from its log."""
    path = Path(checkpoint).with_suffix("") / "metrics.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()]
    # without the first line, during which the shuffle buffer was filled
    return float(np.mean([line["waited"] for line in log[1:] or log]))


def plot_errors(report: dict, path: Path) -> None:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    steps = range(1, HORIZON + 1)
    for name, label, style in (
        ("copy", "copy of the last tubelet", "k:"),
        ("other actions", "with another clip's actions", "C1--"),
        ("predicted", "predicted", "C0-"),
    ):
        values = [report[f"prediction/{name}/step_{i}"] for i in steps]
        axes.plot(steps, values, style, marker="o", label=label)
    axes.set(xlabel="tubelets ahead (0.4 s each)", ylabel="error of the features")
    axes.set(xticks=steps, ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)


# Rows of the second table: title, key for each kind of input, key of the blind baseline.
USES = (
    ("inverse dynamics: turn, R²", "inverse_dynamics/{}/turn_r2", None),
    ("inverse dynamics: walking, accuracy", "inverse_dynamics/{}/walk_accuracy", "walk_majority"),
    ("next action: turn, R²", "anticipation/{}/turn_r2", None),
    ("next action: walking, accuracy", "anticipation/{}/walk_accuracy", "walk_majority"),
    (
        "cloned policy: map squares entered per minute",
        "policy/{}/fields_per_minute",
        "policy/without looking/fields_per_minute",
    ),
    ("which place, accuracy", "classification/{}/accuracy", "place_majority"),
)


def tables(report: dict) -> list[str]:
    """The README's tables, from the file that main writes."""

    def row(title, cells):
        return f"| {title} | {' | '.join(cells)} |"

    def shown(key):
        return f"{report[key]:.0f}" if "fields" in key else f"{report[key]:.2f}"

    first = ["| tubelets ahead | 1 | 2 | 3 | 4 |", "|---|---|---|---|---|"]
    for title, name in (
        ("predicted", "predicted"),
        ("copy of the last tubelet", "copy"),
        ("with another clip's actions", "other actions"),
    ):
        first.append(row(title, [shown(f"prediction/{name}/step_{i}") for i in range(1, 5)]))
    kinds = ("V-JEPA features", "raw pixels", "tokenizer codes")
    second = ["| | " + " | ".join(kinds) + " | blind baseline |", "|---|---|---|---|---|"]
    for title, key, blind in USES:
        cells = [shown(key.format(kind)) for kind in kinds]
        second.append(row(title, [*cells, shown(blind) if blind else "0"]))
    trials = f"{report['planning/trials']:.0f}"
    third = [
        f"| {trials} goals | within 10° of it | 95 % interval | mean error, degrees |",
        "|---|---|---|---|",
    ]
    for name in ("plan", "random turns", "standing still"):
        share, low, high = (f"planning/{name}/{key}" for key in ("success", "low", "high"))
        degrees = f"{report[f'planning/{name}/error_degrees']:.0f}"
        third.append(row(name, [shown(share), f"{shown(low)} – {shown(high)}", degrees]))
    return ["\n".join(table) for table in (first, second, third)]


def measure(
    args: argparse.Namespace, encoder: Encoder, predictor: ActionPredictor, process: ProcessVPT
) -> dict[str, float]:
    """The numbers of the sections in args.only."""
    train_shards, test_shards = find_shards(args.data), find_shards(args.test)
    tokenizer = build_model(load_checkpoint(args.tokenizer, "tokenizer"), args.tokenizer)
    kinds = probes.inputs_of(encoder, tokenizer)
    report = {}

    def add(section, numbers):
        report.update({f"{section}/{key}": value for key, value in numbers.items()})

    # no cache: it would keep the probes' weights as they were before their updates
    with autocast_on(torch.device("cpu"))(cache_enabled=False):
        if "prediction" in args.only or "probes" in args.only:
            only_features = {"V-JEPA features": kinds["V-JEPA features"]}
            wanted = kinds if "probes" in args.only else only_features
            test = collect(test_shards, process, wanted)
        if "prediction" in args.only:
            add("prediction", prediction(predictor, process, test))
        if "probes" in args.only:
            train = collect(train_shards, process, kinds, args.clips)
            report |= compare_probes(train, test, kinds, process)
        if "planning" in args.only:
            add("planning", planning.success(encoder, predictor, process, args.trials))
    if "reader" in args.only:
        add("reader", reader_speed(test_shards))
        report["reader/share_of_training_waited"] = share_waited(args.checkpoint)
    return report


def save_report(args: argparse.Namespace, report: dict) -> None:
    path = Path(args.json)
    make_folder(path.parent)
    old = {}
    if set(args.only) != set(SECTIONS) and path.exists():
        old = json.loads(path.read_text())
    made = dict(
        device=describe_device(),
        commit=git_commit(),
        command="the commands of extras/vjepa_ac/README.md",
    )
    path.write_text(json.dumps(old | report | made, indent=1) + "\n")
    if "prediction" in args.only:
        plot_errors(report, path.with_suffix(".png"))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    help = "action_predictor.pt of train.py"
    parser.add_argument("--checkpoint", required=True, help=help)
    tar = dict(nargs="+", required=True, metavar="TAR")
    parser.add_argument("--data", help="recordings that the probes learn from", **tar)
    parser.add_argument("--test", help="recordings of other games", **tar)
    shipped = str(ROOT / "checkpoints" / "shipped" / "doom-maze" / "tokenizer.pt")
    help = "tokenizer.pt whose codes are compared [that of the shipped Doom maze]"
    parser.add_argument("--tokenizer", default=shipped, help=help)
    help = "how many clips the probes learn from, rounded up to batches of 16 [all]"
    parser.add_argument("--clips", type=int, default=10**9, help=help)
    help = "sections of the report [all]"
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help=help)
    parser.add_argument("--trials", type=int, default=20, help="goals of planning [20]")
    help = "add the numbers to this file, and a picture beside it"
    parser.add_argument("--json", default="", metavar="FILE", help=help)
    args = parser.parse_args(argv)
    if min(args.clips, args.trials) < 1:
        raise UserError(f"--clips {args.clips} and --trials {args.trials} must be positive")
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse(argv)
    began = time.perf_counter()
    encoder, predictor, process = load_model(args.checkpoint)
    if process.num_frames // process.frameskip < CONTEXT + HORIZON:
        raise UserError(
            f"{args.checkpoint} was trained on clips of {process.num_frames} frames;"
            f" {(CONTEXT + HORIZON) * process.frameskip} are needed here"
        )
    report = measure(args, encoder, predictor, process)
    for key, value in report.items():
        print(f"{key:56} {value:10.4g}")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    if args.json:
        save_report(args, report)
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
