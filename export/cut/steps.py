"""The function of one step of a causal window: new slices and states in, results and states out.

Of every operation, a step computes the frames that are known in it and not before. What it needs
of earlier steps is its state. A step is emitted for each of the traced ones; from the second one
on they must be the same function, or the window is no stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from fvae_deploy.export.cut import timing_rules  # noqa: F401  (it registers its rules)
from fvae_deploy.export.cut.axes import SIZES, Triple
from fvae_deploy.export.cut.lower import packet_name
from fvae_deploy.export.cut.timing import Clock, NotCausal, Timed
from fvae_deploy.export.cut.timing_rules import frames_added
from fvae_deploy.export.cut.trace import Graph, Node

AGAIN = ("pad1d", "pad2d", "pad3d", "pad_nd", "expand", "repeat")  # larger than what they take
Wanted = tuple[str, int, int]  # a tensor, and a range of its frames


class Step:
    """What one step computes, and what it takes from earlier ones."""

    def __init__(self, clock: Clock, graph: Graph, step: int, wanted: Sequence[Wanted]) -> None:
        self.clock, self.graph, self.step, self.wanted = clock, graph, step, wanted
        self.now: set[str] = set()
        self.past: dict[str, int] = {}  # the first frame that is needed of earlier ones
        for name, low, high in wanted:
            self._need(name, low, high)
        for node in reversed(graph.nodes):
            if node.name in self.past and self._recomputed(node):
                low = self.past[node.name]
                high = self.range(node.name)[0] if self._timed(node.name) else self._count(node)
                self._need_inputs(node, low, high)
            if node.name in self.now and node.target not in ("input", "weight"):
                self._need_inputs(node, *self.full_range(node))

    @property
    def states(self) -> list[Wanted]:
        """Return the tensors of earlier steps that this one takes, with their frames."""
        return [
            (node.name, self.past[node.name], self.past_end(node.name))
            for node in self.graph.nodes
            if node.name in self.past and not self._recomputed(node)
        ]

    def past_end(self, name: str) -> int:
        """Return the end of the frames known before this step; of a tensor without frames, 1."""
        return self.range(name)[0] if self._timed(name) else 1

    def range(self, name: str) -> tuple[int, int]:
        """Return the frames of a tensor that are known in this step and not before."""
        info = self.clock.timings[name].infos[0]
        assert isinstance(info, Timed)
        return sum(s < self.step for s in info.steps), sum(s <= self.step for s in info.steps)

    def full_range(self, node: Node) -> tuple[int, int]:
        """Return the frames that this step computes; all, of a tensor known as a whole."""
        return self.range(node.name) if self._timed(node.name) else (0, self._count(node))

    def _timed(self, name: str) -> bool:
        return isinstance(self.clock.timings[name].infos[0], Timed)

    def _count(self, node: Node) -> int:
        return self.clock.timings[node.name].count

    def recomputed(self, name: str) -> bool:
        """Return whether frames of earlier steps are made again from those of its input."""
        return self._recomputed(self.clock.nodes[name])

    def _recomputed(self, node: Node) -> bool:
        if node.target in ("input", "item"):
            return False
        if not packet_name(node.target).endswith(AGAIN):
            return not in_cells(node.shapes[0])  # a state must be a map
        info = self.clock.info(node.args[0])
        rank = len(node.shapes[0])
        if isinstance(info, Timed) and "pad" in str(node.target):
            return frames_added(node.args[1], rank, info.axis) == (0, 0)
        return True

    def sources(self, node: Node) -> list[str]:
        """Return the operands that an operation is computed from."""
        spans = self.clock.timings[node.name].spans
        if node.target == "item" and node.args[0].name not in spans and spans:
            return list(spans)
        return node.inputs

    def _need_inputs(self, node: Node, low: int, high: int) -> None:
        spans = self.clock.timings[node.name].spans
        if self.joins_frames(node):
            for name, start, stop in self.joined(node, low, high):
                timed = self._timed(name)
                self._need(name, *((start, stop) if timed else (0, 1)))
            return
        for name in self.sources(node):
            if name in spans:
                self._need(name, *spans[name](low, high))
            else:
                info = self.clock.timings[name].infos[0]
                self._need(name, 0, len(info.steps) if isinstance(info, Timed) else 1)

    def joins_frames(self, node: Node) -> bool:
        """Return whether an operation joins tensors along their frames."""
        if packet_name(node.target) != "cat" or self._count(node) == 1:
            return False
        axis, infos = self.axis_of(node), [self.clock.info(ref) for ref in node.args[0]]
        return all(not isinstance(i, Timed) or i.axis == axis for i in infos)

    def axis_of(self, node: Node) -> int:
        """Return the axis along which tensors are joined."""
        dim: int = node.args[1] if len(node.args) > 1 else 0
        return dim % len(node.shapes[0])

    def joined(self, node: Node, low: int, high: int) -> list[Wanted]:
        """Return the operands of a join that have some of its frames, and which of theirs."""
        offset, found = 0, []
        for ref in node.args[0]:
            count = self.clock.shape(ref)[self.axis_of(node)]
            start, stop = max(low - offset, 0), min(high - offset, count)
            if start < stop:
                found.append((ref.name, start, stop))
            offset += count
        return found

    def _need(self, name: str, low: int, high: int) -> None:
        info = self.clock.timings[name].infos[0]
        if not isinstance(info, Timed):
            if info is not None and info > self.step:
                raise NotCausal(f"{name} needs later slices")
            if info is not None and info < self.step:
                self.past[name] = 0
            else:
                self.now.add(name)
            return
        low, high = max(low, 0), min(high, len(info.steps))
        begin, end = self.range(name)
        if high > end:
            raise NotCausal(f"{name} needs later slices")
        if low < min(begin, high):
            self.past[name] = min(self.past.get(name, begin), low)
        if high > max(begin, low):
            self.now.add(name)


def in_cells(shape: Sequence[Triple]) -> bool:
    """Return whether a tensor is a map of whole cells: one axis of rows, and one of columns."""
    (h, w), (taller, _), (_, wider) = SIZES
    kinds = []
    for a, b, c in shape:
        if a == b == c:
            continue
        if a % h == 0 and (b, c) == (a // h * taller, a):
            kinds.append("h")
        elif a % w == 0 and (b, c) == (a, a // w * wider):
            kinds.append("w")
        else:
            return False
    return kinds == ["h", "w"]
