import json
import math

import pytest

import bench
from config import UserError


def test_it_measures_every_stage_play_and_growth(tmp_path, monkeypatch):
    seconds = bench.seconds
    monkeypatch.setattr(bench, "seconds", lambda action, device, repeats=12, warm_up=4: seconds(action, device, min(repeats, 2), min(warm_up, 1)))
    report = bench.main(["--preset", "tiny", "--age", "100", "--json", str(tmp_path / "new" / "bench.json")])
    numbers = {name: value for name, value in report.items() if "/" in name}
    for stage in ("tokenizer", "lam", "dynamics", "dynamics_uncached"):
        assert 0 < numbers[f"train/{stage}_utilisation"] and numbers[f"train/{stage}_tokens_per_s"] == 64 * numbers[f"train/{stage}_frames_per_s"]
    assert 0 <= numbers["train/data_wait"] < 1
    for name in ("play/fps_b1", "play/fps_b8", "play/fps_b64", "play/latency_p50_ms", "play/latency_p99_ms", "play/shipped_fps",
                 "memory/peak_mb", "growth/pass_T64_N64_ms", "growth/pass_T8_N256_ms"):  # fmt: skip
        assert numbers[name] > 0
    assert all(isinstance(value, (int, float)) and not math.isnan(value) for value in numbers.values())
    assert json.loads((tmp_path / "new" / "bench.json").read_text())["device"] == report["device"]


def test_bad_options():
    for options, message in [
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--age", "5"], "--age must be at least 100 frames, got 5"),
        (["--peer", "nowhere", "--preset", "tiny"], "--peer nowhere cannot be measured"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    ]:
        with pytest.raises(UserError, match=message):
            bench.main(options)
