"""States kept frame by frame in OpenVINO's graphs: a step copies no frame that it has already.

A causal convolution over frames begins with the last frames of its input, which are its state:

    frames = concat(past, x)                 past [n, h, w, E], x [1, E, h, w]
    y = f(frames[0], frames[1], ...)
    next = frames[1:]

Computed like this, a step copies its state into the concatenation, from there for every
convolution, and into the next state. Here every frame is an input of its own, x is the only output,
and the engine passes the other frames on as they are:

    y = f(past.0, past.1, ..., x)
    next = (past.1, ..., x)

The results have the same bits. At the start of a stream the past is zeros, which need no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.passes import ConstantFolding, Manager

from fvae_deploy.export.bundle import Part

CHANNELS_FIRST, CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


@dataclass(frozen=True)
class _Window:
    """The frames that a state is the end of: past ones, or zeros, and then a new one."""

    frames: ov.Node  # the concatenation: [n + 1, E, h, w] after a past of n frames
    past: ov.Node
    new: ov.Output  # [1, E, h, w]
    depth: int  # frames of the state


def frame_name(state: str, frame: int) -> str:
    """Return the name of the input for one frame of a state; frame 0 is the oldest."""
    return f"{state}.{frame}"


def split_states(model: ov.Model, part: Part) -> tuple[ov.Model, dict[int, int]]:
    """Cut states into frames where the graph allows it: in steps of one frame.

    Returns the model, and the number of frames of each state that was cut, by its index. The model
    must have static shapes; the given one is changed.
    """
    manager = Manager()
    manager.register_pass(ConstantFolding())  # makes computed sizes and zeros constants
    manager.run_passes(model)
    parameters = {p.output(0).get_any_name(): p for p in model.get_parameters()}
    depths: dict[int, int] = {}
    for index, result in enumerate(model.get_results()[1:]):
        window = _window(result)
        if window is None:
            continue
        if part.state_inputs:
            name = part.state_inputs[index].name
            if not _begins_with(window, parameters[name]):
                continue
            del parameters[name]
            parameters |= _separated(window, name)
        elif not _is_zero(window.past):
            continue
        kept = op.transpose(_apart(window.new), op.constant(CHANNELS_LAST))
        kept.output(0).set_names({part.state_outputs[index].name})
        result.input(0).replace_source_output(kept.output(0))
        depths[index] = window.depth
    if not depths:
        return model, depths
    inputs = list(parameters.values())
    return ov.Model(model.get_results(), inputs, model.get_friendly_name()), depths


def _window(result: ov.Node) -> _Window | None:
    """Return the concatenation whose last frames, channels last, are a state; None without one."""
    turned = result.input_value(0).get_node()
    if not _transposes(turned, CHANNELS_LAST):
        return None
    depth, frames = turned.get_output_shape(0)[0], turned.input_value(0).get_node()
    if (bounds := _bounds(frames)) is not None:
        frames = frames.input_value(0).get_node()
        total = frames.get_output_shape(0)[0]
        if bounds != (total - depth, total):
            return None
    if frames.get_type_name() != "Concat" or frames.get_attributes()["axis"] != 0:
        return None
    past, *new = frames.input_values()
    if len(new) != 1 or new[0].get_shape()[0] != 1:
        return None
    return _Window(frames, past.get_node(), new[0], depth)


def _begins_with(window: _Window, parameter: ov.Node) -> bool:
    """Return whether a window is a state and one frame, and read frame by frame."""
    if not _transposes(window.past, CHANNELS_FIRST):
        return False
    only = len(parameter.output(0).get_target_inputs()) == 1
    whole = window.past.get_output_shape(0)[0] == window.depth
    same = window.past.input_value(0).get_node().get_friendly_name()
    reads = [_bounds(target.get_node()) for target in window.frames.output(0).get_target_inputs()]
    return bool(
        only
        and whole
        and same == parameter.get_friendly_name()
        and len(window.past.output(0).get_target_inputs()) == 1
        and all(
            bounds is not None and (bounds[1] - bounds[0] == 1 or bounds == (1, window.depth + 1))
            for bounds in reads
        )
    )


def _separated(window: _Window, name: str) -> dict[str, ov.Node]:
    """Let everything that reads one frame of a window read an input of its own; return these."""
    shape = window.past.input_value(0).get_shape()
    kind = window.past.get_output_element_type(0)
    inputs, frames = {}, []
    for number in range(window.depth):
        own = frame_name(name, number)
        inputs[own] = op.parameter([1, *list(shape)[1:]], kind)
        inputs[own].output(0).set_names({own})
        frames.append(op.transpose(inputs[own], op.constant(CHANNELS_FIRST)).output(0))
    frames.append(window.new)
    for target in list(window.frames.output(0).get_target_inputs()):
        bounds = _bounds(target.get_node())
        if bounds is None or bounds[1] - bounds[0] != 1:
            continue  # the next state, which the new frame replaces
        for reader in list(target.get_node().output(0).get_target_inputs()):
            reader.replace_source_output(frames[bounds[0]])
    return inputs


def _apart(frame: ov.Output) -> ov.Output:
    """Return a frame, through an operation that changes nothing if it is the sum of a convolution.

    OpenVINO fuses such a sum, and then moves every number of its transpose twice: 5 ms for a state
    of 64x64x128, which is only to be read in the order in which it lies in memory.
    """
    if frame.get_node().get_type_name() not in ("Add", "Subtract"):
        return frame
    return op.maximum(frame, frame).output(0)


def _transposes(node: ov.Node, order: list[int]) -> bool:
    if node.get_type_name() != "Transpose":
        return False
    axes = node.input_value(1).get_node()
    return bool(axes.get_type_name() == "Constant" and axes.data.tolist() == order)


def _bounds(node: ov.Node) -> tuple[int, int] | None:
    """Return the first and last frame, exclusive, of a slice along the batch; None for others."""
    if node.get_type_name() != "Slice":
        return None
    constants = [value.get_node() for value in node.input_values()[1:]]
    if any(c.get_type_name() != "Constant" or c.data.size != 1 for c in constants):
        return None
    start, stop, step, axis = (int(c.data.item()) for c in constants)
    if (step, axis) != (1, 0):
        return None
    return slice(start, stop).indices(node.input_value(0).get_shape()[0])[:2]


def _is_zero(node: ov.Node) -> bool:
    return node.get_type_name() == "Constant" and not np.any(node.data)
