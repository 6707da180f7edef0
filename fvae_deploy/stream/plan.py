"""Chooses tile sizes for a memory budget.

Beyond the libraries, a run needs memory for the engine's work, the states of all tiles, the maps
between stages, and the slabs in flight between reader, engine and writer. The engine's working
memory is linear in the cells of a tile, stage by stage (measured at export, in the manifest).
None of this depends on the number of slices. States that do not fit are stored in a file. If the
budget allows, every stage keeps its compiled graph and its working memory; otherwise a `lean`
run releases both for the next stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from fvae_deploy.errors import PlanError
from fvae_deploy.export.bundle import Part
from fvae_deploy.export.manifest import LARGEST, QUANTISED, Manifest, Memory
from fvae_deploy.export.program import Program
from fvae_deploy.parse import show_bytes
from fvae_deploy.stream import pieces
from fvae_deploy.stream.limits import available_bytes
from fvae_deploy.stream.pieces import FILE_SECOND, MAC_SECOND, Pieces
from fvae_deploy.stream.tiles import Grid, fit, smallest

SLABS = 3  # one in use, two that are made or wait
HEADROOM = 1.1  # allocators round up and keep some of what they freed
LEAN = 1.05  # relative time of a lean run: it recompiles first parts per window and reallocates
SHARE = 0.6  # of the free memory that a run takes without a budget
NEVER = 1 << 62  # bytes that no budget has
LIBRARIES = 48 << 20  # codecs, thread stacks and buffers outside the slabs


@dataclass(frozen=True)
class Plan:
    """How one volume goes through the engine: latent frames per step, and tiles."""

    k: int
    grids: dict[str, Grid]  # by stage
    spilled: frozenset[str]  # stages whose states are in a file, not in memory
    lean: bool  # heavy stages release their memory between runs
    predicted_bytes: int
    budget_bytes: int
    step_seconds: float = 0.0  # of one step, on a nominal machine of 100 GFLOP/s
    pieces: dict[str, Pieces] = field(default_factory=dict)  # of the stages in segments

    def describe(self) -> str:
        """Return the plan in one line of text."""
        parts = [
            f"{stage} {self.pieces[stage].describe()}"
            if stage in self.pieces
            else f"{stage} {'whole' if grid.count == 1 else f'{grid.count} tiles'}"
            for stage, grid in self.grids.items()
        ]
        spilled = ", states in a file" * bool(self.spilled)
        frames = f"{self.k} latent frame{'s' * (self.k > 1)} per step"
        return f"{', '.join(parts)}, {frames}{spilled}"


def plan(
    manifest: Manifest,
    directions: tuple[str, ...],
    plane: tuple[int, int],
    *,
    engine: str,
    precision: str,
    memory: int | None = None,
    k: int = 1,
    extents: Mapping[str, Sequence[tuple[int, int]]] = MappingProxyType({}),
    segments: bool = False,
) -> Plan:
    """Choose tiles for a plane of (h, w) latent cells: the least time that fits the budget.

    Without `memory`, the budget is 60 % of the available memory. Stages in `extents` take only
    tiles of those sizes. With `segments`, a stage that was cut may run in segments, except in int8
    and fp8, which are calibrated for whole stages. Raises PlanError with the least budget that is
    enough, or if no tile of a stage fits the plane.
    """
    quantised = precision in QUANTISED
    budget = int(SHARE * available_bytes()) if memory is None else memory
    stages = [
        Stage.of(
            manifest,
            stage,
            plane,
            k,
            engine,
            precision,
            tuple(extents.get(stage, ())),
            segments and not quantised,
        )
        for direction in directions
        for stage in manifest.stages(direction)
    ]
    needed = LIBRARIES + _slabs(manifest, len(directions), plane, k)
    needed += max(stage.map_bytes * stage.whole.cells for stage in stages)
    lean, chosen, taken = _choose_options(stages, budget / HEADROOM - needed, False)
    if int((needed + taken) * HEADROOM) > budget:  # the whole is faster, where it fits
        lean, chosen, taken = _choose_options(stages, budget / HEADROOM - needed, True)
    predicted = int((needed + taken) * HEADROOM)
    if predicted <= budget:
        grids = {stage.name: option.grid for stage, option in zip(stages, chosen, strict=True)}
        spilled = (s.name for s, option in zip(stages, chosen, strict=True) if option.spill)
        seconds = sum(option.seconds for option in chosen)
        cut = {s.name: o.pieces for s, o in zip(stages, chosen, strict=True) if o.pieces}
        return Plan(k, grids, frozenset(spilled), lean, predicted, budget, seconds, cut)
    height, width = (n * manifest.geometry.spatial for n in plane)
    totals = [option.kept + option.working for option in chosen]
    worst = stages[totals.index(max(totals))]
    whole = worst.part.whole if worst.program is None else "; ".join(worst.program.whole)
    reason = f" ({worst.name} cannot be tiled: {whole})" if whole else ""
    able = segments and quantised and any(manifest.program(stage.name) for stage in stages)
    other = ", or use --precision fp32, which can run in segments" if able else ""
    raise PlanError(
        f"expected a memory budget of at least {show_bytes(predicted)} for slices of "
        f"{height}x{width} with {engine} {precision}{reason}, found {show_bytes(budget)}: "
        f"raise --memory{other}"
    )


@dataclass(frozen=True)
class Option:
    """One way to run a stage: its tiles, where its states are stored, and its costs."""

    grid: Grid
    spill: bool
    kept: int  # bytes between runs
    working: int  # bytes during a run, which other stages may use afterwards
    seconds: float
    pieces: Pieces | None = None  # the stage runs in segments


def _choose_options(
    stages: list[Stage], budget: float, segments: bool
) -> tuple[bool, list[Option], int]:
    """Choose options; lean mode only if it saves more time than reallocating costs."""
    cut = [stage.in_segments() if segments else [] for stage in stages]
    lean, ample = (
        _cheapest([s.options(lean) + ways for s, ways in zip(stages, cut, strict=True)], budget)
        for lean in (True, False)
    )
    times = [sum(option.seconds for option in chosen) for chosen, _ in (ample, lean)]
    if ample[1] <= budget and (lean[1] > budget or times[0] <= LEAN * times[1]):
        return False, *ample
    return True, *lean


def _cheapest(options: list[list[Option]], budget: float) -> tuple[list[Option], int]:
    """Choose an option for each stage: least time within the budget, else least bytes.

    Returns the options and the bytes that they take together. Stages use working memory in
    turn, so a common limit on it is tried, lower in each round. For every limit, each byte that
    is kept has a price, the same for all stages; each stage takes the option of least time plus
    price, and the price rises until the sum fits.
    """
    floor = max(min(option.working for option in ways) for ways in options)
    limit = max(option.working for ways in options for option in ways)
    best: tuple[float, list[Option], int] | None = None
    least: tuple[list[Option], int] | None = None
    while True:
        limit = max(limit, floor)
        allowed = [[o for o in ways if o.working <= limit] for ways in options]
        price = 0.0
        while True:
            chosen = [min(ways, key=lambda o: o.seconds + price * o.kept) for ways in allowed]
            taken = sum(o.kept for o in chosen) + max(o.working for o in chosen)
            if taken <= budget or price > 1e9:
                break
            price = 1.5 * price or 1e-13
        seconds = sum(option.seconds for option in chosen)
        if taken <= budget and (best is None or seconds < best[0]):
            best = seconds, chosen, taken
        if least is None or taken < least[1]:
            least = chosen, taken
        if limit == floor:
            return best[1:] if best is not None else least
        limit = int(0.8 * limit)


@dataclass(frozen=True)
class Stage:
    """One stage on one plane: its sizes, costs and measured memory."""

    name: str
    part: Part
    memory: Memory
    plane: tuple[int, int]  # cells of the stage
    k: int
    state_bytes: int  # of one cell, in the precision that it is stored in
    map_bytes: int  # of one cell, input and output
    extents: tuple[tuple[int, int], ...] = ()  # of the tiles that it may use; empty: any
    program: Program | None = None  # how it may run in segments
    first: Program | None = None  # and its first step, if it has states
    segments: Mapping[str, Memory] = field(default_factory=dict)  # what they take, by their parts
    largest: int | None = None  # numbers of a map that the engine no longer takes

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        name: str,
        plane: tuple[int, int],
        k: int,
        engine: str,
        precision: str,
        extents: tuple[tuple[int, int], ...] = (),
        segments: bool = False,
    ) -> Stage:
        """Collect the facts from a manifest, for a plane of latent cells."""
        part = manifest.stage_part(name, first=False)
        program = manifest.program(name) if segments and not extents else None
        first = manifest.program(name, first=True) if program and program.past else None
        return cls(
            name,
            part,
            _measured(manifest, engine, precision, part, name),
            (part.scale * plane[0], part.scale * plane[1]),
            k if part.inputs[0].factor("k") or manifest.geometry.temporal == 1 else 1,
            sum(_bytes(spec.sized(1, 1, 1)) for spec in part.state_inputs)
            // (2 if precision in ("bf16", "fp16") else 1),
            sum(_bytes(spec.sized(k, 1, 1)) for spec in (part.inputs[0], part.outputs[0])),
            extents,
            program,
            first,
            _of_segments(manifest, (program, first), engine, precision),
            LARGEST.get(engine),
        )

    @property
    def whole(self) -> Grid:
        """The grid of one tile."""
        return Grid(*self.plane, self.plane, self.part.halo or 0)

    @property
    def smallest(self) -> Grid:
        """The grid of the smallest possible tiles."""
        return self.whole if self.part.halo is None else smallest(*self.plane, self.part.halo)

    @property
    def latent_plane(self) -> tuple[int, int]:
        """The plane in latent cells."""
        return self.plane[0] // self.part.scale, self.plane[1] // self.part.scale

    @property
    def is_too_large(self) -> bool:
        """Whether the engine refuses maps, or scores of attention, of a stage that was cut."""
        if self.program is None or self.largest is None:
            return False
        height, width = self.latent_plane
        maps = [math.prod(spec.sized(1, height, width)) for spec in self.program.maps]
        pairs = [s.pair_bytes // 4 * s.part.scale**2 for s in self.program.segments]
        return self.k * max(*maps, max(pairs) * (height * width) ** 2) >= self.largest

    def fit(self, cells: int) -> Grid:
        """Return the grid of least work with at most `cells` cells per tile, or the smallest."""
        if self.part.halo is None or cells >= self.whole.cells:
            return self.whole
        return fit(*self.plane, self.part.halo, cells) or self.smallest

    def seconds(self, grid: Grid, spill: bool) -> float:
        """Estimate a step's time on a nominal machine: computing, and moving states to a file."""
        work = self.k * self.part.mac_per_cell * grid.count * grid.cells / MAC_SECOND
        moved = 2 * self.state_bytes * grid.count * grid.cells if spill else 0
        return work + moved / FILE_SECOND

    def _grids(self) -> list[Grid]:
        """Return grids from one tile to the smallest tiles, or those of the given extents."""
        grids: dict[tuple[int, int], Grid] = {}
        if self.extents:
            least = 2 * (self.part.halo or 0)
            for extent in self.extents:
                sides = tuple(zip(extent, self.plane, strict=True))
                tiled = self.part.halo is not None and all(least < a <= b for a, b in sides)
                if tiled or extent == self.plane:
                    grids[extent] = Grid(*self.plane, extent, self.part.halo or 0)
            if not grids:
                raise PlanError(
                    f"expected tiles of {self.name} within {self.plane[0]}x{self.plane[1]} cells, "
                    f"found {', '.join(f'{h}x{w}' for h, w in self.extents)}: run fvae "
                    "build with the --size of these slices, or with --any-size"
                )
            return list(grids.values())
        cells = self.whole.cells
        while cells:
            grid = self.fit(cells)
            grids[grid.extent] = grid
            cells = int(0.85 * cells) if grid != self.smallest else 0
        return list(grids.values())

    def options(self, lean: bool) -> list[Option]:
        """Return the ways to run the stage, from one tile to the smallest tiles."""
        ways, more = [], NEVER if self.is_too_large else 0
        for grid, spill in itertools.product(self._grids(), (False, True)):
            if spill and not self.state_bytes:
                continue
            states = self.state_bytes * grid.cells
            # The measured memory includes one tile's states, as input and as output. With states in
            # a file, the next tile's states are read at the same time.
            working = self.memory.bytes(self.k * grid.cells) + states * spill + more
            kept = 0 if spill else states * (grid.count - 1)
            if self.part.heavy and lean:
                between = min(self.memory.kept or self.memory.fixed, self.memory.fixed)
                working -= between
                kept += between + states * (not spill)
            else:
                working, kept = 0, kept + working
                if self.part.heavy and not self.part.looks_ahead:  # measured without its first part
                    kept += self.memory.bytes(grid.cells)
            ways.append(Option(grid, spill, kept, working, self.seconds(grid, spill)))
        return ways

    def in_segments(self) -> list[Option]:
        """Return the ways to run the stage in segments, those that others surpass left out."""
        if self.program is None:
            return []
        slices = self.k if self.part.inputs[0].factor("k") else 1
        found = []
        for way in pieces.ways(self.program, self.latent_plane, self.segments, self.first):
            seconds = slices * way.seconds
            found.append(Option(self.whole, False, way.kept, way.working, seconds, way))
        found.sort(key=lambda o: (o.seconds, o.working, o.kept))
        best: list[Option] = []
        for option in found:
            if not any(o.working <= option.working and o.kept <= option.kept for o in best):
                best.append(option)
        return best


