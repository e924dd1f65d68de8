"""The README's numbers are those of the result files, and its commands exist."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import config
from utils.checkpoint import load_world
from utils.cli import flag

import pytest

import play
import train_dynamics
import train_lam
import train_tokenizer
import validate
from player.session import DEFAULT
from tools import bench
from tools.ablate import tables
from tools.record import GAMES
from tools.ship import number_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
RESULTS = ROOT / "docs" / "results"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def flat(text):
    return " ".join(text.split())


def test_the_tables_hold_the_numbers_of_the_result_files():
    text = DOCS["results.md"]
    (worlds,) = re.findall(r"^\| what \| in the report \| (.+) \|$", text, re.M)
    numbers = [result(world) for world in worlds.split(" | ")]
    rows = re.findall(r"^\| .+? \| `([\w/]+)` \| (.+) \|$", text, re.M)
    assert len(rows) >= 15
    for name, cells in rows:
        for report, shown in zip(numbers, cells.split(" | "), strict=True):
            decimals = len(shown.partition(".")[2])
            assert f"{report[name]:.{decimals}f}" == shown, (name, report["world"])
    present = result("doom-maze-present")
    assert f"takes about {present['minutes/total']:.0f} minutes" in README
    control = min(present[f"dynamics/delta_psnr{kind}_t4"] for kind in ("", "_null", "_marginal"))
    assert (
        f"{present['minutes/total']:.1f} minutes, mutual information {present['lam/nmi']:.2f} (the"
        f" classifier {present['lam/nmi_classifier']:.2f}), ΔPSNR {control:.1f} dB"
    ) in flat(text)
    assert all(report["device"].startswith("2 CPU cores") for report in numbers)
    older = result("doom-maze-float32")
    assert older["minutes/total"] > present["minutes/total"] and "(more on older ones" in README
    said = re.search(
        r"took (\S+) minutes, with a mutual information of (\S+) and a ΔPSNR of (\S+) dB"
        r" against random actions and (\S+) ",
        flat(text),
    ).groups()
    keys = ("minutes/total", "lam/nmi", "dynamics/delta_psnr_t4", "dynamics/delta_psnr_null_t4")
    for shown, key in zip(said, keys, strict=True):
        assert f"{older[key]:.{len(shown.partition('.')[2])}f}" == shown


def test_the_table_of_the_shipped_worlds_is_that_of_their_cards():
    folders = [ROOT / "checkpoints" / "shipped" / name for name in ("doom-maze", "crafter")]
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]

    def delta(report, name):
        name = f"dynamics/delta_psnr_{name}"
        return "{:.1f} ({:.1f} to {:.1f})".format(
            *(report[name + end] for end in ("", "_low", "_high"))
        )

    rows = [
        [delta(r, name) for r in reports] for name in ("min_t4", "min_t4_per_clip", "button_t4")
    ]
    rows.append([f"{r['dynamics/clips_for_0.3_db']:,.0f}" for r in reports])
    rows.append([f"{r['lam/nmi']:.2f}, {r['lam/nmi_classifier']:.2f}" for r in reports])
    for cells in rows:
        assert f" | {' | '.join(cells)} |" in DOCS["results.md"]


def test_the_first_table_is_the_smallest_control_the_agreement_and_the_minutes():
    reports = [result(world) for world in ("doom-maze", "crafter", "coinrun", "pong")]
    kinds = ("", "_null", "_marginal")
    control = [min(r[f"dynamics/delta_psnr{k}_t4"] for k in kinds) for r in reports]
    rows = {
        "control: ΔPSNR, dB": [f"{x:.1f}" for x in control],
        "agreement with the true actions: NMI": [f"{r['lam/nmi']:.2f}" for r in reports],
        "… of a classifier": [f"{r['lam/nmi_ceiling']:.2f}" for r in reports],
        "minutes on 2 CPU cores": [f"{r['minutes/total']:.1f}" for r in reports],
    }
    for name, cells in rows.items():
        assert f"| {name} | {' | '.join(cells)} |" in README


def test_the_table_of_keys_is_that_of_the_result_file():
    """docs/results/keys.json: a report of validate.py for each game, and what the past leaves."""
    text = DOCS["results.md"].partition("## Keys that follow the player")[2].partition("## ")[0]
    rows = [line.split(" | ") for line in re.findall(r"^\| (.*%) \|$", text, re.M)]
    found = result("keys")
    assert {row[0].lower().replace(" ", "-") for row in rows} == set(found)
    for name, codes, classifier, left, area in rows:
        report = found[name.lower().replace(" ", "-")]
        assert codes == f"{report['lam/nmi']:.2f}"
        if "lam/nmi_classifier" in report:
            assert classifier == f"{report['lam/nmi_classifier']:.2f}"
        assert (left, area) == (f"{report['past/left']:.0%}", f"{report['past/area']:.1%}")


def test_the_ablation_tables_are_those_of_the_result_file():
    for table in tables(result("ablation")).split("\n\n"):
        assert table in DOCS["choices.md"]


def test_the_table_of_speed_is_that_of_the_result_file():
    report = result("bench")
    assert bench.table(report) in DOCS["speed.md"] and report["device"].startswith("2 CPU cores")
    said = re.search(
        r"frame 20 took (\S+) ms, frame 10,000 (\S+) ms.*?plays at (\S+) frames.*?data (\S+) %"
        r".*?T\^(\S+).*?N\^(\S+) ",
        flat(DOCS["speed.md"]),
    ).groups()
    names = (
        "play/latency_frame_20_ms",
        "play/latency_frame_10000_ms",
        "play/shipped_fps",
        "train/data_wait",
        "growth/exponent_T",
        "growth/exponent_N",
    )
    for shown, name in zip(said, names, strict=True):
        assert float(shown) == pytest.approx(
            report[name] * (100 if name == "train/data_wait" else 1), rel=0.05, abs=0.06
        )


def test_the_shipped_worlds_have_cards_and_fit():
    folders = sorted((ROOT / "checkpoints" / "shipped").iterdir())
    assert DEFAULT in folders
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 20 * 2**20
    for folder in folders:
        card = (folder / "card.md").read_text()
        report = json.loads((folder / "report.json").read_text())
        assert all(row in card for row in number_rows(report))
        for kind in ("", "_null", "_marginal", "_button"):
            assert f"| dynamics/delta_psnr{kind}_t4 |" in card
        assert report["dynamics/clips"] >= 256
        world = load_world(folder)
        assert world.action_table
        for row in world.action_table:
            assert f"| {row['action']} | {row['label']} |" in card


def test_the_front_door_is_the_same_everywhere():
    """CI and CONTRIBUTING have the README's two commands; CI runs them in fresh environments."""
    block = re.search(r"## Two commands\n+```\n(.*?)```", README, re.S)[1]
    lines = [line.partition("#")[0].strip() for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("pip install")]
    assert lines == [
        "pip install -r requirements.txt && python play.py",
        "pip install -r requirements-dev.txt && python -m pytest",
    ]
    command = ["bash", ROOT / ".ci" / "run", "--lines"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == lines
    assert all(line in (ROOT / "CONTRIBUTING.md").read_text() for line in lines)


def packages(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line[:1] not in "#-"]
    return {re.split(r"[=<>;\[]", line)[0].strip().lower() for line in lines}


def imported_packages():
    ours = {path.stem for path in ROOT.glob("**/*.py")}
    ours |= {path.name for path in ROOT.iterdir() if path.is_dir()}
    found = set()
    rooms = "models utils evaluation player tools extras articles tests".split()
    for path in [*ROOT.glob("*.py"), *(p for room in rooms for p in (ROOT / room).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    return found - ours - set(sys.stdlib_module_names)


def test_requirements_hold_what_is_imported_and_playing_needs_no_test_tools():
    distributions = {
        "cv2": "opencv-python",
        "PIL": "matplotlib",
        "ale_py": "ale-py",
        "google": "protobuf",
        "procgen": "procgen-mirror",
    }
    needed = {distributions.get(name, name).lower() for name in imported_packages()}
    missing = needed - packages("requirements.txt") - packages("requirements-dev.txt")
    assert missing <= {"procgen-mirror"}, missing  # CoinRun wants an environment of its own
    playing = "torch numpy einops opencv-python h5py matplotlib tqdm vizdoom"
    assert packages("requirements.txt") == set(playing.split())


@pytest.mark.parametrize(
    "module",
    "train_tokenizer train_lam train_dynamics play validate player.gym_env"
    " tools.bench tools.speedrun extras.vjepa_ac.train extras.flow_inverse_dynamics.train".split(),
)
def test_every_program_asks_openmp_for_short_spins_before_torch_is_loaded(module):
    """A meta path finder notes whether the variable is set when torch is first asked for."""
    code = f"""
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)
sys.meta_path.insert(0, Finder())
import {module}
"""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code]
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
    assert subprocess.run(command, **options).stdout.strip() == "1000"


def test_what_the_user_has_set_for_openmp_stands():
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    rest = {name: value for name, value in os.environ.items() if name not in names}
    code = "import os, utils; print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, found in (
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ):
        options = dict(cwd=ROOT, env=rest | given, capture_output=True, text=True, check=True)
        done = subprocess.run([sys.executable, "-c", code], **options)
        assert done.stdout.strip() == str(found)


def test_the_numbers_of_the_gpu_are_those_on_file():
    bench, large, world = (result(name) for name in ("bench-h200", "large-h200", "gpu-crafter"))
    prefix = "curve/3.2/dynamics/delta_psnr"
    keys = min(world[f"{prefix}{kind}_t4"] for kind in ("", "_null", "_marginal"))
    minutes, eager = world["curve/3.2/wall_minutes"], 100 * large["pieces/utilisation"]
    compiled = eager / large["pieces/time/compiled whole"]
    text = flat(DOCS["scaling.md"])
    large_picture = result("gpu-doom-maze-128")
    control = "dynamics/delta_psnr_min_t4"
    low, high = (large_picture[f"{control}_{end}"] for end in ("low", "high"))
    nmi, classifier = (large_picture[f"lam/{name}"] for name in ("nmi", "nmi_classifier"))
    updates = [large_picture[f"updates/{stage}"] for stage in ("tokenizer", "lam", "dynamics")]
    for said in (
        "{}, {} and {} steps of 16 clips".format(*updates),
        f"worth {large_picture[control]:.1f} dB (95 % interval: {low:.1f} to {high:.1f})",
        f"true actions to {nmi:.2f} (NMI; a classifier: {classifier:.2f})",
        f"in {minutes:.1f} minutes, validation included; its keys are worth {keys:.1f} dB",
        f"at {bench['play/fps_b1']:.0f} frames a second, with 99 % of the frames within"
        f" {bench['play/latency_p99_ms']:.2f} ms",
        f"256 worlds at once make {bench['play/fps_b256']:,.0f}",
        f"at {eager:.0f} % of the bfloat16 speed of one large product, with `--compile` at"
        f" {compiled:.0f} %",
    ):
        assert said in text, said
    assert {report["device"] for report in (bench, large, world)} == {"NVIDIA H200"}


def test_the_cost_of_a_second_training_is_that_on_file():
    report, text = result("beside"), flat(DOCS["speed.md"])
    kinds = ("tokenizer", "lam", "dynamics", "play")
    short = [f"{report[f'beside/{kind}_short_spin']:.1f}" for kind in kinds]
    usual = [f"{report[f'beside/{kind}_usual_spin']:.2g}" for kind in kinds]
    assert (
        f"takes {short[0]} (tokenizer), {short[1]} (latent actions) and {short[2]} (dynamics)"
        f" times as long as alone, and a frame of play {short[3]} times" in text
    )
    assert f"it would be {usual[0]}, {usual[1]}, {usual[2]} and {usual[3]} times" in text


def options_of(*kinds):
    return {flag(name) for kind in kinds for name in kind.__dataclass_fields__}


def test_files_and_options_in_readme_and_docs_exist():
    training = (config.TokenizerConfig, config.LatentActionConfig, config.DynamicsConfig)
    options = options_of(*training, play.PlayOptions, validate.ValidateOptions)
    for tool in ("bench", "record", "speedrun"):
        source = (ROOT / "tools" / f"{tool}.py").read_text()
        options |= set(re.findall(r"add(?:_argument)?\(\s*\"(--[a-z-]+)\"", source))
    options |= {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
    for name, text in {"README.md": README, **DOCS}.items():
        place = ROOT if name == "README.md" else ROOT / "docs"
        for path in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
            assert (ROOT / path).exists(), (name, path)
        for path in re.findall(r"\]\((?!https:)([^)#]+)[^)]*\)", text):
            assert (place / path).exists(), (name, path)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= options, name
    assert all(game in README for game in GAMES)
    scripts = (train_tokenizer, train_lam, train_dynamics)
    assert all("python train_" in script.__doc__ for script in scripts)


def test_the_readme_is_one_screen_and_counts_the_evening():
    assert len(README.split()) <= 900
    scripts = ("config", "train_tokenizer", "train_lam", "train_dynamics")
    evening = [ROOT / f"{name}.py" for name in scripts]
    evening += (ROOT / "models").glob("*.py")
    lines = sum(len(path.read_text().splitlines()) for path in evening)
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        said = int(re.search(r"about ([\d,]+) lines", text)[1].replace(",", ""))
        assert abs(said - lines) <= 25, (said, lines)
