"""The files of the page, as bytes: server.py serves them and export.py writes them.

index.html style.css page.js channel.js film.js (local.js maskgit.js)     copied from this folder
worlds.json                           {"play": "socket" or "local", "worlds": [name, …]}
worlds/0/world.json                   sizes, frame rate, a key and a name per action
worlds/0/legend.png                   a row per action: the frames while it is held
worlds/0/starts.png                   one row: the initial frames to choose from
"""

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from models.world_model import WorldModel
from player.session import KEYS, arrow_actions, idle_action, legend_frames, twins

PAGE = ("index.html", "style.css", "page.js", "channel.js", "film.js")
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".png": "image/png",
}


def png(rows) -> bytes:
    """Rows of frames, uint8 (rows, columns, H, W, 3) → one PNG, without gaps between frames."""
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    return cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()


def describe(name: str, world: WorldModel, starts: np.ndarray) -> dict:
    """world.json: what the page needs to know about a world."""
    arrows = {action: arrow for arrow, action in arrow_actions(world).items()}
    same, actions = twins(world), []
    for i, name_of_action in enumerate(world.action_names):
        label = "" if name_of_action == str(i) else name_of_action
        row = {"key": KEYS[i : i + 1], "arrow": arrows.get(i), "label": label}
        actions.append(row | {"twin": same.get(i)})
    return {
        "name": name,
        "size": list(world.frame_size),
        "fps": world.fps,
        "starts": len(starts),
        "idle": idle_action(world),
        "actions": actions,
    }


def legend(world: WorldModel, starts: np.ndarray) -> Iterator[bytes | None]:
    """Make worlds/K/legend.png in small pieces of work: yields None after each, then the PNG."""

    def contrast(clip):  # a frame without detail would not show the moves
        return np.abs(np.diff(clip[-1].astype(int), axis=0)).mean()

    frames = []
    for frame in legend_frames(world, max(starts, key=contrast)):
        frames.append(frame)
        yield None
    yield png(np.stack(frames, axis=1))


def files(worlds: list, play: str) -> dict[str, bytes]:
    """worlds: a list of (name, WorldModel, starts) → {path below the page: bytes}.

    The legends are left out, because each takes some seconds to make.
    """
    found = {name: (Path(__file__).parent / name).read_bytes() for name in PAGE}
    names = [name for name, _, _ in worlds]
    found["worlds.json"] = json.dumps({"play": play, "worlds": names}).encode()
    for i, (name, world, starts) in enumerate(worlds):
        found[f"worlds/{i}/world.json"] = json.dumps(describe(name, world, starts)).encode()
        found[f"worlds/{i}/starts.png"] = png([starts[:, -1]])
    return found
