"""Metrics as pure functions.

Pictures are float in [0, 1]. Squared errors are averaged before the logarithm is taken.
"""

import numpy as np
import torch
from torch import Tensor


def psnr(squared_error) -> float:
    """Mean squared error of pictures in [0, 1] → peak signal-to-noise ratio in dB."""
    return float(-10 * np.log10(max(float(squared_error), 1e-10)))


def changed(frames: Tensor, reference: Tensor, threshold: float = 10 / 255) -> Tensor:
    """Boolean (…, H, W): pixels where any channel differs by more than `threshold`."""
    return (frames - reference).abs().amax(dim=-1) > threshold


def masked_psnr(predicted: Tensor, truth: Tensor, mask: Tensor) -> float:
    """PSNR over the pixels in mask (…, H, W) of frames (…, H, W, 3); nan if there is none."""
    if not mask.any():
        return float("nan")
    return psnr(((predicted - truth) ** 2).mean(dim=-1)[mask].mean())


def shares(labels, n: int) -> np.ndarray:
    """How often each of n labels occurs, as shares (n,)."""
    labels = np.asarray(labels).ravel()
    return np.bincount(labels, minlength=n) / max(1, len(labels))


def entropy(share: np.ndarray) -> float:
    """Shannon entropy of a distribution, in nats."""
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def perplexity(share: np.ndarray) -> float:
    """exp(entropy): the effective number of labels in use."""
    return float(np.exp(entropy(share)))


def contingency(codes, actions) -> np.ndarray:
    """How often each code occurs with each action, (n_codes, n_actions)."""
    codes, actions = np.asarray(codes).ravel(), np.asarray(actions).ravel()
    counts = np.zeros((codes.max() + 1, actions.max() + 1))
    np.add.at(counts, (codes, actions), 1)
    return counts


def mutual_information(codes, actions) -> float:
    """I(code; action) / H(action), in [0, 1]: how much the code tells about the action.

    1 means that it tells everything.
    """
    joint = contingency(codes, actions)
    joint /= joint.sum()
    h_action = entropy(joint.sum(0))
    information = entropy(joint.sum(1)) + h_action - entropy(joint.ravel())
    return information / h_action if h_action > 0 else 0.0


def nmi_above_chance(codes, actions, n_permutations: int = 20, seed: int = 0) -> float:
    """mutual_information minus its mean over shuffled actions.

    The raw value is biased upwards when samples are few and codes are many.
    """
    rng = np.random.default_rng(seed)
    codes, actions = np.asarray(codes).ravel(), np.asarray(actions).ravel()
    shuffled = (rng.permutation(actions) for _ in range(n_permutations))
    chance = np.mean([mutual_information(codes, others) for others in shuffled])
    return mutual_information(codes, actions) - chance


def best_mapping_accuracy(codes, actions) -> float:
    """Accuracy when each code is mapped to the action that it occurs with most often.

    Compare it with the share of the most frequent action.
    """
    counts = contingency(codes, actions)
    return float(counts.max(axis=1).sum() / counts.sum())


@torch.autocast("cpu", enabled=False)
def consistency(changes: Tensor, codes: Tensor, clips: Tensor) -> tuple[float, float]:
    """Whether similar changes have the same code.

    → (share of transitions whose most similar transition in another clip has the same code, the
    same share by chance). changes (M, K): the flattened change of picture in each transition.
    codes (M,). clips (M,): the clip that each transition comes from.
    """
    distance = torch.cdist(changes.float(), changes.float())  # (M, M)
    distance[clips[:, None] == clips[None, :]] = float("inf")
    nearest = distance.argmin(dim=1)
    same = float((codes[nearest] == codes).float().mean())
    return same, float((shares(codes, int(codes.max()) + 1) ** 2).sum())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians that are fitted to feature rows a, b (n, K).

    |μa-μb|² + tr(Σa + Σb - 2(ΣaΣb)^½)
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (ΣaΣb)^½ is the sum of the roots of the eigenvalues of ΣaΣb. Those are the eigenvalues of
    # Σa^½ Σb Σa^½ too, which is symmetric: no complex roots.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


# --- warnings --------------------------------------------------------------------------------

DEAD_CODEBOOK = (
    "nearly all tokens are the same code; try train_tokenizer.py with half the --learning-rate"
)
MORE_ENTROPY = "try train_lam.py with a larger --entropy-lambda or --var-lambda"
LAM_FIRST = "correct any lam/* warning first, then give train_dynamics.py more --minutes"
# metric → (function of its value and the whole report: is it bad?; what it means, what to try)
WARNINGS = {
    "tokenizer/codes_used": (lambda v, r: v < 2, DEAD_CODEBOOK),
    "tokenizer/perplexity": (lambda v, r: v < 1.1, DEAD_CODEBOOK),
    "tokenizer/psnr_changing": (
        lambda v, r: v <= r["tokenizer/copy_psnr_changing"],
        "changing pixels are no better than in a copy of the last frame;"
        " train_tokenizer.py needs more --minutes",
    ),
    "lam/actions_used": (
        lambda v, r: v < r["lam/n_actions"],
        f"some actions never occur; {MORE_ENTROPY} or fewer --n-actions",
    ),
    "lam/largest_share": (
        lambda v, r: v > 0.8,
        f"the actions have collapsed into one; {MORE_ENTROPY}",
    ),
    "lam/error_over_copy": (
        lambda v, r: v > 0.95,
        "the actions explain almost none of the change; train_lam.py needs more --minutes",
    ),
    "lam/news": (
        lambda v, r: v < 0.01,
        "the codes tell hardly more than the past foretells, so the keys may move the traffic and"
        " not the player; record frames further apart, say where the player is with --player X,Y,"
        " or name some true actions (train_lam.py --label-weight)",
    ),
    "lam/latent_variance": (
        lambda v, r: v < 0.05,
        f"an action's numbers hardly differ between transitions; {MORE_ENTROPY}",
    ),
    "dynamics/action_gain": (
        lambda v, r: v < 0.01,
        "the model ignores its actions; train_dynamics.py or train_lam.py needs more --minutes",
    ),
    "dynamics/delta_psnr_null_t4": (
        lambda v, r: v < 0.1,
        f"inferred actions are no better than always the most frequent one; {LAM_FIRST}",
    ),
    "dynamics/delta_psnr_marginal_t4": (
        lambda v, r: v < 0.1,
        f"inferred actions are no better than others drawn as frequently; {LAM_FIRST}",
    ),
    "dynamics/delta_psnr_t4": (
        lambda v, r: v < 0.3,
        f"inferred actions are no better than random ones; {LAM_FIRST}",
    ),
}


def warnings_of(report: dict) -> list[str]:
    """A line for each metric too poor for a playable world, with the flag to try.

    [] if there is none.
    """
    lines = []
    for name, (bad, text) in WARNINGS.items():
        if report.get(name) is not None and bad(report[name], report):
            lines.append(f"warning: {name} is {report[name]:.3g}: {text}")
    return lines


def print_warnings(report: dict) -> None:
    for line in warnings_of(report):
        print(line)
