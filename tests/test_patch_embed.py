import pytest
import torch
import torch.nn.functional as F

from models.patch_embed import PatchEmbedding, PatchUnembedding


def test_embedding_is_a_strided_convolution():
    embed, frames = PatchEmbedding(4, 10), torch.randn(2, 3, 3, 8, 12)
    kernel = embed.project.weight.view(10, 3, 4, 4)
    expected = F.conv2d(frames.flatten(0, 1), kernel, embed.project.bias, stride=4)  # (6, 10, 2, 3)
    assert torch.allclose(
        embed(frames), expected.flatten(2).transpose(1, 2).view(2, 3, 6, 10), atol=1e-5
    )


def test_unembedding_is_the_inverse():
    embed, unembed = PatchEmbedding(4, 48), PatchUnembedding(4, 48, (8, 12))
    for layer in (embed.project, unembed.project):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    frames = torch.randn(2, 3, 3, 8, 12)
    assert torch.allclose(unembed(embed(frames)), frames)


def test_a_frame_that_does_not_divide():
    with pytest.raises(ValueError, match="10×8"):
        PatchEmbedding(4, 8)(torch.zeros(1, 1, 3, 10, 8))
