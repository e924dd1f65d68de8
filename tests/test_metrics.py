import numpy as np
import torch
import torch.nn.functional as F

import metrics

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
    assert metrics.best_mapping_accuracy(np.zeros(4, int), [0, 0, 0, 1]) == 0.75  # one code: the majority rate


def test_consistency():
    still = torch.zeros(60, 3)
    still[::2] = torch.randn(30, 3) + 5
    assert metrics.consistency(still, torch.arange(60) % 2, torch.arange(60))[0] == 1  # standing still is similar to standing still
    kinds = torch.arange(60) % 3
    changes = F.one_hot(kinds, 3).float() + 0.01 * torch.randn(60, 3)
    same, chance = metrics.consistency(changes, kinds, torch.arange(60))
    assert same == 1 and abs(chance - 1 / 3) < 1e-6
    assert metrics.consistency(changes, torch.randint(3, (60,)), torch.arange(60))[0] < 0.7


def test_frechet_distance_of_gaussians():
    a = torch.randn(20_000, 3, dtype=torch.float64)
    assert abs(metrics.frechet_distance(a, a)) < 1e-9
    assert abs(metrics.frechet_distance(a, a + torch.tensor([1.0, 2.0, 2.0])) - 9) < 1e-6  # |shift|²
    assert abs(metrics.frechet_distance(a, 3 * a) - (2**2 * torch.cov(a.T).trace() + 4 * (a.mean(0) ** 2).sum())) < 1e-6
    scale = torch.tensor([1.0, 2.0, 5.0])  # commuting covariances: sum (σa - σb)²
    b = torch.randn(20_000, 3, dtype=torch.float64) * scale
    assert abs(metrics.frechet_distance(a, b) - (0 + 1 + 16)) < 0.5


def test_random_features_order_videos_by_damage():
    video = torch.rand(80, 16, 1, 1, 3).expand(80, 16, 32, 32, 3).clone()
    for i in range(80):
        for t in range(16):
            video[i, t, 4 + t : 12 + t, i % 20 : i % 20 + 8] = torch.rand(3, generator=torch.Generator().manual_seed(i))

    def blur(width):
        flat = video.flatten(0, 1).permute(0, 3, 1, 2)
        return F.avg_pool2d(flat, width, 1, width // 2, count_include_pad=False).permute(0, 2, 3, 1).view(video.shape)

    real = metrics.random_conv_features(video)
    distances = [metrics.frechet_distance(metrics.random_conv_features(x), real) for x in (video, blur(3), blur(9))]
    assert abs(distances[0]) < 1e-6 and 1e-6 < distances[1] < distances[2]
