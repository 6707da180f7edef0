"""A phase as a torch module and as a part: sizes computed from the tile that it receives."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fvae_deploy.export.bundle import Dimension, Part, TensorSpec
from fvae_deploy.export.cut.axes import SIZES, Atom, Axes, layout
from fvae_deploy.export.cut.lower import BundleMisfit, Op, packet_name
from fvae_deploy.export.cut.phases import Phase, is_spatial
from fvae_deploy.export.cut.trace import Ref, Sized, aten

VIEWED = {"view", "_unsafe_view", "reshape", "expand", "full", "zeros", "ones", "new_zeros"}
VIEWED |= {"new_ones", "new_full"}
UPSAMPLED = ("upsample_", "_upsample_")
PLACES = ("device", "pin_memory", "layout")  # of a new tensor; it belongs where the others are


class Emitter:
    """Builds the graph of one phase, in cells of `scale` per latent cell."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.scale = scale_of(phase)
        self.graph = torch.fx.Graph()
        self.root = nn.Module()
        self.nodes: dict[str, Any] = {}
        self.cells: dict[str, Any] = {}  # how many cells the tile has along h and w, and n

    def module(self) -> nn.Module:
        """Return the phase as a function of its inputs' tiles."""
        placeholders = [self.graph.placeholder(op.name) for op in self.phase.inputs]
        for op, node in zip(self.phase.inputs, placeholders, strict=True):
            self._measure(stored_axes(op), node)
        for op, node in zip(self.phase.inputs, placeholders, strict=True):
            self.nodes[op.name] = self._reshaped(node, stored_axes(op), boundary_axes(op))
        for op in self.phase.ops:
            self.nodes[op.name] = self._operation(op)
        outputs = []
        for op in self.phase.outputs:
            node = self._reshaped(self.nodes[op.name], op.axes[0], layout(op.axes[0]))
            outputs.append(node)
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        return torch.fx.GraphModule(self.root, self.graph)

    def _measure(self, axes: Axes, node: Any) -> None:
        """Find how many cells a tile has from an input's size."""
        for i, axis in enumerate(axes):
            atom = axis[0] if axis else Atom("", 1)
            if atom.kind and atom.kind not in self.cells:
                count = self.graph.call_function(aten.sym_size.int, (node, i))
                self.cells[atom.kind] = self._ratio(count, self._per_cell(atom))

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
            count = self._times(self.cells[atom.kind], self._per_cell(atom))
            count = self._plus(count, atom.low + atom.high)
            total = count if total == 1 else self.graph.call_function(operator.mul, (total, count))
        return total

    def _reshaped(self, node: Any, old: Axes, new: Axes) -> Any:
        if old == new:
            return node
        return self.graph.call_function(
            aten.reshape.default, (node, [self._size(axis) for axis in new])
        )

    def _operation(self, op: Op) -> Any:
        if op.target == "weight":
            self._register(op)
            return self.graph.get_attr(op.args[0])
        if op.target == "item":
            return self.graph.call_function(
                operator.getitem, (self.nodes[op.args[0].name], op.args[1])
            )
        name, args = packet_name(op.target), list(op.args)
        target = aten.reshape.default if name in ("view", "_unsafe_view") else op.target
        if name in VIEWED:
            place = 0 if name in ("full", "zeros", "ones") else 1
            args[place] = [self._size(axis) for axis in op.axes[0]]
        elif name.startswith(UPSAMPLED):
            args[1] = [self._size(axis) for axis in op.axes[0][2:]]
        kwargs = {k: self._argument(v) for k, v in op.kwargs.items() if k not in PLACES}
        return self.graph.call_function(target, tuple(map(self._argument, args)), kwargs)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self.nodes[value.name]
        if isinstance(value, Sized):
            return self._solved(value)
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
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
            cells = self._times(self.cells["h"], int(factor))
            return self.graph.call_function(operator.mul, (cells, self.cells["w"]))
        kind, slope, length = ("h", down, h) if down else ("w", right, w)
        slope /= self.scale
        if slope.denominator != 1:
            return self._misfit()
        count = self._times(self.cells[kind], int(slope))
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


def stored_axes(op: Op) -> Axes:
    """Return the axes of a boundary value as the part receives it."""
    return op.axes[0] if op.target == "gather" else layout(op.axes[0])


def boundary_axes(op: Op) -> Axes:
    """Return the axes of a boundary value as the operations see it."""
    return op.axes[0]


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


def spec(name: str, axes: Axes, scale: int = 1) -> TensorSpec:
    """Return the spec of a stored map or small array, in cells of `scale` per latent cell."""
    shape: list[Dimension] = []
    for axis in axes:
        (atom,) = axis or (Atom("", 1),)
        if not atom.kind:
            shape.append(atom.size)
            continue
        factor = atom.size // scale if atom.kind != "n" else atom.size
        shape.append(f"{factor}*{atom.kind}" if factor > 1 else atom.kind)
    return TensorSpec(name, tuple(shape))


