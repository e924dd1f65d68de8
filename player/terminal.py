"""A player for the terminal. It works over SSH and in tmux, from 64 columns.

Each character shows two pixels, one above the other: an upper half block in one 24-bit colour on a
background of another. Only characters that changed since the last frame are sent. Keys are read
one by one (cbreak mode) on the alternate screen. The terminal's screen and settings are always
restored, also after an error.
"""

import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from utils.cli import UserError
from utils.pictures import enlarge

import cv2
import numpy as np

from player.film import ascii_arrows
from player.session import Session, key_table, play_loop

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = None

ARROWS = {b"A": "up", b"B": "down", b"C": "right", b"D": "left"}
# an escape sequence or a single byte
KEY = re.compile(rb"\x1b[\[O][0-9;]*([A-Za-z~])|\x1b[^\[O]|([^\x1b])", re.S)
PANEL = 24  # columns reserved for the text beside the picture


def has_terminal() -> bool:
    """Whether standard input and output are a terminal that can draw."""
    if not termios or not sys.stdin.isatty() or not sys.stdout.isatty():
        return False
    return os.environ.get("TERM", "dumb") != "dumb"


@contextmanager
def own_screen(terminal: int) -> Iterator[None]:
    """Turn off line editing, echo and cursor, and show the alternate screen.

    All of it is undone at the end, also after a signal or a crash.
    """
    before = termios.tcgetattr(terminal)
    handlers = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        handlers[number] = signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        tty.setcbreak(terminal)
        settings = termios.tcgetattr(terminal)
        settings[6][termios.VSUSP] = b"\0"  # no Ctrl-Z: the shell would be on our screen
        termios.tcsetattr(terminal, termios.TCSADRAIN, settings)
        write("\x1b[?1049h\x1b[?25l")
        yield
    finally:
        write("\x1b[0m\x1b[?25h\x1b[?1049l")
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def write(text: str) -> None:
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def fit(frame: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """Scale a frame to the largest size that fits beside the panel in `columns` and `rows`.

    → uint8 (at most 2·rows, at most columns - PANEL, 3), of even height.
    """
    H, W = frame.shape[:2]
    scale = max(0, min((columns - PANEL) / W, 2 * rows / H))
    if scale >= 1:
        frame = enlarge(frame, int(scale))
    else:
        size = (max(1, int(W * scale)), max(2, int(H * scale)))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return frame[: len(frame) // 2 * 2]


class Display:
    """The screen: a frame and lines of text beside it. Only changes are sent."""

    def __init__(self):
        self.size = self.cells = self.lines = None

    def show(self, frame: np.ndarray, lines: list[str], held: int) -> None:
        """lines: text beside the picture; line number `held` is highlighted."""
        size, text = os.get_terminal_size(), ""
        if not size.columns:  # the terminal does not report its size
            size = os.terminal_size((80, 24))
        picture = fit(frame, size.columns, size.lines)
        if size != self.size:
            self.size, self.cells, self.lines = size, None, []
            text = "\x1b[0m\x1b[2J"
        text += self._draw_picture(picture)
        text += self._draw_lines(lines, held, first_column=picture.shape[1] + 2)
        write(text)

    def _draw_picture(self, picture):
        cells = picture.reshape(len(picture) // 2, 2, -1, 3).transpose(0, 2, 1, 3)
        cells = cells.reshape(*cells.shape[:2], 6)  # upper and lower RGB of each character
        new = np.ones(cells.shape[:2], bool)
        if self.cells is not None:
            new = (cells != self.cells).any(axis=-1)
        self.cells = cells
        text, row, column = [], -1, -1  # row and column of the cursor
        for y, x in np.argwhere(new).tolist():
            if (y, x) != (row, column):
                text.append(f"\x1b[{y + 1};{x + 1}H")
            text.append("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*cells[y, x].tolist()))
            row, column = y, x + 1
        return "".join(text)

    def _draw_lines(self, lines, held, first_column):
        text, shown = [], []
        width = max(0, self.size.columns - first_column)
        for y, line in enumerate(lines[: self.size.lines]):
            style = "1;33" if y == held else "0"
            shown.append(f"\x1b[{style}m{line[:width].ljust(width)}")
            if self.lines[y : y + 1] != shown[-1:]:
                text.append(f"\x1b[0m\x1b[{y + 1};{first_column + 1}H{shown[-1]}")
        self.lines = shown
        return "".join(text)


class Keyboard:
    """Read keys from a terminal and name them as `play_loop` expects."""

    def __init__(self, terminal: int):
        self.terminal, self.bytes = terminal, b""

    def next_key(self, seconds: float) -> str | None:
        """Wait at most so many seconds for a key. → its name, or None."""
        if not self.bytes and self._ready(seconds):
            self.bytes = os.read(self.terminal, 1024)
            if not self.bytes:  # the terminal is closed
                return "q"
            while self.bytes.endswith((b"\x1b", b"\x1b[", b"\x1bO")) and self._ready(0.05):
                self.bytes += os.read(self.terminal, 1024)  # the rest of an arrow key
        found = KEY.match(self.bytes)
        if not found:
            self.bytes = b""
            return None
        self.bytes = self.bytes[found.end() :]
        escape, byte = found.groups()
        if byte in (b"\x7f", b"\b"):
            return "backspace"
        return ARROWS.get(escape) if byte is None else byte.decode("latin-1").lower()

    def _ready(self, seconds):
        return bool(select.select([self.terminal], [], [], seconds)[0])


def play_terminal(session: Session, fps: float, actions=()) -> None:
    """Play in the terminal of standard input and output. Raises UserError if there is none."""
    if not has_terminal():
        raise UserError(
            "--terminal needs a terminal, on Linux or macOS; elsewhere use --web,"
            " or --actions 0,3,3,1 --save out.gif"
        )
    display, keyboard = Display(), Keyboard(sys.stdin.fileno())
    table = key_table(session.world)
    keys = {i: ascii_arrows(line).replace("arrow ", "") for i, line in table.items()}
    help_lines = ["backspace: back 1 s", "R restart", "Q quit"]

    def show(rate, held):
        marked = [f"{'>' if i == held else ' '} {key}" for i, key in keys.items()]
        title = f"frame {len(session.actions)}, {rate:.0f} fps"
        display.show(session.frame, [title, "", *marked, "", *help_lines], [*keys].index(held) + 2)

    with own_screen(sys.stdin.fileno()):
        play_loop(session, fps, show, keyboard.next_key, actions)
