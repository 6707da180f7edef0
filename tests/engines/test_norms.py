"""Norms of large maps are as exact as float32 is; those of small ones are left to OpenVINO."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ov = pytest.importorskip("openvino", reason="needs the cpu extra")

from openvino import opset13 as op  # noqa: E402

from fvae_deploy.engines.norms import LARGE, apply_exact_norms  # noqa: E402

EPS = 1e-5


def model_of(shape, axes, variance=True, mode="inside_sqrt"):
    x = op.parameter(shape, np.float32)
    return ov.Model([op.mvn(x, op.constant(axes), variance, EPS, mode)], [x])


def outputs_of(model, x):
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x])[0].copy()


def count_of(model):
    return sum(node.get_type_name() == "MVN" for node in model.get_ops())


def exact(x, axes):
    x = x.astype(np.float64)
    apart = x - x.mean(axes, keepdims=True)
    return apart / np.sqrt((apart**2).mean(axes, keepdims=True) + EPS)


@settings(max_examples=15, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    rest=st.sampled_from([(LARGE,), (3, 160, 200), (4, 17, 64, 64), (LARGE * 4,), (6, 11, 1300)]),
    offset=st.sampled_from([0.0, -3.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_large_norms_are_exact(lead, rest, offset, seed):
    shape = [*lead, *rest]
    axes = list(range(len(lead), len(shape)))
    x = np.random.default_rng(seed).standard_normal(shape, np.float32) * 1.7 + np.float32(offset)
    model = model_of(shape, [axis - len(shape) for axis in axes])
    apply_exact_norms(model)
    assert count_of(model) == 0
    error = np.abs(outputs_of(model, x) - exact(x, tuple(axes))).max()
    assert error < 1e-6 * (1 + abs(offset))


def test_it_is_closer_than_openvino():
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 17, 128, 128), np.float32)
    x = np.maximum(x * 1.7 + 0.8, 0)
    model = model_of(x.shape, [2, 3, 4, 5])
    errors = []
    for _ in range(2):
        errors.append(np.abs(outputs_of(model, x) - exact(x, (2, 3, 4, 5))).max())
        apply_exact_norms(model)
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize(
    ("shape", "axes", "more"),
    [
        ([4, LARGE // 2], [1], {}),  # small
        ([LARGE + 1, 7], [0], {}),  # not the last axes
        ([2, 65537], [1], {}),  # a prime number of elements
        ([2, LARGE], [1], {"variance": False}),
        ([2, LARGE], [1], {"mode": "outside_sqrt"}),
    ],
)
def test_others_are_left(shape, axes, more):
    model = model_of(shape, axes, **more)
    apply_exact_norms(model)
    assert count_of(model) == 1