def halo_of(phase: Phase, scale: int) -> int:
    """Return how many cells beyond its own a result of a phase depends on."""
    reach = {op.name: Fraction(0) for op in phase.inputs}
    for op in phase.ops:
        far = max((reach[n] for n in op.inputs), default=Fraction(0)) + op.overhang
        sizes = [a.size for axes in op.axes for axis in axes for a in axis if a.kind in ("h", "w")]
        finest = math.gcd(*sizes) if sizes else scale
        reach[op.name] = Fraction(math.ceil(far * finest), finest)  # whole elements
    return max(math.ceil(reach[op.name] * scale) for op in phase.outputs)


@dataclass(frozen=True)
class Costs:
    """Multiply-adds and bytes for a cell of a tile, for one of the whole plane, and for a pair."""

    cell_mac: int
    pair_mac: int
    cell_bytes: int
    plane_bytes: int
    pair_bytes: int


def costs_of(phase: Phase, scale: int) -> Costs:
    """Return what a phase costs, from its shapes at the first of the sizes."""
    h, w = SIZES[0]
    cells, plane = h * w * scale**2, h * w
    work = pair_work = live = most = pairs = wholes = 0
    seeing: set[str] = set()
    last = {n: i for i, op in enumerate(phase.ops) for n in op.inputs}
    last |= {op.name: len(phase.ops) for op in phase.outputs}
    ending: dict[int, int] = {}
    for i, op in enumerate([*phase.inputs, *phase.ops]):
        place = i - len(phase.inputs)
        elements = math.prod(n for n, _, _ in op.shapes[0]) if op.shapes else 0
        seen = any(atom.kind == "n" for axis in op.axes[0] for atom in axis)
        if seen:
            seeing.add(op.name)
        if place >= 0 and seeing.intersection(op.inputs):
            pair_work += _work(op, phase)
        elif place >= 0:
            work += _work(op, phase)
        if packet_name(op.target) == "scaled_dot_product_attention" and place >= 0:
            pairs = max(pairs, 2 * 4 * _scores(op, phase))
        if is_spatial(op) and seen:
            pairs = max(pairs, 2 * elements * 4)
        elif op.target == "gather":
            wholes += 4 * elements
        elif is_spatial(op) and packet_name(op.target) not in VIEWED:
            live += 4 * elements
            end = last.get(op.name, place)
            ending[end] = ending.get(end, 0) + 4 * elements
        most = max(most, live)
        live -= ending.pop(place, 0)
    return Costs(
        work // cells,
        pair_work // (cells * plane),
        -(-most // cells),
        -(-wholes // plane),
        -(-pairs // (cells * plane)),
    )


def _scores(op: Op, phase: Phase) -> int:
    """Return the pairs of tokens that an attention over the plane compares; 0 for another one."""
    made = {o.name: o for o in (*phase.inputs, *phase.ops)}
    query, key = (made[ref.name] for ref in op.args[:2])
    if not any(atom.kind == "n" for axis in key.axes[0] for atom in axis):
        return 0
    return math.prod(n for n, _, _ in query.shapes[0][:-1]) * key.shapes[0][-2][0]


def _work(op: Op, phase: Phase) -> int:
    """Return the multiply-adds of one operation at the first of the sizes."""
    shapes = {
        o.name: [n for n, _, _ in o.shapes[0]] for o in (*phase.inputs, *phase.ops) if o.shapes
    }
    name, result = packet_name(op.target), math.prod(shapes.get(op.name, [0]))
    if name == "convolution":
        kernel = shapes[op.args[1].name]
        if op.args[6]:  # transposed: every element of the input is spread
            return math.prod(shapes[op.args[0].name]) * math.prod(kernel[1:])
        return result * math.prod(kernel[1:])
    if name in ("mm", "bmm", "matmul", "addmm", "baddbmm"):
        return result * shapes[op.args[1 if "add" in name else 0].name][-1]
    if name == "scaled_dot_product_attention":
        return 2 * result * shapes[op.args[1].name][-2]
    return 0


def part_of(phase: Phase, name: str) -> Part:
    """Describe a phase as a part of a bundle."""
    scale = scale_of(phase)
    inputs = tuple(spec(op.name, stored_axes(op), scale) for op in phase.inputs)
    outputs = tuple(spec(f"{op.name}_", layout(op.axes[0]), scale) for op in phase.outputs)
    return Part(
        name=name,
        file=f"{name}.onnx",
        inputs=inputs,
        outputs=outputs,
        scale=scale,
        halo=None if phase.whole else halo_of(phase, scale),
        context=0,
        mac_per_cell=costs_of(phase, scale).cell_mac,
        whole=phase.whole,
        maps=True,
    )
