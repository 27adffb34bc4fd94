"""What a compiled program does, read from its text: collectives by kind and bytes, and the compiler's cycles.

XLA's own `cost_analysis` counts the body of a loop once. Here every computation counts as often as it runs: a
loop by the constant that its condition compares with, a branch by the dearest of its arms. A collective that runs
beside products (on v5e) stands in the fusion that begins it, in those that it runs beside, and in the one that ends
it, each time with the same channel; it counts once.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
_BYTES = {"pred": 1, "bf16": 2, "token": 0}
_SHAPE = re.compile(r"\b(pred|bf16|token|[sufc]\d+\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r"\s+(?:ROOT )?%?([\w-]+)")  # of an instruction, without its number
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|async_execution_thread_calls)=%?([\w.-]+)")


class Costs(NamedTuple):
    """Of one run of a program on one device. cycles: the compiler's estimate, collectives not in it.

    collectives: kind -> (runs, bytes of the results); kernels: name -> runs of kernels that have no estimate.
    """

    cycles: float
    collectives: dict[str, tuple[int, int]]
    kernels: dict[str, int]


def shape_bytes(text: str) -> int:
    """Bytes of all arrays whose types stand in `text`, without padding."""
    total = 0
    for kind, sizes in _SHAPE.findall(text):
        width = _BYTES.get(kind)
        if width is None:
            width = int(re.search(r"\d+", kind)[0]) / 8
        total += width * math.prod(int(n) for n in sizes.split(",") if n)
    return int(total)


class Instruction(NamedTuple):
    """One line of a computation. kind: its type; rest: what follows the opcode, operands first; line: all of it."""

    op: str
    kind: str
    line: str
    name: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return _OPERAND.findall(self.rest[: _after_type(self.rest)])

    @property
    def called(self) -> str | None:
        """The computation that a fusion or a call runs."""
        found = _CALLED.search(self.line)
        return found[1] if found else None


Computations = dict[str, list[Instruction]]


def computations(text: str) -> tuple[str, Computations]:
    """Name of the entry, and the instructions of each computation."""
    entry, name, found = "", "", {}
    for line in text.splitlines():
        if line and not line[0].isspace():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
                name = head[2]
                found[name] = []
                entry = name if head[1] else entry
        elif name and (one := _INSTRUCTION.match(line)):
            rest = one[3]
            start = _after_type(rest)
            if op := re.match(r"\s*([a-z][\w-]*)\(", rest[start:]):
                rest, kind = rest[start + op.end() - 1 :], rest[:start]
                found[name].append(Instruction(op[1], kind, line, one[2], rest, bool(one[1])))
    return entry, found


def _after_type(text: str) -> int:
    """Where the type at the start of an instruction ends: a tuple in its brackets, or one word."""
    if not text.startswith("("):
        space = text.find(" ")
        return len(text) if space < 0 else space
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return len(text)


def trip_count(loop: Instruction, found: Computations) -> int | None:
    """Runs of a loop: what the compiler says, else, as it counts from 0, the constant in its condition; None where
    there is none."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    condition = found[called_computation(loop, "condition")]
    numbers = [re.search(r" constant\((\d+)\)", one.line) for one in condition if one.op == "constant"]
    return max((int(n[1]) for n in numbers if n), default=None)


def called_computation(one: Instruction, name: str) -> str:
    """The computation that a loop has as its `body` or `condition`."""
    return re.search(rf"{name}=%?([\w.-]+)", one.line)[1]


def branches(one: Instruction) -> list[str]:
    """The computations of which a conditional runs one."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.line)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", one.line)


def costs(text: str) -> Costs:
    """Costs of the program whose optimized HLO is `text` (`compiled.as_text()`)."""
    entry, found = computations(text)
    done: dict[str, Costs] = {}

    def of(name: str) -> Costs:
        if name in done:
            return done[name]
        cycles, kernels, sums, under_way = 0.0, {}, {}, set()

        def begun(called: str) -> dict[str, tuple[int, int]]:
            """The collectives of a fusion but for those that another fusion here has begun."""
            new: dict[str, tuple[int, int]] = {}
            for op, kind, line, *_ in found.get(called, ()):
                channel, base = _CHANNEL.search(line), op.removesuffix("-start")
                if base not in KINDS or (channel and channel[1] in under_way):
                    continue
                runs, size = new.get(base, (0, 0))
                new[base] = (runs + 1, size + result_bytes(op, kind))
                if channel:
                    under_way.add(channel[1])
            return new

        def add(other: Costs, times: int = 1, count_cycles: bool = True) -> None:
            nonlocal cycles
            cycles += times * other.cycles * count_cycles
            for kernel, runs in other.kernels.items():
                kernels[kernel] = kernels.get(kernel, 0) + times * runs
            for kind, (runs, size) in other.collectives.items():
                before = sums.get(kind, (0, 0))
                sums[kind] = (before[0] + times * runs, before[1] + times * size)

        for one in found.get(name, ()):
            op, kind, line, *_ = one
            own = _CYCLES.search(line)
            cycles += int(own[1]) if own else 0
            base = op.removesuffix("-start")
            if base in KINDS:
                add(Costs(0, {base: (1, result_bytes(op, kind))}, {}))
            elif op == "custom-call" and 'custom_call_target="tpu_custom_call"' in line:
                add(Costs(0, {}, {_NAME.match(line)[1]: 1}))
            if op == "while":
                add(of(called_computation(one, "body")), trip_count(one, found) or 1)
            elif op == "conditional":
                add(max((of(arm) for arm in branches(one)), key=lambda c: c.cycles))
            elif op in ("call", "fusion", "async-start") and (called := one.called):
                # What a fusion takes stands on itself; a collective fused with products stands inside.
                inside = of(called)
                if op == "fusion" and inside.collectives:
                    inside = inside._replace(collectives=begun(called))
                add(inside, count_cycles=op != "fusion" or not own)
        done[name] = Costs(cycles, sums, kernels)
        return done[name]

    return of(entry)


def result_bytes(op: str, kind: str) -> int:
    """Bytes of a collective's result; the asynchronous forms list their operands before it."""
    if op.endswith("-start") and op != "all-reduce-start" and kind.startswith("("):
        return shape_bytes(_parts(kind)[1])
    return shape_bytes(kind)


def _parts(kind: str) -> list[str]:
    """The types of a tuple's elements, tuples among them."""
    parts, depth = [""], 0
    for letter in kind[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
