"""How a stage runs in segments within a memory limit: rows of strips, and which maps are in a file.

Integers only; no engine is imported. The working memory of a segment is an estimate from the
sizes of its maps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fvae_deploy.export.bundle import TensorSpec
from fvae_deploy.export.program import Program, Segment

# An engine's memory for a strip over that of the maps alive in it: copies in other layouts. Up to
# 3.9 was measured in OpenVINO, for a segment of Stable Diffusion's decoder.
ENGINE = 4.0
COMPILED = 2 << 20  # bytes of a compiled segment, besides its weights and inputs
COMPILING = 0.1  # seconds to compile a segment


@dataclass(frozen=True)
class Pieces:
    """One way to run a stage in segments on a plane of latent cells."""

    plane: tuple[int, int]
    rows: tuple[int, ...]  # of the strips of every segment, in its own cells
    strips: int  # of the segment that has most
    filed: frozenset[str]  # maps that wait in the file
    working: int  # bytes during a run
    keep: bool  # segments stay compiled
    kept: int  # bytes between runs: weights, compiled segments and their inputs
    mac: int  # multiply-adds of a run
    moved: int  # bytes written to the file and read from it
    compiling: float  # seconds of every run
    whole: tuple[str, ...] = ()  # why segments need the whole plane

    def describe(self) -> str:
        """Return the way in a few words."""
        waiting = f", {len(self.filed)} maps in a file" * bool(self.filed)
        whole = f", {len(self.whole)} of them whole" * bool(self.whole)
        return f"in {len(self.rows)} segments{whole} of up to {self.strips} strips{waiting}"


def ways(program: Program, plane: tuple[int, int]) -> Iterator[Pieces]:
    """Yield ways from most memory to least: fewer rows in a strip, and more maps in the file."""
    sizes = {spec.name: _bytes(spec, plane) for spec in program.maps if spec.name != program.data}
    levels = sorted(set(sizes.values()), reverse=True)
    for filed in (set(), *({n for n, s in sizes.items() if s >= level} for level in levels)):
        seen = set()
        limit = max(_needed(s, s.part.scale * plane[0], plane) for s in program.segments)
        while True:
            rows = tuple(_rows(segment, plane, limit) for segment in program.segments)
            if rows not in seen:
                for keep in (True, False):
                    yield _way(program, plane, rows, frozenset(filed), sizes, keep)
            seen.add(rows)
            if not limit:
                break
            limit = int(0.6 * limit)


def _way(
    program: Program,
    plane: tuple[int, int],
    rows: tuple[int, ...],
    filed: frozenset[str],
    sizes: dict[str, int],
    keep: bool,
) -> Pieces:
    """Return the costs of one way."""
    alive, most, mac, moved, strips = {program.data}, 0, 0, 0, 1
    for segment, count in zip(program.segments, rows, strict=True):
        alive |= {name for name in segment.outputs if name in sizes}
        resident = sum(sizes.get(name, 0) for name in alive - filed)
        most = max(most, resident + _needed(segment, count, plane))
        alive -= set(segment.done)
        part, height = segment.part, segment.part.scale * plane[0]
        halo = part.halo or 0
        number = 1 if count >= height else -(-(height - 2 * halo) // (count - 2 * halo))
        strips = max(strips, number)
        share = number * count / height  # rows computed over rows kept
        cells = number * count * part.scale * plane[1]
        mac += cells * (part.mac_per_cell + segment.pair_mac * math.prod(plane))
        moved += sum(int(sizes[name] * share) for name in segment.inputs if name in filed)
        moved += sum(sizes[name] for name in segment.outputs if name in filed)
    kept = 0
    if keep:  # OpenVINO keeps the inputs of all that is compiled
        strips_in = (_inputs(s, n, plane) for s, n in zip(program.segments, rows, strict=True))
        kept = program.weight_bytes + sum(COMPILED + n for n in strips_in)
    else:
        most += program.weight_bytes // len(program.segments) * 2  # of the largest, about
    compiling = 0.0 if keep else COMPILING * len(program.segments)
    return Pieces(
        plane, rows, strips, filed, most, keep, kept, mac, moved, compiling, program.whole
    )


def _needed(segment: Segment, rows: int, plane: tuple[int, int]) -> int:
    """Return the bytes that a strip of rows takes in an engine."""
    whole = math.prod(plane)
    cells = rows * segment.part.scale * plane[1]
    each = ENGINE * segment.cell_bytes + segment.pair_bytes * whole
    return int(each * cells + ENGINE * segment.plane_bytes * whole)


def _inputs(segment: Segment, rows: int, plane: tuple[int, int]) -> int:
    """Return the bytes of a segment's inputs, for a strip of rows."""
    size = (rows, segment.part.scale * plane[1], math.prod(plane))
    return sum(4 * math.prod(spec.sized(1, *size)) for spec in segment.part.inputs)


def _rows(segment: Segment, plane: tuple[int, int], limit: int) -> int:
    """Return the rows of even strips that take at most `limit` bytes, or of the least strips."""
    height, halo = segment.part.scale * plane[0], segment.part.halo
    if halo is None or _needed(segment, height, plane) <= limit:
        return height
    row = _needed(segment, 1, plane) - _needed(segment, 0, plane)
    most = (limit - _needed(segment, 0, plane)) // max(1, row)
    inner = height - 2 * halo
    kept = min(max(1, most - 2 * halo), inner)
    if inner < 1:
        return height
    return min(height, -(-inner // -(-inner // kept)) + 2 * halo)


def _bytes(spec: TensorSpec, plane: tuple[int, int]) -> int:
    return 4 * math.prod(spec.sized(1, *plane))
