"""How a stage runs in segments within a memory limit: tiles, and which maps are in a file.

Integers only; no engine is imported. The working memory of a segment is measured at export, or
else estimated from the sizes of its maps.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from types import MappingProxyType

from fvae_deploy.export.bundle import TensorSpec
from fvae_deploy.export.manifest import Memory
from fvae_deploy.export.program import Program, Segment
from fvae_deploy.stream.tiles import fit, smallest

# An engine's memory for a tile over that of the maps alive in it, where it was not measured:
# copies in other layouts.
ENGINE = 4.0
LEAST = 0.5  # and at least: where weights are large, what a cell adds is lost in what was measured
COMPILED = 2 << 20  # bytes of a compiled segment, besides its weights and inputs
PACKED = 2  # the weights of a compiled segment over those in the bundle: 1 to 2.3 were measured
COMPILING, PACKED_SECOND = 0.1, 2e8  # seconds to compile a segment; bytes/s of its weights
CALL = 3e-4  # seconds to start a segment on a tile
SEGMENTED = 1.1  # relative time of a run in segments: copies of tiles, passes
MAC_SECOND, FILE_SECOND = 2e11, 1e9  # multiply-adds/s and bytes/s of a nominal machine
STRIP = 16  # rows that a strip keeps for each row of its halo; below, tiles in the plane do less
ENOUGH = 64  # and at most: more would spare little, and memory that is new costs time
FINER = 0.95  # of the memory that maps need, at which more of them in the file are another way
LARGEST = 1 << 33  # bytes of the maps alive in a tile: none has 2^31 numbers then
TIGHT = 0.8  # of the most memory that maps need at once: filing a map there helps too
WAITING = 2  # tiles of inputs: one in use, one read ahead; of outputs: one made, one written

Extent = tuple[int, int]  # rows and columns of cells that a tile computes


@dataclass(frozen=True)
class Pieces:
    """One way to run a stage in segments on a plane of latent cells."""

    plane: tuple[int, int]
    tiles: tuple[Extent, ...]  # of every segment, in its own cells
    most: int  # tiles of the segment that has most
    filed: frozenset[str]  # maps that wait in the file
    working: int  # bytes during a run
    spare: tuple[int, ...]  # bytes of these that every segment leaves
    keep: frozenset[str]  # parts that stay compiled
    kept: int  # bytes between runs: states, and segments that stay compiled
    mac: int  # multiply-adds of a run
    moved: int  # bytes written to the file and read from it
    starting: float  # seconds of every run for compiling, and for starting on tiles
    whole: tuple[str, ...] = ()  # why segments need the whole plane
    first: Pieces | None = None  # of a stage with states, how its first step runs

    @property
    def seconds(self) -> float:
        """Estimated time of a run, on a nominal machine."""
        return SEGMENTED * self.mac / MAC_SECOND + self.moved / FILE_SECOND + self.starting

    def describe(self) -> str:
        """Return the way in a few words."""
        waiting = f", {len(self.filed)} maps in a file" * bool(self.filed)
        whole = f", {len(self.whole)} of them whole" * bool(self.whole)
        return f"in {len(self.tiles)} segments{whole} of up to {self.most} tiles{waiting}"


@dataclass(frozen=True)
class Costs:
    """What a segment costs on a plane of latent cells."""

    segment: Segment
    plane: tuple[int, int]
    line: Memory | None  # as measured, with the weights
    weights: int = 0  # bytes of the weights

    @functools.cached_property
    def cells(self) -> Extent:
        """The plane in the segment's own cells."""
        scale = self.segment.part.scale
        return scale * self.plane[0], scale * self.plane[1]

    def count(self, extent: Extent) -> int:
        """Return how many tiles of this extent cover the plane."""
        halo = 2 * (self.segment.part.halo or 0)
        sides = zip(self.cells, extent, strict=True)
        return math.prod(1 if a >= n else -(-(n - halo) // (a - halo)) for n, a in sides)

    @functools.cached_property
    def mac(self) -> int:
        """Multiply-adds of a cell of a tile."""
        return self.segment.part.mac_per_cell + self.segment.pair_mac * math.prod(self.plane)

    @functools.cached_property
    def input_bytes(self) -> int:
        """Bytes of a cell of the maps that a tile reads."""
        return _cell_bytes(self.segment.part.inputs)

    @functools.cached_property
    def output_bytes(self) -> int:
        """Bytes of a cell of the maps that a tile writes."""
        return _cell_bytes(self.segment.part.outputs)

    @functools.cached_property
    def per_cell(self) -> float:
        """Bytes for a further cell of a tile."""
        engine = ENGINE * self.segment.cell_bytes
        if self.line is not None:
            engine = max(self.line.per_cell, LEAST * self.segment.cell_bytes)
            engine += WAITING * self.input_bytes
        return (
            engine + WAITING * self.output_bytes + self.segment.pair_bytes * math.prod(self.plane)
        )

    @functools.cached_property
    def fixed(self) -> float:
        """Bytes for a tile without cells."""
        fixed = (1 + PACKED) * self.weights if self.line is None else self.line.fixed
        return fixed + ENGINE * self.segment.plane_bytes * math.prod(self.plane)

    def working(self, cells: int) -> int:
        """Return the bytes that a tile takes in an engine, and on its way in and out."""
        least = 0 if self.line is None else self.line.compiling
        return max(least, int(self.fixed + self.per_cell * cells))

    def kept(self, cells: int) -> int:
        """Return the bytes that stay between runs if the segment stays compiled.

        Some segments keep memory for tiles in OpenVINO; where that was not measured, it is taken
        for as much as the inputs.
        """
        if self.line is not None and self.line.kept_per_cell is not None:
            return max(self.line.kept, COMPILED) + self.line.kept_per_cell * cells
        inputs = self.segment.part.inputs
        small = sum(4 * math.prod(s.sized(1, 1, 1)) for s in inputs if not s.factor("h"))
        small *= math.prod(self.plane) if any(s.factor("n") for s in inputs) else 1
        own = COMPILED + PACKED * self.weights if self.line is None else self.line.kept
        return self.input_bytes * cells + small + own

    def extent(self, limit: float) -> Extent:
        """Return the largest tiles that take at most `limit` bytes, or the smallest there are."""
        height, width = self.cells
        halo = self.segment.part.halo
        cells = int((limit - self.fixed) / max(1.0, self.per_cell))
        alive = self.segment.cell_bytes + self.segment.pair_bytes * math.prod(self.plane)
        cells = min(cells, LARGEST // max(1, alive))
        if halo is None or cells >= height * width:
            return height, width
        kept = min(cells // width - 2 * halo, height - 2 * halo)
        if kept >= max(1, STRIP * halo):  # strips of the whole width, of even heights
            inner = height - 2 * halo
            kept = min(kept, ENOUGH * max(1, halo))
            return -(-inner // -(-inner // kept)) + 2 * halo, width
        return _fitting(height, width, halo, _rounded(cells))

    @property
    def compiling(self) -> float:
        """Seconds to compile the segment."""
        return COMPILING + self.weights / PACKED_SECOND

    @property
    def strip(self) -> int:
        """Cells of a strip of the plane that is long enough for its halo."""
        height, width = self.cells
        halo = self.segment.part.halo
        rows = height if halo is None else (STRIP + 2) * max(1, halo)
        return min(rows, height) * width

    def traffic(self, computed: int, filed: frozenset[str]) -> int:
        """Return the bytes of maps that are read from the file and written to it.

        `computed` are the cells of all tiles together.
        """
        part, cells = self.segment.part, math.prod(self.cells)
        read = sum(
            _cell_bytes((spec,)) * computed
            if spec.factor("h")
            else self.segment.plane_bytes * cells
            for spec, name in zip(part.inputs, self.segment.inputs, strict=True)
            if name in filed
        )
        outputs = zip(part.outputs, self.segment.outputs, strict=True)
        return read + cells * _cell_bytes(tuple(s for s, name in outputs if name in filed))


def _cell_bytes(specs: tuple[TensorSpec, ...]) -> int:
    """Return the bytes of a cell of maps."""
    return sum(4 * math.prod(s.sized(1, 1, 1)) for s in specs if s.factor("h"))


def ways(
    program: Program,
    plane: tuple[int, int],
    memory: Mapping[str, Memory] = MappingProxyType({}),
    first: Program | None = None,
) -> Iterator[Pieces]:
    """Yield ways from most memory to least: smaller tiles, and more maps in the file.

    `memory` is what was measured, by the names of parts. Of a stage with states, `program` is a
    step and `first` the first one, whose segments are not kept. Its states wait in memory or in the
    file, all of them alike.
    """
    if first is None:
        yield from _ways(program, plane, memory, False)
        return
    for spilled in (False, True):
        able = (way for way in _ways(first, plane, memory, spilled) if not way.keep)
        begins: list[Pieces] = []
        for way in sorted(able, key=lambda way: (way.seconds, way.working)):
            if not begins or way.working < begins[-1].working:
                begins.append(way)
        for way in _ways(program, plane, memory, spilled):
            begin = next((b for b in begins if b.working <= way.working), begins[-1])
            yield replace(way, first=begin, working=max(begin.working, way.working))


def _ways(
    program: Program, plane: tuple[int, int], memory: Mapping[str, Memory], spilled: bool
) -> Iterator[Pieces]:
    sizes = {spec.name: _bytes(spec, plane) for spec in program.maps if spec.name != program.data}
    states = frozenset(program.past + program.next)
    share = program.weight_bytes // len(program.parts)
    costs = [
        Costs(s, plane, memory.get(s.part.name), s.weight_bytes or share) for s in program.segments
    ]
    for maps in _filings(program, sizes, costs):
        filed = maps | states if spilled else maps
        resident = _resident(program, sizes, filed)
        waiting: dict[str, int] = {}  # at most, while a part runs: all its runs have the same tiles
        for cost, beside in zip(costs, resident, strict=True):
            name = cost.segment.part.name
            waiting[name] = max(beside, waiting.get(name, 0))
        wholes = (c.working(math.prod(c.cells)) for c in costs)
        limit = max(map(sum, zip(wholes, resident, strict=True)))
        seen = set()
        while True:
            tiles = tuple(c.extent(limit - waiting[c.segment.part.name]) for c in costs)
            if tiles not in seen:
                beside = _state_bytes(program, sizes, filed)
                yield from _kept(program, costs, tiles, filed, resident, beside)
            seen.add(tiles)
            if not limit:
                break
            limit = int(0.7 * limit) if limit > 1 << 16 else 0


def _filings(
    program: Program, sizes: Mapping[str, int], costs: list[Costs]
) -> Iterator[frozenset[str]]:
    """Yield sets of maps to wait in the file, from none to all, each with less in memory at most.

    Where most is needed, beside a strip of the segment that runs, the map is filed that frees
    memory in most such places for each time that it is written or read. A segment without any map
    left to file can only take smaller tiles, and does not count any more.
    """
    states = {*program.past, *program.next}
    able = {name for name in sizes if name not in states}
    alive: list[set[str]] = []
    now: set[str] = set()
    for segment in program.segments:
        now |= able.intersection(segment.outputs)
        alive.append(set(now))
        now -= set(segment.done)
    reads = Counter(name for segment in program.segments for name in set(segment.inputs))
    strips = [c.working(c.strip) for c in costs]
    filed: frozenset[str] = frozenset()
    told = math.inf
    while True:
        needs = [b + n for b, n in zip(_resident(program, sizes, filed), strips, strict=True)]
        left = [(need, names - filed) for need, names in zip(needs, alive, strict=True)]
        most, there = max((pair for pair in left if pair[1]), key=itemgetter(0), default=(0, set()))
        if most <= FINER * told:
            told = most
            yield filed
        if not most:
            break
        tight = [names for names, need in zip(alive, needs, strict=True) if need > TIGHT * most]
        relief = {n: sum(n in names for names in tight) / (1 + reads[n]) for n in there}
        filed |= {max((relief[n], sizes[n], n) for n in there)[-1]}
    if filed != able:
        yield frozenset(able)


def _resident(program: Program, sizes: Mapping[str, int], filed: frozenset[str]) -> list[int]:
    """Return the bytes of the maps in memory while each segment runs, beside a set of states."""
    alive, resident = {program.data, *program.past}, []
    states = _state_bytes(program, sizes, filed)
    for segment in program.segments:
        alive |= {name for name in segment.outputs if name in sizes}
        resident.append(max(0, sum(sizes.get(name, 0) for name in alive - filed) - states))
        alive -= set(segment.done)
    return resident


def _state_bytes(program: Program, sizes: Mapping[str, int], filed: frozenset[str]) -> int:
    """Return the bytes of the states that wait in memory for the next step."""
    return sum(sizes[name] for name in program.next if name not in filed)


def _kept(
    program: Program,
    costs: list[Costs],
    tiles: tuple[Extent, ...],
    filed: frozenset[str],
    resident: list[int],
    states: int,
) -> Iterator[Pieces]:
    """Yield ways with all segments compiled for good, with fewer of them, and with none.

    The `states`' bytes are kept in any case.
    """
    pairs = list(zip(costs, tiles, strict=True))
    counts = [c.count(tile) for c, tile in pairs]
    computed = [n * math.prod(tile) for n, tile in zip(counts, tiles, strict=True)]
    working = [r + c.working(math.prod(tile)) for (c, tile), r in zip(pairs, resident, strict=True)]
    mac = sum(n * c.mac for c, n in zip(costs, computed, strict=True))
    moved = sum(c.traffic(n, filed) for c, n in zip(costs, computed, strict=True)) if filed else 0
    kept = {c.segment.part.name: c.kept(math.prod(tile)) for c, tile in pairs}
    order = sorted(kept, key=kept.__getitem__)
    for count in sorted({len(order) * quarters // 4 for quarters in range(5)}, reverse=True):
        keep = frozenset(order[:count])
        dropped = sum(c.compiling for c in costs if c.segment.part.name not in keep)
        # What a segment keeps is counted there, not once more while it runs.
        needs = [
            max(0, need - kept[c.segment.part.name] * (c.segment.part.name in keep))
            for c, need in zip(costs, working, strict=True)
        ]
        most = max(needs)
        yield Pieces(
            costs[0].plane,
            tiles,
            max(counts),
            filed,
            most,
            tuple(most - need for need in needs),
            keep,
            states + sum(kept[name] for name in keep),
            mac,
            moved,
            CALL * sum(counts) + dropped,
            program.whole,
        )


@functools.lru_cache(maxsize=4096)
def _fitting(height: int, width: int, halo: int, cells: int) -> Extent:
    return (fit(height, width, halo, cells) or smallest(height, width, halo)).extent


def _rounded(cells: int) -> int:
    """Return a number of cells rounded down to three bits, so that few are tried."""
    shift = max(0, cells.bit_length() - 3)
    return max(0, cells >> shift << shift)


def _bytes(spec: TensorSpec, plane: tuple[int, int]) -> int:
    return 4 * math.prod(spec.sized(1, *plane))
