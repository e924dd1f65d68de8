import torch
import torch.nn.functional as F
from conftest import SIZES, randomise

from models.st_transformer import (
    AdaLN,
    SpatioTemporalTransformer,
    apply_rope,
    attend,
    causal_band,
    rope_angles,
)


def transformer(**changes):
    return randomise(SpatioTemporalTransformer(**{**SIZES, **changes}))


def test_a_frame_never_changes_what_came_before():
    model, x = transformer(), torch.randn(2, 6, 5, 32)
    changed = x.clone()
    changed[:, 3] = torch.randn(2, 5, 32)  # a constant would be removed by the norm
    before, after = model(x), model(changed)
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-5)
    assert all((before[:, t] - after[:, t]).abs().max() > 1e-3 for t in (3, 4, 5))


def test_attention_reaches_back_context_length_frames_and_no_further():
    model, x = transformer(n_blocks=1), torch.randn(1, 6, 5, 32)  # one block, context of 4
    changed = x.clone()
    changed[:, 0] = torch.randn(1, 5, 32)
    difference = (model(x) - model(changed)).abs().amax(dim=(0, 2, 3))
    assert (difference[:4] > 1e-4).all() and (difference[4:] < 1e-6).all()


def test_cached_frames_equal_one_banded_pass():
    model, x = transformer(cond_dim=8), torch.randn(2, 15, 5, 32)
    cond = torch.randn(2, 15, 8)
    whole, cache = model(x, model.modulations(cond)), model.new_cache()
    # three frames at once, then one by one
    parts = [model(x[:, :3], model.modulations(cond[:, :3]), cache=cache, finished=True)]
    for t in range(3, 15):
        now = model.modulations(cond[:, t : t + 1])
        model(torch.randn(2, 1, 5, 32), now, cache=cache)  # an unfinished frame leaves no trace
        parts.append(model(x[:, t : t + 1], now, cache=cache, finished=True))
        # the cache has its full size from the first frame on
        assert cache[0].keys.shape == cache[0].values.shape == (10, 2, 3, 16)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


def test_a_cache_that_was_begun_under_autocast_is_precise_again_without_it():
    model, x = transformer(), torch.randn(2, 5, 5, 32)
    cache, plain = model.new_cache(), model.new_cache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x[:, :2], cache=cache, finished=True)
    assert cache[0].keys.dtype == torch.bfloat16
    model(x[:, :2], cache=plain, finished=True)
    for t in range(2, 5):  # the three frames that a cache of four keeps
        one, two = (model(x[:, t : t + 1], cache=c, finished=True) for c in (cache, plain))
        assert torch.allclose(one, two, atol=0.05)  # the past was kept
    assert torch.equal(cache[0].keys, plain[0].keys)  # float32 again


def test_adaln_with_zero_projection_is_the_plain_norm():
    x, cond = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 8)
    norm = AdaLN(16, cond_dim=8)
    assert torch.equal(norm(x, norm.modulation(cond)), F.layer_norm(x, (16,)))
    torch.nn.init.normal_(norm.project.weight)
    gamma, beta = norm.project(cond)[:, :, None].chunk(2, dim=-1)
    assert torch.allclose(
        norm(x, norm.modulation(cond)), F.layer_norm(x, (16,)) * (1 + gamma) + beta, atol=1e-6
    )


def test_untrained_stack_is_the_identity_up_to_the_last_norm():
    model, x = SpatioTemporalTransformer(**SIZES), torch.randn(1, 3, 4, 32)
    assert torch.allclose(model(x), F.layer_norm(x, (32,)), atol=1e-5)


def test_rotation_makes_scores_depend_on_distance_only():
    q, k = torch.randn(1, 8), torch.randn(1, 8)

    def score(i, j):
        query = apply_rope(q, rope_angles(torch.tensor([i]), 8))
        key = apply_rope(k, rope_angles(torch.tensor([j]), 8))
        return (query * key).sum()

    assert torch.allclose(score(5, 3), score(9, 7), atol=1e-5)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3


def test_attention_equals_the_library():
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    mask = causal_band(5, 5, 3)
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert torch.allclose(
        attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-5
    )
