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


def _computations(text: str) -> tuple[str, dict[str, list[tuple[str, str, str]]]]:
    """Name of the entry, and of each computation its instructions: (opcode, type, whole line)."""
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
                found[name].append((op[1], rest[:start], line))
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


def _trips(condition: list[tuple[str, str, str]]) -> int:
    """Runs of a loop that counts from 0: the constant in its condition; 1 where there is none."""
    numbers = [re.search(r" constant\((\d+)\)", line) for op, _, line in condition if op == "constant"]
    return max((int(n[1]) for n in numbers if n), default=1)


def costs(text: str) -> Costs:
    """Costs of the program whose optimized HLO is `text` (`compiled.as_text()`)."""
    entry, computations = _computations(text)
    done: dict[str, Costs] = {}

    def of(name: str) -> Costs:
        if name in done:
            return done[name]
        cycles, kernels, sums, under_way = 0.0, {}, {}, set()

        def begun(called: str) -> dict[str, tuple[int, int]]:
            """The collectives of a fusion but for those that another fusion here has begun."""
            new: dict[str, tuple[int, int]] = {}
            for op, kind, line in computations.get(called, ()):
                channel, base = _CHANNEL.search(line), op.removesuffix("-start")
                if base not in KINDS or (channel and channel[1] in under_way):
                    continue
                runs, size = new.get(base, (0, 0))
                new[base] = (runs + 1, size + _result_bytes(op, kind, line))
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

        for op, kind, line in computations.get(name, ()):
            own = _CYCLES.search(line)
            cycles += int(own[1]) if own else 0
            base = op.removesuffix("-start")
            if base in KINDS:
                add(Costs(0, {base: (1, _result_bytes(op, kind, line))}, {}))
            elif op == "custom-call" and 'custom_call_target="tpu_custom_call"' in line:
                add(Costs(0, {}, {_NAME.match(line)[1]: 1}))
            if op == "while":
                condition = re.search(r"condition=%?([\w.-]+)", line)[1]
                add(of(re.search(r"body=%?([\w.-]+)", line)[1]), _trips(computations[condition]))
            elif op == "conditional":
                arms = re.search(r"branch_computations=\{([^}]*)\}", line)
                names = (
                    arms[1].split(",") if arms else re.findall(r"(?:true|false)_computation=([^,]+)", line)
                )
                add(max((of(n.strip().lstrip("%")) for n in names), key=lambda c: c.cycles))
            elif op in ("call", "fusion", "async-start") and (called := _CALLED.search(line)):
                # What a fusion takes stands on itself; a collective fused with products stands inside.
                inside = of(called[1])
                if op == "fusion" and inside.collectives:
                    inside = inside._replace(collectives=begun(called[1]))
                add(inside, count_cycles=op != "fusion" or not own)
        done[name] = Costs(cycles, sums, kernels)
        return done[name]

    return of(entry)


def _result_bytes(op: str, kind: str, line: str) -> int:
    """Bytes of a collective's result; the asynchronous forms list their operands beside it."""
    if op.endswith("-start") and op != "all-reduce-start":
        shapes = [m[0] for m in _SHAPE.finditer(kind)]
        return max((shape_bytes(s) for s in shapes), default=0)
    return shape_bytes(kind)
