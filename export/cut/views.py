"""Rules of elementwise operations and of views: reshapes, permutes, slices, concatenations."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from fvae_deploy.export.cut.axes import (
    Atom,
    Axes,
    Axis,
    broadcast,
    by_size,
    constant,
    regrouped,
    size,
    spatial,
)
from fvae_deploy.export.cut.lower import Lowering, NotLocal, Op, packet_name, rule
from fvae_deploy.export.cut.trace import Node, Ref, Sized, aten


def made(state: Lowering, node: Node, axes: Axes, **facts: Any) -> Op:
    """Return a node's operation with these axes of its one result."""
    return state.make(node.name, node.target, node.args, axes, kwargs=node.kwargs, **facts)


def along(state: Lowering, node: Node, axis: int) -> int:
    """Return an axis of the first argument counted from the front."""
    return axis % max(1, len(state.axes(node.args[0])))


def is_plain(axis: Axis) -> bool:
    """Return whether an axis has a fixed number of elements."""
    return not any(atom.kind for atom in axis)


@rule("input")
def _input(state: Lowering, node: Node) -> Op:
    axes = by_size(node.shapes[0])
    assert axes is not None
    return made(state, node, axes)


@rule("weight")
def _weight(state: Lowering, node: Node) -> Op:
    op = made(state, node, tuple(constant(n) for n, _, _ in node.shapes[0]), cheap=True)
    op.value = node.value
    return op


@rule("item")
def _item(state: Lowering, node: Node) -> Op:
    ref, index = node.args
    op = state.ops[ref.name]
    item = made(state, node, op.axes[index], cheap=op.cheap and not op.whole)
    item.whole = op.whole  # in the segment of what it is an item of
    return item


@rule("pointwise", "where", "_to_copy", "masked_fill", "copy", "fill")
def pointwise(state: Lowering, node: Node) -> Op:
    """Combine elements of equal position."""
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Sized)]
    if numbers:
        raise NotLocal("it takes a number that depends on the plane")
    many = [state.axes(a) for a in node.args if isinstance(a, Ref)]
    axes = broadcast(many)
    if axes is None:
        node, axes = _matched(state, node)
    maps = {a.name for a in node.args if isinstance(a, Ref) and spatial(state.axes(a))}
    return made(state, node, axes, cheap=len(maps) < 2)


def _matched(state: Lowering, node: Node) -> tuple[Node, Axes]:
    """Return a node whose operands have axes that fit, and its axes.

    An axis that was expanded is known by its size alone, and is broadcast instead. A mask on scores
    of whole keys covers the whole plane too. Raises NotLocal if that does not help.
    """
    refs = [a for a in node.args if isinstance(a, Ref)]
    whole = any(atom.kind == "n" for a in refs for atom in (state.axes(a) or ((),))[-1])

    def fitting(value: Any) -> Any:
        if not isinstance(value, Ref):
            return value
        if packet_name(state.ops[value.name].target) == "expand":
            value = state.ops[value.name].args[0]
        return state.whole_last(value) if whole else value

    args = tuple(map(fitting, node.args))
    axes = broadcast([state.axes(a) for a in args if isinstance(a, Ref)])
    if axes is None or tuple(map(size, axes)) != node.shapes[0]:
        raise NotLocal("it combines maps of different places")
    return replace(node, args=args), axes


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten")
def reshape(state: Lowering, node: Node) -> Op:
    """Regroup the elements in their order."""
    axes = regrouped(state.axes(node.args[0]), node.shapes[0])
    if axes is None:
        raise NotLocal("it reshapes rows and columns together")
    return made(state, node, axes, cheap=True)


@rule("clone")
def clone(state: Lowering, node: Node) -> Op:
    """Lay out a tensor anew."""
    return made(state, node, state.axes(node.args[0]), cheap=True)


@rule("permute")
def permute(state: Lowering, node: Node) -> Op:
    """Reorder the axes."""
    old = state.axes(node.args[0])
    return made(state, node, tuple(old[d] for d in node.args[1]), cheap=True)


@rule("transpose")
def transpose(state: Lowering, node: Node) -> Op:
    """Swap two axes."""
    axes = list(state.axes(node.args[0]))
    a, b = (along(state, node, d) for d in node.args[1:3])
    axes[a], axes[b] = axes[b], axes[a]
    return made(state, node, tuple(axes), cheap=True)


