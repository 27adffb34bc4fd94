"""Shipped configurations: their headers, `dalle-jax configs`, and files found by name or by path."""

import ast
import contextlib
import io
import json
import re
import shlex

import pytest
import tyro

from dalle_jax.cli import all_flags_of, main, train
from dalle_jax.config import TrainConfig, from_json, to_json
from dalle_jax.config.files import config_dir, find_config, list_configs, load_config, load_shipped_config

NAMES = list(list_configs())


def header(name: str) -> str:
    return ast.get_docstring(ast.parse((config_dir() / f"{name}.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", NAMES)
def test_header_has_every_part(name):
    """Title, paper, hardware, time, score and commands; the first command trains by this name."""
    summary, _, rest = header(name).partition("\n\n")
    assert "\n" not in summary and summary.endswith(".")
    for part in ("Paper:", "Hardware:", "Time:", "Score:"):
        assert part in rest
    commands = re.findall(r"^    (dalle-jax .*)", rest, re.MULTILINE)
    assert any(shlex.split(command)[1:3] == ["train", name] for command in commands)


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_a_header_have_valid_flags(name, capsys):
    for line in re.findall(r"^    dalle-jax (.*)", header(name), re.MULTILINE):
        command, *words = shlex.split(line)
        if command == "train":
            words = [word for i, word in enumerate(words) if "--init-from" not in (word, words[i - 1])]
            words = [word for i, word in enumerate(words) if "--data.path" not in (word, words[i - 1])]
            assert train.parse_train_args(words).config_file == name
        else:
            flags = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
            (cls, *_) = (c for c in all_flags_of(command).values() if flags <= c.__dataclass_fields__.keys())
            tyro.cli(cls, args=words, config=(tyro.conf.FlagCreatePairsOff,))


def run(*argv: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(argv)) == 0
    return out.getvalue()


def test_configs_lists_and_prints_configurations():
    lines = run("configs").splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert lines[NAMES.index("demo_dvae")].endswith(header("demo_dvae").partition("\n")[0])
    text = (config_dir() / "demo_dvae.py").read_text(encoding="utf-8")
    assert run("configs", "demo_dvae") == run("configs", "demo_dvae.py") == text
    assert run("configs", "demo_dvae", "--path") == f"{config_dir() / 'demo_dvae.py'}\n"
    found = json.loads(run("configs", "demo_dvae", "--json"))
    assert from_json(TrainConfig, json.dumps(found["config"])) == load_config("demo_dvae")


def test_configurations_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = config_dir() / "demo_dalle.py"
    assert find_config("demo_dalle") == find_config("demo_dalle.py") == find_config(shipped) == shipped
    (tmp_path / "demo_dalle.py").touch()
    assert find_config("demo_dalle.py").resolve() == tmp_path / "demo_dalle.py"
    assert find_config("demo_dalle") == shipped
    (tmp_path / "demo_dvae").touch()
    assert find_config("demo_dvae").resolve() == tmp_path / "demo_dvae"
    (tmp_path / "demo_clip").mkdir()  # a run directory of that name
    assert find_config("demo_clip.py") == config_dir() / "demo_clip.py"
    with pytest.raises(ValueError, match=r"got demo_clip, a directory here .*\. Use demo_clip\.py"):
        find_config("demo_clip")
    with pytest.raises(FileNotFoundError, match=r"configuration file or name, got x/demo_dalle\.py"):
        find_config("x/demo_dalle.py")
    with pytest.raises(FileNotFoundError, match="Use demo_dalle"):
        find_config("demo_dale")
    with pytest.raises(FileNotFoundError, match="Use a name of `dalle-jax configs`"):
        find_config("nothing_like_it")


def test_info_accepts_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(run("info", "demo_dvae", "--json"))["stage"] == "dvae"
    (tmp_path / "demo_dvae").mkdir()  # a run directory takes precedence
    (tmp_path / "demo_dvae" / "config.json").write_text(to_json(load_config("demo_dalle")))
    assert json.loads(run("info", "demo_dvae", "--json"))["stage"] == "dalle"
    assert load_shipped_config("demo_dvae").model.kind == "dvae"


def test_the_demo_configurations_fit_together():
    tokenizer, transformer = load_config("demo_dvae"), load_config("demo_dalle")
    assert transformer.image_tokenizer == tokenizer.run
    assert transformer.model.grid == tokenizer.model.grid
    assert transformer.model.image_vocab == tokenizer.model.vocab
