"""A world to play: the three trained stages behind `reset` and `step`. It owns no network of its own.

A step costs the same for frame 10 and frame 10,000: both transformers that run at play keep the keys and values of their
last context_length - 1 finished frames and compute only the new one. This equals one pass over the whole history with a
causal band of context_length frames in every layer. Clips in training are one band long, so beyond that age a cached
frame has indirectly seen more past than any frame in training had; nothing else changes. A step is the same work on the same
memory each time, without a look at any value: on a GPU it is recorded once and replayed (CUDA graphs).
"""
import json
from pathlib import Path

import torch

from models.checkpoint import CheckpointError, build_model, check_fit, fingerprint, load_checkpoint
from models.untrusted import check_at_play


def read_action_table(path, lam_fingerprint):
    """The rows of actions.json as train_lam.py wrote it; [] where there is none for this LAM. Raises CheckpointError."""
    if not path.exists():
        return []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = [row | {"label": str(row["label"])} for row in table["actions"]]
        kinds = dict(share=(int, float), direction=str, moves=str)
        if not all(row["action"] == i and all(isinstance(row[name], kind) for name, kind in kinds.items()) for i, row in enumerate(rows)):
            raise ValueError("a row is not as it was written")
        return rows if table["lam"] == lam_fingerprint else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is not an action table; mend it, or remove it to play with numbers alone") from None


