from utils.checkpoint import build_model, load_checkpoint

import pytest
import torch
from conftest import SIZES, randomise

from data_utils import Clips, Dataset, dummy_world, to_float
from evaluation import metrics
from models.latent_action_model import MOVES, LatentActionModel


def lam(**changes):
    sizes = dict(frame_size=[16, 16], patch_size=8, **SIZES)
    return randomise(LatentActionModel(**sizes | changes))


@pytest.mark.parametrize("encoder", ["matches", "pairs", "frames"])
def test_actions_look_one_frame_ahead_and_no_further(encoder):
    model, frames = lam(encoder=encoder), torch.rand(2, 6, 3, 16, 16) * 2 - 1
    changed = frames.clone()
    changed[:, 4] = -changed[:, 4]
    before, after = model.latents(frames), model.latents(changed)
    assert before.shape == (2, 5, 3)
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-5)  # between frames 0-1, 1-2, 2-3
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-3  # between frames 3-4


def test_prediction_uses_the_past_and_the_right_action():
    model, frames = lam(), torch.rand(1, 5, 3, 16, 16) * 2 - 1
    actions = torch.ones(1, 5, 3)
    other = actions.clone()
    other[:, 3] = -1
    predicted = model.decoder(frames, actions)
    difference = (predicted - model.decoder(frames, other)).abs().amax(dim=(0, 2, 3, 4))
    assert (difference[:3] < 1e-5).all() and (difference[3:] > 1e-4).all()
    changed = frames.clone()
    changed[:, 3] = -changed[:, 3]
    difference = (predicted - model.decoder(changed, actions)).abs().amax(dim=(0, 2, 3, 4))
    assert (difference[:3] < 1e-5).all() and (difference[3:] > 1e-3).all()


def test_masking_keeps_the_first_frame():
    tokens = torch.randn(2, 4, 4, 32)
    decoder = lam(keep_rate=0.0).decoder
    masked = decoder.mask(tokens)
    assert torch.equal(masked[:, 0], tokens[:, 0])
    assert (masked[:, 1:] == decoder.mask_token).all()
    assert torch.equal(lam(keep_rate=1.0).decoder.mask(tokens), tokens)
    many = tokens.repeat(50, 1, 1, 1)
    kept = (lam(keep_rate=0.5).decoder.mask(many)[:, 1:] == many[:, 1:]).all(-1)
    assert 0.4 < kept.float().mean() < 0.6


@pytest.mark.parametrize("decoder, sees", [("frame", False), ("warp", True)])
def test_without_history_only_the_decoder_that_draws_from_nothing_forgets_the_last_frame(
    decoder, sees
):
    model, frames = lam(keep_rate=0.0, decoder=decoder), torch.rand(1, 4, 3, 16, 16) * 2 - 1
    changed = frames.clone()
    changed[:, 2] = -changed[:, 2]
    actions = torch.ones(1, 4, 3)
    difference = model.decoder(frames, actions) - model.decoder(changed, actions)
    assert (difference[:, 2].abs().max() > 1e-3) == sees


def test_collapse_costs():
    model = lam(var_target=0.2, var_lambda=1.0, entropy_lambda=0.5)
    collapsed = model.collapse_penalty(torch.full((8, 4, 3), 0.9))
    one_bit = torch.tensor([0.9, -0.9]).repeat(16).view(8, 4, 1)
    one_bit_thrice = model.collapse_penalty(one_bit.expand(8, 4, 3))
    codes = model.quantizer.indices_to_codes(torch.arange(32).view(8, 4) % 8)
    spread = model.collapse_penalty(0.9 * codes)
    assert spread < one_bit_thrice < collapsed
    # uniform over 8 codes, and no variance is missing
    assert torch.allclose(spread, -0.5 * torch.tensor(8.0).log(), atol=1e-4)


