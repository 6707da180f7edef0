"""Convolutions along time with a third fewer products: Winograd's F(2, 3), in OpenVINO's graphs.

Two frames y of a causal convolution, with the taps g of time, meet four frames x:

    y0 = x0 g0 + x1 g1 + x2 g2        six convolutions of a frame
    y1 = x1 g0 + x2 g1 + x3 g2

    m0 = (x0 - x2) g0                 y0 = m0 + m1 + m2        four of them, and eight sums
    m1 = (x1 + x2) (g0 + g1 + g2)/2   y1 = m1 - m2 - m3
    m2 = (x2 - x1) (g0 - g1 + g2)/2
    m3 = (x1 - x3) g2

The result is the same but for rounding: three layers of 96 to 384 channels differ from plain ones
by 1.4e-6 to 3e-6 of the largest value.

Source: S. Winograd, Arithmetic Complexity of Computations, 1980; for convolutional networks
A. Lavin and S. Gray, 2016, arXiv:1509.09308.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op
from openvino.passes import ConstantFolding, Manager

CHANNELS = 64  # in and out: below, sums and copies cost what is spared
TIME = 2  # the axis of [N, C, T, H, W]


def spare_products(model: ov.Model, channels: int = CHANNELS) -> None:
    """Replace, in place, every convolution of at least so many channels in and out.

    The model's shapes must be known.
    """
    manager = Manager()
    manager.register_pass(ConstantFolding())  # sizes that were computed, biases among them
    manager.run_passes(model)
    for node in model.get_ordered_ops():
        if _fits(node, channels):
            _replace(node)
    model.validate_nodes_and_infer_types()


def _fits(node: ov.Node, least: int) -> bool:
    """Tell a convolution of three frames and 3x3 pixels that makes an even number of frames."""
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
    """Put four convolutions for each two frames in the place of one over all, its bias within."""
    weights = [op.constant(w) for w in _transformed(node.input_value(1).get_node().data)]
    form, after = node.get_attributes(), _bias(node)

    def convolved(frame: ov.Node, number: int) -> ov.Node:
        return op.convolution(
            frame,
            weights[number],
            [1, 1, 1],
            form["pads_begin"],
            form["pads_end"],
            [1, 1, 1],
        )

    frames, made = _frames(node.input_value(0)), []
    for first in range(0, len(frames) - 2, 2):
        x0, x1, x2, x3 = frames[first : first + 4]
        m1 = convolved(op.add(x1, x2), 1)
        if after is not None:
            m1 = op.add(m1, after.input_value(1))
        m2 = convolved(op.subtract(x2, x1), 2)
        made.append(op.add(convolved(op.subtract(x0, x2), 0), op.add(m1, m2)))
        made.append(op.add(convolved(op.subtract(x1, x3), 3), op.subtract(m1, m2)))
    together = op.concat(made, TIME).output(0)
    for target in (after or node).output(0).get_target_inputs():
        target.replace_source_output(together)


def _transformed(weight: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Taps [O, C, 3, 3, 3] to four of a frame each; the last negated, so that it is added."""
    g0, g1, g2 = (weight[:, :, [tap]] for tap in range(3))
    ends, middle = g0.astype(np.float64) + g2, g1.astype(np.float64)
    halves = ((ends + sign * middle) / 2 for sign in (1, -1))
    return [g0, *(half.astype(np.float32) for half in halves), -g2]


def _bias(node: ov.Node) -> ov.Node | None:
    """Find the addition of one value a channel that alone follows a convolution."""
    targets = list(node.output(0).get_target_inputs())
    after = targets[0].get_node()
    if len(targets) > 1 or after.get_type_name() != "Add" or targets[0].get_index() != 0:
        return None
    value = after.input_value(1)
    known = value.get_node().get_type_name() == "Constant"
    return after if known and value.get_shape()[2:] == [1, 1, 1] else None


def _frames(value: ov.Output) -> list[ov.Output]:
    """Cut into frames; what was put together from state and slab is not put together first."""
    node = value.get_node()
    if node.get_type_name() == "Concat" and node.get_attributes()["axis"] in (TIME, TIME - 5):
        return [frame for part in node.input_values() for frame in _frames(part)]
    count = value.get_shape()[TIME]
    return list(op.split(value, op.constant(TIME), count).outputs()) if count > 1 else [value]
