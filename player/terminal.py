"""A player for the terminal: works over SSH and in tmux, at 64 columns and more.

A character shows two pixels, one above the other: an upper half block in one 24-bit colour on a ground of another. Only what has
changed since the last frame is sent. Keys are read one by one (cbreak mode), on an alternate screen; whatever happens, the terminal
gets its screen and its settings back.
"""
import os
import re
import select
import signal
import sys
from contextlib import contextmanager

import cv2
import numpy as np

from config import UserError
from game import key_table, play_loop
from pictures import enlarge, plain

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = None

ARROWS = {b"A": "up", b"B": "down", b"C": "right", b"D": "left"}
KEY = re.compile(rb"\x1b[\[O][0-9;]*([A-Za-z~])|\x1b[^\[O]|([^\x1b])", re.S)  # an escape sequence, or a byte
PANEL = 24  # columns kept for the keys beside the picture


def has_terminal():
    return bool(termios) and sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@contextmanager
def own_screen(terminal):
    """The terminal without line editing, echo and cursor, on its alternate screen; afterwards as it was, after a signal or a crash, too."""
    before = termios.tcgetattr(terminal)
    handlers = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setcbreak(terminal)
        settings = termios.tcgetattr(terminal)
        settings[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave the shell on our screen
        termios.tcsetattr(terminal, termios.TCSADRAIN, settings)
        write("\x1b[?1049h\x1b[?25l")
        yield
    finally:
        write("\x1b[0m\x1b[?25h\x1b[?1049l")
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def write(text):
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def fit(frame, columns, rows):
    """The frame as large as it fits into a terminal, beside the panel: uint8 (2·rows at most, columns - PANEL at most, 3), of even height."""
    H, W = frame.shape[:2]
    scale = max(0, min((columns - PANEL) / W, 2 * rows / H))
    if scale >= 1:
        frame = enlarge(frame, int(scale))
    else:
        frame = cv2.resize(frame, (max(1, int(W * scale)), max(2, int(H * scale))), interpolation=cv2.INTER_AREA)
    return frame[: len(frame) // 2 * 2]


class Display:
    """What stands on the screen: shows a frame and the lines beside it, and sends what is new."""

    def __init__(self):
        self.size = self.cells = self.lines = None

    def show(self, frame, lines, held):
        """lines: text beside the picture; the one numbered `held` stands out."""
        size, text = os.get_terminal_size(), []
        if not size.columns:  # a terminal that does not say
            size = os.terminal_size((80, 24))
        picture = fit(frame, size.columns, size.lines)
        cells = picture.reshape(len(picture) // 2, 2, -1, 3).transpose(0, 2, 1, 3).reshape(len(picture) // 2, -1, 6)  # upper and lower RGB
        if size != self.size:
            self.size, self.cells, self.lines = size, None, []
            text.append("\x1b[0m\x1b[2J")
        new = np.ones(cells.shape[:2], bool) if self.cells is None else (cells != self.cells).any(axis=-1)
        row, column = -1, -1  # where the cursor is
        for y, x in np.argwhere(new).tolist():
            if (y, x) != (row, column):
                text.append(f"\x1b[{y + 1};{x + 1}H")
            text.append("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*cells[y, x].tolist()))
            row, column = y, x + 1
        width = max(0, size.columns - picture.shape[1] - 2)
        lines = [f"\x1b[{'1;33' if i == held else '0'}m{line[:width].ljust(width)}" for i, line in enumerate(lines[: size.lines])]
        for y, line in enumerate(lines):
            if self.lines[y : y + 1] != [line]:
                text.append(f"\x1b[0m\x1b[{y + 1};{picture.shape[1] + 3}H{line}")
        self.cells, self.lines = cells, lines
        write("".join(text))


class Keyboard:
    """Keys of a terminal as `play_loop` names them."""

    def __init__(self, terminal):
        self.terminal, self.bytes = terminal, b""

    def next_key(self, seconds):
        if not self.bytes and select.select([self.terminal], [], [], seconds)[0]:
            self.bytes = os.read(self.terminal, 1024)
            if not self.bytes:  # the terminal is gone
                return "q"
            while self.bytes.endswith((b"\x1b", b"\x1b[", b"\x1bO")) and select.select([self.terminal], [], [], 0.05)[0]:
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


def play_terminal(game, fps, actions=()):
    """Play in the terminal that standard input and output are. Raises UserError where they are none."""
    if not has_terminal():
        raise UserError("--terminal needs a terminal, on Linux or macOS; elsewhere use --web, or --actions 0,3,3,1 --save out.gif")
    table, display, keyboard = key_table(game.world), Display(), Keyboard(sys.stdin.fileno())

    def show(rate, held):
        keys = [f"{'>' if i == held else ' '} {plain(line).replace('arrow ', '')}" for i, line in enumerate(table)]
        lines = [f"frame {len(game.actions)}, {rate:.0f} a second", "", *keys, "", "backspace: a second back", "R restart", "Q quit"]
        display.show(game.frame, lines, held + 2)

    with own_screen(sys.stdin.fileno()):
        play_loop(game, fps, show, keyboard.next_key, actions)
