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
        name: path of a file, or the name of a shipped configuration with or without `.py`. What exists at that path
            takes precedence over a shipped configuration.

    Raises:
        FileNotFoundError: there is neither; the message has the nearest name.
        ValueError: it is a directory with the name of a shipped configuration.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = config_dir() / f"{path.stem}.py"
    if path.name == str(name) and path.suffix in ("", ".py") and shipped.is_file():
        if path.is_dir() and not path.suffix:
            raise ValueError(
                f"Expected a configuration file, got {name}, a directory here and the name of a shipped configuration. "
                f"Use {name}.py for the configuration."
            )
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


def load_shipped_config(name: str) -> TrainConfig:
    """Return the shipped configuration of a name; files of the current directory have no effect.

    Raises:
        FileNotFoundError: there is none; the message has the nearest name.
    """
    return load_config(config_dir() / f"{name}.py")
