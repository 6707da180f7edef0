"""Rules of operations with a reach: convolutions, pooling, resizing, pixels moved to channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from fvae_deploy.export.cut.axes import SIZES, Atom, Axis, constant, size
from fvae_deploy.export.cut.lower import Lowering, NotLocal, Op, packet_name, rule
from fvae_deploy.export.cut.trace import Node, Sized, aten
from fvae_deploy.export.cut.views import is_plain, made


@rule("convolution")
def convolution(state: Lowering, node: Node) -> Op:
    """Convolve along the last axes, or convolve transposed."""
    x, weight, _, stride, padding, dilation, transposed = node.args[:7]
    axes, kernel = state.axes(x), state.ops[weight.name].shapes[0]
    n = len(stride)
    moved = []
    for i in range(n):
        width = (kernel[i - n][0] - 1) * dilation[i] + 1
        slide = _spread if transposed else _slide
        moved.append(slide(axes[i - n], node.shapes[0][i - n], width, stride[i], padding[i]))
    return _moved(state, node, n, moved)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def pool(state: Lowering, node: Node) -> Op:
    """Pool windows."""
    x, kernel, *rest = node.args
    axes = state.axes(x)
    n = len(node.shapes[0]) - 2
    full = [*rest, *[[], 0, 1][len(rest) :]] if len(rest) < 3 else rest
    stride, padding = (full[0] or kernel), full[1]
    dilation = full[2] if "max" in str(node.target) else 1
    kernel, stride, padding, dilation = (
        list(v) * n if isinstance(v, (list, tuple)) and len(v) == 1 else
        list(v) if isinstance(v, (list, tuple)) else [v] * n
        for v in (kernel, stride, padding, dilation)
    )  # fmt: skip
    moved = [
        _slide(axes[i - n], node.shapes[0][i - n], (kernel[i] - 1) * dilation[i] + 1, stride[i],
               padding[i])
        for i in range(n)
    ]  # fmt: skip
    return _moved(state, node, n, moved)


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
@rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
def nearest(state: Lowering, node: Node) -> Op:
    """Repeat every element a whole number of times, for which both forms are the same."""
    op = _resized(state, node, 0)
    op.target = repeating(op.target)
    return op


def repeating(target: Any) -> Any:
    """Return the form of a resize to the nearest element that every exporter knows."""
    name = packet_name(target)
    if not name.startswith("_upsample_nearest_exact"):
        return target
    return getattr(aten, name.replace("_upsample_nearest_exact", "upsample_nearest")).default


@rule("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")
def linear(state: Lowering, node: Node) -> Op:
    """Interpolate between neighbours."""
    if node.args[2]:
        raise NotLocal("its corners are aligned, so positions depend on the size of the plane")
    return _resized(state, node, 1)


@rule("upsample_bicubic2d")
def cubic(state: Lowering, node: Node) -> Op:
    """Interpolate between two neighbours at either side."""
    if node.args[2]:
        raise NotLocal("its corners are aligned, so positions depend on the size of the plane")
    return _resized(state, node, 2)


@rule("pixel_shuffle")
def pixel_shuffle(state: Lowering, node: Node) -> Op:
    """Move channels to rows and columns."""
    *front, channels, rows, columns = state.axes(node.args[0])
    factor = node.args[1]
    if not is_plain(channels) or len(rows) != 1 or len(columns) != 1:
        raise NotLocal("it moves channels to tokens")
    fewer = constant(size(channels)[0] // factor**2)
    return made(state, node, (*front, fewer, *(_times(a, factor) for a in (rows, columns))))


@rule("pixel_unshuffle")
def pixel_unshuffle(state: Lowering, node: Node) -> Op:
    """Move rows and columns to channels."""
    *front, channels, rows, columns = state.axes(node.args[0])
    factor = node.args[1]
    if not is_plain(channels) or len(rows) != 1 or len(columns) != 1:
        raise NotLocal("it moves tokens to channels")
    more = constant(size(channels)[0] * factor**2)
    smaller = []
    for (atom,) in (rows, columns):
        if atom.size % factor or atom.low or atom.high:
            raise NotLocal("its cells are larger than those of the latents")
        smaller.append((replace(atom, size=atom.size // factor),))
    return made(state, node, (*front, more, *smaller))


def _times(axis: Axis, factor: int) -> Axis:
    (atom,) = axis
    if atom.low or atom.high:
        raise NotLocal("it resizes elements beyond the plane")
    return (replace(atom, size=atom.size * factor),)


Moved = tuple[Axis, Fraction]  # an axis of the result, and how many cells farther it reaches


def _moved(state: Lowering, node: Node, n: int, moved: Sequence[Moved]) -> Op:
    old = state.axes(node.args[0])
    channels = constant(node.shapes[0][-n - 1][0])
    lead = len(old) - n
    if lead < 1 or not is_plain(old[lead - 1]):
        raise NotLocal("its channels are rows or columns")
    axes = (*old[: lead - 1], channels, *(axis for axis, _ in moved))
    overhang = max(beyond for _, beyond in moved)
    if len(node.shapes) > 1:  # pooling with indices, which depend on the place
        facts: Any = {"several": True, "overhang": overhang, "kwargs": node.kwargs}
        return state.make(node.name, node.target, node.args, (axes, axes), **facts)
    return made(state, node, axes, overhang=overhang)


def _resized(state: Lowering, node: Node, neighbours: int) -> Op:
    """Return a resize by whole factors that looks at so many neighbours on either side."""
    old, shape = state.axes(node.args[0]), node.shapes[0]
    if any(isinstance(n, Sized) for n in node.args[2:]):
        raise NotLocal("its factor depends on the plane")
    axes, overhang = list(old[:2]), Fraction(0)
    for axis, target in zip(old[2:], shape[2:], strict=True):
        factor = target[0] // size(axis)[0]
        if tuple(factor * n for n in size(axis)) != target:
            raise NotLocal("it resizes by no whole factor")
        if is_plain(axis):
            axes.append(constant(target[0]))
            continue
        if len(axis) != 1 or axis[0].kind == "n":
            raise NotLocal("it resizes tokens")
        axes.append(_times(axis, factor))
        if factor > 1 and neighbours:
            overhang = max(overhang, Fraction(neighbours, axis[0].size))
    return made(state, node, tuple(axes), overhang=overhang)


def _slide(
    axis: Axis, target: tuple[int, int, int], width: int, stride: int, padding: int
) -> Moved:
    """Return the axis of a window that slides, and how many cells beyond its cell it reaches."""
    if is_plain(axis):
        return constant(target[0]), Fraction(0)
    if len(axis) != 1 or axis[0].kind == "n":
        raise NotLocal("it slides over tokens")
    atom = axis[0]
    if atom.size % stride:
        raise NotLocal("its cells are larger than those of the latents")
    new = Atom(atom.kind, atom.size // stride)
    new = _placed(new, target, (atom.low + padding - (width - stride) // 2) // stride)
    before = atom.low + padding - new.low * stride
    far = max(before, width - stride - before, 0) + atom.refilled(padding, padding)
    return (new,), Fraction(far, atom.size)


def _spread(
    axis: Axis, target: tuple[int, int, int], width: int, stride: int, padding: int
) -> Moved:
    """Return the axis of a transposed convolution, and how many cells farther it reaches."""
    if is_plain(axis):
        return constant(target[0]), Fraction(0)
    if len(axis) != 1 or axis[0].kind == "n":
        raise NotLocal("it slides over tokens")
    atom = axis[0]
    new = Atom(atom.kind, atom.size * stride)
    new = _placed(new, target, (width - stride) // 2 - padding + atom.low * stride)
    before = padding + new.low - atom.low * stride
    far = max(before, width - stride - before, 0) + stride * atom.refilled(1, 1)
    return (new,), Fraction(far, new.size)


def _placed(atom: Atom, target: tuple[int, int, int], low: int) -> Atom:
    """Return an atom of the target's size, with about `low` elements before its first cell.

    Any choice is right, since the reach is counted from it. Where the size is that of whole
    cells, there must be none, so that the map may be stored.
    """
    extra = target[0] - atom.size * SIZES[0][0 if atom.kind == "h" else 1]
    low = min(max(low, min(extra, 0)), max(extra, 0))
    placed = replace(atom, low=low, high=extra - low)
    if placed.triple != target:
        raise NotLocal("its result has another number of cells")
    return placed
