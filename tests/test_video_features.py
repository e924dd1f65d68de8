from utils.cli import UserError
from utils.hardening.videos import DatasetWriter

import pytest
import torch
import torch.nn.functional as F

from data_utils import dummy_world
from evaluation import video_features
from evaluation.metrics import frechet_distance
from evaluation.video_features import i3d_features, load_i3d, smallnet_features


def test_the_distance_orders_videos_by_damage():
    frames, _ = dummy_world(96 * 16)
    videos = torch.from_numpy(frames).view(96, 16, 64, 64, 3)

    def blur(width):
        flat = videos.flatten(0, 1).movedim(-1, 1).float()
        flat = F.avg_pool2d(flat, width, 1, width // 2, count_include_pad=False)
        return flat.movedim(1, -1).round().byte().view(videos.shape)

    def shuffle(i):
        return videos[i, torch.randperm(16, generator=torch.Generator().manual_seed(i))]

    shuffled = torch.stack([shuffle(i) for i in range(96)])
    real = smallnet_features(videos)
    damaged = (videos, blur(3), blur(9), shuffled)
    distances = [frechet_distance(smallnet_features(v), real) for v in damaged]
    clean, slight, strong, mixed = distances
    assert abs(clean) < 1e-3 < slight < strong < mixed


class Detector(torch.nn.Module):
    """The signature of the shared TorchScript files; the features are the mean colours."""

    def forward(self, x, rescale: bool, resize: bool, return_features: bool):
        assert x.size(1) == 3 and float(x.max()) > 1.5  # channels first, 0-255
        return x.mean(dim=(2, 3, 4)).unsqueeze(2)


def test_an_i3d_of_the_user_takes_the_place(tmp_path):
    torch.jit.script(Detector()).save(str(tmp_path / "i3d.pt"))
    videos = torch.randint(256, (6, 16, 8, 8, 3), dtype=torch.uint8)
    features = i3d_features(load_i3d(tmp_path / "i3d.pt"), videos)
    assert torch.allclose(features, videos.float().mean(dim=(1, 2, 3)), atol=1e-3)
    (tmp_path / "text.pt").write_text("no network")
    for name in ("text.pt", "none.pt"):
        with pytest.raises(UserError, match=f"--fvd-features .*{name} is not a TorchScript I3D"):
            load_i3d(tmp_path / name)


def test_the_network_can_be_trained_again(tmp_path):
    frames, _ = dummy_world(400)
    paths = []
    for name, pictures in (("a", frames), ("b", 255 - frames)):
        paths.append(str(tmp_path / f"{name}.h5"))
        with DatasetWriter(paths[-1], (64, 64)) as writer:
            writer.append(pictures)
    out = tmp_path / "features.pt"
    video_features.main(["--data-path", *paths, "--out", str(out), "--n-updates", "2"])

    def shapes(path):
        weights = torch.load(path, weights_only=True)["model"]
        return {name: weight.shape for name, weight in weights.items()}

    assert shapes(out) == shapes(video_features.WEIGHTS)
