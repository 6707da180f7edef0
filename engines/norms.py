"""Means and variances of large maps in OpenVINO's graphs, summed in two steps.

OpenVINO's MVN, as which it computes group norms, adds up all elements of a group in float32, one
after the other in every lane. For a window of 17 slices of 256x256 with four channels in a group,
its result is off by 2.5e-5 deviations, and by more the larger the plane is. Summed in rows of a few
thousand elements, and these sums once more, it is exact to 1e-7, at the same speed. It takes one
map more, so that only bundles whose memory was measured with it are computed so.
"""

from __future__ import annotations

import math

import numpy as np
import openvino as ov
from openvino import opset13 as op

LARGE = 1 << 16  # elements of one mean, from which on it is summed in two steps
ROW = 1 << 12  # elements of the first sum, at most
LEAST = 1 << 6  # and at least


def apply_exact_norms(model: ov.Model) -> None:
    """Replace, in place, the large MVNs of a model of static shapes that computes in float32."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MVN":
            continue
        shape, first = list(node.get_input_shape(0)), _first_axis(node)
        count = math.prod(shape[first:]) if first is not None else 0
        row = max((n for n in range(1, ROW + 1) if count % n == 0), default=0) if count else 0
        if count < LARGE or row < LEAST:
            continue
        normal = _normalised(node, math.prod(shape[:first]), count // row, row)
        result = op.reshape(normal, op.constant(shape), False).output(0)
        result.set_names(node.output(0).get_names())
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(result)
    model.validate_nodes_and_infer_types()


def _first_axis(node: ov.Node) -> int | None:
    """Return the first axis of those that a mean is taken over; None unless they are the last."""
    form, axes = node.get_attributes(), node.input_value(1).get_node()
    usual = form["normalize_variance"] and form["eps_mode"].lower() == "inside_sqrt"
    if not usual or axes.get_type_name() != "Constant":
        return None
    rank = len(node.get_input_shape(0))
    numbers = sorted(int(axis) % rank for axis in axes.data.ravel())
    return numbers[0] if numbers == list(range(rank - len(numbers), rank)) else None


def _normalised(node: ov.Node, groups: int, rows: int, row: int) -> ov.Node:
    """Return the values of an MVN as [groups, rows, row]."""
    x = op.reshape(node.input_value(0), op.constant([groups, rows, row]), False)
    last, flat, back = op.constant([2]), op.constant([groups, rows]), op.constant([groups, 1, 1])

    def mean(of_rows: ov.Node) -> ov.Node:
        # Without the reshape between them, OpenVINO makes one sum of two.
        every = op.reshape(of_rows, flat, False)
        return op.reshape(op.reduce_mean(every, op.constant([1]), False), back, False)

    apart = op.subtract(x, mean(op.reduce_mean(x, last, False)))
    lengths = op.reduce_l2(apart, last, False)
    variance = op.multiply(mean(op.multiply(lengths, lengths)), op.constant(np.float32(1 / row)))
    small = op.constant(np.float32(node.get_attributes()["eps"]))
    return op.divide(apart, op.sqrt(op.add(variance, small)))
