"""Configurations as JSON text and back; what a class does not have is refused by the path of its field."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Literal, Union

from dalle_jax.config.checks import require


def to_json(config: Any) -> str:
    """The configuration as JSON text, every field written out; floats round-trip exactly."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n"


def from_json(cls: Any, text: str) -> Any:
    """The configuration of class `cls` (or of one class of a union) that `text` describes.

    Raises ValueError for text that is not JSON, for a field that the class does not have (with the nearest
    name it does have), and for a value of another type; each names the path of the field.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    return _build(cls, data, cls.__name__ if isinstance(cls, type) else "config")


def _build(kind: Any, data: Any, path: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _build_union(typing.get_args(kind), data, path)
    if origin is Literal:
        options = typing.get_args(kind)
        require(data in options, f"{path}: got {data!r}, want one of {', '.join(map(repr, options))}")
        return data
    if origin is tuple:
        require(isinstance(data, (list, tuple)), f"{path}: got {data!r}, want a list")
        item = typing.get_args(kind)[0]
        return tuple(_build(item, value, f"{path}[{i}]") for i, value in enumerate(data))
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, data, path)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    good = isinstance(data, kind) and not (isinstance(data, bool) and kind is not bool)
    require(good, f"{path}: got {data!r}, want a {kind.__name__}")
    return data


def _build_union(options: tuple, data: Any, path: str) -> Any:
    if data is None:
        require(type(None) in options, f"{path}: got null, want a value")
        return None
    classes = [o for o in options if dataclasses.is_dataclass(o)]
    if not classes:
        return _build(next(o for o in options if o is not type(None)), data, path)
    if len(classes) == 1:  # a class or None: nothing to tell apart
        return _build_dataclass(classes[0], data, path)
    kinds = {typing.get_args(typing.get_type_hints(c)["kind"])[0]: c for c in classes}
    kind = data.get("kind") if isinstance(data, dict) else None
    require(kind in kinds, f"{path}.kind: got {kind!r}, want one of {', '.join(map(repr, kinds))}")
    return _build_dataclass(kinds[kind], data, path)


def _build_dataclass(cls: type, data: Any, path: str) -> Any:
    require(isinstance(data, dict), f"{path}: got {data!r}, want an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; perhaps you meant {near[0]!r}" if near else f"; it has {', '.join(hints)}"
            raise ValueError(f"{path}: {cls.__name__} has no field {name!r}{hint}")
    values = {name: _build(hints[name], value, f"{path}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing
        raise ValueError(f"{path}: {error}") from None