class WorldModel:
    """tokenizer, lam and dynamics in evaluation mode; lam is None when the dynamics was trained on true actions.

    start_frames uint8 (n, T, H, W, 3), if any, are places to begin from that travel with the world; fps is the footage's.
    action_table: the rows of actions.json, the legend of the latent actions, or []. capture: on CUDA, record a step once and replay it.
    identity: eight hex digits of the dynamics weights, "" where there is no checkpoint. reach: how many of the last frames a step depends on.
    """

    def __init__(self, tokenizer, lam, dynamics, start_frames=None, action_names=None, action_table=(), fps=15.0, steps=2, temperature=1.0, seed=0,
                 capture=True, identity=""):  # fmt: skip
        self.tokenizer, self.lam, self.dynamics = tokenizer, lam, dynamics
        self.start_frames, self.fps, self.steps, self.temperature = start_frames, fps, steps, temperature
        self.n_actions = dynamics.null_action
        names = ["".join(c if c.isprintable() else "?" for c in name) for name in action_names or []]  # some terminals obey what is not printed
        self.action_names = names + [str(i) for i in range(len(names), self.n_actions)]
        self.action_table, self.identity = action_table, identity
        self.reach = max(len(stack.blocks) * (stack.context_length - 1) for stack in (tokenizer.decoder, dynamics.transformer))
        self.frame_size = list(tokenizer.frame_size)
        self.device = next(tokenizer.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.capture = capture and self.device.type == "cuda"
        self.last = torch.zeros(0, device=self.device)  # no worlds yet

    @classmethod
    def load(cls, path, device="cpu", **settings):
        """The world in folder `path` (tokenizer.pt, lam.pt, dynamics.pt). Raises CheckpointError if they do not fit.

        settings: steps, temperature and seed; a missing one, or None, is the world's own.
        """
        path = Path(path)
        files = {stage: path / f"{stage}.pt" for stage in ("tokenizer", "lam", "dynamics")}
        if not path.is_dir():
            raise CheckpointError(f"no world at {path}: it must be a folder with tokenizer.pt, lam.pt and dynamics.pt")
        dynamics = load_checkpoint(files["dynamics"], "dynamics")
        stages = ["tokenizer"] + ["lam"] * ("lam" in dynamics.get("inputs", {}))
        loaded = {stage: load_checkpoint(files[stage], stage) for stage in stages}
        models = {s: build_model(c, files[s]).to(device) for s, c in {**loaded, "dynamics": dynamics}.items()}
        try:
            check_at_play(dynamics, models["tokenizer"].frame_size)
        except ValueError as error:
            raise CheckpointError(f"{files['dynamics']} {error}; run train_dynamics.py again") from None
        check_fit(loaded["tokenizer"], loaded.get("lam"), dynamics)
        table = read_action_table(path / "actions.json", fingerprint(loaded["lam"])) if "lam" in loaded else []
        if table and len(table) != models["dynamics"].null_action:
            raise CheckpointError(f"{path / 'actions.json'} names {len(table)} actions of {models['dynamics'].null_action}; mend it, or remove it to play with numbers alone")
        names = [row["label"] for row in table] or dynamics["action_names"]
        trained = {name: dynamics["config"][name] for name in ("steps", "temperature")}
        return cls(
            models["tokenizer"], models.get("lam"), models["dynamics"], dynamics["start_frames"], names, table, dynamics["fps"],
            identity=fingerprint(dynamics), **{**trained, **{name: value for name, value in settings.items() if value is not None}},
        )  # fmt: skip

    @torch.no_grad()
    def reset(self, frames, actions=None):
        """Begin after `frames`: uint8 (H, W, 3), (T, H, W, 3) or, for B worlds at once, (B, T, H, W, 3).

        actions (B, T-1) lie between them; without any the LAM infers them, and a world of true actions begins at the last
        frame alone. Raises ValueError for frames of another size.
        """
        frames = torch.as_tensor(frames, device=self.device)
        self.begin(*self.encode(frames, actions), single=frames.ndim < 5)

    @torch.no_grad()
    def encode(self, frames, actions=None):
        """frames and actions as `reset` takes them → tokens (B, T, N), and the action that led to each frame (B, T)."""
        frames = torch.as_tensor(frames, device=self.device)
        while frames.ndim < 5:
            frames = frames.unsqueeze(0)
        if list(frames.shape[2:]) != [*self.frame_size, 3]:
            raise ValueError(f"this world has frames of {[*self.frame_size, 3]}, not {list(frames.shape[2:])}")
        if actions is None and self.lam is None:  # how these frames came about cannot be known: begin at the last
            frames = frames[:, -1:]
        video = frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1  # (B, T, 3, H, W)
        B, T = video.shape[:2]
        if actions is None:
            actions = self.lam.infer(video) if T > 1 else torch.zeros(B, 0, dtype=torch.long, device=self.device)
        return self.tokenizer.encode(video), self.dynamics.led_to(torch.as_tensor(actions, device=self.device))

    @torch.no_grad()
    def begin(self, tokens, led_to, single=False):
        """Begin after tokens (B, T, N), each led to by an action (B, T). single: `step` gives and takes one world without the axis B."""
        self.single, (B, T) = single, tokens.shape[:2]
        if len(self.last) != B:
            self._make_room(tokens[:, -1], led_to[:, -1])
        for cache in self.pixel_cache + self.cache:
            cache.clear()
        self.tokenizer.decode(tokens, self.pixel_cache)
        if T > 1:
            self.dynamics.prefill(tokens[:, :-1], led_to, self.cache)
        self.last.copy_(tokens[:, -1])
        self.last_action.copy_(led_to[:, -1])

    @torch.no_grad()
    def follow(self, tokens, action):
        """A step whose outcome is known: tokens (B, N) come next, led to by action (B,). → uint8 frames, as from `step`."""
        self.dynamics.prefill(self.last.unsqueeze(1), torch.stack([self.last_action, action], dim=1), self.cache)
        self.last.copy_(tokens)
        self.last_action.copy_(action)
        return self._shown(self._pixels(tokens))

    def _make_room(self, tokens, led_to):
        """Memory for as many worlds as tokens (B, N); steps write in place, so a recorded step finds it again."""
        self.pixel_cache, self.cache = self.tokenizer.new_cache(), self.dynamics.new_cache()
        self.last, self.last_action, self.action = tokens.clone(), led_to.clone(), torch.zeros_like(led_to)
        self.replay = None
        if self.capture:
            with torch.cuda.device(self.device):
                self.replay = self._record()

    def _record(self):
        """Run `_advance` a few times, as the manual asks, record it as a CUDA graph, and put back the dice. → what replays it."""
        dice, stream, graph, cached = self.generator.get_state(), torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.is_autocast_cache_enabled()
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(False)  # weights cast outside the graph would be gone when it is replayed
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self.frames = self._advance()
        torch.set_autocast_cache_enabled(cached)
        self.generator.set_state(dice)
        return graph.replay

    def _advance(self):
        """One frame of every world, on the device: uint8 (B, H, W, 3)."""
        tokens = self.dynamics.next_frame(
            self.last, self.last_action, self.action, self.cache, self.steps, self.temperature, self.generator
        )
        self.last.copy_(tokens)
        self.last_action.copy_(self.action)
        return self._pixels(tokens)

    def _pixels(self, tokens):
        frames = self.tokenizer.decode(tokens.unsqueeze(1), self.pixel_cache)[:, 0]  # (B, 3, H, W)
        return ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1)

    def _shown(self, frames):
        frames = frames.cpu().numpy()
        return frames[0] if self.single else frames

    @torch.no_grad()
    def step(self, action):
        """action: an int or, for B worlds, (B,) → the next frame, uint8 (H, W, 3) or (B, H, W, 3), on the CPU."""
        action = torch.as_tensor(action).reshape(-1).expand(len(self.last))
        if action.device.type == "cpu":  # a value on the device is not looked at: that would wait for it
            wrong = action[(action < 0) | (action >= self.n_actions)]
            if len(wrong):
                raise ValueError(f"action {int(wrong[0])} is not one of 0 … {self.n_actions - 1}")
        self.action.copy_(action)
        if self.replay is None:
            self.frames = self._advance()
        else:
            self.replay()
        return self._shown(self.frames)
