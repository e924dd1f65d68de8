"""Play a trained world: your keys are the latent actions.

    python play.py                                            a world that comes with the code: a window where there is a display, else a
                                                              player in the terminal, else (a pipe, CI) world.gif: each action for a second
    python play.py --terminal                                 in the terminal, also through SSH and in tmux
    python play.py --checkpoint checkpoints/pong              on one that you trained
    python play.py --web                                      a page in your browser, also through an SSH tunnel
    python play.py --export-web site                          the page as a folder for any static host: no server, no Python
    python play.py --checkpoint checkpoints/pong --actions 0,3,3,1 --save out.gif   no window needed; .mp4 and .json work too
    python play.py --replay run.json --save out.gif           a saved run again, frame for frame

Keys of window and terminal: digits, then letters, choose a latent action, held until the next; the arrows stand for the actions that move the
view or a thing that way (actions.json), else for the first four; Backspace goes back a second, R restarts from another first frame, Q
quits; with --save the run is then written. First frames come from --data-path, from --frame, or else travelled with the world.
"""
import ctypes
import json
import math
import os
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np

from config import Parser, UserError, check_sampling, choose_device, make_folder, print_user_errors
from data_utils import Clips, open_footage
from game import Game, key_table, legend_frames, play_loop, read_run
from models.world_model import WorldModel
from pictures import enlarge, labelled_grid, plain, save_video
from player.terminal import has_terminal, play_terminal

# What cv2.waitKeyEx returns on Linux, Windows and macOS.
ARROWS = {
    "left": (65361, 2424832, 63234),
    "right": (65363, 2555904, 63235),
    "up": (65362, 2490368, 63232),
    "down": (65364, 2621440, 63233),
}
BACKSPACE = (8, 127, 65288)
DEFAULT = Path(__file__).parent / "checkpoints" / "shipped" / "crafter"


def load_starts(args, world):
    """First frames as the options say, uint8 (n, T, H, W, 3)."""
    H, W = world.frame_size
    if args.frame:
        picture = cv2.imread(args.frame)
        if picture is None:
            raise UserError(f"--frame {args.frame} is not a picture that can be read; use a PNG or JPEG file")
        picture = cv2.resize(picture, (W, H), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)[None, None]
    if args.data_path or args.use_dummy_data:
        data = Namespace(data_path=args.data_path, data_type="auto", use_dummy_data=args.use_dummy_data, frame_size=H)
        footage = open_footage(data)
        if list(footage.frames.shape[1:3]) != [H, W]:
            raise UserError(f"{footage.name} has frames of {list(footage.frames.shape[1:3])}, this world {[H, W]}; record at that size")
        clips = Clips(footage, "val", length=4)
        return clips.at(np.random.default_rng(args.seed).choice(clips.starts, 64))[0]
    return world.start_frames.numpy()


def parse_actions(text, n_actions):
    """ "0,3,1" → [0, 3, 1], "" → []. Raises UserError for anything that is not an action of this world."""
    try:
        actions = [int(part) for part in text.split(",") if text]
    except ValueError:
        raise UserError(f"--actions must be numbers with commas between them, like 0,3,1, not {text!r}") from None
    for action in actions:
        if not 0 <= action < n_actions:
            raise UserError(f"unknown action {action}; this world has 0 … {n_actions - 1}")
    return actions


