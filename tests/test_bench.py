import json
import math

from utils.cli import UserError

import pytest

from tools import bench


def test_it_measures_every_stage_play_and_growth(recording, tmp_path, monkeypatch):
    seconds = bench.seconds
    monkeypatch.setattr(
        bench,
        "seconds",
        lambda action, device, repeats=12, warm_up=4: seconds(action, device, 1, 0),
    )
    report = bench.main(
        [
            "--preset",
            "tiny",
            "--age",
            "100",
            "--data-path",
            recording,
            "--json",
            str(tmp_path / "new" / "bench.json"),
        ]
    )
    numbers = {name: value for name, value in report.items() if "/" in name}
    for stage in ("tokenizer", "lam", "dynamics", "dynamics_uncached"):
        assert (
            0 < numbers[f"train/{stage}_utilisation"]
            and numbers[f"train/{stage}_tokens_per_s"]
            == 64 * numbers[f"train/{stage}_frames_per_s"]
        )
    assert 0 <= numbers["train/data_wait"] < 1
    for name in (
        "play/fps_b1",
        "play/fps_b8",
        "play/fps_b64",
        "play/latency_p50_ms",
        "play/latency_p99_ms",
        "play/shipped_fps",
        "memory/peak_mb",
        "growth/pass_T64_N64_ms",
        "growth/pass_T8_N256_ms",
    ):
        assert numbers[name] > 0
    assert all(
        isinstance(value, (int, float)) and not math.isnan(value) for value in numbers.values()
    )
    assert json.loads((tmp_path / "new" / "bench.json").read_text())["device"] == report["device"]


@pytest.mark.slow
def test_it_takes_a_training_step_to_pieces(tmp_path, monkeypatch):
    seconds, steps = bench.seconds, []
    monkeypatch.setattr(
        bench,
        "seconds",
        lambda action, device, repeats=12, warm_up=4: steps.append(seconds(action, device, 2, 1))
        or steps[-1],
    )
    monkeypatch.setattr(bench, "LARGE", dict(embed_dim=32, hidden_dim=64, n_heads=2, n_blocks=1))
    report = bench.main(
        [
            "--preset",
            "tiny",
            "--large",
            "--batch-size",
            "4",
            "--compile",
            "--json",
            str(tmp_path / "bench.json"),
        ]
    )
    pieces = {
        name.removeprefix("pieces/"): value
        for name, value in report.items()
        if name.startswith("pieces/")
    }
    assert set(pieces) == {
        "parameters",
        "step_ms",
        "frames_per_s",
        "utilisation",
        "roof_ms",
        "time/AdamW instead of Muon",
        "time/AdamW, not fused",
        "time/activations recomputed",
        "time/compiled whole",
        "time/compiled per block",
        "time/attention not fused",
        "time/half the batch, per clip",
    }
    assert (
        all(0 < value < 1e12 for value in pieces.values()) and pieces["roof_ms"] < pieces["step_ms"]
    )
    assert pieces["frames_per_s"] == pytest.approx(4 * 4 / (pieces["step_ms"] / 1e3))
    assert report["preset"] == "large" and "play/fps_b1" not in report


@pytest.mark.slow
def test_it_measures_a_training_beside_another(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.bench_beside, "__defaults__", (("tokenizer", "play"), 4))
    report = bench.main(["--beside", "--json", str(tmp_path / "beside.json")])
    for kind in ("tokenizer", "play"):
        for spin in ("short_spin", "usual_spin"):
            alone, beside = (
                report[f"beside/{kind}_{spin}_{when}_ms"] for when in ("alone", "beside")
            )
            assert report[f"beside/{kind}_{spin}"] == pytest.approx(beside / alone) and alone > 0
    assert (
        "train/tokenizer_utilisation" not in report
        and json.loads((tmp_path / "beside.json").read_text())["device"] == report["device"]
    )


def test_bad_options():
    for options, message in [
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--age", "5"], "--age must be at least 100 frames, got 5"),
        (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
        (["--data-path", "nowhere.h5"], "no such file or folder: nowhere.h5"),
        (["--peer", "nowhere", "--preset", "tiny"], "--peer nowhere cannot be measured"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    ]:
        with pytest.raises(UserError, match=message):
            bench.main(options)
