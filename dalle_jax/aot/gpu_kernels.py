"""Kernels of a compiled GPU program, read from its optimized HLO: how many there are, and their memory traffic.

Each fusion, library call, copy and collective is one kernel. Between two kernels all data goes through memory, so the
bytes of a kernel are what it reads and writes, without regard to caches: of an operand only the part that is used (a
slice of a table, a gathered row), of a result that is updated in place only the new part. Inside a fusion this follows
from the result backwards, as in XLA's cost analysis for GPUs, and an element counts once per kernel.
"""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

from dalle_jax.aot import hlo
from dalle_jax.aot.hlo import Computations, Instruction

# Instructions without a kernel of their own. Loops, conditionals and calls run the kernels of other computations.
_NO_KERNEL = frozenset(
    ["parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "partition-id",
     "replica-id", "opt-barrier", "async-update"]
)  # fmt: skip
_COPIES = frozenset(
    ["parameter", "constant", "bitcast", "reshape", "copy", "transpose", "convert", "tuple", "get-tuple-element", "pad",
     "concatenate", "slice", "dynamic-slice"]
)  # fmt: skip
_SLICES = frozenset(["slice", "dynamic-slice", "gather"])
_READ_WHOLE = frozenset(["dot", "convolution", "sort", "custom-call", "fft", "triangular-solve", "cholesky"])
_DIMENSIONS = re.compile(r"\b[a-z]+\d*\w*\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')

KernelKind = Literal["fusion", "library_call", "copy", "collective", "other"]


class Kernel(NamedTuple):
    """One kernel of a program.

    Attributes:
      name: Name of the HLO instruction.
      opcode: Its opcode, without "-start".
      kind: A "copy" moves data and computes nothing.
      bytes_read: Bytes of one run.
      bytes_written: Bytes of one run.
      runs: Runs for each run of the computation that it belongs to.
      line: The HLO line.
    """

    name: str
    opcode: str
    kind: KernelKind
    bytes_read: float
    bytes_written: float
    runs: int
    line: str


class Loop(NamedTuple):
    """An outermost while loop.

    Attributes:
      scope: Named scopes of the JAX code that it comes from.
      trip_count: Iterations, or None if unknown.
      kernels: Kernels of one iteration.
    """

    scope: str
    trip_count: int | None
    kernels: list[Kernel]


def find_loops(text: str) -> list[Loop]:
    """Return the outermost while loops of the program whose optimized HLO is `text`, in program order."""
    entry, computations = hlo.parse_computations(text)

    def loops_in(name: str) -> list[Loop]:
        loops: list[Loop] = []
        for instruction in computations.get(name, ()):
            if instruction.opcode == "while":
                scope = _OP_NAME.search(instruction.line)
                body = list_kernels(computations, hlo.called_computation(instruction, "body"))
                loops.append(Loop(scope[1] if scope else "", hlo.trip_count(instruction, computations), body))
            elif instruction.opcode == "conditional":
                loops += [loop for branch in hlo.cond_branches(instruction) for loop in loops_in(branch)]
            elif instruction.opcode == "call" and instruction.called:
                loops += loops_in(instruction.called)
        return loops

    return loops_in(entry)


def list_kernels(computations: Computations, name: str) -> list[Kernel]:
    """Return the kernels that the computation `name` runs.

    The kernels of a loop count once per iteration, or once if the trip count is unknown. Of a conditional the branch
    with most memory traffic counts.
    """
    by_name = {instruction.name: instruction for instruction in computations[name]}
    kernels: list[Kernel] = []
    for instruction in computations[name]:
        if instruction.opcode in _NO_KERNEL or instruction.opcode.endswith("-done"):
            continue
        if instruction.opcode == "while":
            body = list_kernels(computations, hlo.called_computation(instruction, "body"))
            trips = hlo.trip_count(instruction, computations) or 1
            kernels += [kernel._replace(runs=kernel.runs * trips) for kernel in body]
        elif instruction.opcode == "conditional":
            by_branch = [list_kernels(computations, branch) for branch in hlo.cond_branches(instruction)]
            kernels += max(by_branch, key=kernel_bytes_accessed, default=[])
        elif instruction.opcode in ("call", "async-start"):
            kernels += list_kernels(computations, instruction.called) if instruction.called else []
        else:
            kernels.append(_make_kernel(computations, by_name, instruction))
    return kernels


def kernel_collective_bytes(kernels: list[Kernel], num_devices: int) -> float:
    """Return the bytes that one device receives in the collectives of `num_devices` devices."""
    total = 0.0
    for kernel in kernels:
        if kernel.kind == "collective":
            small, large = sorted((kernel.bytes_read, kernel.bytes_written))
            # The sizes of a gather or scatter give the number of devices that take part. An all-reduce is a scatter and
            # a gather.
            own_fraction = small / large if small < large else 1 / num_devices
            total += kernel.runs * large * (1 - own_fraction) * (2 if kernel.opcode == "all-reduce" else 1)
    return total


def kernel_bytes_accessed(kernels: list[Kernel]) -> float:
    """Return the bytes that kernels read and write, over all their runs."""
    return sum(kernel.runs * (kernel.bytes_read + kernel.bytes_written) for kernel in kernels)


def _make_kernel(
    computations: Computations, by_name: dict[str, Instruction], instruction: Instruction
) -> Kernel:
    opcode = instruction.opcode.removesuffix("-start")

    def kernel(kind: KernelKind, bytes_read: float, bytes_written: float) -> Kernel:
        return Kernel(instruction.name, opcode, kind, bytes_read, bytes_written, 1, instruction.line)

    if opcode == "fusion" and instruction.called:
        fused = computations[instruction.called]
        reads, written = _fusion_bytes(computations, fused)
        kind = "copy" if {part.opcode for part in fused} <= _COPIES else "fusion"
        return kernel(kind, sum(reads.values()), written)
    operand_bytes = [hlo.shape_bytes(by_name[name].shape) for name in instruction.operands if name in by_name]
    output_bytes = hlo.shape_bytes(instruction.shape)
    if opcode in hlo.COLLECTIVES:
        return kernel("collective", sum(operand_bytes), hlo.result_bytes(instruction))
    if opcode == "copy":
        return kernel("copy", operand_bytes[0], operand_bytes[0])
    if instruction.opcode in _SLICES:
        return kernel("copy", output_bytes + sum(operand_bytes[1:]), output_bytes)
    if instruction.opcode == "dynamic-update-slice":
        return kernel("copy", sum(operand_bytes[1:]), operand_bytes[1])
    if instruction.opcode == "scatter":
        return kernel("other", sum(operand_bytes[1:]), operand_bytes[-1])
    if instruction.opcode == "custom-call":  # the last result of a library call may be its workspace
        workspace = re.search(r"[su]8\[\d+\](?:\{0\})?\)$", instruction.shape)
        output_bytes -= hlo.shape_bytes(workspace[0]) if workspace else 0
        return kernel("library_call", sum(operand_bytes), output_bytes)
    return kernel("other", sum(operand_bytes), output_bytes)


def _num_elements(shape: str) -> int:
    """Return the elements of the first array of a type."""
    sizes = _DIMENSIONS.search(shape)
    return math.prod(int(n) for n in sizes[1].split(",") if n) if sizes else 0


def _fusion_bytes(computations: Computations, fused: list[Instruction]) -> tuple[dict[int, float], float]:
    """Return the bytes that a fused computation reads of each parameter, by number, and the bytes that it writes."""
    by_name = {instruction.name: instruction for instruction in fused}
    used = dict.fromkeys(by_name, 0.0)  # elements of each result that are used

    def use(name: str, count: float) -> None:
        if name in used:
            used[name] = min(used[name] + count, _num_elements(by_name[name].shape))

    def strip_views(name: str) -> Instruction:
        while by_name[name].opcode in ("bitcast", "reshape"):
            name = by_name[name].operands[0]
        return by_name[name]

    root = next(instruction for instruction in fused if instruction.is_root)
    written = 0.0
    for name in root.operands if root.opcode == "tuple" else [root.name]:
        result = strip_views(name)
        updates = result.opcode in ("dynamic-update-slice", "scatter")
        if updates and strip_views(result.operands[0]).opcode == "parameter":
            update = result.operands[1 if result.opcode == "dynamic-update-slice" else -1]
            written += hlo.shape_bytes(by_name[update].shape)
            for operand in result.operands[1:]:
                use(operand, math.inf)
        else:
            written += hlo.shape_bytes(result.shape)
            use(result.name, math.inf)
    reads: dict[int, float] = {}
    for instruction in reversed(fused):
        count, size = used[instruction.name], _num_elements(instruction.shape)
        if instruction.opcode == "parameter":
            width = hlo.shape_bytes(instruction.shape) / size if size else 0
            number = re.match(r"\((\d+)\)", instruction.arguments)
            assert number is not None, instruction.line
            reads[int(number[1])] = count * width
        elif count:
            for i, operand in enumerate(instruction.operands):
                if operand in by_name:
                    use(operand, _elements_used(computations, by_name, instruction, i, count))
    return reads, written


def _elements_used(
    computations: Computations,
    by_name: dict[str, Instruction],
    instruction: Instruction,
    number: int,
    count: float,
) -> float:
    """Return how many elements of operand `number` an instruction uses for `count` elements of its result."""
    operand = by_name[instruction.operands[number]]
    whole = _num_elements(operand.shape)
    if instruction.opcode in _SLICES:
        return count if number == 0 else whole
    if instruction.opcode == "dynamic-update-slice":
        update = _num_elements(by_name[instruction.operands[1]].shape)
        return max(0.0, count - update) if number == 0 else min(whole, count) if number == 1 else whole
    if instruction.opcode in _READ_WHOLE:
        return whole
    if instruction.opcode in ("reduce", "reduce-window", "concatenate"):
        return whole * count / _num_elements(instruction.shape)
    if instruction.opcode == "fusion" and instruction.called:
        reads, _ = _fusion_bytes(computations, computations[instruction.called])
        width = hlo.shape_bytes(operand.shape) / whole if whole else 1
        return reads.get(number, 0.0) / width
    return min(whole, count)  # elementwise, in any order
