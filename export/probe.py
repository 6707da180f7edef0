"""Parts of a network's stages: shapes, reach and cost, found by running them small.

Shapes are read off four runs that differ in k, h and w by one; reach and cost by
`reach.analyse`; and an impulse confirms that nothing beyond the halo feels a cell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Dimension, Part, TensorSpec
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.reach import PLANE, Analysis, analyse, macs

BASE = {"k": 1, "h": 3, "w": 4}


def parts_of(model: Model) -> tuple[Part, ...]:
    """Describe every part of a model, in the order in which they run.

    Raises BundleError when a shape is no multiple of k, h or w, or a cell is felt beyond the
    halo.
    """
    symbols = ("k", "h", "w") if model.any_step else ("h", "w")
    grown = [BASE, *({**BASE, symbol: BASE[symbol] + 1} for symbol in symbols)]
    runs = [_run(model, **sizes) for sizes in grown]
    parts = []
    for stage, network in model.stages.items():
        made = {
            kind: _signature(stage, kind, [run[stage, kind] for run in runs], symbols)
            for kind in model.kinds
        }
        scale = min(_along_h(tensors[0]) for tensors in made[model.kinds[-1]])
        specs = {
            kind: tuple(tuple(_in_cells(t, scale) for t in side) for side in sides)
            for kind, sides in made.items()
        }
        inputs, _ = specs[model.kinds[-1]]
        given = _random(inputs, PLANE, _dtype(network))
        frames = 1 if model.geometry.first_slices == 1 else model.geometry.first_frames
        found = analyse(network, given[0], given[1:], frames)
        if found.halo is not None and model.foreign:
            found = local_or_whole(network, inputs, found)
        elif found.halo is not None:
            check_reach(stage, network, inputs, found.halo)
        for kind, (inputs, outputs) in specs.items():
            name = f"{stage}_{kind}"
            parts.append(
                Part(
                    name=name,
                    file=f"{name}.onnx",
                    inputs=inputs,
                    outputs=outputs,
                    scale=scale,
                    halo=found.halo,
                    context=found.context,
                    mac_per_cell=_cost(network, kind, inputs, found),
                    whole=found.whole,
                )
            )
    return tuple(parts)


def _cost(network: nn.Module, kind: str, inputs: Sequence[TensorSpec], found: Analysis) -> int:
    """Multiply-adds a cell: the first frame of a causal stream has less to do than others."""
    if kind == "step" or len(inputs) > 1 or inputs[0].shape[2] != 1:
        return found.mac_per_cell
    return macs(network, _random(inputs, PLANE, _dtype(network))[0], ()) // (PLANE * PLANE)


def check_reach(stage: str, network: nn.Module, inputs: Sequence[TensorSpec], halo: int) -> None:
    """See that nothing beyond the halo feels a cell; raises BundleError when it does."""
    reach = felt(network, inputs, halo)
    if reach > halo:
        raise BundleError(
            f"expected stage {stage} to reach {halo} cells, as its convolutions do, found "
            f"{reach}: it cannot be tiled; export it as one whole part"
        )


def felt(network: nn.Module, inputs: Sequence[TensorSpec], halo: int) -> int:
    """Change one cell of every input; how many cells away that is felt, up to halo + 1."""
    side = 2 * halo + 3
    before = _random(inputs, side, _dtype(network))
    after = [tensor.clone() for tensor in before]
    for tensor, spec in zip(after, inputs, strict=True):
        cell = _cell(spec, halo + 1)
        tensor[cell] += 1 + tensor[cell].abs()
    with torch.no_grad():
        results = [network(*given)[0] for given in (before, after)]
    change = (results[1] - results[0]).abs()
    while change.ndim > 2:  # the plane is the last two axes of data
        change = change.amax(0)
    per_cell = change.shape[-1] // side
    change = change.unflatten(0, (side, per_cell)).unflatten(2, (side, per_cell)).amax((1, 3))
    # Fast convolutions spread rounding over neighbours: that is no reach.
    beyond = (change > 1e-5 * change.max()).nonzero()
    return int((beyond - (halo + 1)).abs().max()) if len(beyond) else 0


def local_or_whole(network: nn.Module, inputs: Sequence[TensorSpec], found: Analysis) -> Analysis:
    """Keep the halo of foreign code where impulse and tile confirm it, else take it whole.

    Convolutions alone do not tell of statistics over the plane that are taken by hand, of
    resampling, or of values that depend on the place, such as position embeddings.
    """
    assert found.halo is not None
    reason = ""
    if felt(network, inputs, found.halo) > found.halo:
        reason = f"a cell is felt farther than its convolutions reach ({found.halo} cells)"
    elif not _tile_equals_whole(network, inputs, found.halo):
        reason = "its values depend on the place in the plane"
    return dataclasses.replace(found, halo=None, whole=reason) if reason else found


def _tile_equals_whole(network: nn.Module, inputs: Sequence[TensorSpec], halo: int) -> bool:
    """Leave out the plane's first row and column of cells: the rest stays, but for the halo."""
    plane = _random(inputs, 2 * halo + 3, _dtype(network))
    tile = [t[..., (n := _along_h(s)) :, n:] for t, s in zip(plane, inputs, strict=True)]
    with torch.no_grad():
        whole, part = network(*plane)[0], network(*(t.contiguous() for t in tile))[0]
    per_cell = whole.shape[-1] // (2 * halo + 3)
    kept = part[..., halo * per_cell :, halo * per_cell :]
    expected = whole[..., (halo + 1) * per_cell :, (halo + 1) * per_cell :]
    return bool((kept - expected).abs().max() <= 1e-4 * expected.abs().max())


Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]  # inputs, outputs