def _of_segments(
    manifest: Manifest, programs: Sequence[Program | None], engine: str, precision: str
) -> dict[str, Memory]:
    """Return the memory of programs' segments as measured with this engine, or in its fp32."""
    names = {part.name for program in programs if program for part in program.parts}
    found: dict[str, Memory] = {}
    for wanted in ("fp32", precision):
        lines = (m for m in manifest.memory if (m.engine, m.precision) == (engine, wanted))
        found |= {line.stage: line for line in lines if line.stage in names}
    return found


def _slabs(manifest: Manifest, directions: int, plane: tuple[int, int], k: int) -> int:
    """Return the bytes of the slabs in flight: float32 for the model, at most float32 for HU."""
    geometry = manifest.geometry
    slices = max(k * geometry.temporal, geometry.first_slices)
    voxels = slices * plane[0] * plane[1] * geometry.spatial**2
    return SLABS * directions * voxels * (4 * geometry.channels + 4)


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def _measured(manifest: Manifest, engine: str, precision: str, part: Part, stage: str) -> Memory:
    """Return the memory measured with this engine, else the largest measured for this stage."""
    lines = [m for m in manifest.memory if m.stage == stage]
    for wanted in ((engine, precision), (engine, "fp32")):
        for line in lines:
            if (line.engine, line.precision) == wanted:
                return line
    if lines:
        return max(lines, key=lambda m: m.per_cell)
    # Not measured: the widest input or output is a lower bound of the widest layer.
    widths = [_bytes(spec.sized(1, 1, 1)) for spec in (*part.inputs, *part.outputs)]
    return Memory(engine, precision, stage, 64 << 20, 16 * max(widths))
