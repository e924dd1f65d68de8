"""The player in the terminal: its drawing, its keys, and all of it in a real terminal (tmux)."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from utils.checkpoint import load_world

import cv2
import numpy as np
import pytest

from player import terminal
from player.session import read_run
from player.terminal import PANEL, Display, Keyboard, fit

ROOT = Path(__file__).parent.parent


class Screen:
    """What a terminal makes of the escape sequences that Display sends.

    Each cell has a character and two colours.
    """

    def __init__(self, columns, rows):
        self.text, self.colors = np.full((rows, columns), " "), np.zeros((rows, columns, 2, 3), int)
        self.color, self.y, self.x = np.zeros((2, 3), int), 0, 0

    def receive(self, text):
        for numbers, kind, character in re.findall(r"\x1b\[([?\d;]*)([a-zA-Z])|(.)", text, re.S):
            if kind == "H":
                self.y, self.x = (int(n) - 1 for n in numbers.split(";"))
            elif kind == "J":
                self.text[:] = " "
            elif kind == "m":
                # the upper pixel is the character's own colour, the lower one the background
                for ground, *color in re.findall(r"([34])8;2;(\d+);(\d+);(\d+)", numbers):
                    self.color["34".index(ground)] = color
            elif character == "\n":
                self.y, self.x = self.y + 1, 0
            elif character:
                self.text[self.y, self.x], self.colors[self.y, self.x] = character, self.color
                self.x += 1
        return self

    def pixels(self, rows, columns):
        assert (self.text[:rows, :columns] == "▀").all()
        return self.colors[:rows, :columns].transpose(0, 2, 1, 3).reshape(2 * rows, columns, 3)


@pytest.fixture
def sent(monkeypatch):
    sent = []
    monkeypatch.setattr(terminal, "write", sent.append)
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((100, 40)))
    return sent


def test_a_frame_is_drawn_pixel_by_pixel_and_then_only_what_changes(sent, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    frames[1, 2:] = frames[0, 2:]  # one row of characters changes
    display, screen = Display(), Screen(100, 40)
    for held, frame in enumerate(frames):
        display.show(frame, ["zero", "one", "x" * 99], held)
        screen.receive(sent[-1])
        assert np.array_equal(screen.pixels(32, 64), frame)
        lines = ["".join(row[66:]).rstrip() for row in screen.text[:4]]
        assert lines == ["zero", "one", "x" * 34, ""]
    assert len(sent[1]) < 3000 < 60_000 < len(sent[0])
    display.show(frames[1], ["zero", "one", "x" * 99], 1)
    assert sent[-1] == ""  # nothing has changed
    # the window is smaller: all is drawn again
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((64, 20)))
    display.show(frames[1], ["zero"], 0)
    screen = Screen(64, 20).receive(sent[-1])
    small = cv2.resize(frames[1], (40, 40), interpolation=cv2.INTER_AREA)
    assert np.array_equal(screen.pixels(20, 40), small)


SIZES = [
    (64, 24, (40, 40)),
    (80, 24, (48, 48)),
    (100, 40, (64, 64)),
    (300, 70, (128, 128)),
    (0, 0, (2, 1)),
]


@pytest.mark.parametrize("columns, rows, size", SIZES)
def test_the_picture_leaves_room_for_the_keys(columns, rows, size):
    picture = fit(np.zeros((64, 64, 3), np.uint8), columns, rows)
    assert picture.shape[:2] == size
    fits = picture.shape[1] <= columns - PANEL and len(picture) <= 2 * rows
    assert columns == 0 or fits


def test_keys_have_the_names_of_the_play_loop():
    reading, writing = os.pipe()
    keyboard = Keyboard(reading)
    os.write(writing, b"3R\x1b[A\x1bOD\x1b[1;5C\x7f\x1b[15~\x1bx\xc3\xa4Q")
    found = [keyboard.next_key(0) for _ in range(11)]
    assert found[:6] == ["3", "r", "up", "left", "right", "backspace"]
    assert found[6:8] == [None, None] and found[-1] == "q"
    began = time.perf_counter()
    assert keyboard.next_key(0.05) is None
    assert time.perf_counter() - began > 0.04  # it waits as long as it was told
    os.write(writing, b"\x1b")
    assert keyboard.next_key(0) is None  # Escape alone
    os.close(writing)
    assert keyboard.next_key(0) == "q"  # the terminal is gone


DRIVER = """
import os, subprocess
import play
from player.session import Session
def broken(self, action):
    raise RuntimeError("broken")
