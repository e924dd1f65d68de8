"""From a sequence dataset to triplets (s, a, s′): what an inverse model learns from.

    python extras/flow_inverse_dynamics/create_dataset.py --config extras/flow_inverse_dynamics/configs/dataset/pendulum.json --max-samples 20000

Reads the HDF5 file that the configuration names (`states` (N, S), `actions` (N, A), `episode_starts`) and writes `s`, `a` and `s_next` to
the same path with "sequence" replaced by "inverse_dynamics". a is the chunk of actions between the two states, (n, chunk, A).
"""
import sys
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config import Parser, UserError, make_folder, print_user_errors  # noqa: E402
from data_utils import member  # noqa: E402
from extras.flow_inverse_dynamics.pendulum import Sequences, read_config  # noqa: E402


def triplets_path(path):
    if "sequence" not in str(path):
        raise UserError(f'the path {path} must contain "sequence", which becomes "inverse_dynamics"')
    return Path(str(path).replace("sequence", "inverse_dynamics"))


def read_arrays(path, names):
    """The named datasets of an HDF5 file, as arrays. Raises UserError where one is missing or holds NaN."""
    try:
        with h5py.File(path) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}; it needs {', '.join(names)}")
            arrays = [member(file, name, path) for name in names]
            if any(array is None for array in arrays):
                raise UserError(f"{path}: {', '.join(names)} must be datasets, and not all are")
            arrays = [array[:] for array in arrays]
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({(str(error).splitlines() or [''])[0][:100]!r}); make it again") from None
    except OSError:
        raise UserError(f"there is no dataset at {path}; the README of this folder has the commands that make it") from None
    for name, array in zip(names, arrays):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds NaN or infinity in {int((~np.isfinite(array)).reshape(len(array), -1).any(1).sum())} rows; remove them")
    return arrays


def triplets(states, actions, starts, chunk=1):
    """states (N, S), actions (N, A), episode starts → s (n, S), a (n, chunk, A), s′ (n, S), none of them across the border of an episode."""
    if len(states) != len(actions):
        raise UserError(f"there are {len(states)} states, but {len(actions)} actions; there must be one per state (an episode's last counts for nothing)")
    if len(starts) == 0 or starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= len(states):
        raise UserError("episode_starts must rise from 0 and end before the last state")
    episode = np.searchsorted(starts, np.arange(len(states)), side="right")
    first = np.flatnonzero(episode[:-chunk] == episode[chunk:])
    return states[first], np.stack([actions[first + i] for i in range(chunk)], axis=1), states[first + chunk]


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="of the dataset (JSON)")
    parser.add_argument("--max-samples", type=int, default=0, help="at most so many triplets, drawn at random [all]")
    args = parser.parse_args(argv)
    config = read_config(args.config, Sequences)
    if args.max_samples < 0 or config.chunk < 1:
        raise UserError(f"--max-samples must not be negative and chunk at least 1, got {args.max_samples} and {config.chunk}")
    out = triplets_path(config.path)
    s, a, s_next = triplets(*read_arrays(config.path, ["states", "actions", "episode_starts"]), config.chunk)
    if 0 < args.max_samples < len(s):
        kept = np.sort(np.random.default_rng(config.seed).choice(len(s), args.max_samples, replace=False))
        s, a, s_next = s[kept], a[kept], s_next[kept]
    make_folder(out.parent)
    with h5py.File(out, "w") as file:
        file["s"], file["a"], file["s_next"] = s, a, s_next
    print(f"{out}: {len(s):,} triplets; next: python extras/flow_inverse_dynamics/train.py --dataset-config {args.config}")


if __name__ == "__main__":
    print_user_errors()
    main()
