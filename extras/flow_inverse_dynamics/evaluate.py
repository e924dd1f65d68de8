"""Measure how well a flow finds the action that led from s to s′.

    python -m extras.flow_inverse_dynamics.evaluate --checkpoint checkpoints/flow/pendulum

The test has new episodes of the system that the model was trained on: the same dataset
configuration with another seed. Simpler methods are baselines.

  * The pendulum has one right answer. The report has the error in per cent of the range of actions,
    also under changed constants.
  * The clipped pendulum and the two branches have several right answers, whose distribution is
    known. The report has the Wasserstein distance to it, and the error of the modes' weights.

A picture is saved next to the checkpoint.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from utils.cli import Parser, UserError, print_user_errors
from utils.hardening.files import make_folder

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from extras.flow_inverse_dynamics.create_dataset import triplets, triplets_path
from extras.flow_inverse_dynamics.model import FlowInverseDynamics, straightness
from extras.flow_inverse_dynamics.pendulum import Pendulum, Sequences, read_config, simulate
from extras.flow_inverse_dynamics.train import STAGE, load_flow, load_saved, load_triplets
from tools.speedrun import describe_device, git_commit

SHIFTS = {name: [0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0] for name in ("mass", "length", "gravity")} | {
    "friction": [0.0, 0.05, 0.1, 0.2, 0.3, 0.5]
}
TEST_SEED = 1000  # added to the seed of the training data
METHODS = ("flow", "MLP", "nearest neighbour", "least squares")


# --- the methods -----------------------------------------------------------------------------


def least_squares(pair: Tensor, a: Tensor) -> Callable:
    """→ a function of standardised pairs: the best affine map to actions."""
    weights = torch.linalg.lstsq(nn.functional.pad(pair, (0, 1), value=1.0), a.flatten(1)).solution
    return lambda new: (nn.functional.pad(new, (0, 1), value=1.0) @ weights).view(-1, *a.shape[1:])


def mlp(
    pair: Tensor, a: Tensor, n_updates: int = 4000, loss: Callable = nn.functional.mse_loss
) -> Callable:
    """→ a function of standardised pairs: a network with two hidden layers of width 128."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(pair.shape[1], 128),
        nn.SiLU(),
        nn.Linear(128, 128),
        nn.SiLU(),
        nn.Linear(128, a[0].numel()),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, n_updates)
    for _ in range(n_updates):
        rows = torch.randint(len(pair), (256,))
        loss(network(pair[rows]).view(-1, *a.shape[1:]), a[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return lambda new: network(new).detach().view(-1, *a.shape[1:])


def nearest_neighbour(pair: Tensor, a: Tensor) -> Callable:
    """→ a function of standardised pairs: the action of the nearest training pair."""
    return lambda new: torch.cat([a[torch.cdist(x, pair).argmin(dim=1)] for x in new.split(500)])


def methods_of(flow: FlowInverseDynamics, train: tuple[Tensor, ...]) -> dict[str, Callable]:
    """The flow and its baselines by name, each a function (s, s_next) → actions."""
    s, a, s_next = train
    pair = flow.embed(s, s_next)
    generator = torch.Generator().manual_seed(0)

    def of_pairs(method):
        answer = method(pair, a)
        return lambda s, s_next: answer(flow.embed(s, s_next))

    return {
        "flow": lambda s, s_next: flow.sample(s, s_next, generator=generator),
        "least squares": of_pairs(least_squares),
        "MLP": of_pairs(mlp),
        "nearest neighbour": of_pairs(nearest_neighbour),
    }


def new_triplets(config: Sequences, n: int, **changes) -> list[Tensor]:
    """n triplets of new episodes, float32 tensors."""
    n_episodes = -(-2 * n // config.n_steps)
    config = replace(config, seed=config.seed + TEST_SEED, n_episodes=n_episodes, **changes)
    states, actions = simulate(config)
    padded = np.concatenate([actions, np.zeros_like(actions[:, :1])], axis=1)
    arrays = triplets(
        states.reshape(-1, states.shape[-1]),
        padded.reshape(-1, actions.shape[-1]),
        np.arange(len(states)) * states.shape[1],
        config.chunk,
    )
    kept = np.random.default_rng(0).permutation(len(arrays[0]))[:n]
    return [torch.from_numpy(array[kept]) for array in arrays]


# --- one right answer ------------------------------------------------------------------------


def errors(
    flow: FlowInverseDynamics, train: tuple[Tensor, ...], config: Sequences
) -> dict[str, float]:
    """Errors in per cent of the range of actions: all methods, fewer steps, shifted constants."""
    report, methods = {}, methods_of(flow, train)
    s, a, s_next = new_triplets(config, 1000)
    generator = torch.Generator().manual_seed(0)
    percent = 100 / (2 * config.max_action)
    for name, method in methods.items():
        began = time.perf_counter()
        wrong = percent * (method(s, s_next) - a).abs()
        report[f"{name}/seconds_1000"] = time.perf_counter() - began
        report[f"{name}/median_error"] = float(wrong.median())
        report[f"{name}/error_90"] = float(wrong.quantile(0.9))
    for steps in (1, 2, 4, 10, 100):
        for sampler in ("euler", "midpoint"):
            wrong = percent * (flow.sample(s, s_next, steps, sampler, generator) - a).abs()
            report[f"flow/{sampler}_{steps}_median_error"] = float(wrong.median())
    noise = torch.randn(a.shape, generator=generator)
    report["flow/straightness"] = straightness(flow.path(s, s_next, noise))
    for constant, values in SHIFTS.items():
        for value in values:
            factor = 1 if constant == "friction" else getattr(Pendulum, constant)
            shift = config.shift | {constant: value * factor}
            s, a, s_next = new_triplets(config, 1000, shift=shift)
            for name in ("flow", "MLP"):
                wrong = percent * (methods[name](s, s_next) - a).abs()
                report[f"shift/{constant}/{value}/{name}"] = float(wrong.median())
    return report


def plot_shifts(report: dict, path: Path) -> None:
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    panels = figure.subplots(1, len(SHIFTS), sharey=True, squeeze=False)[0]
    for axes, (constant, values) in zip(panels, SHIFTS.items(), strict=True):
        for name in ("flow", "MLP"):
            medians = [report[f"shift/{constant}/{value}/{name}"] for value in values]
            axes.plot(values, medians, "o-", markersize=3, label=name)
        label = constant if constant == "friction" else f"{constant} / that in training"
        axes.set(xlabel=label, yscale="log")
    figure.axes[0].set_ylabel("median error, % of the range")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=90)


# --- several right answers -------------------------------------------------------------------


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The 1-Wasserstein distance of two samples (pairs, n), as a mean over the pairs.

    For two samples of n numbers it is the mean distance of the sorted numbers.
    """
    return float((a.sort(dim=1).values - b.sort(dim=1).values).abs().mean())


def ambiguous_pairs(config: Sequences, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs that several actions explain. → (s, s_next, unit (pairs,)).

    Actions divided by `unit` have one distribution for all pairs. two_branch: `unit` is |a|. The
    clipped pendulum: only pairs whose torque was clipped are kept, and `unit` is its sign.
    """
    s, a, s_next = new_triplets(config, n)
    if config.system == "two_branch":
        return s, s_next, a[:, 0, 0].abs()
    # no hidden knowledge: the pair itself shows whether the torque was clipped
    kept = a[:, 0, 0].abs() > config.clip + 0.05
    return s[kept], s_next[kept], a[kept, 0, 0].sign()


def draw_truth(config: Sequences, s: Tensor, many: int, generator: torch.Generator) -> Tensor:
    """`many` samples for each pair from the known distribution, (pairs, many).

    two_branch: +1 with probability σ(2s), else −1. The clipped pendulum: uniform from clip to
    max_action.
    """
    uniform = torch.rand(len(s), many, generator=generator)
    if config.system == "two_branch":
        return torch.where(uniform < torch.sigmoid(2 * s), 1.0, -1.0)
    return config.clip + (config.max_action - config.clip) * uniform


def weight_error(config: Sequences, s: Tensor, drawn: Tensor, truth: Tensor) -> float:
    """Largest difference between the true and the sampled weight of a mode, in percentage points.

    two_branch: the largest of ten bins of s. The clipped pendulum: its uniform distribution has no
    modes, and its halves take their place.
    """
    bins, middle = torch.zeros(len(s), dtype=torch.long), (config.clip + config.max_action) / 2
    if config.system == "two_branch":
        bins, middle = (5 * (s[:, 0] + 1)).long().clamp(0, 9), 0.0
    gaps = []
    for b in bins.unique():
        share, true_share = ((x[bins == b] > middle).float().mean() for x in (drawn, truth))
        gaps.append(abs(float(share - true_share)))
    return 100 * max(gaps)


def modes(
    flow: FlowInverseDynamics,
    train: tuple[Tensor, ...],
    config: Sequences,
    n: int = 1000,
    many: int = 50,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """`many` samples for each of n pairs, compared with the known distribution.

    → (the report, the samples of each method (pairs, many)).
    """
    s, s_next, unit = ambiguous_pairs(config, n)
    generator = torch.Generator().manual_seed(1)
    truth = draw_truth(config, s, many, generator)
    many_s, many_next = s.repeat_interleave(many, 0), s_next.repeat_interleave(many, 0)

    def in_units(actions):
        return actions[:, 0, 0].view(-1, many) / unit[:, None]

    report, shown = {}, {"truth": truth}
    for name, method in methods_of(flow, train).items():
        if name == "flow":
            found = method(many_s, many_next)
        else:  # always the same answer
            found = method(s, s_next).repeat_interleave(many, 0)
        shown[name] = in_units(found)
        report[f"{name}/wasserstein"] = wasserstein(shown[name], truth)
    for steps in (1, 2, 4, 10):
        drawn = in_units(flow.sample(many_s, many_next, steps, generator=generator))
        report[f"flow/euler_{steps}_wasserstein"] = wasserstein(drawn, truth)
    noise = torch.randn(len(s), flow.chunk, flow.action_dim, generator=generator)
    report["flow/straightness"] = straightness(flow.path(s, s_next, noise))
    again = draw_truth(config, s, many, generator)
    report["another draw of the truth/wasserstein"] = wasserstein(again, truth)
    report["flow/weight_error_points"] = weight_error(config, s, shown["flow"], truth)
    if config.system == "two_branch":
        size = shown["flow"].abs()
        report["flow/mode_error_median"] = float((size - 1).abs().median())
        report["flow/between_modes_share"] = float((size < 0.5).float().mean())
    return report, shown


def plot_modes(shown: dict[str, Tensor], two_branch: bool, path: Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    reach = (-1.6, 1.6) if two_branch else (0.0, 5.0)
    for name, values in shown.items():
        style = dict(histtype="stepfilled", alpha=0.3) if name == "truth" else dict(histtype="step")
        axes.hist(values.flatten().numpy(), 80, range=reach, density=True, label=name, **style)
    label = "action, in units of |a|" if two_branch else "torque, times its sign"
    axes.set(xlabel=label, ylabel="density", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)


# --- the report ------------------------------------------------------------------------------


def tables(report: dict) -> list[str]:
    """The README's three tables, from the file that evaluate.py and pixels.py write."""

    def row(title, keys, digits=".2g"):
        return f"| {title} | {' | '.join(f'{report[key]:{digits}}' for key in keys)} |"

    first = ["| | median error, % | 90th percentile, % |", "|---|---|---|"]
    for name in METHODS:
        title = "flow, 100 steps" if name == "flow" else name
        first.append(row(title, [f"pendulum/{name}/median_error", f"pendulum/{name}/error_90"]))
    second = ["| Wasserstein distance to the truth | two branches | clipped pendulum |"]
    second.append("|---|---|---|")
    for name in ("another draw of the truth", *METHODS):
        systems = ("two_branch", "pendulum_clipped")
        second.append(row(name, [f"{system}/{name}/wasserstein" for system in systems]))
    third = ["| | accuracy | mutual information with the true action |", "|---|---|---|"]
    for key in report:
        if key.startswith("pixels/") and key.endswith("/accuracy"):
            name = key.split("/")[1]
            third.append(row(name, [key, f"pixels/{name}/nmi"], ".2f"))
    return ["\n".join(table) for table in (first, second, third)]


def add_to_json(path: str | Path, numbers: dict) -> None:
    """Add numbers to a report, with the machine, commit and commands that made them."""
    path = Path(path)
    make_folder(path.parent)
    old = json.loads(path.read_text()) if path.exists() else {}
    made = dict(
        device=describe_device(),
        commit=git_commit(),
        command="the commands of extras/flow_inverse_dynamics/README.md",
    )
    path.write_text(json.dumps(old | numbers | made, indent=1) + "\n")


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder that train.py wrote to")
    help = "configuration of the test's dataset [that of training]"
    parser.add_argument("--dataset-config", default="", help=help)
    parser.add_argument("--json", default="", metavar="FILE", help="add the numbers to this file")
    args = parser.parse_args(argv)
    folder = Path(args.checkpoint)
    path = folder / f"{STAGE}.pt"
    saved = load_saved(path)
    if saved["config"]["triplets"] and not args.dataset_config:
        raise UserError(
            f"{path} was trained with --triplets {saved['config']['triplets']};"
            " name the system to test it on with --dataset-config"
        )
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
        numbers = report | {"steps": saved["step"], "triplets": len(train[0])}
        add_to_json(args.json, {f"{name}/{key}": value for key, value in numbers.items()})
    return report


if __name__ == "__main__":
    print_user_errors()
    main()
