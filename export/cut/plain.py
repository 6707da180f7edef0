"""Run a program in torch as plainly as possible: all maps in memory, every pass over a whole map.

It is what the cutter is tested with, and export checks every program with it before writing it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import CLOCK, TensorSpec
from fvae_deploy.export.cut.cutter import Cut
from fvae_deploy.export.program import Pass, Segment


def run_plain(
    cut: Cut,
    x: Tensor,
    shape: tuple[int, ...],
    plane: tuple[int, int],
    tile: int,
    past: Sequence[Tensor] = (),
    clock: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run a program on x, for a plane of latent cells, in tiles that keep `tile` latent cells.

    Returns the result in the given shape, and the states as they are stored, which are the `past`
    of the next step.
    """
    program = cut.program
    specs = {spec.name: spec for spec in program.maps}
    maps = {program.data: x.reshape(_sized(specs[program.data], plane))}
    maps |= dict(zip(program.past, past, strict=True))
    values = {} if clock is None else {CLOCK: clock}
    for name in (program.data, *program.past):
        _passes(program.passes, name, maps, values)
    for segment in program.segments:
        _segment(cut.modules[segment.part.name], segment, maps, values, plane, tile)
        for name in segment.outputs:
            if maps[name].dtype != x.dtype:
                found = str(maps[name].dtype).removeprefix("torch.")
                raise BundleError(
                    f"expected maps of floating-point numbers, found a map of {found}"
                )
        for name in segment.outputs:
            _passes(program.passes, name, maps, values)
        for name in segment.done:
            del maps[name]
    return maps[program.result].reshape(shape), [maps[name] for name in program.next]


def _sized(spec: TensorSpec, plane: tuple[int, int]) -> tuple[int, ...]:
    return spec.sized(1, *plane, math.prod(plane))


def _segment(
    module: Any, segment: Segment, maps: dict[str, Tensor], values: Mapping[str, Tensor],
    plane: tuple[int, int], tile: int,
) -> None:  # fmt: skip
    part = segment.part
    height, width = (part.scale * n for n in plane)
    halo = max(height, width) if part.halo is None else part.halo
    step = max(height, width) if part.halo is None else tile * part.scale
    for top in range(0, height, step):
        for left in range(0, width, step):
            rows = _span(top, step, halo, height)
            columns = _span(left, step, halo, width)
            given = []
            for spec, name in zip(part.inputs, segment.inputs, strict=True):
                value = values[name] if name in values else maps[name]
                if spec.factor("n"):
                    value = value.reshape(_sized(spec, plane))
                given.append(value[index(spec, rows[0], columns[0])])
            with torch.no_grad():
                results = module(*given)
            for spec, name, result in zip(part.outputs, segment.outputs, results, strict=True):
                if name not in maps:
                    full = spec.sized(1, height, width)
                    number = math.nan if result.is_floating_point() else 0
                    maps[name] = torch.full(full, number, dtype=result.dtype)
                read = (span[0][1] - span[0][0] for span in (rows, columns))
                result = result.reshape(spec.sized(1, *read))
                kept = result[index(spec, rows[1], columns[1])]
                maps[name][index(spec, rows[2], columns[2])] = kept


def _span(start: int, step: int, halo: int, length: int) -> tuple[tuple[int, int], ...]:
    """Return the cells of a tile that are read; those kept, within the tile; those in the plane."""
    stop = min(start + step, length)
    begin, end = max(start - halo, 0), min(stop + halo, length)
    return (begin, end), (start - begin, stop - begin), (start, stop)


def index(spec: TensorSpec, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[slice, ...]:
    """Return the index of a range of cells in a tensor."""
    found = []
    for dimension in spec.shape:
        factor, _, symbol = str(dimension).rpartition("*")
        span = {"h": rows, "w": columns}.get(symbol)
        size = int(factor or 1)
        found.append(slice(size * span[0], size * span[1]) if span else slice(None))
    return tuple(found)


def _passes(
    passes: tuple[Pass, ...], source: str, maps: Mapping[str, Tensor], values: dict[str, Tensor]
) -> None:
    for each in passes:
        if (
            source not in (each.source, each.other)
            or not {each.source, each.other or source} <= maps.keys()
        ):
            continue
        x, axes = maps[each.source], list(each.axes)
        if each.kind == "product":
            values[each.name] = _product(x, maps[each.other], *axes)
            continue
        if each.groups > 1:
            x = x.unflatten(each.split, (each.groups, -1))
            axes = [each.split + 1, *(a + (a > each.split) for a in axes)]
        if each.kind == "variance":
            values[each.name] = x.var(axes, correction=0)
        elif each.kind in ("max", "min"):
            values[each.name] = getattr(x, f"a{each.kind}")(axes)
        else:
            values[each.name] = getattr(x, each.kind)(axes)


def _product(a: Tensor, b: Tensor, batch: int, rows: int) -> Tensor:
    """Multiply matrices, summing over all axes that the two share after the batch."""
    shared = a.shape[batch + rows :]
    columns = b.shape[batch + len(shared) :]
    count = math.prod(a.shape[:batch])
    left = a.reshape(count, -1, math.prod(shared))
    result = left @ b.reshape(count, math.prod(shared), -1)
    return result.reshape(*a.shape[: batch + rows], *columns)
