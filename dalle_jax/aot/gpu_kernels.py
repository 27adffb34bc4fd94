"""The kernels of a compiled GPU program, read from its text: how many there are, and what they read and write.

Each fusion, library call, copy and collective is a kernel. Between two kernels everything goes through memory, so bytes
are what each kernel takes and leaves, whatever a cache may spare it: of an operand the part that it looks at (a slice
of a table, a row that is gathered), of a result that is updated in place the part that is new. Inside a fusion that is
found from the result backwards, as XLA's own cost analysis for GPUs does it, and an element counts once a kernel.
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

from dalle_jax.aot import hlo
from dalle_jax.aot.hlo import Computations, Instruction

# Nothing runs for these; loops, branches and calls are what they run.
_NOTHING = frozenset(
    ["parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "partition-id",
     "replica-id", "opt-barrier", "async-update"]
)  # fmt: skip
_MOVES = frozenset(
    ["parameter", "constant", "bitcast", "reshape", "copy", "transpose", "convert", "tuple", "get-tuple-element", "pad",
     "concatenate", "slice", "dynamic-slice"]
)  # fmt: skip
_TAKES = frozenset(["slice", "dynamic-slice", "gather"])
_WHOLE = frozenset(["dot", "convolution", "sort", "custom-call", "fft", "triangular-solve", "cholesky"])
_DIMENSIONS = re.compile(r"\b[a-z]+\d*\w*\[([\d,]*)\]")
_SCOPE = re.compile(r'op_name="([^"]*)"')


class Kernel(NamedTuple):
    """read, written: bytes of one run. runs: of it, for each run of what it stands in. copy: a kernel that moves data
    and computes nothing."""

    name: str
    op: str
    sort: Literal["fusion", "call", "copy", "collective", "other"]
    read: float
    written: float
    runs: int
    line: str


class Loop(NamedTuple):
    """A loop that stands in no other. scope: where in the program it was written. trips: None where it is not known."""

    scope: str
    trips: int | None
    kernels: list[Kernel]


def find_loops(text: str) -> list[Loop]:
    """The outermost loops of the program whose optimized HLO is `text`, in the order of its computations."""
    entry, found = hlo.computations(text)

    def inside(name: str) -> list[Loop]:
        result = []
        for one in found.get(name, ()):
            if one.op == "while":
                scope = _SCOPE.search(one.line)
                body = kernels(found, hlo.called_computation(one, "body"))
                result.append(Loop(scope[1] if scope else "", hlo.trip_count(one, found), body))
            elif one.op == "conditional":
                result += [loop for arm in hlo.branches(one) for loop in inside(arm)]
            elif one.op == "call" and one.called:
                result += inside(one.called)
        return result

    return inside(entry)


def kernels(found: Computations, name: str) -> list[Kernel]:
    """What runs in the computation `name`: a loop inside of it as often as it turns, once where that is not known; of
    a branch the arm that moves most."""
    held, result = {one.name: one for one in found[name]}, []
    for one in found[name]:
        if one.op in _NOTHING or one.op.endswith("-done"):
            continue
        if one.op == "while":
            inner = kernels(found, hlo.called_computation(one, "body"))
            turns = hlo.trip_count(one, found) or 1
            result += [kernel._replace(runs=kernel.runs * turns) for kernel in inner]
        elif one.op == "conditional":
            each = [kernels(found, arm) for arm in hlo.branches(one)]
            result += max(each, key=bytes_accessed, default=[])
        elif one.op in ("call", "async-start"):
            result += kernels(found, one.called) if one.called else []
        else:
            result.append(_kernel(found, held, one))
    return result


def collective_bytes(several: list[Kernel], devices: int) -> float:
    """Bytes that a device receives in collectives over `devices`, all runs together."""
    total = 0.0
    for kernel in several:
        if kernel.sort == "collective":
            small, large = sorted((kernel.read, kernel.written))
            # What gathers or scatters over n devices tells n by its sizes; a sum goes around twice.
            own = small / large if small < large else 1 / devices
            total += kernel.runs * large * (1 - own) * (2 if kernel.op == "all-reduce" else 1)
    return total


def bytes_accessed(several: list[Kernel]) -> float:
    """Bytes that kernels read and write, all runs together."""
    return sum(kernel.runs * (kernel.read + kernel.written) for kernel in several)


def _kernel(found: Computations, held: dict[str, Instruction], one: Instruction) -> Kernel:
    def kernel(sort: str, read: float, written: float) -> Kernel:
        return Kernel(one.name, base, sort, read, written, 1, one.line)

    base = one.op.removesuffix("-start")
    if base == "fusion":
        inside = found[one.called]
        reads, written = _touched(found, inside)
        sort = "copy" if {part.op for part in inside} <= _MOVES else "fusion"
        return kernel(sort, sum(reads.values()), written)
    wide = [hlo.shape_bytes(held[name].kind) for name in one.operands if name in held]
    out = hlo.shape_bytes(one.kind)
    if base in hlo.KINDS:
        return kernel("collective", sum(wide), hlo.result_bytes(one.op, one.kind))
    if base == "copy":
        return kernel("copy", wide[0], wide[0])
    if one.op in _TAKES:
        return kernel("copy", out + sum(wide[1:]), out)
    if one.op == "dynamic-update-slice":
        return kernel("copy", sum(wide[1:]), wide[1])
    if one.op == "scatter":
        return kernel("other", sum(wide[1:]), wide[-1])
    if one.op == "custom-call":  # the last result of a library call may be its room to work in
        room = re.search(r"[su]8\[\d+\](?:\{0\})?\)$", one.kind)
        return kernel("call", sum(wide), out - (hlo.shape_bytes(room[0]) if room else 0))
    return kernel("other", sum(wide), out)


def _size(kind: str) -> int:
    """Elements of the (first) array of a type."""
    sizes = _DIMENSIONS.search(kind)
    return math.prod(int(n) for n in sizes[1].split(",") if n) if sizes else 0


def _touched(found: Computations, inside: list[Instruction]) -> tuple[dict[int, float], float]:
    """Of a fused computation: bytes that it reads of each parameter, by number, and bytes that it writes."""
    held = {one.name: one for one in inside}
    need = dict.fromkeys(held, 0.0)  # elements of each that are looked at

    def ask(name: str, count: float) -> None:
        if name in need:
            need[name] = min(need[name] + count, _size(held[name].kind))

    def source(name: str) -> Instruction:
        """What `name` is, another view of it or not."""
        while held[name].op in ("bitcast", "reshape"):
            name = held[name].operands[0]
        return held[name]

    root = next(one for one in inside if one.root)
    written, in_place = 0.0, set()
    for name in root.operands if root.op == "tuple" else [root.name]:
        one = source(name)
        if one.op in ("dynamic-update-slice", "scatter") and source(one.operands[0]).op == "parameter":
            new = one.operands[1 if one.op == "dynamic-update-slice" else -1]
            written += hlo.shape_bytes(held[new].kind)
            in_place.add(one.name)
            for operand in one.operands[1:]:
                ask(operand, math.inf)
        else:
            written += hlo.shape_bytes(one.kind)
            ask(one.name, math.inf)
    reads = {}
    for one in reversed(inside):
        count, size = need[one.name], _size(one.kind)
        if one.op == "parameter":
            width = hlo.shape_bytes(one.kind) / size if size else 0
            reads[int(re.match(r"\((\d+)\)", one.rest)[1])] = count * width
        elif count:
            for number, operand in enumerate(one.operands):
                if operand in held:
                    ask(operand, _asked(found, held, one, number, operand, count, size))
    return reads, written


def _asked(found, held, one: Instruction, number: int, operand: str, count: float, size: int) -> float:
    """Elements of its operand that `one` looks at for `count` of its own `size`."""
    whole = _size(held[operand].kind)
    if one.op in _TAKES:
        return count if number == 0 else whole
    if one.op == "dynamic-update-slice":
        new = _size(held[one.operands[1]].kind)
        return max(0.0, count - new) if number == 0 else min(whole, count) if number == 1 else whole
    if one.op in _WHOLE:
        return whole
    if one.op in ("reduce", "reduce-window", "concatenate"):
        return whole * count / size
    if one.op == "fusion":
        reads, _ = _touched(found, found[one.called])
        width = hlo.shape_bytes(held[operand].kind) / whole if whole else 1
        return reads.get(number, 0.0) / width
    return min(whole, count)  # number by number, in whatever order
