"""How well does the flow know which action led from s to s′, beside plainer answers, and where one answer is not enough?

    python extras/flow_inverse_dynamics/evaluate.py --checkpoint checkpoints/flow/pendulum --json results/flow_inverse_dynamics.json

Tests on new episodes of the system that the model was trained on (its dataset configuration, another seed). The pendulum: error in per cent of the
range of actions, then the same under changed constants, as a curve. The clipped pendulum and the two branches have more than one right answer,
whose distribution is known: Wasserstein distance to it, and the weight of each mode. A picture lies beside the checkpoint.
"""
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Parser, UserError, make_folder, print_user_errors  # noqa: E402
from extras.flow_inverse_dynamics.create_dataset import triplets, triplets_path  # noqa: E402
from extras.flow_inverse_dynamics.model import straightness  # noqa: E402
from extras.flow_inverse_dynamics.pendulum import Pendulum, Sequences, read_config, simulate  # noqa: E402
from extras.flow_inverse_dynamics.train import STAGE, load_flow, load_triplets  # noqa: E402
from models.checkpoint import load_checkpoint  # noqa: E402
from speedrun import describe_device, git_commit  # noqa: E402

SHIFTS = {name: [0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0] for name in ("mass", "length", "gravity")} | {"friction": [0.0, 0.05, 0.1, 0.2, 0.3, 0.5]}
TEST_SEED = 1000  # is added to that of the training data


def least_squares(pair, a):
    """→ a function of standardised pairs: the best affine map to actions."""
    weights = torch.linalg.lstsq(nn.functional.pad(pair, (0, 1), value=1.0), a.flatten(1)).solution
    return lambda new: (nn.functional.pad(new, (0, 1), value=1.0) @ weights).view(-1, *a.shape[1:])


