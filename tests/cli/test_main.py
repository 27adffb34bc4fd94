"""The command line as a whole: help, typing errors, exit codes of unusable runs."""

import subprocess
import sys

import numpy as np
import pytest
from command_line import refused, run

from dalle_jax.cli import COMMANDS
from dalle_jax.cli.startup import huge_page_environment


def test_help_lists_every_command_and_no_command_is_an_error():
    for argv in (("--help",), ("-h",)):
        done = run(*argv)
        assert done.code == 0 and all(command in done.out for command in COMMANDS)
    assert "usage: dalle-jax COMMAND" in refused(code=2)


def test_help_imports_no_jax():
    code = "import sys; from dalle_jax.cli import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command):
    done = run(command, "--help")
    assert done.code == 0 and f"dalle-jax {command}" in done.out and done.err == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("smaple", "x"), "perhaps you meant 'sample'"),
        (("frobnicate",), "use one of demo, train, sample"),
        (("rerank", "runs/x", "a", "b.png", "--tpo", "1"), "--top"),
        (("info", "runs/x", "--jsn"), "--json"),
        (("rerank", "runs/x", "a", "b.png", "--top", "many"), "many"),
        (("encode", "runs/x", "a.png"), "--out"),
        (("train",), "usage: dalle-jax train"),
    ],
)
def test_an_invalid_command_line_exits_with_2(argv, message):
    assert message in refused(*argv, code=2)


def test_runs_that_are_missing_incomplete_or_of_another_stage(made, tmp_path):
    """Each is an error, and no call changes the directory."""
    assert f"Expected a run directory, got {tmp_path / 'none'}" in refused("sample", tmp_path / "none", "a")
    (tmp_path / "empty").mkdir()
    assert "without config.json" in refused("evaluate", tmp_path / "empty")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_bytes((made.dalle / "config.json").read_bytes())
    message = refused("sample", tmp_path / "half", "a")
    assert f"Expected a checkpoint in {tmp_path / 'half'}, got none. Train the run first" in message
    np.savez(tmp_path / "c.npz", codes=np.zeros((1, 64), np.int32))
    message = refused("decode", tmp_path / "half", tmp_path / "c.npz", "--out", tmp_path / "x")
    assert ", got none. Train the run first" in message
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "Expected a configuration of this version" in refused("info", tmp_path / "broken")
    message = refused("sample", made.dvae, "a")
    assert (
        "of stage dvae, an image tokenizer. Use the run of a Transformer" in message
        and "`encode` and `decode`" in message
    )
    assert {p.name for p in (tmp_path / "half").iterdir()} == {"config.json"}


@pytest.mark.parametrize(
    ("tunables", "setting", "want"),
    [
        (None, "always [madvise] never\n", "glibc.malloc.hugetlb=1"),
        (
            "glibc.malloc.arena_max=2",
            "always [madvise] never\n",
            "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1",
        ),
        ("glibc.malloc.hugetlb=0", "always [madvise] never\n", None),
        (None, "[always] madvise never\n", None),
        (None, "always madvise [never]\n", None),
        (None, "", None),
    ],
)
def test_huge_pages_are_asked_for_where_linux_heeds_it(tunables, setting, want):
    environ = {"A": "b"} | ({} if tunables is None else {"GLIBC_TUNABLES": tunables})
    got = huge_page_environment(environ, setting)
    assert got == (None if want is None else {"A": "b", "GLIBC_TUNABLES": want})
