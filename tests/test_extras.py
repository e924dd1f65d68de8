"""The two scripts behind the README's table and the shipped worlds, in miniature."""

import importlib
import json
from pathlib import Path

from utils.checkpoint import load_checkpoint, load_world
from utils.cli import UserError
from utils.hardening import steps

import numpy as np
import pytest
import torch

from evaluation import stages
from tools import ablate, flagship, ship


def skip_classifier(monkeypatch):
    """No supervised classifier, because training one takes longer than the rest."""
    monkeypatch.setattr(stages, "classifier_nmi", lambda *_: {"nmi_classifier": 0.5})


@pytest.mark.slow
def test_every_kind_of_row_trains_and_lands_in_the_table(
    world_dir, recording, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        ablate,
        "LAM_ROWS",
        {"token target": ("", ablate.TokenTarget), "warm-up": ("", ablate.WarmUp)},
    )
    rows = {
        "adamw": ("--optimizer adamw", None),
        "dice": ("--actions random", None),
        "true": ("--actions true", None),
    }
    monkeypatch.setattr(ablate, "DYNAMICS_ROWS", rows)
    out = tmp_path / "ablation.json"
    options = [
        "--world",
        world_dir,
        "--data-path",
        recording,
        "--test",
        recording,
        "--json",
        str(out),
        "--preset",
        "tiny",
        "--lam-updates",
        "2",
        "--dynamics-updates",
        "2",
        "--seeds",
        "1",
    ]
    ablate.main(options)
    results = json.loads(out.read_text())
    measured = {
        key.rsplit("/", 1)[0]: value for key, value in results.items() if key.endswith("minutes")
    }
    assert set(measured) == {
        "lam/token target/0",
        "lam/warm-up/0",
        "dynamics/adamw/0",
        "dynamics/dice/0",
        "dynamics/true/0",
    }
    assert all(
        np.isfinite(value)
        for key, value in results.items()
        if key.startswith(("lam/", "dynamics/"))
    )
    monkeypatch.setattr(ablate, "train_row", None)
    ablate.main(options)  # nothing is trained twice
    with pytest.raises(UserError, match="made with lam_updates 2, not 3"):
        ablate.main([*options, "--lam-updates", "3"])
    with pytest.raises(UserError, match="no tokenizer.pt and lam.pt in"):
        ablate.main([*options, "--world", str(tmp_path)])


def test_an_interrupted_row_does_not_count(world_dir, recording, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "LAM_ROWS", {"as shipped": ("", None)})
    # Ctrl-C in the first step
    monkeypatch.setattr(steps.StopSignal, "asked", property(lambda stop: True))
    options = [
        "--world",
        world_dir,
        "--data-path",
        recording,
        "--test",
        recording,
        "--json",
        str(tmp_path / "a.json"),
        "--preset",
        "tiny",
    ]
    with pytest.raises(KeyboardInterrupt):
        ablate.main([*options, "--lam-updates", "2"])
    assert not (tmp_path / "a.json").exists()


def test_the_table_shows_mean_and_spread():
    results = {"world": "w"} | {
        f"lam/a/{seed}/x": value for seed, value in enumerate((1.0, 2.0, 3.0))
    }
    assert ablate.table(results, "lam", ["a"], {"x": lambda r: r["x"]}).endswith(
        "| a | 2.00 ± 1.00 |"
    )


def test_warm_up_rounds_in_the_second_half():
    model = ablate.WarmUp(
        frame_size=[16, 16],
        patch_size=8,
        embed_dim=32,
        hidden_dim=64,
        n_heads=2,
        n_blocks=1,
        context_length=4,
    ).train()
    model.n_updates, seen = 4, []
    for _ in range(4):
        model(torch.rand(1, 4, 3, 16, 16))
        seen.append(model.soft_rate)
    assert seen == [1.0, 1.0, 0.0, 0.0]


def test_a_shipped_world_is_smaller_and_plays_alike(world_dir, recording, tmp_path, monkeypatch):
    skip_classifier(monkeypatch)
    source, out = Path(world_dir), tmp_path / "shipped"
    with pytest.raises(UserError, match="made by tools/speedrun.py"):
        ship.main(["--checkpoint", world_dir, "--test", recording, "--out", str(out)])
    (source / "report").mkdir()
    made = {
        "world": "pong",
        "command": "python speedrun.py pong",
        "commit": "0123456789",
        "device": "2 CPU cores",
        "minutes/total": 13.0,
    }
    (source / "report" / "report.json").write_text(json.dumps(made))
    ship.main(["--checkpoint", world_dir, "--test", recording, "--out", str(out)])
    assert "optimizer" not in load_checkpoint(out / "dynamics.pt", "dynamics")
    sizes = [
        sum((folder / f"{stage}.pt").stat().st_size for stage in ("tokenizer", "lam", "dynamics"))
        for folder in (source, out)
    ]
    assert sizes[1] < 0.3 * sizes[0]
    worlds = [load_world(folder, temperature=0) for folder in (source, out)]
    assert worlds[1].action_names == worlds[0].action_names and worlds[1].action_table
    for world in worlds:
        world.reset(worlds[0].start_frames[0].numpy())
    difference = np.abs(worlds[0].step(1).astype(int) - worlds[1].step(1))
    assert difference.mean() < 3
    card = (out / "card.md").read_text()
    assert (
        "python speedrun.py pong" in card
        and "01234567" in card
        and "| dynamics/delta_psnr_button_t4 |" in card
    )


@pytest.mark.slow
def test_a_flagship_has_a_curve_and_a_line(recording, tmp_path, monkeypatch):
    def run(script, *options):  # here, not in a process of its own
        importlib.import_module(script.removesuffix(".py")).main(list(map(str, options)))

    monkeypatch.setattr(flagship, "run", run)
    skip_classifier(monkeypatch)
    out = tmp_path / "results.json"
    options = [
        "--data-path",
        recording,
        "--test",
        recording,
        "--out",
        str(tmp_path / "worlds"),
        "--preset",
        "tiny",
        "--json",
        str(out),
        "--minutes",
        "0.02",
        "0.05",
        "--widths",
        "16",
        "32",
        "--n-updates",
        "3",
    ]
    results = flagship.main(options)
    assert json.loads(out.read_text()) == results and out.with_suffix(".png").stat().st_size > 1000
    assert 0.01 < results["curve/0.02/wall_minutes"] and np.isfinite(
        results["curve/0.05/dynamics/delta_psnr_min_t4"]
    )
    saved = load_checkpoint(tmp_path / "worlds/width-32-data-0.25/dynamics.pt", "dynamics")
    assert (
        saved["model_args"]["embed_dim"] == 32
        and results["scaling/32/1/pflops"] > results["scaling/16/1/pflops"]
    )
    x, y = (
        np.log10([results[f"scaling/{width}/1/{name}"] for width in (16, 32)])
        for name in ("pflops", "loss")
    )
    assert results["scaling/slope"] == pytest.approx(
        np.diff(y)[0] / np.diff(x)[0]
    )  # two points lie on their line
    monkeypatch.setattr(flagship, "run", None)
    assert flagship.main(options) == results  # nothing is trained twice
    with pytest.raises(UserError, match="nowhere.h5 is no HDF5 file"):
        flagship.main([*options, "--test", "nowhere.h5"])
