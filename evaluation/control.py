"""How much the actions matter: ΔPSNR, Genie's measure of control (arXiv:2402.15391, §3).

A world continues the same clips with the same random numbers, once with the actions that its LAM
inferred and once with others. ΔPSNR is how many dB the frame four steps on loses with the others.
Of three kinds of others the easiest to beat flatters, so the smallest difference is the headline.

The inferred actions have seen the frame that is scored. A player has not, so there is a fourth
number where the data has true actions: the code that a true action stands for most often, learned
on the other half of the clips, against random codes.
"""

import math

import numpy as np
import torch
from torch import Tensor

from evaluation import metrics

OTHERS = {"random": "", "most frequent": "_null", "marginal": "_marginal"}  # → suffix of a metric
N_BOOTSTRAP, TOLERANCE = 2000, 0.3  # resamples; dB


def baseline_actions(actions: Tensor, n_actions: int, start: int) -> dict[str, Tensor]:
    """actions (B, T-1) → three kinds of others for the transitions from `start` on, (B, T-1-start).

    Uniformly random; always the most frequent; drawn with the frequencies of all clips.
    """
    generator = torch.Generator().manual_seed(0)
    future = actions[:, start:].cpu()
    use = torch.from_numpy(metrics.shares(actions.cpu(), n_actions))
    uniform = torch.randint(n_actions, future.shape, generator=generator)
    marginal = torch.multinomial(use, future.numel(), replacement=True, generator=generator)
    most_frequent = torch.full_like(future, int(use.argmax()))
    return {
        "random": uniform,
        "most frequent": most_frequent,
        "marginal": marginal.view(future.shape),
    }


def codes_of_true_actions(actions: Tensor, true_actions: Tensor) -> Tensor:
    """Each true action (B, T-1) as the code that is most frequent with it in the other half.

    actions: codes (B, T-1). A true action that the other half does not have becomes its most
    frequent code.
    """
    actions, true_actions = actions.cpu(), true_actions.cpu()
    half = len(actions) // 2
    result = torch.empty_like(actions)
    for here, there in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        codes, truths = actions[there].flatten(), true_actions[there].flatten()
        best = codes.mode().values.repeat(int(true_actions.max()) + 1)
        for truth in truths.unique():
            best[truth] = codes[truths == truth].mode().values
        result[here] = best[true_actions[here]]
    return result


def decibels(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """By how many dB `worse` squared errors are worse."""
    return 10 * np.log10(np.maximum(worse, 1e-10) / np.maximum(better, 1e-10))


def delta_psnr(better: np.ndarray, worse: np.ndarray) -> dict[str, float]:
    """Squared errors per clip (n,) → ΔPSNR by suffix, each with the ends of its 95 % interval.

    "": the difference of the PSNRs of all clips, which a few clips with a large error rule;
    "_per_clip": the mean over clips of each clip's own difference. The intervals come from a
    bootstrap: how far would the number move with other clips of the same kind?
    """
    n = len(better)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=N_BOOTSTRAP)  # (N_BOOTSTRAP, n)
    per_clip = decibels(better, worse)
    estimates = {
        "": (decibels(better.mean(), worse.mean()), decibels(counts @ better, counts @ worse)),
        "_per_clip": (per_clip.mean(), counts @ per_clip / n),
    }
    result = {}
    for suffix, (value, resampled) in estimates.items():
        low, high = np.percentile(resampled, [2.5, 97.5])
        named = {suffix: value, f"{suffix}_low": low, f"{suffix}_high": high}
        result |= {name: float(number) for name, number in named.items()}
    return result


def control_metrics(errors: dict[str, Tensor]) -> dict[str, float]:
    """Squared errors per clip (n,), four frames on, by kind of actions → ΔPSNR of each kind.

    errors["inferred"] is compared with each kind in OTHERS, and "random" with errors["button"],
    if it is there. delta_psnr_min_t4 is the smallest of the three with its interval, and
    clips_for_0.3_db how many clips make that interval ± 0.3 dB.
    """
    errors = {name: error.double().numpy() for name, error in errors.items()}
    result, three = {}, []
    for name, suffix in OTHERS.items():
        delta = delta_psnr(errors["inferred"], errors[name])
        result |= {f"delta_psnr{suffix}_t4{end}": value for end, value in delta.items()}
        three.append(delta)
    smallest = min(three, key=lambda delta: delta[""])
    result |= {f"delta_psnr_min_t4{end}": value for end, value in smallest.items()}
    if "button" in errors:
        delta = delta_psnr(errors["button"], errors["random"])
        result |= {f"delta_psnr_button_t4{end}": value for end, value in delta.items()}
    half_width = (smallest["_high"] - smallest["_low"]) / 2
    n = len(errors["inferred"])
    return result | {"clips": n, "clips_for_0.3_db": math.ceil(n * (half_width / TOLERANCE) ** 2)}
