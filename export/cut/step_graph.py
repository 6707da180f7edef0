"""Writes one step of a causal stream as a graph: see `steps.py` for what a step computes."""

from __future__ import annotations

import operator
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fvae_deploy.export.cut.axes import SIZES, Triple
from fvae_deploy.export.cut.emit import PLACES, UPSAMPLED, VIEWED
from fvae_deploy.export.cut.local import repeating
from fvae_deploy.export.cut.lower import SAME, packet_name
from fvae_deploy.export.cut.steps import Step
from fvae_deploy.export.cut.timing import NotCausal, Timed, matrix_of
from fvae_deploy.export.cut.timing_rules import frames_added, interpolates
from fvae_deploy.export.cut.trace import Node, Ref, Sized, aten

FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class StepEmitter:
    """Builds the graph of a step; `cells` are pixels per latent cell of its data."""

    def __init__(self, plan: Step, root: nn.Module, cells: int) -> None:
        self.plan, self.clock, self.root = plan, plan.clock, root
        self.graph = torch.fx.Graph()
        self.current: dict[str, Any] = {}
        self.earlier: dict[str, Any] = {}
        data = self._data()
        states = plan.states
        holders = [self.graph.placeholder(f"past{i}") for i in range(len(states))]
        self.earlier |= {name: p for (name, _, _), p in zip(states, holders, strict=True)}
        self.h, self.w = (self._per_cell(data, axis, cells) for axis in (3, 4))
        for node in plan.graph.nodes:
            self._node(node, data)
        self.graph.output(tuple(self.fetch(*wanted) for wanted in plan.wanted))
        self.graph.eliminate_dead_code()

    def _data(self) -> Any:
        """Return the data of the step, and make what comes beside it."""
        return self.graph.placeholder("x")

    def _per_cell(self, data: Any, axis: int, cells: int) -> Any:
        size = self.graph.call_function(aten.sym_size.int, (data, axis))
        return size if cells == 1 else self.graph.call_function(operator.floordiv, (size, cells))

    def _node(self, node: Node, data: Any) -> None:
        plan, name = self.plan, node.name
        if name in plan.past and plan.recomputed(name):
            timed = isinstance(self.clock.timings[name].infos[0], Timed)
            high = plan.range(name)[0] if timed else self.clock.timings[name].count
            self.earlier[name] = self._operation(node, plan.past[name], high)
        if name not in plan.now:
            return
        if node.target == "input":
            self.current[name] = data
        elif node.target != "weight":
            self.current[name] = self._operation(node, *plan.full_range(node))

    def _weight(self, node: Node) -> str:
        """Return a weight's name; constants that code makes are kept once each."""
        name: str = node.args[0]
        if not name.startswith("constant"):
            return name
        assert node.value is not None
        held = dict(self.root.named_buffers(recurse=False))
        for other, value in held.items():
            alike = (value.shape, value.dtype) == (node.value.shape, node.value.dtype)
            if other.startswith("constant_") and alike and torch.equal(value, node.value):
                return other
        name = f"constant_{len(held)}"
        self.root.register_buffer(name, node.value.clone(), persistent=False)
        return name

    def fetch(self, name: str, low: int, high: int, fill: float | str = 0.0) -> Any:
        """Return frames [low, high) of a tensor; those beyond its ends are filled."""
        info = self.clock.timings[name].infos[0]
        node = self.clock.nodes[name]
        if node.target == "weight" and name not in self.current:  # read where it is first used
            self.current[name] = self.graph.get_attr(self._weight(node))
        if not isinstance(info, Timed):
            return self.current.get(name, self.earlier.get(name))
        inside = max(low, 0), min(high, len(info.steps))
        begin, _ = self.plan.range(name)
        pieces = []
        if inside[0] < min(begin, inside[1]):
            first = self.plan.past[name]
            end = min(begin, inside[1])
            pieces.append(
                self._narrow(
                    self.earlier[name], name, inside[0] - first, end - first, begin - first
                )
            )
        if inside[1] > begin:
            start, end = max(inside[0] - begin, 0), inside[1] - begin
            count = self.plan.range(name)[1] - begin
            pieces.append(self._narrow(self.current[name], name, start, end, count))
        before, after = inside[0] - low, high - inside[1]
        if fill == "edge" and (before or after):
            ends = [pieces[0]] * before, [pieces[-1]] * after
            if (before and after) or inside[1] - inside[0] > 1:
                raise NotCausal("frames at the end are repeated")
            pieces = [*ends[0], *pieces, *ends[1]]
        joined = pieces[0] if len(pieces) == 1 else self._call(aten.cat.default, pieces, info.axis)
        if fill == "edge" or not (before or after):
            return joined
        pads = [0, 0] * (len(node.shapes[0]) - 1 - info.axis) + [before, after]
        return self._call(aten.constant_pad_nd.default, joined, pads, fill)

    def _narrow(self, value: Any, name: str, low: int, high: int, count: int) -> Any:
        """Return some of `count` frames."""
        if (low, high) == (0, count):
            return value
        info = self.clock.timings[name].infos[0]
        assert isinstance(info, Timed)
        if (info.outer, info.inner) != (1, 1):
            raise NotCausal("frames are mixed with other axes")
        return self._call(aten.slice.Tensor, value, info.axis, low, high)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return self.graph.call_function(target, args, kwargs)

    def _operation(self, node: Node, low: int, high: int) -> Any:
        """Emit an operation for frames [low, high) of its result."""
        name = packet_name(node.target)
        if name in SAME:
            return self._operand(node, node.args[0], low, high)
        if node.target == "item":
            return self._item(node, low, high)
        if self.plan.joins_frames(node):
            return self._joined(node, low, high)
        for emit in (self._between, self._moved):
            if (moved := emit(node, low, high)) is not None:
                return moved
        args = [self._argument(node, a, low, high) for a in node.args]
        sizes = self._sizes(node, low, high)
        if name in VIEWED:
            args[0 if name in ("full", "zeros", "ones") else 1] = sizes
        elif name.startswith(UPSAMPLED):
            args[1] = sizes[2:]
        kwargs = {k: self._argument(node, v, low, high) for k, v in node.kwargs.items()}
        kwargs = {k: v for k, v in kwargs.items() if k not in PLACES}
        if name == "native_group_norm":  # its form that takes any layout
            x, weight, bias, *_, groups, eps = args
            return self._call(aten.group_norm.default, x, groups, weight, bias, eps, False)
        if name == "bmm" and (matrix := matrix_of(self.clock, node.args[1])) is not None:
            return self._call(aten.matmul.default, args[0], self.fetch(matrix.name, 0, 1))
        if name == FLASH:
            query, key, value, *rest = args
            options = dict(zip(("dropout_p", "is_causal"), rest, strict=False)) | kwargs
            mask = options.pop("attn_mask", None)
            op = aten.scaled_dot_product_attention.default
            return self._call(op, query, key, value, mask, **options)
        target = aten.reshape.default if name in ("view", "_unsafe_view") else node.target
        if name.startswith("_upsample_nearest_exact"):
            old = self.clock.shape(node.args[0])
            if all(n % m == 0 for (n, _, _), m in zip(node.shapes[0], old, strict=True)):
                target = repeating(target)
        return self._call(target, *args, **kwargs)

    def _item(self, node: Node, low: int, high: int) -> Any:
        """Emit a piece of a split, or one of several results."""
        ref, index = node.args
        parent = self.clock.nodes[ref.name]
        (source,) = self.plan.sources(node)
        if packet_name(parent.target) in (FLASH, "native_group_norm"):
            return self._operand(node, ref, low, high)
        if source == ref.name:
            return self._call(operator.getitem, self._operand(node, ref, low, high), index)
        unbind = "unbind" in str(parent.target)
        given = parent.args[1 if unbind else 2 :]
        dim = given[0] if given else parent.kwargs.get("dim", 0)
        dim %= len(self.clock.nodes[source].shapes[0])
        value = self._operand(node, Ref(source), low, high)
        info = self.clock.timings[source].infos[0]
        alone = isinstance(info, Timed) and info.axis == dim
        if unbind:
            return self._call(aten.select.int, value, dim, 0 if alone else index)
        if alone:
            return value
        start = sum(parent.shapes[i][dim][0] for i in range(index))
        return self._call(aten.slice.Tensor, value, dim, start, start + node.shapes[0][dim][0])

    def _joined(self, node: Node, low: int, high: int) -> Any:
        """Emit a join along frames."""
        axis, pieces = self.plan.axis_of(node), []
        for name, start, stop in self.plan.joined(node, low, high):
            if isinstance(self.clock.timings[name].infos[0], Timed):
                pieces.append(self.fetch(name, start, stop))
                continue
            value = self.fetch(name, 0, 1)
            if (start, stop) != (0, self.clock.shape(Ref(name))[axis]):
                value = self._call(aten.slice.Tensor, value, axis, start, stop)
            pieces.append(value)
        return pieces[0] if len(pieces) == 1 else self._call(aten.cat.default, pieces, axis)

    def _moved(self, node: Node, low: int, high: int) -> Any:
        """Emit an operation that moves frames; None for one that does not."""
        name, args = packet_name(node.target), list(node.args)
        spans = self.clock.timings[node.name].spans
        if not args or not isinstance(args[0], Ref) or args[0].name not in spans:
            return None
        source = args[0].name
        info = self.clock.info(args[0])
        assert isinstance(info, Timed)
        span = spans[source](low, high)
        rank = len(self.clock.nodes[source].shapes[0])
        if name in ("slice", "select"):
            dim = (args[1] if len(args) > 1 else 0) % rank
            if dim != info.axis:
                return None
            value = self.fetch(source, *span)
            if name == "select":
                return self._call(aten.select.int, value, dim, 0)
            step = args[4] if len(args) > 4 else 1
            return value if step == 1 else self._call(
                aten.slice.Tensor, value, dim, 0, span[1] - span[0], step
            )  # fmt: skip
        if "_pad" in name and frames_added(args[1], rank, info.axis) != (0, 0):
            fill = "edge" if "replication" in name else args[2] if len(args) > 2 else 0.0
            return self.fetch(source, *span, fill)
        grows = name.startswith(UPSAMPLED) or (name == "convolution" and args[6])
        if grows and info.axis > 1:
            factor = node.shapes[0][info.axis][0] // self.clock.shape(args[0])[info.axis]
            if factor > 1 and (span[0] * factor, span[1] * factor) != (low, high):
                raise NotCausal("a step ends within a frame that becomes several")
        if name == "convolution" and info.axis > 1:
            padding = list(args[4])
            padding[info.axis - 2] = 0
            rest = [self._argument(node, a, low, high) for a in args[1:4]]
            value = self.fetch(source, *span)
            return self._call(node.target, value, *rest, padding, *args[5:])
        return None

    def _between(self, node: Node, low: int, high: int) -> Any:
        """Emit an interpolation between frames; None for anything else."""
        if not packet_name(node.target).startswith(UPSAMPLED) or not interpolates(node):
            return None
        source, info = node.args[0], self.clock.info(node.args[0])
        if not isinstance(info, Timed):
            return None
        factor = node.shapes[0][info.axis][0] // self.clock.shape(source)[info.axis]
        if factor == 1:
            return None
        first, last = self.clock.timings[node.name].spans[source.name](low, high)
        sizes = self._sizes(node, low, high)
        sizes[info.axis] = factor * (last - first)
        rest = [self._argument(node, a, low, high) for a in node.args[2:]]
        value = self.fetch(source.name, first, last, "edge")
        value = self._call(node.target, value, sizes[2:], *rest)
        begin = low - factor * first  # those beside it would need frames that are not here
        return self._call(aten.slice.Tensor, value, info.axis, begin, begin + high - low)

    def _operand(self, node: Node, ref: Ref, low: int, high: int) -> Any:
        span = self.clock.timings[node.name].spans.get(ref.name)
        info = self.clock.info(ref)
        whole = 0, len(info.steps) if isinstance(info, Timed) else 1
        return self.fetch(ref.name, *(span(low, high) if span else whole))

    def _argument(self, node: Node, value: Any, low: int, high: int) -> Any:
        if isinstance(value, Ref):
            return self._operand(node, value, low, high)
        if isinstance(value, Sized):
            return self._solved(value.triple)
        if isinstance(value, (list, tuple)):
            return [self._argument(node, v, low, high) for v in value]
        return value

    def _sizes(self, node: Node, low: int, high: int) -> list[Any]:
        """Return the result's sizes, with as many frames as are computed."""
        info = self.clock.timings[node.name].infos[0]
        sizes = []
        for axis, triple in enumerate(node.shapes[0]):
            if isinstance(info, Timed) and axis == info.axis:
                share = Fraction(high - low, len(info.steps))
                a, b, c = (share * n for n in triple)
                if a.denominator * b.denominator * c.denominator > 1:
                    raise NotCausal("frames are mixed with other axes")
                triple = (int(a), int(b), int(c))
            sizes.append(self._solved(triple))
        return sizes

    def _solved(self, triple: Triple) -> Any:
        """Return a number that may depend on the plane, as a function of its cells."""
        a, b, c = triple
        (h, w), (taller, _), (_, wider) = SIZES
        down, right = Fraction(b - a, taller - h), Fraction(c - a, wider - w)
        if not down and not right:
            return a
        if down and right:
            factor = Fraction(a, h * w)
            product = factor * taller * w == b and factor * h * wider == c
            if not product or factor.denominator > 1:
                raise NotCausal("a size depends on the plane in another way than by its cells")
            cells = self._call(operator.mul, self.h, self.w)
            return self._call(operator.mul, cells, int(factor))
        slope, cells, at = (down, self.h, h) if down else (right, self.w, w)
        if slope.denominator > 1:
            raise NotCausal("a size depends on the plane in another way than by its cells")
        value = cells if slope == 1 else self._call(operator.mul, cells, int(slope))
        extra = a - int(slope) * at
        return self._call(operator.add, value, extra) if extra else value
