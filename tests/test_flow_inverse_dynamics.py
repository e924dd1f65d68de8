import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils.cli import CheckpointError, UserError

import h5py
import numpy as np
import pytest
import torch

from extras.flow_inverse_dynamics import create_dataset, evaluate, pendulum, pixels, train
from extras.flow_inverse_dynamics.create_dataset import triplets
from extras.flow_inverse_dynamics.model import FlowInverseDynamics, straightness
from extras.flow_inverse_dynamics.pendulum import Pendulum, Sequences, read_config, simulate

CONFIGS = Path(pendulum.__file__).parent / "configs"


def test_energy_is_kept_and_the_error_falls_with_the_fourth_power_of_the_step():
    drift = {}
    for dt in (0.05, 0.025):
        free = Pendulum(dt=dt, max_speed=np.inf)
        motion = start = np.array([[0.5, 0.0], [3.0, 2.0], [-2.0, 5.0]])
        for _ in range(round(10 / dt)):
            motion = free.step(motion, np.zeros(3))
        drift[dt] = np.abs(free.energy(motion) - free.energy(start)).max()
    assert drift[0.05] < 0.02 and drift[0.025] < drift[0.05] / 12  # joules, of about ten
    rubbing = Pendulum(friction=0.1)
    assert rubbing.energy(rubbing.step(start, np.zeros(3))[2:]) < rubbing.energy(start[2:])


def test_it_is_gymnasiums_pendulum():
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make("Pendulum-v1").unwrapped
    for motion, torque in (([0.5, -1.0], 1.5), ([2.0, 3.0], -2.0)):
        env.reset(seed=0)
        env.dt = 1e-4  # its Euler steps agree with ours when they are small
        env.state = np.array(motion)
        for _ in range(500):
            env.step(np.array([torque]))
        assert np.allclose(Pendulum().step(np.array(motion), torque), env.state, atol=2e-3)
        heavier = Pendulum(mass=1.2).step(np.array(motion), torque)
        assert not np.allclose(heavier, env.state, atol=2e-3)


def test_no_triplet_crosses_the_border_of_an_episode():
    lengths = [5, 1, 2, 7]
    starts = np.cumsum([0, *lengths[:-1]])
    states = np.stack([np.arange(15.0), np.repeat(np.arange(4.0), lengths)], axis=1)
    actions = np.arange(15.0)[:, None] + 100
    for chunk in (1, 3):
        s, a, s_next = triplets(states, actions, starts, chunk)
        assert len(s) == sum(max(0, n - chunk) for n in lengths)
        assert (s[:, 1] == s_next[:, 1]).all() and (s_next[:, 0] - s[:, 0] == chunk).all()
        assert (a[:, :, 0] == s[:, :1] + 100 + np.arange(chunk)).all()
    for wrong in (
        lambda: triplets(states, actions[1:], starts),
        lambda: triplets(states, actions, starts[1:]),
    ):
        with pytest.raises(UserError):
            wrong()


def test_straightness_and_the_order_of_the_samplers():
    start, end = torch.randn(2, 30, 1, 1)
    line = torch.stack([start + (end - start) * i / 8 for i in range(9)])
    assert straightness(line) < 1e-10
    # velocity 2, then 0; the chord has 1
    corner = torch.stack([torch.zeros(4, 1, 1), torch.ones(4, 1, 1), torch.ones(4, 1, 1)])
    assert straightness(corner) == pytest.approx(1.0)
    flow = FlowInverseDynamics(2, 1)
    flow.field = lambda x, t, pair: x  # whose exact solution is x₀·e
    x, pair = torch.ones(1, 1, 1), torch.zeros(1, 2)
    wrong = {
        (sampler, steps): abs(float(flow.path(pair, pair, x, steps, sampler)[-1]) - np.e)
        for sampler in ("euler", "midpoint")
        for steps in (10, 20)
    }
    assert wrong["euler", 10] / wrong["euler", 20] == pytest.approx(2, rel=0.1)
    assert wrong["midpoint", 10] / wrong["midpoint", 20] == pytest.approx(4, rel=0.1)


