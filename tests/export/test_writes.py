"""Writes into a part of a tensor are joins in a cut stage, and change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cut_layers import Layer, Window, apart, cut_of, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fvae_deploy.export.bundle import TensorSpec
from fvae_deploy.export.cut.lower import packet_name
from fvae_deploy.export.cut.plain import run_plain
from fvae_deploy.export.cut.trace import trace_stage
from fvae_deploy.export.cut.writes import joined

LENGTHS = {1: 4, 2: 4}  # channels and frames of a window
BOUND = st.none() | st.integers(-6, 6)
PART = st.integers(-4, 3) | st.builds(slice, BOUND, BOUND, st.integers(1, 3))


def written(x: Any, writes: Any, start: str) -> Any:
    """Write parts of x, of y itself and constants into a tensor, one after the other."""
    y = {"copy": torch.clone, "zeros": torch.zeros_like, "empty": torch.empty_like}[start](x)
    if start == "empty":
        for i in range(LENGTHS[2]):
            y[:, :, i] = -x[:, :, i]
    for axis, part, source, other in writes:
        to = (slice(None),) * axis + (part,)
        if source == "number":
            y[to] = 0.5
        elif source == "zero":
            y[to].zero_()
        elif source == "sum":
            y[to] += x[to] * 2
        else:
            given = {"x": x, "y": y}[source]
            length = len(range(LENGTHS[axis])[part]) if isinstance(part, slice) else 1
            first = min(other, LENGTHS[axis] - length)
            taken = given.narrow(axis, first, length).sin()
            y[to] = taken if isinstance(part, slice) else taken.squeeze(axis)
    return y


WRITE = st.tuples(
    st.sampled_from([1, 2]),
    PART,
    st.sampled_from(["number", "zero", "sum", "x", "y"]),
    st.integers(0, 3),
)


@given(
    writes=st.lists(WRITE, min_size=1, max_size=6),
    start=st.sampled_from(["copy", "zeros", "empty"]),
)
@settings(max_examples=60, deadline=None)
def test_writes_in_place_change_nothing_and_leave_no_scatter(writes: Any, start: str) -> None:
    layer = Layer(lambda m, x: written(x, writes, start))
    network = seeded(lambda: Window([layer, nn.Conv3d(4, 4, 3, padding=1)], [True, False]))
    graph = joined(trace_stage(network, TensorSpec("x", (1, 1, 4, "4*h", "4*w"), "float32")))
    assert not any("scatter" in packet_name(node.target) for node in graph.nodes)
    cut = cut_of(network, 1, 4)
    assert cut.program.whole == ()
    x = torch.randn(1, 1, 4, 8, 12, dtype=torch.float64)
    (expected,) = network(x)
    found, _ = run_plain(cut, x, tuple(expected.shape), (2, 3), 1)
    assert apart(found, expected) < 1e-10


def test_pieces_that_are_replaced_in_turn_are_one_join() -> None:
    def filled(_: Any, x: Any) -> Any:
        y = torch.zeros_like(x)
        for i in range(x.shape[2]):
            y[:, :, i] = x[:, :, i] + (y[:, :, i - 1] if i else 0)
        return y

    network = seeded(lambda: Window([Layer(filled)], [False]))
    graph = joined(trace_stage(network, TensorSpec("x", (1, 1, 4, "4*h", "4*w"), "float32")))
    kinds = [packet_name(node.target) for node in graph.nodes]
    assert kinds.count("cat") == 1
    assert "zeros_like" not in kinds  # nothing is left of it


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_write_into_rows_or_columns_keeps_the_plane(axis: int) -> None:
    def edge(_: Any, x: Any) -> Any:
        y = x.clone()
        y.narrow(axis, 0, 1).fill_(0)
        return y

    network = seeded(lambda: Window([Layer(edge)], [False]))
    cut = cut_of(network, 1, 4)
    assert any("not known to be local" in reason for reason in cut.program.whole)
    x = torch.randn(1, 1, 4, 8, 12, dtype=torch.float64)
    (expected,) = network(x)
    found, _ = run_plain(cut, x, tuple(expected.shape), (2, 3), 1)
    assert apart(found, expected) < 1e-10
