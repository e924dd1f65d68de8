"""Frames ↔ tokens: each P×P patch of a frame is one token (ViT, arXiv:2010.11929, §3.1)."""

from einops import rearrange
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """frames (B, T, C, H, W) → tokens (B, T, N, E), N = (H/P)(W/P) in reading order.

    Raises ValueError when the patch size does not divide the frame.
    """

    def __init__(self, patch_size: int, embed_dim: int, channels: int = 3):
        super().__init__()
        self.patch_size = patch_size
        self.project = nn.Linear(channels * patch_size**2, embed_dim)

    def forward(self, frames: Tensor) -> Tensor:
        H, W = frames.shape[-2:]
        P = self.patch_size
        if H % P or W % P:
            raise ValueError(f"frames of {H}×{W} pixels do not divide into patches of {P}×{P}")
        patches = rearrange(frames, "b t c (h p) (w q) -> b t (h w) (c p q)", p=P, q=P)
        return self.project(patches)  # (B, T, N, E)


class PatchUnembedding(nn.Module):
    """tokens (B, T, N, E) → frames (B, T, C, H, W): a linear map to pixels, then arranged."""

    def __init__(self, patch_size: int, embed_dim: int, frame_size: list[int], channels: int = 3):
        super().__init__()
        self.patch_size, self.rows = patch_size, frame_size[0] // patch_size
        self.project = nn.Linear(embed_dim, channels * patch_size**2)

    def forward(self, tokens: Tensor) -> Tensor:
        pixels, P = self.project(tokens), self.patch_size  # (B, T, N, C·P·P)
        return rearrange(pixels, "b t (h w) (c p q) -> b t c (h p) (w q)", h=self.rows, p=P, q=P)
