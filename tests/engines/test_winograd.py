"""Convolutions with fewer products equal the plain ones, and are taken only where they may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ov = pytest.importorskip("openvino", reason="needs the cpu extra")

from openvino import opset13 as op  # noqa: E402

from fvae_deploy.engines.winograd import apply_winograd  # noqa: E402


def model_of(x, *, weight, bias=None, past=None, pads=(0, 1, 1), strides=(1, 1, 1), outputs=1):
    """A convolution along time as the bundles' graphs have it, and the arrays it takes."""
    given = [op.parameter(x.shape, np.float32)]
    data = given[0]
    if past is not None:
        given.append(op.parameter(past.shape, np.float32))
        data = op.concat([given[1], data], 2)
    made = op.convolution(data, op.constant(weight), strides, pads, pads, [1, 1, 1])
    results = [made] * (outputs - 1)
    if bias is not None:
        made = op.add(made, op.constant(bias))
    return ov.Model([made, *results], given)


def ran(model, *arrays):
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", options)
    return [value.copy() for value in compiled(list(arrays)).values()]


def convolutions(model):
    return sum(node.get_type_name() == "Convolution" for node in model.get_ops())


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


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
def test_equal_but_for_rounding(pairs, size, channels, pads, batch, state, biased, shared, seed):
    out, deep = channels
    arrays = [drawn(seed, batch, deep, 2 * pairs + (0 if state else 2), *size)]
    options = {"weight": drawn(seed + 1, out, deep, 3, 3, 3), "pads": pads}
    options["outputs"] = 2 if shared else 1
    if biased:
        options["bias"] = drawn(seed + 2, 1, out, 1, 1, 1)
    if state:
        options["past"] = drawn(seed + 3, batch, deep, 2, *size)
        arrays.append(options["past"])
    wanted = ran(model_of(arrays[0], **options), *arrays)
    model = model_of(arrays[0], **options)
    apply_winograd(model, channels=2)
    assert convolutions(model) == 4 * pairs
    for a, b in zip(wanted, ran(model, *arrays), strict=True):
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
def test_others_stay(why, shape, kernel, options):
    model = model_of(drawn(0, *shape), weight=drawn(1, 2, 2, *kernel), **options)
    apply_winograd(model, channels=2)
    assert convolutions(model) == 1, why


def test_few_channels_stay():
    model = model_of(drawn(0, 1, 2, 4, 4, 4), weight=drawn(1, 4, 2, 3, 3, 3))
    apply_winograd(model, channels=3)
    assert convolutions(model) == 1