def fit(flow, s, a, s_next, n_updates, lr=3e-3):
    torch.manual_seed(0)
    flow.fit_scales(s, a, s_next)
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, n_updates)
    for _ in range(n_updates):
        rows = torch.randint(len(s), (128,))
        flow(s[rows], a[rows], s_next[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return flow


def test_samples_follow_a_known_distribution():
    """Given s, half of the actions are N(s − 1, 0.2²), half N(s + 1, 0.2²).

    A regression would answer s.
    """
    torch.manual_seed(1)
    s = torch.rand(4000, 1) * 2 - 1
    a = (s + torch.randn(4000, 1) * 0.2 + torch.randint(0, 2, (4000, 1)) * 2 - 1)[:, None]
    flow = fit(FlowInverseDynamics(1, 1), s, a, s, 250)
    at = torch.full((2000, 1), 0.4)
    drawn = flow.sample(at, at, 50).flatten()
    truth = 0.4 + 0.2 * torch.randn(2000) + torch.randint(0, 2, (2000,)) * 2 - 1
    gap = evaluate.wasserstein(drawn[None], truth[None])
    assert gap < 0.2 and evaluate.wasserstein(torch.full((1, 2000), 0.4), truth[None]) > 0.9
    assert abs(float((drawn > 0.4).float().mean()) - 0.5) < 0.1


@pytest.mark.slow
def test_from_sequences_to_a_trained_flow_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pendulum", "two_branch"):
        config = json.loads((CONFIGS / "dataset" / f"{name}.json").read_text())
        Path(f"{name}.json").write_text(json.dumps(config | {"n_episodes": 40}))
        pendulum.main(["--config", f"{name}.json"])
        create_dataset.main(["--config", f"{name}.json", "--max-samples", "3000"])
    with h5py.File("data/inverse_dynamics/pendulum.h5") as file:
        s, a, s_next = (file[key][:] for key in ("s", "a", "s_next"))
    assert s.shape == s_next.shape == (3000, 3) and a.shape == (3000, 1, 1)
    theta, speed = np.arctan2(s[:, 1], s[:, 0]), s[:, 2]
    again = Pendulum().step(np.stack([theta, speed], axis=1), a[:, 0, 0])
    assert np.allclose(np.cos(again[:, 0]), s_next[:, 0], atol=1e-5)
    assert np.allclose(again[:, 1], s_next[:, 2], atol=1e-4)

    options = "--dataset-config pendulum.json --out flow --batch-size 128".split()
    options += ["--learning-rate", "3e-3"]
    whole = [*options, "--num-epochs", "12", "--reflow-epochs", "10"]
    train.main(whole)
    train.main([*whole, "--resume"])  # nothing left to do
    monkeypatch.setattr(evaluate, "SHIFTS", {"mass": [1.0, 2.0]})
    monkeypatch.setattr(evaluate, "mlp", lambda pair, a: evaluate.least_squares(pair, a))
    report = evaluate.main(["--checkpoint", "flow", "--json", "report.json"])
    assert report["flow/median_error"] < 4 < report["shift/mass/2.0/flow"]
    assert report["nearest neighbour/median_error"] > report["flow/median_error"]
    assert report["flow/euler_1_median_error"] < 6  # straight enough for one step
    assert Path("flow/shifts.png").exists()
    assert json.loads(Path("report.json").read_text())["flow/triplets"] == 3000
    two = "--dataset-config two_branch.json --out two --num-epochs 16 --learning-rate 3e-3"
    train.main(two.split())
    monkeypatch.setattr(evaluate.modes, "__defaults__", (200, 20))
    report = evaluate.main(["--checkpoint", "two"])
    assert report["flow/wasserstein"] < 0.6 * report["least squares/wasserstein"]
    assert report["flow/between_modes_share"] < 0.1
    assert Path("two/modes.png").exists()
    refuse_what_does_not_fit(options)


def test_reflow_stopped_in_its_middle_continues_with_the_same_pairs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "triplets.h5", "w") as file:
        file["s"], file["s_next"] = rng.normal(size=(2, 256, 2))
        file["a"] = rng.normal(size=(256, 1, 1))
    sizes = {"down_dims": [8, 16], "diffusion_step_embed_dim": 8, "num_inference_steps": 4}
    (tmp_path / "model.json").write_text(json.dumps(sizes))
    options = ["--triplets", str(tmp_path / "triplets.h5"), "--batch-size", "64"]
    options += ["--model-config", str(tmp_path / "model.json")]
    options += ["--num-epochs", "2", "--reflow-epochs", "3", "--learning-rate", "1e-2"]

    class StopInReflow(train.StepGuard):
        def is_finite(self, step, *args, **more):
            self.log.stop.received = step == 13  # of 20; reflow begins at 8
            return super().is_finite(step, *args, **more)

    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train.main([*options, "--out", whole])
    with monkeypatch.context() as patch:
        patch.setattr(train, "StepGuard", StopInReflow)
        train.main([*options, "--out", parts])
    name = "flow_inverse_dynamics.pt"
    assert torch.load(f"{parts}/{name}")["step"] == 14
    train.main(["--out", parts, "--resume"])
    one, two = (torch.load(f"{folder}/{name}")["model"] for folder in (whole, parts))
    assert all(torch.equal(weight, two[key]) for key, weight in one.items())


@pytest.mark.parametrize(
    "path, expected",
    [
        ("data/sequence/p.h5", "data/inverse_dynamics/p.h5"),
        ("/home/sequence_lab/data/sequence/p.h5", "/home/sequence_lab/data/inverse_dynamics/p.h5"),
        ("/sequence/a/sequence/b/sequence.h5", "/sequence/a/inverse_dynamics/b/sequence.h5"),
    ],
)
def test_only_the_folder_called_sequence_is_renamed(path, expected):
    assert create_dataset.triplets_path(path) == Path(expected)
    with pytest.raises(UserError, match='must have a folder "sequence"'):
        create_dataset.triplets_path("data/sequences/sequence.h5")


def refuse_what_does_not_fit(options):
    for wrong, message in [
        (
            lambda: train.load_flow("flow/flow_inverse_dynamics.pt", 1, 1),
            "is for state_dim 3, but the data have 1",
        ),
        (
            lambda: evaluate.main(["--checkpoint", "flow", "--dataset-config", "two_branch.json"]),
            "is for state_dim 3, but the data have 1",
        ),
        (
            lambda: train.main([*options, "--num-epochs", "0"]),
            "--num-epochs must be positive, got 0",
        ),
        (lambda: train.main(["--dataset-config", "none.json"]), "none.json is not a configuration"),
        (
            lambda: evaluate.main(["--checkpoint", "none"]),
            "no checkpoint at none/flow_inverse_dynamics.pt; make one with: python -m extras.flow",
        ),
    ]:
        with pytest.raises((UserError, CheckpointError), match=message) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_bad_data_and_configurations(tmp_path):
    (tmp_path / "sequence").mkdir()
    with h5py.File(tmp_path / "sequence" / "p.h5", "w") as file:
        file["states"] = np.array([[0.0], [np.nan], [1.0]])
        file["actions"] = np.zeros((3, 1))
    good = {"path": str(tmp_path / "sequence" / "p.h5")}
    missing = "has no episode_starts; it needs states, actions, episode_starts"
    unknown = "has the unknown key 'wind'; there are path, system"
    elsewhere = {"path": "none/sequence/p.h5"}
    for values, call, message in [
        (good, create_dataset.main, missing),
        (good | {"wind": 1}, create_dataset.main, unknown),
        (good | {"n_steps": "many"}, pendulum.main, "n_steps must be of the type int, not 'many'"),
        ({}, pendulum.main, "lacks the key 'path'"),
        (good | {"shift": {"colour": 1}}, pendulum.main, "the pendulum has no colour"),
        (good | {"system": "cart"}, pendulum.main, "unknown system 'cart'"),
        ({"path": "x.h5"}, create_dataset.main, 'must have a folder "sequence"'),
        (elsewhere, create_dataset.main, "there is no dataset at none/sequence/p.h5"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=message):
            call(["--config", str(tmp_path / "config.json")])
    with h5py.File(tmp_path / "sequence" / "p.h5", "a") as file:
        file["episode_starts"] = np.array([0])
    (tmp_path / "config.json").write_text(json.dumps(good))
    with pytest.raises(UserError, match="states holds NaN or infinity in 1 rows"):
        create_dataset.main(["--config", str(tmp_path / "config.json")])
    for file in sorted((CONFIGS / "dataset").iterdir()):
        config = read_config(file, Sequences)
        states, actions = simulate(replace(config, n_episodes=2, n_steps=3))
        assert states.shape[:2] == (2, 4) and actions.shape == (2, 3, 1)
        assert file.stem in config.path


def test_from_pixels(world_dir, recording, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "mlp", partial(evaluate.mlp, n_updates=300))
    options = ["--checkpoint", world_dir, "--data-path", recording, "--test", recording]
    options += ["--out", str(tmp_path / "flow"), "--json", str(tmp_path / "r.json")]
    report = pixels.main([*options, "--clips", "300", "--num-epochs", "4"])
    assert report["flow, most frequent of 16/accuracy"] > report["most frequent button/accuracy"]
    assert report["latent action model, no buttons/accuracy"] > 0.6
    assert json.loads((tmp_path / "r.json").read_text())["pixels/most frequent button/nmi"] == 0


def test_the_numbers_of_its_readme_are_those_of_the_result_file():
    folder = CONFIGS.parent
    text = (folder / "README.md").read_text()
    path = folder.parents[1] / "docs" / "results" / "flow_inverse_dynamics.json"
    report = json.loads(path.read_text())
    assert all(table in text for table in evaluate.tables(report))
    text = " ".join(text.split())
    (seconds,) = re.search(r"\((\S+) s for 1,000 torques\)", text).groups()
    one_step = re.search(
        r"the two branches come out at (\S+)\. After reflow, which straightens the paths, they come"
        r" out at (\S+)\.",
        text,
    ).groups()
    names = (
        "pendulum/flow/seconds_1000",
        "two_branch/flow/euler_1_wasserstein",
        "two_branch_straight/flow/euler_1_wasserstein",
    )
    expected = [pytest.approx(report[name], rel=0.05) for name in names]
    assert [float(n) for n in (seconds, *one_step)] == expected
    systems = ("two_branch", "pendulum_clipped")
    points = max(report[f"{name}/flow/weight_error_points"] for name in systems)
    assert f"within {points:.1f} points" in text
