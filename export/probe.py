"""Describe the parts of a network: their shapes, reach and cost, from runs on small planes.

Shapes come from four runs whose k, h and w differ by one, reach and cost from `reach.analyse`,
whose plane is large enough that its runs compute no values: at a published width they would take
minutes and gigabytes. An impulse confirms that a changed cell changes nothing beyond the halo.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import CLOCK, CLOCK_SPEC, MIDDLE, Dimension, Part, TensorSpec
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.reach import PLANE, Analysis, analyse, macs

T = TypeVar("T")
BASE = {"k": 1, "h": 3, "w": 4}


def parts_of(model: Model) -> tuple[Part, ...]:
    """Describe every part of a model, in the order in which they run.

    Raises BundleError if a size is not a multiple of k, h or w, or if a cell changes results
    beyond the halo.
    """
    symbols = ("k", "h", "w") if model.any_step else ("h", "w")
    sizes = [BASE, *({**BASE, symbol: BASE[symbol] + 1} for symbol in symbols)]
    runs = [_run(model, **size) for size in sizes]
    parts = []
    for stage, network in model.stages.items():
        late = stage in model.lags
        signatures = {
            kind: _signature(stage, kind, [run[stage, kind] for run in runs], symbols)
            for kind in (model.kinds[-1:] if late else model.kinds)
        }
        scale = min(_along_h(tensors[0]) for tensors in signatures[model.kinds[-1]])
        specs = {
            kind: tuple(tuple(_in_cells(t, scale) for t in side) for side in sides)
            for kind, sides in signatures.items()
        }
        if late:
            specs = {
                kind: ((data, CLOCK_SPEC, *state), outputs)
                for kind, ((data, *state), outputs) in specs.items()
            }
        inputs, _ = specs[model.kinds[-1]]
        frames = 1 if model.geometry.first_slices == 1 else model.geometry.first_frames
        analysis = without_values(functools.partial(_analysis, network, inputs, late, frames))
        if analysis.halo is not None and model.foreign:
            analysis = local_or_whole(network, inputs, analysis)
        elif analysis.halo is not None:
            check_reach(stage, network, inputs, analysis.halo)
        for kind, (inputs, outputs) in specs.items():
            name = f"{stage}_{kind}"
            parts.append(
                Part(
                    name=name,
                    file=f"{name}.onnx",
                    inputs=inputs,
                    outputs=outputs,
                    scale=scale,
                    halo=analysis.halo,
                    context=analysis.context if model.context is None else model.context,
                    mac_per_cell=without_values(
                        functools.partial(_cost, network, kind, inputs, analysis)
                    ),
                    whole=analysis.whole,
                    lag=model.lags.get(stage, 0),
                )
            )
    return tuple(parts)


def without_values(run: Callable[[], T]) -> T:
    """Return what a run finds from shapes alone; code that looks at values gets values."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return run()
    except Exception:  # foreign code raises whatever it likes; with values it says what is wrong
        return run()


def _analysis(
    network: nn.Module, inputs: Sequence[TensorSpec], late: bool, frames: int
) -> Analysis:
    return analyse(network, random_inputs(inputs, PLANE, _dtype(network)), late, frames)


def _cost(network: nn.Module, kind: str, inputs: Sequence[TensorSpec], analysis: Analysis) -> int:
    """Return the multiply-adds per cell; the first frame of a causal network costs less."""
    if kind == "step" or len(inputs) > 1 or inputs[0].shape[2] != 1:
        return analysis.mac_per_cell
    return macs(network, random_inputs(inputs, PLANE, _dtype(network))) // (PLANE * PLANE)


def check_reach(stage: str, network: nn.Module, inputs: Sequence[TensorSpec], halo: int) -> None:
    """Raise BundleError if changing a cell changes results beyond the halo."""
    reach = measure_reach(network, inputs, halo)
    if reach > halo:
        raise BundleError(
            f"expected stage {stage} to reach {halo} cells, as its convolutions do, found "
            f"{reach}: it cannot be tiled; export it as a part that takes the whole plane"
        )


def measure_reach(network: nn.Module, inputs: Sequence[TensorSpec], halo: int) -> int:
    """Change one cell of every input; return how many cells away results change, up to halo + 1."""
    side = 2 * halo + 3
    before = random_inputs(inputs, side, _dtype(network))
    after = [tensor.clone() for tensor in before]
    for tensor, spec in zip(after, inputs, strict=True):
        if spec.name != CLOCK:
            cell = _cell(spec, halo + 1)
            tensor[cell] += 1 + tensor[cell].abs()
    with torch.no_grad():
        results = [network(*given)[0] for given in (before, after)]
    change = (results[1] - results[0]).abs()
    while change.ndim > 2:  # the plane is the last two axes of data
        change = change.amax(0)
    per_cell = change.shape[-1] // side
    change = change.unflatten(0, (side, per_cell)).unflatten(2, (side, per_cell)).amax((1, 3))
    # Fast convolution algorithms spread rounding errors over neighbours; those do not count.
    beyond = (change > 1e-5 * change.max()).nonzero()
    return int((beyond - (halo + 1)).abs().max()) if len(beyond) else 0


