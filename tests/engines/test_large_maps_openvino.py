"""Large transposes are written anew and compute the same; small ones are left to OpenVINO."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ov = pytest.importorskip("openvino", reason="needs the cpu extra")

from openvino import opset13 as op  # noqa: E402

from fvae_deploy.engines.large_maps import apply_large_transposes, check_sizes, merged  # noqa: E402
from fvae_deploy.errors import EngineError  # noqa: E402


def model_of(shape, order, kind=np.float32):
    x = op.parameter(shape, kind)
    return ov.Model([op.transpose(x, op.constant(order))], [x])


def outputs_of(model, x):
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x])[0].copy()


@st.composite
def transposes(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    return shape, draw(st.permutations(range(len(shape))))


@settings(max_examples=60, deadline=None)
@given(transposes(), st.sampled_from((np.float32, np.int64)))
def test_a_large_transpose_is_the_same_transpose(transpose, kind):
    shape, order = transpose
    x = np.arange(math.prod(shape), dtype=kind).reshape(shape)
    model = model_of(shape, order, kind)
    apply_large_transposes(model, large=0)
    np.testing.assert_array_equal(outputs_of(model, x), x.transpose(order))


@settings(max_examples=200, deadline=None)
@given(transposes())
def test_axes_are_merged_without_moving_a_number(transpose):
    shape, order = transpose
    x = np.arange(math.prod(shape)).reshape(shape)
    sizes, axes = merged(shape, order)
    np.testing.assert_array_equal(
        x.reshape(sizes).transpose(axes).ravel(), x.transpose(order).ravel()
    )
    assert 1 not in sizes
    assert all(b != a + 1 for a, b in itertools.pairwise(axes))


@settings(max_examples=60, deadline=None)
@given(transposes())
def test_no_first_axis_stays_where_openvino_computes_it_wrongly(transpose):
    model = model_of(*transpose)
    apply_large_transposes(model, large=0)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Transpose":
            assert node.input_value(1).get_node().data[0] != 0


def test_small_transposes_are_left_as_they_are():
    model = model_of([1, 2, 3, 4], [0, 2, 1, 3])
    before = [node.get_friendly_name() for node in model.get_ordered_ops()]
    apply_large_transposes(model)
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before


def test_frames_that_are_doubled_from_channels_become_a_transpose_of_three_axes():
    """The doubling of CV-VAE's decoder, whose maps of 17 slices of 512x512 exceed 4 GiB."""
    assert merged([1, 2, 256, 9, 512, 512], [0, 2, 3, 1, 4, 5]) == ([2, 2304, 1 << 18], [1, 0, 2])


def test_a_graph_with_a_map_of_2_31_numbers_is_refused():
    for last, refused in ((1 << 15, True), ((1 << 15) - 1, False)):
        given = op.parameter([1, 1 << 16, 1], np.float32), op.parameter([1, 1, last], np.float32)
        model = ov.Model([op.add(*given)], [*given], "m")
        if not refused:
            check_sizes(model, "decode_step")
            continue
        with pytest.raises(EngineError, match=r"numbers in decode_step.*smaller --memory"):
            check_sizes(model, "decode_step")
