"""Statistics of maps are exact, also where the rows looked at first are unlike all others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.stream import statistics
from fvae_deploy.stream.statistics import SAMPLE, moments


def unlike(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """Return normal values, of which some rows are far from all others."""
    generator = np.random.default_rng(seed)
    x = generator.normal(0, 1, shape)
    rows = np.arange(shape[1])
    far = {
        "none": rows < 0,
        "first": rows < len(rows) // SAMPLE,  # all that a chunk's first rows tell
        "sampled": rows % SAMPLE == 0,  # all that the sample sees
        "not sampled": rows % SAMPLE == 3,
        "one": rows == len(rows) // 2,
        "last": rows == len(rows) - 1,
    }[kind]
    x[:, far] += 1e4
    return x.astype(np.float32)


@given(
    kind=st.sampled_from(["none", "first", "sampled", "not sampled", "one", "last"]),
    mean=st.sampled_from([0.0, -300.0]),
    rows=st.sampled_from([1, 7, 63, 64, 65, 1000, 5000]),
    columns=st.sampled_from([1, 3, 32]),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_moments_are_those_in_float64(
    kind: str, mean: float, rows: int, columns: int, seed: int
) -> None:
    x = unlike(kind, (2, rows, columns), seed) + np.float32(mean)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "CHUNK", 1 << 10)
        found = moments(x, (1,))
    exact = x.astype(np.float64)
    deviation = exact.std(axis=1)
    assert found.count == rows
    assert (np.abs(found.mean - exact.mean(axis=1)) <= 1e-6 * deviation + 1e-12).all()
    variance = found.squares / found.count
    assert np.allclose(variance, exact.var(axis=1), rtol=1e-5, atol=1e-12)