def local_or_whole(
    network: nn.Module, inputs: Sequence[TensorSpec], analysis: Analysis
) -> Analysis:
    """Keep the halo of foreign code if an impulse and a tile confirm it; else drop the halo.

    Convolutions alone do not show hand-written statistics over the plane, resampling, or values
    that depend on the position, such as position embeddings.
    """
    assert analysis.halo is not None
    reason = ""
    if measure_reach(network, inputs, analysis.halo) > analysis.halo:
        reason = f"a cell is felt farther than its convolutions reach ({analysis.halo} cells)"
    elif not _tile_equals_whole(network, inputs, analysis.halo):
        reason = "its values depend on the place in the plane"
    return dataclasses.replace(analysis, halo=None, whole=reason) if reason else analysis


def _tile_equals_whole(network: nn.Module, inputs: Sequence[TensorSpec], halo: int) -> bool:
    """Return whether the plane without its first row and column gives the same beyond the halo."""
    plane = random_inputs(inputs, 2 * halo + 3, _dtype(network))
    tile = [
        t if s.name == CLOCK else t[..., (n := _along_h(s)) :, n:]
        for t, s in zip(plane, inputs, strict=True)
    ]
    with torch.no_grad():
        whole, part = network(*plane)[0], network(*(t.contiguous() for t in tile))[0]
    per_cell = whole.shape[-1] // (2 * halo + 3)
    kept = part[..., halo * per_cell :, halo * per_cell :]
    expected = whole[..., (halo + 1) * per_cell :, (halo + 1) * per_cell :]
    return bool((kept - expected).abs().max() <= 1e-4 * expected.abs().max())


Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]  # inputs, outputs


def _run(model: Model, k: int, h: int, w: int) -> dict[tuple[str, str], Any]:
    """Run all stages at one size; returns the shapes of inputs and outputs by (stage, kind)."""
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
                    inputs = [x, *state.get(stage, ())]
                    clock = [torch.zeros(2, dtype=torch.int64)] * (stage in model.lags)
                    with torch.no_grad():
                        results = network(x, *clock, *inputs[1:])
                    sides = ([t.shape for t in inputs], [t.shape for t in results])
                    shapes[stage, kind] = sides
                    x, state[stage] = results[0], results[1:]
    return shapes


def _signature(stage: str, kind: str, runs: list[Any], symbols: Sequence[str]) -> Signature:
    """Return inputs and outputs with symbolic sizes in latent cells, from one run per size."""
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
                    f"{factor}: this network has maps that are not whole cells, so it cannot be "
                    "exported"
                )
            return f"{factor}*{symbol}" if factor > 1 else symbol
    return size


def _along_h(tensor: TensorSpec) -> int:
    """Return the tensor's elements along H per cell, at least 1."""
    return max(1, tensor.factor("h"))


def _in_cells(tensor: TensorSpec, scale: int) -> TensorSpec:
    """Return a spec whose sizes are in the stage's cells instead of latent cells."""
    shape: list[Dimension] = []
    for dimension in tensor.shape:
        factor, _, symbol = str(dimension).rpartition("*")
        if symbol in ("h", "w"):
            cells = int(factor or 1) // scale
            dimension = f"{cells}*{symbol}" if cells > 1 else symbol
        shape.append(dimension)
    return TensorSpec(tensor.name, tuple(shape))


def random_inputs(inputs: Sequence[TensorSpec], side: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random inputs of a part for side x side cells, in the middle of a stream."""
    seeded = torch.Generator().manual_seed(0)
    return [
        torch.tensor(MIDDLE)
        if spec.name == CLOCK
        else torch.randn(spec.sized(1, side, side), generator=seeded, dtype=dtype)
        for spec in inputs
    ]


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def _cell(spec: TensorSpec, at: int) -> tuple[slice, ...]:
    """Return the index of the cell (at, at), for all channels and frames."""
    index = []
    for dimension in spec.shape:
        factor, _, symbol = str(dimension).rpartition("*")
        size = int(factor or 1)
        index.append(slice(at * size, (at + 1) * size) if symbol in ("h", "w") else slice(None))
    return tuple(index)
