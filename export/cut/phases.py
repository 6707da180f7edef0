"""Which segment computes what: every segment is a phase between passes over the plane."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fvae_deploy.export.cut.axes import SIZES, padded, spatial
from fvae_deploy.export.cut.lower import BundleMisfit, Op, crossed
from fvae_deploy.export.cut.trace import aten

CELLS = math.prod(SIZES[0])
BEFORE = -1  # the phase of the stage's input
FAR = 6  # elements that a phase may reach before it ends where the graph is narrow,
NEAR = 2  # and at least; with many numbers at a place, tiles are small, and a halo costs more
NUMBERS = 512  # at a place, up to which it is FAR
BESIDE = 0.25  # a place is narrow if what else is alive there has at most this share of its bytes;
WIDE = 1.0  # and this one where a phase would reach twice as far


@dataclass
class Phase:
    """One segment: its operations in order, what it takes from others, and what it returns."""

    ops: list[Op]
    inputs: list[Op]  # stored values, the input, passes and gathered maps
    outputs: list[Op]
    whole: str = ""


def split(ops: dict[str, Op], results: Sequence[str]) -> list[Phase]:
    """Assign every operation to phases, as late as possible; returns those that return anything.

    The first result is the data; states are computed as early as possible. What shares no map, such
    as the frames that a network takes one chunk after the other, is apart. Phases are in an order
    in which few maps wait. Raises BundleMisfit if a map would have to be stored that is no whole
    number of cells.
    """
    number = _numbers(ops, results)
    passes = [op for op in ops.values() if op.target == "reduce" and op.name in number]
    pinned = {name for op in passes for name in op.inputs}.union(results)
    together = [set(op.inputs) for op in passes]  # both factors of a product
    demanded = dict.fromkeys((*results, *pinned))
    phases: list[Phase] = []
    order = {name: i for i, name in enumerate(ops)}
    for phase in range(max(number.values()), BEFORE, -1):
        outputs = [name for name in demanded if number[name] == phase]
        outputs = [name for name in outputs if ops[name].target != "input"]
        collect = functools.partial(_collect, ops, number, phase, pinned=pinned)
        for group in _apart(ops, outputs, collect, together):
            taken, inputs = collect(group)
            inside = [ops[name] for name in sorted(taken, key=order.__getitem__)]
            boundary = [ops[name] for name in sorted(inputs, key=order.__getitem__)]
            for op in boundary:
                demanded.update(dict.fromkeys(_sources(op)))
            whole = next((op.whole for op in inside if op.whole), "")
            phases.append(Phase(inside, boundary, [ops[name] for name in group], whole))
    stored = {op.name for phase in phases for op in phase.outputs}
    for op in (ops[name] for name in stored):
        if padded(op.axes[0]):
            raise BundleMisfit(f"{op.name} is a map with elements beyond the plane")
        if crossed(op):
            raise BundleMisfit(f"{op.name} is a map that has rows or columns twice")
    return _ordered(phases[::-1], results)


def _apart(
    ops: dict[str, Op],
    outputs: list[str],
    collect: Callable[[list[str]], tuple[set[str], set[str]]],
    together: Sequence[set[str]],
) -> list[list[str]]:
    """Group the outputs of a phase: those that share work, or a map other than the input."""
    groups: list[tuple[list[str], set[str]]] = []
    for name in outputs:
        taken, inputs = collect([name])
        work = {n for n in taken if ops[n].data and not ops[n].cheap}
        maps = {n for i in inputs for n in _sources(ops[i]) if ops[n].target != "input"}
        shared = {name}.union(work, maps, *(names for names in together if name in names))
        joined = [group for group in groups if group[1] & shared]
        groups = [group for group in groups if not group[1] & shared]
        names = [n for group, _ in joined for n in group]
        groups.append(([*names, name], shared.union(*(keys for _, keys in joined))))
    return [names for names, _ in groups]


def _ordered(phases: list[Phase], results: Sequence[str]) -> list[Phase]:
    """Return the phases so that each runs shortly before it is needed."""
    made = {op.name: str(i) for i, phase in enumerate(phases) for op in phase.outputs}
    needs = {
        str(i): [made[n] for op in phase.inputs for n in _sources(op) if n in made]
        for i, phase in enumerate(phases)
    }
    return [phases[int(i)] for i in depth_first(needs, *(made[name] for name in results))]


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


def _ends(ops: dict[str, Op], results: Sequence[str]) -> set[str]:
    """Return the operations at which a phase ends lest its halo becomes wide.

    They are those through whose results alone, beside maps that are small or stored anyway, all
    that follows depends on what came before; at a change of resolution, those on the smaller map.
    """
    needs = {name: op.inputs for name, op in ops.items()}
    late = (ops[name] for name in depth_first(needs, *results))
    data = [op for op in late if op.data and is_spatial(op)]
    last = {name: i for i, op in enumerate(data) for name in op.inputs}
    elements = {op.name: math.prod(n for n, _, _ in op.shapes[0]) for op in data}
    sizes = {op.name: scale_of(Phase([op], [], [])) for op in data}
    users: dict[str, list[Op]] = {op.name: [] for op in data}
    for op in data:
        for name in op.inputs:
            users.get(name, []).append(op)
    ends: set[str] = set()
    reach: dict[str, Fraction] = {}
    roots: dict[str, set[str]] = {}
    live: set[str] = set()
    passes = (op for op in ops.values() if op.target in ("reduce", "gather"))
    stored = {name for op in passes for name in op.inputs}.union(results)
    early = _earliest(ops, ends)
    for i, op in enumerate(data):
        inputs = [name for name in op.inputs if name in reach]
        near = (n for n in inputs if n not in ends and early[n] == early[op.name])
        far = max((reach[name] for name in near), default=Fraction(0))
        reach[op.name] = Fraction(0) if op.whole else far + op.overhang
        if op.target == "input" or (op.cheap and stored.issuperset(inputs)):
            stored.add(op.name)  # or computed again from what is stored
        roots[op.name] = _roots(op, roots, ends | stored)
        if op.target is aten.cat.default and _joins_less(op, roots, ends | stored, elements):
            ends |= {n for n in op.inputs if n in roots and not padded(ops[n].axes[0])}
        live = {name for name in (*live, op.name) if last.get(name, 0) > i}
        beside = live - stored - {op.name}
        if op.name not in live - stored or padded(op.axes[0]):
            continue
        after, *others = users[op.name]
        if not others and after.cheap and elements[after.name] <= elements[op.name]:
            continue  # the phase may as well end after that
        grows = i + 1 < len(data) and sizes[data[i + 1].name] > sizes[op.name]
        shrinks = any(sizes[name] > sizes[op.name] for name in inputs)
        finest = max(sizes[name] for name in (op.name, *inputs))
        numbers = max(1, elements[op.name] / (CELLS * sizes[op.name] ** 2))
        allowed = max(NEAR, FAR * min(1, (NUMBERS / numbers) ** 0.5))
        far = reach[op.name] * finest / (allowed / 2 if grows or shrinks else allowed)
        share = WIDE if far >= 2 else BESIDE
        if far >= 1 and sum(elements[name] for name in beside) <= share * elements[op.name]:
            ends.add(op.name)
            stored |= live
    return ends


def _roots(op: Op, roots: Mapping[str, set[str]], kept: set[str]) -> set[str]:
    """Return the maps that an operation's inputs are computed from in its phase."""
    return set().union(*({name} if name in kept else roots.get(name, ()) for name in op.inputs))


