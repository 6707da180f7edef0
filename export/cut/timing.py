"""When each frame of every tensor of a window is known, if slices arrive step by step.

A window is traced as a whole. Slice 0 arrives in step 0, and those of every further latent frame in
a step of their own. A frame of a result is known in the step in which the last frame that it needs
arrives. Code that loops over latent frames and keeps its own cache needs no rule for that: what one
turn of the loop computes is known in one step. A network is causal if the frames of its result are
known in the steps in which they are due; then each step is a function of new slices and of what
earlier steps have left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fvae_deploy.export.cut.lower import packet_name
from fvae_deploy.export.cut.trace import Graph, Node, Ref

Shape = tuple[int, ...]
Span = Callable[[int, int], tuple[int, int]]  # frames of a result -> frames of an operand


class NotCausal(Exception):  # noqa: N818
    """Why a window does not fall into steps."""


@dataclass(frozen=True)
class Timed:
    """A tensor with frames along `axis`, which holds outer x frames x inner elements.

    `steps` are the steps in which the frames are known.
    """

    axis: int
    outer: int
    inner: int
    steps: tuple[int, ...]


PIECES = ("split", "split_with_sizes", "unsafe_split", "unbind")  # of one axis, as items
Info = Timed | int | None  # frames; known as a whole in a step; does not depend on the input


@dataclass
class Timing:
    """What is known of one operation: of each result, and which frames of operands it needs."""

    infos: tuple[Info, ...]
    spans: Mapping[str, Span] = field(default_factory=dict)  # of operands with frames
    count: int = 1  # frames of the first result, also where all are known in one step


def same(low: int, high: int) -> tuple[int, int]:
    """Return the span of an operation that treats every frame alone."""
    return low, high


def shape_of(node: Node, index: int = 0) -> Shape:
    """Return a result's shape at the first of the traced sizes."""
    return tuple(first for first, _, _ in node.shapes[index])


def latest(info: Info) -> int | None:
    """Return the step in which all of a tensor is known."""
    return max(info.steps, default=0) if isinstance(info, Timed) else info


def settled(info: Info) -> Info:
    """Return the info with frames that are all known in one step seen as one whole."""
    if isinstance(info, Timed):
        if any(a > b for a, b in zip(info.steps, info.steps[1:], strict=False)):
            raise NotCausal("frames are not in their order")
        if info.steps and len(set(info.steps)) == 1:
            return info.steps[0]
    return info


def moved(info: Timed, old: Shape, new: Shape) -> Timed | None:
    """Return where the frames are after a reshape; None if they are torn apart."""
    stride = info.inner * math.prod(old[info.axis + 1 :])
    steps, suffix = info.steps, 1
    for axis in range(len(new) - 1, -1, -1):
        n, below = new[axis], suffix
        suffix *= n
        if suffix <= stride or n == 1:
            continue
        if stride % below:
            return None
        inner = stride // below
        if suffix >= stride * len(steps):
            outer, rest = divmod(n, inner * len(steps))
            return None if rest else Timed(axis, outer, inner, steps)
        group, rest = divmod(n, inner)  # this axis has some of the frames, the next ones the others
        if rest or len(steps) % group:
            return None
        if any(len(set(steps[i : i + group])) > 1 for i in range(0, len(steps), group)):
            return None
        steps, stride = steps[::group], stride * inner * group // inner
    return None


def fine(info: Timed, shape: Shape) -> tuple[int, ...]:
    """Return the steps of the elements of an axis of frames alone; raises NotCausal otherwise."""
    if (info.outer, info.inner) != (1, 1) or len(info.steps) != shape[info.axis]:
        raise NotCausal("frames are mixed with other axes")
    return info.steps


