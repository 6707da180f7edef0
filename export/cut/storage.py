"""How maps are stored between segments: with their channels last, where that can be.

Engines on CPUs compute convolutions with channels last. Maps that are stored like that pass into
and out of a segment without being moved, and the rows of a map lie one after the other: reading a
strip of a map in memory copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fvae_deploy.export.cut.axes import Axes, layout, padded, spatial
from fvae_deploy.export.cut.lower import Op


@dataclass(frozen=True)
class Storage:
    """Which stored axis holds the channels, in the order of the graph, of maps that hold them last.

    All other maps are stored in the order of the graph.
    """

    channels: Mapping[str, int]

    @classmethod
    def of(cls, ops: Mapping[str, Op], data: str, result: str) -> Storage:
        """Choose for all maps of a stage; its data and its result keep their order."""
        kept = {data, result}
        for op in ops.values():
            if op.target == "reduce" and _keeps_order(op, ops[op.args[0].name]):
                kept.update(op.inputs)
        able = (op for op in ops.values() if op.name not in kept)
        return cls({op.name: len(op.axes[0][0]) for op in able if channels_last(op)})

    def axes(self, op: Op) -> Axes:
        """Return the axes of a value as it is stored, and as a part receives it."""
        channel = self.channels.get(op.inputs[0] if op.target == "gather" else op.name)
        axes = layout(op.axes[0])
        return axes if channel is None else (*axes[:channel], *axes[channel + 1 :], axes[channel])

    def place(self, op: Op, axis: int) -> int:
        """Return where an axis of a map, numbered in the order of the graph, is stored."""
        channel = self.channels.get(op.name)
        if channel is None or axis < channel:
            return axis
        return len(layout(op.axes[0])) - 1 if axis == channel else axis - 1


def channels_last(op: Op) -> Axes:
    """Return a map's axes with the second one, the channels, at the end; none if it has no such."""
    axes = op.axes[0] if op.axes else ()
    if len(axes) < 4 or len(axes[1]) != 1 or spatial(axes[:2]) or padded(axes):
        return ()
    if any(len(axis) > 1 for axis in axes[2:]) or not spatial(axes[2:]):
        return ()
    return (axes[0], *axes[2:], axes[1])


def _keeps_order(op: Op, source: Op) -> bool:
    """Return whether the result of a pass has axes in another order if the channels are last."""
    kind, inside, groups = op.args[1], op.args[2], int(op.args[4])
    if kind == "product":
        return True
    if not channels_last(source):
        return False
    channel = len(source.axes[0][0])
    left = set(range(len(layout(source.axes[0])))).difference(inside)
    return bool(channel in left or groups > 1) and any(axis > channel for axis in left)
