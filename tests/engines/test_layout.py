"""Permutations that are followed to the next convolution change no number, and move few of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ov = pytest.importorskip("openvino", reason="needs the cpu extra")
torch = pytest.importorskip("torch", reason="needs the export extra")

from openvino import opset13 as op  # noqa: E402

from fvae_deploy.engines.layout import apply_channels_last  # noqa: E402

FRAMES, HEIGHT, WIDTH, CHANNELS = 3, 5, 4, 6


def outputs_of(model, arrays):
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = ov.Core().compile_model(model, "CPU", options)
    return [value.copy() for value in compiled(arrays).values()]


def moved(model):
    """Return the operations that a permutation of several axes is read by or reads from."""
    beside = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Transpose":
            readers = {t.get_node().get_type_name() for t in node.output(0).get_target_inputs()}
            beside.append((node.input_value(0).get_node().get_type_name(), *sorted(readers)))
    return sorted(beside)


def conv(value, seed, stride=1, pads=0):
    rank = len(value.get_output_shape(0)) - 2
    weight = np.random.default_rng(seed).standard_normal((CHANNELS, CHANNELS, *[3] * rank))
    weight = op.constant((weight / 9).astype(np.float32))
    ones = [1] * rank
    made = op.convolution(value, weight, [stride] * rank, [pads] * rank, [pads] * rank, ones)
    return op.add(made, op.constant(np.full((1, CHANNELS, *ones), 0.5, np.float32)))


def reshape(value, *shape):
    return op.reshape(value, op.constant(list(shape)), False)


def transpose(value, *order):
    return op.transpose(value, op.constant(list(order)))


def pad(value, begin, end, mode):
    return op.pad(value, op.constant(list(begin)), op.constant(list(end)), mode)


def residual_block(x, seed):
    """Return a residual block on a window of frames, as segments have it: channels last outside."""
    window = reshape(x, 1, FRAMES, HEIGHT, WIDTH, CHANNELS)
    skip = transpose(window, 0, 4, 1, 2, 3)
    padded = pad(skip, (0, 0, 0, 1, 1), (0, 0, 0, 1, 1), "constant")
    y = conv(pad(padded, (0, 0, 2, 0, 0), (0, 0, 0, 0, 0), "edge"), seed)
    slices = reshape(transpose(y, 0, 2, 1, 3, 4), FRAMES, CHANNELS, HEIGHT, WIDTH)
    y = reshape(conv(slices, seed + 1, pads=1), 1, FRAMES, CHANNELS, HEIGHT, WIDTH)
    y = op.add(skip, transpose(y, 0, 2, 1, 3, 4))
    flat = reshape(y, 1, CHANNELS, FRAMES * HEIGHT * WIDTH)
    return transpose(flat, 0, 2, 1)


def test_in_a_residual_block_permutations_are_beside_convolutions():
    x = op.parameter([FRAMES, HEIGHT, WIDTH, CHANNELS], np.float32)
    model = ov.Model([residual_block(x, 0)], [x])
    model.output(0).set_names({"result"})
    array = np.random.default_rng(1).standard_normal(x.get_output_shape(0)).astype(np.float32)
    before = outputs_of(model.clone(), [array])
    apply_channels_last(model)
    assert np.abs(outputs_of(model, [array])[0] - before[0]).max() < 1e-5
    assert model.output("result").get_shape() == [1, FRAMES * HEIGHT * WIDTH, CHANNELS]
    assert moved(model) == [
        ("Add", "Reshape"),  # behind the second convolution and its bias
        ("Pad", "Pad"),  # before the zeros around the first one, which OpenVINO makes a part of it
    ]


def test_inputs_and_results_keep_their_names():
    x = op.parameter([1, 2, 3], np.float32)
    back = transpose(transpose(x, 0, 2, 1), 0, 2, 1)
    x.output(0).set_names({"x"})
    back.output(0).set_names({"back"})
    model = ov.Model([back, op.relu(x)], [x])
    apply_channels_last(model)
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert np.array_equal(ov.Core().compile_model(model, "CPU", {})({"x": array})["back"], array)


def interpreted(model, array):
    """Return a model's outputs as torch computes them.

    Of some graphs with permutations on both sides of a reshape, OpenVINO's own result is wrong.
    """
    values = {}
    for node in model.get_ordered_ops():
        given = [values[node.input_value(i)] for i in range(node.get_input_size())]
        kind, form = node.get_type_name(), node.get_attributes()
        if kind == "Parameter":
            result = torch.from_numpy(array)
        elif kind == "Constant":
            result = torch.from_numpy(np.array(node.data))
        elif kind == "Transpose":
            result = given[0].permute(*given[1])
        elif kind == "Reshape":
            result = given[0].reshape(tuple(given[1]))
        elif kind == "Pad":
            value = given[3].item() if len(given) > 3 else 0
            how = {"mode": "edge"} if form["pad_mode"] == "edge" else {"constant_values": value}
            result = torch.from_numpy(
                np.pad(given[0], [*zip(given[1], given[2], strict=True)], **how)
            )
        elif kind == "Convolution":
            function = {4: torch.conv2d, 5: torch.conv3d}[given[0].ndim]
            result = function(given[0], given[1], None, form["strides"], form["pads_begin"])
        else:
            functions = {"Add": torch.add, "Subtract": torch.sub, "Relu": torch.relu}
            result = functions[kind](*given) if kind != "Result" else given[0]
        values[node.output(0)] = result
    return [values[result.output(0)].numpy() for result in model.get_results()]


STEPS = ("transpose", "squeeze", "unsqueeze", "edge", "zeros", "ones", "conv", "add", "flat", "two")


@st.composite
def graphs(draw):
    """Return a model of operations in any order, and an array for it."""
    rank = draw(st.sampled_from([4, 5]))
    shape = draw(st.lists(st.sampled_from([1, 3, 4]), min_size=rank, max_size=rank))
    x = op.parameter(shape, np.float32)
    node, kept = x, []
    steps = draw(st.lists(st.sampled_from(STEPS), max_size=4))
    steps += ["transpose", draw(st.sampled_from(STEPS)), *draw(st.lists(st.sampled_from(STEPS)))]
    for seed, step in enumerate(steps):
        size = node.get_output_shape(0)
        axes = list(range(len(size)))
        if step == "transpose":
            node = transpose(node, *draw(st.permutations(axes)))
        elif step == "squeeze" and 1 in size and len(size) > 3:
            axis = draw(st.sampled_from([a for a in axes if size[a] == 1]))
            node = reshape(node, *size[:axis], *size[axis + 1 :])
        elif step == "unsqueeze" and len(size) < 5:
            axis = draw(st.sampled_from([*axes, len(size)]))
            node = reshape(node, *size[:axis], 1, *size[axis:])
        elif step == "flat" and len(size) == 4:
            node = transpose(reshape(node, *size[:2], size[2] * size[3]), 0, 2, 1)
        elif step in ("edge", "zeros", "ones"):
            begin, end = ([draw(st.integers(0, 1)) for _ in axes] for _ in range(2))
            mode = "edge" if step == "edge" else "constant"
            value = [op.constant(np.float32(1))] if step == "ones" else []
            node = op.pad(node, op.constant(begin), op.constant(end), mode, *value)
        elif step == "conv" and len(size) > 3 and min(size[2:]) > 2:
            weight = np.random.default_rng(seed).integers(-2, 3, (2, size[1], *[3] * len(size[2:])))
            ones, none = [1] * len(size[2:]), [0] * len(size[2:])
            weight = op.constant(weight.astype(np.float32))
            node = op.convolution(node, weight, ones, none, none, ones)
            if draw(st.booleans()):
                node = op.add(node, op.constant(np.ones((1, 2, *ones), np.float32)))
        elif step == "add":
            alike = [n for n in kept if n.get_output_shape(0) == size] or [node]
            node = op.subtract(node, draw(st.sampled_from(alike)))
            kept.append(node)
        elif step == "two":  # another reader, which needs the axes in this order
            kept.append(op.relu(node))
    array = draw(st.integers(0, 99))
    array = np.random.default_rng(array).integers(-3, 4, shape).astype(np.float32)
    return ov.Model([node, *(op.relu(n) for n in kept)], [x]), array


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_no_number_changes(graph):
    model, array = graph
    before = interpreted(model, array)
    apply_channels_last(model)
    for after in (interpreted(model, array), outputs_of(model, [array])):
        assert [value.shape for value in after] == [value.shape for value in before]
        assert all(map(np.array_equal, after, before))  # whole numbers: sums are exact in any order


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1), (FRAMES, CHANNELS, 1, 1), (CHANNELS, 1, 1)])
def test_a_sum_that_is_no_bias_stays_a_sum(shape):
    x = op.parameter([FRAMES, HEIGHT, WIDTH, CHANNELS], np.float32)
    made = conv(transpose(x, 0, 3, 1, 2), 0).input_value(0)
    added = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    model = ov.Model([op.add(made, op.constant(added))], [x])
    array = np.random.default_rng(1).standard_normal(x.get_output_shape(0)).astype(np.float32)
    before = outputs_of(model.clone(), [array])
    apply_channels_last(model)
    after = outputs_of(model, [array])
    assert after[0].shape == before[0].shape
    assert np.abs(after[0] - before[0]).max() < 1e-5
