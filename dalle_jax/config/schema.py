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


def require_at_least(config: Any, minimum: float, *names: str, hint: str = "") -> None:
    """Raise ValueError for a field of `config` below `minimum`, other than None; the message ends with `hint`."""
    for name in names:
        value = getattr(config, name)
        holds = value is None or value >= minimum
        require(holds, _message(f"{_path(config, name)} of at least {minimum}", value, hint))


def require_above_zero(config: Any, *names: str) -> None:
    """Raise ValueError for a field of `config` that is not above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, _message(f"{_path(config, name)} above 0", value))


def require_fraction(config: Any, *names: str, below_one: bool = False) -> None:
    """Raise ValueError for a field of `config` outside [0, 1], or [0, 1) if `below_one`."""
    for name in names:
        value = getattr(config, name)
        interval = "[0, 1)" if below_one else "[0, 1]"
        holds = 0 <= value < 1 or (value == 1 and not below_one)
        require(holds, _message(f"{_path(config, name)} in {interval}", value))


def require_id(config: Any, vocab: int, *names: str) -> None:
    """Raise ValueError for a field of `config` outside [0, vocab), other than None."""
    for name in names:
        value = getattr(config, name)
        holds = value is None or 0 <= value < vocab
        require(holds, _message(f"{_path(config, name)} in [0, {vocab})", value))


def require_divisible(config: Any, name: str, divisor: str) -> None:
    """Raise ValueError if the field `name` of `config` is not divisible by its field `divisor`."""
    value, by = getattr(config, name), getattr(config, divisor)
    expected = f"{_path(config, name)} divisible by {divisor} {by}"
    require(value % by == 0, _message(expected, value, f"Change {name} or {divisor}."))


# Paths of the sections of TrainConfig; fields of other configurations have the name of their class before them.
_SECTIONS = {
    "TrainConfig": "",
    "DataConfig": "data.",
    "TextConfig": "text.",
    "OptimConfig": "optim.",
    "MeshConfig": "mesh.",
    "DistributedConfig": "distributed.",
    "ProfileConfig": "profile.",
}


def _path(config: Any, name: str) -> str:
    kind = type(config).__name__
    return _SECTIONS.get(kind, f"{kind}.") + name


def _message(expected: str, value: Any, hint: str = "") -> str:
    return f"Expected {expected}, got {value}. {hint}".rstrip()


@dataclass_transform(kw_only_default=True, frozen_default=True)
def frozen_config(cls: type[_T]) -> type[_T]:
    """Make a frozen, keyword-only dataclass whose constructor checks the type of every value.

    The check runs before the class's own `__post_init__`. Lists become tuples, NumPy numbers Python numbers, and
    integers floats in fields of floats, so that a configuration can be hashed and written as JSON.

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
    require(isinstance(value, classes), f"Expected {path} of type {expected}, got {got}.")
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
        good = isinstance(value, str) and value in options
        require(good, f"Expected {path} to be one of {choices}, got {value!r}.")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"Expected {path} to be a list, got {value!r}.")
        return tuple(coerce(options[0], v, f"{path}[{i}]", record) for i, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return record((kind,), value, path)
    if not isinstance(value, bool):
        if kind is float and isinstance(value, numbers.Real):
            return float(value)
        if kind is int and isinstance(value, numbers.Integral):
            return operator.index(value)
    good = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    require(good, f"Expected {path} of type {kind.__name__}, got {value!r}.")
    return value
