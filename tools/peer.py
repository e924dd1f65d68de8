"""Time tinyworlds (github.com/AlmondGod/tinyworlds, at a99f3a8) as tools/bench.py times this code.

    PYTHONPATH=../tinyworlds python tools/peer.py

It prints JSON, and runs alone, because its packages have the same names as ours. Its own models at
--peer-size: 64×64, patch 8, E 128, hidden 512, 4 blocks and heads, 8 clips of 4 frames; AdamW, and
bfloat16 as in its training configuration, without compilation. Play: the 4 frames before, 10
MaskGIT passes over all of them, then pixels.
"""

import json
import time

import torch


def median_seconds(action, repeats=12, warm_up=4):
    durations = []
    for _ in range(warm_up + repeats):
        began = time.perf_counter()
        action()
        durations.append(time.perf_counter() - began)
    return sorted(durations[warm_up:])[repeats // 2]


def peer_models():
    """Its tokenizer, latent action model and dynamics model, untrained."""
    from models.dynamics import DynamicsModel
    from models.latent_actions import LatentActionModel
    from models.video_tokenizer import VideoTokenizer

    sizes = dict(
        frame_size=(64, 64), patch_size=8, embed_dim=128, num_heads=4, hidden_dim=512, num_blocks=4
    )
    tokenizer = VideoTokenizer(**sizes, latent_dim=5, num_bins=4)
    lam = LatentActionModel(**sizes, n_actions=8)
    return tokenizer, lam, DynamicsModel(**sizes, num_bins=4, latent_dim=5, conditioning_dim=3)


def train_step(model, loss_of):
    """→ a function without arguments: one update of the model."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main():
    tokenizer, lam, dynamics = peer_models()
    frames = torch.rand(8, 4, 3, 64, 64) * 2 - 1
    latents_of = tokenizer.quantizer.get_latents_from_indices

    def dynamics_loss():  # its trainer runs both frozen models on each batch
        with torch.no_grad():
            tokens = tokenizer.tokenize(frames)
            actions = lam.quantizer(lam.encoder(frames))
            actions = torch.cat([torch.zeros_like(actions[:, :1]), actions], dim=1)
        return dynamics(latents_of(tokens), training=True, conditioning=actions, targets=tokens)[2]

    @torch.no_grad()
    def play_step():
        latents = latents_of(tokenizer.tokenize(frames[:1]))
        sampling = dict(conditioning=torch.zeros(1, 5, 3), temperature=1.0)
        new = dynamics.eval().forward_inference(latents, 1, 10, latents_of, **sampling)
        tokenizer.detokenize(new)

    losses = {
        "tokenizer": (tokenizer, lambda: tokenizer(frames)[0]),
        "lam": (lam, lambda: lam(frames)[0]),
        "dynamics": (dynamics, dynamics_loss),
    }
    result = {
        f"train/{name}_frames_per_s": 32 / median_seconds(train_step(model, loss_of))
        for name, (model, loss_of) in losses.items()
    }
    result["train/dynamics_uncached_frames_per_s"] = result["train/dynamics_frames_per_s"]
    result["play/fps_b1"] = 1 / median_seconds(play_step)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