def mlp(pair, a, n_updates=4000, loss=nn.functional.mse_loss):
    """→ a function of standardised pairs: two hidden layers of 128, trained on the squared error."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(pair.shape[1], 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, a[0].numel()))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, n_updates)
    for _ in range(n_updates):
        rows = torch.randint(len(pair), (256,))
        loss(network(pair[rows]).view(-1, *a.shape[1:]), a[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return lambda new: network(new).detach().view(-1, *a.shape[1:])


def nearest_neighbour(pair, a):
    """→ a function of standardised pairs: the action of the nearest one in the training data."""
    return lambda new: torch.cat([a[torch.cdist(part, pair).argmin(dim=1)] for part in new.split(500)])


def new_triplets(config, n, **changes):
    """n triplets of new episodes, float32 tensors."""
    config = replace(config, seed=config.seed + TEST_SEED, n_episodes=-(-2 * n // config.n_steps), **changes)
    states, actions = simulate(config)
    last = np.zeros_like(actions[:, :1])
    arrays = triplets(states.reshape(-1, states.shape[-1]), np.concatenate([actions, last], axis=1).reshape(-1, actions.shape[-1]),
                      np.arange(len(states)) * states.shape[1], config.chunk)  # fmt: skip
    kept = np.random.default_rng(0).permutation(len(arrays[0]))[:n]
    return [torch.from_numpy(array[kept]) for array in arrays]


def wasserstein(a, b):
    """The 1-Wasserstein distance of two samples of n numbers each, (pairs, n): the mean distance of the sorted ones, and of that the mean."""
    return float((a.sort(dim=1).values - b.sort(dim=1).values).abs().mean())


def answers(flow, train):
    """The methods by name, each a function (s, s_next) → actions."""
    s, a, s_next = train
    pair = flow.embed(s, s_next)
    dice = torch.Generator().manual_seed(0)
    found = {"flow": lambda s, s_next: flow.sample(s, s_next, generator=dice)}
    for name, method in (("least squares", least_squares), ("MLP", mlp), ("nearest neighbour", nearest_neighbour)):
        found[name] = lambda s, s_next, answer=method(pair, a): answer(flow.embed(s, s_next))
    return found


def errors(flow, train, config):
    """The pendulum with one right answer: errors in per cent of the range, with fewer steps, and under a shift of the constants."""
    report, methods = {}, answers(flow, train)
    s, a, s_next = new_triplets(config, 1000)
    dice = torch.Generator().manual_seed(0)
    percent = 100 / (2 * config.max_action)
    for name, method in methods.items():
        began = time.perf_counter()
        wrong = percent * (method(s, s_next) - a).abs()
        report[f"{name}/seconds_1000"] = time.perf_counter() - began
        report |= {f"{name}/median_error": float(wrong.median()), f"{name}/error_90": float(wrong.quantile(0.9))}
    for steps in (1, 2, 4, 10, 100):
        for sampler in ("euler", "midpoint"):
            wrong = percent * (flow.sample(s, s_next, steps, sampler, dice) - a).abs()
            report[f"flow/{sampler}_{steps}_median_error"] = float(wrong.median())
    report["flow/straightness"] = straightness(flow.path(s, s_next, torch.randn(a.shape, generator=dice)))
    for constant, values in SHIFTS.items():
        for value in values:
            usual = getattr(Pendulum, constant)
            changed = new_triplets(config, 1000, shift=config.shift | {constant: value if constant == "friction" else value * usual})
            for name in ("flow", "MLP"):
                wrong = percent * (methods[name](changed[0], changed[2]) - changed[1]).abs()
                report[f"shift/{constant}/{value}/{name}"] = float(wrong.median())
    return report


def plot_shifts(report, path):
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    for axes, (constant, values) in zip(figure.subplots(1, len(SHIFTS), sharey=True, squeeze=False)[0], SHIFTS.items()):
        for name in ("flow", "MLP"):
            axes.plot(values, [report[f"shift/{constant}/{value}/{name}"] for value in values], "o-", markersize=3, label=name)
        axes.set(xlabel=constant if constant == "friction" else f"{constant}, of the usual", yscale="log")
    figure.axes[0].set_ylabel("median error, % of the range")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=90)


def modes(flow, train, config, n=1000, many=50):
    """Where several actions are right: `many` samples for each of n pairs beside the known distribution. → the report, and what was drawn.

    Every pair is brought to one case. two_branch: actions in units of |a|, where the truth is +1 with probability σ(2s), else −1. The clipped
    pendulum: saturated pairs, actions times their sign, where the truth is uniform from clip to max_action.
    """
    s, a, s_next = new_triplets(config, n)
    two = config.system == "two_branch"
    if not two:
        kept = a[:, 0, 0].abs() > config.clip + 0.05  # the pair itself shows whether the torque was cut
        s, a, s_next = s[kept], a[kept], s_next[kept]
    unit = a[:, 0, 0].abs() if two else a[:, 0, 0].sign()
    dice = torch.Generator().manual_seed(1)
    plus = torch.sigmoid(2 * s[:, 0])

    def draw():
        even = torch.rand(len(s), many, generator=dice)
        return torch.where(even < plus[:, None], 1.0, -1.0) if two else config.clip + (config.max_action - config.clip) * even

    truth = draw()
    report, shown = {}, {"truth": truth}
    many_s, many_next = s.repeat_interleave(many, 0), s_next.repeat_interleave(many, 0)
    for name, method in answers(flow, train).items():
        found = method(many_s, many_next) if name == "flow" else method(s, s_next).repeat_interleave(many, 0)
        shown[name] = found[:, 0, 0].view(-1, many) / unit[:, None]
        report[f"{name}/wasserstein"] = wasserstein(shown[name], truth)
    for steps in (1, 2, 4, 10):
        drawn = flow.sample(many_s, many_next, steps, generator=dice)[:, 0, 0].view(-1, many) / unit[:, None]
        report[f"flow/euler_{steps}_wasserstein"] = wasserstein(drawn, truth)
    report["flow/straightness"] = straightness(flow.path(s, s_next, torch.randn(a.shape, generator=dice)))
    report["another draw of the truth/wasserstein"] = wasserstein(draw(), truth)
    bins = (5 * (s[:, 0] + 1)).long().clamp(0, 9) if two else torch.zeros(len(s), dtype=torch.long)
    middle = 0.0 if two else (config.clip + config.max_action) / 2  # left and right of it lies half of a uniform distribution
    gaps = [abs(float((shown["flow"][bins == b] > middle).float().mean() - (truth[bins == b] > middle).float().mean())) for b in bins.unique()]
    report["flow/weight_error_points"] = 100 * max(gaps)
    if two:
        near = (shown["flow"].abs() - 1).abs()
        report["flow/mode_error_median"] = float(near.median())
        report["flow/between_modes_share"] = float((shown["flow"].abs() < 0.5).float().mean())
    return report, shown


def plot_modes(shown, two, path):
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    reach = (-1.6, 1.6) if two else (0.0, 5.0)
    for name, values in shown.items():
        axes.hist(values.flatten().numpy(), bins=80, range=reach, density=True, histtype="stepfilled" if name == "truth" else "step",
                  alpha=0.3 if name == "truth" else 1, label=name)  # fmt: skip
    axes.set(xlabel="action, in units of |a|" if two else "torque, times its sign", ylabel="density", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)


def tables(report):
    """The README's three tables, from the file that evaluate.py and pixels.py write."""
    number = lambda key: f"{report[key]:.2g}"  # noqa: E731
    methods = ("flow", "MLP", "nearest neighbour", "least squares")
    first = ["| | median error, % | 90 % are below, % |", "|---|---|---|"]
    rows = {"flow, 100 steps": "flow", **{name: name for name in methods[1:]}}
    first += [f"| {title} | {number(f'pendulum/{name}/median_error')} | {number(f'pendulum/{name}/error_90')} |" for title, name in rows.items()]
    second = ["| Wasserstein distance to the truth | two branches | clipped pendulum |", "|---|---|---|"]
    second += [f"| {name} | {number(f'two_branch/{name}/wasserstein')} | {number(f'pendulum_clipped/{name}/wasserstein')} |"
               for name in ("another draw of the truth", *methods)]  # fmt: skip
    third = ["| | button right | mutual information with the button |", "|---|---|---|"]
    names = [key.split("/")[1] for key in report if key.startswith("pixels/") and key.endswith("/accuracy")]
    third += [f"| {name} | {report[f'pixels/{name}/accuracy']:.2f} | {report[f'pixels/{name}/nmi']:.2f} |" for name in names]
    return ["\n".join(table) for table in (first, second, third)]


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder that train.py wrote to")
    parser.add_argument("--dataset-config", default="", help="[the one it was trained with]")
    parser.add_argument("--json", default="", metavar="FILE", help="add the numbers to this file")
    args = parser.parse_args(argv)
    folder = Path(args.checkpoint)
    path = folder / f"{STAGE}.pt"
    saved = load_checkpoint(path, STAGE)
    if saved["config"]["triplets"] and not args.dataset_config:
        raise UserError(f"{path} was trained with --triplets {saved['config']['triplets']}; there is no known system to test it on")
    config = read_config(args.dataset_config or saved["config"]["dataset_config"], Sequences)
    train = load_triplets(triplets_path(config.path))
    flow = load_flow(path, train[0].shape[1], train[1].shape[2])
    began = time.perf_counter()
    if config.system == "pendulum" and not config.clip:
        report = errors(flow, train, config)
        plot_shifts(report, folder / "shifts.png")
    else:
        report, shown = modes(flow, train, config)
        plot_modes(shown, config.system == "two_branch", folder / "modes.png")
    name = folder.resolve().name
    for key, value in report.items():
        print(f"{name + '/' + key:52} {value:10.4g}")
    print(f"{time.perf_counter() - began:.0f} s; picture in {folder}")
    if args.json:
        make_folder(Path(args.json).parent)
        old = json.loads(Path(args.json).read_text()) if Path(args.json).exists() else {}
        new = {f"{name}/{key}": value for key, value in report.items()} | {f"{name}/steps": saved["step"], f"{name}/triplets": len(train[0])}
        made = {"device": describe_device(), "commit": git_commit(), "command": "the commands of extras/flow_inverse_dynamics/README.md"}
        Path(args.json).write_text(json.dumps(old | new | made, indent=1) + "\n")
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
