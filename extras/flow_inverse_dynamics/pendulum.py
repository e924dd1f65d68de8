"""Make sequences of states and actions from systems with known equations.

    P=extras/flow_inverse_dynamics/configs/dataset
    python -m extras.flow_inverse_dynamics.pendulum --config $P/pendulum.json

The pendulum is Gymnasium's Pendulum-v1, with friction added. θ = 0 is upright, and
θ″ = 3g/(2l)·sin θ + 3/(m·l²)·(u − friction·θ′). It is integrated here by Runge-Kutta of order 4.
Each torque is held for `dt` seconds. Then the speed is clipped to ±8. A state is
(cos θ, sin θ, θ′).

"two_branch" is a system on a line with s′ = s + a². The states do not show whether the action was
a or −a. Only the distribution is known: the action is +|a| with probability σ(2s).

A configuration (JSON, configs/dataset/) sets `path`, the file to write, and any other fields of
`Sequences`. `shift` changes the pendulum's constants and keeps its equations ("integrable dynamics
shift").
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from utils.cli import Parser, UserError, print_user_errors
from utils.hardening.files import make_folder

import h5py
import numpy as np


@dataclass
class Pendulum:
    """A pendulum in SI units. The defaults are the constants of Pendulum-v1."""

    gravity: float = 10.0
    mass: float = 1.0
    length: float = 1.0
    friction: float = 0.0  # N·m·s
    dt: float = 0.05
    max_speed: float = 8.0

    def rate(self, motion: np.ndarray, torque: np.ndarray | float) -> np.ndarray:
        """motion (..., 2), which is θ and θ′ → θ′ and θ″."""
        theta, speed = motion[..., 0], motion[..., 1]
        falling = 3 * self.gravity / (2 * self.length) * np.sin(theta)
        turning = 3 / (self.mass * self.length**2) * (torque - self.friction * speed)
        return np.stack([speed, falling + turning], axis=-1)

    def step(self, motion: np.ndarray, torque: np.ndarray | float) -> np.ndarray:
        """One constant torque: Runge-Kutta of order 4 over dt, then the speed is clipped."""
        h = self.dt
        k1 = self.rate(motion, torque)
        k2 = self.rate(motion + h / 2 * k1, torque)
        k3 = self.rate(motion + h / 2 * k2, torque)
        k4 = self.rate(motion + h * k3, torque)
        motion = motion + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        speed = motion[..., 1].clip(-self.max_speed, self.max_speed)
        return np.stack([motion[..., 0], speed], axis=-1)

    def energy(self, motion: np.ndarray) -> np.ndarray:
        """In joules. It is constant without torque and friction."""
        kinetic = self.length * motion[..., 1] ** 2 / 6
        potential = self.gravity * np.cos(motion[..., 0]) / 2
        return self.mass * self.length * (kinetic + potential)


@dataclass
class Sequences:
    """The fields of a dataset configuration."""

    path: str  # the HDF5 file; the path must contain "sequence"
    system: str = "pendulum"  # or two_branch
    n_episodes: int = 200
    n_steps: int = 100  # per episode
    seed: int = 0
    max_action: float = 2.0  # actions are uniform in ± this
    clip: float = 0.0  # if not 0, the torque that acts is clipped to ± this; the record is not
    chunk: int = 1  # actions between the two states of a triplet
    shift: dict = field(default_factory=dict)  # constants of the pendulum, with new values


def read_config(path: str | Path, kind: type) -> Any:
    """A JSON file → kind(**values), a dataclass.

    Raises UserError for a missing file, a missing or unknown key, or a value of the wrong type.
    """
    try:
        values = dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} is not a configuration in JSON ({reason}); for examples see the folder configs"
        ) from None
    types = {f.name: f.type for f in fields(kind)}
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{path} has the unknown key {name!r}; there are {', '.join(types)}")
        wanted = types[name]
        accepted = (int, float) if wanted is float else wanted
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise UserError(f"{path}: {name} must be of the type {wanted.__name__}, not {value!r}")
    try:
        return kind(**values)
    except TypeError:  # the only key without a default
        raise UserError(f"{path} lacks the key 'path'") from None


def pendulum_of(shift: dict[str, float]) -> Pendulum:
    """The pendulum with some constants changed. Raises UserError for an unknown constant."""
    known = [f.name for f in fields(Pendulum)]
    unknown = sorted(set(shift) - set(known))
    if unknown:
        raise UserError(
            f"the pendulum has no {', '.join(unknown)}; shift one of {', '.join(known)}"
        )
    return Pendulum(**shift)


def simulate(config: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """→ states (n, steps + 1, S) and actions (n, steps, 1) of all episodes, float32."""
    systems = {"pendulum": simulate_pendulum, "two_branch": simulate_two_branch}
    if config.system not in systems:
        raise UserError(f"unknown system {config.system!r}; there are {' and '.join(systems)}")
    states, actions = systems[config.system](config, np.random.default_rng(config.seed))
    return states.astype(np.float32), actions.astype(np.float32)


def simulate_two_branch(
    config: Sequences, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    n, T = config.n_episodes, config.n_steps
    states = [rng.uniform(-1, 1, (n, 1))]
    actions = rng.uniform(0.2, 1, (n, T, 1))
    for t in range(T):
        plus = rng.random((n, 1)) < 1 / (1 + np.exp(-2 * states[-1]))
        actions[:, t] *= np.where(plus, 1, -1)
        moved = states[-1] + actions[:, t] ** 2
        states.append((moved + 1) % 2 - 1)  # the line is a circle: s stays in [-1, 1)
    return np.stack(states, axis=1), actions


def simulate_pendulum(config: Sequences, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    n, T = config.n_episodes, config.n_steps
    pendulum = pendulum_of(config.shift)
    actions = rng.uniform(-config.max_action, config.max_action, (n, T, 1))
    acting = actions.clip(-config.clip, config.clip) if config.clip else actions
    # the initial states of Pendulum-v1
    motion = [np.stack([rng.uniform(-np.pi, np.pi, n), rng.uniform(-1, 1, n)], axis=-1)]
    for t in range(T):
        motion.append(pendulum.step(motion[-1], acting[:, t, 0]))
    theta, speed = np.moveaxis(np.stack(motion, axis=1), -1, 0)
    return np.stack([np.cos(theta), np.sin(theta), speed], axis=-1), actions


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="configuration of the dataset, JSON")
    args = parser.parse_args(argv)
    config = read_config(args.config, Sequences)
    states, actions = simulate(config)
    n, T = actions.shape[:2]
    # One row per state. The action of a row follows its state; an episode's last row has none.
    padded = np.concatenate([actions, np.zeros_like(actions[:, :1])], axis=1)
    make_folder(Path(config.path).parent)
    with h5py.File(config.path, "w") as file:
        file["states"] = states.reshape(n * (T + 1), -1)
        file["actions"] = padded.reshape(n * (T + 1), -1)
        file["episode_starts"] = np.arange(n) * (T + 1)
        file.attrs["config"] = json.dumps(asdict(config))
    command = f"python -m extras.flow_inverse_dynamics.create_dataset --config {args.config}"
    print(f"{config.path}: {n} episodes of {T} steps; next: {command}")


if __name__ == "__main__":
    print_user_errors()
    main()
