"""Exact in-plane tiling, as pure integer arithmetic.

A tile computes more than it keeps. Next to another tile it computes `halo` extra cells,
the network's reach, and discards them. At the true border of the image there is no halo,
so the network's own padding applies there. All tiles of an axis have the same extent, so
one compiled graph serves all of them.

    length 20, extent 10, halo 2        kept cells are marked by the tile's letter

    cell    0 1 2 3 4 5 6 7 8 9 . . . . . . . . . 19
    A       A A A A A A A A h h                          read  0:10  keep  0:8
    B                   h h B B B B B B h h              read  6:16  keep  8:14
    C                           h h h h C C C C C C      read 10:20  keep 14:20

The last tile moves back to end with the image, so its halo may be wider than needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One axis of a tile: the cells [start, stop) it computes and those it keeps."""

    read: tuple[int, int]
    keep: tuple[int, int]

    @property
    def crop(self) -> tuple[int, int]:
        """The kept cells, counted from the first computed one."""
        return self.keep[0] - self.read[0], self.keep[1] - self.read[0]


@dataclass(frozen=True)
class Tile:
    """A rectangle of latent cells along H and W."""

    rows: Span
    columns: Span


@dataclass(frozen=True)
class Grid:
    """A plane of h x w latent cells, cut into tiles of one extent."""

    height: int
    width: int
    extent: tuple[int, int]
    halo: int

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles, row by row."""
        rows = spans(self.height, self.extent[0], self.halo)
        columns = spans(self.width, self.extent[1], self.halo)
        return tuple(Tile(row, column) for row in rows for column in columns)

    @property
    def count(self) -> int:
        """Number of tiles."""
        rows = spans(self.height, self.extent[0], self.halo)
        return len(rows) * len(spans(self.width, self.extent[1], self.halo))

    @property
    def borders(self) -> tuple[list[int], list[int]]:
        """The cells at which rows and columns of tiles begin, without the first."""
        rows = spans(self.height, self.extent[0], self.halo)
        columns = spans(self.width, self.extent[1], self.halo)
        return [span.keep[0] for span in rows[1:]], [span.keep[0] for span in columns[1:]]

    @property
    def cells(self) -> int:
        """Cells that one tile computes."""
        return self.extent[0] * self.extent[1]

    @property
    def overhead(self) -> float:
        """Cells computed over cells kept: 1.0 for an untiled plane."""
        return self.count * self.cells / (self.height * self.width)


def spans(length: int, extent: int, halo: int) -> tuple[Span, ...]:
    """Cut an axis of `length` cells into spans of `extent` cells that keep every cell once.

    Raises ValueError if the extent leaves no cells to keep between two halos.
    """
    if extent >= length:
        return (Span((0, length), (0, length)),)
    if extent <= 2 * halo:
        raise ValueError(f"expected more than {2 * halo} cells for two halos, found {extent}")
    cut, covered = [], 0
    while covered < length:
        start = min(max(covered - halo, 0), length - extent)
        stop = start + extent
        end = length if stop == length else stop - halo
        cut.append(Span((start, stop), (covered, end)))
        covered = end
    return tuple(cut)


def fit(height: int, width: int, halo: int, cells: int) -> Grid | None:
    """Return the grid of least total work with at most `cells` computed cells per tile.

    Returns None if even tiles that keep a single cell are larger.
    """
    down, across = _extents(height, halo), _extents(width, halo)
    fitting = [
        (row_work * column_work, -rows * columns, (rows, columns))
        for rows, row_work in down.items()
        for columns, column_work in across.items()
        if rows * columns <= cells
    ]
    return Grid(height, width, min(fitting)[2], halo) if fitting else None


def smallest(height: int, width: int, halo: int) -> Grid:
    """Return the grid of the smallest possible tiles: one kept cell between halos."""
    least = 2 * halo + 1
    return Grid(height, width, (min(height, least), min(width, least)), halo)


def _extents(length: int, halo: int) -> dict[int, int]:
    """Map the least extent for every number of spans to the number of cells computed."""
    inner = length - 2 * halo
    computed = {length: length}
    for count in range(2, inner + 1):
        extent = math.ceil(inner / count) + 2 * halo
        computed.setdefault(extent, count * extent)  # more spans of one extent are not needed
    return computed
