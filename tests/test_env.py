from utils.checkpoint import load_world
from utils.cli import CheckpointError

import numpy as np
import pytest

gymnasium = pytest.importorskip(
    "gymnasium", reason="the environment is an extra: pip install gymnasium"
)
check_env = pytest.importorskip("gymnasium.utils.env_checker").check_env

NAME = "player.gym_env:nanoworld/World-v0"  # imports the module, which registers the environment


def play(env, actions, **reset):
    return [env.reset(**reset)[0]] + [env.step(action)[0] for action in actions]


def make_vec(**options):
    return gymnasium.make_vec(NAME, vectorization_mode="vector_entry_point", **options)


@pytest.mark.filterwarnings("error")
def test_it_passes_gymnasiums_own_check(world_dir):
    check_env(gymnasium.make(NAME, checkpoint=world_dir, render_mode="rgb_array").unwrapped)


def test_a_seed_fixes_the_game_and_the_frames_are_the_worlds(world_dir):
    env = gymnasium.make(NAME, checkpoint=world_dir, render_mode="rgb_array")
    one, again, other = (play(env, [0, 3, 1], seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert np.array_equal(env.render(), other[-1])
    world = load_world(world_dir, temperature=0)
    env = gymnasium.make(NAME, checkpoint=world_dir, temperature=0)
    clip = world.start_frames[1].numpy()
    world.reset(clip)
    frames = play(env, [2, 4], options={"frames": clip})
    assert np.array_equal(frames, [clip[-1], world.step(2), world.step(4)])
    assert np.array_equal(play(env, [], options={"frames": clip[0]})[0], clip[0])


def test_an_episode_is_truncated_and_a_batch_is_worlds_side_by_side(world_dir):
    env = gymnasium.make(NAME, checkpoint=world_dir, max_episode_steps=2)
    env.reset(seed=0)
    assert [env.step(0)[1:4] for _ in range(2)] == [(0.0, False, False), (0.0, False, True)]
    options = dict(checkpoint=world_dir, temperature=0)
    envs = make_vec(num_envs=3, max_episode_steps=2, render_mode="rgb_array", **options)
    frames, _ = envs.reset(seed=1)
    assert envs.observation_space.contains(frames)
    assert envs.action_space.contains(envs.action_space.sample())
    clip = load_world(world_dir).start_frames[0].numpy()
    envs.reset(options={"frames": clip})
    actions = np.array([0, 1, 2])
    batch = [envs.step(actions), envs.step(actions)]
    assert [list(b[3]) for b in batch] == [[False] * 3, [True] * 3] and len(envs.render()) == 3
    single = gymnasium.make(NAME, **options)
    for i in range(3):
        alone = play(single, [i, i], options={"frames": clip})
        difference = np.abs(alone[-1].astype(int) - batch[-1][0][i])
        assert difference.mean() < 1  # batched sums may round differently
    after = envs.step(actions)  # begins a new episode
    starts = single.unwrapped.world.start_frames.numpy()
    assert not after[3].any()
    assert any(np.array_equal(after[0][0], start[-1]) for start in starts)


def test_bad_input(world_dir, tmp_path):
    with pytest.raises(CheckpointError, match="no world at"):
        gymnasium.make(NAME, checkpoint=str(tmp_path / "none"))
    env = gymnasium.make(NAME, checkpoint=world_dir)
    with pytest.raises(ValueError, match="frames of"):
        env.reset(options={"frames": np.zeros((32, 32, 3), dtype=np.uint8)})
    for frames in (np.zeros((64, 64, 3)), np.zeros((1, 4, 64, 64, 3), dtype=np.uint8)):
        with pytest.raises(ValueError, match="frames must be uint8"):
            env.reset(options={"frames": frames})
    envs = make_vec(num_envs=2, checkpoint=world_dir)
    for game in (env.unwrapped, envs):
        with pytest.raises(gymnasium.error.ResetNeeded):
            game.step(envs.action_space.sample())
    with pytest.raises(ValueError, match="2 worlds, but 3 clips"):
        envs.reset(options={"frames": np.zeros((3, 1, 64, 64, 3), dtype=np.uint8)})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action 8 is not one of 0 … 7"):
        env.unwrapped.step(8)
