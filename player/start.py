"""What play.py does before playing: check options, load the initial clips, choose a player.

`options` is a play.PlayOptions.
"""

import os
from collections.abc import Callable
from pathlib import Path

from utils.cli import UserError

import cv2
import numpy as np

from data_utils import Clips, open_dataset
from models.world_model import WorldModel
from player.terminal import has_terminal, play_terminal
from player.window import has_display, play_window


def check_options(options) -> None:
    """Raise UserError for options that contradict each other."""
    page = options.web or options.export_web
    film = options.actions or options.replay or options.save
    sampled = options.steps is not None or options.temperature is not None
    if options.actions and not options.save:
        raise UserError("--actions needs --save: --actions 0,3,3,1 --save out.gif")
    if options.actions and options.replay:
        raise UserError("--actions and --replay both say what to play; leave one out")
    if options.web and options.export_web:
        raise UserError("--web serves a page and --export-web writes one; leave one out")
    if page and (film or options.terminal):
        raise UserError(
            "--actions, --replay, --save and --terminal are not for the page,"
            " which has buttons for that; leave them out"
        )
    if options.replay and (sampled or options.frame or options.data_path):
        raise UserError(
            "a saved run holds its own initial frames, steps and temperature;"
            " leave out --frame, --data-path, --steps and --temperature"
        )
    if options.save and Path(options.save).suffix.lower() not in (".gif", ".mp4", ".json"):
        raise UserError(
            f"cannot save a run as {options.save}; use a name that ends in .gif, .mp4 or .json"
        )
    if options.beside and not page:
        raise UserError("--beside needs --web or --export-web; only the page shows two worlds")


def parse_actions(text: str, n_actions: int) -> list[int]:
    """ "0,3,1" → [0, 3, 1], "" → []. Raises UserError for any other text or unknown action."""
    try:
        actions = [int(part) for part in text.split(",") if text]
    except ValueError:
        raise UserError(
            f"--actions must be numbers with commas between them, like 0,3,1, not {text!r}"
        ) from None
    for action in actions:
        if not 0 <= action < n_actions:
            raise UserError(f"unknown action {action}; this world has 0 … {n_actions - 1}")
    return actions


def load_starts(options, world: WorldModel) -> np.ndarray:
    """The initial clips that the options ask for, uint8 (n, T, H, W, 3)."""
    H, W = world.frame_size
    if options.frame:
        if not os.path.exists(options.frame):
            raise UserError(f"no such file: {options.frame}; check --frame")
        picture = cv2.imread(options.frame)
        if picture is None:
            raise UserError(
                f"--frame {options.frame} is not a picture that can be read; use a PNG or JPEG file"
            )
        picture = cv2.resize(picture, (W, H), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)[None, None]
    if options.data_path or options.use_dummy_data:
        source = dict(use_dummy_data=options.use_dummy_data, frame_size=H)
        dataset = open_dataset(options.data_path, **source)
        found = list(dataset.frames.shape[1:3])
        if found != [H, W]:
            raise UserError(
                f"{dataset.name} has frames of {found}, this world has {[H, W]};"
                " use a dataset of that size"
            )
        clips = Clips(dataset, "val", length=4)
        starts = np.random.default_rng(options.seed).choice(clips.starts, 64)
        return clips.read(starts)[0].numpy()
    return world.start_frames.numpy()


def choose_player(options) -> Callable | None:
    """→ play_terminal, play_window, or None if there is neither a display nor a terminal."""
    if options.terminal:
        return play_terminal
    if has_display():
        return play_window
    if has_terminal():
        return play_terminal
    if options.replay or options.save:
        raise UserError(
            "there is no display and no terminal to play in; use --web,"
            " or --actions 0,3,3,1 --save out.gif, or --replay run.json --save out.gif"
        )
    return None


def play_page(options, world: WorldModel, load: Callable) -> None:
    """Serve or export the page of `world` and, beside it, of load(options.beside) if given."""
    worlds = [(options.checkpoint, world, load_starts(options, world))]
    if options.beside:
        other = load(options.beside)
        worlds.append((options.beside, other, other.start_frames.numpy()))
    worlds = [(Path(path).resolve().name, *rest) for path, *rest in worlds]
    if options.export_web:
        from player.web.export import export  # here, because only the export needs onnx

        export(worlds, options.export_web)
    else:
        from player.web.server import serve

        serve(worlds, options.host, options.port, options.games)
