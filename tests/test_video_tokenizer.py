import torch
import torch.nn.functional as F
from conftest import SIZES, randomise

from models.video_tokenizer import VideoTokenizer


def tokenizer():
    return randomise(VideoTokenizer(frame_size=[16, 24], patch_size=8, levels=[4, 4, 4], **SIZES))


def test_shapes_and_ranges():
    model, frames = tokenizer(), torch.rand(2, 5, 3, 16, 24) * 2 - 1
    tokens = model.encode(frames)
    assert tokens.shape == (2, 5, 6) and 0 <= tokens.min() and tokens.max() < 64
    rebuilt = model.decode(tokens)
    assert rebuilt.shape == frames.shape and rebuilt.abs().max() <= 1


def test_causal_both_ways():
    model, frames = tokenizer(), torch.rand(1, 6, 3, 16, 24) * 2 - 1
    other = frames.clone()
    other[:, 4] = -other[:, 4]
    a, b = model.encode(frames), model.encode(other)
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.equal(a[:, 4], b[:, 4])
    tokens = torch.randint(64, (1, 6, 6))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 7) % 64
    a, b = model.decode(tokens), model.decode(changed)
    assert torch.allclose(a[:, :4], b[:, :4], atol=1e-5) and (a[:, 4] - b[:, 4]).abs().max() > 1e-3


def test_frame_by_frame_decoding_equals_decoding_the_clip():
    model, tokens = tokenizer(), torch.randint(64, (2, 9, 6))
    cache = model.new_cache()
    parts = [model.decode(tokens[:, t : t + 1], cache) for t in range(9)]
    assert torch.allclose(torch.cat(parts, dim=1), model.decode(tokens), atol=1e-5)


def test_loss_is_the_squared_error_and_falls():
    torch.manual_seed(0)
    model = VideoTokenizer(frame_size=[16, 24], patch_size=8, levels=[4, 4, 4], **SIZES)
    frames = torch.rand(2, 4, 3, 1, 1).expand(2, 4, 3, 16, 24) * 2 - 1
    loss, logs = model(frames)
    rebuilt = model._decode(model._encode(frames))
    assert torch.allclose(loss, ((rebuilt - frames) ** 2).mean())
    error = F.mse_loss(rebuilt / 2, frames / 2)  # pictures of range 1
    assert torch.allclose(logs["psnr"], -10 * torch.log10(error))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(frames)[0].backward()
        optimizer.step()
    assert model(frames)[0] < 0.3 * loss
