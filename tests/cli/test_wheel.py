"""The wheel contains `configs/`, and its configurations train by name without a source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dalle_jax.config.files import list_configs

pytest.importorskip("setuptools", minversion="77", reason="building needs the setuptools of pyproject.toml")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The unpacked files of the wheel."""
    room = tmp_path_factory.mktemp("wheel")
    sources = [
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "dalle_jax",
        "configs",
    ]  # a build writes next to its sources
    (room / "sources").mkdir()
    for name in sources:
        subprocess.run(["cp", "-r", str(ROOT / name), str(room / "sources" / name)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(room),
    ]
    done = subprocess.run(command, cwd=room / "sources", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = room.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(room / "site")
    return room / "site"


def command(installed, directory, *argv):
    """Run the installed `dalle-jax` in a directory."""
    return subprocess.run(
        [sys.executable, "-m", "dalle_jax", *argv], cwd=directory, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


@pytest.mark.slow
def test_configurations_are_in_the_wheel(installed, tmp_path):
    shipped = {path.stem for path in (installed / "dalle_jax" / "configs").glob("*.py")}
    assert shipped == set(list_configs()) and not (installed / "configs").exists()
    listed = command(installed, tmp_path, "configs")
    assert listed.returncode == 0 and {line.split()[0] for line in listed.stdout.splitlines()} == shipped
    path = command(installed, tmp_path, "configs", "demo_dalle", "--path").stdout.strip()
    assert path == str(installed / "dalle_jax" / "configs" / "demo_dalle.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo_dvae", "emoji_dalle.py"])
def test_a_configuration_of_the_wheel_trains_by_name(installed, tmp_path, name):
    """emoji_dalle imports another configuration."""
    helped = command(installed, tmp_path, "train", name, "--help")
    assert helped.returncode == 0 and "--model.kind" in helped.stdout
    done = command(installed, tmp_path, "train", name, "--stepz", "3")
    assert done.returncode == 2 and "--steps" in done.stderr
