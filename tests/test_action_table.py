import json
from pathlib import Path

from utils.checkpoint import load_checkpoint, load_world
from utils.cli import CheckpointError
from utils.hardening.fit import read_action_table

import numpy as np
import pytest

from data_utils import dummy_world
from evaluation.action_table import describe_motion, imitated_motion, label_of, optical_flow
from player.session import arrow_actions, idle_action, key_table, twins


def motion_in_dummy_world(action):
    frames, actions = dummy_world(400)
    at = np.flatnonzero(actions[:-1] == action)[:30]
    return describe_motion(np.stack([optical_flow(frames[i], frames[i + 1]) for i in at]))


def test_a_moving_camera_is_named_by_where_it_goes():
    # the field scrolls 2 pixels as told
    for action, direction in enumerate(["", "left", "right", "up", "down"]):
        motion = motion_in_dummy_world(action)
        assert motion["direction"] == direction
        if direction:
            assert motion["moves"] == "view" and 1.5 < motion["pixels"] < 2.5
    assert label_of(motion_in_dummy_world(0)) == "still"
    assert label_of(motion_in_dummy_world(1)).startswith("← view left ")


def test_a_moving_thing_is_named_by_where_it_goes_and_coming_closer_is_forward():
    flows = np.zeros((5, 64, 64, 2), np.float32)
    flows[:, 20:32, 50:56] = (0, -3)  # a paddle goes up
    assert describe_motion(flows) == {"moves": "thing", "direction": "up", "pixels": 3.0}
    y, x = np.mgrid[:64, :64] - 31.5
    forward = np.stack([x, y], axis=-1)[None] * 0.1
    assert describe_motion(np.repeat(forward, 5, axis=0))["direction"] == "forward"
    assert describe_motion(np.repeat(-forward, 5, axis=0))["direction"] == "back"
    flows[::2] *= -1  # as often down: no common direction
    assert describe_motion(flows)["direction"] == ""


def test_a_move_that_a_code_imitates_has_a_name():
    assert imitated_motion(-1.5, 0.5)["label"] == "↑ thing up 1.5"
    assert imitated_motion(0.0, 2.0)["label"] == "→ thing right 2.0"
    assert imitated_motion(0.0, 0.0)["label"] == "still"


def test_train_lam_writes_the_legend_that_play_shows(world_dir, tmp_path):
    table = json.loads(Path(world_dir, "actions.json").read_text(encoding="utf-8"))
    rows = table["actions"]
    assert [row["action"] for row in rows] == list(range(8))
    assert abs(sum(row["share"] for row in rows) - 1) < 1e-3
    # all ways of the dummy world were found
    assert {"left", "right", "up", "down"} <= {row["direction"] for row in rows}
    world = load_world(world_dir)
    for arrow, action in arrow_actions(world).items():
        assert rows[action]["direction"] == arrow
        assert f"{rows[action]['label']}  (arrow {arrow})" in key_table(world)[action]
    assert rows[idle_action(world)]["label"] == "still"
    same = twins(world)  # 8 codes for 5 true actions
    assert len(same) >= 1 and list(key_table(world))[8 - len(same) :] == sorted(same)
    for action, twin in same.items():
        assert rows[action]["direction"] == rows[twin]["direction"]
        assert rows[action]["share"] <= rows[twin]["share"] and twin not in same
        assert key_table(world)[action].endswith(f"(like {twin})")
    (tmp_path / "actions.json").write_text(json.dumps(table))
    lam = load_checkpoint(Path(world_dir, "lam.pt"), "lam")
    another = lam | {"model": {name: weight + 1 for name, weight in lam["model"].items()}}
    assert read_action_table(tmp_path / "actions.json", another) == []
    assert len(read_action_table(tmp_path / "actions.json", lam)) == 8
    (tmp_path / "actions.json").write_text('{"actions": [1]}')
    with pytest.raises(CheckpointError, match="actions.json is not an action table"):
        read_action_table(tmp_path / "actions.json", lam)
