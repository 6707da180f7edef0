"""Follow the axes of every tensor through a traced stage, operation by operation.

Each operation becomes a local one, of which a result at a cell depends on cells within a reach; or
it becomes a pass over the plane (`reduce`), a look at the whole plane (`gather`), and what is
local beside them. An operation without a rule, or one whose rule does not hold for these axes,
keeps the whole plane, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fvae_deploy.export.cut.axes import (
    Axes,
    by_size,
    constant,
    gathered,
    layout,
    padded,
    size,
    spatial,
)
from fvae_deploy.export.cut.trace import Graph, Node, Ref, Sized, aten


class NotLocal(Exception):  # noqa: N818
    """An operation that its rule cannot follow; the message says why."""


@dataclass
class Op(Node):
    """An operation with the axes of its results, `shapes` following from them.

    overhang
        How many latent cells farther than its inputs the result reaches.
    cheap
        Elementwise or a view, so that it is rather computed again than kept.
    whole
        Why it needs the whole plane.
    data
        It depends on the stage's input.
    """

    axes: tuple[Axes, ...] = ()
    overhang: Fraction = Fraction(0)
    cheap: bool = False
    whole: str = ""
    data: bool = True


Rule = Callable[["Lowering", Node], Op]
RULES: dict[str, Rule] = {}
VIEWS = {"view", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand"}
VIEWS |= {"split", "split_with_sizes", "unbind", "item", "select", "clone"}
TABLE_VIEWS = {"view", "_unsafe_view", "unsqueeze", "expand", "clone", "_to_copy", "full"}
SAME = {"alias", "detach", "lift_fresh", "lift_fresh_copy"}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of aten by the names of their packets."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass
class Lowering:
    """The operations lowered so far, by name, in the order in which they run."""

    ops: dict[str, Op] = field(default_factory=dict)
    renamed: dict[str, Any] = field(default_factory=dict)  # of traced results: one or several Refs

    def axes(self, ref: Any) -> Axes:
        """Return the axes of an argument; a number has none."""
        return self.ops[ref.name].axes[0] if isinstance(ref, Ref) else ()

    def add(
        self,
        name: str,
        target: Any,
        args: Sequence[Any],
        axes: Axes | tuple[Axes, ...],
        **facts: Any,
    ) -> Ref:
        """Append an operation under a new name; `axes` of its one result, or of several."""
        return self.append(self.make(name, target, args, axes, **facts))

    def make(
        self,
        name: str,
        target: Any,
        args: Sequence[Any],
        axes: Axes | tuple[Axes, ...],
        **facts: Any,
    ) -> Op:
        """Return an operation without appending it."""
        several: Any = axes if facts.pop("several", False) else (axes,)
        shapes = tuple(tuple(size(axis) for axis in each) for each in several)
        op = Op(name, target, tuple(args), facts.pop("kwargs", {}), shapes, axes=several, **facts)
        inputs = [self.ops[n] for n in op.inputs]
        op.data = any(i.data for i in inputs) or target == "input"
        # What is not stored cannot be read to compute this again.
        op.cheap &= padded(op.axes[0]) or not any(padded(i.axes[0]) for i in inputs)
        return op

    def append(self, op: Op) -> Ref:
        """Append an operation; returns a reference to its result."""
        base, number = op.name, 0
        while op.name in self.ops:
            number += 1
            op.name = f"{base}_{number}"
        self.ops[op.name] = op
        return Ref(op.name)

    def whole(self, ref: Any) -> Ref:
        """Return an operand as the whole plane has it, views of it computed again.

        Raises NotLocal if it cannot be put together from tiles.
        """
        op = self.ops[ref.name]
        if not spatial(op.axes[0]):
            return Ref(op.name)
        if not op.data:
            raise NotLocal("it needs all of a table that covers the plane")
        if packet_name(op.target) in VIEWS and not op.whole:
            try:
                return self._again(op)
            except NotLocal:
                pass
        axes = None if padded(op.axes[0]) else gathered(layout(op.axes[0]))
        if axes is None:
            raise NotLocal("it needs a map whose rows and columns are apart")
        stored = self.add(f"{op.name}_all", "gather", (ref,), axes)
        back = regroup(axes, op.axes[0])
        return self.add(f"{op.name}_tokens", aten.view.default, (stored, None), back, cheap=True)

    def whole_last(self, ref: Ref) -> Ref:
        """Return a table, such as a mask, whose last axis covers the whole plane.

        It is computed again from numbers that do not depend on the input. Raises NotLocal if it
        depends on the input, or is made by anything but elementwise operations and views.
        """
        op = self.ops[ref.name]
        axes = op.axes[0]
        if not axes or not spatial(axes[-1:]):
            return ref
        alone = not spatial(axes[:-1])  # no other axis is cut, so that all of the table is whole
        name = packet_name(op.target)
        known = name in TABLE_VIEWS or torch.Tag.pointwise in getattr(op.target, "tags", ())
        if op.data or op.whole or not known:
            raise NotLocal("its mask covers the plane, and is not made of constants alone")
        args = list(op.args)
        for i, given in enumerate(args):
            if not isinstance(given, Ref):
                continue
            old = self.axes(given)
            if not alone and name in VIEWS and old[-1:] not in (axes[-1:], ((),)):
                raise NotLocal("its mask covers the plane, and is reshaped")
            args[i] = self.whole_last(given)
        stored = gathered(layout(axes[-1:]))
        if stored is None:
            raise NotLocal("its mask has rows and columns apart")
        last = regroup(stored, axes[-1:])
        return self.add(f"{op.name}_all", op.target, args, (*axes[:-1], *last), kwargs=op.kwargs)

    def _spatial_inputs(self, op: Op) -> list[str]:
        return [n for n in op.inputs if spatial(self.ops[n].axes[0]) and self.ops[n].data]

    def _again(self, op: Op) -> Ref:
        """Lower a view once more, on its input as the whole plane has it."""
        args = tuple(
            self.whole(a) if isinstance(a, Ref) and a.name in self._spatial_inputs(op) else a
            for a in op.args
        )
        copy = Node(f"{op.name}_all", op.target, args, op.kwargs, op.shapes)
        return self.append(RULES[packet_name(op.target)](self, copy))


def regroup(axes: Axes, original: Axes) -> Axes:
    """Return the gathered atoms joined as they were in the original axes."""
    atoms = [axis[0] for axis in axes]
    result = []
    for axis in original:
        kinds = sum(atom.kind != "w" or (i == 0) for i, atom in enumerate(axis))
        if any(atom.kind == "w" for atom in axis[:1]):
            raise NotLocal("its rows and columns are apart")
        result.append(tuple(atoms[:kinds]))
        atoms = atoms[kinds:]
    return tuple(result)


def packet_name(target: Any) -> str:
    """Return the name of an operation without its overload."""
    if isinstance(target, str):
        return target
    return (
        str(target.overloadpacket).rpartition(".")[2] if hasattr(target, "overloadpacket") else ""
    )


def lower(graph: Graph) -> tuple[dict[str, Op], tuple[str, ...]]:
    """Return all operations lowered, and the names of the results.

    A state that is an input as it came, or the same as another result, is copied.
    """
    state = Lowering()
    for node in graph.nodes:
        node = renamed(node, state.renamed)
        if node.target == "item":
            ref, index = node.args
            several = state.renamed.get(ref.name)
            if isinstance(several, list):
                state.renamed[node.name] = several[index]
                continue
        if _changes_nothing(node):
            state.renamed[node.name] = node.args[0]
            continue
        state.renamed[node.name] = _lowered(state, node)
    results: list[str] = []
    for name in graph.results:
        ref = state.renamed[name]
        if state.ops[ref.name].target == "input" or ref.name in results:
            copied, axes = f"{ref.name}_left", state.axes(ref)
            ref = state.add(copied, aten.clone.default, (ref,), axes, cheap=True)
        results.append(ref.name)
    return state.ops, tuple(results)


def renamed(node: Node, names: Mapping[str, Any]) -> Node:
    """Return the node with references to lowered operations."""

    def replace(value: Any) -> Any:
        if isinstance(value, Ref):
            now = names.get(value.name, value)
            return value if isinstance(now, list) else now
        if isinstance(value, (list, tuple)):
            return type(value)(replace(v) for v in value)
        return value

    kwargs = {k: replace(v) for k, v in node.kwargs.items()}
    return Node(node.name, node.target, replace(node.args), kwargs, node.shapes, node.value)


def _changes_nothing(node: Node) -> bool:
    name = packet_name(node.target)
    if name in ("div", "mul") and node.args[1] == 1 and not isinstance(node.args[1], Sized):
        return not node.kwargs
    return name in SAME


def _lowered(state: Lowering, node: Node) -> Any:
    """Apply the rule of a node; returns a Ref, or a list of them for several results."""
    before = list(state.ops)
    fixed = (state.ops[n] for n in node.inputs if not state.ops[n].data)
    place = next((op.whole for op in fixed if op.whole), "")
    if place:  # combined with a table of places, such as a range of all rows
        return state.append(_whole(state, node, place))
    try:
        made = _rule_of(node)(state, node)
        if isinstance(made, Op) and made.data and crossed(made):
            raise NotLocal("its result has rows or columns twice")
    except NotLocal as error:
        for name in set(state.ops) - set(before):
            del state.ops[name]
        made = _whole(state, node, f"{packet_name(node.target)}: {error}")
    if isinstance(made, list):
        return made
    return Ref(made.name) if state.ops.get(made.name) is made else state.append(made)


def crossed(op: Op) -> bool:
    """Return whether a result has rows or columns in two axes: a tile is only its diagonal."""
    kinds = ([a.kind for axis in axes for a in axis if a.kind in ("h", "w")] for axes in op.axes)
    return any(len(found) > len(set(found)) for found in kinds)


def _rule_of(node: Node) -> Rule:
    name = packet_name(node.target)
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return RULES["pointwise"]

    def unknown(state: Lowering, node: Node) -> Op:
        inputs = [axes for n in node.inputs for axes in state.ops[n].axes]
        results = [tuple(constant(n) for n, _, _ in shape) for shape in node.shapes]
        alike = all(len(set(triple)) == 1 for shape in node.shapes for triple in shape)
        if any(a.kind for axes in inputs for axis in axes for a in axis) or not alike:
            raise NotLocal("this operation is not known to be local")
        facts: Any = {"several": True, "kwargs": node.kwargs}  # the same in every tile
        return state.make(node.name, node.target, node.args, tuple(results), **facts)

    return unknown


def _whole(state: Lowering, node: Node, reason: str) -> Op:
    """Return the operation on the whole plane, its axes by their sizes alone."""
    axes = [found for shape in node.shapes if (found := by_size(shape)) is not None]
    if len(axes) < len(node.shapes):
        raise BundleMisfit(f"{packet_name(node.target)} has results of sizes that fit no cells")
    if any(isinstance(n, Sized) and not _whole_number(n) for n in tree_leaves(node.args)):
        raise BundleMisfit(f"{packet_name(node.target)} takes a number that depends on the plane")
    op = state.make(node.name, node.target, node.args, tuple(axes), several=True, whole=reason)
    op.kwargs = node.kwargs
    sized = any(isinstance(n, Sized) for n in tree_leaves(node.args))
    places = any(t.whole or any(map(spatial, t.axes)) for t in (state.ops[n] for n in op.inputs))
    if not op.data and not sized and not places:
        op.whole = ""  # a table of another kind, the same for every plane
    return op


def _whole_number(number: Sized) -> bool:
    return all(isinstance(n, int) for n in number.triple)


class BundleMisfit(Exception):  # noqa: N818
    """A stage that cannot be cut at all; the message says why."""
