"""Costs of a compiled program, read from its optimized HLO: collectives with their bytes, and the compiler's cycles.

XLA's own `cost_analysis` counts the body of a loop once. Here every computation counts as often as it runs: a while
loop by its trip count, a conditional by its most expensive branch. A collective that overlaps matrix products (on v5e)
appears in the fusion that starts it, in the fusions that it overlaps and in the one that ends it, each time with the
same channel id; it counts once.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "send",
)
_BYTES = {"pred": 1, "bf16": 2, "token": 0}
_ARRAY = re.compile(r"\b(pred|bf16|token|[sufc](\d+)\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BASE_NAME = re.compile(r"\s+(?:ROOT )?%?([\w-]+)")  # of an instruction, without its number
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|async_execution_thread_calls)=%?([\w.-]+)")


class Costs(NamedTuple):
    """Costs of one run of a program on one device.

    Attributes:
      cycles: Estimate of the compiler, without collectives.
      collectives: Kind -> (number of runs, bytes of the results).
      custom_kernels: Name -> runs of kernels for which the compiler has no estimate.
    """

    cycles: float
    collectives: dict[str, tuple[int, int]]
    custom_kernels: dict[str, int]


class Instruction(NamedTuple):
    """One HLO instruction.

    Attributes:
      opcode: For example "fusion".
      shape: Type of the result, with its layout.
      line: The whole line.
      name: Name without the "%".
      arguments: Text after the opcode: operands in parentheses, then attributes.
      is_root: Whether it is the result of its computation.
    """

    opcode: str
    shape: str
    line: str
    name: str
    arguments: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return _OPERAND.findall(self.arguments[: _type_end(self.arguments)])

    @property
    def called(self) -> str | None:
        """Name of the computation that a fusion or a call runs."""
        match = _CALLED.search(self.line)
        return match[1] if match else None


Computations = dict[str, list[Instruction]]


def shape_bytes(text: str) -> int:
    """Return the bytes of all arrays whose types stand in `text`, without padding."""
    total = 0.0
    for dtype, bits, sizes in _ARRAY.findall(text):
        width = int(bits) / 8 if bits else _BYTES[dtype]
        total += width * math.prod(int(n) for n in sizes.split(",") if n)
    return int(total)


def parse_computations(text: str) -> tuple[str, Computations]:
    """Parse optimized HLO.

    Returns:
      The name of the entry computation, and the instructions of each computation.
    """
    entry, name = "", ""
    computations: Computations = {}
    for line in text.splitlines():
        if line and not line[0].isspace():
            if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
                name = head[2]
                computations[name] = []
                entry = name if head[1] else entry
        elif name and (match := _INSTRUCTION.match(line)):
            rest = match[3]
            start = _type_end(rest)
            if opcode := re.match(r"\s*([a-z][\w-]*)\(", rest[start:]):
                shape, arguments = rest[:start], rest[start + opcode.end() - 1 :]
                computations[name].append(
                    Instruction(opcode[1], shape, line, match[2], arguments, bool(match[1]))
                )
    return entry, computations


def _type_end(text: str) -> int:
    """Return where the type at the start of `text` ends: a tuple in parentheses, or one word."""
    if not text.startswith("("):
        space = text.find(" ")
        return len(text) if space < 0 else space
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return len(text)


def trip_count(loop: Instruction, computations: Computations) -> int | None:
    """Return the iterations of a while loop.

    That is the trip count of the compiler, or the constant in the condition of a loop that counts from 0, or None if
    there is neither.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known[1])
    condition = computations[called_computation(loop, "condition")]
    constants = [re.search(r" constant\((\d+)\)", i.line) for i in condition if i.opcode == "constant"]
    return max((int(match[1]) for match in constants if match), default=None)


def called_computation(loop: Instruction, attribute: str) -> str:
    """Return the computation that a while loop has as its `body` or `condition`."""
    match = re.search(rf"{attribute}=%?([\w.-]+)", loop.line)
    if match is None:
        raise ValueError(f"Expected a while loop with a {attribute}, got {loop.line!r}.")
    return match[1]


