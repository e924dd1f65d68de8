"""How the program ends when something went wrong that nobody caught."""

import errno
import sys
from types import TracebackType

from utils.cli import UserError


def print_error(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """A UserError or a full disk as one line and exit code 2; the rest as Python does it."""
    text = str(error) if issubclass(kind, UserError) else ""
    if issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = error.filename or ""
        text = f"cannot write {place} ({error.strerror}); make room, continue with --resume"
    if text:
        print(f"error: {text}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    if kind is KeyboardInterrupt:
        raise SystemExit(130)
    sys.__excepthook__(kind, error, traceback)
