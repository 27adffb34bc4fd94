"""Tests of README.md and docs/: commands run, Python blocks run, links have targets, sizes are correct.

Default: all flags of all commands exist, links and files exist. With `-m docs` every command and every Python block
runs at a tiny size (tests/documentation.py).
"""

import dataclasses
import fcntl
import inspect
import math
import os
import re
import runpy
import shutil
from pathlib import Path

import documentation
import jax
import pytest
import tyro
from documentation import PAGES, ROOT, block_commands, fences, inline_commands, split_words
from foreign_checkpoints import shapes_by_name

from dalle_jax.cli import COMMANDS as CLI_COMMANDS
from dalle_jax.cli import all_flags_of, train
from dalle_jax.config.files import load_config
from dalle_jax.evaluate import diffusion, metrics
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.train import loop

COMMANDS = [(page.name, line) for page in PAGES for line in block_commands(page) + inline_commands(page)]


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page} {line[:60]}" for page, line in COMMANDS])
def test_flags_of_commands_exist(page, line, monkeypatch, capsys):
    """A reader replaces words in capitals; of a command with "..." only the verb is checked."""
    monkeypatch.chdir(ROOT)
    command, *rest = split_words(line)
    assert command in CLI_COMMANDS or command == "COMMAND"
    if command == "COMMAND" or not rest or "..." in rest or any("$" in word for word in rest):
        return
    if command == "train":
        if not rest[0].startswith("configs/"):
            return
        rest = [word for i, word in enumerate(rest) if "--init-from" not in (word, rest[i - 1])]
        assert train.parse_train_args(rest) is not None
        return
    problems = [_parse_problem(flags, rest, capsys) for flags in all_flags_of(command).values()]
    assert None in problems, problems


