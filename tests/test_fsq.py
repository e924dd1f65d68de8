import pytest
import torch

from models.fsq import FiniteScalarQuantizer, round_straight_through

LEVELS = [[4, 4, 4, 4, 4], [8, 5, 5, 5], [2, 2, 2], [3, 2]]


@pytest.mark.parametrize("levels", LEVELS)
def test_every_index_has_its_own_code_and_comes_back(levels):
    quantizer = FiniteScalarQuantizer(levels)
    indices = torch.arange(quantizer.codebook_size)
    codes = quantizer.indices_to_codes(indices)
    assert codes.unique(dim=0).shape == (quantizer.codebook_size, len(levels))
    assert codes.min() == -1 and codes.max() == 1
    assert torch.equal(quantizer.codes_to_indices(codes), indices)


@pytest.mark.parametrize("levels", LEVELS)
def test_forward_gives_the_nearest_level(levels):
    quantizer, z = FiniteScalarQuantizer(levels), 2 * torch.randn(500, len(levels))
    codes = quantizer(z)
    for d, n in enumerate(levels):
        grid = torch.linspace(-1, 1, n)
        nearest = grid[(torch.tanh(z[:, d, None]) - grid).abs().argmin(dim=1)]
        assert torch.allclose(codes[:, d], nearest, atol=1e-6)


def test_two_levels_are_a_sign():
    assert FiniteScalarQuantizer([2])(torch.tensor([[-0.3], [0.3]])).tolist() == [[-1.0], [1.0]]


def test_straight_through_gradient_is_the_identity():
    x = torch.linspace(-3, 3, 50, requires_grad=True)
    round_straight_through(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(50))
    quantizer, z = FiniteScalarQuantizer([4, 4, 4]), torch.randn(100, 3, requires_grad=True)
    through_rounding = torch.autograd.grad(quantizer(z).sum(), z)[0]
    without_rounding = torch.autograd.grad(quantizer.bound(z).sum(), z)[0]
    assert torch.allclose(through_rounding, without_rounding)


@pytest.mark.parametrize("levels", [[], [4, 1], [4, 2.5]])
def test_bad_levels(levels):
    with pytest.raises(ValueError, match="at least 2"):
        FiniteScalarQuantizer(levels)
