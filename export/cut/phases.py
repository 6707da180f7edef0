"""Which segment computes what: every segment is a phase between passes over the plane."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from fvae_deploy.export.cut.axes import padded, spatial
from fvae_deploy.export.cut.lower import BundleMisfit, Op, crossed

BEFORE = -1  # the phase of the stage's input
FAR = 6  # elements that a phase may reach before it ends where the graph is narrow


@dataclass
class Phase:
    """One segment: its operations in order, what it takes from others, and what it returns."""

    ops: list[Op]
    inputs: list[Op]  # stored values, the input, passes and gathered maps
    outputs: list[Op]
    whole: str = ""


def split(ops: dict[str, Op], result: str) -> list[Phase]:
    """Assign every operation to phases, as late as possible; returns those that return anything.

    Raises BundleMisfit if a map would have to be stored that is no whole number of cells.
    """
    number = _numbers(ops, result)
    passes = (op for op in ops.values() if op.target == "reduce" and op.name in number)
    pinned = {name for op in passes for name in op.inputs}
    demanded: dict[str, None] = {result: None, **dict.fromkeys(pinned)}
    phases = []
    for phase in range(max(number.values()), BEFORE, -1):
        outputs = [name for name in demanded if number[name] == phase]
        outputs = [name for name in outputs if ops[name].target != "input"]
        if not outputs:
            continue
        taken, inputs = _collect(ops, number, phase, outputs, pinned | {result})
        order = {name: i for i, name in enumerate(ops)}
        inside = [ops[name] for name in sorted(taken, key=order.__getitem__)]
        boundary = [ops[name] for name in sorted(inputs, key=order.__getitem__)]
        for op in boundary:
            demanded.update(dict.fromkeys(_sources(op)))
        whole = next((op.whole for op in inside if op.whole), "")
        phases.append(Phase(inside, boundary, [ops[name] for name in outputs], whole))
    stored = {op.name for phase in phases for op in phase.outputs}
    for op in (ops[name] for name in stored):
        if padded(op.axes[0]):
            raise BundleMisfit(f"{op.name} is a map with elements beyond the plane")
        if crossed(op):
            raise BundleMisfit(f"{op.name} is a map that has rows or columns twice")
    return phases[::-1]


def _sources(op: Op) -> list[str]:
    """Return the stored value that a boundary operation stands for."""
    return op.inputs if op.target in ("reduce", "gather") else [op.name]


def is_spatial(op: Op) -> bool:
    """Return whether tiles cut a result."""
    return any(spatial(axes) for axes in op.axes)


def _distance(op: Op, consumer: Op, ends: set[str]) -> int:
    """Return how many phases lie between two operations at least."""
    if consumer.target == "gather" or op.target == "reduce":
        return 1
    if consumer.target == "reduce":
        return 0
    if op.name in ends:
        return 1
    return int(bool(op.whole) != bool(consumer.whole)) if op.whole or consumer.whole else 0


def _ends(ops: dict[str, Op], result: str) -> set[str]:
    """Return the operations at which a phase ends lest its halo becomes wide.

    They are those through whose results alone, beside maps that are stored anyway, all that follows
    depends on what came before; at a change of resolution, those on the smaller map.
    """
    data = [op for op in ops.values() if op.data and is_spatial(op)]
    last = {name: i for i, op in enumerate(data) for name in op.inputs}
    sizes = {op.name: scale_of(Phase([op], [], [])) for op in data}
    ends: set[str] = set()
    reach: dict[str, Fraction] = {}
    live: set[str] = set()
    passes = (op for op in ops.values() if op.target in ("reduce", "gather"))
    stored = {name for op in passes for name in op.inputs}
    for i, op in enumerate(data):
        inputs = [name for name in op.inputs if name in reach]
        far = max((reach[name] for name in inputs if name not in ends), default=Fraction(0))
        reach[op.name] = Fraction(0) if op.whole else far + op.overhang
        if op.target == "input" or (op.cheap and stored.issuperset(inputs)):
            stored.add(op.name)  # or computed again from what is stored
        live = {name for name in (*live, op.name) if last.get(name, 0) > i}
        if live - stored != {op.name} or padded(op.axes[0]) or op.name == result:
            continue
        grows = i + 1 < len(data) and sizes[data[i + 1].name] > sizes[op.name]
        shrinks = any(sizes[name] > sizes[op.name] for name in inputs)
        finest = max(sizes[name] for name in (op.name, *inputs))
        if reach[op.name] * finest >= (FAR / 2 if grows or shrinks else FAR):
            ends.add(op.name)
            stored.add(op.name)
    return ends


def _numbers(ops: dict[str, Op], result: str) -> dict[str, int]:
    """Return the phase of every operation that depends on the input."""
    ends = _ends(ops, result)
    early: dict[str, int] = {}
    for name, op in ops.items():
        inputs = [ops[n] for n in op.inputs if ops[n].data]
        early[name] = BEFORE if op.target == "input" else max(
            [0, *(early[i.name] + _distance(i, op, ends) for i in inputs if i.target != "input")]
        )  # fmt: skip
    number: dict[str, int] = {result: early[result]}
    for name in reversed(ops):
        op = ops[name]
        if name not in number or not op.data:
            continue
        for source in (ops[n] for n in op.inputs if ops[n].data):
            latest = number[name] - _distance(source, op, ends)
            number[source.name] = min(number.get(source.name, latest), latest)
    for name, op in ops.items():
        if op.target == "input":
            number[name] = BEFORE
        elif name in number and op.target in ("reduce", "item"):
            number[name] = min(number[name], *(number[n] for n in op.inputs))
        elif name in number and op.data:
            _stay_with_padded(op, ops, number, ends)
    return number


def _stay_with_padded(op: Op, ops: dict[str, Op], number: dict[str, int], ends: set[str]) -> None:
    """Move an operation to where its input is that has elements beyond the plane, if possible."""
    inputs = [ops[n] for n in op.inputs if ops[n].data]
    loose = [number[i.name] for i in inputs if padded(i.axes[0]) and not i.cheap]
    if loose and min(loose) >= max(number[i.name] + _distance(i, op, ends) for i in inputs):
        number[op.name] = min(number[op.name], *loose)


def _collect(
    ops: dict[str, Op], number: dict[str, int], phase: int, outputs: list[str], pinned: set[str]
) -> tuple[set[str], set[str]]:
    """Return the operations that a segment runs, and those whose results it takes."""
    inside: set[str] = set()
    boundary: set[str] = set()
    todo = list(outputs)
    while todo:
        name = todo.pop()
        op = ops[name]
        if name in inside or name in boundary:
            continue
        if op.target in ("input", "reduce", "gather"):
            boundary.add(name)
            continue
        again = not op.data or not (is_spatial(op) or op.whole)
        again = again or (op.cheap and not op.whole and name not in pinned)
        if number.get(name, phase) == phase or again:
            inside.add(name)
            todo += op.inputs
        else:
            boundary.add(name)
    return inside, boundary


def scale_of(phase: Phase) -> int:
    """Return the cells of a phase per latent cell: the coarsest of its maps."""
    sizes = [
        atom.size
        for op in (*phase.inputs, *phase.ops)
        for axes in op.axes
        for axis in axes
        for atom in axis
        if atom.kind in ("h", "w")
    ]
    return math.gcd(*sizes) if sizes else 1
