"""The pixel shuffle that ends a network, in OpenVINO's graphs: every number is moved once.

Between convolutions maps lie in memory channels last. OpenVINO's own operation shuffles them there,
and its result is then reordered; here one transpose does both. The results have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import openvino as ov
from openvino import opset13 as op


def apply_final_shuffle(model: ov.Model) -> None:
    """Replace, in place, pixel shuffles whose results are outputs of a model of static shapes.

    Where another layer follows, OpenVINO's operation is the faster one.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "DepthToSpace" and _is_final(node):
            shuffled = _shuffled(node)
            for target in list(node.output(0).get_target_inputs()):
                target.replace_source_output(shuffled)
    model.validate_nodes_and_infer_types()


def _is_final(node: ov.Node) -> bool:
    readers = [target.get_node() for target in node.output(0).get_target_inputs()]
    last = all(reader.get_type_name() in ("Result", "Reshape", "Transpose") for reader in readers)
    flat = len(node.get_output_shape(0)) == 4
    return bool(last and flat and node.get_attributes()["mode"] == "depth_first")


def _shuffled(node: ov.Node) -> ov.Output:
    """Shuffle pixels [k, C b b, h, w] into [k, C, h b, w b]."""
    k, c, height, width = node.get_output_shape(0)
    b = node.get_attributes()["block_size"]
    last = op.transpose(node.input_value(0), op.constant([0, 2, 3, 1]))
    cells = _reshape(last, (k, height // b, width // b, c, b, b))
    moved = op.transpose(cells, op.constant([0, 3, 1, 4, 2, 5]))
    return _reshape(moved, (k, c, height, width)).output(0)


def _reshape(value: ov.Node, shape: Sequence[int]) -> ov.Node:
    return op.reshape(value, op.constant(list(shape)), False)
