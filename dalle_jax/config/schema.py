"""What every configuration is made and checked with."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
import types
import typing
from typing import Any, Literal, TypeVar, Union, dataclass_transform

T = TypeVar("T")


def require(holds: bool, message: str) -> None:
    """Raises ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def frozen_config(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass; values that are not of their field's type are refused when one is made.

    That comes before the class's own `__post_init__`, which may so rely on them. Lists become tuples, NumPy's numbers
    Python's, and integers floats where a float is wanted, so that it can be hashed and written as JSON."""
    own = cls.__dict__.get("__post_init__")

    def __post_init__(self) -> None:
        for name, kind in _hints(type(self)).items():
            value = coerce(kind, getattr(self, name), f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, value)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _instance(classes: tuple[type, ...], value: Any, path: str) -> Any:
    wanted = " or ".join(c.__name__ for c in classes)
    came = f"a {type(value).__name__}" if dataclasses.is_dataclass(value) else repr(value)
    require(isinstance(value, classes), f"{path}: got {came}, want a {wanted}")
    return value


def coerce(kind: Any, value: Any, path: str, record=_instance) -> Any:
    """`value` as a value of the type `kind`; `record(classes, value, path)` makes that of one of several classes.

    Raises ValueError, which names `path`, for a value that is none."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        options = tuple(o for o in options if o is not type(None))
        if dataclasses.is_dataclass(options[0]):
            return record(options, value, path)
        return coerce(options[0], value, path, record)
    if origin is Literal:
        wanted = ", ".join(map(repr, options))
        require(isinstance(value, str) and value in options, f"{path}: got {value!r}, want one of {wanted}")
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