class Clock:
    """Follows the frames through a traced window, operation by operation."""

    def __init__(self, graph: Graph, steps: Sequence[int]) -> None:
        self.nodes = {node.name: node for node in graph.nodes}
        self.timings: dict[str, Timing] = {}
        for node in graph.nodes:
            self.timings[node.name] = self._timing(node, tuple(steps))

    def info(self, value: Any) -> Info:
        """Return what is known of an argument."""
        return self.timings[value.name].infos[0] if isinstance(value, Ref) else None

    def shape(self, ref: Ref) -> Shape:
        """Return an argument's shape at the first of the traced sizes."""
        return shape_of(self.nodes[ref.name])

    def _timing(self, node: Node, steps: tuple[int, ...]) -> Timing:
        if node.target == "input":
            return Timing((Timed(2, 1, 1, steps),))
        if node.target == "weight":
            return Timing((None,))
        if node.target == "item":
            ref, index = node.args
            if packet_name(self.nodes[ref.name].target) in PIECES:
                found = self._piece(node)
                return found or Timing((self.timings[ref.name].infos[0],))
            return Timing((self.timings[ref.name].infos[index],), {ref.name: same})
        infos = {name: self.timings[name].infos[0] for name in node.inputs}
        timed = {name: info for name, info in infos.items() if isinstance(info, Timed)}
        known = max((s for s in map(latest, infos.values()) if s is not None), default=None)
        whole = Timing((known,) * len(node.shapes))
        name = packet_name(node.target)
        if not timed and not (name == "cat" and len(set(map(latest, infos.values()))) > 1):
            return whole
        rule = self._rule(name) or (
            pointwise if torch.Tag.pointwise in getattr(node.target, "tags", ()) else None
        )
        try:
            found = rule(self, node, timed) if rule else None
        except NotCausal:
            found = None
        return self._settled(node, found) if found else whole  # it may need all frames

    def _rule(self, name: str) -> Rule | None:
        return RULES.get(name)

    def _piece(self, node: Node) -> Timing | None:
        """Return the timing of an item of a split."""
        try:
            found = RULES["item"](self, node, {})
        except NotCausal:
            return None
        return self._settled(node, found) if found else None

    def _settled(self, node: Node, found: Timing) -> Timing:
        """Return the timing with its count, and with frames of one step as one whole."""
        first = found.infos[0]
        found.count = len(first.steps) if isinstance(first, Timed) else 1
        found.infos = tuple(settled(info) for info in found.infos)
        return found


