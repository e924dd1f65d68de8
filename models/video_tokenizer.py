"""Stage 1, the video tokenizer: frames ↔ discrete tokens, an FSQ-VAE on the spatio-temporal transformer.

Genie (arXiv:2402.15391, §2.1) uses a VQ-VAE here; FSQ needs no codebook or commitment loss, so the loss is the
reconstruction alone. It is a plain squared error: on sparse games, where 99 % of the pixels never change, an absolute
error settles on the empty background and stays there.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models.fsq import FiniteScalarQuantizer
from models.patch_embed import PatchEmbedding, PatchUnembedding
from models.st_transformer import SpatioTemporalPositionalEncoding, SpatioTemporalTransformer


class VideoTokenizer(nn.Module):
    """frames (B, T, 3, H, W) in [-1, 1] ↔ tokens (B, T, N) in [0, codebook_size). Both ways are causal in time."""

    def __init__(self, frame_size, patch_size, embed_dim, hidden_dim, n_heads, n_blocks, levels, context_length):
        super().__init__()
        n_patches = (frame_size[0] // patch_size) * (frame_size[1] // patch_size)
        self.frame_size = frame_size
        sizes = (embed_dim, hidden_dim, n_heads, n_blocks, context_length)
        self.quantizer = FiniteScalarQuantizer(levels)
        self.embed = PatchEmbedding(patch_size, embed_dim)
        self.encoder_positions = SpatioTemporalPositionalEncoding(n_patches, embed_dim)
        self.encoder = SpatioTemporalTransformer(*sizes)
        self.to_latent = nn.Linear(embed_dim, len(levels))
        self.from_latent = nn.Linear(len(levels), embed_dim)
        self.decoder_positions = SpatioTemporalPositionalEncoding(n_patches, embed_dim)
        self.decoder = SpatioTemporalTransformer(*sizes)
        self.unembed = PatchUnembedding(patch_size, embed_dim, frame_size)

    def _encode(self, frames):
        tokens = self.encoder_positions(self.embed(frames))  # (B, T, N, E)
        return self.quantizer(self.to_latent(self.encoder(tokens)))  # (B, T, N, D)

    def _decode(self, codes, cache=None):
        tokens = self.decoder_positions(self.from_latent(codes))  # (B, T, N, E)
        return self.unembed(self.decoder(tokens, cache=cache, finished=True))  # (B, T, 3, H, W)

    def forward(self, frames):
        """frames → (loss, logs): mean squared error, PSNR in dB and the number of codes that this batch used."""
        codes = self._encode(frames)
        loss = F.mse_loss(self._decode(codes).float(), frames)
        codes_used = self.quantizer.codes_to_indices(codes).unique().numel()
        return loss, {"psnr": 10 * torch.log10(4 / loss.detach()), "codes_used": codes_used}

    def encode(self, frames):
        """frames (B, T, 3, H, W) in [-1, 1] → tokens (B, T, N)."""
        return self.quantizer.codes_to_indices(self._encode(frames))

    def decode(self, tokens, cache=None):
        """tokens (B, T, N) → frames (B, T, 3, H, W) in [-1, 1]; with a cache, the frames that follow those in it."""
        return self._decode(self.quantizer.indices_to_codes(tokens), cache).float().clamp(-1, 1)

    def new_cache(self):
        return self.decoder.new_cache()
