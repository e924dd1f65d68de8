"""The articles follow the code: excerpts, numbers, commands, links and pictures are checked."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from articles.figures import CITED, OUT, shown
from evaluation import stages

ROOT = Path(__file__).parent.parent
ARTICLES = sorted((ROOT / "articles").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in ARTICLES}


def found_in_all(pattern):
    """(article, match) for every match in every article."""
    return [
        (name, found) for name, text in TEXTS.items() for found in re.findall(pattern, text, re.S)
    ]


EXCERPTS = [
    (name, *found) for name, found in found_in_all(r"<!--code (\S+) (\S+)-->\n```python\n(.*?)```")
]
COMMANDS = [line for _, block in found_in_all(r"```sh\n(.*?)```") for line in block.splitlines()]


def source_of(path, symbol):
    """The source of `Class.method` or `function`, dedented."""
    text = (ROOT / path).read_text()
    found = ast.parse(text)
    for name in symbol.split("."):
        found = next(node for node in found.body if getattr(node, "name", None) == name)
    first = min([found.lineno, *(d.lineno for d in found.decorator_list)])
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : found.end_lineno]))


def flat(code):
    """The lines of a piece of code without indentation, so that an excerpt may begin anywhere."""
    return [line.strip() for line in code.strip().splitlines()]


@pytest.mark.parametrize(
    "article, path, symbol, code", EXCERPTS, ids=[f"{a}-{s}" for a, _, s, _ in EXCERPTS]
)
def test_an_excerpt_is_the_code(article, path, symbol, code):
    lines, source = flat(code), flat(source_of(path, symbol))
    starts = range(len(source))
    same = any(source[i : i + len(lines)] == lines for i in starts)
    assert same, f"{article}: this is no longer in {symbol} of {path}"


def test_every_piece_of_code_names_its_source():
    assert len(EXCERPTS) >= 20
    for name, text in TEXTS.items():
        assert text.count("```python") == sum(article == name for article, *_ in EXCERPTS)


@pytest.mark.parametrize("article", TEXTS)
def test_numbers_are_those_of_the_result_files(article):
    for match in CITED.finditer(TEXTS[article]):
        assert match[1] == shown(match), match[0]


@pytest.mark.parametrize("article", TEXTS)
def test_no_measured_number_comes_without_its_source(article):
    """A number with a decimal point was measured, or is quoted from a paper (<!--cited-->).

    Code, mathematics and links do not count.
    """
    allowed = (
        r"```.*?```",
        r"`[^`]*`",
        r"\$\$.*?\$\$",
        r"\$[^$]*\$",
        r"\]\([^)]*\)",
        r"arXiv:[\d.]+",
        r"§[\d.]+",
        r"[\d.,]+<!--[^>]*-->",
    )
    text = re.sub("|".join(allowed), " ", TEXTS[article], flags=re.S)
    assert re.findall(r"\d+\.\d+", text) == []


@pytest.mark.parametrize("article", TEXTS)
def test_links_and_pictures_exist(article):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[article]):
        path, _, anchor = target.partition("#")
        assert target.startswith("https://") or (ROOT / "articles" / path).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", (ROOT / "articles" / path).resolve().read_text(), re.M)
            names = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in names
    pictures = {path.name for path in OUT.glob("*.png")}
    shown_pictures = set(re.findall(r"\(figures/([\w.]+)\)", "".join(TEXTS.values())))
    assert pictures == shown_pictures  # none is missing, none is left over


def test_every_article_ends_with_exercises_and_every_idea_has_its_equation():
    for name, text in TEXTS.items():
        if name[0].isdigit():
            exercises = text.partition("## Exercises")[2]
            assert len(re.findall(r"^\d\. \*", exercises, re.M)) >= 3, name
            for part in ("$$", "](figures/", "```python", "```sh"):
                assert part in text, name


SMALL = {  # a later option wins
    "tools.record": ["--frames", "600"],
    "train_tokenizer": ["--preset", "tiny", "--n-updates", "2"],
    "train_lam": ["--preset", "tiny", "--n-updates", "2"],
    "train_dynamics": ["--preset", "tiny", "--n-updates", "2"],
    "validate": ["--clips", "4"],
    "play": [],
    "extras.flow_inverse_dynamics.train": ["--num-epochs", "1"],
    "extras.vjepa_ac.pretrain": ["--n-updates", "2", "--buffer", "4"],
    "extras.vjepa_ac.train": ["--n-updates", "2", "--buffer", "4"],
}


def parse(line):
    """`python script.py …` or `python -m module …` → (module, options), with a small budget."""
    python, script, *options = shlex.split(line)
    if script == "-m":
        module, *options = options
    else:
        module = script.removesuffix(".py")
        assert script == f"{module}.py", line
    assert python == "python" and (ROOT / f"{module.replace('.', '/')}.py").exists(), line
    return module, [*options, *SMALL.get(module, [])]


def run(line):
    """A command of an article; what it writes is in the folder where we are."""
    module, options = parse(line)
    return importlib.import_module(module).main(options)


@pytest.mark.slow
def test_the_commands_of_the_spine_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the classifier would be a training run of its own
    monkeypatch.setattr(stages, "classifier_nmi", lambda *_: {"nmi_classifier": 0.5})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "shipped").symlink_to(ROOT / "checkpoints" / "shipped")
    others = ("python -m extras.", "python -m tools.bench")
    lines = [line for line in COMMANDS if not line.startswith(others)]
    assert len(lines) >= 9
    for line in lines:
        run(re.sub(r" --minutes \d+", "", line))
    assert (tmp_path / "out.gif").exists()
    assert (tmp_path / "mine.gif").exists()
    assert (tmp_path / "report").is_dir()


@pytest.mark.slow
def test_the_commands_of_the_extras_run(tmp_path, monkeypatch):
    """With a hundredth of their data and a few updates, each in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "extras").symlink_to(ROOT / "extras")
    lines = [line for line in COMMANDS if line.startswith("python -m extras.")]
    assert len(lines) >= 6
    for line in lines:
        line = re.sub(r"--ticks \d+ --shards \d+", "--ticks 800 --shards 2", line)
        module, options = parse(line.replace("10000", "500"))
        result = subprocess.run(
            [sys.executable, "-m", module, *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "checkpoints/vjepa/action_predictor.pt").exists()


def test_every_command_is_run_by_one_of_these_tests():
    covered = (
        "python -m extras.",
        "python -m tools.bench --preset tiny --age 100",  # run by test_bench.py
        "python -m tools.record",
        "python play.py",
        "python train_",
        "python validate.py",
    )
    assert all(line.startswith(covered) for line in COMMANDS)
