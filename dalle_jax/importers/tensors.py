"""Tensors of foreign files that are read on demand, and the rules that make a model's parameters of them.

    tensors = read_tensor_files(path)           # {"encoder.conv_in.weight": Tensor((128, 3, 3, 3), ...), ...}
    rules = {"encoder/conv_in/kernel": tensor_rule("encoder.conv_in.weight", transpose_conv), ...}

A rule makes one parameter of one tensor, or of one tensor per layer (`block_tensor_rules`). Parameters are read chunk
by chunk, so a file larger than memory can be converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from dalle_jax.models.registry import model_shapes
from dalle_jax.parallel.sharding import path_name
from dalle_jax.typing import Params

_MAX_NAME = 500  # characters of a tensor's name
_CHUNK = 1 << 24  # numbers in memory at once


class Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
      shape, dtype: As the table of the file states, checked against the size of the file.
      read: Returns the array, memory-mapped where the layout of the file allows.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]
Transform = Callable[..., np.ndarray]
LayerTable = dict[
    str, tuple[str, Transform]
]  # parameter below a block -> (tensor with {} for the layer, transform)


class ParamPart(NamedTuple):
    """One slice of a parameter: `transform` of the tensors `names`."""

    names: tuple[str, ...]
    transform: Transform


class ParamRule(NamedTuple):
    """How one parameter is made. stacked: part i is index i of its first axis; else there is one part."""

    parts: tuple[ParamPart, ...]
    stacked: bool


@dataclass(frozen=True)
class LazyParam:
    """A float32 parameter that is not read yet; a leaf of a parameter tree.

    Attributes:
      shape: Its shape.
      chunks: Yields its rows, some at a time, checked for their shape and for finite values.
    """

    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return np.dtype(np.float32)

    def read(self) -> np.ndarray:
        """Return the whole parameter. Raises ValueError, naming the tensor that is invalid."""
        array, start = np.empty(self.shape, self.dtype), 0
        flat = array.reshape(-1)
        for chunk in self.chunks():
            flat[start : start + chunk.size] = chunk.reshape(-1)
            start += chunk.size
        return array


class LazyModel(NamedTuple):
    """A model in foreign files.

    Attributes:
      config: Its configuration.
      rules: One for each parameter, by its path `a/b/c`.
      tensors: The tensors that the rules name.
      path: The file or directory, for error messages.
    """

    config: Any
    rules: dict[str, ParamRule]
    tensors: Tensors
    path: Any


class ImportedModel(NamedTuple):
    """A model of a public checkpoint.

    Attributes:
      config: Its configuration.
      params: Nested dicts of `LazyParam`s, or of float32 arrays (`read`).
      text_tokenizer: The content of its text tokenizer file, or None.
      image_tokenizer: The image tokenizer that its files hold, or None.
    """

    config: Any
    params: Params
    text_tokenizer: str | None = None
    image_tokenizer: ImportedModel | None = None

    def read(self) -> ImportedModel:
        """Return the same model with all parameters in memory. Raises ValueError for an invalid tensor."""
        tokenizer = self.image_tokenizer
        return self._replace(
            params=jax.tree.map(LazyParam.read, self.params),
            image_tokenizer=None if tokenizer is None else tokenizer.read(),
        )


def to_imported_model(
    model: LazyModel, text_tokenizer: str | None = None, image_tokenizer: LazyModel | None = None
) -> ImportedModel:
    """Return `model` with a tree of `LazyParam`s in place of its rules and tensors."""
    tokenizer = None if image_tokenizer is None else to_imported_model(image_tokenizer)
    return ImportedModel(model.config, _lazy_params(model), text_tokenizer, tokenizer)


def _lazy_params(model: LazyModel) -> Params:
    pairs = jax.tree_util.tree_flatten_with_path(model_shapes(model.config))[0]
    shapes = {path_name(path): leaf.shape for path, leaf in pairs}
    missing, unknown = sorted(shapes.keys() - model.rules), sorted(model.rules.keys() - shapes)
    if missing or unknown:  # no file can cause it: the rules of the family are wrong
        raise AssertionError(f"no rule for {missing[:3]}, no parameter {unknown[:3]}")

    def lazy(name: str, shape: tuple[int, ...]) -> LazyParam:
        rule = model.rules[name]
        return LazyParam(shape, lambda: _iter_param_chunks(name, rule, model.tensors, shape, model.path))

    return unflatten_dict({name: lazy(name, shape) for name, shape in shapes.items()}, sep="/")


# --- rules ----------------------------------------------------------------------------------------------


def tensor_rule(names: str | Iterable[str], transform: Transform) -> ParamRule:
    """Return the rule of a parameter that is `transform` of one tensor, or of several."""
    names = (names,) if isinstance(names, str) else tuple(names)
    return ParamRule((ParamPart(names, transform),), False)


def _stack_layers(names: Iterable[str | Iterable[str]], transform: Transform) -> ParamRule:
    """Return the rule of a parameter with a leading axis: `transform` of the tensor or tensors of each index."""
    rows = [(row,) if isinstance(row, str) else tuple(row) for row in names]
    return ParamRule(tuple(ParamPart(row, transform) for row in rows), True)


def block_tensor_rules(layers: int, table: LayerTable, to: str = "blocks") -> dict[str, ParamRule]:
    """Return the rules of Transformer blocks, which this library keeps in one array for all layers.

    Args:
      layers: The number of blocks.
      table: Parameter below `to` -> (tensor with {} for the number of the layer, transform).
      to: The path of the blocks.
    """
    return {
        f"{to}/{name}": _stack_layers([source.format(i) for i in range(layers)], transform)
        for name, (source, transform) in table.items()
    }


def dense_tensor_rules(name: str, source: str, *, bias: bool = True) -> LayerTable:
    """Return the rows of a `LayerTable` for a torch Linear layer."""
    rows: LayerTable = {f"{name}/kernel": (f"{source}.weight", transpose_linear)}
    return rows | ({f"{name}/bias": (f"{source}.bias", identity)} if bias else {})


def norm_tensor_rules(name: str, source: str) -> LayerTable:
    """Return the rows of a `LayerTable` for a torch LayerNorm."""
    return {f"{name}/scale": (f"{source}.weight", identity), f"{name}/bias": (f"{source}.bias", identity)}


def fused_qkv_tensor_rules(source: str, *, bias: bool = True, join: str = ".") -> LayerTable:
    """Return the rows of a `LayerTable` for queries, keys and values in one Linear layer, a third of its outputs each.

    Args:
      source: The layer.
      bias: Whether it has a bias.
      join: What separates its name from `weight` and `bias`; torch.nn.MultiheadAttention has an underscore.
    """
    rows: LayerTable = {}
    for i, name in enumerate("qkv"):
        rows[f"attn/{name}/kernel"] = (f"{source}{join}weight", lambda x, i=i: transpose_linear(_third(x, i)))
        if bias:
            rows[f"attn/{name}/bias"] = (f"{source}{join}bias", lambda x, i=i: _third(x, i))
    return rows


def _third(x: np.ndarray, i: int) -> np.ndarray:
    size = len(x) // 3
    return x[i * size : (i + 1) * size]


# --- transforms -----------------------------------------------------------------------------------------


def identity(x: np.ndarray) -> np.ndarray:
    """Return `x`."""
    return x


def transpose_linear(x: np.ndarray) -> np.ndarray:
    """Transpose torch's Linear (out, in) to (in, out)."""
    return np.transpose(x)