def _joins_less(
    op: Op, roots: Mapping[str, set[str]], kept: set[str], elements: Mapping[str, int]
) -> bool:
    """Return whether a concatenation joins results that come from separate maps and are smaller.

    Those of a network's chunks of frames are. Stored, they spare the maps: else the last ones of
    all chunks wait for the last chunk.
    """
    inputs = [name for name in dict.fromkeys(op.inputs) if name in roots]
    sources = [_roots(op, {name: roots[name]}, kept & {name}) for name in inputs]
    separate = len(set().union(*sources)) == sum(map(len, sources)) and all(sources)
    if len(inputs) < 2 or not separate:
        return False
    of = sum(elements[n] for n in set().union(*sources))
    return sum(elements[n] for n in inputs) <= BESIDE * of


def depth_first(needs: Mapping[str, Sequence[str]], result: str, *others: str) -> list[str]:
    """Return what a result needs, itself last, each shortly before the first that takes it.

    `needs` is in an order in which all could run. Of several inputs, the one with the longest way
    behind it is first. So a branch beside a network's trunk is computed where it joins it. What
    only other results need, and these themselves, are computed as soon as what they take is there.
    """
    ordered = _depth_first(needs, result)
    for other in others:
        there = {name: i for i, name in enumerate(ordered)}
        added = [name for name in _depth_first(needs, other) if name not in there]
        place = 1 + max((there.get(n, -1) for name in added for n in needs[name]), default=-1)
        ordered[place:place] = added
    return ordered


def _depth_first(needs: Mapping[str, Sequence[str]], result: str) -> list[str]:
    depth: dict[str, int] = {}
    for name, inputs in needs.items():
        depth[name] = 1 + max((depth[n] for n in inputs), default=0)
    ordered: dict[str, None] = {}
    todo = [result]
    while todo:
        missing = [n for n in needs[todo[-1]] if n not in ordered]
        if todo[-1] in ordered or not missing:
            ordered[todo.pop()] = None
        else:
            todo.append(max(missing, key=depth.__getitem__))
    return list(ordered)


def _earliest(ops: dict[str, Op], ends: set[str]) -> dict[str, int]:
    """Return the first phase in which every operation could run."""
    early: dict[str, int] = {}
    for name, op in ops.items():
        inputs = (ops[n] for n in op.inputs if ops[n].data and ops[n].target != "input")
        least = max([0, *(early[i.name] + _distance(i, op, ends) for i in inputs)])
        early[name] = BEFORE if op.target == "input" else least
    return early


def _numbers(ops: dict[str, Op], results: Sequence[str]) -> dict[str, int]:
    """Return the phase of every operation that depends on the input."""
    ends = _ends(ops, results)
    early = _earliest(ops, ends)
    number = {name: early[name] for name in results}
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
