"""A world to play: the three trained networks behind `reset` and `step`.

A step costs the same for frame 10 and frame 10,000: both transformers that run while playing keep
the keys and values of their last context_length - 1 finished frames and compute only the new one.
This equals one pass over the whole history with a causal band of context_length frames in every
layer. A step is the same work on the same memory each time and looks at no value, so on a GPU it
can be captured as a CUDA graph.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray | Tensor


class WorldModel:
    """tokenizer, lam and dynamics in evaluation mode.

    lam is None when the dynamics was trained on true actions. start_frames: uint8
    (n, T, H, W, 3), prompts that travel with the world, or None. fps: of the training videos.
    action_table: the rows of actions.json, or []. capture(step, generator) → a faster step.
    identity: eight hex digits of the dynamics weights. reach: how many of the last frames a step
    depends on.
    """

    def __init__(
        self,
        tokenizer: nn.Module,
        lam: nn.Module | None,
        dynamics: nn.Module,
        start_frames: Tensor | None = None,
        action_names: list[str] | None = None,
        action_table: list[dict] | tuple = (),
        fps: float = 15.0,
        steps: int = 2,
        temperature: float = 1.0,
        seed: int = 0,
        capture: Callable | None = None,
        identity: str = "",
    ):
        self.tokenizer, self.lam, self.dynamics = tokenizer, lam, dynamics
        self.start_frames, self.fps = start_frames, fps
        self.steps, self.temperature = steps, temperature
        self.n_actions = dynamics.n_actions
        names = list(action_names or ())
        self.action_names = names + [str(i) for i in range(len(names), self.n_actions)]
        self.action_table, self.identity = action_table, identity
        stacks = (tokenizer.decoder, dynamics.transformer)
        self.reach = max(len(stack.blocks) * (stack.context_length - 1) for stack in stacks)
        self.frame_size = list(tokenizer.frame_size)
        self.device = next(tokenizer.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.capture = capture
        self.single = True  # one world, without the axis B
        self.last = torch.zeros(0, device=self.device)  # tokens of the last frame; no world yet
        self.last_action = self.action = None
        self.pixel_cache, self.cache, self.advance = [], [], self._advance

    def twin(self, seed: int = 0) -> "WorldModel":
        """A world with the same networks, but memory and random numbers of its own."""
        world = copy.copy(self)
        world.generator = torch.Generator(self.device).manual_seed(seed)
        world.last, world.advance = self.last[:0], world._advance
        return world

    @torch.no_grad()
    def reset(self, frames: Array, actions: Array | None = None) -> None:
        """Begin after `frames`: uint8 (H, W, 3), (T, H, W, 3) or, for B worlds, (B, T, H, W, 3).

        actions (B, T-1) lie between them; without any the LAM infers them, and a world of true
        actions begins at the last frame alone. Raises ValueError for frames of another size.
        """
        self.prime(*self.encode(frames, actions), single=frames.ndim < 5)

    @torch.no_grad()
    def encode(self, frames: Array, actions: Array | None = None) -> tuple[Tensor, Tensor]:
        """Frames as `reset` takes them → tokens (B, T, N), the action before each frame (B, T)."""
        frames = torch.as_tensor(frames, device=self.device)
        while frames.ndim < 5:
            frames = frames.unsqueeze(0)
        wanted, found = [*self.frame_size, 3], list(frames.shape[2:])
        if found != wanted:
            raise ValueError(f"this world has frames of {wanted}, not {found}")
        if actions is None and self.lam is None:  # no action is known: begin at the last frame
            frames = frames[:, -1:]
        video = frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1  # (B, T, 3, H, W)
        B, T = video.shape[:2]
        if actions is None:
            actions = torch.zeros(B, 0, dtype=torch.long, device=self.device)
            if T > 1:
                actions = self.lam.infer(video)
        actions = torch.as_tensor(actions, device=self.device)
        return self.tokenizer.encode(video), self.dynamics.previous_actions(actions)

    @torch.no_grad()
    def prime(self, tokens: Tensor, previous_actions: Tensor, single: bool = False) -> None:
        """Begin after tokens (B, T, N) and the action before each frame (B, T).

        single: `step` gives and takes one world without the axis B.
        """
        self.single = single
        if len(self.last) != len(tokens):
            self._allocate(tokens[:, -1], previous_actions[:, -1])
        for cache in self.pixel_cache + self.cache:
            cache.clear()
        self.tokenizer.decode(tokens, self.pixel_cache)
        if tokens.shape[1] > 1:
            self.dynamics.prefill(tokens[:, :-1], previous_actions, self.cache)
        self.last.copy_(tokens[:, -1])
        self.last_action.copy_(previous_actions[:, -1])

    @torch.no_grad()
    def teacher_force(self, tokens: Tensor, action: Tensor) -> np.ndarray:
        """A step with a known outcome: tokens (B, N) after action (B,). → frames as from `step`."""
        actions = torch.stack([self.last_action, action], dim=1)
        self.dynamics.prefill(self.last.unsqueeze(1), actions, self.cache)
        self.last.copy_(tokens)
        self.last_action.copy_(action)
        return self._to_numpy(self._decode(tokens))

    @torch.no_grad()
    def step(self, action: int | Sequence[int] | Array) -> np.ndarray:
        """action: an int or, for B worlds, (B,) → the next frame, uint8 ([B,] H, W, 3)."""
        action = torch.as_tensor(action).reshape(-1).expand(len(self.last))
        if action.device.type == "cpu":  # looking at a value on the GPU would wait for it
            wrong = action[(action < 0) | (action >= self.n_actions)]
            if len(wrong):
                last = self.n_actions - 1
                raise ValueError(f"action {int(wrong[0])} is not one of 0 … {last}")
        self.action.copy_(action)
        return self._to_numpy(self.advance())

    def _allocate(self, tokens, previous_action):
        """Memory for as many worlds as tokens (B, N). Steps write in place, for CUDA graphs."""
        self.pixel_cache, self.cache = self.tokenizer.new_cache(), self.dynamics.new_cache()
        self.last, self.last_action = tokens.clone(), previous_action.clone()
        self.action = torch.zeros_like(previous_action)
        self.advance = self._advance
        if self.capture:
            self.advance = self.capture(self._advance, self.generator)

    def _advance(self):
        """One frame of every world, on the device: uint8 (B, H, W, 3)."""
        state = (self.last, self.last_action, self.action, self.cache)
        sampling = dict(steps=self.steps, temperature=self.temperature, generator=self.generator)
        tokens = self.dynamics.next_frame(*state, **sampling)
        self.last.copy_(tokens)
        self.last_action.copy_(self.action)
        return self._decode(tokens)

    def _decode(self, tokens):
        frames = self.tokenizer.decode(tokens.unsqueeze(1), self.pixel_cache)[:, 0]  # (B, 3, H, W)
        return ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1)

    def _to_numpy(self, frames):
        frames = frames.cpu().numpy()
        return frames[0] if self.single else frames