def transpose_conv(x: np.ndarray) -> np.ndarray:
    """Transpose torch's convolution (out, in, height, width) to (height, width, in, out)."""
    return np.transpose(x, (2, 3, 1, 0))


def conv_as_linear(x: np.ndarray) -> np.ndarray:
    """Reshape torch's 1x1 convolution (out, in, 1, 1) to (in, out)."""
    return np.transpose(x[:, :, 0, 0])


# --- names and shapes -----------------------------------------------------------------------------------


def drop_buffers(tensors: Tensors, buffers: tuple[str, ...]) -> Tensors:
    """Drop the tensors whose names end in one of `buffers`, and the `module.` that parallel training puts before
    names."""
    return {n.removeprefix("module."): tensor for n, tensor in tensors.items() if not n.endswith(buffers)}


def check_tensor_name(name: str, path: Any) -> None:
    """Check that a name is short and printable, so that messages can show it as it is.

    Raises:
      ValueError: It is not.
    """
    if len(name) > _MAX_NAME or not name.isprintable():
        raise ValueError(
            f"{path}: Expected a tensor's name of at most {_MAX_NAME} printable characters, got {name[:80]!a} "
            f"({len(name)} characters). Rename it in the file."
        )


def check_tensors_used(rules: Mapping[str, ParamRule], tensors: Tensors, path: Any, model: str) -> None:
    """Check that `rules` use every tensor, and no other.

    Raises:
      ValueError: It lists the tensors that are missing, or that no rule uses.
    """
    used = {name: None for rule in rules.values() for part in rule.parts for name in part.names}
    missing = [name for name in used if name not in tensors]
    unknown = [name for name in tensors if name not in used]
    for names, problem in (
        (missing, "without tensors"),
        (unknown, "with other tensors"),
    ):
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > 5 else ""
            raise ValueError(
                f"Expected the tensors of {model}, got {path} {problem} {', '.join(names[:5])}{more}."
            )


