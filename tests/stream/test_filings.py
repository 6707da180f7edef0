"""Which maps wait in the file: every choice is offered, whatever segments need."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from fvae_deploy.stream.pieces import _filings


def chain(sizes):
    """Return segments, each of which reads the map of the one before, and the maps' sizes."""
    names = [f"map{n}" for n in range(len(sizes))]
    pairs = zip(["x", *names], names, strict=False)
    segments = [SimpleNamespace(inputs=(a,), outputs=(b,), done=(a,)) for a, b in pairs]
    program = SimpleNamespace(past=(), next=(), data="x", segments=segments)
    return program, dict(zip(names, sizes, strict=True))


def needing(*numbers):
    return [SimpleNamespace(working=lambda cells, n=n: n, strip=1) for n in numbers]


def test_two_segments_may_need_the_same_when_one_has_nothing_left_to_file():
    program, sizes = chain([100, 100, 100])
    found = list(_filings(program, sizes, needing(200, 50, 100)))
    assert found[0] == frozenset()
    assert found[-1] == frozenset(sizes)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=8))
def test_from_no_map_to_all_each_set_holds_the_one_before(pairs):
    program, sizes = chain([size for size, _ in pairs])
    found = list(_filings(program, sizes, needing(*(need for _, need in pairs))))
    assert found[0] == frozenset()
    assert found[-1] == frozenset(sizes)
    assert all(a < b for a, b in pairwise(found))
