"""Progress within a step: whole slices, as many as there are, however the work is shared out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fvae_deploy.stream.within import StepProgress


@given(
    slices=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    macs=st.lists(st.integers(1, 1000), min_size=1, max_size=3),
    tiles=st.integers(1, 40),
)
def test_a_step_tells_all_its_slices_and_never_more(
    slices: list[int], macs: list[int], tiles: int
) -> None:
    told: list[int] = []
    ways: Any = {f"stage{i}": SimpleNamespace(mac=mac) for i, mac in enumerate(macs)}
    progress = StepProgress(told.append, ways)
    for step, count in enumerate(slices):
        progress.begin(count)
        for stage in ways:
            for _ in range(tiles):
                progress.add(stage, 1 / tiles)
                assert sum(told) <= max(0, sum(slices[: step + 1]) - (count > 0))
        if count > 1 and tiles > 1:  # an hour of work is not silent
            assert sum(told) == sum(slices[: step + 1]) - 1
        progress.end()
        assert sum(told) == sum(slices[: step + 1])
    assert all(count > 0 for count in told)
