import numpy as np
import pytest
import torch
from conftest import SIZES, randomise

from models.dynamics import DynamicsModel, maskgit_decode
from models.latent_action_model import LatentActionModel
from models.next_latent import NextLatentModel
from models.video_tokenizer import VideoTokenizer
from models.world_model import WorldModel

KINDS = {"ce": DynamicsModel, "mse": NextLatentModel}


def small_world(objective="ce", **settings):
    frames = dict(frame_size=[16, 16], patch_size=8)
    tokenizer = randomise(VideoTokenizer(levels=[4, 4], **frames, **SIZES), 1)
    lam = randomise(LatentActionModel(n_actions=4, **frames, **SIZES), 2)
    dynamics = KINDS[objective](grid=[2, 2], levels=[4, 4], n_actions=4, **SIZES)
    dynamics = randomise(dynamics, 3)
    return WorldModel(tokenizer, lam, dynamics, **{"steps": 3, "temperature": 0.0, **settings})


def pictures(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("objective", ["ce", "mse"])
def test_reset_and_step(objective):
    world = small_world(objective)
    world.reset(pictures())  # one picture
    frame = world.step(2)
    assert frame.shape == (16, 16, 3) and frame.dtype == np.uint8
    world.reset(pictures(3))  # a history
    assert world.step(0).shape == (16, 16, 3)
    world.reset(pictures(5, 3))  # five worlds
    assert world.step([0, 1, 2, 3, 0]).shape == (5, 16, 16, 3)


@pytest.mark.parametrize("objective", ["ce", "mse"])
def test_worlds_in_a_batch_are_the_worlds_alone(objective):
    world, starts = small_world(objective), pictures(4, 2)
    actions = [[0, 1, 2, 3], [3, 3, 0, 0], [1, 1, 1, 1]]
    world.reset(starts)
    together = np.stack([world.step(a) for a in actions])
    for i in range(4):
        world.reset(starts[i])
        assert np.array_equal([world.step(a[i]) for a in actions], together[:, i])


@torch.no_grad()
def test_steps_equal_recomputing_the_whole_history_and_the_cache_stays_small():
    world, start = small_world(), pictures(2)
    rng = np.random.default_rng(1)
    world.reset(start)
    video = torch.as_tensor(start[None]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    tokens, actions = world.tokenizer.encode(video), world.lam.infer(video)

    def logits_of(new):  # the training path over everything so far, without any cache
        clip = torch.cat([tokens, new.clamp(max=15).unsqueeze(1)], dim=1)
        masked = torch.zeros(1, clip.shape[1] - 1, 4, dtype=torch.bool)
        masked[:, -1] = new == 16
        return world.dynamics.masked_logits(clip, actions, masked)[:, -1]

    for _ in range(12):  # three times the context
        action = int(rng.integers(4))
        frame = world.step(action)
        actions = torch.cat([actions, torch.tensor([[action]])], dim=1)
        new = maskgit_decode(logits_of, torch.full((1, 4), 16), 16, steps=3, temperature=0)
        tokens = torch.cat([tokens, new.unsqueeze(1)], dim=1)
        whole = world.tokenizer.decode(tokens)[0, -1].permute(1, 2, 0)
        assert np.abs(frame.astype(int) - ((whole + 1) * 127.5).round().numpy()).max() <= 1
        assert world.cache[0].keys.shape[2] == world.pixel_cache[0].keys.shape[2] == 3


def test_the_same_seed_plays_the_same_game():
    def play(seed):
        world = small_world(temperature=1.0, seed=seed)
        world.reset(pictures())
        return np.stack([world.step(a) for a in (0, 1, 2, 3, 0, 1)])

    assert np.array_equal(play(0), play(0)) and not np.array_equal(play(0), play(1))


def test_actions_matter():
    world = small_world()
    frames = []
    for action in range(4):
        world.reset(pictures())
        frames.append(world.step(action))
    assert any(not np.array_equal(frames[0], frame) for frame in frames[1:])


def test_bad_input():
    world = small_world()
    with pytest.raises(ValueError, match=r"\[16, 16, 3\].*\[16, 24, 3\]"):
        world.reset(np.zeros((16, 24, 3), dtype=np.uint8))
    world.reset(pictures())
    for action in (-1, 4):
        with pytest.raises(ValueError, match=f"action {action} .* 0 … 3"):
            world.step(action)


def test_a_step_works_on_the_same_memory_and_looks_at_no_value(monkeypatch):
    """What a CUDA graph needs.

    It is captured once, and run again at any age and after any reset.
    """
    world, places = small_world(temperature=1.0), []
    for _ in range(2):
        world.reset(pictures(3, 2))
        for _ in range(6):
            world.step([0, 1, 2])
            tensors = [world.last, world.last_action, world.action]
            for cache in world.cache + world.pixel_cache:
                tensors += [cache.keys, cache.rotated, cache.values, cache.filled]
            places.append([x.data_ptr() for x in tensors])
    assert all(place == places[0] for place in places)

    def refuse(*_):
        raise AssertionError("a look at a value: on a GPU the host would wait here")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with torch.no_grad():
        world._advance()
