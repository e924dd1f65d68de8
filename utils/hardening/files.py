"""Files that are written whole or not at all, and that tell whether they are still whole."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from utils.cli import CheckpointError, UserError

import h5py
import numpy as np
import torch

MARK = b"sha256: "  # the last 40 bytes of a file are this and the digest of all before
TAIL = len(MARK) + 32


def make_folder(path: str | Path) -> None:
    """Create the folder `path` where it is missing. Raises UserError if that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write")
    except OSError as error:
        text = f"cannot write to {path}: {error.strerror}; choose another place"
        raise UserError(text) from None


def previous_of(path: str | Path) -> Path:
    """Where the file before goes: tokenizer.pt → tokenizer.previous.pt."""
    return Path(path).with_suffix(".previous.pt")


def write_whole(path: Path, content: bytes, keep_previous: bool = False) -> None:
    """Write content and its SHA-256: a temporary file, flushed to disk, then renamed.

    At every moment `path` is old or new. keep_previous: what was there becomes previous_of(path).
    Raises CheckpointError where it cannot be written; then nothing has changed.
    """
    part = path.with_name(path.name + ".part")
    spare = previous_of(path).with_suffix(".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.write(MARK + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and is_whole(path):
            spare.unlink(missing_ok=True)
            try:
                os.link(path, spare)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, spare)
            os.replace(spare, previous_of(path))
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):  # the new names must reach the disk too
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        needed = (len(content) + TAIL) / 2**20
        free = shutil.disk_usage(path.parent).free / 2**20
        raise CheckpointError(
            f"cannot save {path} ({error.strerror}): it needs {needed:,.1f} MB,"
            f" {free:,.1f} MB are free; what was saved before is still there"
        ) from None
    finally:
        for leftover in (part, spare):
            leftover.unlink(missing_ok=True)


def check_digest(file: BinaryIO) -> int:
    """→ the size of the content of an open file. Raises ValueError if it is not as written."""
    size, digest = file.seek(0, os.SEEK_END) - TAIL, hashlib.sha256()
    file.seek(max(0, size))
    tail = file.read()
    if size < 0 or tail[: len(MARK)] != MARK:
        raise ValueError("it does not end with a checksum")
    file.seek(0)
    for start in range(0, size, 1 << 20):
        digest.update(file.read(min(1 << 20, size - start)))
    if digest.digest() != tail[len(MARK) :]:
        raise ValueError("its checksum is wrong")
    return size


def is_whole(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return check_digest(file) > 0
    except (OSError, ValueError):
        return False


def fingerprint(checkpoint: dict) -> str:
    """Eight hex digits of the weights.

    Tokens mean nothing to a dynamics model that was trained with another tokenizer.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(checkpoint["model"].items()):
        data = weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + data)
    return digest.hexdigest()[:8]


def data_fingerprint(rows: np.ndarray | h5py.Dataset) -> str:
    """Eight hex digits of frames or other rows: of their shape, and of up to 64 from all over.

    The same data has the same ones wherever it lies, and whatever its file is called.
    """
    digest = hashlib.sha256(str(tuple(rows.shape)).encode())
    for i in np.linspace(0, len(rows) - 1, min(64, len(rows))).astype(int):
        digest.update(np.ascontiguousarray(rows[i]).tobytes())
    return digest.hexdigest()[:8]


def files_fingerprint(paths: list[str]) -> str:
    """Eight hex digits of files: of the size and the first 64 KiB of each, not of their names."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(str(os.path.getsize(path)).encode() + file.read(1 << 16))
    return digest.hexdigest()[:8]


def append_line(path: Path, line: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def keep_lines(path: Path, step: int) -> list[dict]:
    """Cut a log of an earlier run back to the lines up to `step`, and return them."""
    lines = []
    if step and path.exists():
        for text in path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
                if line["step"] <= step and "stopped" not in line:
                    lines.append(line)
            except (ValueError, KeyError, TypeError):  # cut short, or not ours
                continue
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(part, path)
    return lines