def tensor_shape(tensors: Tensors, name: str, path: Any, ndim: int, model: str) -> tuple[int, ...]:
    """Return the shape of a tensor that the configuration is derived from.

    Raises:
      ValueError: The tensor is missing, or does not have `ndim` axes, none of them empty.
    """
    if name not in tensors:
        raise ValueError(f"Expected {model} with a tensor {name}, got {path} without it.")
    shape = tensors[name].shape
    if len(shape) != ndim or 0 in shape:
        raise ValueError(
            f"{path}: Expected tensor {name} of {ndim} axes, none of them empty, got shape {shape}."
        )
    return shape


def count_layers(tensors: Tensors, pattern: str, first: int = 0) -> int:
    """Return how many tensors pattern.format(first), pattern.format(first + 1), ... exist without a gap."""
    count = 0
    while pattern.format(first + count) in tensors:
        count += 1
    return count


# --- reading --------------------------------------------------------------------------------------------


def _iter_param_chunks(
    name: str, rule: ParamRule, tensors: Tensors, shape: tuple[int, ...], path: Any
) -> Iterator[np.ndarray]:
    """Yield parameter `name`, float32 (rows, ...), some rows at a time.

    Raises:
      ValueError: It names the tensor that does not give `shape`, is not of floating-point numbers, or has a value
        that is not finite.
    """
    if rule.stacked and len(rule.parts) != shape[0]:
        first = rule.parts[0].names[0]
        raise ValueError(
            f"{path}: Expected {shape[0]} tensors like {first} for {name}, got {len(rule.parts)}."
        )
    part_shape = shape[1:] if rule.stacked else shape
    for part in rule.parts:
        arrays = []
        for source in part.names:
            array = tensors[source].read()
            if array.dtype.kind not in "fV" and array.dtype.name != "bfloat16":
                raise ValueError(
                    f"{path}: Expected tensor {source} of floating-point numbers, got {array.dtype}."
                )
            arrays.append(array)
        sources = ", ".join(f"{n} {tensors[n].shape}" for n in part.names)
        try:
            param = part.transform(*arrays)
        except (ValueError, IndexError):
            raise ValueError(f"{path}: Expected a tensor for {name} {part_shape}, got {sources}.") from None
        if param.shape != part_shape:
            raise ValueError(
                f"{path}: Expected a tensor for {name} {part_shape}, got {sources}, converted to {param.shape}."
            )
        for chunk in _chunks(param):
            if not np.isfinite(chunk).all():
                bad = [n for n, a in zip(part.names, arrays, strict=True) if not _is_finite(a)]
                raise ValueError(
                    f"{path}: Expected finite values in tensor {bad[0] if bad else sources}, got others."
                )
            yield chunk


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """`array` in float32, some rows at a time: a table of a gigabyte is never whole in memory."""
    if array.ndim == 0:
        array = array[None]
    rows = max(1, _CHUNK * len(array) // max(array.size, 1))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows], np.float32)


def _is_finite(array: np.ndarray) -> bool:
    return all(np.isfinite(chunk).all() for chunk in _chunks(array))