def draw(game, fps, table, held, scale):
    """The frame enlarged, and beside it the key table, the action held and the frame rate; BGR for OpenCV."""
    picture, font = enlarge(game.frame, scale), cv2.FONT_HERSHEY_SIMPLEX
    lines = [plain(line) for line in (f"{fps:.0f} frames/s", "", *table, "", "Backspace: a second back", "R restart", "Q quit")]
    height = min(24, picture.shape[0] // (len(lines) + 1))
    width = max(cv2.getTextSize(line, font, height / 44, 1)[0][0] for line in lines)
    panel = np.full((picture.shape[0], width + 24, 3), 30, dtype=np.uint8)
    for i, line in enumerate(lines):
        color = (90, 220, 255) if i == held + 2 else (220, 220, 220)
        cv2.putText(panel, line, (12, height * (i + 1)), font, height / 44, color, 1, cv2.LINE_AA)
    return cv2.cvtColor(np.concatenate([picture, panel], axis=1), cv2.COLOR_RGB2BGR)


def play_window(game, fps, actions=()):
    """Play in a window of OpenCV's."""
    table, scale, title = key_table(game.world), max(1, 512 // game.frame.shape[0]), "world"
    print("keys: " + " | ".join(table) + " | Backspace: a second back | R restart | Q quit")
    cv2.namedWindow(title, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)

    def show(rate, held):
        cv2.imshow(title, draw(game, rate, table, held, scale))

    def next_key(seconds):
        key = cv2.waitKeyEx(max(1, math.ceil(1000 * seconds)))
        if key == 27 or cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1:
            return "q"
        arrow = next((arrow for arrow, codes in ARROWS.items() if key in codes), None)
        return arrow or ("backspace" if key in BACKSPACE else chr(key).lower() if 0 < key < 128 else None)

    play_loop(game, fps, show, next_key, actions)
    cv2.destroyAllWindows()


def has_display():
    """Whether a window can be opened here. On Linux this asks X itself: DISPLAY may name a dead connection, and then Qt ends the process."""
    if not sys.platform.startswith("linux"):
        return "SSH_CONNECTION" not in os.environ
    try:
        x11 = ctypes.CDLL("libX11.so.6")
    except OSError:
        return False
    x11.XOpenDisplay.restype = ctypes.c_void_p
    display = x11.XOpenDisplay(None)
    return bool(display) and not x11.XCloseDisplay(ctypes.c_void_p(display))


def save_demo(world, starts, path):
    """A film for who cannot press keys here: each latent action (columns) held for a second, after two first frames (rows)."""
    names = [line.partition("  (")[0] for line in key_table(world)]
    rows = [legend_frames(world, clip, max(1, round(world.fps))) for clip in starts[:2]]
    save_video([labelled_grid(frames, names) for frames in zip(*rows)], path, world.fps)


def save(game, path, fps, frames=()):
    """What was played: as JSON for --replay, or as a GIF or film of its frames, played again if they were not kept."""
    if Path(path).suffix.lower() == ".json":
        Path(path).write_text(json.dumps(game.record()), encoding="utf-8")
    else:
        if not frames:
            again = Game(game.world, game.clip[None], game.seed)
            frames = [again.frame] + [again.press(action) for action in game.actions]
        save_video([enlarge(frame, max(1, 256 // frame.shape[0])) for frame in frames], path, fps)
    print(f"{path}: {len(game.actions) + 1} frames")


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(DEFAULT), help="folder of a world [checkpoints/shipped/crafter]")
    parser.add_argument("--terminal", action="store_true", help="play in the terminal, even where there is a display")
    parser.add_argument("--web", action="store_true", help="serve a page that plays it")
    parser.add_argument("--host", default="127.0.0.1", help="of the page [127.0.0.1: this machine alone]")
    parser.add_argument("--port", type=int, default=8000, help="of the page; 0 takes any free one [8000]")
    parser.add_argument("--games", type=int, default=4, help="games at a time on the page [4]")
    parser.add_argument("--export-web", default="", metavar="FOLDER", help="write the page with the world in it")
    parser.add_argument("--beside", default="", metavar="CHECKPOINT", help="a second world for the page, to play side by side")
    parser.add_argument("--actions", default="", help="play these latent actions, for example 0,3,3,1; needs --save")
    parser.add_argument("--replay", default="", metavar="FILE", help="play a saved run (.json) again")
    parser.add_argument("--save", default="", metavar="FILE", help="where to, .gif, .mp4 or .json")
    parser.add_argument("--frame", default="", metavar="PICTURE", help="begin from this picture")
    parser.add_argument("--data-path", default="", help="begin from this footage")
    parser.add_argument("--use-dummy-data", action="store_true", help="begin from the dummy world")
    parser.add_argument("--fps", type=float, help="frames per second [as the footage]")
    parser.add_argument("--steps", type=int, help="MaskGIT passes per frame [the world's, 2]")
    parser.add_argument("--temperature", type=float, help="of sampling; 0 is greedy [the world's, 1.0]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if args.actions and not args.save:
        raise UserError("--actions needs --save: --actions 0,3,3,1 --save out.gif")
    if args.actions and args.replay:
        raise UserError("--actions and --replay both say what to play; leave one out")
    if args.web and args.export_web:
        raise UserError("--web serves a page and --export-web writes one; leave one out")
    if (args.web or args.export_web) and (args.actions or args.replay or args.save or args.terminal):
        raise UserError("--actions, --replay, --save and --terminal are not for the page, which has buttons for that; leave them out")
    if args.replay and not (args.steps is args.temperature is None and not args.frame and not args.data_path):
        raise UserError("a saved run says itself how it began and how it was sampled; leave out --frame, --data-path, --steps and --temperature")
    if args.save and Path(args.save).suffix.lower() not in (".gif", ".mp4", ".json"):
        raise UserError(f"cannot save a run as {args.save}; use a name that ends in .gif, .mp4 or .json")
    if args.fps is not None and args.fps <= 0:
        raise UserError(f"--fps must be positive, got {args.fps}")
    check_sampling(args)
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed must be from 0 to 2,147,483,647, got {args.seed}")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port must be from 0 to 65535, got {args.port}")
    if args.games < 1:
        raise UserError(f"--games must be at least 1, got {args.games}")
    if args.beside and not (args.web or args.export_web):
        raise UserError("--beside needs --web or --export-web: side by side is for the page")
    alone = (args.actions or args.replay) and args.save and not args.terminal
    player = None
    if args.terminal:
        player = play_terminal
    elif not (alone or args.web or args.export_web):
        player = play_window if has_display() else play_terminal if has_terminal() else None
        if player is None and (args.replay or args.save):
            raise UserError("there is no display and no terminal to play in; use --web, or --actions 0,3,3,1 --save out.gif, or --replay run.json --save out.gif")

    def load(path):
        world = WorldModel.load(path, choose_device(args.device), steps=args.steps, temperature=args.temperature)
        world.fps = args.fps or world.fps
        return world

    world = load(args.checkpoint)
    if args.web or args.export_web:
        worlds = [(Path(args.checkpoint).resolve().name, world, load_starts(args, world))]
        if args.beside:
            other = load(args.beside)
            worlds.append((Path(args.beside).resolve().name, other, other.start_frames.numpy()))
        if args.export_web:
            from web.export import export  # what only the page needs is imported for it alone

            return export(worlds, args.export_web)
        from web.server import serve

        return serve(worlds, args.host, args.port, args.games)
    game, actions = Game(world, load_starts(args, world), args.seed), parse_actions(args.actions, world.n_actions)
    if args.replay:
        game, actions = read_run(args.replay, world)
    if args.save:
        make_folder(Path(args.save).parent)
    if alone:
        frames = [game.frame] + [game.press(action) for action in actions]
        return save(game, args.save, world.fps, frames)
    if player is None:
        make_folder(".")
        save_demo(world, game.starts, "world.gif")
        print("no display and no terminal here, so world.gif shows what the keys do: a column per latent action, held for a second after two first frames")
        return print("to play: run this in a terminal, or with --web for a page, or with --actions 0,3,3,1 --save out.gif for a film of your own")
    player(game, world.fps, actions)
    if args.save:
        save(game, args.save, world.fps)


if __name__ == "__main__":
    print_user_errors()
    main()
