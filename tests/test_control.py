"""ΔPSNR against values worked out by hand, and its interval against the textbook's."""

import math

import numpy as np
import torch

from evaluation import control

ENDS = ("low", "high", "per_clip", "per_clip_low", "per_clip_high")


def test_delta_psnr_of_errors_that_differ_tenfold():
    errors = {
        "inferred": torch.tensor([0.01, 0.03]),
        "random": torch.tensor([0.1, 0.3]),  # ten times as large: 10 dB, in every clip
        "most frequent": torch.tensor([0.01, 0.39]),  # sums: 0.4 / 0.04
        "marginal": torch.tensor([0.02, 0.06]),  # 3.01 dB: the smallest of the three
        "button": torch.tensor([0.05, 0.15]),  # half of random
    }
    found = control.control_metrics(errors)
    assert math.isclose(found["delta_psnr_t4"], 10, abs_tol=1e-6)
    assert all(math.isclose(found[f"delta_psnr_t4_{end}"], 10, abs_tol=1e-6) for end in ENDS)
    assert math.isclose(found["delta_psnr_null_t4"], 10, abs_tol=1e-6)
    # clip by clip: 0 dB and 10·log10(13); a few clips rule the first estimate, not the second
    per_clip = 10 * math.log10(13) / 2
    assert math.isclose(found["delta_psnr_null_t4_per_clip"], per_clip, abs_tol=1e-6)
    assert found["delta_psnr_null_t4_low"] < 1e-6 < 11 < found["delta_psnr_null_t4_high"]
    assert found["delta_psnr_min_t4"] == found["delta_psnr_marginal_t4"]
    assert math.isclose(found["delta_psnr_button_t4"], 10 * math.log10(2), abs_tol=1e-6)
    assert found["clips"] == 2 and found["clips_for_0.3_db"] == 0


def test_the_interval_is_the_textbooks_where_there_is_one():
    rng = np.random.default_rng(0)
    n, spread = 200, 2.0
    better = np.ones(n)
    worse = 10 ** (rng.normal(3, spread, n) / 10)  # each clip's difference in dB: N(3, 2²)
    found = control.delta_psnr(better, worse)
    own = 10 * np.log10(worse)
    half = 1.96 * own.std(ddof=1) / math.sqrt(n)
    assert math.isclose(found["_per_clip"], own.mean(), abs_tol=1e-9)
    assert math.isclose(found["_per_clip_low"], own.mean() - half, abs_tol=0.15 * half)
    assert math.isclose(found["_per_clip_high"], own.mean() + half, abs_tol=0.15 * half)
    # as many clips as the metric asks for make an interval of ± 0.3 dB
    kinds = {name: torch.from_numpy(worse) for name in control.OTHERS}
    errors = {"inferred": torch.from_numpy(better)} | kinds
    asked = control.control_metrics(errors)["clips_for_0.3_db"]
    width = (found["_high"] - found["_low"]) / 2
    assert math.isclose(width * math.sqrt(n / asked), 0.3, rel_tol=0.01)


def test_a_true_action_becomes_the_code_of_the_other_half():
    true_actions = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 2], [2, 0, 0]])
    codes = torch.tensor([[5, 3, 3], [5, 5, 4], [6, 7, 1], [1, 6, 2]])
    # second half: 0 → 6 (of 6, 6, 2), 1 → 7, 2 → 1. First half: 0 → 5, 1 → 3 (of 3, 3, 4), and
    # 2, which it does not have, → its most frequent code, 3 or 5
    found = control.codes_of_true_actions(codes, true_actions)
    assert found[:2].tolist() == [[6, 7, 7], [6, 6, 7]]
    assert found[2, :2].tolist() == [5, 3] and found[3, 1:].tolist() == [5, 5]
    assert found[2, 2] == found[3, 0] and found[2, 2] in (3, 5)


def test_the_three_baselines():
    actions = torch.tensor([[0, 0, 0, 1, 0]]).repeat(400, 1)
    others = control.baseline_actions(actions, 4, 3)
    assert all(found.shape == (400, 2) for found in others.values())
    shares = [float((others["random"] == a).float().mean()) for a in range(4)]
    assert all(abs(share - 0.25) < 0.06 for share in shares)
    assert (others["most frequent"] == 0).all()
    assert abs(float((others["marginal"] == 1).float().mean()) - 0.2) < 0.06
    assert set(others["marginal"].unique().tolist()) == {0, 1}
