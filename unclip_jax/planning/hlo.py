"""Reads the text of a compiled program (HLO): its operations, and how often each of them runs.

The compiler's own summary counts the body of a loop once, however often it runs: a transformer of 24 blocks would seem
to cost as much as one block. Here each computation is weighted by the product of the trip counts of the loops that
contain it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

# Patterns of the text: the first line of a computation, an operation, a shape with its layout, and parts of attributes.
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
OPERATION = re.compile(r"  (ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)([^{}]*)\})?")
CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")  # with #, of a tuple's element
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
KERNEL = re.compile(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')
NO_ESTIMATE = 2**62  # cycles from here on mean that the compiler has no estimate


class Operation(NamedTuple):
    """One operation, which is one line of a computation."""

    name: str
    shape: str  # of the result, with its layout, such as "f32[8,128]{1,0:T(8,128)}"
    opcode: str
    arguments: str  # text between the parentheses
    attributes: str  # text after the parentheses
    root: bool  # its result is the computation's

    @property
    def operands(self) -> list[str]:
        """Names of the operations whose results it takes."""
        return NAME.findall(self.arguments)

    @property
    def source(self) -> str:
        """Path of the JAX function that it comes from, such as "jit(step)/mean"; "" where that is not known."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """Cycles that the TPU compiler estimates; 0 where it has no estimate, which it may write as 2**63 - 1."""
        found = CYCLES.search(self.attributes)
        cycles = int(found[1]) if found else 0
        return cycles if cycles < NO_ESTIMATE else 0

    @property
    def kernel_flops(self) -> int:
        """FLOPs that one of this library's own kernels declares; the compiler estimates no cycles of kernels."""
        found = KERNEL.search(self.attributes) if self.opcode == "custom-call" else None
        return int(found[1]) if found else 0


class Module(NamedTuple):
    """A compiled program, which HLO calls a module: computations that call each other."""

    computations: dict[str, list[Operation]]  # a computation stands before those that call it
    runs: dict[str, int]  # how often each runs by itself; 0: never, or only within a fusion or a reduction
    fused_runs: dict[str, int]  # how often each runs within a fusion or a reduction

    def launched(self) -> Iterator[tuple[Operation, int, dict[str, Operation]]]:
        """Yields each operation that runs by itself, how often, and all operations of its computation by name."""
        for name, operations in self.computations.items():
            if self.runs[name]:
                near = {operation.name: operation for operation in operations}
                yield from ((operation, self.runs[name], near) for operation in operations)


def parse(text: str) -> Module:
    """Parses the text of `jax.stages.Compiled.as_text`, or a compiler's dump of an optimised module."""
    computations: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("  ") and current is not None:
            found = OPERATION.match(line)
            if found:
                root, name, shape, opcode, rest = found.groups()
                inside, _, attributes = rest.partition(")")
                current.append(Operation(name, shape, opcode, inside, attributes, bool(root)))
        elif line.endswith("{") and (found := HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
    for operations in computations.values():
        operations[:0] = _elements(operations)
    return Module(computations, *_count_runs(computations, entry))


def _elements(operations: list[Operation]) -> list[Operation]:
    """Makes the operations "get-tuple-element" that newer compilers leave out: %loop.state#3 is an element's name."""
    shapes = {operation.name: operation.shape for operation in operations}
    found = {}

    def shape(name: str) -> str:
        if name not in shapes:
            whole, _, place = name.rpartition("#")
            shapes[name] = _parts(shape(whole))[int(place)]
            found[name] = Operation(name, shapes[name], "get-tuple-element", f"%{whole}", "", False)
        return shapes[name]

    for operation in operations:
        for name in operation.operands:
            if "#" in name:
                shape(name)
    return list(found.values())


def _parts(shape: str) -> list[str]:
    """Splits the shape of a tuple into those of its elements."""
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [re.sub(r"/\*.*?\*/", "", part).strip() for part in parts]


def _count_runs(computations: dict[str, list[Operation]], entry: str) -> tuple[dict[str, int], dict[str, int]]:
    """Counts `Module.runs` and `Module.fused_runs`. entry: name of the computation that the program begins with."""
    runs, fused_runs = Counter({entry: 1}), Counter()
    # From callers to callees, so that all runs of a caller are known when those of its callees are counted.
    for name in reversed(computations):
        for operation in computations[name]:
            called = CALLED.findall(operation.attributes)
            branches = BRANCHES.search(operation.attributes)
            called += NAME.findall(branches[1]) if branches else []
            fuses = operation.opcode == "fusion" or (operation.opcode != "call" and "to_apply=" in operation.attributes)
            repeats = _trip_count(operation, computations) if operation.opcode == "while" else 1
            for callee in called:
                (fused_runs if fuses else runs)[callee] += runs[name] * repeats
                fused_runs[callee] += fused_runs[name] * repeats
    return runs, fused_runs


def _trip_count(loop: Operation, computations: dict[str, list[Operation]]) -> int:
    """Number of times that a loop runs; 1 where nothing tells.

    The compiler may have written it down. Else it is the largest constant of the loop's condition, because JAX's loops
    count from 0 to a constant.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]
    limits = [o for o in computations[condition] if o.opcode == "constant" and o.shape.startswith(("s32[]", "s64[]"))]
    return max((int(limit.arguments) for limit in limits), default=1)


def shape_bytes(shape: str) -> int:
    """Bytes of HBM that a value of this shape takes: tiles are padded to be whole, a tuple is the sum of its parts.

    shape: as of `Operation.shape`. Arrays in the chip's own memory, which their layout tells, take no HBM.
    """
    total = 0
    for kind, dims, order, layout in SHAPE.findall(shape):
        if re.search(r"S\([1-9]", layout):  # a memory space other than HBM
            continue
        bits = re.search(r"\d+", kind)
        lengths = [int(n) for n in dims.split(",") if n]
        tile = re.match(r":T\(([\d,]+)\)", layout)
        if tile and order:
            tiles = [int(n) for n in tile[1].split(",")]
            for axis, unit in zip((int(n) for n in order.split(",")), reversed(tiles), strict=False):
                lengths[axis] = -(-lengths[axis] // unit) * unit
        total += math.prod(lengths) * (int(bits[0]) if bits else 8 if kind == "pred" else 0) // 8
    return total
