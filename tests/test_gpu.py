"""What a GPU must not change: `python -m pytest -m gpu` on a machine that has one; with -m slow the same checks run on the CPU, where they can."""
import math

import cv2
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, randomise
from test_trust import train
from test_world_model import pictures, small_world

import play
import validate
from models.checkpoint import load_checkpoint
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
    tokens, actions = torch.randint(16, (2, 6, 4), generator=generator).to(device), torch.randint(4, (2, 5), generator=generator).to(device)
    if stage == "tokenizer":
        return model._decode(model.quantizer.indices_to_codes(tokens))
    if stage == "lam":
        return model.decoder(frames[:, :-1], model.quantizer.indices_to_codes(actions))
    return model.masked_logits(tokens, actions, torch.ones(2, 5, 4, dtype=torch.bool, device=device))


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
    """float32 to 1e-4; bfloat16, with 8 bits of mantissa, to 3 % of an output and 10 % of a gradient."""
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
    tokens, actions = torch.randint(16, (3, 12, 4), generator=generator).to(device), torch.randint(4, (3, 11), generator=generator).to(device)
    led_to = model.led_to(actions)
    whole = model.states(tokens, model.condition(led_to))
    cache = model.new_cache()
    parts = [model.states(tokens[:, t : t + 1], model.condition(led_to[:, t : t + 1]), cache=cache, finished=True) for t in range(12)]
    assert distance(torch.cat(parts, dim=1), whole) < 1e-4


def played(device, capture, temperature):
    world = small_world(temperature=temperature)
    world = WorldModel(*(model.to(device) for model in (world.tokenizer, world.lam, world.dynamics)), steps=3, temperature=temperature, seed=7, capture=capture)
    frames = []
    for _ in range(2):  # twice, since a recorded step must survive a reset
        world.reset(pictures(2, 3))
        frames += [torch.from_numpy(world.step([t % 4, 3 - t % 4]).copy()) for t in range(10)]
    assert not capture or world.replay is not None
    return torch.stack(frames)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_recorded_step_is_the_step(temperature):
    assert torch.equal(played("cuda", True, temperature), played("cuda", False, temperature))


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_training_goes_on_under_autocast(device, recording, tmp_path):
    """Twelve updates at once, or with a power cut in the eighth: the same weights, but for the order of sums in bfloat16."""
    options = ["--data-path", recording, "--device", device, "--dtype", "bfloat16"]
    train("tokenizer", tmp_path / "whole", *options)
    train("tokenizer", tmp_path / "cut", *options, cut=8)
    train("tokenizer", tmp_path / "cut", *options, "--resume")
    once, again = (load_checkpoint(tmp_path / name / "tokenizer.pt", "tokenizer") for name in ("whole", "cut"))
    assert once["step"] == again["step"] == 12
    assert max(distance(again["model"][name].double(), x.double()) for name, x in once["model"].items() if x.norm() > 0) < 0.01


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_from_a_recording_to_a_film(device, recording, tmp_path):
    """The commands as they are typed, with a small model."""
    out, options = str(tmp_path / "world"), ["--data-path", recording, "--device", device]
    for stage in MODELS:
        train(stage, out, *options)
    report = validate.main(["--checkpoint", out, *options, "--clips", "8", "--classifier-updates", "2", "--val-fraction", "0.5"])
    assert math.isfinite(report["lam/nmi_ceiling"]) and math.isfinite(report["dynamics/delta_psnr_t4"])
    play.main(["--checkpoint", out, "--device", device, "--actions", "0,1,2,3", "--save", str(tmp_path / "film.gif")])
    film = cv2.VideoCapture(str(tmp_path / "film.gif"))
    assert sum(iter(film.grab, False)) > 4


def test_the_same_output_is_not_random():
    """The checks above compare something: a model with other weights is far away."""
    exact, other = MODELS["dynamics"](), MODELS["dynamics"]()
    a, b = outputs("dynamics", randomise(exact, 0), "cpu"), outputs("dynamics", randomise(other, 1), "cpu")
    assert distance(a, b) > 0.5 and F.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 0.9
