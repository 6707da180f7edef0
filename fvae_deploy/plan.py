"""From a memory budget to slab and tile sizes.

What a run needs beyond the libraries is the engine's working memory, linear in the latent
cells of a tile (measured at export, in the manifest), the states of all tiles, and the slabs
in flight between reader, engine and writer. None of it depends on the number of slices.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fvae_deploy.errors import PlanError, UsageError
from fvae_deploy.export.manifest import Manifest, Memory
from fvae_deploy.tiles import Grid, fit, smallest

SLABS = 4  # being made, two waiting, being used
HEADROOM = 1.1  # allocators round up and keep some of what they freed
LIBRARIES = 48 << 20  # codecs, thread stacks and buffers outside the slabs
UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Plan:
    """How one volume goes through the engine: latent frames a step, and tiles."""

    k: int
    grids: dict[str, Grid]  # by direction, "encode" and "decode"
    predicted_bytes: int
    budget_bytes: int

    def describe(self) -> str:
        """One line for people."""
        parts = [
            f"{direction} {'whole' if len(grid.tiles) == 1 else f'{len(grid.tiles)} tiles'}"
            for direction, grid in self.grids.items()
        ]
        return f"{', '.join(parts)}, {self.k} latent frame{'s' * (self.k > 1)} a step"


def parse_bytes(text: str) -> int:
    """Read "700MiB", "2GiB", "1.5 GB" or bytes; raises UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else ""
    unit = {"K": "KIB", "M": "MIB", "G": "GIB", "B": ""}.get(unit, unit)
    if not match or unit not in UNITS:
        raise UsageError(f"expected an amount of memory like 700MiB or 2GiB, found {text!r}")
    return int(float(match.group(1)) * UNITS[unit])


def show_bytes(count: int) -> str:
    """Bytes for people, rounded up, so that what is shown suffices: "700 MiB"."""
    if count < 2**30:
        return f"{-(-count // 2**20)} MiB"
    return f"{-(-100 * count // 2**30) / 100:.2f} GiB"


def available_bytes() -> int:
    """Memory that this process may still take: the system's, or its container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # the page cache gives way too
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", text).group(1)) * 1024  # type: ignore[union-attr]
    except (OSError, AttributeError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        free = min(free, limit - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def plan(
    manifest: Manifest,
    directions: tuple[str, ...],
    plane: tuple[int, int],
    *,
    engine: str,
    precision: str,
    memory: int | None = None,
    k: int = 1,
) -> Plan:
    """Choose tiles for a plane of (h, w) latent cells.

    Without `memory`, 60 % of what is available is the budget. Raises PlanError with the least
    budget that would do.
    """
    budget = int(0.6 * available_bytes()) if memory is None else memory
    halos = {d: manifest.part(f"{d}_step").halo for d in directions}
    cells, best = plane[0] * plane[1], None
    while best is None or cells >= 1:
        # One limit on the cells of a tile serves both directions.
        grids = {d: fit(*plane, halos[d], cells) or smallest(*plane, halos[d]) for d in directions}
        needed = _predict(manifest, grids, plane, k, engine, precision)
        if needed <= budget:
            return Plan(k, grids, needed, budget)
        # Ever smaller tiles cost more at last: each has halos, and its halos have states.
        best = needed if best is None else min(best, needed)
        cells = int(cells * 0.8)
    height, width = (n * manifest.geometry.spatial for n in plane)
    raise PlanError(
        f"expected a memory budget of at least {show_bytes(best)} for slices of {height}x{width} "
        f"with {engine} {precision}, found {show_bytes(budget)}: raise --memory"
    )


def _predict(
    manifest: Manifest,
    grids: dict[str, Grid],
    plane: tuple[int, int],
    k: int,
    engine: str,
    precision: str,
) -> int:
    """Peak bytes beyond the libraries' baseline."""
    geometry = manifest.geometry
    total = float(LIBRARIES)
    for direction, grid in grids.items():
        measured = _measured(manifest, engine, precision, direction)
        total += measured.fixed + measured.per_cell * k * grid.cells
        state = sum(
            _bytes(s.sized(1, 1, 1)) for s in manifest.part(f"{direction}_step").state_inputs
        )
        total += state * grid.cells * (len(grid.tiles) - 1)
    voxels = k * geometry.temporal * plane[0] * plane[1] * geometry.spatial**2
    # A slab is float32 for the model and up to float32 in HU, on its way in and on its way out.
    total += SLABS * len(grids) * voxels * (4 * geometry.channels + 4)
    return int(total * HEADROOM)


def _bytes(shape: tuple[int, ...]) -> int:
    count = 4
    for size in shape:
        count *= size
    return count


def _measured(manifest: Manifest, engine: str, precision: str, direction: str) -> Memory:
    """Find the line measured for this engine, else the most expensive of this direction."""
    lines = [m for m in manifest.memory if m.direction == direction]
    exact = [m for m in lines if (m.engine, m.precision) == (engine, precision)]
    if exact:
        return exact[0]
    if lines:
        return max(lines, key=lambda m: m.per_cell)
    # Never measured: the widest state is a floor for the widths of all layers.
    widths = [_bytes(s.sized(1, 1, 1)) for s in manifest.part(f"{direction}_step").state_inputs]
    return Memory(engine, precision, direction, 64 << 20, 16 * max(widths, default=1 << 10))