@rule("t")
def t(state: Lowering, node: Node) -> Op:
    """Swap the axes of a matrix."""
    return made(state, node, state.axes(node.args[0])[::-1], cheap=True)


@rule("expand")
def expand(state: Lowering, node: Node) -> Op:
    """Repeat axes of one element."""
    old, sizes = state.axes(node.args[0]), node.shapes[0]
    new = by_size(sizes)
    if new is None:
        raise NotLocal("it expands to a size that fits no cells")
    kept = (*[()] * (len(new) - len(old)), *old)
    axes = [a if size(a) == s else b for a, b, s in zip(kept, new, sizes, strict=True)]
    return made(state, node, tuple(axes), cheap=True)


@rule("full", "zeros", "ones", "scalar_tensor")
def filled(state: Lowering, node: Node) -> Op:
    """Make a tensor of one number."""
    axes = by_size(node.shapes[0])
    if axes is None:
        raise NotLocal("its size fits no cells")
    return made(state, node, axes, cheap=True)


@rule("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
@rule("empty", "new_empty", "empty_like")
def filled_like(state: Lowering, node: Node) -> Op:
    """Make a tensor of one number, whose size or type are those of another tensor.

    One whose values do not matter, as they are written later, is filled with zeros.
    """
    name = packet_name(node.target)
    axes = state.axes(node.args[0]) if name.endswith("like") else by_size(node.shapes[0])
    if axes is None:
        raise NotLocal("its size fits no cells")
    number = node.args[-1] if "full" in name else int("ones" in name)
    kwargs = {"dtype": node.kwargs["dtype"]}
    args = (None, number)  # the size is that of the axes
    return state.make(node.name, aten.full.default, args, axes, kwargs=kwargs, cheap=True)


@rule("repeat")
def repeat(state: Lowering, node: Node) -> Op:
    """Repeat the elements of constant axes."""
    old, times = state.axes(node.args[0]), node.args[1]
    kept = (*[()] * (len(times) - len(old)), *old)
    axes = []
    for axis, count, (n, _, _) in zip(kept, times, node.shapes[0], strict=True):
        if count != 1 and not is_plain(axis):
            raise NotLocal("it repeats the plane")
        axes.append(axis if count == 1 else constant(n))
    return made(state, node, tuple(axes), cheap=True)


@rule("cat")
def cat(state: Lowering, node: Node) -> Op:
    """Join maps of the same cells along a constant axis."""
    many = [state.axes(ref) for ref in node.args[0]]
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(many[0])
    others = {axes[:dim] + axes[dim + 1 :] for axes in many}
    if len(others) > 1:
        raise NotLocal("it joins maps of different places")
    if not all(is_plain(axes[dim]) for axes in many):
        raise NotLocal("it joins rows or columns")
    axes = list(many[0])
    axes[dim] = constant(node.shapes[0][dim][0])
    return made(state, node, tuple(axes))


@rule("stack")
def stack(state: Lowering, node: Node) -> Op:
    """Join maps of the same cells along a new axis."""
    many = [state.axes(ref) for ref in node.args[0]]
    dim = (node.args[1] if len(node.args) > 1 else 0) % (len(many[0]) + 1)
    if len(set(many)) > 1:
        raise NotLocal("it joins maps of different places")
    return made(state, node, (*many[0][:dim], constant(len(many)), *many[0][dim:]))


@rule("split", "split_with_sizes", "chunk", "unbind", "unsafe_split")
def split(state: Lowering, node: Node) -> Op:
    """Split a constant axis."""
    old = state.axes(node.args[0])
    unbind = "unbind" in str(node.target)
    position = 1 if unbind else 2
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    dim = along(state, node, given)
    if not is_plain(old[dim]):
        raise NotLocal("it splits rows or columns")
    pieces = []
    for shape in node.shapes:
        middle = () if unbind else (constant(shape[dim][0]),)
        pieces.append((*old[:dim], *middle, *old[dim + 1 :]))
    facts = {"several": True, "cheap": True, "kwargs": node.kwargs}
    return state.make(node.name, node.target, node.args, tuple(pieces), **facts)


@rule("select")
def select(state: Lowering, node: Node) -> Op:
    """Take one element of a constant axis."""
    old = state.axes(node.args[0])
    dim = along(state, node, node.args[1])
    if not is_plain(old[dim]):
        raise NotLocal("it takes one row or column")
    return made(state, node, old[:dim] + old[dim + 1 :], cheap=True)


@rule("index_select", "flip", "cumsum", "roll")
def along_constants(state: Lowering, node: Node) -> Op:
    """Do anything along constant axes."""
    old = state.axes(node.args[0])
    dims = node.args[2 if "roll" in str(node.target) else 1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims or []
    inside = [along(state, node, d) for d in dims]
    shape = node.shapes[0]
    if not inside or not all(is_plain(old[d]) and len(set(shape[d])) == 1 for d in inside):
        raise NotLocal("it runs along rows or columns")
    new = (constant(shape[i][0]) if i in inside else axis for i, axis in enumerate(old))
    return made(state, node, tuple(new))


@rule("index")
def index(state: Lowering, node: Node) -> Op:
    """Take elements of one constant axis by a list of numbers."""
    x, numbers = node.args
    old = state.axes(x)
    given = [(i, ref) for i, ref in enumerate(numbers) if ref is not None]
    ((dim, chosen),) = given if len(given) == 1 else ((None, None),)
    if dim is None or not is_plain(old[dim]) or len(state.axes(chosen)) > 1:
        raise NotLocal("it takes some rows or columns only")
    if spatial(state.axes(chosen)):
        raise NotLocal("it takes elements by numbers that depend on the plane")
    result = constant(node.shapes[0][dim][0])
    return made(state, node, (*old[:dim], result, *old[dim + 1 :]))


@rule("slice")
def slice_(state: Lowering, node: Node) -> Op:
    """Take a range of an axis; along rows and columns, one at a fixed distance from both ends."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, start, stop, step = (*node.args[1:], *defaults[len(node.args) - 1 :])
    old = state.axes(node.args[0])
    dim = along(state, node, dim)
    axis, sizes = old[dim], size(old[dim])
    new = node.shapes[0][dim]
    if new == sizes:
        return made(state, node, old, cheap=True)
    starts = [_bound(start, i, n, 0) for i, n in enumerate(sizes)]
    stops = [_bound(stop, i, n, n) for i, n in enumerate(sizes)]
    if is_plain(axis):
        result: Axis = constant(new[0])
    else:
        ends = {n - stop for n, stop in zip(sizes, stops, strict=True)}
        if (
            len(axis) > 1
            or axis[0].kind == "n"
            or len(set(starts)) > 1
            or len(ends) > 1
            or step != 1
        ):
            raise NotLocal("it takes some rows or columns only")
        atom = axis[0]
        atom = replace(atom, low=atom.low - starts[0], high=atom.high - ends.pop())
        result, moved = rebased(atom)
        axes = (*old[:dim], result, *old[dim + 1 :])
        return made(state, node, axes, cheap=True, overhang=moved)
    return made(state, node, (*old[:dim], result, *old[dim + 1 :]), cheap=True)


def rebased(atom: Atom) -> tuple[Axis, Fraction]:
    """Return the axis of shifted cells, and by how many cells its elements moved.

    Where as many elements were added at one end as were taken from the other, each now counts
    for another cell, so that the map has whole cells again.
    """
    if atom.low + atom.high:
        return (atom,), Fraction(0)
    return (replace(atom, low=0, high=0),), Fraction(abs(atom.low), atom.size)


def _bound(value: Any, index: int, length: int, default: int) -> int:
    """Return a slice's bound at one of the three sizes, within the axis."""
    number = default if value is None else value
    number = number.triple[index] if isinstance(number, Sized) else number
    return int(min(max(number + length if number < 0 else number, 0), length))


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(state: Lowering, node: Node) -> Op:
    """Add elements at the ends of axes."""
    axes, pads = list(state.axes(node.args[0])), node.args[1]
    overhang = Fraction(0)
    if any(isinstance(n, Sized) for n in pads):
        raise NotLocal("it pads by a number that depends on the plane")
    for i in range(len(pads) // 2):
        low, high = pads[2 * i : 2 * i + 2]
        axis, dim = axes[-1 - i], len(axes) - 1 - i
        if not low and not high:
            continue
        if is_plain(axis):
            axes[dim] = constant(node.shapes[0][dim][0])
        elif len(axis) == 1 and axis[0].kind != "n":
            atom = replace(axis[0], low=axis[0].low + low, high=axis[0].high + high)
            axes[dim], moved = rebased(atom)
            moved += Fraction(axis[0].refilled(low, high), atom.size)
            overhang = max(overhang, moved)
        else:
            raise NotLocal("it pads tokens")
    return made(state, node, tuple(axes), cheap=True, overhang=overhang)
