"""A phase as a torch module and as a part: sizes computed from the tile that it receives."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fvae_deploy.export.cut.axes import SIZES, Atom, Axes
from fvae_deploy.export.cut.lower import BundleMisfit, Op, packet_name
from fvae_deploy.export.cut.phases import Phase, is_spatial, scale_of
from fvae_deploy.export.cut.storage import Storage, channels_last
from fvae_deploy.export.cut.trace import Ref, Sized, aten

VIEWED = {"view", "_unsafe_view", "reshape", "expand", "full", "zeros", "ones", "new_zeros"}
VIEWED |= {"new_ones", "new_full"}
UPSAMPLED = ("upsample_", "_upsample_")
PLACES = ("device", "pin_memory", "layout")  # of a new tensor; it belongs where the others are


class Emitter:
    """Builds the graph of one phase, in cells of `scale` per latent cell.

    Elementwise operations on maps that arrive with channels last are computed like that. The result
    of any other operation has the axes of the stage's graph.
    """

    def __init__(self, phase: Phase, storage: Storage) -> None:
        self.phase, self.storage = phase, storage
        self.made = {op.name: op for op in (*phase.inputs, *phase.ops)}
        self.scale = scale_of(phase)
        self.graph = torch.fx.Graph()
        self.root = nn.Module()
        self.nodes: dict[str, Any] = {}
        self.last: dict[str, Any] = {}  # those with channels last
        self.cells: dict[str, Any] = {}  # how many cells the tile has along h and w, and n

    def module(self) -> nn.Module:
        """Return the phase as a function of its inputs' tiles."""
        placeholders = [self.graph.placeholder(op.name) for op in self.phase.inputs]
        for op, node in zip(self.phase.inputs, placeholders, strict=True):
            self._measure(self.storage.axes(op), node)
        for op, node in zip(self.phase.inputs, placeholders, strict=True):
            self._receive(op, node)
        for op in self.phase.ops:
            positions = _interlaced(op, self.made)
            if positions:
                self.last[op.name] = self._interleaved(op, positions)
            elif self._is_last(op):
                find = functools.partial(self._with_channels_last, rank=len(op.axes[0]))
                self.last[op.name] = self._operation(op, find)
            else:
                self.nodes[op.name] = self._operation(op, self._node)
        self.graph.output(tuple(self._returned(op) for op in self.phase.outputs))
        self.graph.eliminate_dead_code()
        return torch.fx.GraphModule(self.root, self.graph)

    def _receive(self, op: Op, node: Any) -> None:
        """Give a part's input the axes that operations see."""
        axes, stored = op.axes[0], self.storage.axes(op)
        if op.name in self.storage.channels:
            self.last[op.name] = self._reshaped(node, stored, channels_last(op))
        elif stored != axes and op.target == "gather":
            channel = self.storage.channels[op.inputs[0]]
            order = [*range(channel), len(axes) - 1, *range(channel, len(axes) - 1)]
            self.nodes[op.name] = self.graph.call_function(aten.permute.default, (node, order))
        else:
            self.nodes[op.name] = self._reshaped(node, stored, axes)

    def _returned(self, op: Op) -> Any:
        """Return a result in the order in which it is stored."""
        if op.name in self.storage.channels:
            return self._tokens(op)
        return self._reshaped(self._node(op.name), op.axes[0], self.storage.axes(op))

    def _tokens(self, op: Op) -> Any:
        """Return a map as [batch, places, channels].

        OpenVINO leaves that where a convolution has put it. With rows and columns apart, it would
        move it twice.
        """
        batch, channels, *places = op.axes[0]
        joined = tuple(atom for axis in places for atom in axis)
        if op.name in self.last:
            axes = (batch, joined, channels)
            return self._reshaped(self.last[op.name], channels_last(op), axes)
        flat = self._reshaped(self._node(op.name), op.axes[0], (batch, channels, joined))
        return self.graph.call_function(aten.permute.default, (flat, [0, 2, 1]))

    def _interleaved(self, op: Op, positions: list[Op]) -> Any:
        """Return the pixels of several maps side by side, row by row, with channels last."""
        factor = op.args[1]
        batch, channels, rows, columns = positions[0].axes[0]
        lines = []
        for i in range(0, len(positions), factor):
            pixels = ((*batch, *rows, *columns), (), channels)
            pieces = [self._reshaped(self._tokens(p), None, pixels) for p in positions[i:][:factor]]
            line = self.graph.call_function(aten.cat.default, (pieces, 1))
            wide = ((*batch, *rows), (), (*columns, Atom("", factor), *channels))
            lines.append(self._reshaped(line, None, wide))
        whole = self.graph.call_function(aten.cat.default, (lines, 1))
        return self._reshaped(whole, None, channels_last(op))

    def _is_last(self, op: Op) -> bool:
        """Return whether an operation is elementwise, and its maps are there with channels last."""
        if torch.Tag.pointwise not in getattr(op.target, "tags", ()) or not channels_last(op):
            return False
        maps = [name for name in op.inputs if is_spatial(self.made[name])]
        return bool(maps) and all(
            name in self.last and len(self.made[name].axes[0]) == len(op.axes[0]) for name in maps
        )

    def _node(self, name: str) -> Any:
        """Return a result with the axes of the stage's graph."""
        if name not in self.nodes:
            n = len(self.made[name].axes[0])
            order = [0, n - 1, *range(1, n - 1)]
            node = (self.last[name], order)
            self.nodes[name] = self.graph.call_function(aten.permute.default, node)
        return self.nodes[name]

    def _with_channels_last(self, name: str, rank: int) -> Any:
        """Return an operand of an elementwise operation of this rank with channels last."""
        if name in self.last:
            return self.last[name]
        axes = self.made[name].axes[0]
        if not axes:
            return self.nodes[name]
        full = (*[()] * (rank - len(axes)), *axes)
        node = self._reshaped(self.nodes[name], axes, full)
        order = [0, *range(2, rank), 1]
        return self.graph.call_function(aten.permute.default, (node, order))

    def _measure(self, axes: Axes, node: Any) -> None:
        """Find how many cells a tile has from an input's size."""
        for i, axis in enumerate(axes):
            atom = axis[0] if axis else Atom("", 1)
            if atom.kind and atom.kind not in self.cells:
                count = self.graph.call_function(aten.sym_size.int, (node, i))
                self.cells[atom.kind] = self._ratio(count, self._per_cell(atom))

    def _count(self, kind: str) -> Any:
        """Return how many cells the tile has; raises BundleMisfit if no input tells."""
        if kind not in self.cells:
            raise BundleMisfit("an operation without a map takes the size of the plane")
        return self.cells[kind]

    def _per_cell(self, atom: Atom) -> int:
        return atom.size // self.scale if atom.kind in ("h", "w") else atom.size

    def _ratio(self, count: Any, size: int) -> Any:
        return count if size == 1 else self.graph.call_function(operator.floordiv, (count, size))

    def _times(self, count: Any, factor: int) -> Any:
        if isinstance(count, int):
            return count * factor
        return count if factor == 1 else self.graph.call_function(operator.mul, (count, factor))

    def _plus(self, count: Any, extra: int) -> Any:
        return self.graph.call_function(operator.add, (count, extra)) if extra else count

    def _size(self, axis: Sequence[Atom]) -> Any:
        """Return an axis' number of elements in the tile."""
        total: Any = 1
        for atom in axis:
            if not atom.kind:
                total = self._times(total, atom.size)
                continue
            count = self._times(self._count(atom.kind), self._per_cell(atom))
            count = self._plus(count, atom.low + atom.high)
            total = count if total == 1 else self.graph.call_function(operator.mul, (total, count))
        return total

    def _reshaped(self, node: Any, old: Axes | None, new: Axes) -> Any:
        if old == new:
            return node
        return self.graph.call_function(
            aten.reshape.default, (node, [self._size(axis) for axis in new])
        )

    def _operation(self, op: Op, find: Callable[[str], Any]) -> Any:
        """Append an operation; `find` returns its operands."""
        if op.target == "weight":
            self._register(op)
            return self.graph.get_attr(op.args[0])
        if op.target == "item":
            return self.graph.call_function(operator.getitem, (find(op.args[0].name), op.args[1]))
        name, args = packet_name(op.target), list(op.args)
        target = aten.reshape.default if name in ("view", "_unsafe_view") else op.target
        if name in VIEWED:
            place = 0 if name in ("full", "zeros", "ones") else 1
            args[place] = [self._size(axis) for axis in op.axes[0]]
        elif name.startswith(UPSAMPLED):
            args[1] = [self._size(axis) for axis in op.axes[0][2:]]
        kwargs = {k: self._argument(v, find) for k, v in op.kwargs.items() if k not in PLACES}
        given = tuple(self._argument(value, find) for value in args)
        return self.graph.call_function(target, given, kwargs)

    def _argument(self, value: Any, find: Callable[[str], Any]) -> Any:
        if isinstance(value, Ref):
            return find(value.name)
        if isinstance(value, Sized):
            return self._solved(value)
        if isinstance(value, (list, tuple)):
            return [self._argument(v, find) for v in value]
        return value

    def _solved(self, number: Sized) -> Any:
        """Return a number that depends on the plane, as a function of h or of w or of both."""
        a, b, c = number.triple
        (h, w), (taller, _), (_, wider) = SIZES
        down, right = Fraction(b - a, taller - h), Fraction(c - a, wider - w)
        if down and right:
            factor = Fraction(a, h * w * self.scale**2)
            tall, wide = (factor * x * y * self.scale**2 for x, y in SIZES[1:])
            if factor.denominator != 1 or (tall, wide) != (b, c):
                return self._misfit()
            cells = self._times(self._count("h"), int(factor))
            return self.graph.call_function(operator.mul, (cells, self._count("w")))
        kind, slope, length = ("h", down, h) if down else ("w", right, w)
        slope /= self.scale
        if slope.denominator != 1:
            return self._misfit()
        count = self._times(self._count(kind), int(slope))
        return self._plus(count, a - int(slope) * self.scale * length)

    def _misfit(self) -> Any:
        raise BundleMisfit("an operation takes a number that depends on the plane")

    def _register(self, op: Op) -> None:
        *path, leaf = op.args[0].split(".")
        owner = self.root
        for name in path:
            if not hasattr(owner, name):
                owner.add_module(name, nn.Module())
            owner = getattr(owner, name)
        assert op.value is not None
        if op.value.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(op.value.detach(), requires_grad=False))
        else:
            owner.register_buffer(leaf, op.value)


def _interlaced(op: Op, made: Mapping[str, Op]) -> list[Op]:
    """Return the maps whose pixels alternate in the result of a pixel shuffle; none of another."""
    if packet_name(op.target) != "pixel_shuffle" or not channels_last(op):
        return []
    source = made[op.args[0].name]
    while packet_name(source.target) in ("view", "_unsafe_view") and source.args[0].name in made:
        source = made[source.args[0].name]
    if packet_name(source.target) != "stack" or source.args[1:] != (2,):
        return []
    positions = [made[ref.name] for ref in source.args[0] if ref.name in made]
    alike = {channels_last(each) for each in positions}
    fits = len(positions) == op.args[1] ** 2 and len(alike) == 1 and () not in alike
    return positions if fits and positions[0].axes[0][1] == op.axes[0][1] else []
