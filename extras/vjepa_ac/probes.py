"""Probes: what can be learned from the frozen features? Four tasks, each with one number or two.

The same small transformer learns from each kind of input: V-JEPA features, raw patches of pixels,
and the codes of this project's video tokenizer. All inputs are (n, T/2, N, D): clips, tubelets,
patches, numbers.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from extras.vjepa_ac.doom import PLACES, Doom, Player
from extras.vjepa_ac.model import PATCH, TUBELET, Encoder, Transformer, positions
from extras.vjepa_ac.vpt import DEGREES_PER_PIXEL, KEYS, RATE, ProcessVPT
from models.video_tokenizer import VideoTokenizer

# columns of an action: how far the view turned, and whether w was pressed
TURN, WALK = 2, KEYS["key.keyboard.w"]
# in degrees: borders of the nine turns from which the policy chooses
BINS = torch.linspace(-36, 36, 10)[1:-1]


def inputs_of(encoder: Encoder, tokenizer: VideoTokenizer) -> dict[str, Callable]:
    """The three kinds of input, each a function video uint8 (B, T, 3, S, S) → (B, T/2, N, D).

    Neighbouring codes of the tokenizer are joined, so that they cover about as much as a patch.
    """

    def pixels(video):
        sizes = dict(p=TUBELET, q=PATCH, r=PATCH)
        return rearrange(video, "b (t p) c (h q) (w r) -> b t (h w) (p c q r)", **sizes)

    def codes(video):
        B = len(video)
        frames = F.interpolate(video.flatten(0, 1).float(), tokenizer.frame_size, mode="area")
        tokens = tokenizer.encode((frames / 127.5 - 1)[:, None])  # each frame alone
        codes = tokenizer.quantizer.indices_to_codes(tokens)[:, 0]  # (B·T, N, 5)
        side = math.isqrt(codes.shape[1])
        k = math.gcd(side, max(1, side // encoder.grid))
        sizes = dict(b=B, p=TUBELET, h=side // k, q=k, r=k)
        # (B, T/2, N, 2·k·k·5): joined codes of the two frames of a tubelet
        return rearrange(codes, "(b t p) (h q w r) d -> b t (h w) (p q r d)", **sizes)

    return {"V-JEPA features": encoder.each_tubelet, "raw pixels": pixels, "tokenizer codes": codes}


class Probe(Transformer):
    """x (B, T, N, D) → (B, outputs).

    Channels are standardised. Then come two blocks of width 128 in which every token sees all
    others, the mean over tokens, and a linear map.
    """

    def __init__(self, x: Tensor, outputs: int):
        super().__init__(128, 2, 2)
        flat = x.flatten(0, -2).float()
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("std", flat.std(0) + 1e-3)
        self.embed, self.out = nn.Linear(x.shape[-1], 128), nn.Linear(128, outputs)
        self.places = positions(x.shape[1], *[round(x.shape[2] ** 0.5)] * 2)
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed((x.float() - self.mean) / self.std)  # (B, T, N, 128)
        return self.out(self.apply_blocks(x.flatten(1, 2), self.places).mean(1))


def fit(
    x: Callable, rows: Tensor, outputs: int, loss: Callable, n_updates: int = 300, seed: int = 0
) -> Probe:
    """Train a probe: x(rows) → inputs (B, T, N, D); loss(prediction, rows) → scalar."""
    torch.manual_seed(seed)
    probe = Probe(x(rows[torch.randperm(len(rows))[:512]]), outputs)
    optimizer = torch.optim.AdamW(probe.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, n_updates)
    for _ in range(n_updates):
        chosen = rows[torch.randint(len(rows), (64,))]
        loss(probe(x(chosen)), chosen).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def predict(probe: Probe, x: Callable, rows: Tensor) -> Tensor:
    return torch.cat([probe(x(part)) for part in rows.split(256)])


def clip_tubelet_pairs(clips: int, tubelets: int) -> Tensor:
    """→ (clips · tubelets, 2): the indices of every pair of a clip and a tubelet."""
    return torch.cartesian_prod(torch.arange(clips), torch.arange(tubelets))


def explain_actions(
    train: dict, test: dict, kind: str, ahead: int, tubelets: int, fits: int = 1
) -> dict[str, float]:
    """From `tubelets` tubelets in a row: which action begins `ahead` tubelets after the first?

    → share of the turn's variance explained (R²), and accuracy for walking. Both are means over
    `fits` probes with different initial weights.
    """

    def side(data):
        features, actions = data[kind], data["actions"]
        rows = clip_tubelet_pairs(len(features), actions.shape[1] - ahead)

        def x(rows):
            clip, first = rows.T
            return torch.stack([features[clip, first + i] for i in range(tubelets)], dim=1)

        return x, rows, lambda rows: actions[rows[:, 0], rows[:, 1] + ahead]

    x, rows, action = side(train)
    scale = action(rows)[:, TURN].std()

    def loss(guess, rows):
        truth = action(rows)
        turn = F.mse_loss(guess[:, 0], truth[:, TURN] / scale)
        return turn + F.binary_cross_entropy_with_logits(guess[:, 1], truth[:, WALK])

    learned = [fit(x, rows, 2, loss, seed=seed) for seed in range(fits)]
    x, rows, action = side(test)
    guess = torch.stack([predict(probe, x, rows) for probe in learned])  # (fits, rows, 2)
    truth = action(rows)
    left = ((guess[..., 0] * scale - truth[:, TURN]) ** 2).mean() / truth[:, TURN].var()
    walk = (guess[..., 1] > 0) == (truth[:, WALK] > 0)
    return {"turn_r2": float(1 - left), "walk_accuracy": float(walk.float().mean())}


def inverse_dynamics(train: dict, test: dict, kind: str) -> dict[str, float]:
    """From two tubelets in a row: which action lay between them?

    The mean of three fits, because single ones vary: R² from pixels was 0.36, 0.42 and 0.43.
    """
    return explain_actions(train, test, kind, ahead=0, tubelets=2, fits=3)


def anticipation(train: dict, test: dict, kind: str) -> dict[str, float]:
    """From one tubelet: which action comes after the one that begins with it?"""
    return explain_actions(train, test, kind, ahead=1, tubelets=1)


def classification(train: dict, test: dict, kind: str) -> dict[str, float]:
    """From the mean over a clip: in which place of doom.py was it recorded?

    For Minecraft the classes would be tasks or biomes.
    """
    pooled = [data[kind].float().mean(1, keepdim=True) for data in (train, test)]
    rows, label = torch.arange(len(pooled[0])), train["place"]

    def loss(guess, rows):
        return F.cross_entropy(guess, label[rows])

    probe = fit(lambda rows: pooled[0][rows], rows, int(label.max()) + 1, loss, n_updates=200)
    rows = torch.arange(len(pooled[1]))
    guess = predict(probe, lambda rows: pooled[1][rows], rows).argmax(1)
    return {"accuracy": float((guess == test["place"]).float().mean())}


def clone_behaviour(train: dict, kind: str) -> Callable:
    """A policy that imitates the recorded player.

    → function of inputs (1, 1, N, D) and a generator → (turn in degrees, is w pressed), sampled.
    """
    features, actions = train[kind], train["actions"]
    rows = clip_tubelet_pairs(len(features), actions.shape[1] - 1)

    def loss(guess, rows):
        truth = actions[rows[:, 0], rows[:, 1] + 1]
        bins = torch.bucketize(truth[:, TURN].contiguous(), BINS)
        walk = F.binary_cross_entropy_with_logits(guess[:, -1], truth[:, WALK])
        return F.cross_entropy(guess[:, :-1], bins) + walk

    probe = fit(lambda rows: features[rows[:, 0], rows[:, 1], None], rows, len(BINS) + 2, loss)

    @torch.no_grad()
    def policy(x, generator):
        guess = probe(x)[0]
        turn = int(torch.multinomial(guess[:-1].softmax(0), 1, generator=generator))
        walk = float(torch.rand((), generator=generator)) < float(guess[-1].sigmoid())
        return float(-36 + 8 * turn + 4), walk

    return policy


def blind_policy(train: dict) -> Callable:
    """A policy that draws recorded actions at random and ignores its inputs."""
    actions = train["actions"].flatten(0, 1)

    def policy(x, generator):
        action = actions[int(torch.randint(len(actions), (), generator=generator))]
        return float(action[TURN]), bool(action[WALK] > 0)

    return policy


def ground_covered(
    policy: Callable | None,
    inputs: Callable,
    size: int,
    process: ProcessVPT,
    episodes: int = 6,
    tubelets: int = 40,
) -> float:
    """How many map squares of 64 × 64 units does a policy enter per minute of play?

    policy None is the recorder's player itself.
    """
    total, played, generator = 0, 0, torch.Generator().manual_seed(0)

    def choose(frames):
        video = torch.from_numpy(np.stack(frames[-TUBELET:])).permute(0, 3, 1, 2)[None]
        turn, walk = policy(inputs(video), generator)
        dx = round(turn / DEGREES_PER_PIXEL / process.skip)
        return {"dx": dx, "keys": ["w"] if walk else []}

    for place in PLACES:
        game = Doom(place, 4242)
        for episode in range(episodes // len(PLACES)):
            game.reset(1000 + episode)
            player, action, frames = Player(np.random.default_rng(episode)), {}, []
            squares = set()
            for tick in range(tubelets * process.skip):
                picture, seen = game.observe()
                squares.add((seen["position"][0] // 64, seen["position"][2] // 64))
                if tick % process.stride == 0:
                    frames.append(cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA))
                played += 1
                if game.step(player.step(seen) if policy is None else action):
                    break  # the player has reached the exit
                if policy and tick % process.skip == process.skip - 1:
                    action = choose(frames)  # the tubelet is complete
            total += len(squares)
        game.close()
    return total / (played / RATE / 60)
