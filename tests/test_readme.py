"""The README's numbers are those of the result files, and its commands exist."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import config
import train_dynamics
import train_lam
import train_tokenizer
from extras.ablate import tables
from models.world_model import WorldModel
from play import DEFAULT
from record import GAMES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_holds_the_numbers_of_the_result_files():
    (worlds,) = re.findall(r"^\| what \| in the report \| (.+) \|$", README, re.M)
    numbers = [json.loads((ROOT / "results" / f"{world}.json").read_text()) for world in worlds.split(" | ")]
    rows = re.findall(r"^\| .+? \| `([\w/]+)` \| (.+) \|$", README, re.M)
    assert len(rows) >= 15
    for name, cells in rows:
        for report, shown in zip(numbers, cells.split(" | "), strict=True):
            decimals = len(shown.partition(".")[2])
            assert f"{report[name]:.{decimals}f}" == shown, (name, report["world"])
    assert f"takes {numbers[0]['minutes/total']:.0f} minutes" in README
    assert all(report["device"].startswith("2 CPU cores") for report in numbers)
    older = json.loads((ROOT / "results" / "doom-maze-float32.json").read_text())
    assert f"({older['minutes/total']:.0f} on older ones" in README
    said = re.search(r"took (\S+) minutes, with a mutual information of (\S+) and a ΔPSNR of (\S+) dB against random actions and (\S+) ", README).groups()
    keys = ("minutes/total", "lam/nmi", "dynamics/delta_psnr_t4", "dynamics/delta_psnr_null_t4")
    assert said == tuple(f"{older[key]:.{len(shown.partition('.')[2])}f}" for shown, key in zip(said, keys))


def test_the_ablation_tables_are_those_of_the_result_file():
    assert all(table in README for table in tables(json.loads((ROOT / "results" / "ablation.json").read_text())).split("\n\n"))


def test_the_table_of_speed_is_that_of_the_result_file():
    report = json.loads((ROOT / "results" / "bench.json").read_text())
    assert bench.table(report) in README and report["device"].startswith("2 CPU cores")
    said = re.search(r"frame 20 took (\S+) ms, frame 10,000 (\S+) ms.*?plays at (\S+) frames.*?data (\S+) %.*?T\^(\S+).*?N\^(\S+) ", " ".join(README.split())).groups()
    names = ("play/latency_frame_20_ms", "play/latency_frame_10000_ms", "play/shipped_fps", "train/data_wait", "growth/exponent_T", "growth/exponent_N")
    for shown, name in zip(said, names, strict=True):
        assert float(shown) == pytest.approx(report[name] * (100 if name == "train/data_wait" else 1), rel=0.05, abs=0.06)


def test_the_shipped_worlds_have_cards_and_fit():
    folders = sorted((ROOT / "checkpoints" / "shipped").iterdir())
    assert DEFAULT in folders
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 20 * 2**20
    for folder in folders:
        card = (folder / "card.md").read_text()
        report = json.loads((folder / "report.json").read_text())
        assert f"| dynamics/delta_psnr_t4 | {report['dynamics/delta_psnr_t4']:.3g} |" in card
        world = WorldModel.load(folder)
        assert all(f"| {row['action']} | {row['label']} |" in card for row in world.action_table) and world.action_table


def test_the_front_door_is_the_same_everywhere():
    """The README's two commands are those that CI runs, in environments with nothing else, and that CONTRIBUTING names."""
    block = re.search(r"## Two commands\n+```\n(.*?)```", README, re.S)[1]
    lines = [line.partition("#")[0].strip() for line in block.splitlines() if line.startswith("pip install")]
    assert lines == ["pip install -r requirements.txt && python play.py", "pip install -r requirements-dev.txt && python -m pytest"]
    assert subprocess.run(["bash", ROOT / ".ci" / "run", "--lines"], capture_output=True, text=True, check=True).stdout.splitlines() == lines
    assert all(line in (ROOT / "CONTRIBUTING.md").read_text() for line in lines)


