"""The README's numbers are those of the result files, and its commands exist."""
import json
import re
from pathlib import Path

import config
import train_dynamics
import train_lam
import train_tokenizer
from record import GAMES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_holds_the_speedrun_s_numbers():
    numbers = json.loads((ROOT / "results" / "pong.json").read_text())
    rows = re.findall(r"^\| .+? \| `([\w/]+)` \| ([-\d.]+)(?: | \w)", README, re.M)
    assert len(rows) >= 15
    for name, shown in rows:
        decimals = len(shown.partition(".")[2])
        assert f"{numbers[name]:.{decimals}f}" == shown, name
    fresh = json.loads((ROOT / "results" / "pong_fresh.json").read_text())
    for name in ("rollout_psnr_t4", "copy_psnr_t4", "delta_psnr_t4", "delta_psnr_null_t4"):
        assert f"{fresh['dynamics/' + name]:.1f} dB" in README, name
    assert f"{numbers['minutes/total']:.0f} minutes" in README and numbers["device"] in README


def test_files_and_options_in_the_readme_exist():
    for name in re.findall(r"`((?:models/)?\w+\.py)`|\]\((results/[\w.]+)\)", README):
        assert (ROOT / (name[0] or name[1])).exists(), name
    options = {"--" + name.replace("_", "-") for kind in (config.TokenizerConfig, config.LatentActionConfig, config.DynamicsConfig)
               for name in kind.__dataclass_fields__}  # fmt: skip
    elsewhere = {"--checkpoint", "--actions", "--save", "--save-images", "--frames", "--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= options | elsewhere
    assert all(game in README for game in GAMES)
    assert all("python train_" in module.__doc__ for module in (train_tokenizer, train_lam, train_dynamics))
