"""The decorator of configurations, and checks of their values."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
import types
import typing
from typing import Any, Literal, TypeVar, Union, dataclass_transform

_T = TypeVar("_T")


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def frozen_config(cls: type[_T]) -> type[_T]:
    """Make a frozen, keyword-only dataclass whose constructor checks the type of every value.

    The check runs before the class's own `__post_init__`. Lists become tuples, NumPy numbers Python numbers, and integers
    floats in fields of floats, so that a configuration can be hashed and written as JSON.

    Args:
      cls: A class with annotated fields.

    Returns:
      The dataclass. Its constructor raises ValueError for a value of another type.
    """
    own = cls.__dict__.get("__post_init__")

    def __post_init__(self) -> None:
        for name, kind in _hints(type(self)).items():
            value = coerce(kind, getattr(self, name), f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)
        if own is not None:
            own(self)

    setattr(cls, "__post_init__", __post_init__)  # noqa: B010, not a declared attribute of every class
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _instance(classes: tuple[type, ...], value: Any, path: str) -> Any:
    expected = " or ".join(c.__name__ for c in classes)
    got = f"a {type(value).__name__}" if dataclasses.is_dataclass(value) else repr(value)
    require(isinstance(value, classes), f"{path}: got {got}, want a {expected}")
    return value


def coerce(kind: Any, value: Any, path: str, record=_instance) -> Any:
    """Convert `value` to the type `kind`.

    Args:
      kind: The annotation of a field.
      value: The value.
      path: Name of the field, for messages.
      record: Function of (classes, value, path) that converts to one of several configuration classes.

    Raises:
      ValueError: The value is of another type; the message has `path`.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        options = tuple(o for o in options if o is not type(None))
        if dataclasses.is_dataclass(options[0]):
            return record(options, value, path)
        return coerce(options[0], value, path, record)
    if origin is Literal:
        choices = ", ".join(map(repr, options))
        require(isinstance(value, str) and value in options, f"{path}: got {value!r}, want one of {choices}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{path}: got {value!r}, want a list")
        return tuple(coerce(options[0], v, f"{path}[{i}]", record) for i, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return record((kind,), value, path)
    if not isinstance(value, bool):
        if kind is float and isinstance(value, numbers.Real):
            return float(value)
        if kind is int and isinstance(value, numbers.Integral):
            return operator.index(value)
    good = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    require(good, f"{path}: got {value!r}, want a {kind.__name__}")
    return value
