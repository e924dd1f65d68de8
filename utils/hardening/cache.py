"""Arrays that took long to compute, kept in a file: another or a damaged one is as good as none."""

import os
from pathlib import Path

import h5py
import numpy as np


def read_cache(path: Path | None, key: str) -> dict[str, np.ndarray] | None:
    """What write_cache kept under this key; None, with a line, for another or a damaged one."""
    if path is None or not path.exists():
        return None
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("key") == key:
                return {name: file[name][()] for name in file}
    except (OSError, KeyError):
        pass
    print(f"{path} belongs to other weights, data or settings; rebuilding it")
    return None


def write_cache(path: Path | None, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep arrays that can be computed again; where there is no place, they are not kept."""
    if path is None:
        return
    part = path.with_name(path.name + ".part")
    try:
        with h5py.File(part, "w") as file:
            for name, array in arrays.items():
                file[name] = array
            file.attrs["key"] = key
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
