"""Reads the text of a compiled program (HLO): what runs how often, and what it moves.

The compiler's own summary counts the body of a loop once, however often it runs; a transformer of 24 blocks would seem
to cost as much as one. Here each computation is weighted with the product of the trip counts of the loops around it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
OPERATION = re.compile(r"  (ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)([^{}]*)\})?")
CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
NAME = re.compile(r"%([\w.\-]+)")
UNKNOWN = 2**62
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
KERNEL = re.compile(r'"cost_estimate":\{[^}]*"flops":"(\d+)"')


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # of its result, with layout
    opcode: str
    arguments: str  # as written
    attributes: str  # the rest of the line
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of what it takes."""
        return NAME.findall(self.arguments)

    @property
    def source(self) -> str:
        """The JAX function that it was made from, with the modules around it; "" where that is not known."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate; 0 where it has none, which it may write as the largest number there is."""
        found = CYCLES.search(self.attributes)
        cycles = int(found[1]) if found else 0
        return cycles if cycles < UNKNOWN else 0

    @property
    def kernel_flops(self) -> int:
        """FLOPs that a kernel of our own declares; the compiler estimates no cycles of those."""
        found = KERNEL.search(self.attributes) if self.opcode == "custom-call" else None
        return int(found[1]) if found else 0


class Program(NamedTuple):
    """A parsed module."""

    computations: dict[str, list[Operation]]  # callees stand before callers
    times: dict[str, int]  # how often each of them runs; 0: never, or inside of a fusion or a reduction
    fused: dict[str, int]  # the same of those inside of fusions

    def running(self) -> Iterator[tuple[Operation, int, dict[str, Operation]]]:
        """Every operation that is launched by itself, how often, and its neighbours by name."""
        for name, operations in self.computations.items():
            if self.times[name]:
                near = {operation.name: operation for operation in operations}
                yield from ((operation, self.times[name], near) for operation in operations)


def parse(text: str) -> Program:
    """Reads what `compiled.as_text()` gives, or a compiler's dump of an optimised module."""
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
    return Program(computations, *_times(computations, entry))


def _times(computations, entry: str) -> tuple[dict[str, int], dict[str, int]]:
    times, fused = Counter({entry: 1}), Counter()
    for name in reversed(computations):
        for operation in computations[name]:
            called = CALLED.findall(operation.attributes)
            branches = BRANCHES.search(operation.attributes)
            called += NAME.findall(branches[1]) if branches else []
            inner = operation.opcode == "fusion" or (operation.opcode != "call" and "to_apply=" in operation.attributes)
            repeats = _trips(operation, computations) if operation.opcode == "while" else 1
            for callee in called:
                (fused if inner else times)[callee] += times[name] * repeats
                fused[callee] += fused[name] * repeats
    return times, fused


def _trips(loop: Operation, computations) -> int:
    """Number of times that a loop runs; 1 where nothing says so. JAX's loops count from 0 to a constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]
    limits = [o for o in computations[condition] if o.opcode == "constant" and o.shape.startswith(("s32[]", "s64[]"))]
    return max((int(limit.arguments) for limit in limits), default=1)


def size(shape: str) -> int:
    """Bytes of HBM that a value takes, with what its tiles waste; arrays in memory on the chip take none."""
    total = 0
    for kind, dims, order, layout in SHAPE.findall(shape):
        if re.search(r"S\([1-9]", layout):
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
