"""A trained world as a Gymnasium environment for agents; needs `pip install ".[gym]"`.

    import gymnasium
    import player.gym_env

    name = "nanoworld/World-v0"
    world = dict(checkpoint="checkpoints/pong", render_mode="rgb_array")
    env = gymnasium.make(name, **world)
    envs = gymnasium.make_vec(
        name, num_envs=64, vectorization_mode="vector_entry_point", **world
    )

Actions are latent actions, observations are generated frames. Video alone defines no goal, so the
reward is always 0 and no episode terminates. An episode is truncated after `max_episode_steps`
[1000]. reset(options={"frames": …}) starts after your frames, uint8 (H, W, 3) or (T, H, W, 3).
Without them it starts after one of the clips stored with the world. The name
`player.gym_env:nanoworld/World-v0` needs no import of this module.
"""

from utils.checkpoint import load_world
from utils.device import choose_device

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from models.world_model import WorldModel
from player.cuda_graph import graph_on
from player.session import DEFAULT

gymnasium.register(
    "nanoworld/World-v0",
    entry_point="player.gym_env:WorldModelEnv",
    vector_entry_point="player.gym_env:WorldModelVectorEnv",
    max_episode_steps=1000,
)


def load(checkpoint, device, steps, temperature) -> tuple[WorldModel, Box, Discrete]:
    """→ the world, its observation space, its action space. Raises UserError as play.py does."""
    settings = dict(steps=steps, temperature=temperature)
    device = choose_device(device)
    world = load_world(checkpoint, device, graph_on(device), **settings)
    return world, Box(0, 255, (*world.frame_size, 3), np.uint8), Discrete(world.n_actions)


def begin(world: WorldModel, rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """Start after uint8 frames (T, H, W, 3) or, for B worlds at once, (B, T, H, W, 3).

    → the last frame of each. `rng` seeds the world's random numbers.
    """
    world.generator.manual_seed(int(rng.integers(2**31)))
    world.reset(frames)
    return np.array(frames[..., -1, :, :, :])


def check_frames(frames: np.ndarray, ndim: int) -> None:
    if frames.dtype != np.uint8 or frames.ndim != ndim:
        raise ValueError(
            f"frames must be uint8 (H, W, 3) or (T, H, W, 3), not {frames.dtype} {frames.shape}"
        )


class WorldModelEnv(gymnasium.Env):
    """One world.

    steps: MaskGIT passes per frame. temperature: of sampling. None means the world's own value.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(
        self, checkpoint=str(DEFAULT), render_mode=None, device="auto", steps=None, temperature=None
    ):
        loaded = load(checkpoint, device, steps, temperature)
        self.world, self.observation_space, self.action_space = loaded
        self.metadata = self.metadata | {"render_fps": self.world.fps}
        self.render_mode, self.frame = render_mode, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        starts = self.world.start_frames.numpy()
        start = starts[self.np_random.integers(len(starts))]
        frames = np.asarray((options or {}).get("frames", start))
        if frames.ndim == 3:
            frames = frames[None]
        check_frames(frames, ndim=4)
        self.frame = begin(self.world, self.np_random, frames)
        return self.frame.copy(), {}

    def step(self, action):
        if self.frame is None:
            raise ResetNeeded("call reset() before step()")
        self.frame = self.world.step(int(action))
        return self.frame.copy(), 0.0, False, False, {}

    def render(self):
        if self.render_mode == "rgb_array" and self.frame is not None:
            return self.frame.copy()


class WorldModelVectorEnv(VectorEnv):
    """num_envs worlds in one batch.

    All episodes have the same length, so they end together. The next step starts new ones.
    """

    metadata = WorldModelEnv.metadata | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs=1,
        checkpoint=str(DEFAULT),
        render_mode=None,
        device="auto",
        steps=None,
        temperature=None,
        max_episode_steps=1000,
    ):
        loaded = load(checkpoint, device, steps, temperature)
        self.world, self.single_observation_space, self.single_action_space = loaded
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = self.metadata | {"render_fps": self.world.fps}
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.render_mode, self.frames = render_mode, None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        starts = self.world.start_frames.numpy()
        chosen = starts[self.np_random.integers(len(starts), size=self.num_envs)]
        frames = np.asarray((options or {}).get("frames", chosen))
        if frames.ndim < 5:  # one clip for all worlds
            frames = np.repeat(frames.reshape(1, -1, *frames.shape[-3:]), self.num_envs, axis=0)
        if len(frames) != self.num_envs:
            raise ValueError(
                f"there are {self.num_envs} worlds, but {len(frames)} clips to start from"
            )
        check_frames(frames, ndim=5)
        self.frames = begin(self.world, self.np_random, frames)
        return self.frames.copy(), {}

    def step(self, actions):
        if self.frames is None:
            raise ResetNeeded("call reset() before step()")
        rewards, terminated = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
        if self.elapsed == self.max_episode_steps:
            return self.reset()[0], rewards, terminated, terminated.copy(), {}
        self.elapsed += 1
        self.frames = self.world.step(np.asarray(actions))
        truncated = np.full(self.num_envs, self.elapsed == self.max_episode_steps)
        return self.frames.copy(), rewards, terminated, truncated, {}

    def render(self):
        if self.render_mode == "rgb_array" and self.frames is not None:
            return tuple(self.frames.copy())