def settings():
    return subprocess.run(["stty", "-a"], capture_output=True, text=True).stdout
open("pid", "w").write(str(os.getpid()))
before = settings()
for name in ("Q", "interrupt", "crash", "terminate"):
    if name == "crash":
        whole, Session.press = Session.press, broken
    try:
        play.main({options!r} + ["--save", name + ".json"])
    except BaseException as error:
        print(repr(error))
    if name == "crash":
        Session.press = whole
    print(name, "the same" if settings() == before else "other", "settings", flush=True)
    input()
"""


class Tmux:
    """A terminal of 100 × 40, with a process in it."""

    def __init__(self, folder, command):
        self.name = ["tmux", "-L", f"{folder.name}-{os.getpid()}", "-f", "/dev/null"]
        shell = f"cd {shlex.quote(str(folder))} && {command} 2>&1; sleep 600"
        hidden = ("DISPLAY", "TMUX")
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        env["PYTHONPATH"] = str(ROOT)
        size = ["-x", "100", "-y", "40"]
        subprocess.run([*self.name, "new-session", "-d", *size, shell], check=True, env=env)

    def run(self, *words):
        command = [*self.name, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def wait_for(self, text):
        for _ in range(600):
            if re.search(text, seen := self.run("capture-pane", "-p")):
                return seen
            time.sleep(0.1)
        raise TimeoutError(f"no {text} in:\n{seen}")

    def pictures(self, until):
        """Frame number → what is drawn beside it, until that number."""
        found, number = {}, -1
        while number < until:
            screen = Screen(100, 40).receive(self.run("capture-pane", "-e", "-p"))
            number = int(re.search(r"frame (\d+),", "".join(screen.text[0])).group(1))
            found[number] = screen.pixels(32, 64)
            time.sleep(0.05)
        return found

    def restored(self):
        flags = self.run("display-message", "-p", "#{alternate_on} #{cursor_flag}")
        return flags.split() == ["0", "1"]


@pytest.fixture
def tmux(world_dir, tmp_path):
    """The driver, playing in a terminal."""
    if not shutil.which("tmux"):
        pytest.skip("terminal tests need tmux: apt-get install tmux")
    options = ["--terminal", "--checkpoint", world_dir, "--temperature", "0", "--fps", "4"]
    (tmp_path / "driver.py").write_text(DRIVER.format(options=options))
    tmux = Tmux(tmp_path, f"{shlex.quote(sys.executable)} driver.py")
    yield tmux
    subprocess.run([*tmux.name, "kill-server"])


def test_a_real_terminal(tmux, world_dir, tmp_path):
    tmux.wait_for(r"frame 1,")
    assert not tmux.restored()
    tmux.run("send-keys", "1")
    assert re.search(r"^> 1", tmux.wait_for(r"▀ +> 1").splitlines()[3][66:])
    one = tmux.pictures(until=9)
    tmux.run("send-keys", "q")
    tmux.wait_for("Q the same settings")
    assert tmux.restored()
    session, actions = read_run(tmp_path / "Q.json", load_world(world_dir))
    frames = [session.frame] + [session.press(action) for action in actions]
    assert set(actions[4:]) == {1}
    right = [np.array_equal(picture, frames[number]) for number, picture in one.items()]
    assert sum(right) > len(right) / 2  # some may have been caught while they were drawn

    tmux.run("send-keys", "Enter")  # the same start again, another action, and Ctrl-C
    tmux.wait_for(r"frame 1,")
    tmux.run("send-keys", "3")
    two = tmux.pictures(until=9)
    both = set(one) & set(two) & set(range(5, 10))
    assert all(np.abs(two[n] - one[n]).max() > 30 for n in both)
    tmux.run("send-keys", "C-c")
    tmux.wait_for("interrupt the same settings")
    assert tmux.restored() and "KeyboardInterrupt" in tmux.run("capture-pane", "-p")

    tmux.run("send-keys", "Enter")
    tmux.wait_for("crash the same settings")
    assert tmux.restored() and "broken" in tmux.run("capture-pane", "-p")

    tmux.run("send-keys", "Enter")
    tmux.wait_for(r"frame 1,")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    tmux.wait_for("terminate the same settings")
    assert tmux.restored()