def _run(model: Model, k: int, h: int, w: int) -> dict[tuple[str, str], Any]:
    """Run all stages at one size; returns shapes of inputs and outputs by (stage, kind)."""
    g, shapes, dtype = model.geometry, {}, _dtype(next(iter(model.stages.values())))
    for direction in ("encode", "decode"):
        state: dict[str, Sequence[Tensor]] = {}
        for kind in model.kinds:
            first = kind == "first"
            frames = g.first_frames if first else k
            slices = g.first_slices if first else k * g.temporal
            x = (
                torch.zeros(1, g.channels, slices, h * g.spatial, w * g.spatial, dtype=dtype)
                if direction == "encode"
                else torch.zeros(1, g.latent_channels, frames, h, w, dtype=dtype)
            )
            for stage, network in model.stages.items():
                if stage.startswith(direction):
                    given = [x, *state.get(stage, ())]
                    with torch.no_grad():
                        results = network(*given)
                    sides = ([t.shape for t in given], [t.shape for t in results])
                    shapes[stage, kind] = sides
                    x, state[stage] = results[0], results[1:]
    return shapes


def _signature(stage: str, kind: str, runs: list[Any], symbols: Sequence[str]) -> Signature:
    """Symbolic shapes, still in latent cells, from the shapes of a run at every size."""
    data = ("x", "z") if stage.startswith("encode") else ("z", "x")
    sides = []
    for side in (0, 1):
        tensors = []
        for i, base in enumerate(runs[0][side]):
            grown = [run[side][i] for run in runs[1:]]
            shape = tuple(
                _dimension(size, {s: g[axis] for s, g in zip(symbols, grown, strict=True)})
                for axis, size in enumerate(base)
            )
            name = data[side] if i == 0 else f"{('past', 'next')[side]}{i - 1}"
            tensors.append(TensorSpec(name, shape))
        sides.append(tuple(tensors))
    return sides[0], sides[1]


def _dimension(size: int, grown: Mapping[str, int]) -> Dimension:
    for symbol, larger in grown.items():
        if larger != size:
            factor = larger - size
            if factor * BASE[symbol] != size:
                raise BundleError(
                    f"expected sizes that are multiples of {symbol}, found {size} growing by "
                    f"{factor}: this network's maps are not whole cells"
                )
            return f"{factor}*{symbol}" if factor > 1 else symbol
    return size


def _along_h(tensor: TensorSpec) -> int:
    return max(1, tensor.factor("h"))


def _in_cells(tensor: TensorSpec, scale: int) -> TensorSpec:
    """Express a shape in the stage's cells instead of latent cells."""
    shape: list[Dimension] = []
    for dimension in tensor.shape:
        factor, _, symbol = str(dimension).rpartition("*")
        if symbol in ("h", "w"):
            cells = int(factor or 1) // scale
            dimension = f"{cells}*{symbol}" if cells > 1 else symbol
        shape.append(dimension)
    return TensorSpec(tensor.name, tuple(shape))


def _random(inputs: Sequence[TensorSpec], side: int, dtype: torch.dtype) -> list[Tensor]:
    seeded = torch.Generator().manual_seed(0)
    shapes = (spec.sized(1, side, side) for spec in inputs)
    return [torch.randn(shape, generator=seeded, dtype=dtype) for shape in shapes]


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _cell(spec: TensorSpec, at: int) -> tuple[slice, ...]:
    """Index of one cell (at, at), all channels and frames."""
    index = []
    for dimension in spec.shape:
        factor, _, symbol = str(dimension).rpartition("*")
        size = int(factor or 1)
        index.append(slice(at * size, (at + 1) * size) if symbol in ("h", "w") else slice(None))
    return tuple(index)
