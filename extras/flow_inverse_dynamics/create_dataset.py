"""Turn a sequence dataset into triplets (s, a, s′), which an inverse model learns from.

    P=extras/flow_inverse_dynamics/configs/dataset
    python -m extras.flow_inverse_dynamics.create_dataset --config $P/pendulum.json

Reads the HDF5 file that the configuration names: `states` (N, S), `actions` (N, A) and
`episode_starts`. Writes `s`, `a` and `s_next` to the same path, in which the folder "sequence"
becomes "inverse_dynamics". a (n, chunk, A) is the chunk of actions between the two states.
"""

from pathlib import Path

from utils.cli import Parser, UserError, print_user_errors
from utils.hardening.dataset import first_line, member
from utils.hardening.files import make_folder

import h5py
import numpy as np

from extras.flow_inverse_dynamics.pendulum import Sequences, read_config


def triplets_path(path: str | Path) -> Path:
    """The path with its folder "sequence", the last one of that name, as "inverse_dynamics"."""
    *folders, name = Path(path).parts
    if "sequence" not in folders:
        raise UserError(
            f'the path {path} must have a folder "sequence", which becomes "inverse_dynamics"'
        )
    last = len(folders) - 1 - folders[::-1].index("sequence")
    folders[last] = "inverse_dynamics"
    return Path(*folders, name)


def read_arrays(path: str | Path, names: list[str]) -> list[np.ndarray]:
    """The named datasets of an HDF5 file.

    Raises UserError where one is missing or holds NaN.
    """
    try:
        with h5py.File(path) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}; it needs {', '.join(names)}")
            arrays = [member(file, name, path) for name in names]
            if any(array is None for array in arrays):
                raise UserError(f"{path}: {', '.join(names)} must all be datasets")
            arrays = [array[:] for array in arrays]
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({first_line(error)!r}); make it again") from None
    except OSError:
        raise UserError(
            f"there is no dataset at {path};"
            " the README of this folder has the commands that make it"
        ) from None
    for name, array in zip(names, arrays, strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad_rows = (~np.isfinite(array)).reshape(len(array), -1).any(axis=1)
            raise UserError(
                f"{path}: {name} holds NaN or infinity in {int(bad_rows.sum())} rows; remove them"
            )
    return arrays


def triplets(
    states: np.ndarray, actions: np.ndarray, starts: np.ndarray, chunk: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """states (N, S), actions (N, A), episode starts → s (n, S), a (n, chunk, A), s′ (n, S).

    All states of a triplet belong to one episode.
    """
    if len(states) != len(actions):
        raise UserError(
            f"there are {len(states)} states, but {len(actions)} actions; give one action per"
            " state (that of an episode's last state is not used)"
        )
    rising = len(starts) > 0 and starts[0] == 0 and (np.diff(starts) > 0).all()
    if not rising or starts[-1] >= len(states):
        raise UserError("episode_starts must rise from 0 and end before the last state")
    episode = np.searchsorted(starts, np.arange(len(states)), side="right")
    first = np.flatnonzero(episode[:-chunk] == episode[chunk:])
    chunks = np.stack([actions[first + i] for i in range(chunk)], axis=1)
    return states[first], chunks, states[first + chunk]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="configuration of the dataset, JSON")
    help = "use at most this many triplets, chosen at random [all]"
    parser.add_argument("--max-samples", type=int, default=0, help=help)
    args = parser.parse_args(argv)
    config = read_config(args.config, Sequences)
    if args.max_samples < 0 or config.chunk < 1:
        raise UserError(
            "--max-samples must not be negative and chunk at least 1,"
            f" got {args.max_samples} and {config.chunk}"
        )
    out = triplets_path(config.path)
    arrays = read_arrays(config.path, ["states", "actions", "episode_starts"])
    s, a, s_next = triplets(*arrays, config.chunk)
    if 0 < args.max_samples < len(s):
        rng = np.random.default_rng(config.seed)
        kept = np.sort(rng.choice(len(s), args.max_samples, replace=False))
        s, a, s_next = s[kept], a[kept], s_next[kept]
    make_folder(out.parent)
    with h5py.File(out, "w") as file:
        file["s"], file["a"], file["s_next"] = s, a, s_next
    command = f"python -m extras.flow_inverse_dynamics.train --dataset-config {args.config}"
    print(f"{out}: {len(s):,} triplets; next: {command}")


if __name__ == "__main__":
    print_user_errors()
    main()
