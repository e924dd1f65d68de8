"""The house stays small: layout, width, length, and which way imports go."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

from utils.cli import Parser

import pytest

ROOT = Path(__file__).parent.parent
DOORS = "config data_utils train_tokenizer train_lam train_dynamics play validate".split()
ROOMS = ("models", "utils", "evaluation", "player", "tools", "extras", "articles")
SOURCES = [ROOT / f"{name}.py" for name in DOORS]
SOURCES += [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
MODELS = sorted((ROOT / "models").glob("*.py"))
# may import itself and everything to its right
FLOORS = [
    {"tools", "extras", "articles"},
    {"play", "validate", "train_tokenizer", "train_lam", "train_dynamics"},
    {"player", "evaluation"},
    {"config", "data_utils"},
    {"utils"},
    {"models"},
]


def lines_of(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def imports_of(path):
    """The first parts of the modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_seven_python_files_stand_at_the_root():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(DOORS)


def test_it_is_formatted_and_linted():
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(["ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    text = "".join(path.read_text() for path in SOURCES)
    assert text.count("fmt: " + "skip") <= 10
    assert "E402" not in text and "sys.path" not in text


def test_no_line_is_wider_than_100_characters():
    tests = sorted((ROOT / "tests").glob("*.py"))
    wide = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in [*SOURCES, *tests]
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not wide, wide


def test_no_line_of_prose_is_wider_than_100_characters():
    """Not counted: code, formulas, tables, pictures, headings, where links lead, source markers."""
    wide = []
    rooms = (ROOT / name for name in ("articles", "docs", "extras", "checkpoints/shipped"))
    for path in [*ROOT.glob("*.md"), *(path for room in rooms for path in room.rglob("*.md"))]:
        prose = re.sub(r"^```.*?^```|\$\$.*?\$\$", "", path.read_text(), flags=re.M | re.S)
        shown = re.sub(r"<!--.*?-->|\]\([^)]*\)|https?://\S+", "", prose)
        lines = [line for line in shown.splitlines() if line[:1] not in ("|", "#", "!")]
        wide += [f"{path.relative_to(ROOT)}: {line[:40]}…" for line in lines if len(line) > 100]
    assert not wide, wide


def test_functions_fit_on_a_screen():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n = node.end_lineno - node.lineno + 1
                training = path.stem.startswith("train_") and path.parent == ROOT
                if n > (110 if training and node.name == "main" else 60):
                    long.append(f"{path.relative_to(ROOT)}:{node.name} {n}")
    assert not long, long


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    floor = next(i for i, names in enumerate(FLOORS) if here in names)
    above = set().union(*FLOORS[:floor])
    assert not above & set(imports_of(path))
    if here == "models":
        assert set(imports_of(path)) <= {
            "models",
            "torch",
            "einops",
            *sys.stdlib_module_names,
            "numpy",
        }


def test_an_evening_and_a_second_sitting_of_reading():
    scripts = "config train_tokenizer train_lam train_dynamics".split()
    evening = [ROOT / f"{name}.py" for name in scripts] + MODELS
    core = evening + [ROOT / f"{name}.py" for name in ("data_utils", "play", "validate")]
    core += (ROOT / "utils").glob("*.py")
    assert lines_of(evening) <= 1600
    assert lines_of(core) <= 2800


def test_stage_1_does_not_import_stages_2_and_3():
    code = (
        "import sys, train_tokenizer; print(*[m for m in sys.modules if m.startswith('models.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "models.video_tokenizer" in done.stdout
    assert not re.search(r"latent_action|dynamics|world_model", done.stdout)


@pytest.mark.parametrize(
    "module",
    "train_tokenizer train_lam train_dynamics play validate tools.record tools.speedrun"
    " tools.bench tools.ablate tools.flagship tools.ship".split(),
)
def test_every_option_has_a_help_text(module, monkeypatch):
    class Stop(Exception):
        pass

    def look(parser, argv=None):
        raise Stop({action.dest: action.help for action in parser._actions})

    monkeypatch.setattr(Parser, "parse_args", look)
    with pytest.raises(Stop) as found:
        importlib.import_module(module).main([])
    helps = found.value.args[0]
    assert len(helps) > 3
    for name, text in helps.items():
        said = re.sub(r"\[.*?\]", "", text or "").split()
        assert said, f"{name} of {module} has no help text"
