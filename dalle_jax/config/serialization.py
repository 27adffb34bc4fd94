"""Configurations to JSON text and back; unknown fields raise an error with their path."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Union

from dalle_jax.config.schema import coerce, require


def to_json(config: Any) -> str:
    """Return a configuration as JSON text with every field; floats round-trip exactly."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n"


def from_json(cls: Any, text: str) -> Any:
    """Parse a configuration.

    Args:
      cls: A configuration class, or a union of classes, of which the field `kind` selects one.
      text: JSON.

    Returns:
      The configuration; missing fields have their defaults.

    Raises:
      ValueError: The text is not JSON, a class lacks a field, or a value is of another type. The message has the path
        of the field, and for an unknown field the nearest name.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected JSON, got text that does not parse: {error}.") from None
    union = typing.get_origin(cls) in (Union, types.UnionType)
    return coerce(cls, data, "config" if union else cls.__name__, _record)


def _record(classes: tuple[type, ...], data: Any, path: str) -> Any:
    """Build one of `classes`, selected by the field `kind`."""
    if len(classes) == 1:
        return _build(classes[0], data, path)
    require(data is not None, f"Expected {path} to be an object with a kind, got null.")
    kinds = {typing.get_args(typing.get_type_hints(c)["kind"])[0]: c for c in classes}
    kind = data.get("kind") if isinstance(data, dict) else None
    require(kind in kinds, f"Expected {path}.kind to be one of {', '.join(map(repr, kinds))}, got {kind!r}.")
    return _build(kinds[kind], data, path)


def _build(cls: type, data: Any, path: str) -> Any:
    name_of_class = cls.__name__
    require(
        isinstance(data, dict),
        f"Expected {path} to be an object with the fields of {name_of_class}, got {data!r}.",
    )
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = repr(near[0]) if near else f"one of {', '.join(hints)}"
            raise ValueError(f"Expected {path} to have fields of {name_of_class}, got {name!r}. Use {hint}.")
    values = {name: coerce(hints[name], value, f"{path}.{name}", _record) for name, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"Expected {path} to have every required field, got: {error}.") from None
