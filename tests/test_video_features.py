import pytest
import torch
import torch.nn.functional as F

import video_features
from config import UserError
from data_utils import dummy_world
from metrics import frechet_distance
from video_features import i3d_features, load_i3d, smallnet_features


def test_the_distance_orders_videos_by_damage():
    frames, _ = dummy_world(96 * 16)
    videos = torch.from_numpy(frames).view(96, 16, 64, 64, 3)

    def blur(width):
        flat = F.avg_pool2d(videos.flatten(0, 1).movedim(-1, 1).float(), width, 1, width // 2, count_include_pad=False)
        return flat.movedim(1, -1).round().byte().view(videos.shape)

    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(96)])
    shuffled = torch.stack([video[steps] for video, steps in zip(videos, order)])
    real = smallnet_features(videos)
    clean, slight, strong, mixed = (frechet_distance(smallnet_features(v), real) for v in (videos, blur(3), blur(9), shuffled))
    assert abs(clean) < 1e-3 < slight < strong < mixed


def test_an_i3d_of_the_user_takes_the_place(tmp_path):
    class Detector(torch.nn.Module):  # the signature of the shared TorchScript files; the features are the mean colours
        def forward(self, x, rescale: bool, resize: bool, return_features: bool):
            assert x.size(1) == 3 and float(x.max()) > 1.5  # channels first, 0-255
            return x.mean(dim=(2, 3, 4)).unsqueeze(2)

    torch.jit.script(Detector()).save(str(tmp_path / "i3d.pt"))
    videos = torch.randint(256, (6, 16, 8, 8, 3), dtype=torch.uint8)
    assert torch.allclose(i3d_features(load_i3d(tmp_path / "i3d.pt"), videos), videos.float().mean(dim=(1, 2, 3)), atol=1e-3)
    (tmp_path / "text.pt").write_text("no network")
    for name in ("text.pt", "none.pt"):
        with pytest.raises(UserError, match=f"--fvd-features .*{name} is not a TorchScript I3D"):
            load_i3d(tmp_path / name)


def test_the_network_can_be_trained_again(tmp_path):
    from data_utils import DatasetWriter

    frames, _ = dummy_world(400)
    for name, pictures in (("a", frames), ("b", 255 - frames)):
        with DatasetWriter(tmp_path / f"{name}.h5", (64, 64)) as writer:
            writer.append(pictures)
    out = tmp_path / "features.pt"
    video_features.main(["--data-path", str(tmp_path / "a.h5"), str(tmp_path / "b.h5"), "--out", str(out), "--n-updates", "2"])
    shipped = torch.load(video_features.WEIGHTS, weights_only=True)["model"]
    assert {k: v.shape for k, v in torch.load(out, weights_only=True)["model"].items()} == {k: v.shape for k, v in shipped.items()}
