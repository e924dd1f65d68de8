"""Plan: search for the actions that lead to the features of a goal picture.

The search is the cross-entropy method, as in V-JEPA 2-AC (arXiv:2506.09985, §3). Candidates are
sampled, rolled out by the predictor and ranked. The best ones set the mean and the standard
deviation of the next round. The mouse has a normal distribution. Keys have a Bernoulli
distribution, which the public code does not need.
"""

import cv2
import numpy as np
import torch
from torch import Tensor

from extras.vjepa_ac.doom import Doom, Player
from extras.vjepa_ac.model import TUBELET, ActionPredictor, Encoder
from extras.vjepa_ac.vpt import DEGREES_PER_PIXEL, KEYS, ProcessVPT, wrap

REACH = 18.0  # pixels per tick: the recorded player turns no faster


def actions_of(
    mouse: np.ndarray, keys: np.ndarray, names: list[str], process: ProcessVPT, slot: int = 0
) -> np.ndarray:
    """Candidates → actions (…, h, 38), in the format that vpt.py reads from recordings.

    mouse (…, h, 2) in pixels per tick, keys bool (…, h, len(names)).
    """
    actions = np.zeros((*mouse.shape[:-1], 38), np.float32)
    actions[..., :2] = mouse * process.skip
    actions[..., 2:4] = actions[..., :2] * DEGREES_PER_PIXEL
    for i, name in enumerate(names):
        actions[..., KEYS[f"key.keyboard.{name}"]] = keys[..., i]
    actions[..., 28 + slot] = 1
    return actions


def imagine(
    predictor: ActionPredictor,
    process: ProcessVPT,
    features: Tensor,
    state: np.ndarray,
    actions: np.ndarray,
) -> Tensor:
    """features (1 or n, t, N, E) so far, actions (n, t − 1 + h, 38) → the h next (n, h, N, E).

    state (2,) or (n, 1, 2) belongs to the first features. Later states follow from the actions.
    """
    turns = np.cumsum(actions[:, :, 2:4], axis=1)
    states = state + np.concatenate([np.zeros_like(turns[:, :1]), turns], axis=1)  # (n, t + h, 2)
    states[..., 0] = wrap(states[..., 0])
    scaled = process.standardise(actions, states.astype(np.float32))
    actions, states = (torch.from_numpy(x).float() for x in scaled)
    n, t = len(actions), features.shape[1]
    features = features.expand(n, *features.shape[1:])
    return predictor.rollout(features, actions, states, actions.shape[1] - t + 1)


