"""Large maps in OpenVINO's graphs: transposes that it computes rightly, and a limit.

OpenVINO 2026.4 addresses an axis with 32 bits if the first axis of a transpose stays where it is:
[1, 2, 2304, n] to [1, 2304, 2, n] has half of its numbers wrong as soon as one of the two rows
takes 2 GiB. The same transpose without its first axis, [2, 2304, n] to [2304, 2, n], is right. So
axes of one element are left out here, axes that stay side by side become one, and a first axis that
stays is cut apart. The results have the same bits; smaller maps are left as they are.

Whether it counts to 2^31 elements and beyond in every operation was not seen: a graph with maps of
that size is refused. The planner takes segments there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as op

from fvae_deploy.errors import EngineError
from fvae_deploy.export.manifest import LARGEST

LARGE = 1 << 32  # bytes of a map; two rows of 2 GiB are the least that is computed wrongly


def check_sizes(model: ov.Model, part: str) -> None:
    """Raise EngineError if a map of a model is as large as `LARGEST` says, or larger."""
    for node in model.get_ordered_ops():
        for output in node.outputs():
            sizes = output.partial_shape
            if sizes.is_static and math.prod(map(int, output.shape)) >= LARGEST["openvino"]:
                raise EngineError(
                    f"expected maps of fewer than 2^31 numbers in {part}, found one of "
                    f"{'x'.join(str(n) for n in output.shape)}: OpenVINO may compute it wrongly, "
                    "so use a smaller --memory, which runs in tiles, or --engine torch"
                )


def apply_large_transposes(model: ov.Model, large: int = LARGE) -> None:
    """Replace, in place, the transposes of more than `large` bytes; shapes must be static."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Transpose":
            continue
        order = node.input_value(1).get_node()
        if order.get_type_name() != "Constant" or _bytes(node) <= large:
            continue
        shape, axes = list(node.get_input_shape(0)), [int(axis) for axis in order.data]
        moved = _transposed(node.input_value(0), shape, axes)
        result = _reshape(moved, list(node.get_output_shape(0))).output(0)
        result.set_names(node.output(0).get_names())
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(result)
    model.validate_nodes_and_infer_types()


def merged(shape: Sequence[int], order: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the shape and order of the same transpose with as few axes as possible."""
    groups: list[list[int]] = []
    for axis in order:
        if shape[axis] == 1:
            continue
        before = groups[-1][-1] if groups else len(shape)
        if before < axis and all(shape[between] == 1 for between in range(before + 1, axis)):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    places = sorted(range(len(groups)), key=lambda i: groups[i][0])
    sizes = [math.prod(shape[axis] for axis in groups[i]) for i in places]
    return sizes, [places.index(i) for i in range(len(groups))]


def _transposed(x: ov.Output, shape: Sequence[int], order: Sequence[int]) -> ov.Node:
    """Transpose without axes of one element; a first axis that stays is cut apart."""
    sizes, axes = merged(shape, order)
    flat = _reshape(x, sizes)
    if axes == sorted(axes):
        return flat
    if axes[0]:
        return op.transpose(flat, op.constant(axes))
    rows = op.split(flat, op.constant(np.int64(0)), sizes[0]).outputs()
    inner = [axis - 1 for axis in axes[1:]]
    parts = [op.transpose(_reshape(row, sizes[1:]), op.constant(inner)) for row in rows]
    apart = [1, *(sizes[axis] for axis in axes[1:])]
    return op.concat([_reshape(part, apart) for part in parts], 0)


def _reshape(x: ov.Output | ov.Node, shape: Sequence[int]) -> ov.Node:
    return op.reshape(x, op.constant(np.array(shape, np.int64)), False)


def _bytes(node: ov.Node) -> int:
    return math.prod(map(int, node.get_input_shape(0))) * int(node.get_element_type().size)
