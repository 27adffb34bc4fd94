"""Pickles read as data: nothing is imported, nothing is called, and time and memory are bounded.

A pickle is a program for a small stack machine. Python's machine imports and calls names and hashes every key, and its
C version cannot be bounded. This machine represents a name by a `Name` and a call by an `Object`, which the reader of a
format turns into arrays. It raises an error for an unlisted opcode, and for a call of a function outside the modules of
tensors and settings, which it names.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

MAX_BYTES = 1 << 26  # of one pickle: tables of tensors take under 1 KiB for each
_MAX_STEPS = 1 << 21  # opcodes and arguments of calls: a tensor takes about 40; each holds about 100 bytes
_MAX_NAME = 256  # characters of a module and a name

# Modules whose functions a checkpoint of a model calls to be rebuilt, and the harmless builtins. They are not called
# here either; the list only separates out the pickles that would do something else when they are loaded elsewhere.
_OF_MODELS = re.compile(
    r"torch(\.(_utils|_tensor|storage|jit\._pickle))?|numpy(\._?core\.(multiarray|numeric))?|collections|copy_?reg|_codecs|"
    r"argparse|pathlib|datetime|"
    r"(__torch__|torch\.nn|omegaconf|pytorch_lightning|lightning|dall_e)(\..*)?|"  # and all modules below these
    r"(builtins|__builtin__)\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|list|long|object|range|set|slice|"
    r"str|tuple)"
)
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK, "EMPTY_TUPLE": ()}
_PUSH = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
))  # fmt: skip


class Name(NamedTuple):
    """A class or function by name."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}")[1:-1]


class Object:
    """The record of a call. name: the callee; args: its arguments; state: the state assigned afterwards."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: Name, args: tuple):
        self.name, self.args, self.state = name, args, None


class _Refused(Exception):
    """A message that is complete as it is."""


def load_pickle(
    file: BinaryIO, where: str, call: Callable[[Name, tuple], Any], persistent: Callable[[Any], Any]
) -> Any:
    """Reads the object that a pickle describes.

    Dicts keep the items whose key is text; sets become lists.

    Args:
      file: in memory, at the start of the pickle; left at its end. The caller bounds it by `MAX_BYTES`.
      where: the start of error messages.
      call: gives the stand-in for a call, an `Object` if nothing better is known.
      persistent: gives the stand-in for an identifier of the file's own.

    Raises:
      ValueError: for bytes that are not a whole pickle, for one that would run a function that no model needs, and
        for one that is too long.
    """
    try:
        return _run(file, where, call, persistent)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where} is not a whole pickle of a model: {str(error)[:200]}") from None


def _run(
    file: BinaryIO, where: str, call: Callable[[Name, tuple], Any], persistent: Callable[[Any], Any]
) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    steps = 0

    def spend(count: int) -> None:
        nonlocal steps
        steps += count
        if steps > _MAX_STEPS:
            raise _Refused(f"{where}: Expected a pickle of at most {_MAX_STEPS} opcodes, got more")

    def pop_mark() -> list[Any]:
        items = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def push_call(callee: Any, args: Any, runs: bool = True) -> None:
        if not isinstance(callee, Name) or not isinstance(args, tuple):
            raise ValueError(f"it calls a {type(callee).__name__} with a {type(args).__name__}")
        spend(
            len(args) + (len(args[0]) if args and isinstance(args[0], list) else 0)
        )  # `call` may read these
        if runs and not any(map(_OF_MODELS.fullmatch, (callee.module, str(callee)))):
            keys = [item for item in stack if isinstance(item, str)]
            beside = f", at {keys[-1][:80]!r}" if keys else ""
            raise _Refused(
                f"{where} is a pickle that would run {callee}{beside}: that is no part of a model's weights. "
                "Nothing was run and nothing was written; do not load this file elsewhere"
            )
        stack.append(call(callee, args))

    for opcode, argument, position in pickletools.genops(file):
        arg: Any = argument  # its type depends on the opcode
        spend(1)
        match opcode.name:
            case op if op in _PUSH:
                stack.append(arg)
            case op if op in _CONSTANTS:
                stack.append(_CONSTANTS[op])
            case "PROTO" | "FRAME":
                pass
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as op:
                stack.append(tuple([stack.pop() for _ in range(int(op[-1]))][::-1]))
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "LIST" | "FROZENSET":
                stack.append(pop_mark())
            case "DICT":
                stack.append(text_items({}, pop_mark()))
            case "APPEND":
                _extend(stack, [stack.pop()])
            case "APPENDS" | "ADDITEMS":
                _extend(stack, pop_mark())
            case "SETITEM":
                _extend(stack, [stack.pop(), stack.pop()][::-1], pairs=True)
            case "SETITEMS":
                _extend(stack, pop_mark(), pairs=True)
            case "GLOBAL":
                stack.append(_name(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*[stack.pop(), stack.pop()][::-1]))
            case "REDUCE":
                args = stack.pop()
                push_call(stack.pop(), args)
            case "NEWOBJ" | "NEWOBJ_EX" as op:  # without its __init__: settings of a training run
                if op == "NEWOBJ_EX":
                    stack.pop()  # keyword arguments
                args = stack.pop()
                push_call(stack.pop(), args, runs=False)
            case "INST":
                push_call(_name(*arg.split(" ", 1)), tuple(pop_mark()))
            case "OBJ":
                callee, *args = pop_mark()
                push_call(callee, tuple(args))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Object):
                    stack[-1].state = state
            case "BINPERSID":
                stack.append(persistent(stack.pop()))
            case "PERSID":
                stack.append(persistent(arg))
            case "POP":
                stack.pop()
            case "POP_MARK":
                pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "STOP":
                if len(stack) != 1:
                    raise ValueError(f"it ends with {len(stack)} objects instead of one")
                return stack[0]
            case op:
                raise ValueError(f"opcode {op} at byte {position} is not one of a model's weights")


def text_items(target: dict[str, Any], items: list[Any]) -> dict[str, Any]:
    """Add the pairs of key, value, key, value, ... whose key is text to `target`; no other key is hashed."""
    target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if type(k) is str)
    return target


def _extend(stack: list[Any], items: list[Any], pairs: bool = False) -> None:
    target = stack[-1]
    if pairs and isinstance(target, dict):
        text_items(target, items)
    elif not pairs and isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Object):
        raise ValueError(f"it adds items to a {type(target).__name__}")


def _name(module: Any, name: Any) -> Name:
    if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= _MAX_NAME):
        raise ValueError(f"a name is not text of at most {_MAX_NAME} characters")
    return Name(module, name)
