"""The files that the page consists of, as bytes: what web/server.py serves and web/export.py writes.

    index.html style.css page.js channel.js film.js (local.js maskgit.js)     as they lie in this folder
    worlds.json                           {"play": "socket" or "local", "worlds": [name, …]}
    worlds/0/world.json                   sizes, frame rate, a key and a name per action
    worlds/0/legend.png                   a row per action: what the picture does while it is held
    worlds/0/starts.png                   one row: the first frames to choose from
"""
import json
from pathlib import Path

import cv2
import numpy as np

from game import KEYS, arrow_actions, idle_action, legend_frames

PAGE = ("index.html", "style.css", "page.js", "channel.js", "film.js")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json", ".png": "image/png"}


def png(rows):
    """Rows of frames, uint8 (rows, columns, H, W, 3) → one PNG without gaps."""
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    return cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()


def describe(name, world, starts):
    """What the page is told of a world."""
    arrows = {action: arrow for arrow, action in arrow_actions(world).items()}
    names = ["" if label == str(i) else label for i, label in enumerate(world.action_names)]
    return {
        "name": name, "size": list(world.frame_size), "fps": world.fps, "starts": len(starts), "idle": idle_action(world),
        "actions": [{"key": KEYS[i : i + 1], "arrow": arrows.get(i), "label": label} for i, label in enumerate(names)],
    }  # fmt: skip


def legend(world, starts):
    """worlds/K/legend.png in small pieces of work: None after each, then the PNG."""
    busiest = max(starts, key=lambda clip: np.abs(np.diff(clip[-1].astype(int), axis=0)).mean())  # on plain ground no move would show
    frames = []
    for frame in legend_frames(world, busiest):
        frames.append(frame)
        yield None
    yield png(np.stack(frames, axis=1))


def files(worlds, play):
    """worlds: a list of (name, WorldModel, starts) → {path below the page: bytes}, but for the legends, which take some seconds each."""
    found = {name: (Path(__file__).parent / name).read_bytes() for name in PAGE}
    found["worlds.json"] = json.dumps({"play": play, "worlds": [name for name, _, _ in worlds]}).encode()
    for i, (name, world, starts) in enumerate(worlds):
        found[f"worlds/{i}/world.json"] = json.dumps(describe(name, world, starts)).encode()
        found[f"worlds/{i}/starts.png"] = png([starts[:, -1]])
    return found
