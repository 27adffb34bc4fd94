"""Configuration files: Python files that end in `config = TrainConfig(...)`, found by name or by path.

The files of `configs/` are shipped with the package and have names: `demo_dalle` is `configs/demo_dalle.py`.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import traceback
from pathlib import Path

from dalle_jax.config.training import TrainConfig

_PACKAGE = Path(__file__).parents[1]


def config_dir() -> Path:
    """Return the directory of the shipped configurations: `dalle_jax/configs`, or `configs` of a source tree."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def list_configs() -> dict[str, str]:
    """Return the first line of the docstring of each shipped configuration, by name."""
    summaries = {}
    for path in sorted(config_dir().glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path.stem != "__init__":
            summaries[path.stem] = docstring.partition("\n")[0]
    return summaries


def find_config(name: str | Path) -> Path:
    """Return the path of a configuration file.

    Args:
        name: path of a file, or the name of a shipped configuration with or without `.py`. A file at that path takes
            precedence over a shipped configuration with `.py`.

    Raises:
        FileNotFoundError: there is neither; the message has the nearest name.
    """
    path = Path(name)
    shipped = config_dir() / f"{path.stem}.py"
    by_name = path.name == str(name) and path.suffix in ("", ".py") and shipped.is_file()
    if path.is_file() and (path.suffix or not by_name):
        return path
    if by_name:
        return shipped
    near = difflib.get_close_matches(path.stem, list_configs(), n=1)
    hint = f"Use {near[0]}" if near else "Use a name of `dalle-jax configs`"
    raise FileNotFoundError(f"Expected a configuration file or name, got {name}. {hint}.")


def load_config(name: str | Path) -> TrainConfig:
    """Return the `config` that a configuration file defines.

    Args:
        name: as for `find_config`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file fails, with the line, or defines no TrainConfig.
    """
    path = find_config(name)
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        inside = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = f":{inside[-1].lineno}" if inside else ""
        raise ValueError(f"{path}{line}: {type(error).__name__}: {error}") from error
    config = names.get("config")
    if not isinstance(config, TrainConfig):
        got = "none" if config is None else f"type {type(config).__name__}"
        raise ValueError(
            f"Expected {path} to define a `config` of type TrainConfig, got {got}. "
            "End the file in `config = TrainConfig(...)`."
        )
    return config