def _parse_problem(flags, words, capsys) -> str | None:
    """Return the error of parsing a command, whose flags depend on the model of RUN, or None."""
    known = {"--help", *("--" + field.name.replace("_", "-") for field in dataclasses.fields(flags))}
    if unknown := {word.partition("=")[0] for word in words if word.startswith("--")} - known:
        return f"no flags {unknown}"
    try:
        tyro.cli(flags, args=words, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:  # a command in a sentence may leave out required arguments
        message = capsys.readouterr().err
        return None if stop.code == 0 or "Required options" in message or "Missing" in message else message
    return None


def test_commands_are_found():
    assert len(COMMANDS) > 60 and {page for page, _ in COMMANDS} > {"README.md", "data.md", "pods.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_in_shell_blocks(page):
    """`-m docs` runs only those."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert not re.findall(r"^ *(?:dalle-jax|python train\.py|pytest) .*", text, re.MULTILINE)


def test_every_command_is_listed():
    table = (ROOT / "docs" / "commands.md").read_text()
    assert re.findall(r"^\| `(\w+)", table, re.MULTILINE) == list(CLI_COMMANDS)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


ALL_PAGES = [*PAGES, ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: p.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in file:
            continue
        linked = (page.parent / file) if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"
    for name in re.findall(
        r"(?:configs|tests|benchmarks|dalle_jax|docs|examples)/[\w/]+\.(?:py|md|png|ipynb)", text
    ):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"
    for name in re.findall(r"`(\w+/[\w/]+\.py)`", text):  # of the repository or of the package
        assert (ROOT / name).is_file() or (ROOT / "dalle_jax" / name).is_file(), f"{page.name} names {name}"
    for name in re.findall(r"pytest(?: -m \w+)?((?: tests/\S+\.py)+)", text):
        assert all((ROOT / file).is_file() for file in name.split()), f"{page.name} runs {name}"
    for name in re.findall(r"python -m benchmarks\.(\w+)", text):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), f"{page.name} runs benchmarks.{name}"


def test_ci_runs_existing_tests():
    names = re.findall(r"tests/[\w/.]+", (ROOT / ".ci" / "run").read_text())
    assert len(names) > 10 and all((ROOT / name).exists() for name in names), names


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_flags_of_benchmarks_exist(page):
    text = page.read_text().replace("\\\n", " ")
    for name, flags in re.findall(r"python -m benchmarks\.(\w+)([^`\n]*)", text):
        source = (ROOT / "benchmarks" / f"{name}.py").read_text()
        for flag in re.findall(r"--[a-z][\w-]*", flags):
            field = flag[2:].replace("-", "_")
            assert f'"{flag}"' in source or f"{field}:" in source or f'"{field}"' in source, (
                f"{page.name}: benchmarks.{name} has no {flag}"
            )


def test_translation_has_the_same_commands_and_figures():
    english, chinese = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")
    )

    def code(text):
        blocks = re.findall(r"```\w+\n.*?```", text, re.DOTALL)
        return [re.sub(r" *#.*", "", block) for block in blocks]

    assert code(chinese) == code(english)

    def figures(text):
        return sorted(
            re.findall(r"\d[\d,.]*(?: M| B|%| dB)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        )

    assert figures(chinese) == figures(english)


def table_of_configurations() -> list[tuple[str, str]]:
    """Return each configuration file in README's table with its size there, in the order of the table."""
    rows = re.findall(r"^\| (`\w+\.py`.*?) \|.*?\| ([^|]* [MB]) \|", PAGES[0].read_text(), re.MULTILINE)
    pairs = []
    for files, sizes in rows:
        names = re.findall(r"`(\w+\.py)`", files)
        pairs += zip(names, re.split(r" \+ |; ", sizes), strict=True)
    return pairs


def test_sizes_of_configurations():
    table = table_of_configurations()
    files = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {name for name, _ in table} == files - {"finetune.py"}  # its model is that of a run
    for name, size in table:
        number, unit = size.split()
        last = 10.0 ** -len(number.partition(".")[2]) * {"M": 1e6, "B": 1e9}[unit]  # value of its last digit
        shapes = shapes_by_name(load_config(ROOT / "configs" / name).model)
        count = sum(math.prod(leaf.shape) for leaf in shapes.values())
        assert abs(count - float(number) * {"M": 1e6, "B": 1e9}[unit]) <= 0.51 * last, (
            f"{name}: {count:,}, not {size}"
        )


# --- execution ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The directory of data and tiny runs, common to all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = base / "site"
    with open(base / "site.lock", "w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "site.done").exists():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            patch.chdir(path)
            small_programs(patch)
            documentation.write_data(path)
            documentation.train_runs(path)
            (base / "site.done").touch()
    return path


def small_programs(patch: pytest.MonkeyPatch) -> None:
    """Train on one device if a command has no mesh, and evaluate in batches of 8: less to compile."""

    def make_small_mesh(cfg):
        alone = (abs(cfg.data), cfg.fsdp, cfg.model) == (1, 1, 1)
        return make_mesh(cfg, jax.devices()[:1] if alone else None)

    patch.setattr(loop, "make_mesh", make_small_mesh)
    patch.setattr(metrics, "EVAL_ROWS", 8)
    patch.setattr(diffusion, "EVAL_ROWS", 8)


@pytest.fixture
def page_directory(site, tmp_path, monkeypatch):
    """A copy of the site for one page."""
    path = tmp_path / "site"
    shutil.copytree(site, path, symlinks=True)
    monkeypatch.chdir(path)
    small_programs(monkeypatch)
    return path


@pytest.mark.docs
@pytest.mark.parametrize("page", [p for p in PAGES if block_commands(p)], ids=lambda p: p.name)
def test_commands_run(page, page_directory):
    for command in block_commands(page):
        if documentation.reason_not_run(command) is None:
            print("$", command)
            documentation.run_command(documentation.shrink(split_words(command)))


@pytest.mark.docs
@pytest.mark.parametrize("page", [p for p in PAGES if fences(p, "python")], ids=lambda p: p.name)
def test_python_runs(page, page_directory):
    """The blocks of a page have one namespace, as in a notebook."""
    namespace = {"__name__": "__main__"}
    for code in fences(page, "python"):
        exec(compile(inspect.cleandoc(code), page.name, "exec"), namespace)


EXAMPLES = {  # script: its arguments
    "sample_images.py": ["runs/demo/dalle", "a large red star", "--num-images", "2", "--guidance-scale", "2"],
    "train_tokenizer.py": ["mine", "--steps", "2", "--image-size", "32", "--width", "8", "--batch-size", "8"],
    "custom_training.py": ["--steps", "2", "--fsdp", "2"],
}


def test_every_example_has_arguments():
    assert set(EXAMPLES) == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.docs
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, page_directory):
    runpy.run_path(str(ROOT / "examples" / name))["main"](EXAMPLES[name])


@pytest.mark.docs
def test_notebook_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("QUICKSTART_STEPS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_notebook_has_no_outputs():
    text = (ROOT / "examples" / "quickstart.ipynb").read_text()
    assert '"outputs": []' in text and '"output_type"' not in text and '"execution_count": null' in text


def test_reasons_are_needed():
    """Each pattern of NOT_RUN matches a command."""
    blocks = [f"{command} " for page in PAGES for command in block_commands(page)]
    for pattern, reason in documentation.NOT_RUN:
        assert any(re.search(pattern, block) for block in blocks), f"no command matches {pattern} ({reason})"
