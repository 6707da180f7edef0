"""Tiles keep every cell once, compute enough around what they keep, and no more than allowed."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fvae_deploy.stream.tiles import Grid, Span, fit, smallest, spans

LENGTHS, HALOS = st.integers(1, 70), st.integers(0, 7)


@st.composite
def axes(draw):
    length, halo = draw(LENGTHS), draw(HALOS)
    return length, draw(st.integers(2 * halo + 1, 90)), halo


@given(axes())
def test_every_cell_is_kept_once_and_in_order(axis):
    length = axis[0]
    kept = [cell for span in spans(*axis) for cell in range(*span.keep)]
    assert kept == list(range(length))


@given(axes())
def test_every_span_computes_its_kept_cells_and_a_halo_except_at_the_border(axis):
    length, _, halo = axis
    for span in spans(*axis):
        assert span.read[0] <= max(span.keep[0] - halo, 0)
        assert span.read[1] >= min(span.keep[1] + halo, length)
        assert 0 <= span.read[0] <= span.keep[0] < span.keep[1] <= span.read[1] <= length


@given(axes())
def test_all_spans_compute_the_same_extent(axis):
    length, extent, _ = axis
    assert {span.read[1] - span.read[0] for span in spans(*axis)} == {min(extent, length)}


@given(axes())
def test_there_are_no_more_spans_than_needed(axis):
    length, extent, halo = axis
    needed = 1 if extent >= length else -(-(length - 2 * halo) // (extent - 2 * halo))
    assert len(spans(*axis)) == needed


@given(axes())
def test_a_crop_counts_from_the_first_computed_cell(axis):
    for span in spans(*axis):
        assert tuple(range(*span.read)[slice(*span.crop)]) == tuple(range(*span.keep))


@given(HALOS, st.data())
def test_an_extent_that_keeps_nothing_between_two_halos_is_refused(halo, data):
    extent = data.draw(st.integers(0, 2 * halo))
    length = data.draw(st.integers(extent + 1, extent + 40))
    with pytest.raises(ValueError, match=f"more than {2 * halo} cells.*found {extent}"):
        spans(length, extent, halo)


def test_the_worked_example_of_the_docstring_holds():
    assert spans(20, 10, 2) == (
        Span((0, 10), (0, 8)),
        Span((6, 16), (8, 14)),
        Span((10, 20), (14, 20)),
    )


@given(LENGTHS, LENGTHS, st.integers(0, 4), st.data())
def test_the_tiles_of_a_grid_paint_the_plane_once(height, width, halo, data):
    extent = data.draw(st.tuples(*[st.integers(2 * halo + 1, 2 * halo + 40)] * 2))
    grid = Grid(height, width, extent, halo)
    painted = np.zeros((height, width), int)
    for tile in grid.tiles:
        painted[slice(*tile.rows.keep), slice(*tile.columns.keep)] += 1
    assert (painted == 1).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 4), st.integers(1, 1700))
@example(1, 27, 1, 9)  # five tiles of 7 cells are less work than four of 9
def test_fit_is_the_grid_of_least_work_among_all_that_are_within_the_limit(h, w, halo, cells):
    def work(grid):
        return len(grid.tiles) * grid.cells

    def extents(length):
        return [e for e in range(1, length + 1) if e == length or e > 2 * halo]

    best = min(
        (
            work(Grid(h, w, (rows, columns), halo))
            for rows in extents(h)
            for columns in extents(w)
            if rows * columns <= cells
        ),
        default=None,
    )
    found = fit(h, w, halo, cells)
    if best is None:
        assert found is None
    else:
        assert found.cells <= cells
        assert work(found) == best


@given(LENGTHS, LENGTHS, HALOS)
def test_an_untiled_plane_costs_nothing_more(height, width, halo):
    grid = fit(height, width, halo, height * width)
    assert len(grid.tiles) == 1
    assert grid.overhead == 1.0


@given(LENGTHS, LENGTHS, HALOS)
def test_no_tile_is_smaller_than_the_smallest(height, width, halo):
    grid = smallest(height, width, halo)
    assert grid.tiles  # it can be cut
    assert fit(height, width, halo, grid.cells - 1) is None
    assert fit(height, width, halo, grid.cells).cells <= grid.cells


@given(LENGTHS, LENGTHS, st.integers(0, 4), st.integers(1, 2000))
def test_a_larger_limit_never_means_more_work(height, width, halo, cells):
    small, large = fit(height, width, halo, cells), fit(height, width, halo, cells + 100)
    assume(small is not None)
    assert large.overhead <= small.overhead
