"""What a GPU must not change: `python -m pytest -m gpu` on a machine that has one.

With -m slow the same checks run on the CPU, where they can.
"""

import math

from utils.checkpoint import load_checkpoint

import cv2
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, randomise
from test_trust import train
from test_world_model import pictures, small_world

import play
import validate
from models.dynamics import DynamicsModel
from models.latent_action_model import LatentActionModel
from models.video_tokenizer import VideoTokenizer
from models.world_model import WorldModel

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
CPU = pytest.param("cpu", marks=pytest.mark.slow)
FRAMES = dict(frame_size=[16, 16], patch_size=8)
MODELS = {
    "tokenizer": lambda: VideoTokenizer(levels=[4, 4], **FRAMES, **SIZES),
    "lam": lambda: LatentActionModel(n_actions=4, **FRAMES, **SIZES),
    "dynamics": lambda: DynamicsModel(grid=[2, 2], levels=[4, 4], n_actions=4, **SIZES),
}


def outputs(stage, model, device):
    """A differentiable output of a model in which nothing is drawn, rounded or masked at random."""
    generator = torch.Generator().manual_seed(5)
    frames = (2 * torch.rand(2, 6, 3, 16, 16, generator=generator) - 1).to(device)
    tokens = torch.randint(16, (2, 6, 4), generator=generator).to(device)
    actions = torch.randint(4, (2, 5), generator=generator).to(device)
    if stage == "tokenizer":
        return model._decode(model.quantizer.indices_to_codes(tokens))
    if stage == "lam":
        return model.decoder(frames[:, :-1], model.quantizer.indices_to_codes(actions))
    masked = torch.ones(2, 5, 4, dtype=torch.bool, device=device)
    return model.masked_logits(tokens, actions, masked)


def result(stage, device, network=lambda model: model, dtype=None):
    """Output and gradients of a small model, in float64 on the CPU."""
    torch.set_float32_matmul_precision("highest")  # a program that chose a GPU has set it to TF32
    model = randomise(MODELS[stage]()).to(device)
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        output = outputs(stage, network(model), device)
    output.float().square().mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return output.detach().double().cpu(), gradients.double().cpu()


def distance(a, b):
    """Of two tensors, relative to the second's size."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("stage", MODELS)
def test_numbers_are_those_of_float32_on_the_cpu(stage, device):
    """float32 to 1e-4.

    bfloat16 has 8 bits of mantissa: to 3 % of an output and 10 % of a gradient.
    """
    exact = result(stage, "cpu")
    assert max(map(distance, result(stage, device), exact)) < 1e-4
    output, gradient = map(distance, result(stage, device, dtype=torch.bfloat16), exact)
    assert output < 0.03 and gradient < 0.1


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("how", ["whole", "per block"])
def test_compiled_is_eager(how, device):
    def compiled(model):
        if how == "whole":
            model.transformer.compile()
        else:
            for block in model.transformer.blocks:
                block.compile()
        return model

    eager = result("dynamics", device)
    assert max(map(distance, result("dynamics", device, compiled), eager)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_cache_is_no_cache(device):
    """Frame by frame with the cache, and all at once without; 12 frames with a window of 4."""
    model = randomise(MODELS["dynamics"]()).to(device)
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(16, (3, 12, 4), generator=generator).to(device)
    actions = torch.randint(4, (3, 11), generator=generator).to(device)
    previous = model.previous_actions(actions)
    whole = model.hidden_states(tokens, previous)
    cache, parts = model.new_cache(), []
    for t in range(12):
        now = slice(t, t + 1)
        options = dict(cache=cache, finished=True)
        parts.append(model.hidden_states(tokens[:, now], previous[:, now], **options))
    assert distance(torch.cat(parts, dim=1), whole) < 1e-4


def played(device, capture, temperature):
    world = small_world(temperature=temperature)
    models = (model.to(device) for model in (world.tokenizer, world.lam, world.dynamics))
    settings = dict(steps=3, temperature=temperature, seed=7, capture=capture)
    world = WorldModel(*models, **settings)
    frames = []
    for _ in range(2):  # twice, because a captured step must survive a reset
        world.reset(pictures(2, 3))
        frames += [torch.from_numpy(world.step([t % 4, 3 - t % 4]).copy()) for t in range(10)]
    assert not capture or world.replay_graph is not None
    return torch.stack(frames)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_captured_step_is_the_step(temperature):
    assert torch.equal(played("cuda", True, temperature), played("cuda", False, temperature))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_training_goes_on_under_autocast(device, recording, tmp_path):
    """Twelve updates at once, or with a power cut in the eighth: the same weights.

    But for the order of sums in bfloat16.
    """
    options = ["--data-path", recording, "--device", device, "--dtype", "bfloat16"]
    train("tokenizer", tmp_path / "whole", *options)
    train("tokenizer", tmp_path / "cut", *options, cut=8)
    train("tokenizer", tmp_path / "cut", *options, "--resume")
    paths = [tmp_path / name / "tokenizer.pt" for name in ("whole", "cut")]
    once, again = (load_checkpoint(path, "tokenizer") for path in paths)
    assert once["step"] == again["step"] == 12
    for name, weight in once["model"].items():
        if weight.norm() > 0:
            assert distance(again["model"][name].double(), weight.double()) < 0.01


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_from_a_recording_to_a_film(device, recording, tmp_path):
    """The commands as they are typed, with a small model."""
    out, options = str(tmp_path / "world"), ["--data-path", recording, "--device", device]
    for stage in MODELS:
        train(stage, out, *options)
    few = ["--clips", "8", "--classifier-updates", "2", "--val-fraction", "0.5"]
    report = validate.main(["--checkpoint", out, *options, *few])
    for name in ("lam/nmi_classifier", "dynamics/delta_psnr_t4"):
        assert math.isfinite(report[name])
    gif = str(tmp_path / "film.gif")
    shown = ["--actions", "0,1,2,3", "--save", gif]
    play.main(["--checkpoint", out, "--device", device, *shown])
    film = cv2.VideoCapture(gif)
    assert sum(iter(film.grab, False)) > 4


def test_the_same_output_is_not_random():
    """The checks above compare something: a model with other weights is far away."""
    a, b = (outputs("dynamics", randomise(MODELS["dynamics"](), i), "cpu") for i in range(2))
    assert distance(a, b) > 0.5 and F.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 0.9
