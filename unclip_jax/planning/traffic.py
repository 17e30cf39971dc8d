"""Measures what a compiled program moves: to and from memory, and between chips."""

import re
from collections import Counter
from typing import NamedTuple

from unclip_jax.planning.hlo import Operation, Program, size

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# They name, group or contain others, and move nothing themselves.
IDLE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
IDLE |= {"async-start", "async-update", "async-done", "copy-done", "partition-id", "replica-id", "optimization-barrier"}
SLICES = ("dynamic-slice", "slice", "gather")


class Collective(NamedTuple):
    """Operations between chips, all of one kind and with one origin."""

    kind: str  # of COLLECTIVES
    source: str  # the JAX function
    count: int  # in a step
    sent: float  # bytes that a chip sends in a step, where the chips of a group stand in a ring


def collectives(program: Program) -> list[Collective]:
    """Operations between chips, the largest first."""
    counts, sent = Counter(), Counter()
    for name, operations in program.computations.items():
        times = program.times[name] + program.fused[name]
        shapes = {operation.name: operation.shape for operation in operations}
        for operation in operations if times else ():
            kind = operation.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                key = (kind, operation.source)
                counts[key] += times
                given = sum(map(size, (shapes[operand] for operand in operation.operands)))
                sent[key] += times * _sent(kind, given, _group(operation.attributes))
    found = [Collective(*key, counts[key], sent[key]) for key in counts]
    return sorted(found, key=lambda each: -each.sent)


def _sent(kind: str, given: float, chips: int) -> float:
    """Bytes that each of a ring of chips sends on, which were given so many each."""
    if kind == "all-gather":
        return given * (chips - 1)
    share = (chips - 1) / chips
    return given * {"all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share}.get(kind, 1.0)


def _group(attributes: str) -> int:
    """Chips that exchange with each other."""
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if axes:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes[1]))
        chips = 1
        for axis in re.findall(r"'([^']+)'", axes[2]):
            chips *= int(sizes[axis])
        return chips
    compact = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return int(compact[1]) if compact else len(listed[1].split(",")) if listed else 1


def moved(program: Program) -> float:
    """Bytes to and from memory: of each operation, or fusion of several, what it takes and what it gives."""
    return sum(times * _moved(operation, near, program) for operation, times, near in program.running())


def _moved(operation: Operation, near: dict[str, Operation], program: Program) -> float:
    opcode = operation.opcode
    if opcode in IDLE or opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return 0
    result = size(operation.shape)
    if opcode.endswith("-start"):  # its result names what it takes, too
        return result
    if opcode in SLICES:
        return 2 * result
    operands = [near[name].shape for name in operation.operands if name in near]
    if opcode == "dynamic-update-slice":
        return 2 * size(operands[1])
    if opcode != "fusion":
        return result + sum(map(size, operands))
    inner = {each.name: each for each in _inside(operation, program)}
    read = sum(
        _taken(each.name, size(operands[int(each.arguments)]), inner, program)
        for each in inner.values()
        if each.opcode == "parameter"
    )
    return read + _written(inner)


def _inside(fusion: Operation, program: Program) -> list[Operation]:
    return program.computations[re.search(r"calls=%?([\w.\-]+)", fusion.attributes)[1]]


def _taken(name: str, whole: float, inner: dict[str, Operation], program: Program) -> float:
    """Bytes that a fusion of operations `inner` takes of the array `name`: all of them, or slices."""
    total = 0.0
    for user in inner.values():
        for place, operand in enumerate(user.operands):
            if operand != name or total >= whole:
                continue
            if user.opcode in SLICES:
                total += size(user.shape) if place == 0 else whole
            elif user.opcode == "dynamic-update-slice" and place == 0:
                total += size(inner[user.operands[1]].shape)
            elif user.opcode == "bitcast":
                total += _taken(user.name, whole, inner, program)
            elif user.opcode == "fusion":
                deeper = {each.name: each for each in _inside(user, program)}
                places = {each.arguments: each.name for each in deeper.values() if each.opcode == "parameter"}
                total += _taken(places[str(place)], whole, deeper, program)
            else:
                total += whole
    return min(whole, total)


def _written(inner: dict[str, Operation]) -> float:
    """Bytes that a fusion gives: of a large array that it writes a slice of, the slice."""
    root = next(operation for operation in inner.values() if operation.root)
    given = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return sum(size(inner[o.operands[1]].shape if o.opcode == "dynamic-update-slice" else o.shape) for o in given)
