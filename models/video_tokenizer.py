"""Stage 1, the video tokenizer: frames ↔ discrete tokens.

An FSQ-VAE on the spatio-temporal transformer. Genie (arXiv:2402.15391, §2.1) uses a VQ-VAE here;
FSQ needs no codebook or commitment loss, so the loss is the reconstruction alone. It is a plain
squared error: on sparse games, where 99 % of the pixels never change, an absolute error settles on
the empty background and stays there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fsq import FiniteScalarQuantizer, log_statistics
from models.patch_embed import PatchEmbedding, PatchUnembedding
from models.st_transformer import SpatialPositions, SpatioTemporalTransformer


class VideoTokenizer(nn.Module):
    """frames (B, T, 3, H, W) in [-1, 1] ↔ tokens (B, T, N), causal in time.

    sizes: the others of both SpatioTemporalTransformers.
    """

    def __init__(
        self,
        frame_size: list[int],
        patch_size: int,
        levels: list[int],
        embed_dim: int,
        **sizes: int,
    ):
        super().__init__()
        n_patches = (frame_size[0] // patch_size) * (frame_size[1] // patch_size)
        self.frame_size = frame_size
        self.quantizer = FiniteScalarQuantizer(levels)
        self.embed = PatchEmbedding(patch_size, embed_dim)
        self.encoder_positions = SpatialPositions(n_patches, embed_dim)
        self.encoder = SpatioTemporalTransformer(embed_dim, **sizes)
        self.to_latent = nn.Linear(embed_dim, len(levels))
        self.from_latent = nn.Linear(len(levels), embed_dim)
        self.decoder_positions = SpatialPositions(n_patches, embed_dim)
        self.decoder = SpatioTemporalTransformer(embed_dim, **sizes)
        self.unembed = PatchUnembedding(patch_size, embed_dim, frame_size)

    def _encode(self, frames: Tensor) -> Tensor:
        x = self.encoder_positions(self.embed(frames))  # (B, T, N, E)
        return self.quantizer(self.to_latent(self.encoder(x)))  # (B, T, N, D)

    def _decode(self, codes: Tensor, cache=None) -> Tensor:
        x = self.decoder_positions(self.from_latent(codes))  # (B, T, N, E)
        return self.unembed(self.decoder(x, cache=cache, finished=True))  # (B, T, 3, H, W)

    def forward(self, frames: Tensor) -> tuple[Tensor, dict]:
        """frames → (loss, logs): squared error, PSNR in dB, codes that this batch used."""
        codes = self._encode(frames)
        rebuilt = self._decode(codes).float()
        loss = F.mse_loss(rebuilt, frames)
        codes_used = self.quantizer.codes_to_indices(codes).unique().numel()
        logs = {"psnr": 10 * torch.log10(4 / loss.detach()), "codes_used": codes_used}
        return loss, logs | log_statistics(codes, rebuilt)

    def encode(self, frames: Tensor) -> Tensor:
        """frames (B, T, 3, H, W) in [-1, 1] → tokens (B, T, N)."""
        return self.quantizer.codes_to_indices(self._encode(frames))

    def decode(self, tokens: Tensor, cache: list | None = None) -> Tensor:
        """tokens (B, T, N) → frames (B, T, 3, H, W) in [-1, 1].

        With a cache they are the frames after those in it.
        """
        return self._decode(self.quantizer.indices_to_codes(tokens), cache).float().clamp(-1, 1)

    def new_cache(self) -> list:
        return self.decoder.new_cache()
