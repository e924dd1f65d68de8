"""Measure an action predictor on recordings it has not seen, each number beside what it must beat.

    python extras/vjepa_ac/evaluate.py --checkpoint checkpoints/vjepa/action_predictor.pt --data 'data/vpt/train-*.tar' --test 'data/vpt/test-*.tar' \\
        --json results/vjepa_ac.json

  * prediction: mean absolute error of normalised features 1 to 4 tubelets ahead, beside "nothing changes" and beside the actions of another clip
  * probes (probes.py): inverse dynamics, anticipation, a cloned policy, classification; from features, from pixels, from tokenizer codes
  * planning (planning.py): turning to a goal picture, beside random turns
  * the reader's speed
"""
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Parser, UserError, make_folder, print_user_errors  # noqa: E402
from extras.vjepa_ac import planning, probes  # noqa: E402
from extras.vjepa_ac.doom import PLACES  # noqa: E402
from extras.vjepa_ac.train import load_model  # noqa: E402
from extras.vjepa_ac.vpt import Clips, ProcessVPT, batches, find_shards  # noqa: E402
from models.checkpoint import build_model, load_checkpoint  # noqa: E402
from speedrun import describe_device, git_commit  # noqa: E402
from train_utils import autocast_on  # noqa: E402

CONTEXT, HORIZON = 4, 4  # tubelets that a rollout is given, and that it predicts
SECTIONS = ("prediction", "probes", "planning", "reader")
ROOT = Path(__file__).resolve().parents[2]


