"""Sequences of states and actions from systems whose equations are known.

    python extras/flow_inverse_dynamics/pendulum.py --config extras/flow_inverse_dynamics/configs/dataset/pendulum.json

The pendulum is Gymnasium's Pendulum-v1: θ = 0 is upright, θ″ = 3g/(2l)·sin θ + 3/(m·l²)·(u − friction·θ′), here integrated by Runge-Kutta of
order 4; torques are held for `dt` seconds, the speed is cut at ±8 after each. A state is (cos θ, sin θ, θ′). "two_branch" is a system on a line
with s′ = s + a²: after it nobody can tell a from −a, only that +|a| was drawn with probability σ(2s).

A configuration (JSON, configs/dataset/) names the file to write and any of the fields of `Sequences`; `shift` changes the pendulum's constants
and leaves its equations what they are ("integrable dynamics shift").
"""
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Parser, UserError, make_folder, print_user_errors  # noqa: E402


@dataclass
class Pendulum:
    """Constants of Pendulum-v1, in SI units; it has no friction."""

    gravity: float = 10.0
    mass: float = 1.0
    length: float = 1.0
    friction: float = 0.0  # N·m·s
    dt: float = 0.05
    max_speed: float = 8.0

    def rate(self, motion, torque):
        """motion (..., 2) is θ, θ′ → θ′, θ″."""
        theta, speed = motion[..., 0], motion[..., 1]
        turning = 3 / (self.mass * self.length**2) * (torque - self.friction * speed)
        return np.stack([speed, 3 * self.gravity / (2 * self.length) * np.sin(theta) + turning], axis=-1)

    def step(self, motion, torque):
        """One held torque: Runge-Kutta of order 4 over dt, then the cut of the speed."""
        h = self.dt
        k1 = self.rate(motion, torque)
        k2 = self.rate(motion + h / 2 * k1, torque)
        k3 = self.rate(motion + h / 2 * k2, torque)
        k4 = self.rate(motion + h * k3, torque)
        motion = motion + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return np.stack([motion[..., 0], motion[..., 1].clip(-self.max_speed, self.max_speed)], axis=-1)

    def energy(self, motion):
        """In joules; without torque and friction it stays what it is."""
        return self.mass * self.length * (self.length * motion[..., 1] ** 2 / 6 + self.gravity * np.cos(motion[..., 0]) / 2)


@dataclass
class Sequences:
    """What a dataset configuration may say."""

    path: str  # the HDF5 file, with /sequence/ in it
    system: str = "pendulum"  # or two_branch
    n_episodes: int = 200
    n_steps: int = 100  # per episode
    seed: int = 0
    max_action: float = 2.0  # actions are drawn evenly from ± this
    clip: float = 0.0  # and cut to ± this before they act, if it is not 0; recorded as drawn
    chunk: int = 1  # actions between the two states of a triplet
    shift: dict = field(default_factory=dict)  # the pendulum's constants that differ


def read_config(path, kind):
    """A JSON file → kind(**values), a dataclass. Raises UserError for a missing file, a missing or an unknown key, a wrong kind of value."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        values = dict(values)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a configuration in JSON ({getattr(error, 'strerror', None) or error}); see the folder configs") from None
    known = {f.name: f for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{path} has the unknown key {name!r}; there are {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float) if known[name].type is float else known[name].type):
            raise UserError(f"{path}: {name} must be of the type {known[name].type.__name__}, not {value!r}")
    try:
        return kind(**values)
    except TypeError:  # the only key without a default
        raise UserError(f"{path} lacks the key 'path'") from None


def pendulum_of(shift):
    """The pendulum with some constants changed. Raises UserError for one that it does not have."""
    unknown = set(shift) - {f.name for f in fields(Pendulum)}
    if unknown:
        raise UserError(f"the pendulum has no {', '.join(sorted(unknown))}; shift any of {', '.join(f.name for f in fields(Pendulum))}")
    return Pendulum(**shift)


def simulate(config):
    """→ states (n, steps + 1, S) and actions (n, steps, 1) of all episodes, float32."""
    rng = np.random.default_rng(config.seed)
    n, T = config.n_episodes, config.n_steps
    if config.system == "two_branch":
        states = [rng.uniform(-1, 1, (n, 1))]
        actions = rng.uniform(0.2, 1, (n, T, 1))
        for t in range(T):
            plus = rng.random((n, 1)) < 1 / (1 + np.exp(-2 * states[-1]))
            actions[:, t] *= np.where(plus, 1, -1)
            moved = states[-1] + actions[:, t] ** 2
            states.append((moved + 1) % 2 - 1)  # the line is a circle: s stays in [-1, 1)
        return np.stack(states, axis=1).astype(np.float32), actions.astype(np.float32)
    if config.system != "pendulum":
        raise UserError(f"unknown system {config.system!r}; there are pendulum and two_branch")
    pendulum = pendulum_of(config.shift)
    actions = rng.uniform(-config.max_action, config.max_action, (n, T, 1))
    acting = actions.clip(-config.clip, config.clip) if config.clip else actions
    motion = [np.stack([rng.uniform(-np.pi, np.pi, n), rng.uniform(-1, 1, n)], axis=-1)]  # as Pendulum-v1 begins
    for t in range(T):
        motion.append(pendulum.step(motion[-1], acting[:, t, 0]))
    theta, speed = np.moveaxis(np.stack(motion, axis=1), -1, 0)
    return np.stack([np.cos(theta), np.sin(theta), speed], axis=-1).astype(np.float32), actions.astype(np.float32)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="of the dataset (JSON)")
    args = parser.parse_args(argv)
    config = read_config(args.config, Sequences)
    states, actions = simulate(config)
    n, T = actions.shape[:2]
    make_folder(Path(config.path).parent)
    with h5py.File(config.path, "w") as file:
        # one row per state; the action of a row comes after it, and an episode's last one has none (zero)
        file["states"] = states.reshape(n * (T + 1), -1)
        file["actions"] = np.concatenate([actions, np.zeros_like(actions[:, :1])], axis=1).reshape(n * (T + 1), -1)
        file["episode_starts"] = np.arange(n) * (T + 1)
        file.attrs["config"] = json.dumps(asdict(config))
    print(f"{config.path}: {n} episodes of {T} steps; next: python extras/flow_inverse_dynamics/create_dataset.py --config {args.config}")


if __name__ == "__main__":
    print_user_errors()
    main()
