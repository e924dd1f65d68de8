"""Metrics as pure functions. Pictures are float in [0, 1]; squared errors are averaged before any logarithm."""
import numpy as np
import torch


def psnr(squared_error):
    """Mean squared error of pictures in [0, 1] → peak signal-to-noise ratio in dB."""
    return float(-10 * np.log10(max(float(squared_error), 1e-10)))


def changed(frames, reference, threshold=10 / 255):
    """Boolean (…, H, W): pixels where any channel differs from the reference by more than `threshold`."""
    return (frames - reference).abs().amax(dim=-1) > threshold


def masked_psnr(predicted, truth, mask):
    """PSNR over the pixels in mask (…, H, W) of frames (…, H, W, 3); nan if there is none."""
    return psnr(((predicted - truth) ** 2).mean(dim=-1)[mask].mean()) if mask.any() else float("nan")


def shares(labels, n):
    """How often each of n labels occurs, as shares (n,)."""
    labels = np.asarray(labels).ravel()
    return np.bincount(labels, minlength=n) / max(1, len(labels))


def entropy(share):
    """Shannon entropy of a distribution, in nats."""
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def perplexity(share):
    """exp(entropy): the number of labels in use, weighted by use."""
    return float(np.exp(entropy(share)))


def contingency(codes, actions):
    """Counts (n_codes, n_actions) of code and action together."""
    codes, actions = np.asarray(codes).ravel(), np.asarray(actions).ravel()
    counts = np.zeros((codes.max() + 1, actions.max() + 1))
    np.add.at(counts, (codes, actions), 1)
    return counts


def mutual_information(codes, actions):
    """I(code; action) / H(action), in [0, 1]: the share of what there is to know about the action that the code tells."""
    joint = contingency(codes, actions)
    joint /= joint.sum()
    h_action = entropy(joint.sum(0))
    information = entropy(joint.sum(1)) + h_action - entropy(joint.ravel())
    return information / h_action if h_action > 0 else 0.0


def nmi_above_chance(codes, actions, n_permutations=20, seed=0):
    """mutual_information minus its mean over shuffled actions: few samples and many codes raise the raw value."""
    rng = np.random.default_rng(seed)
    codes, actions = np.asarray(codes).ravel(), np.asarray(actions).ravel()
    chance = np.mean([mutual_information(codes, rng.permutation(actions)) for _ in range(n_permutations)])
    return mutual_information(codes, actions) - chance


def best_mapping_accuracy(codes, actions):
    """Accuracy when each code is read as the action it most often goes with; compare with the majority rate."""
    counts = contingency(codes, actions)
    return float(counts.max(axis=1).sum() / counts.sum())


@torch.autocast("cpu", enabled=False)
def consistency(changes, codes, clips):
    """(share of transitions whose most similar transition of another clip has the same code, the share by chance).

    changes (M, K): the change picture of each transition, flattened; codes (M,); clips (M,) the clip it comes from.
    """
    distance = torch.cdist(changes.float(), changes.float())  # (M, M)
    distance[clips[:, None] == clips[None, :]] = float("inf")
    nearest = distance.argmin(dim=1)
    return float((codes[nearest] == codes).float().mean()), float((shares(codes, int(codes.max()) + 1) ** 2).sum())


def frechet_distance(a, b):
    """Fréchet distance of two Gaussians fitted to feature rows a, b (n, K): |μa-μb|² + tr(Σa + Σb - 2(ΣaΣb)^½)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (ΣaΣb)^½ = sum of the roots of the eigenvalues of ΣaΣb, which are those of Σa^½ Σb Σa^½: symmetric, no complex roots
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


WARNINGS = {  # metric → (is it bad?, given the whole report; what it means and which flag to try)
    "tokenizer/codes_used": (lambda v, r: v < 2, "the codebook is dead; try train_tokenizer.py with half the --learning-rate"),
    "tokenizer/perplexity": (lambda v, r: v < 1.1, "the codebook is dead; try train_tokenizer.py with half the --learning-rate"),
    "tokenizer/psnr_changing": (lambda v, r: v <= r["tokenizer/copy_psnr_changing"], "what moves is not drawn; train_tokenizer.py needs more --minutes"),
    "lam/actions_used": (lambda v, r: v < r["lam/n_actions"], "some actions never occur; try train_lam.py with a larger --entropy-lambda or fewer --n-actions"),
    "lam/largest_share": (lambda v, r: v > 0.8, "the actions have collapsed into one; try train_lam.py with a larger --entropy-lambda"),
    "lam/error_over_copy": (lambda v, r: v > 0.95, "the actions explain nothing of the change; train_lam.py needs more --minutes"),
    "dynamics/action_gain": (lambda v, r: v < 0.01, "the model ignores its actions; train_dynamics.py needs more --minutes, or the LAM does"),
    "dynamics/delta_psnr_null_t4": (lambda v, r: v < 0.1, "the keys do what no key does; mend lam/* first, then give train_dynamics.py more --minutes"),
    "dynamics/delta_psnr_t4": (lambda v, r: v < 0.3, "the keys do nothing; mend lam/* first, then give train_dynamics.py more --minutes"),
}  # fmt: skip


def warnings_of(report):
    """A line for each metric in a report that makes a world unplayable, with the flag to try; [] if all is well."""
    found = [(name, text) for name, (bad, text) in WARNINGS.items() if name in report and bad(report[name], report)]
    return [f"warning: {name} is {report[name]:.3g}: {text}" for name, text in found]


def print_warnings(report):
    for line in warnings_of(report):
        print(line)
