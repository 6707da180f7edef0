"""Maps that stay channels last in OpenVINO's graphs, from one convolution to the next.

OpenVINO computes convolutions with channels last. The maps of segments lie in memory so, and a
graph permutes their axes before a convolution and back behind it. OpenVINO moves no number for
that if the permutation is next to the convolution, and every number if anything is in between, such
as padding in time, or an axis of size one that comes or goes. Here permutations are followed
through such operations, as far as the next one that needs the axes in its own order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import openvino as ov
from openvino import opset13 as op
from openvino.passes import ConstantFolding, Manager

from fvae_deploy.engines.winograd import bias_sum

BINARY = {"Add": op.add, "Subtract": op.subtract, "Multiply": op.multiply}
Pairs = tuple[tuple[int, int], ...]  # what is padded at both ends of every axis


@dataclass(frozen=True)
class _View:
    """The axes of a source in another order, with axes of size one anywhere, padded with zeros."""

    source: ov.Output
    shape: tuple[int, ...]  # of the result without its padding
    axes: tuple[int, ...]  # for every axis of the result larger than one, its place among those
    padding: Pairs

    @classmethod
    def of(cls, value: ov.Output) -> _View:
        """Return a value as it is."""
        shape = tuple(value.get_shape())
        return cls(value, shape, tuple(range(len(_large(shape)))), ((0, 0),) * len(shape))

    @property
    def is_moved(self) -> bool:
        """Whether numbers lie in another order than in the source."""
        return list(self.axes) != sorted(self.axes)

    @property
    def is_padded(self) -> bool:
        return any(any(pair) for pair in self.padding)

    @property
    def order(self) -> list[int]:
        """For every axis of the result, the axis of `unmoved` that it is."""
        ones, large = iter(range(len(self.shape))), iter(self.axes)
        count = self.shape.count(1)
        return [next(ones) if size == 1 else count + next(large) for size in self.shape]

    @property
    def unmoved(self) -> list[int]:
        """The shape of the source with the axes of size one that the result has, in front."""
        sizes = [1] * len(self.shape)
        for axis, size in zip(self.order, self.shape, strict=True):
            sizes[axis] = size
        return sizes

    def permuted(self, order: Sequence[int]) -> _View:
        """Return the result with its axes in another order."""
        places = {axis: n for n, axis in enumerate(_large(self.shape))}
        axes = [self.axes[places[axis]] for axis in order if axis in places]
        shape, padding = (
            tuple(self.shape[a] for a in order),
            tuple(self.padding[a] for a in order),
        )
        return _View(self.source, shape, tuple(axes), padding)

    def value(self) -> ov.Output:
        """Return the result, computed."""
        if not self.is_moved:
            result = _reshaped(self.source, self.shape)
        else:
            moved = op.transpose(_reshaped(self.source, self.unmoved), op.constant(self.order))
            result = moved.output(0)
        return _padded(result, self.padding) if self.is_padded else result


def apply_channels_last(model: ov.Model) -> None:
    """Follow permutations, in place, through a model of static shapes.

    The results have the same bits, but for convolutions of several slices: they are computed as one
    of a window, in another order of sums.
    """
    manager = Manager()
    manager.register_pass(ConstantFolding())  # makes computed orders and sizes constants
    manager.run_passes(model)
    for node in model.get_ordered_ops():
        if _is_of_slices(node):
            _as_of_a_window(node)
        elif _is_flat(node):
            _flatten_behind(node)
    views: dict[ov.Output, _View] = {}
    values: dict[ov.Output, ov.Output] = {}
    for node in model.get_ordered_ops():
        sources = node.input_values()
        view = _followed(node, [views.get(source) or _View.of(source) for source in sources])
        if view is not None:
            views[node.output(0)] = view
            continue
        for number, source in enumerate(sources):
            if source in views:
                if source not in values:
                    values[source] = _named(views[source].value(), source)
                node.input(number).replace_source_output(values[source])
    model.validate_nodes_and_infer_types()


def _named(value: ov.Output, before: ov.Output) -> ov.Output:
    """Return a value with the names of the one that it replaces, by which results are asked for."""
    if before.get_names() and value.get_names():  # what was permuted back is an input as it came
        value = op.reshape(value, op.constant(list(value.get_shape())), False).output(0)
    if before.get_names():
        value.set_names(before.get_names())
    return value


def _followed(node: ov.Node, given: Sequence[_View]) -> _View | None:
    """Return the result of an operation as a view; None if it needs what it reads as it is."""
    kind = node.get_type_name()
    if kind in BINARY:
        return _of_both(BINARY[kind], *given)
    if kind not in ("Transpose", "Reshape", "Pad") or _constant(node, 1) is None:
        return None
    if kind == "Transpose":
        return given[0].permuted(_constant(node, 1) or ())
    if kind == "Pad":
        return _of_padded(node, given[0])
    shape = tuple(node.get_output_shape(0))
    sizes = [given[0].shape[axis] for axis in _large(given[0].shape)]
    if given[0].is_padded or [shape[axis] for axis in _large(shape)] != sizes:
        return None
    return _View(given[0].source, shape, given[0].axes, ((0, 0),) * len(shape))


def _of_both(
    function: Callable[[ov.Output, ov.Output], ov.Node], one: _View, other: _View
) -> _View | None:
    """Return a sum, difference or product of two maps, of which one is permuted at least.

    It is computed with the axes of that map's source; of a convolution they lie so as well.
    """
    moved = one if one.is_moved else other
    if not moved.is_moved or one.shape != other.shape or one.is_padded or other.is_padded:
        return None
    inverse = [moved.order.index(axis) for axis in range(len(moved.order))]
    values = []
    for view in (one, other):
        if view.axes == moved.axes:
            values.append(view.source)
        elif not view.is_moved and _is_convolved(view.source):
            values.append(view.permuted(inverse).value())
        else:
            return None
    # In two axes, nothing is left for OpenVINO to choose.
    flat = [-1, moved.unmoved[-1]]
    result = function(*(_reshaped(value, flat) for value in values)).output(0)
    return _View(_reshaped(result, moved.unmoved), moved.shape, moved.axes, moved.padding)


def _is_convolved(value: ov.Output) -> bool:
    """Return whether a value is the result of a convolution, with its bias or without."""
    node = value.get_node()
    if node.get_type_name() == "Add":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Convolution")


def _of_padded(node: ov.Node, given: _View) -> _View | None:
    """Return a padded map: zeros wait for a convolution, which takes them; all else is done first.

    Zeros along some axes commute with any padding along others.
    """
    begin, end = _constant(node, 1), _constant(node, 2)
    mode = node.get_attributes()["pad_mode"]
    if not given.is_moved or begin is None or end is None:
        return None
    pairs = tuple(zip(begin, end, strict=True))
    mine, before = ([any(pair) for pair in pads] for pads in (pairs, given.padding))
    if any(pad and size == 1 for pad, size in zip(mine, given.shape, strict=True)):
        return None
    if any(map(all, zip(mine, before, strict=True))) or min(*begin, *end) < 0:
        return None
    if mode == "constant" and _is_zero(node):
        both = zip(pairs, given.padding, strict=True)
        padding = tuple((a[0] + b[0], a[1] + b[1]) for a, b in both)
        return _View(given.source, given.shape, given.axes, padding)
    if mode == "constant":
        return None
    unmoved = [(0, 0)] * len(pairs)
    for axis, pair in zip(given.order, pairs, strict=True):
        unmoved[axis] = pair
    source = _padded(_reshaped(given.source, given.unmoved), tuple(unmoved), mode)
    shape = tuple(n + sum(pair) for n, pair in zip(given.shape, pairs, strict=True))
    return _View(source, shape, given.axes, given.padding)


def _is_of_slices(node: ov.Node) -> bool:
    """Return whether a node is a convolution of several slices [n, C, h, w].

    OpenVINO leaves their axes where they are for a single slice or window only.
    """
    if node.get_type_name() != "Convolution" or len(node.get_input_shape(0)) != 4:
        return False
    constant = node.input_value(1).get_node().get_type_name() == "Constant"
    before = node.input_value(0).get_node().get_type_name()
    return bool(constant and node.get_input_shape(0)[0] > 1 and before in ("Reshape", "Transpose"))


def _as_of_a_window(node: ov.Node) -> None:
    """Compute a convolution of slices [n, C, h, w], and its bias, as one of a window."""
    bias = bias_sum(node)
    form, weight = node.get_attributes(), node.input_value(1)
    out, channels, *taps = weight.get_shape()
    slices = op.transpose(node.input_value(0), op.constant([0, 2, 3, 1]))
    count, height, width, _ = slices.get_output_shape(0)
    window = _reshaped(slices.output(0), [1, count, height, width, channels])
    result = op.convolution(
        op.transpose(window, op.constant([0, 4, 1, 2, 3])),
        op.constant(weight.get_node().data.reshape(out, channels, 1, *taps)),
        [1, *form["strides"]],
        [0, *form["pads_begin"]],
        [0, *form["pads_end"]],
        [1, *form["dilations"]],
    )
    if bias is not None:
        values = bias.input_value(1).get_node().data
        result = op.add(result, op.constant(values.reshape(1, out, 1, 1, 1)))
    last = op.transpose(result, op.constant([0, 2, 3, 4, 1]))
    _, count, height, width, _ = last.get_output_shape(0)
    each = _reshaped(last.output(0), [count, height, width, out])
    _replace((bias or node).output(0), op.transpose(each, op.constant([0, 3, 1, 2])).output(0))


def _is_flat(node: ov.Node) -> bool:
    """Return whether a node is the permutation [n, C, places] to [n, places, C] of a map."""
    before = node.input_value(0).get_node() if node.get_type_name() == "Transpose" else None
    if before is None or _constant(node, 1) != [0, 2, 1] or before.get_type_name() != "Reshape":
        return False
    given = list(before.get_input_shape(0))
    return [*given[:2], math.prod(given[2:])] == list(before.get_output_shape(0))


def _flatten_behind(node: ov.Node) -> None:
    """Permute the axes of a map first, and make one axis of its places then."""
    source = node.input_value(0).get_node().input_value(0)
    axes = range(len(source.get_shape()))
    last = op.transpose(source, op.constant([0, *axes[2:], 1]))
    flat = _reshaped(last.output(0), node.get_output_shape(0))
    flat.set_names(node.output(0).get_names())
    _replace(node.output(0), flat)


def _replace(value: ov.Output, new: ov.Output) -> None:
    for target in list(value.get_target_inputs()):
        target.replace_source_output(new)


def _large(shape: Sequence[int]) -> list[int]:
    """Return the axes that are larger than one."""
    return [axis for axis, size in enumerate(shape) if size != 1]


def _constant(node: ov.Node, place: int) -> list[int] | None:
    """Return the numbers of an input; None if they are not constant."""
    given = node.input_value(place).get_node()
    if given.get_type_name() != "Constant":
        return None
    return [int(number) for number in given.data.ravel()]


def _is_zero(node: ov.Node) -> bool:
    """Return whether a Pad pads with zeros."""
    if node.get_input_size() < 4:
        return True
    value = node.input_value(3).get_node()
    return bool(value.get_type_name() == "Constant" and not value.data.any())


def _reshaped(value: ov.Output, shape: Sequence[int]) -> ov.Output:
    if list(value.get_shape()) == list(shape):
        return value
    return op.reshape(value, op.constant(list(shape)), False).output(0)


def _padded(value: ov.Output, pairs: Pairs, mode: str = "constant") -> ov.Output:
    begin, end = (op.constant(list(side)) for side in zip(*pairs, strict=True))
    return op.pad(value, begin, end, mode).output(0)
