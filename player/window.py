"""A window to play in, if there is a display."""

import ctypes
import math
import os
import sys

from utils.pictures import enlarge

import cv2
import numpy as np

from player.film import ascii_arrows
from player.session import Session, key_table, play_loop

# Key codes that cv2.waitKeyEx returns on Linux, Windows and macOS.
ARROWS = {
    "left": (65361, 2424832, 63234),
    "right": (65363, 2555904, 63235),
    "up": (65362, 2490368, 63232),
    "down": (65364, 2621440, 63233),
}
BACKSPACE = (8, 127, 65288)


def has_display() -> bool:
    """Whether a window can be opened here.

    On Linux this asks the X server, because Qt ends the process if DISPLAY names a dead connection.
    """
    if not sys.platform.startswith("linux"):
        return "SSH_CONNECTION" not in os.environ
    try:
        x11 = ctypes.CDLL("libX11.so.6")
    except OSError:
        return False
    x11.XOpenDisplay.restype = ctypes.c_void_p
    display = x11.XOpenDisplay(None)
    return bool(display) and not x11.XCloseDisplay(ctypes.c_void_p(display))


def draw(session: Session, fps: float, table: dict, held: int, scale: int) -> np.ndarray:
    """The enlarged frame; beside it the keys, the held action and the frame rate. BGR."""
    picture, font = enlarge(session.frame, scale), cv2.FONT_HERSHEY_SIMPLEX
    keys = ["Backspace: back 1 s", "R restart", "Q quit"]
    lines = [ascii_arrows(line) for line in (f"{fps:.0f} frames/s", "", *table.values(), "", *keys)]
    height = min(24, picture.shape[0] // (len(lines) + 1))
    size = height / 44
    width = max(cv2.getTextSize(line, font, size, 1)[0][0] for line in lines)
    panel = np.full((picture.shape[0], width + 24, 3), 30, dtype=np.uint8)
    for i, line in enumerate(lines):
        color = (90, 220, 255) if i == 2 + [*table].index(held) else (220, 220, 220)
        place = (12, height * (i + 1))
        cv2.putText(panel, line, place, font, size, color, 1, cv2.LINE_AA)
    return cv2.cvtColor(np.concatenate([picture, panel], axis=1), cv2.COLOR_RGB2BGR)


def play_window(session: Session, fps: float, actions=()) -> None:
    table, title = key_table(session.world), "world"
    scale = max(1, 512 // session.frame.shape[0])
    print("keys: " + " | ".join([*table.values(), "Backspace: back 1 s", "R restart", "Q quit"]))
    cv2.namedWindow(title, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)

    def show(rate, held):
        cv2.imshow(title, draw(session, rate, table, held, scale))

    def next_key(seconds):
        key = cv2.waitKeyEx(max(1, math.ceil(1000 * seconds)))
        if key == 27 or cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1:
            return "q"
        arrow = next((arrow for arrow, codes in ARROWS.items() if key in codes), None)
        if arrow or key in BACKSPACE:
            return arrow or "backspace"
        return chr(key).lower() if 0 < key < 128 else None

    play_loop(session, fps, show, next_key, actions)
    cv2.destroyAllWindows()
