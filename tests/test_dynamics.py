import math

from utils.checkpoint import build_model, load_checkpoint

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, randomise

from data_utils import Clips, Dataset, dummy_world, to_float
from models.dynamics import DynamicsModel, maskgit_decode
from models.next_latent import NextLatentModel

SMALL = dict(grid=[1, 5], levels=[4, 4], n_actions=4, **SIZES)


def dynamics(**changes):
    return randomise(DynamicsModel(**SMALL | changes))


def clip(T=7):
    """→ tokens (2, T, 5), actions (2, T-1)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(16, (2, T, 5), generator=generator)
    return tokens, torch.randint(4, (2, T - 1), generator=generator)


def with_another_action(actions):
    """The same actions but for the one between frames 3 and 4."""
    other = actions.clone()
    other[:, 3] = (other[:, 3] + 1) % 4
    return other


def per_frame(difference):
    """How much each frame differs at most."""
    return difference.abs().amax(dim=(0, 2, 3))  # (B, T-1, N, V) → (T-1,), frames 1 … T-1


@pytest.mark.parametrize("adaln", [True, False])
def test_an_action_conditions_the_frame_it_produced_and_no_earlier_one(adaln):
    model, (tokens, actions) = dynamics(adaln=adaln), clip()
    masked = torch.ones(2, 6, 5, dtype=torch.bool)
    logits = model.masked_logits(tokens, actions, masked)
    others = model.masked_logits(tokens, with_another_action(actions), masked)
    difference = per_frame(logits - others)
    assert (difference[:3] < 1e-5).all()  # frames 1, 2, 3
    assert difference[3] > 1e-3  # frame 4


def test_a_masked_frame_sees_only_clean_earlier_frames():
    model, (tokens, actions) = dynamics(), clip()
    masked = torch.ones(2, 6, 5, dtype=torch.bool)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 5) % 16
    logits = model.masked_logits(tokens, actions, masked)
    difference = per_frame(logits - model.masked_logits(changed, actions, masked))
    assert (difference[:4] < 1e-5).all()  # frames 1 … 4: frame 4 must not see its own answer
    assert difference[4] > 1e-3  # frame 5 sees frame 4
    other_masks = masked.clone()
    other_masks[:, 2] = False  # frame 3 is unmasked: no other frame may notice
    difference = per_frame(logits - model.masked_logits(tokens, actions, other_masks))
    assert difference[2] > 1e-3 and (difference[[0, 1, 3, 4, 5]] < 1e-5).all()


@pytest.mark.parametrize("adaln", [True, False])
def test_training_sees_what_playing_sees(adaln):
    model, (tokens, actions) = dynamics(adaln=adaln), clip(T=9)  # longer than the context of 4
    masked = torch.ones(2, 8, 5, dtype=torch.bool)
    trained = model.masked_logits(tokens, actions, masked)
    previous_actions = torch.cat([torch.full((2, 1), model.null_action), actions], dim=1)
    cache = model.new_cache()
    for t in range(1, 9):
        model.prefill(tokens[:, t - 1 : t], previous_actions[:, t - 1 : t + 1], cache)
        hidden = torch.full((2, 1, 5), model.mask_index)
        states = model.hidden_states(hidden, previous_actions[:, t : t + 1], cache=cache)
        played = model.head(states)
        assert torch.allclose(played[:, 0], trained[:, t - 1], atol=1e-5, rtol=0)


def test_with_masked_context_a_frame_sees_the_masks_of_earlier_frames():
    model, (tokens, actions) = dynamics(clean_context=False), clip()
    seen = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(5)
    loss, _ = model(tokens, actions)
    torch.manual_seed(5)
    rate = 0.5 + 0.5 * torch.rand(2, 6, 1)
    masked = torch.rand(2, 6, 5) < rate
    hidden = tokens.clone()
    hidden[:, 1:][masked] = model.mask_index
    x = model.embed(hidden)
    modulations = model.modulations(torch.cat([torch.full((2, 1), 4), actions], dim=1))
    # one pass over the masked clip; its first frame is clean
    assert len(seen) == 1 and torch.equal(seen[0], x)
    logits = model.head(model.transformer(x, modulations)[:, 1:])
    assert torch.allclose(loss, F.cross_entropy(logits[masked], tokens[:, 1:][masked]), atol=1e-5)


def test_loss_is_the_cross_entropy_of_masked_tokens_at_rates_above_a_half():
    model, (tokens, actions) = dynamics(), clip()
    torch.manual_seed(5)
    loss, _ = model(tokens, actions)
    torch.manual_seed(5)
    rate = 0.5 + 0.5 * torch.rand(2, 6, 1)
    masked = torch.rand(2, 6, 5) < rate
    log_p = model.masked_logits(tokens, actions, masked).log_softmax(-1)
    terms = [
        -log_p[b, t, n, tokens[b, t + 1, n]]
        for b in range(2)
        for t in range(6)
        for n in range(5)
        if masked[b, t, n]
    ]
    assert torch.allclose(loss, torch.stack(terms).mean(), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_maskgit_fills_everything_and_keeps_what_it_fixed(temperature):
    mask, N, steps, seen = 16, 30, 6, []
    given = torch.full((3, N), mask)
    given[:, :4] = torch.tensor([1, 2, 3, 4])
    logits = torch.randn(3, N, 16)

    def logits_of(tokens):
        seen.append(tokens.clone())
        return logits + 0.1 * len(seen)

    result = maskgit_decode(logits_of, given, mask, steps, temperature)
    assert len(seen) == steps and (result != mask).all() and (result[:, :4] == given[:, :4]).all()
    for k, (early, late) in enumerate(zip(seen, seen[1:] + [result], strict=True), start=1):
        fixed = early != mask
        assert (late[fixed] == early[fixed]).all()
        left = 0 if k == steps else math.floor(N * math.cos(math.pi / 2 * k / steps))
        assert ((late == mask).sum(dim=1) == min(left, N - 4)).all()
    if temperature == 0:
        assert (result[:, 4:] == logits.argmax(-1)[:, 4:]).all()


def test_sampling_follows_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.2])
    logits = p.log().expand(1, 20_000, 3)
    tokens = maskgit_decode(lambda _: logits, torch.full((1, 20_000), 3), 3, steps=1)
    assert torch.allclose(torch.bincount(tokens[0]) / 20_000, p, atol=0.015)


def test_the_squared_error_variant():
    model, (tokens, actions) = randomise(NextLatentModel(**SMALL)), clip()
    loss, _ = model(tokens, actions)
    latents = model.next_latents(tokens[:, :-1], actions)
    target = model.quantizer.indices_to_codes(tokens)[:, 1:]
    assert torch.allclose(loss, ((latents - target) ** 2).mean())
    others = model.next_latents(tokens[:, :-1], with_another_action(actions))
    difference = per_frame(latents - others)
    assert (difference[:3] < 1e-5).all() and difference[3] > 1e-3
    # when playing, each frame is the nearest code of the same latents
    cache = model.new_cache()
    for t in range(6):
        played = model.next_frame(tokens[:, t], None, actions[:, t], cache)
        codes = model.quantizer.indices_to_codes(torch.arange(16))
        nearest = (latents[:, t].clamp(-1, 1).unsqueeze(2) - codes).abs().sum(-1).argmin(-1)
        assert torch.equal(played, nearest)


def test_the_right_action_explains_the_dummy_world_better(world_dir):
    """The actions that the LAM infers, against wrong ones, under the same masks."""
    models = {
        stage: build_model(load_checkpoint(f"{world_dir}/{stage}.pt", stage))
        for stage in ("tokenizer", "lam", "dynamics")
    }
    frames = to_float(Clips(Dataset(*dummy_world()), "val", length=4).evenly_spaced(50)[0])
    with torch.no_grad():
        tokens, actions = models["tokenizer"].encode(frames), models["lam"].infer(frames)
        losses = []
        for given in (actions, (actions + torch.randint(1, 8, actions.shape)) % 8):
            torch.manual_seed(0)
            losses.append(models["dynamics"](tokens, given)[0])
    assert losses[0] < 0.9 * losses[1]
