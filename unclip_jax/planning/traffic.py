"""Counts the bytes that a compiled program moves: to and from memory, and between chips."""

import re
from collections import Counter
from typing import NamedTuple

from unclip_jax.planning.hlo import Module, Operation, shape_bytes

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# What goes to other TPU slices, over the data center's network: the compiler splits a reduction over slices into one
# within each slice and a transfer by the host, which this handler names.
BETWEEN_SLICES, MEGASCALE = "transfer between slices", '_xla_host_transfer_handler_name="xla_megascale_runtime"'
# Operations that name, group or contain others, and move nothing themselves.
IDLE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
IDLE |= {"async-start", "async-update", "async-done", "copy-done", "partition-id", "replica-id", "optimization-barrier"}
IDLE |= {"send-done", "recv-done"}
SLICES = ("dynamic-slice", "slice", "gather")  # they read no more than they return


class Collective(NamedTuple):
    """All operations between chips of one kind that come from one JAX function."""

    kind: str  # one of COLLECTIVES, or BETWEEN_SLICES
    source: str  # the JAX function, as of hlo.Operation.source
    count: int  # how many of them run in a call of the program
    sent_bytes: float  # sent by each chip in a call of the program, if the chips of a group form a ring


def collectives(module: Module) -> list[Collective]:
    """Lists the operations between chips, those that send most first."""
    counts, sent = Counter(), Counter()
    for name, operations in module.computations.items():
        runs = module.runs[name] + module.fused_runs[name]
        shapes = {operation.name: operation.shape for operation in operations}
        for operation in operations if runs else ():
            kind = operation.opcode.removesuffix("-start")
            if kind == "send" and MEGASCALE in operation.attributes:
                key = (BETWEEN_SLICES, operation.source)
                counts[key] += runs
                sent[key] += runs * shape_bytes(shapes[operation.operands[0]])
            elif kind in COLLECTIVES:
                key = (kind, operation.source)
                counts[key] += runs
                taken = sum(map(shape_bytes, (shapes[operand] for operand in operation.operands)))
                sent[key] += runs * _ring_bytes(kind, taken, _group_size(operation.attributes))
    found = [Collective(*key, counts[key], sent[key]) for key in counts]
    return sorted(found, key=lambda each: -each.sent_bytes)


def _ring_bytes(kind: str, taken: float, chips: int) -> float:
    """Bytes that each chip of a ring sends to the next one in a collective. taken: bytes of each chip's operands."""
    if kind == "all-gather":
        return taken * (chips - 1)
    share = (chips - 1) / chips
    return taken * {"all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share}.get(kind, 1.0)


def _group_size(attributes: str) -> int:
    """Number of chips that exchange with each other, in any of HLO's notations for groups; 1 where none is given."""
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


def moved_bytes(module: Module) -> float:
    """Bytes to and from memory in a call: each operation, or fusion, reads its operands and writes its result."""
    return sum(runs * _operation_bytes(operation, near, module) for operation, runs, near in module.launched())


def _operation_bytes(operation: Operation, near: dict[str, Operation], module: Module) -> float:
    """Bytes that one operation reads and writes. near: all operations of its computation, by name."""
    opcode = operation.opcode
    if opcode in IDLE or opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return 0
    result = shape_bytes(operation.shape)
    if opcode.endswith("-start") or opcode in ("send", "recv"):  # its result is a tuple that contains its operands
        return result
    if opcode in SLICES:
        return 2 * result
    operands = [near[name].shape for name in operation.operands if name in near]
    if opcode == "dynamic-update-slice":
        return 2 * shape_bytes(operands[1])  # the update is read, and written in place
    if opcode != "fusion":
        return result + sum(map(shape_bytes, operands))
    inner = _inner_operations(operation, module)
    read = sum(
        _read_bytes(each.name, shape_bytes(operands[int(each.arguments)]), inner, module)
        for each in inner.values()
        if each.opcode == "parameter"
    )
    return read + _written_bytes(inner)


def _inner_operations(fusion: Operation, module: Module) -> dict[str, Operation]:
    """Finds the operations that a fusion consists of, by name."""
    called = re.search(r"calls=%?([\w.\-]+)", fusion.attributes)[1]
    return {operation.name: operation for operation in module.computations[called]}


def _read_bytes(name: str, whole: float, inner: dict[str, Operation], module: Module) -> float:
    """Bytes that a fusion reads of one of its parameters: all of them, or the slices that it takes.

    name: the parameter's. whole: its bytes. inner: the fusion's operations, by name.
    """
    total = 0.0
    for user in inner.values():
        for place, operand in enumerate(user.operands):
            if operand != name or total >= whole:
                continue
            if user.opcode in SLICES:
                total += shape_bytes(user.shape) if place == 0 else whole
            elif user.opcode == "dynamic-update-slice" and place == 0:
                total += shape_bytes(inner[user.operands[1]].shape)
            elif user.opcode in ("bitcast", "get-tuple-element"):
                total += _read_bytes(user.name, whole, inner, module)
            elif user.opcode == "fusion":
                deeper = _inner_operations(user, module)
                places = {each.arguments: each.name for each in deeper.values() if each.opcode == "parameter"}
                total += _read_bytes(places[str(place)], whole, deeper, module)
            else:
                total += whole
    return min(whole, total)


def _written_bytes(inner: dict[str, Operation]) -> float:
    """Bytes that a fusion writes: its results or, of an array that it updates in place, the slice that it updates."""
    root = next(operation for operation in inner.values() if operation.root)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = [inner[o.operands[1]] if o.opcode == "dynamic-update-slice" else o for o in results]
    return sum(shape_bytes(operation.shape) for operation in written)