def packages(name):
    return {re.split(r"[=<>;\[]", line)[0].strip().lower() for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#-"}


def test_requirements_hold_what_is_imported_and_playing_needs_no_test_tools():
    ours = {path.stem for path in ROOT.glob("**/*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    needed = set()
    for path in [*ROOT.glob("*.py"), *(path for folder in ("models", "web", "player", "extras", "articles", "tests") for path in (ROOT / folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                needed |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                needed.add(node.module.partition(".")[0])
    needed -= ours | set(sys.stdlib_module_names)
    distributions = {"cv2": "opencv-python", "PIL": "matplotlib", "ale_py": "ale-py", "google": "protobuf", "procgen": "procgen-mirror"}
    missing = {distributions.get(name, name).lower() for name in needed} - packages("requirements.txt") - packages("requirements-dev.txt")
    assert missing <= {"procgen-mirror"}, missing  # CoinRun wants an environment of its own
    assert packages("requirements.txt") == {"torch", "numpy", "einops", "opencv-python", "h5py", "matplotlib", "tqdm", "vizdoom"}


def first_import(path, seen):
    """Which of config and torch a program imports first, looking into this project's own modules as Python does."""
    seen.add(path)
    for node in ast.parse(path.read_text()).body:
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name in ("config", "torch") or name.startswith("torch."):
                return name.partition(".")[0]
            module = ROOT / (name.replace(".", "/") + ".py")
            if module.exists() and module not in seen and (found := first_import(module, seen)):
                return found
    return None


PROGRAMS = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("extras/*/*train.py")) if "\n    print_user_errors()\n    main()" in path.read_text()]


@pytest.mark.parametrize("name", sorted(str(path.relative_to(ROOT)) for path in [*PROGRAMS, ROOT / "nanoworld.py"]))
def test_every_program_asks_openmp_for_short_spins_before_torch_is_loaded(name):
    assert first_import(ROOT / name, set()) == "config"


def test_what_the_user_has_set_for_openmp_stands():
    for given, found in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)):
        source = (ROOT / "config.py").read_text().partition("import torch")[0]
        environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
        code = source + "\nprint(os.environ.get('GOMP_SPINCOUNT'))"
        assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.strip() == str(found)


def test_the_numbers_of_the_gpu_are_those_on_file():
    bench, large, world = (json.loads((ROOT / "results" / name).read_text()) for name in ("bench-h200.json", "large-h200.json", "gpu-crafter.json"))
    dynamics = "curve/3.2/dynamics/delta_psnr"
    keys = min(world[f"{dynamics}{kind}_t4"] for kind in ("", "_null", "_marginal"))
    for text in (f"in {world['curve/3.2/wall_minutes']:.1f} minutes, validation included; its keys are worth {keys:.1f} dB",
                 f"at {bench['play/fps_b1']:.0f} frames a second, with 99 % of the frames within {bench['play/latency_p99_ms']:.2f} ms; 256 worlds at once make {bench['play/fps_b256']:,.0f}",
                 f"at {100 * large['pieces/utilisation']:.0f} % of the bfloat16 speed of one large product, with `--compile` at "
                 f"{100 * large['pieces/utilisation'] / large['pieces/time/compiled whole']:.0f} %"):  # fmt: skip
        assert text in " ".join(README.split()), text
    assert {report["device"] for report in (bench, large, world)} == {"NVIDIA H200"}


def test_the_cost_of_a_second_training_is_that_on_file():
    report = json.loads((ROOT / "results" / "beside.json").read_text())
    kinds, text = ("tokenizer", "lam", "dynamics", "play"), " ".join(README.split())
    tokenizer, lam, dynamics, play = (f"{report[f'beside/{kind}_short_spin']:.1f}" for kind in kinds)
    assert f"takes {tokenizer} (tokenizer), {lam} (latent actions) and {dynamics} (dynamics) times as long as alone, and a frame of play {play} times" in text
    tokenizer, lam, dynamics, play = (f"{report[f'beside/{kind}_usual_spin']:.2g}" for kind in kinds)
    assert f"it would be {tokenizer}, {lam}, {dynamics} and {play} times" in text


def test_files_and_options_in_the_readme_exist():
    for name in re.findall(r"`((?:models/|extras/)?\w+\.py)`|\]\(((?:results|checkpoints/shipped)/[\w./-]+)\)", README):
        assert (ROOT / (name[0] or name[1])).exists(), name
    options = {"--" + name.replace("_", "-") for kind in (config.TokenizerConfig, config.LatentActionConfig, config.DynamicsConfig)
               for name in kind.__dataclass_fields__}  # fmt: skip
    elsewhere = {"--checkpoint", "--fvd-features", "--save-images", "--frames", "--help"}
    for script in ("play.py", "bench.py"):
        elsewhere |= set(re.findall(r'add_argument\("(--[a-z-]+)"', (ROOT / script).read_text()))
    elsewhere |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}  # torchrun
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= options | elsewhere
    assert all(game in README for game in GAMES)
    assert all("python train_" in module.__doc__ for module in (train_tokenizer, train_lam, train_dynamics))
