"""What README and docs/ tell a reader to type: flags exist, files are there, links lead somewhere, imports work."""

import ast
import dataclasses
import inspect
import math
import re
import shlex
from pathlib import Path

import pytest
import tyro

from dalle_jax.checkpoint.run_dir import load_config, shapes_by_name
from dalle_jax.cli import COMMANDS as CLI_COMMANDS
from dalle_jax.cli import flags_of, train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENVIRONMENT = re.compile(r"^(?:[A-Z_]+=\S+ )+")


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Shell lines in fences, in indented blocks and between backticks that begin with one of our two commands."""
    text = page.read_text()
    for block in fences(page, "python"):
        text = text.replace(block, "")
    lines = text.replace("\\\n", " ").splitlines()
    lines = [part for line in lines for part in re.split(r" && | \| | ; ", line.strip())]
    flat = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " ")
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", flat)]
    ours = ("dalle-jax ", "python train.py ", "train.py ")
    return [line for line in lines if ENVIRONMENT.sub("", line).startswith(ours) and "`" not in line]


def words(line: str) -> list[str]:
    line = re.sub(r"^(python )?train\.py", "dalle-jax train", ENVIRONMENT.sub("", line))
    got = shlex.split(re.sub(r"[\[\]]", "", line), comments=True)[1:]
    got = got[: next((i for i, word in enumerate(got) if word in ("&", ";", ">")), len(got))]
    return [{"N": "2", "I": "1"}.get(word, word) for word in got]  # numbers that the reader puts in


COMMANDS = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page} {line[:60]}" for page, line in COMMANDS])
def test_commands_are_understood(page, line, monkeypatch, capsys):
    """With a word in capitals for what the reader puts in; what "..." stands for cannot be checked."""
    monkeypatch.chdir(ROOT)
    verb, *rest = words(line)
    if not rest:  # the name of a command, in a sentence
        assert verb in CLI_COMMANDS or verb == "COMMAND"
        return
    if verb == "COMMAND" or "..." in rest or "$S" in rest:
        return
    if verb == "train":
        if not rest[0].startswith("configs/"):
            return
        rest = [word for i, word in enumerate(rest) if word != "--init-from" and rest[i - 1] != "--init-from"]
        assert train.parse_args(rest) is not None
        return
    kind = flags_of(verb)
    known = {"--help", *("--" + field.name.replace("_", "-") for field in dataclasses.fields(kind))}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known
    try:
        tyro.cli(kind, args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:  # a sentence may name a flag and leave out what else there must be
        told = capsys.readouterr().err
        assert stop.code == 0 or "Required options" in told or "Missing" in told, told


def test_commands_are_found():
    assert len(COMMANDS) > 60 and {page for page, _ in COMMANDS} > {"README.md", "data.md", "pods.md"}


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        there = (page.parent / file) if file else page
        assert there.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"
    for name in re.findall(r"(?:configs|tests|benchmarks|dalle_jax|docs)/[\w/]+\.(?:py|md|png)", text):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", [p for p in PAGES if fences(p, "python")], ids=lambda p: p.name)
def test_python_parses_and_its_imports_work(page):
    for code in fences(page, "python"):
        tree = ast.parse(inspect.cleandoc(code))
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), page.name, "exec"), {})


def table_of_configurations() -> list[tuple[str, str]]:
    """Every file of README's table and its size there, in the order of both."""
    rows = re.findall(r"^\| (`\w+\.py`.*?) \|.*?\| ([^|]* [MB]) \|", PAGES[0].read_text(), re.MULTILINE)
    pairs = []
    for files, sizes in rows:
        names = re.findall(r"`(\w+\.py)`", files)
        pairs += zip(names, re.split(r" \+ |; ", sizes), strict=True)
    return pairs


def test_sizes_of_configurations():
    table = table_of_configurations()
    files = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {name for name, _ in table} == files - {"finetune.py"}  # whose model is that of a run
    for name, shown in table:
        number, unit = shown.split()
        last = 10.0 ** -len(number.partition(".")[2]) * {"M": 1e6, "B": 1e9}[unit]  # worth of its last digit
        shapes = shapes_by_name(load_config(ROOT / "configs" / name).model)
        count = sum(math.prod(leaf.shape) for leaf in shapes.values())
        assert abs(count - float(number) * {"M": 1e6, "B": 1e9}[unit]) <= 0.51 * last, (
            f"{name}: {count:,}, not {shown}"
        )
