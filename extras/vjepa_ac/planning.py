"""Choose actions by looking ahead: which of them lead to the features of a goal picture? The cross-entropy method, as V-JEPA 2-AC plans.

Candidates are drawn, rolled out by the predictor and ranked; the best give the next draw its mean and spread. The mouse is drawn from a normal
distribution, keys from a Bernoulli distribution, which the public code does not need.
"""
import cv2
import numpy as np
import torch

from extras.vjepa_ac.doom import Doom, Player
from extras.vjepa_ac.model import TUBELET
from extras.vjepa_ac.vpt import DEGREES_PER_PIXEL, KEYS, wrap

REACH = 18.0  # pixels per tick: the recorded player turns no faster


def actions_of(mouse, keys, names, process, slot=0):
    """mouse (…, h, 2) in pixels per tick, keys bool (…, h, len(names)) → actions (…, h, 38) as vpt.py makes them of what was recorded."""
    actions = np.zeros((*mouse.shape[:-1], 38), np.float32)
    actions[..., :2] = mouse * process.skip
    actions[..., 2:4] = actions[..., :2] * DEGREES_PER_PIXEL
    for i, name in enumerate(names):
        actions[..., KEYS[f"key.keyboard.{name}"]] = keys[..., i]
    actions[..., 28 + slot] = 1
    return actions


def imagine(predictor, process, features, state, actions):
    """features (1, t, N, E) so far, state (2,) at the first of them, actions (n, t − 1 + h, 38) → the h next (n, h, N, E). The states follow from the actions."""
    states = state + np.concatenate([np.zeros_like(actions[:, :1, 2:4]), np.cumsum(actions[:, :, 2:4], axis=1)], axis=1)  # (n, t + h, 2)
    states[..., 0] = wrap(states[..., 0])
    actions, states = (torch.from_numpy(x).float() for x in process.standardise(actions, states.astype(np.float32)))
    t = features.shape[1]
    return predictor.rollout(features.expand(len(actions), *features.shape[1:]), actions, states, actions.shape[1] - t + 1)


@torch.no_grad()
def plan(predictor, process, features, state, past, goal, horizon, names=(), n=32, iterations=4, elite=6, rng=None):
    """The best `horizon` actions to come near the goal's features (N, E). past (t, 38): the actions so far, the last of them under way.

    → (mouse (horizon, 2) in pixels per tick, keys bool (horizon, len(names))).
    """
    rng = rng or np.random.default_rng(0)
    mean, std = np.zeros((horizon, 2)), np.array([REACH * 0.7, 0.0])  # the view is turned, not tilted
    chance = np.full((horizon, len(names)), 0.5)
    for _ in range(iterations):
        mouse = np.clip(mean + std * rng.standard_normal((n, horizon, 2)), -REACH, REACH)
        keys = rng.random((n, horizon, len(names))) < chance
        actions = np.concatenate([np.broadcast_to(past, (n, *past.shape)), actions_of(mouse, keys, names, process, past[-1, 28:37].argmax())], axis=1)
        ahead = imagine(predictor, process, features, state, actions)
        energy = (ahead[:, -1].float() - goal).abs().mean(dim=(1, 2)).numpy()
        best = np.argsort(energy)[:elite]
        mean, std, chance = mouse[best].mean(0), mouse[best].std(0) + [1.0, 0.0], 0.9 * keys[best].mean(0) + 0.05
    return np.round(mouse[best[0]]), keys[best[0]]


def success(encoder, predictor, process, trials=20, steps=3, place="my_way_home", tolerance=10.0):
    """Turn to a goal picture in `steps` actions. → {share of trials that end within `tolerance` degrees, mean error in degrees}, of the plan and of random turns.

    The goal: a random turn to one side, looked at from where it ended. Then the same beginning again, and the plan must find the way
    back to that picture; after each action it plans again. An action is chosen while the one before is under way.
    """
    game, rng = Doom(place, 4242), np.random.default_rng(0)
    errors = {"plan": [], "random turns": [], "standing still": []}

    def begin(trial):
        game.begin(5000 + trial)
        player = Player(np.random.default_rng(trial))
        for _ in range(60):
            if game.step(player.step(game.observe()[1])):  # out of the maze: begin elsewhere
                return begin(trial + 1000)
        game.step({})

    def execute(mouse):
        """One tubelet of ticks with an action. → features (1, 1, N, E) of the tubelet."""
        frames = []
        for tick in range(process.skip):
            if tick % process.stride == 0:
                frames.append(cv2.resize(game.observe()[0], (process.size, process.size), interpolation=cv2.INTER_AREA))
            game.step({"dx": float(mouse[0]), "dy": float(mouse[1])})
        with torch.no_grad():
            return encoder.each_tubelet(torch.from_numpy(np.stack(frames[:TUBELET])).permute(0, 3, 1, 2)[None])

    still = np.zeros(2)
    for trial in range(trials):
        begin(trial)
        execute(still)
        turns = np.round(rng.choice([-1, 1]) * rng.uniform(4, 18, steps))
        for turn in turns:
            execute((turn, 0))
        wanted, goal = game.observe()[1]["yaw"], execute(still)[0, 0]
        begin(trial)
        state = np.array([wrap(game.observe()[1]["yaw"]), game.observe()[1]["pitch"]])
        errors["standing still"].append(abs(wrap(game.observe()[1]["yaw"] - wanted)))
        guesses = np.round(rng.choice([-1, 1]) * rng.uniform(4, 18, steps))  # drawn as the goal was
        errors["random turns"].append(abs(wrap(game.observe()[1]["yaw"] + DEGREES_PER_PIXEL * process.skip * guesses.sum() - wanted)))
        features, past, mouse, slot = [], [], still, game.observe()[1]["hotbar"]
        for step in range(steps + 1):
            features.append(execute(mouse))
            past.append(actions_of(np.asarray(mouse)[None], np.zeros((1, 0)), (), process, slot)[0])
            if step < steps:
                mouse = plan(predictor, process, torch.cat(features, dim=1), state, np.stack(past), goal, steps - step, rng=rng)[0][0]
        errors["plan"].append(abs(wrap(game.observe()[1]["yaw"] - wanted)))
    game.close()
    return {f"{name}/{what}": float(value) for name, values in errors.items()
            for what, value in (("success", np.mean(np.array(values) <= tolerance)), ("error_degrees", np.mean(values)))}  # fmt: skip