def cond_branches(conditional: Instruction) -> list[str]:
    """Return the computations of which a conditional runs one."""
    match = re.search(r"branch_computations=\{([^}]*)\}", conditional.line)
    if match:
        return [name.strip().lstrip("%") for name in match[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", conditional.line)


def result_bytes(collective: Instruction) -> int:
    """Return the bytes of a collective's result; asynchronous forms list their operands before it."""
    opcode, shape = collective.opcode, collective.shape
    if opcode.endswith("-start") and opcode != "all-reduce-start" and shape.startswith("("):
        return shape_bytes(_tuple_elements(shape)[1])
    return shape_bytes(shape)


def _tuple_elements(shape: str) -> list[str]:
    elements, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += letter
    return elements


def program_costs(text: str) -> Costs:
    """Return the costs of the program whose optimized HLO is `text` (`compiled.as_text()`)."""
    entry, computations = parse_computations(text)
    cache: dict[str, Costs] = {}

    def costs_of(name: str) -> Costs:
        if name not in cache:
            cache[name] = _computation_costs(computations, name, costs_of)
        return cache[name]

    return costs_of(entry)


def _computation_costs(computations: Computations, name: str, costs_of) -> Costs:
    total = _CostSum()
    started: set[str] = set()  # channels of collectives that a fusion of this computation has started
    for instruction in computations.get(name, ()):
        opcode, line = instruction.opcode, instruction.line
        cycles = _CYCLES.search(line)
        total.cycles += int(cycles[1]) if cycles else 0
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            total.add(Costs(0, {kind: (1, result_bytes(instruction))}, {}))
        elif opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in line:
            base_name = _BASE_NAME.match(line)
            total.add(Costs(0, {}, {base_name[1] if base_name else instruction.name: 1}))
        if opcode == "while":
            body = costs_of(called_computation(instruction, "body"))
            total.add(body, trip_count(instruction, computations) or 1)
        elif opcode == "conditional":
            total.add(
                max((costs_of(branch) for branch in cond_branches(instruction)), key=lambda c: c.cycles)
            )
        elif opcode in ("call", "fusion", "async-start") and (called := instruction.called):
            inner = costs_of(called)
            if opcode == "fusion":
                # A fusion carries its own cycles; its collectives are instructions of its computation.
                collectives = (
                    _new_collectives(computations.get(called, ()), started) if inner.collectives else {}
                )
                inner = inner._replace(cycles=0 if cycles else inner.cycles, collectives=collectives)
            total.add(inner)
    return Costs(total.cycles, total.collectives, total.custom_kernels)


def _new_collectives(fused, started: set[str]) -> dict[str, tuple[int, int]]:
    """Return the collectives of a fusion whose channel is not in `started`, and add their channels to it."""
    new: dict[str, tuple[int, int]] = {}
    for instruction in fused:
        channel = _CHANNEL.search(instruction.line)
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES or (channel and channel[1] in started):
            continue
        runs, size = new.get(kind, (0, 0))
        new[kind] = (runs + 1, size + result_bytes(instruction))
        if channel:
            started.add(channel[1])
    return new


class _CostSum:
    """Running sum of costs."""

    def __init__(self):
        self.cycles = 0.0
        self.collectives: dict[str, tuple[int, int]] = {}
        self.custom_kernels: dict[str, int] = {}

    def add(self, costs: Costs, times: int = 1) -> None:
        self.cycles += times * costs.cycles
        for name, runs in costs.custom_kernels.items():
            self.custom_kernels[name] = self.custom_kernels.get(name, 0) + times * runs
        for kind, (runs, size) in costs.collectives.items():
            old_runs, old_size = self.collectives.get(kind, (0, 0))
            self.collectives[kind] = (old_runs + times * runs, old_size + times * size)
