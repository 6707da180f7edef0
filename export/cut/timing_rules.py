"""Rules for operations that move frames: convolutions, resizing, padding, slices, joins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fvae_deploy.export.cut.lower import packet_name
from fvae_deploy.export.cut.timing import (
    Clock,
    Span,
    Timed,
    Timing,
    fine,
    latest,
    one,
    rule,
    same,
    shape_of,
)
from fvae_deploy.export.cut.trace import Node, Ref, Sized


def shifted(offset: int, step: int = 1, width: int = 1) -> Span:
    """Return the span of frames that lie `offset` later, of which every `step`-th is taken."""

    def span(low: int, high: int) -> tuple[int, int]:
        return offset + low * step, offset + (high - 1) * step + width

    return span


def taken(steps: Sequence[int], span: Span, count: int) -> tuple[int, ...]:
    """Return the steps in which `count` frames are known that need frames of these steps."""
    found = []
    for frame in range(count):
        low, high = span(frame, frame + 1)
        inside = steps[max(low, 0) : max(high, 0)] or (steps[:1] if low < 0 else steps[-1:])
        found.append(max(inside))
    return tuple(found)


def _slid(
    clock: Clock, node: Node, name: str, info: Timed, window: tuple[int, int, int]
) -> Timing | None:
    """Return the timing of a window (width, stride, padding) that slides along the frames."""
    width, stride, padding = window
    shape = shape_of(node)
    if window == (1, 1, 0):
        return Timing((info, *(latest(info) for _ in node.shapes[1:])), {name: same})
    span = shifted(-padding, stride, width)
    steps = taken(fine(info, clock.shape(Ref(name))), span, shape[info.axis])
    found = Timed(info.axis, 1, 1, steps)
    return Timing((found, *(max(steps) for _ in node.shapes[1:])), {name: span})


@rule("convolution")
def convolution(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Convolve along frames, or within them."""
    x, weight, _, stride, padding, dilation, transposed = node.args[:7]
    name, info = one(timed)
    if name != x.name or info.axis == 1:
        return None
    if info.axis == 0:
        return Timing((info,), {name: same})
    i = info.axis - 2
    kernel = clock.shape(weight)[info.axis]
    width = (kernel - 1) * dilation[i] + 1
    if transposed and (width, padding[i]) == (stride[i], 0) and not node.args[7][i]:
        return _multiplied(clock, node, name, info, stride[i])
    if transposed:
        return None
    return _slid(clock, node, name, info, (width, stride[i], padding[i]))


def _multiplied(clock: Clock, node: Node, name: str, info: Timed, factor: int) -> Timing | None:
    """Return the timing where every frame becomes several."""
    steps = tuple(step for step in fine(info, clock.shape(Ref(name))) for _ in range(factor))

    def span(low: int, high: int) -> tuple[int, int]:
        return low // factor, -(-high // factor)

    return Timing((Timed(info.axis, 1, 1, steps),), {name: span})


