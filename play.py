"""Play a trained world: your keys are the latent actions.

    python play.py                                   the world that comes with the code
    python play.py --terminal                        in the terminal, also over SSH and in tmux
    python play.py --checkpoint checkpoints/pong     a world that you trained
    python play.py --web                             a page in your browser
    python play.py --export-web site                 the page for any static host, without Python
    python play.py --actions 0,3,3,1 --save out.gif  a film; .mp4 and .json work too
    python play.py --replay run.json --save out.gif  a saved run again, frame for frame

It opens a window where there is a display, else it plays in the terminal, else (a pipe, CI) it
saves world.gif: each action for a second. Keys: digits, then letters, choose a latent action, held
until the next; the arrows stand for the actions that move the view or a thing that way
(actions.json), else for the first four; Backspace goes back a second, R restarts from another
start, Q quits; with --save the run is then written.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.checkpoint import load_world
from utils.cli import option, parse_options, print_user_errors
from utils.device import choose_device
from utils.hardening.files import make_folder

from player.cuda_graph import graph_on
from player.session import DEFAULT, Session, read_run, save_demo, save_session
from player.start import check_options, choose_player, load_starts, parse_actions, play_page


@dataclass
class PlayOptions:
    checkpoint: str = option(str(DEFAULT), "folder of a world")
    terminal: bool = option(False, "play in the terminal, even where there is a display")
    web: bool = option(False, "serve a page that plays it")
    host: str = option("127.0.0.1", "address of the page; by default for this machine alone")
    port: int = option(8000, "port of the page; 0 takes any free one", low=0, high=65535)
    games: int = option(4, "games at a time on the page", low=1)
    export_web: str = option("", "FOLDER: write the page with the world in it")
    beside: str = option("", "a second world for the page, to play side by side")
    actions: str = option("", "latent actions to play, for example 0,3,3,1; needs --save")
    replay: str = option("", "a saved run (.json) to play again")
    save: str = option("", "where to save the run: .gif, .mp4 or .json")
    frame: str = option("", "begin from this picture")
    data_path: str = option("", "begin from this video or dataset")
    use_dummy_data: bool = option(False, "begin from the dummy world")
    fps: float = option(None, "frames per second [as the training video]", above=0.0)
    steps: int = option(None, "MaskGIT passes per frame [the world's, 2]", low=1)
    temperature: float = option(None, "of sampling; 0 is greedy [the world's, 1.0]", low=0.0)
    seed: int = option(0, "fixes the random numbers", low=0, high=2**31 - 1)
    device: str = option("auto", "auto, cpu or cuda")


def main(argv=None):
    options = parse_options(PlayOptions, __doc__, argv)
    check_options(options)
    page = options.web or options.export_web
    film = bool((options.actions or options.replay) and options.save and not options.terminal)
    device = choose_device(options.device)
    player = None if page or film else choose_player(options)

    def load(path):
        settings = dict(steps=options.steps, temperature=options.temperature)
        world = load_world(path, device, graph_on(device), **settings)
        world.fps = options.fps or world.fps
        return world

    world = load(options.checkpoint)
    if page:
        return play_page(options, world, load)
    if options.replay:
        session, actions = read_run(options.replay, world)
    else:
        actions = parse_actions(options.actions, world.n_actions)
        session = Session(world, load_starts(options, world), options.seed)
    if options.save:
        make_folder(Path(options.save).parent)
    if film:
        frames = [session.frame] + [session.press(action) for action in actions]
        save_session(session, options.save, world.fps, frames)
    elif player is None:
        save_demo(world, session.starts, "world.gif")
    else:
        player(session, world.fps, actions)
        if options.save:
            save_session(session, options.save, world.fps)


if __name__ == "__main__":
    print_user_errors()
    main()
