"""What the frozen features are good for: the seed's four uses, each a small function with a number.

The same small transformer learns from each kind of input: V-JEPA features, raw patches of pixels, and the codes of this project's video
tokenizer. All inputs are (n, T/2, N, D): clips, tubelets, places in the picture, numbers.
"""
import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from extras.vjepa_ac.doom import PLACES, Doom, Player
from extras.vjepa_ac.model import PATCH, TUBELET, Transformer, positions
from extras.vjepa_ac.vpt import DEGREES_PER_PIXEL, KEYS, RATE

TURN, WALK = 2, KEYS["key.keyboard.w"]  # where an action says how far the view turned, and whether w was pressed
BINS = torch.linspace(-36, 36, 10)[1:-1]  # degrees: borders of the nine turns between which the policy chooses


def inputs_of(encoder, tokenizer):
    """The three kinds of input, each a function video uint8 (B, T, 3, S, S) → (B, T/2, N, D).

    As many codes as fit are put together, so that a place is about as large as a patch.
    """

    def pixels(video):
        return rearrange(video, "b (t p) c (h q) (w r) -> b t (h w) (p c q r)", p=TUBELET, q=PATCH, r=PATCH)

    def codes(video):
        B, T = video.shape[:2]
        frames = F.interpolate(video.flatten(0, 1).float(), tokenizer.frame_size, mode="area")
        codes = tokenizer._encode((frames / 127.5 - 1)[:, None])[:, 0]  # (B·T, N, 5), each frame alone
        side = math.isqrt(codes.shape[1])
        k = math.gcd(side, max(1, side // encoder.grid))
        return rearrange(codes, "(b t p) (h q w r) d -> b t (h w) (p q r d)", b=B, p=TUBELET, h=side // k, q=k, r=k)

    return {"V-JEPA features": encoder.each_tubelet, "raw pixels": pixels, "tokenizer codes": codes}


class Probe(Transformer):
    """x (B, T, N, D) → (B, outputs): channels standardised, two blocks of width 128 in which all tokens see all, their mean, a linear map."""

    def __init__(self, x, outputs):
        super().__init__(128, 2, 2)
        flat = x.flatten(0, -2).float()
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("std", flat.std(0) + 1e-3)
        self.embed, self.out = nn.Linear(x.shape[-1], 128), nn.Linear(128, outputs)
        self.places = positions(x.shape[1], *[round(x.shape[2] ** 0.5)] * 2)
        self.start()

    def forward(self, x):
        x = self.embed((x.float() - self.mean) / self.std)
        return self.out(self.run(x.flatten(1, 2), self.places).mean(1))


def fit(x, rows, outputs, loss, n_updates=300, seed=0):
    """Train a probe: x(rows) → inputs (B, T, N, D); loss(prediction, rows) → number."""
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
def predict(probe, x, rows):
    return torch.cat([probe(x(part)) for part in rows.split(256)])


def numbered(clips, tubelets):
    """(clips · tubelets, 2): every pair of a clip and a tubelet."""
    return torch.cartesian_prod(torch.arange(clips), torch.arange(tubelets))


def explain_actions(train, test, kind, ahead, tubelets, fits=1):
    """Which action? From `tubelets` tubelets on, about the action that begins `ahead` of the first. → share of the turn explained (R²), walking told right.

    Both are means over `fits` probes from different beginnings.
    """

    def side(data):
        features, actions = data[kind], data["actions"]
        rows = numbered(len(features), actions.shape[1] - ahead)
        x = lambda rows: torch.stack([features[rows[:, 0], rows[:, 1] + i] for i in range(tubelets)], dim=1)  # noqa: E731
        return x, rows, lambda rows: actions[rows[:, 0], rows[:, 1] + ahead]

    x, rows, action = side(train)
    scale = action(rows)[:, TURN].std()

    def loss(guess, rows):
        truth = action(rows)
        return F.mse_loss(guess[:, 0], truth[:, TURN] / scale) + F.binary_cross_entropy_with_logits(guess[:, 1], truth[:, WALK])

    learned = [fit(x, rows, 2, loss, seed=seed) for seed in range(fits)]
    x, rows, action = side(test)
    guess, truth = torch.stack([predict(probe, x, rows) for probe in learned]), action(rows)  # (fits, rows, 2)
    left = ((guess[..., 0] * scale - truth[:, TURN]) ** 2).mean() / truth[:, TURN].var()
    return {"turn_r2": float(1 - left), "walk_accuracy": float(((guess[..., 1] > 0) == (truth[:, WALK] > 0)).float().mean())}


def inverse_dynamics(train, test, kind):
    """From two tubelets in a row: which action lay between them? Three fits, because single ones scatter: pixels gave 0.36, 0.42 and 0.43."""
    return explain_actions(train, test, kind, ahead=0, tubelets=2, fits=3)


def anticipation(train, test, kind):
    """From one tubelet: which action comes next, after the one that has begun?"""
    return explain_actions(train, test, kind, ahead=1, tubelets=1)


def classification(train, test, kind):
    """From the mean over a clip: where is this? (The places of doom.py; for Minecraft, tasks or biomes.)"""
    pooled = [data[kind].float().mean(1, keepdim=True) for data in (train, test)]
    rows, label = torch.arange(len(pooled[0])), train["place"]
    probe = fit(lambda rows: pooled[0][rows], rows, int(label.max()) + 1, lambda guess, rows: F.cross_entropy(guess, label[rows]), n_updates=200)
    right = predict(probe, lambda rows: pooled[1][rows], torch.arange(len(pooled[1]))).argmax(1) == test["place"]
    return {"accuracy": float(right.float().mean())}


def clone_behaviour(train, kind):
    """A policy that imitates the recorded player. → function inputs (1, 1, N, D) → (turn in degrees, w pressed), drawn from what it thinks likely."""
    features, actions = train[kind], train["actions"]
    rows = numbered(len(features), actions.shape[1] - 1)

    def loss(guess, rows):
        truth = actions[rows[:, 0], rows[:, 1] + 1]
        bins = torch.bucketize(truth[:, TURN].contiguous(), BINS)
        return F.cross_entropy(guess[:, :-1], bins) + F.binary_cross_entropy_with_logits(guess[:, -1], truth[:, WALK])

    probe = fit(lambda rows: features[rows[:, 0], rows[:, 1], None], rows, len(BINS) + 2, loss)

    @torch.no_grad()
    def policy(x, dice):
        guess = probe(x)[0]
        turn = int(torch.multinomial(guess[:-1].softmax(0), 1, generator=dice))
        return float(-36 + 8 * turn + 4), float(torch.rand((), generator=dice)) < float(guess[-1].sigmoid())

    return policy


def blind_policy(train):
    """The same actions as the recorded player's, without looking."""
    actions = train["actions"].flatten(0, 1)

    def policy(x, dice):
        action = actions[int(torch.randint(len(actions), (), generator=dice))]
        return float(action[TURN]), bool(action[WALK] > 0)

    return policy


def ground_covered(policy, inputs, size, process, episodes=6, tubelets=40):
    """Play: how many fields of 64 × 64 units does a policy enter in a minute? policy None is the recorder's player itself."""
    total, played, dice = 0, 0, torch.Generator().manual_seed(0)
    for place in PLACES:
        game = Doom(place, 4242)
        for episode in range(episodes // len(PLACES)):
            game.begin(1000 + episode)
            player, fields, action, frames = Player(np.random.default_rng(episode)), set(), {}, []
            for tick in range(tubelets * process.skip):
                picture, seen = game.observe()
                fields.add((seen["position"][0] // 64, seen["position"][2] // 64))
                if tick % process.stride == 0:
                    frames.append(cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA))
                played += 1
                if game.step(player.step(seen) if policy is None else action):  # it has found the way out
                    break
                if policy and tick % process.skip == process.skip - 1:  # the tubelet is complete: what next?
                    video = torch.from_numpy(np.stack(frames[-TUBELET:])).permute(0, 3, 1, 2)[None]
                    turn, walk = policy(inputs(video), dice)
                    action = {"dx": round(turn / DEGREES_PER_PIXEL / process.skip), "keys": ["w"] if walk else []}
            total += len(fields)
        game.close()
    return total / (played / RATE / 60)