@rule(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"
)
def pool(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Pool along frames, without padding, or within them."""
    name, info = one(timed)
    n = len(shape_of(node)) - 2
    i = info.axis - 2
    if i < 0:
        return Timing((info, *(latest(info) for _ in node.shapes[1:])), {name: same})
    full = [*node.args[1:], *[[], 0][len(node.args) - 2 :]]
    given = (full[0], full[1] or full[0], full[2] if len(full) > 2 else 0)
    kernel, stride, padding = [
        (list(v) * n)[:n] if isinstance(v, (list, tuple)) else [v] * n for v in given
    ]
    return None if padding[i] else _slid(clock, node, name, info, (kernel[i], stride[i], 0))


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d")
@rule("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")
@rule("upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
def resize(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Repeat frames, or resize within them; interpolation between frames looks ahead."""
    name, info = one(timed)
    old, new = clock.shape(Ref(name))[info.axis], shape_of(node)[info.axis]
    if old == new:
        return Timing((info,), {name: same})
    if new % old:
        return None
    if "nearest" in str(node.target):
        return _multiplied(clock, node, name, info, new // old)
    if not interpolates(node):
        return None
    span = between(new // old)
    steps = taken(fine(info, clock.shape(Ref(name))), span, new)
    return Timing((Timed(info.axis, 1, 1, steps),), {name: span})


def interpolates(node: Node) -> bool:
    """Return whether an operation interpolates linearly, with corners that are not aligned."""
    return packet_name(node.target).endswith(("linear1d", "linear3d")) and not node.args[2]


def between(factor: int) -> Span:
    """Return the span of frames between which `factor` times as many are interpolated."""

    def span(low: int, high: int) -> tuple[int, int]:
        first, last = (((2 * g + 1 - factor) // (2 * factor)) for g in (low, high - 1))
        return first, last + 2

    return span


def _part(
    clock: Clock, name: str, info: Timed, axis: int, start: int, count: int, step: int = 1
) -> Timing:
    """Return the timing of frames [start, start + step, ...) or of a part of another axis."""
    if axis != info.axis:
        return Timing((info,), {name: same})
    span = shifted(start, step)
    steps = taken(fine(info, clock.shape(Ref(name))), span, count)
    return Timing((Timed(axis, 1, 1, steps),), {name: span})


@rule("slice")
def slice_(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Take some frames, or a part of all."""
    name, info = one(timed)
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, start, _, step = (*node.args[1:], *defaults[len(node.args) - 1 :])
    shape = clock.shape(Ref(name))
    dim %= len(shape)
    if dim == info.axis and isinstance(start, Sized):
        return None
    begin = (start or 0) if dim == info.axis else 0
    begin = max(begin + shape[dim], 0) if begin < 0 else begin
    return _part(clock, name, info, dim, begin, shape_of(node)[dim], step)


@rule("select")
def select(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Take one frame, or one element of every frame."""
    name, info = one(timed)
    shape = clock.shape(Ref(name))
    dim, index = node.args[1] % len(shape), node.args[2]
    if dim != info.axis:
        return Timing((replace(info, axis=info.axis - (dim < info.axis)),), {name: same})
    return Timing((fine(info, shape)[index],), {name: shifted(index % shape[dim])})


@rule("split", "split_with_sizes", "unsafe_split", "unbind")
def split(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Split an axis; its items know their places."""
    _, info = one(timed)
    return Timing((info,) * len(node.shapes))


@rule("item")
def item(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Take a piece of a split."""
    ref, index = node.args
    parent = clock.nodes[ref.name]
    source, *rest = parent.args
    info = clock.info(source)
    if not isinstance(info, Timed):
        return None
    unbind = "unbind" in str(parent.target)
    position = 0 if unbind else 1
    given = rest[position] if len(rest) > position else parent.kwargs.get("dim", 0)
    dim = given % len(clock.shape(source))
    if unbind:
        if dim == info.axis:
            return Timing((fine(info, clock.shape(source))[index],), {source.name: shifted(index)})
        return Timing((replace(info, axis=info.axis - (dim < info.axis)),), {source.name: same})
    start = sum(shape_of(parent, i)[dim] for i in range(index))
    return _part(clock, source.name, info, dim, start, shape_of(node)[dim])


@rule("flip", "index_select", "cumsum", "roll", "index")
def inside(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Do anything along axes other than that of the frames."""
    name, info = one(timed)
    if node.args[0].name != name or len(shape_of(node)) != len(clock.shape(Ref(name))):
        return None
    kind = packet_name(node.target)
    if kind == "index":
        dims = [i for i, ref in enumerate(node.args[1]) if ref is not None]
    else:
        found = node.args[2 if kind == "roll" else 1] if len(node.args) > 1 else None
        dims = [found] if isinstance(found, int) else list(found or [info.axis])
    touched = {d % len(shape_of(node)) for d in dims}
    return None if info.axis in touched else Timing((info,), {name: same})


@rule("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Add frames in front or behind, or margins to every frame."""
    name, info = one(timed)
    pads = node.args[1]
    low, high = frames_added(pads, len(shape_of(node)), info.axis)
    if not low and not high:
        return Timing((info,), {name: same})
    if "reflection" in str(node.target):
        return None
    span = shifted(-low)
    steps = taken(fine(info, clock.shape(Ref(name))), span, shape_of(node)[info.axis])
    return Timing((Timed(info.axis, 1, 1, steps),), {name: span})


def frames_added(pads: Sequence[Any], rank: int, axis: int) -> tuple[int, int]:
    """Return how many elements a padding adds before and after an axis."""
    at = 2 * (rank - 1 - axis)
    return (pads[at], pads[at + 1]) if at + 1 < len(pads) else (0, 0)


@rule("cat")
def cat(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Join along the frames, or along another axis."""
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))
    infos = [clock.info(ref) for ref in node.args[0]]
    if any(isinstance(i, Timed) and i.axis != dim for i in infos):
        return _beside(clock, node, dim)
    steps: list[int] = []
    spans: dict[str, Span] = {}
    for ref, info in zip(node.args[0], infos, strict=True):
        count = clock.shape(ref)[dim]
        if isinstance(info, Timed):
            spans[ref.name] = shifted(-len(steps))
            steps += fine(info, clock.shape(ref))
        else:
            steps += [latest(info) or 0] * count
    return Timing((Timed(dim, 1, 1, tuple(steps)),), spans)


def _beside(clock: Clock, node: Node, dim: int) -> Timing | None:
    """Join tensors of the same frames along another axis."""
    infos = [clock.info(ref) for ref in node.args[0]]
    found = [i for i in infos if isinstance(i, Timed)]
    if len(found) < len(infos) or len({replace(i, steps=()) for i in found}) > 1:
        return None
    steps = tuple(map(max, *(i.steps for i in found))) if len(found) > 1 else found[0].steps
    spans = {ref.name: same for ref in node.args[0]}
    return Timing((replace(found[0], steps=steps),), spans)


@rule("stack")
def stack(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Join tensors of the same frames along a new axis."""
    found = _beside(clock, node, -1)
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))
    if found is None or not isinstance(info := found.infos[0], Timed):
        return None
    return Timing((replace(info, axis=info.axis + (dim <= info.axis)),), found.spans)