@torch.no_grad()
def collect(shards, process, kinds, limit=10**9):
    """All clips of the shards, end to end. → {kind: its inputs (n, T/2, N, D)}, "actions" (n, T/2 − 1, 38) and "states" in pixels and degrees, "place" (n,)."""
    plain = ProcessVPT(process.num_frames, 20 // process.stride, process.frameskip, process.size, action_dim=38)
    found = {name: [] for name in (*kinds, "actions", "states", "place")}
    for batch in batches(Clips(shards, plain, buffer=0, epochs=1), 16, workers=1, drop_last=False):
        for kind, function in kinds.items():
            x = function(batch["video"])
            found[kind].append(x if x.dtype == torch.uint8 else x.float())
        found["actions"].append(batch["actions"])
        found["states"].append(batch["states"])
        found["place"].append(torch.tensor([next((i for i, place in enumerate(PLACES) if name.startswith(place)), 0) for name in batch["name"]]))
        if 16 * len(found["place"]) >= limit:
            break
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def prediction(predictor, process, test):
    """Errors by step: of the rollout, of the last known tubelet, of the rollout with the next clip's actions (and the states they would lead to)."""
    features, actions, states = test["V-JEPA features"], test["actions"].numpy(), test["states"].numpy()
    other = actions.copy()
    other[:, CONTEXT - 1 :] = np.roll(actions, len(actions) // 2, axis=0)[:, CONTEXT - 1 :]
    sums = {}
    for rows in np.array_split(np.arange(len(features)), -(-len(features) // 32)):
        x = features[rows].float()
        truth = x[:, CONTEXT : CONTEXT + HORIZON]
        for name, which in (("predicted", actions), ("other actions", other)):
            ahead = planning.imagine(predictor, process, x[:, :CONTEXT], states[rows, :1], which[rows, : CONTEXT + HORIZON - 1])
            sums[name] = sums.get(name, 0) + (ahead - truth).abs().mean(dim=(2, 3)).sum(0)
        sums["copy"] = sums.get("copy", 0) + (x[:, CONTEXT - 1 : CONTEXT] - truth).abs().mean(dim=(2, 3)).sum(0)
    return {f"{name}/step_{i + 1}": float(value) / len(features) for name, values in sums.items() for i, value in enumerate(values)}


def reader_speed(shards, limit=1500):
    """Frames per second that one core reads, decodes and shrinks to 256 × 256, at 20 frames a second and as the seed samples them, at 5."""
    report = {}
    for name, fps in (("every frame", 20), ("every fourth frame", 5)):
        clips, began, n = Clips(shards, ProcessVPT(16, fps), every=16 * 20 // fps, buffer=0, epochs=1), time.perf_counter(), 0
        for _ in clips:
            n += 16 * 20 // fps
            if n >= limit:
                break
        report[f"frames_per_second/{name}"] = n / (time.perf_counter() - began)
    return report


def plot_errors(report, path):
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    for name, style in (("copy", "k:"), ("other actions", "C1--"), ("predicted", "C0-")):
        values = [report[f"prediction/{name}/step_{i}"] for i in range(1, HORIZON + 1)]
        axes.plot(range(1, HORIZON + 1), values, style, marker="o", label={"copy": "nothing changes", "other actions": "told another clip's actions"}.get(name, name))
    axes.set(xlabel="tubelets ahead (0.4 s each)", ylabel="error of the features", xticks=range(1, HORIZON + 1), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)


def tables(report):
    """The README's tables, from the file that main writes."""
    kinds = ("V-JEPA features", "raw pixels", "tokenizer codes")
    number = lambda key: f"{report[key]:.2f}"  # noqa: E731
    first = ["| tubelets ahead | 1 | 2 | 3 | 4 |", "|---|---|---|---|---|"]
    rows = {"predicted": "predicted", "nothing changes": "copy", "told another clip's actions": "other actions"}
    first += [f"| {title} | " + " | ".join(number(f"prediction/{name}/step_{i}") for i in range(1, 5)) + " |" for title, name in rows.items()]
    second = ["| | " + " | ".join(kinds) + " | without looking |", "|---|---|---|---|---|"]
    for title, key, blind in (
        ("inverse dynamics: turn, R²", "inverse_dynamics/{}/turn_r2", None),
        ("… walking, told right", "inverse_dynamics/{}/walk_accuracy", "walk_majority"),
        ("next action: turn, R²", "anticipation/{}/turn_r2", None),
        ("… walking, told right", "anticipation/{}/walk_accuracy", "walk_majority"),
        ("cloned player: fields entered per minute", "policy/{}/fields_per_minute", "policy/without looking/fields_per_minute"),
        ("where is this? told right", "classification/{}/accuracy", "place_majority"),
    ):
        show = (lambda key: f"{report[key]:.0f}") if "fields" in key else number
        second.append(f"| {title} | " + " | ".join(show(key.format(kind)) for kind in kinds) + f" | {show(blind) if blind else '0'} |")
    third = ["| | within 10° of the goal | mean error, degrees |", "|---|---|---|"]
    third += [f"| {name} | {report[f'planning/{name}/success']:.2f} | {report[f'planning/{name}/error_degrees']:.0f} |" for name in ("plan", "random turns", "standing still")]
    return ["\n".join(table) for table in (first, second, third)]


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="action_predictor.pt of train.py")
    parser.add_argument("--data", nargs="+", required=True, metavar="TAR", help="what the probes learn from")
    parser.add_argument("--test", nargs="+", required=True, metavar="TAR", help="recordings of other games")
    parser.add_argument("--tokenizer", default=str(ROOT / "checkpoints" / "shipped" / "doom-maze" / "tokenizer.pt"), help="whose codes are compared [the shipped Doom maze's]")
    parser.add_argument("--clips", type=int, default=10**9, help="to learn from, rounded up to batches of 16 [all]")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="[all]")
    parser.add_argument("--trials", type=int, default=20, help="of planning [20]")
    parser.add_argument("--json", default="", metavar="FILE", help="add the numbers to this file, and a picture beside it")
    args = parser.parse_args(argv)
    if min(args.clips, args.trials) < 1:
        raise UserError(f"--clips {args.clips} and --trials {args.trials} must be positive")
    began = time.perf_counter()
    encoder, predictor, process = load_model(args.checkpoint)
    if process.num_frames // process.frameskip < CONTEXT + HORIZON:
        raise UserError(f"{args.checkpoint} knows clips of {process.num_frames} frames; {(CONTEXT + HORIZON) * process.frameskip} are needed here")
    train_shards, test_shards = find_shards(args.data), find_shards(args.test)
    tokenizer = build_model(load_checkpoint(args.tokenizer, "tokenizer"), args.tokenizer)
    kinds = probes.inputs_of(encoder, tokenizer)
    report = {}
    with autocast_on(torch.device("cpu"))(cache_enabled=False):  # the probes learn in here, and cached weights would stay as they were
        if "prediction" in args.only or "probes" in args.only:
            wanted = kinds if "probes" in args.only else {"V-JEPA features": kinds["V-JEPA features"]}
            test = collect(test_shards, process, wanted)
        if "prediction" in args.only:
            report |= {f"prediction/{key}": value for key, value in prediction(predictor, process, test).items()}
        if "probes" in args.only:
            train = collect(train_shards, process, kinds, args.clips)
            report["walk_majority"] = float(max(p := test["actions"][..., probes.WALK].mean(), 1 - p))
            report["place_majority"] = float(test["place"].bincount().max() / len(test["place"]))
            for kind, inputs in kinds.items():
                for probe in (probes.inverse_dynamics, probes.anticipation, probes.classification):
                    report |= {f"{probe.__name__}/{kind}/{key}": value for key, value in probe(train, test, kind).items()}
                policy = probes.clone_behaviour(train, kind)
                report[f"policy/{kind}/fields_per_minute"] = probes.ground_covered(policy, inputs, process.size, process)
            for name, policy in (("without looking", probes.blind_policy(train)), ("the recorded player", None)):
                report[f"policy/{name}/fields_per_minute"] = probes.ground_covered(policy, kinds["raw pixels"], process.size, process)
        if "planning" in args.only:
            report |= {f"planning/{key}": value for key, value in planning.success(encoder, predictor, process, args.trials).items()}
    if "reader" in args.only:
        report |= {f"reader/{key}": value for key, value in reader_speed(test_shards).items()}
        log = [json.loads(line) for line in (Path(args.checkpoint).with_suffix("") / "metrics.jsonl").read_text().splitlines()]
        report["reader/share_of_training_waited"] = float(np.mean([line["waited"] for line in log[1:] or log]))  # the first line has filled the buffer
    for key, value in report.items():
        print(f"{key:56} {value:10.4g}")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    if args.json:
        make_folder(Path(args.json).parent)
        old = json.loads(Path(args.json).read_text()) if set(args.only) != set(SECTIONS) and Path(args.json).exists() else {}
        made = {"device": describe_device(), "commit": git_commit(), "command": "the commands of extras/vjepa_ac/README.md"}
        Path(args.json).write_text(json.dumps(old | report | made, indent=1) + "\n")
        if "prediction" in args.only:
            plot_errors(report, Path(args.json).with_suffix(".png"))
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
