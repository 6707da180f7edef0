"""Winograd convolutions equal the plain ones, and replace only those that they can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ov = pytest.importorskip("openvino", reason="needs the cpu extra")

from openvino import opset13 as op  # noqa: E402

from fvae_deploy.engines.winograd import apply_winograd  # noqa: E402


def model_of(x, *, weight, bias=None, past=None, pads=(0, 1, 1), strides=(1, 1, 1), outputs=1):
    """Return a model with a convolution along time, like those in the bundles' graphs."""
    parameters = [op.parameter(x.shape, np.float32)]
    data = parameters[0]
    if past is not None:
        parameters.append(op.parameter(past.shape, np.float32))
        data = op.concat([parameters[1], data], 2)
    result = op.convolution(data, op.constant(weight), strides, pads, pads, [1, 1, 1])
    others = [result] * (outputs - 1)
    if bias is not None:
        result = op.add(result, op.constant(bias))
    return ov.Model([result, *others], parameters)


def run(model, *arrays):
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", options)
    return [value.copy() for value in compiled(list(arrays)).values()]


def convolutions(model):
    return sum(node.get_type_name() == "Convolution" for node in model.get_ops())


def random_array(seed, *shape):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@settings(max_examples=40)
@given(
    pairs=st.integers(1, 3),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    channels=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    pads=st.tuples(st.just(0), st.integers(0, 1), st.integers(0, 1)),
    batch=st.integers(1, 2),
    state=st.booleans(),
    biased=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equal_except_for_rounding(pairs, size, channels, pads, batch, state, biased, shared, seed):
    out, deep = channels
    arrays = [random_array(seed, batch, deep, 2 * pairs + (0 if state else 2), *size)]
    options = {"weight": random_array(seed + 1, out, deep, 3, 3, 3), "pads": pads}
    options["outputs"] = 2 if shared else 1
    if biased:
        options["bias"] = random_array(seed + 2, 1, out, 1, 1, 1)
    if state:
        options["past"] = random_array(seed + 3, batch, deep, 2, *size)
        arrays.append(options["past"])
    expected = run(model_of(arrays[0], **options), *arrays)
    model = model_of(arrays[0], **options)
    apply_winograd(model, channels=2)
    assert convolutions(model) == 4 * pairs
    for a, b in zip(expected, run(model, *arrays), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 3e-6 * max(1, np.abs(a).max())


@pytest.mark.parametrize(
    ("why", "shape", "kernel", "options"),
    [
        ("an odd number of frames", (1, 2, 5, 4, 4), (3, 3, 3), {}),
        ("a stride in time", (1, 2, 6, 4, 4), (3, 3, 3), {"strides": (2, 1, 1)}),
        ("a stride in space", (1, 2, 6, 4, 4), (3, 3, 3), {"strides": (1, 2, 2)}),
        ("padding in time", (1, 2, 4, 4, 4), (3, 3, 3), {"pads": (1, 1, 1)}),
        ("no pixels around", (1, 2, 6, 4, 4), (3, 1, 1), {"pads": (0, 0, 0)}),
        ("no frames around", (1, 2, 6, 4, 4), (1, 3, 3), {}),
    ],
)
def test_other_convolutions_are_not_replaced(why, shape, kernel, options):
    model = model_of(random_array(0, *shape), weight=random_array(1, 2, 2, *kernel), **options)
    apply_winograd(model, channels=2)
    assert convolutions(model) == 1, why


@pytest.mark.parametrize("shape", [(), (2, 4, 1, 1), (1, 2, 4, 1, 1), (4, 1, 1)])
def test_a_sum_that_is_no_bias_stays_a_sum(shape):
    """Such as one number, or one for each frame."""
    array, weight = random_array(0, 1, 2, 6, 4, 4), random_array(1, 2, 2, 3, 3, 3)
    options = {"weight": weight, "bias": random_array(2, *shape)}
    (expected,) = run(model_of(array, **options), array)
    model = model_of(array, **options)
    apply_winograd(model, channels=2)
    (found,) = run(model, array)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()


def test_convolutions_of_few_channels_are_not_replaced():
    model = model_of(random_array(0, 1, 2, 4, 4, 4), weight=random_array(1, 4, 2, 3, 3, 3))
    apply_winograd(model, channels=3)
    assert convolutions(model) == 1
