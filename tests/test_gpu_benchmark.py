"""Tests of benchmarks/gpu.sh, without a GPU: its time limit, its commands, and steps that fail or take too long."""

import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from dalle_jax.cli.train import parse_train_args

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run_script(*words, **environ):
    """Run the script with a Python named `python3` by default and return the finished process."""
    environ = {key: str(value) for key, value in environ.items()}
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "PEER_PYTHON", "LIMIT")}
    command = ["bash", str(SCRIPT), *map(str, words)]
    return subprocess.run(command, env=kept | environ, capture_output=True, text=True, timeout=300)


def planned_steps() -> dict[str, tuple[int, list[str]]]:
    """Return name -> (seconds, words of the command), in the order of the script."""
    done = run_script("--dry-run")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows[-1][0] == "all" and int(rows[-1][1]) == sum(int(row[1]) for row in rows[:-1])
    return {name: (int(seconds), shlex.split(command)) for name, seconds, command in rows[:-1]}


STEPS = planned_steps()


def test_budgets_are_at_most_13_minutes():
    assert len(STEPS) >= 10 and sum(seconds for seconds, _ in STEPS.values()) <= 13 * 60


@pytest.mark.parametrize("name", STEPS)
def test_commands_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    words = [word for word in STEPS[name][1] if word != "env" and "XLA_FLAGS=" not in word]
    python, *words = words
    assert python == "python3"
    if words[0] == "train.py":
        assert parse_train_args(words[1:]).config
        return
    dash_m, module, *flags = words
    assert dash_m == "-m" and importlib.util.find_spec(module)
    if module == "pytest":
        assert all((ROOT / flag).exists() for flag in flags if flag.startswith("tests/"))
    elif module == "benchmarks.train":
        args, rest = importlib.import_module(module).make_parser().parse_known_args(flags)
        config = parse_train_args([*rest, "--model.dtype", *args.dtypes], module).config
        if args.peer_python:
            assert importlib.import_module(module).peer_job(config, args.steps)
    elif module == "benchmarks.sample":
        assert importlib.import_module(module).make_parser().parse_args(flags).batch == [1, 8, 64]
    else:
        assert (module, flags) == ("benchmarks.report", [])


def test_command_buffers_are_turned_off_in_one_of_each_pair():
    for size in ("1.3b", "350m"):
        with_buffers, without = (STEPS[f"sample_{size}{end}"][1] for end in ("", "_no_command_buffers"))
        assert without[:2] == ["env", "XLA_FLAGS=--xla_gpu_enable_command_buffer="]
        assert with_buffers[: len(without) - 2] == without[2:]


def fake_python(path: Path, body: str) -> Path:
    """Write a program in place of Python. The imports that look for the peers fail."""
    path.write_text(f"#!/bin/bash\n[ $1 = -c ] && exit 1\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_failed_step_does_not_stop_the_next(tmp_path):
    python = fake_python(tmp_path / "python", 'echo "output of $2"; echo problem >&2; [ $2 != pytest ]')
    done = run_script(tmp_path / "out", "gpu_tests", "environment", "train_dvae", PYTHON=python)
    text = (tmp_path / "out" / "results.md").read_text()
    assert done.returncode == 1, done.stderr
    order = [
        "environment finished",
        "output of pytest",
        "gpu_tests failed with exit code 1",
        "train_dvae finished",
    ]
    assert sorted(order, key=text.index) == order
    assert "sample_1.3b" not in text and "peers" not in text
    assert (tmp_path / "out" / "log.txt").read_text().count("problem") == 3


def test_a_slow_step_is_stopped_and_keeps_its_output(tmp_path):
    python = fake_python(tmp_path / "python", "echo begun; sleep 50 & wait")
    done = run_script(tmp_path / "out", "environment", "gpu_tests", PYTHON=python, LIMIT=11)
    text = (tmp_path / "out" / "results.md").read_text()
    assert done.returncode == 0 and "begun\n\nenvironment stopped at its limit" in text
    assert "Not run: " in text.split("## gpu_tests")[1]


def test_training_of_the_scenes_uses_the_time_that_is_left_and_saves(tmp_path):
    """The first SIGTERM saves, a second one would end the process at once."""
    body = """runs=$4; mkdir -p "$runs"; stop() { stops=x$stops; }; trap stop TERM
    sleep 50 & wait $!; kill %1; sleep 1; echo "saved $stops" >"$runs/metrics.jsonl" """
    python = fake_python(tmp_path / "python", body)
    done = run_script(tmp_path / "out", "scenes_dalle", PYTHON=python, LIMIT=21)
    assert (tmp_path / "out" / "scenes_dalle.jsonl").read_text() == "saved x\n", done.stderr


def test_unknown_option_is_an_error():
    done = run_script("--dryrun")
    assert done.returncode == 2 and "Expected --dry-run or --cpu-check, got --dryrun." in done.stderr
