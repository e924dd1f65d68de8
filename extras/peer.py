"""Time tinyworlds (github.com/AlmondGod/tinyworlds, measured at a99f3a8) as bench.py times this project; prints JSON.

    python extras/peer.py ../tinyworlds

Its own models at bench.py's --peer-size: 64×64, patch 8, E 128, hidden 512, 4 blocks and heads, 8 clips of 4 frames; AdamW, and bfloat16 as
in its training configuration, without compilation. Play: the 4 frames before, 10 MaskGIT passes over all of them, then pixels.
"""
import json
import sys
import time

import torch

sys.path.insert(0, sys.argv[1])
from models.latent_actions import LatentActionModel  # noqa: E402

from models.dynamics import DynamicsModel  # noqa: E402
from models.video_tokenizer import VideoTokenizer  # noqa: E402


def median_seconds(action, repeats=12, warm_up=4):
    durations = []
    for _ in range(warm_up + repeats):
        began = time.perf_counter()
        action()
        durations.append(time.perf_counter() - began)
    return sorted(durations[warm_up:])[repeats // 2]


def main():
    sizes = dict(frame_size=(64, 64), patch_size=8, embed_dim=128, num_heads=4, hidden_dim=512, num_blocks=4)
    tokenizer, lam = VideoTokenizer(**sizes, latent_dim=5, num_bins=4), LatentActionModel(**sizes, n_actions=8)
    dynamics = DynamicsModel(**sizes, num_bins=4, latent_dim=5, conditioning_dim=3)
    frames = torch.rand(8, 4, 3, 64, 64) * 2 - 1

    def train_step(model, loss_of):
        optimizer = torch.optim.AdamW(model.parameters())

        def step():
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def dynamics_loss():  # its trainer runs both frozen models on each batch
        with torch.no_grad():
            tokens = tokenizer.tokenize(frames)
            latents = tokenizer.quantizer.get_latents_from_indices(tokens)
            actions = lam.quantizer(lam.encoder(frames))
            actions = torch.cat([torch.zeros_like(actions[:, :1]), actions], dim=1)
        return dynamics(latents, training=True, conditioning=actions, targets=tokens)[2]

    result = {
        "train/tokenizer_frames_per_s": 32 / median_seconds(train_step(tokenizer, lambda: tokenizer(frames)[0])),
        "train/lam_frames_per_s": 32 / median_seconds(train_step(lam, lambda: lam(frames)[0])),
        "train/dynamics_frames_per_s": 32 / median_seconds(train_step(dynamics, dynamics_loss)),
    }
    result["train/dynamics_uncached_frames_per_s"] = result["train/dynamics_frames_per_s"]

    @torch.no_grad()
    def play_step():
        latents = tokenizer.quantizer.get_latents_from_indices(tokenizer.tokenize(frames[:1]))
        actions = torch.zeros(1, 5, 3)
        new = dynamics.eval().forward_inference(
            latents, 1, 10, tokenizer.quantizer.get_latents_from_indices, conditioning=actions, temperature=1.0
        )
        tokenizer.detokenize(new)

    result["play/fps_b1"] = 1 / median_seconds(play_step)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
