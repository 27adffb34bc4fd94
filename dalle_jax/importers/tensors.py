"""Arrays of a file that are not read yet, and how a model's parameters are made of them.

    tensors = read_tensors(path)                          # {"encoder.conv_in.weight": Tensor((128, 3, 3, 3), ...)}
    rules = {"encoder/conv_in/kernel": one("encoder.conv_in.weight", conv), ...}

A rule makes one parameter of one tensor, or one slice after another along its first axis (`stack`: layers that the
model keeps in one array). So a file of any size passes through memory a slice at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """shape, dtype: what the file's table says, already checked against the size of the file. read: gives the
    array, mapped from the file where its layout allows."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]
_MAX_NAME = 500  # characters of a tensor's name
_PIECE = 1 << 24  # numbers in memory at once
Transform = Callable[..., np.ndarray]


class ParamPart(NamedTuple):
    """One slice of a parameter: `transform(*tensors named)`."""

    names: tuple[str, ...]
    transform: Transform


class ParamRule(NamedTuple):
    """How one parameter is made. stacked: each part is one index of its first axis; else there is one part."""

    parts: tuple[ParamPart, ...]
    stacked: bool


class LazyModel(NamedTuple):
    """A model found in foreign files. config: of the library's stage. rules: one for each parameter, by its path
    `a/b/c`. tensors: what the rules name."""

    config: Any
    rules: dict[str, ParamRule]
    tensors: Tensors


class ImportedRun(NamedTuple):
    """What an importer makes of its files: a model, and what else its run directory holds. files: texts or files
    to copy, by name. tokenizer: for the Transformer stages, a tokenizer to keep beside it."""

    model: LazyModel
    files: Mapping[str, Any] = {}
    tokenizer: LazyModel | None = None


def from_tensor(names: str | Iterable[str], transform: Transform) -> ParamRule:
    """A parameter that is `transform` of one tensor, or of several."""
    names = (names,) if isinstance(names, str) else tuple(names)
    return ParamRule((ParamPart(names, transform),), False)


def stack_layers(names: Iterable[str | Iterable[str]], transform: Transform) -> ParamRule:
    """A parameter with a leading axis: `transform` of the tensor or tensors of each index."""
    rows = [(row,) if isinstance(row, str) else tuple(row) for row in names]
    return ParamRule(tuple(ParamPart(row, transform) for row in rows), True)


def identity(x: np.ndarray) -> np.ndarray:
    return x


def transpose_linear(x: np.ndarray) -> np.ndarray:
    """Torch's Linear (out, in) to (in, out)."""
    return np.transpose(x)


def transpose_conv(x: np.ndarray) -> np.ndarray:
    """Torch's convolution (out, in, height, width) to (height, width, in, out)."""
    return np.transpose(x, (2, 3, 1, 0))


def conv_as_linear(x: np.ndarray) -> np.ndarray:
    """Torch's 1x1 convolution (out, in, 1, 1) to (in, out)."""
    return np.transpose(x[:, :, 0, 0])


def drop_buffers(tensors: Tensors, computed: tuple[str, ...]) -> Tensors:
    """Without those whose names end in one of `computed`, and without the `module.` that parallel training puts before
    names."""
    return {n.removeprefix("module."): tensor for n, tensor in tensors.items() if not n.endswith(computed)}


def check_tensor_name(name: str, path: Any) -> None:
    """Raises ValueError for a name that is long or would reach a terminal as more than text: so later messages may
    show names as they are."""
    if len(name) > _MAX_NAME or not name.isprintable():
        raise ValueError(
            f"{path}: Expected a tensor's name of at most {_MAX_NAME} printable characters, got {name[:80]!a} "
            f"({len(name)} characters). Rename it in the file."
        )


def check_names(rules: Mapping[str, ParamRule], tensors: Tensors, path: Any, about: str) -> None:
    """Raises ValueError naming what `rules` want and `tensors` lack, or what no rule takes."""
    wanted = {name: None for rule in rules.values() for part in rule.parts for name in part.names}
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    for names, what in ((missing, f"lacks, of {about}:"), (extra, f"has what is not of {about}:")):
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > 5 else ""
            raise ValueError(f"{path} {what} {', '.join(names[:5])}{more}")


def tensor_shape(tensors: Tensors, name: str, path: Any, ndim: int, about: str) -> tuple[int, ...]:
    """The shape of a tensor that the configuration is read from.

    Raises ValueError where it is missing or has another number of axes.
    """
    if name not in tensors:
        raise ValueError(f"{path} is not {about}: it has no tensor {name}")
    shape = tensors[name].shape
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{path}: tensor {name} has shape {shape}; want {ndim} axes, none of them empty")
    return shape


def count_layers(tensors: Tensors, pattern: str, first: int = 0) -> int:
    """How many of pattern.format(first), pattern.format(first + 1), ... are there, without a gap."""
    count = 0
    while pattern.format(first + count) in tensors:
        count += 1
    return count


def iter_param_chunks(
    name: str, rule: ParamRule, model: LazyModel, shape: tuple[int, ...], path: Any
) -> Iterable[np.ndarray]:
    """Parameter `name` some rows after others, float32, checked.

    Raises ValueError naming the tensor whose shape does not give `shape`, that is not of numbers, or that has a
    value that is not finite.
    """
    if rule.stacked and len(rule.parts) != shape[0]:
        first = rule.parts[0].names[0]
        raise ValueError(f"{path}: {len(rule.parts)} tensors like {first}; want {shape[0]} for {name}")
    want = shape[1:] if rule.stacked else shape
    for part in rule.parts:
        arrays = []
        for source in part.names:
            array = model.tensors[source].read()
            if array.dtype.kind not in "fV" and array.dtype.name != "bfloat16":
                raise ValueError(f"{path}: tensor {source} is {array.dtype}; want floating-point numbers")
            arrays.append(array)
        told = ", ".join(f"{n} {model.tensors[n].shape}" for n in part.names)
        try:
            made = part.transform(*arrays)
        except (ValueError, IndexError):
            raise ValueError(f"{path}: tensor {told} cannot become {name} {want}") from None
        if made.shape != want:
            raise ValueError(f"{path}: tensor {told} becomes {name} {made.shape}; want {want}")
        for piece in _pieces(made):
            if not np.isfinite(piece).all():
                bad = [n for n, a in zip(part.names, arrays, strict=True) if not _finite(a)]
                raise ValueError(f"{path}: tensor {bad[0] if bad else told} has values that are not finite")
            yield piece


def _pieces(array: np.ndarray) -> Iterable[np.ndarray]:
    """`array` in float32, some rows at a time: a table of a gigabyte is never whole in memory."""
    if array.ndim == 0:
        array = array[None]
    rows = max(1, _PIECE * len(array) // max(array.size, 1))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows], np.float32)


def _finite(array: np.ndarray) -> bool:
    return all(np.isfinite(piece).all() for piece in _pieces(array))
