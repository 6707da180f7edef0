"""Writes the step of a stream that looks ahead as a graph: see `ahead.py` for what it computes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from fvae_deploy.export.cut.ahead import Source, StepAhead
from fvae_deploy.export.cut.step_graph import StepEmitter
from fvae_deploy.export.cut.timing import NotCausal, Timed
from fvae_deploy.export.cut.trace import Node, aten


class AheadEmitter(StepEmitter):
    """Builds the graph of a step: (x, clock, *past) -> (result, *next).

    The window was traced with `turns` latent frames.
    """

    plan: StepAhead

    def __init__(self, plan: StepAhead, root: nn.Module, cells: int, turns: int) -> None:
        self._turns = turns
        self._consumer, self._turn = "", plan.step  # whose operands are fetched, in which step
        self._conditions: dict[int, Any] = {}
        self._apart: dict[tuple[str, int], Any] = {}
        super().__init__(plan, root, cells)

    def _data(self) -> Any:
        data = self.graph.placeholder("x")
        clock = self.graph.placeholder("clock")
        self._since, self._until = (self._call(aten.select.int, clock, 0, i) for i in (0, 1))
        return data

    def _operation(self, node: Node, low: int, high: int) -> Any:
        before, self._consumer = self._consumer, node.name
        try:
            return super()._operation(node, low, high)
        finally:
            self._consumer = before

    def fetch(self, name: str, low: int, high: int, fill: float | str = 0.0) -> Any:
        """Return frames [low, high) of an operand; near the ends, those that stand in for them."""
        if not isinstance(self.clock.timings[name].infos[0], Timed):
            return super().fetch(name, low, high)
        consumer = self._consumer
        if self._turn == self.plan.step and (inner := self.plan.inside_margins(name)) is not None:
            node = self.clock.nodes[name]
            return self._call(node.target, self.fetch(inner, low, high), *node.args[1:])
        if self._turn != self.plan.step:
            follow = self.plan.follow
            return self._joined_frames([follow(consumer, name, i) for i in range(low, high)], name)
        found = self.plan.taken.get((consumer, name, low, high))
        if found is None:  # a state
            return super().fetch(name, low, high)
        value = self._joined_frames(found.middle, name)
        for turn, others in found.ends.items():
            for places, sources in _runs(others):
                value = self._replaced(value, name, turn, places, sources, high - low)
        return value

    def _replaced(
        self,
        value: Any,
        name: str,
        turn: int,
        places: tuple[int, int],
        sources: list[Source],
        count: int,
    ) -> Any:
        """Return `count` frames, of which some are others in one step of the stream."""
        low, high = places
        axis = self._frame_axis(name)
        cut = [self._slice(value, axis, a, b) for a, b in ((0, low), places, (high, count))]
        usual = cut[1] if high - low < count else value
        condition = self._condition(turn)
        if isinstance(sources[0], tuple):
            before, self._turn = self._turn, turn
            try:
                others = self._joined_frames(sources, name)
            finally:
                self._turn = before
            chosen = self._call(aten.where.self, condition, others, usual)
        else:
            chosen = self._call(aten.where.ScalarSelf, condition, sources[0], usual)
        pieces = [piece for piece in (cut[0], chosen, cut[2]) if piece is not None]
        return pieces[0] if len(pieces) == 1 else self._call(aten.cat.default, pieces, axis)

    def _slice(self, value: Any, axis: int, low: int, high: int) -> Any:
        return self._call(aten.slice.Tensor, value, axis, low, high) if low < high else None

    def _frame_axis(self, name: str) -> int:
        info = self.clock.timings[name].infos[0]
        assert isinstance(info, Timed)
        if (info.outer, info.inner) != (1, 1):
            raise NotCausal("frames are mixed with other axes")
        return info.axis

    def _condition(self, turn: int) -> Any:
        """Return whether this is a step near an end of the stream."""
        if turn not in self._conditions:
            late = turn > self.plan.step
            counted, number = (self._until, turn - self._turns + 1) if late else (self._since, turn)
            self._conditions[turn] = self._call(aten.eq.Scalar, counted, number)
        return self._conditions[turn]

    def _joined_frames(self, sources: Sequence[Source], name: str) -> Any:
        """Return frames of several tensors in the step at hand, joined; numbers pad them."""
        frames = [source for source in sources if isinstance(source, tuple)]
        if not frames:
            raise NotCausal("frames are needed that are all padding")
        numbers = [i for i, source in enumerate(sources) if not isinstance(source, tuple)]
        first = next(i for i, source in enumerate(sources) if isinstance(source, tuple))
        after = len(sources) - first - len(frames)
        if any(first <= i < first + len(frames) for i in numbers):
            raise NotCausal("frames are padded in their middle")
        pieces = [self._frames_of(*piece) for piece in _pieces(frames)]
        joined = pieces[0]
        if len(pieces) > 1:
            joined = self._call(aten.cat.default, pieces, self._frame_axis(name))
        if not numbers:
            return joined
        rank = len(self.clock.nodes[name].shapes[0])
        pads = [0, 0] * (rank - 1 - self._frame_axis(name)) + [first, after]
        return self._call(aten.constant_pad_nd.default, joined, pads, sources[numbers[0]])

    def _frames_of(self, name: str, low: int, high: int) -> Any:
        """Return frames of a tensor in the step at hand."""
        info = self.clock.timings[name].infos[0]
        if not isinstance(info, Timed):
            return super().fetch(name, low, high)
        if rate := self.plan.rate(name):
            shift = rate * (self._turn - self.plan.step)
            return super().fetch(name, low - shift, high - shift)
        key = name, self._turn
        if key not in self._apart:
            self._apart[key] = self._operation(self.clock.nodes[name], 0, len(info.steps))
        if (low, high) == (0, len(info.steps)):
            return self._apart[key]
        return self._slice(self._apart[key], self._frame_axis(name), low, high)


def _runs(others: dict[int, Source]) -> list[tuple[tuple[int, int], list[Source]]]:
    """Return places that follow one another, of frames or of one number, with their sources."""

    def key(item: tuple[int, tuple[int, Source]]) -> Any:
        position, (place, source) = item
        return place - position, source if isinstance(source, float) else None

    found = []
    for _, group in itertools.groupby(enumerate(sorted(others.items())), key):
        items = [item for _, item in group]
        found.append(((items[0][0], items[-1][0] + 1), [source for _, source in items]))
    return found


def _pieces(frames: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Return frames that follow one another in a tensor as (tensor, first, end)."""
    found: list[tuple[str, int, int]] = []
    for name, frame in frames:
        if found and found[-1][0] == name and found[-1][2] == frame:
            found[-1] = name, found[-1][1], frame + 1
        else:
            found.append((name, frame, frame + 1))
    return found
