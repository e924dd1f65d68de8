import numpy as np
import torch
import torch.nn.functional as F

from evaluation import metrics

RNG = np.random.default_rng(0)


def test_psnr():
    assert abs(metrics.psnr(0.01) - 20) < 1e-9
    truth, predicted = torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 3)
    truth[0, 0, 0] = 1.0  # one pixel changes, and is predicted at 0.9
    predicted[0, 0, 0] = 0.9
    mask = metrics.changed(truth, torch.zeros_like(truth))
    assert mask.sum() == 1 and abs(metrics.masked_psnr(predicted, truth, mask) - 20) < 1e-4
    assert np.isnan(metrics.masked_psnr(predicted, truth, torch.zeros_like(mask)))


def test_usage():
    share = metrics.shares([0, 0, 1, 3], 5)
    assert share.tolist() == [0.5, 0.25, 0, 0.25, 0]
    assert abs(metrics.perplexity(share) - 2**1.5) < 1e-9  # entropy of (½, ¼, ¼) is 1.5 bits
    assert abs(metrics.perplexity(np.full(8, 1 / 8)) - 8) < 1e-9


def test_mutual_information():
    actions = RNG.integers(4, size=5000)
    assert abs(metrics.mutual_information(actions, actions) - 1) < 1e-9
    assert abs(metrics.mutual_information(3 - actions, actions) - 1) < 1e-9  # names do not matter
    assert abs(metrics.mutual_information(actions // 2, actions) - 0.5) < 0.01  # one of two bits
    unrelated = RNG.integers(8, size=5000)
    assert metrics.mutual_information(unrelated, actions) > 0  # by chance
    assert abs(metrics.nmi_above_chance(unrelated, actions)) < 2e-3
    assert metrics.nmi_above_chance(actions, actions) > 0.99


def test_best_mapping_accuracy():
    codes, actions = [0, 0, 0, 1, 1, 2], [5, 5, 1, 1, 1, 5]
    assert abs(metrics.best_mapping_accuracy(codes, actions) - 5 / 6) < 1e-9
    # one code alone: the share of the most frequent action
    assert metrics.best_mapping_accuracy(np.zeros(4, int), [0, 0, 0, 1]) == 0.75


def test_consistency():
    still = torch.zeros(60, 3)
    still[::2] = torch.randn(30, 3) + 5
    # standing still is similar to standing still
    assert metrics.consistency(still, torch.arange(60) % 2, torch.arange(60))[0] == 1
    kinds = torch.arange(60) % 3
    changes = F.one_hot(kinds, 3).float() + 0.01 * torch.randn(60, 3)
    same, chance = metrics.consistency(changes, kinds, torch.arange(60))
    assert same == 1 and abs(chance - 1 / 3) < 1e-6
    assert metrics.consistency(changes, torch.randint(3, (60,)), torch.arange(60))[0] < 0.7


def test_frechet_distance_of_gaussians():
    a = torch.randn(20_000, 3, dtype=torch.float64)
    assert abs(metrics.frechet_distance(a, a)) < 1e-9
    shift = torch.tensor([1.0, 2.0, 2.0])
    assert abs(metrics.frechet_distance(a, a + shift) - 9) < 1e-6  # |shift|²
    expected = 2**2 * torch.cov(a.T).trace() + 4 * (a.mean(0) ** 2).sum()
    assert abs(metrics.frechet_distance(a, 3 * a) - expected) < 1e-6
    scale = torch.tensor([1.0, 2.0, 5.0])  # commuting covariances: sum (σa - σb)²
    b = torch.randn(20_000, 3, dtype=torch.float64) * scale
    assert abs(metrics.frechet_distance(a, b) - (0 + 1 + 16)) < 0.5


def test_warnings_name_the_metric_and_a_flag():
    well = {
        "tokenizer/perplexity": 200,
        "tokenizer/psnr_changing": 25.0,
        "tokenizer/copy_psnr_changing": 14.0,
        "lam/actions_used": 8,
        "lam/n_actions": 8,
        "lam/largest_share": 0.3,
        "dynamics/delta_psnr_t4": 2.0,
    }
    assert metrics.warnings_of(well) == []
    nearly_empty = {**well, "tokenizer/perplexity": 1.5}  # Pong
    assert metrics.warnings_of(nearly_empty) == []
    for name, value, flag in [
        ("tokenizer/perplexity", 1.0, "--learning-rate"),  # a dead codebook
        ("tokenizer/psnr_changing", 13.9, "--minutes"),
        ("lam/actions_used", 5, "--entropy-lambda"),  # collapsed codes
        ("lam/largest_share", 0.95, "--entropy-lambda"),
        ("lam/error_over_copy", 1.01, "--minutes"),
        ("dynamics/delta_psnr_t4", 0.02, "--minutes"),  # actions that do nothing
        ("dynamics/delta_psnr_null_t4", 0.0, "--minutes"),
        ("dynamics/action_gain", 0.001, "--minutes"),
    ]:
        (line,) = metrics.warnings_of({**well, name: value})
        assert line.startswith(f"warning: {name} is {value:.3g}") and flag in line