Rule = Callable[[Clock, Node, Mapping[str, Timed]], Timing | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of aten by the names of their packets."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def one(timed: Mapping[str, Timed]) -> tuple[str, Timed]:
    """Return the only operand with frames."""
    if len(timed) > 1:
        raise NotCausal("an operation has several operands with frames")
    return next(iter(timed.items()))


@rule(
    "alias",
    "detach",
    "where",
    "masked_fill",
    "copy",
    "_to_copy",
    "clone",
    "fill",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
)
def pointwise(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Combine elements of equal position: a frame is known when it is in all operands."""
    shape, spans = shape_of(node), {}
    places, steps = set(), None
    for ref in (a for a in node.args if isinstance(a, Ref)):
        info, own = clock.info(ref), clock.shape(ref)
        if not isinstance(info, Timed):
            continue
        places.add((info.axis - len(own), info.outer, info.inner, len(info.steps)))
        steps = info.steps if steps is None else tuple(map(max, steps, info.steps))
        spans[ref.name] = same
    if len(places) != 1 or steps is None:
        return None
    ((back, outer, inner, _),) = places
    for ref in (a for a in node.args if isinstance(a, Ref) and a.name not in spans):
        own = clock.shape(ref)
        if len(own) >= -back and own[back] != 1:
            return None  # a table of all frames
    return Timing((Timed(len(shape) + back, outer, inner, steps),), spans)


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten")
def reshape(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Regroup the elements in their order."""
    name, info = one(timed)
    found = moved(info, clock.shape(Ref(name)), shape_of(node))
    if found is None:
        return None
    fixed = len(set(node.shapes[0][found.axis])) == 1
    if fixed and found.outer == 1 and found.inner > 1:  # every frame becomes several
        several = tuple(step for step in found.steps for _ in range(found.inner))
        found = Timed(found.axis, 1, 1, several)
    ratio = len(found.steps) / len(info.steps)

    def span(low: int, high: int) -> tuple[int, int]:
        return math.floor(low / ratio), math.ceil(high / ratio)

    return Timing((found,), {name: span})


@rule("expand", "repeat")
def expand(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Repeat axes other than that of the frames."""
    name, info = one(timed)
    old, new = clock.shape(Ref(name)), shape_of(node)
    axis = info.axis + len(new) - len(old)
    if new[axis] != old[info.axis]:
        return None
    return Timing((Timed(axis, info.outer, info.inner, info.steps),), {name: same})


@rule("permute", "transpose", "t")
def permute(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Reorder the axes."""
    name, info = one(timed)
    order = list(range(len(clock.shape(Ref(name)))))
    if "permute" in str(node.target):
        order = [d % len(order) for d in node.args[1]]
    else:
        a, b = node.args[1:3] if len(node.args) > 1 else (0, 1)
        order[a], order[b] = order[b], order[a]
    found = Timed(order.index(info.axis), info.outer, info.inner, info.steps)
    return Timing((found,), {name: same})


@rule("native_layer_norm", "_fused_rms_norm", "native_group_norm", "_softmax", "_safe_softmax")
@rule("native_batch_norm", "_native_batch_norm_legit_no_training")
def norm(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Normalise within frames."""
    name, info = one(timed)
    shape, kind = clock.shape(Ref(name)), packet_name(node.target)
    if "softmax" in kind:
        alone = node.args[1] % len(shape) != info.axis
    elif "layer" in kind or "rms" in kind:
        alone = info.axis < len(shape) - len(node.args[1])
    elif "batch" in kind:
        alone = "no_training" in kind or not node.args[5]
    else:
        alone = info.axis == 0
    others: tuple[Info, ...] = (latest(info),) * (len(node.shapes) - 1)
    return Timing((info, *others), {name: same}) if alone else None


@rule("mean", "sum", "amax", "amin", "var", "linalg_vector_norm", "std")
def statistic(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Reduce axes other than that of the frames."""
    name, info = one(timed)
    rank = len(clock.shape(Ref(name)))
    rest = node.args[2 if "vector_norm" in str(node.target) else 1 :]
    dims = rest[0] if rest else node.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
    inside = {d % rank for d in dims}
    if info.axis in inside:
        return None
    kept = len(shape_of(node)) == rank
    axis = info.axis if kept else info.axis - sum(d < info.axis for d in inside)
    return Timing((Timed(axis, info.outer, info.inner, info.steps),), {name: same})


def matrix_of(clock: Clock, ref: Ref) -> Ref | None:
    """Return the matrix that a constant operand repeats for every item of a batch."""
    rows, node = clock.shape(ref)[-2:], clock.nodes[ref.name]
    if clock.info(ref) is not None:
        return None
    while packet_name(node.target) in ("expand", "view", "_unsafe_view", "unsqueeze"):
        node = clock.nodes[node.args[0].name]
    return Ref(node.name) if shape_of(node) == rows else None


@rule("bmm", "mm", "addmm", "baddbmm")
def product(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Multiply matrices frame by frame."""
    first = 1 if "add" in str(node.target) else 0
    a, b = node.args[first : first + 2]
    left, right = clock.info(a), clock.info(b)
    batched = "bmm" in str(node.target)
    if not isinstance(left, Timed) or left.axis != 0 or (first and node.args[0].name in timed):
        return None
    if isinstance(right, Timed) and not (
        batched and (right.axis, right.outer, right.inner) == (0, left.outer, left.inner)
    ):
        return None
    if batched and not isinstance(right, Timed) and matrix_of(clock, b) is None:
        return None
    steps = left.steps
    if isinstance(right, Timed):
        steps = tuple(map(max, steps, right.steps))
    spans = {ref.name: same for ref in (a, b) if ref.name in timed}
    return Timing((Timed(0, left.outer, left.inner, steps),), spans)


@rule("_scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_attention")
def attention(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Attend within frames."""
    refs = node.args[:3]
    infos = [clock.info(ref) for ref in refs]
    if len(timed) > 3 or not all(isinstance(i, Timed) and i.axis == 0 for i in infos):
        return None
    found = [i for i in infos if isinstance(i, Timed)]
    if len({(i.outer, i.inner, len(i.steps)) for i in found}) > 1:
        return None
    steps = tuple(map(max, *(i.steps for i in found)))
    info = Timed(0, found[0].outer, found[0].inner, steps)
    others: tuple[Info, ...] = (max(steps),) * (len(node.shapes) - 1)
    return Timing((info, *others), {ref.name: same for ref in refs})