def test_imitation_is_the_cross_entropy_of_the_bits_of_codes_with_a_weight():
    model, latents = lam(), torch.randn(2, 3, 3)
    codes = torch.tensor([[5, 0, 3], [7, 1, 2]])
    weights = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    found = model.imitation(latents, torch.stack([codes.float(), weights], dim=-1))
    by_hand = 0.0
    for b, bits in ((0, (1, -1, 1)), (1, (1, 1, 1))):  # 5 = 101, 7 = 111, the lowest bit first
        for z, bit in zip(latents[b, 0], bits, strict=True):
            by_hand += weights[b, 0] * (1 + (-bit * z).exp()).log() / 2
    assert torch.allclose(found, by_hand)
    assert model.imitation(latents, torch.zeros(2, 3, 2)) == 0  # nothing is taught


def test_the_encoder_sees_where_a_patch_came_from():
    encoder, (world, _) = lam(frame_size=[64, 64]).encoder, dummy_world(2)
    first = torch.from_numpy(world[:1]).permute(0, 3, 1, 2).float() / 127.5 - 1
    right = first.roll(3, -1)
    frames = torch.stack([first, right, right.roll(-5, -2)], dim=1)  # to the right, then up
    mismatch = encoder.mismatch(frames)  # (1, 2, 64, 2·len(MOVES))
    across, down = mismatch.mean(dim=2)[0].unflatten(-1, (2, -1)).unbind(1)  # (2, len(MOVES)) each
    assert MOVES[across[0].argmin()] == 3 and MOVES[down[0].argmin()] == 0
    assert MOVES[across[1].argmin()] == 0 and MOVES[down[1].argmin()] == -5
    flat = torch.ones(1, 2, 3, 64, 64)
    assert (encoder.mismatch(flat) == 0).all()  # a flat patch fits everywhere


def test_the_decoder_can_move_a_patch():
    decoder = lam(frame_size=[32, 32]).decoder
    frames = torch.rand(1, 2, 3, 32, 32)
    moves = torch.full((1, 2, 16, 2 * len(MOVES)), -50.0)
    moves[..., MOVES.index(0)] = moves[..., len(MOVES) + MOVES.index(0)] = 0.0
    assert torch.allclose(decoder.warp(frames, moves), frames)
    # the second patch of the second row moves to the right
    moves[0, 1, 5, MOVES.index(0)] = -50.0
    moves[0, 1, 5, MOVES.index(3)] = 0.0
    moved = decoder.warp(frames, moves)
    assert torch.allclose(moved[0, 1, :, 8:16, 8:16], frames[0, 1, :, 8:16, 5:13])
    moved[0, 1, :, 8:16, 8:16] = frames[0, 1, :, 8:16, 8:16]
    assert torch.allclose(moved, frames)  # and nothing else


def test_new_model_predicts_a_copy():
    model = LatentActionModel(frame_size=[16, 16], patch_size=8, decoder="change", **SIZES).eval()
    frames = torch.rand(2, 4, 3, 16, 16) * 2 - 1
    assert torch.equal(model.predict(frames, model.infer(frames)), frames[:, :-1])
    assert torch.allclose(model(frames)[1]["error_over_copy"], torch.tensor(1.0))


@pytest.mark.parametrize("n_actions", [0, 1, 6])
def test_n_actions_must_be_a_power_of_two(n_actions):
    with pytest.raises(ValueError, match=f"power of two.*got {n_actions}"):
        lam(n_actions=n_actions)


def test_it_discovers_the_true_actions_of_the_dummy_world(world_dir):
    model = build_model(load_checkpoint(f"{world_dir}/lam.pt", "lam"))
    unseen = Dataset(*dummy_world(1000, seed=99))  # another field, other actions
    frames, true_actions = Clips(unseen, "train", length=4).evenly_spaced(100)
    codes = model.infer(to_float(frames))
    assert metrics.best_mapping_accuracy(codes, true_actions) >= 0.8
    assert len(codes.unique()) >= 5
