"""Pickles read as data: nothing is imported, nothing is called.

A pickle is a program for a small stack machine. Python's own machine imports the names that it meets and calls
them; this one keeps a name as a `Name` and a call as an `Object`, a record of what was asked for. The reader of a
format then turns the few records that it knows into arrays. A pickle that asks to call anything outside the modules
that hold tensors and settings is refused with the name of what it would have run elsewhere.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

# Modules whose functions a checkpoint of a model calls to be built again, and the harmless builtins. They are not
# called here either; the list only tells which pickles would do something else to whoever loads them elsewhere.
_OF_MODELS = re.compile(
    r"torch(\.(_utils|_tensor|storage|jit\._pickle))?|numpy(\._?core\.(multiarray|numeric))?|collections|copy_?reg|_codecs|"
    r"argparse|pathlib|datetime|"
    r"(__torch__|torch\.nn|omegaconf|pytorch_lightning|lightning|dall_e)(\..*)?"  # and all modules below these
)
_BUILTINS = frozenset((
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "long", "object", "range",
    "set", "slice", "str", "tuple",
))  # fmt: skip


class Name(NamedTuple):
    """A class or function by name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Object:
    """What a call would have made. name: called; args: with what; state: what it was then given."""

    def __init__(self, name: Name, args: Any):
        self.name, self.args, self.state = name, args, None


Call = Callable[[Name, tuple], Any]

_MARK = object()
_PUSH = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
))  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def load_pickle(file: BinaryIO, where: str, call: Call, persistent: Callable[[Any], Any]) -> Any:
    """What the pickle at the file's position describes; the position is then after it.

    call: what stands for a call that was asked for, an `Object` if nothing better is known. persistent: what
    stands for an identifier of the file's own. Raises ValueError, beginning with `where`, for bytes that are not a
    whole pickle and for one that would call what is not in CALLED.
    """
    try:
        return _run(file, where, call, persistent)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        UnicodeError,
        OverflowError,
    ) as error:
        raise ValueError(f"{where} is not a whole pickle of a model: {error}") from None


class _Refused(Exception):
    """Told as it is."""


def _run(file, where, call, persistent):
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("an opcode wants a mark that is not there")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def called(name: Any, args: Any, strict: bool = True) -> Any:
        if not isinstance(name, Name):
            raise ValueError(f"it calls a {type(name).__name__}")
        if strict and not _of_models(name):
            keys = [item for item in stack if isinstance(item, str)]
            beside = f", at {keys[-1]!r}" if keys else ""
            raise _Refused(
                f"{where} is a pickle that would run {name}{beside}: that is no part of a model's weights. "
                "Nothing was run and nothing was written; do not load this file elsewhere"
            )
        return call(name, args if isinstance(args, tuple) else tuple(args))

    for opcode, arg, position in pickletools.genops(file):
        op = opcode.name
        if op in _PUSH:
            stack.append(arg)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in ("PROTO", "FRAME"):
            pass
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(arg)] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(arg)])
        elif op == "MARK":
            stack.append(_MARK)
        elif op == "EMPTY_DICT":
            stack.append({})
        elif op == "EMPTY_LIST":
            stack.append([])
        elif op == "EMPTY_TUPLE":
            stack.append(())
        elif op == "EMPTY_SET":
            stack.append([])  # as a list: what is in it need not be hashable here
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(op[-1])
            items = tuple(stack[-count:])
            if len(items) < count:
                raise ValueError("a tuple wants more than there is")
            stack[-count:] = [items]
        elif op == "TUPLE":
            stack.append(tuple(since_mark()))
        elif op in ("LIST", "FROZENSET"):
            stack.append(since_mark())
        elif op == "DICT":
            items = since_mark()
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif op == "APPEND":
            item = stack.pop()
            _append(stack[-1], [item])
        elif op in ("APPENDS", "ADDITEMS"):
            items = since_mark()
            _append(stack[-1], items)
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set(stack[-1], [(key, value)])
        elif op == "SETITEMS":
            items = since_mark()
            _set(stack[-1], list(zip(items[::2], items[1::2], strict=True)))
        elif op == "GLOBAL":
            module, _, name = arg.partition(" ")
            stack.append(Name(module, name))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not (isinstance(name, str) and isinstance(module, str)):
                raise ValueError("a name is not text")
            stack.append(Name(module, name))
        elif op == "REDUCE":
            args, name = stack.pop(), stack.pop()
            stack.append(called(name, args))
        elif op in (
            "NEWOBJ",
            "NEWOBJ_EX",
        ):  # an object of a class, without its __init__: settings of a training
            if op == "NEWOBJ_EX":
                stack.pop()  # its keyword arguments
            args, name = stack.pop(), stack.pop()
            stack.append(called(name, args, strict=False))
        elif op == "INST":
            module, _, name = arg.partition(" ")
            items = since_mark()
            stack.append(called(Name(module, name), tuple(items)))
        elif op == "OBJ":
            items = since_mark()
            stack.append(called(items[0], tuple(items[1:])))
        elif op == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Object):
                stack[-1].state = state
        elif op == "BINPERSID":
            stack.append(persistent(stack.pop()))
        elif op == "PERSID":
            stack.append(persistent(arg))
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            since_mark()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op == "STOP":
            if len(stack) != 1:
                raise ValueError(f"it ends with {len(stack)} objects instead of one")
            return stack[0]
        else:
            raise ValueError(f"opcode {op} at byte {position} is not one of a model's weights")
    raise ValueError("it does not end")


def _of_models(name: Name) -> bool:
    if name.module in ("builtins", "__builtin__"):
        return name.name in _BUILTINS
    return bool(_OF_MODELS.fullmatch(name.module))


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Object):
        raise ValueError(f"it appends to a {type(target).__name__}")


def _set(target: Any, pairs: list[tuple[Any, Any]]) -> None:
    if isinstance(target, dict):
        target.update(pairs)
    elif not isinstance(target, Object):
        raise ValueError(f"it sets items of a {type(target).__name__}")
