"""The articles cannot rot unseen: their code is the code, their numbers are the result files', their commands run, their links lead somewhere."""
import ast
import importlib
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import validate  # noqa: E402
from articles.figures import CITED, OUT, shown  # noqa: E402

ROOT = Path(__file__).parent.parent
ARTICLES = sorted((ROOT / "articles").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in ARTICLES}
EXCERPTS = [(name, *found) for name, text in TEXTS.items() for found in re.findall(r"<!--code (\S+) (\S+)-->\n```python\n(.*?)```", text, re.S)]
COMMANDS = [(name, line) for name, text in TEXTS.items() for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]


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


@pytest.mark.parametrize("article, path, symbol, code", EXCERPTS, ids=[f"{a}-{s}" for a, _, s, _ in EXCERPTS])
def test_an_excerpt_is_the_code(article, path, symbol, code):
    lines, source = flat(code), flat(source_of(path, symbol))
    assert any(source[i : i + len(lines)] == lines for i in range(len(source))), f"{article}: this is no longer in {symbol} of {path}"


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
    """What has a decimal point, outside code, mathematics and links, was measured, or is quoted from a paper (<!--cited-->)."""
    text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|arXiv:[\d.]+|§[\d.]+|[\d.,]+<!--[^>]*-->", " ", TEXTS[article], flags=re.S)
    assert re.findall(r"\d+\.\d+", text) == []


@pytest.mark.parametrize("article", TEXTS)
def test_links_and_pictures_exist(article):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[article]):
        path, _, anchor = target.partition("#")
        assert target.startswith("https://") or (ROOT / "articles" / path).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", (ROOT / "articles" / path).resolve().read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    pictures = {path.name for path in OUT.glob("*.png")}
    assert pictures == set(re.findall(r"\(figures/([\w.]+)\)", "".join(TEXTS.values())))  # none is missing, none is left over


def test_every_article_ends_with_exercises_and_every_idea_has_its_equation():
    for name, text in TEXTS.items():
        if name[0].isdigit():
            exercises = text.partition("## Exercises")[2]
            assert len(re.findall(r"^\d\. \*", exercises, re.M)) >= 3, name
            assert "$$" in text and "](figures/" in text and "```python" in text and "```sh" in text, name


SMALL = {  # a later option wins
    "record.py": ["--frames", "600"],
    "train_tokenizer.py": ["--preset", "tiny", "--n-updates", "2"], "train_lam.py": ["--preset", "tiny", "--n-updates", "2"], "train_dynamics.py": ["--preset", "tiny", "--n-updates", "2"],
    "validate.py": ["--clips", "4"], "play.py": [], "extras/flow_inverse_dynamics/train.py": ["--num-epochs", "1"],
    "extras/vjepa_ac/pretrain.py": ["--n-updates", "2", "--buffer", "4"], "extras/vjepa_ac/train.py": ["--n-updates", "2", "--buffer", "4"],
}  # fmt: skip


def run(line):
    """A command of an article, with a small budget; what it writes lies in the folder where we are."""
    python, script, *options = shlex.split(line)
    assert python == "python" and (ROOT / script).exists(), line
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return module.main([*options, *SMALL.get(script, [])])


@pytest.mark.slow
def test_the_commands_of_the_spine_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate, "classify_buttons", lambda sizes, rest, frames, *_: frames[:, 1:, 0, 0, 0].long())  # the ceiling is a training of its own
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "shipped").symlink_to(ROOT / "checkpoints" / "shipped")
    lines = [line for _, line in COMMANDS if not line.startswith(("python extras/", "python bench.py"))]
    assert len(lines) >= 9
    for line in lines:
        run(re.sub(r" --minutes \d+", "", line))
    assert (tmp_path / "out.gif").exists() and (tmp_path / "mine.gif").exists() and (tmp_path / "report").is_dir()


@pytest.mark.slow
def test_the_commands_of_the_extras_run(tmp_path):
    """With a hundredth of their data and a few updates, each in a process of its own."""
    (tmp_path / "extras").symlink_to(ROOT / "extras")
    lines = [line for _, line in COMMANDS if line.startswith("python extras/")]
    assert len(lines) >= 6
    for line in lines:
        _, script, *options = shlex.split(line.replace("--ticks 96000 --shards 8", "--ticks 800 --shards 2").replace("10000", "500"))
        result = subprocess.run([sys.executable, script, *options, *SMALL.get(script, [])], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "checkpoints/vjepa/action_predictor.pt").exists()


def test_every_command_is_run_by_one_of_these_tests():
    covered = ("python extras/", "python bench.py --preset tiny --age 100", *(f"python {name}" for name in ("record.py", "play.py", "train_", "validate.py")))
    assert all(line.startswith(covered) for _, line in COMMANDS)  # bench.py, with these options, is run by test_bench.py