@torch.no_grad()
def plan(
    predictor: ActionPredictor,
    process: ProcessVPT,
    features: Tensor,
    state: np.ndarray,
    past: np.ndarray,
    goal: Tensor,
    horizon: int,
    names: list[str] = (),
    n: int = 32,
    iterations: int = 4,
    elite: int = 6,
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `horizon` actions whose rollout ends nearest to the goal's features (N, E).

    past (t, 38): the actions so far, the last of which is still being executed.
    → (mouse (horizon, 2) in pixels per tick, keys bool (horizon, len(names))).
    """
    rng = rng or np.random.default_rng(0)
    # vertical movement has a standard deviation of 0: the view turns and does not tilt
    mean, std = np.zeros((horizon, 2)), np.array([REACH * 0.7, 0.0])
    chance = np.full((horizon, len(names)), 0.5)
    known, slot = np.broadcast_to(past, (n, *past.shape)), past[-1, 28:37].argmax()
    for _ in range(iterations):
        mouse = np.clip(mean + std * rng.standard_normal((n, horizon, 2)), -REACH, REACH)
        keys = rng.random((n, horizon, len(names))) < chance
        actions = actions_of(mouse, keys, names, process, slot)
        actions = np.concatenate([known, actions], axis=1)
        ahead = imagine(predictor, process, features, state, actions)
        energy = (ahead[:, -1].float() - goal).abs().mean(dim=(1, 2)).numpy()
        best = np.argsort(energy)[:elite]
        mean, std = mouse[best].mean(0), mouse[best].std(0) + [1.0, 0.0]
        chance = 0.9 * keys[best].mean(0) + 0.05
    return np.round(mouse[best[0]]), keys[best[0]]


class TurningTask:
    """Doom as the planner sees it: tubelets of ticks in which only the mouse moves."""

    def __init__(self, encoder: Encoder, process: ProcessVPT, place: str):
        self.game, self.encoder, self.process = Doom(place, 4242), encoder, process

    def reset(self, trial: int) -> None:
        """Go to the initial view of a trial: where the random player is after three seconds."""
        self.game.reset(5000 + trial)
        player = Player(np.random.default_rng(trial))
        for _ in range(60):
            if self.game.step(player.step(self.state())):  # it left the maze: take another seed
                return self.reset(trial + 1000)
        self.game.step({})

    def state(self) -> dict:
        return self.game.observe()[1]

    def angle_to(self, yaw: float) -> float:
        return abs(wrap(self.state()["yaw"] - yaw))

    def execute(self, mouse: np.ndarray) -> Tensor:
        """One tubelet of ticks with an action. → features (1, 1, N, E) of the tubelet."""
        size, frames = (self.process.size, self.process.size), []
        for tick in range(self.process.skip):
            if tick % self.process.stride == 0:
                picture = self.game.observe()[0]
                frames.append(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
            self.game.step({"dx": float(mouse[0]), "dy": float(mouse[1])})
        video = torch.from_numpy(np.stack(frames[:TUBELET])).permute(0, 3, 1, 2)[None]
        with torch.no_grad():
            return self.encoder.each_tubelet(video)


def turn_to_goal(
    task: TurningTask,
    predictor: ActionPredictor,
    goal: Tensor,
    steps: int,
    rng: np.random.Generator,
) -> None:
    """Turn to the goal's features (N, E) in `steps` actions, with a new plan after each of them.

    Each action is chosen while the one before is being executed.
    """
    now, process = task.state(), task.process
    state, slot = np.array([wrap(now["yaw"]), now["pitch"]]), now["hotbar"]
    features, past, mouse = [], [], np.zeros(2)
    for step in range(steps + 1):
        features.append(task.execute(mouse))
        mouse = np.asarray(mouse)[None]
        past.append(actions_of(mouse, np.zeros((1, 0)), (), process, slot)[0])
        if step < steps:
            known = (torch.cat(features, dim=1), state, np.stack(past))
            mouse = plan(predictor, process, *known, goal, steps - step, rng=rng)[0][0]


def wilson_interval(n_good: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, of which n_good of n trials were seen (Wilson, 1927)."""
    share, z2 = n_good / n, 1.96**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (share * (1 - share) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    return middle - half, middle + half


def success(
    encoder: Encoder,
    predictor: ActionPredictor,
    process: ProcessVPT,
    trials: int = 20,
    steps: int = 3,
    place: str = "my_way_home",
    tolerance: float = 10.0,
) -> dict[str, float]:
    """Turn to a goal picture in `steps` actions, by plan, by random turns and by standing still.

    → of each: share of trials that end within `tolerance` degrees, with the ends of its 95 %
    interval, and mean error in degrees.

    The goal is the view after random turns to one side. Then the game is reset to the same initial
    view, from which the planner must reach the goal.
    """
    task, rng = TurningTask(encoder, process, place), np.random.default_rng(0)
    errors = {"plan": [], "random turns": [], "standing still": []}

    def random_turns():
        return np.round(rng.choice([-1, 1]) * rng.uniform(4, 18, steps))

    for trial in range(trials):
        task.reset(trial)
        task.execute(np.zeros(2))
        for turn in random_turns():
            task.execute((turn, 0))
        wanted = task.state()["yaw"]
        goal = task.execute(np.zeros(2))[0, 0]
        task.reset(trial)
        errors["standing still"].append(task.angle_to(wanted))
        turned = DEGREES_PER_PIXEL * process.skip * random_turns().sum()
        errors["random turns"].append(task.angle_to(wanted - turned))
        turn_to_goal(task, predictor, goal, steps, rng)
        errors["plan"].append(task.angle_to(wanted))
    task.game.close()
    report = {"trials": trials}
    for name, values in errors.items():
        n_good = int(np.sum(np.array(values) <= tolerance))
        report[f"{name}/success"] = n_good / trials
        report[f"{name}/low"], report[f"{name}/high"] = wilson_interval(n_good, trials)
        report[f"{name}/error_degrees"] = float(np.mean(values))
    return report
