"""A phase as a part: its cells, halo, inputs and outputs, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from fvae_deploy.export.bundle import CLOCK, CLOCK_SPEC, Dimension, Part, TensorSpec
from fvae_deploy.export.cut.axes import SIZES, Atom, Axes
from fvae_deploy.export.cut.emit import VIEWED
from fvae_deploy.export.cut.lower import Op, packet_name
from fvae_deploy.export.cut.phases import Phase, is_spatial, scale_of
from fvae_deploy.export.cut.storage import Storage


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


def part_of(phase: Phase, name: str, storage: Storage) -> Part:
    """Describe a phase as a part of a bundle."""
    scale = scale_of(phase)
    inputs = tuple(
        CLOCK_SPEC if op.name == CLOCK else spec(op.name, storage.axes(op), scale)
        for op in phase.inputs
    )
    outputs = tuple(spec(f"{op.name}_", storage.axes(op), scale) for op in phase.outputs)
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
