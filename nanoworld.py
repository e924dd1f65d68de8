"""A trained world as a Gymnasium environment, for agents; `pip install ".[gym]"` brings Gymnasium.

    import gymnasium, nanoworld
    env = gymnasium.make("nanoworld/World-v0", checkpoint="checkpoints/pong", render_mode="rgb_array")
    envs = gymnasium.make_vec("nanoworld/World-v0", num_envs=64, vectorization_mode="vector_entry_point", checkpoint="checkpoints/pong")

Actions are the latent ones, observations the dreamed frames. Video alone says nothing about goals: the reward is always 0 and no episode
terminates; it is truncated after `max_episode_steps` [1000]. reset(options={"frames": …}) begins after frames of yours, uint8 (H, W, 3) or
(T, H, W, 3); without, after one of those that travel with the world. `nanoworld:nanoworld/World-v0` as a name needs no import.
"""
import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from config import choose_device
from models.world_model import WorldModel
from play import DEFAULT

gymnasium.register(
    "nanoworld/World-v0", entry_point="nanoworld:WorldModelEnv", vector_entry_point="nanoworld:WorldModelVectorEnv", max_episode_steps=1000
)


def load(checkpoint, device, steps, temperature):
    """→ the world and the two spaces of one game. Raises CheckpointError or UserError as play.py does."""
    world = WorldModel.load(checkpoint, choose_device(device), steps=steps, temperature=temperature)
    return world, Box(0, 255, (*world.frame_size, 3), np.uint8), Discrete(world.n_actions)


def begin(world, dice, frames, ndim):
    """Start worlds after frames, uint8 (T, H, W, 3) (ndim 4), or for B at once (B, T, H, W, 3) (ndim 5); → the last of each."""
    if frames.dtype != np.uint8 or frames.ndim != ndim:
        raise ValueError(f"frames must be uint8 (H, W, 3) or (T, H, W, 3), not {frames.dtype} {frames.shape}")
    world.generator.manual_seed(int(dice.integers(2**31)))
    world.reset(frames)
    return np.array(frames[..., -1, :, :, :])


class WorldModelEnv(gymnasium.Env):
    """One world. steps: MaskGIT passes per frame; temperature: of sampling; both the world's own where None."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, checkpoint=str(DEFAULT), render_mode=None, device="auto", steps=None, temperature=None):
        self.world, self.observation_space, self.action_space = load(checkpoint, device, steps, temperature)
        self.metadata = self.metadata | {"render_fps": self.world.fps}
        self.render_mode, self.frame = render_mode, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        starts = self.world.start_frames.numpy()
        frames = np.asarray((options or {}).get("frames", starts[self.np_random.integers(len(starts))]))
        self.frame = begin(self.world, self.np_random, frames[None] if frames.ndim == 3 else frames, ndim=4)
        return self.frame.copy(), {}

    def step(self, action):
        if self.frame is None:
            raise ResetNeeded("call reset() before step()")
        self.frame = self.world.step(int(action))
        return self.frame.copy(), 0.0, False, False, {}

    def render(self):
        return self.frame.copy() if self.render_mode == "rgb_array" and self.frame is not None else None


class WorldModelVectorEnv(VectorEnv):
    """num_envs worlds that run as one batch. All episodes are equally long, so they end together; the step after begins them anew."""

    metadata = WorldModelEnv.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self, num_envs=1, checkpoint=str(DEFAULT), render_mode=None, device="auto", steps=None, temperature=None, max_episode_steps=1000
    ):
        self.world, self.single_observation_space, self.single_action_space = load(checkpoint, device, steps, temperature)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = self.metadata | {"render_fps": self.world.fps}
        self.num_envs, self.render_mode, self.max_episode_steps, self.frames = num_envs, render_mode, max_episode_steps, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        starts, self.elapsed = self.world.start_frames.numpy(), 0
        frames = np.asarray((options or {}).get("frames", starts[self.np_random.integers(len(starts), size=self.num_envs)]))
        if frames.ndim < 5:  # one beginning for all
            frames = np.repeat(frames.reshape(1, -1, *frames.shape[-3:]), self.num_envs, axis=0)
        if len(frames) != self.num_envs:
            raise ValueError(f"there are {self.num_envs} worlds, but {len(frames)} clips to begin from")
        self.frames = begin(self.world, self.np_random, frames, ndim=5)
        return self.frames.copy(), {}

    def step(self, actions):
        if self.frames is None:
            raise ResetNeeded("call reset() before step()")
        no = np.zeros(self.num_envs, dtype=bool)
        if self.elapsed == self.max_episode_steps:
            return self.reset()[0], np.zeros(self.num_envs), no, no.copy(), {}
        self.elapsed += 1
        self.frames = self.world.step(np.asarray(actions))
        return self.frames.copy(), np.zeros(self.num_envs), no, np.full(self.num_envs, self.elapsed == self.max_episode_steps), {}

    def render(self):
        return tuple(self.frames.copy()) if self.render_mode == "rgb_array" and self.frames is not None else None
