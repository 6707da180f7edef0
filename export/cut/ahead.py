"""What one step of a window computes that looks ahead, and where the two ends of a volume differ.

A window is traced that is long enough to have a middle. There every step is the same function, and
`steps.py` finds it: of every operation, the frames that are known in the step and not before. The
result lags behind by some frames. Near the two ends, some frames come from elsewhere:

    cat([x[:, :, :1], x, x[:, :, -1:]], 2)      frame 0 is x[0] where the middle has x[-1]
    padding, or a convolution that pads         zeros, or a frame repeated or mirrored

Slices, joins, paddings and repeats along frames only move frames. So each frame that an operation
takes is followed back to the operation that computed it, in every step of the window. Where that is
another one than in the middle, the step takes that frame instead, if the clock says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fvae_deploy.export.cut.lower import SAME, packet_name
from fvae_deploy.export.cut.steps import Step, Wanted
from fvae_deploy.export.cut.timing import (
    RULES,
    Clock,
    NotCausal,
    Rule,
    Span,
    Timed,
    Timing,
    one,
    same,
    shape_of,
)
from fvae_deploy.export.cut.timing_rules import frames_added, interpolates, shifted, taken
from fvae_deploy.export.cut.trace import Graph, Node, Ref

TOO_SHORT = "its steps do not become alike, however many slices it sees"
Frame = tuple[str, int]  # a frame of a tensor
Source = Frame | float  # or a number in its place


def repeated(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Repeat one frame, or repeat along another axis."""
    name, info = one(timed)
    axis = info.axis + len(shape_of(node)) - len(clock.shape(Ref(name)))
    count = shape_of(node)[axis]
    if len(info.steps) > 1 or count == 1 or (info.outer, info.inner) != (1, 1):
        return RULES["expand"](clock, node, timed)
    return Timing((Timed(axis, 1, 1, info.steps * count),), {name: lambda low, high: (0, 1)})


def mirrored(clock: Clock, node: Node, timed: Mapping[str, Timed]) -> Timing | None:
    """Mirror frames at both ends, or margins of every frame."""
    name, info = one(timed)
    low, high = frames_added(node.args[1], len(shape_of(node)), info.axis)
    if not low and not high:
        return Timing((info,), {name: same})
    steps = taken(info.steps, shifted(-low), len(info.steps) + low + high)
    return Timing((Timed(info.axis, 1, 1, steps),), {name: shifted(-low)})


RULES_AHEAD = {"expand": repeated, "repeat": repeated}
RULES_AHEAD |= {f"reflection_pad{n}d": mirrored for n in (1, 2, 3)}
MOVES = {"cat", "slice", "item", "repeat", "expand", *SAME}  # those that may only move frames


class ClockAhead(Clock):
    """Follows the frames through a window as if every operation had as many in every step.

    An operation whose first frames need later slices than that waits in all steps.
    """

    def __init__(self, graph: Graph, turns: int) -> None:
        self._turns = turns
        super().__init__(graph, range(turns))

    def _rule(self, name: str) -> Rule | None:
        return RULES_AHEAD.get(name) or super()._rule(name)

    def _settled(self, node: Node, found: Timing) -> Timing:
        info, middle = found.infos[0], self._turns // 2
        if not isinstance(info, Timed):
            return found
        found.count = len(info.steps)
        kind, rate = packet_name(node.target), info.steps.count(middle)
        moves = kind in MOVES and not (kind == "cat" and _joins(node) != info.axis)
        if rate and not moves and "_pad" not in kind:
            delay = max(rate * step - at for at, step in enumerate(info.steps[: rate * middle]))
            steps = tuple((at + delay) // rate for at in range(len(info.steps)))
            found.infos = (replace(info, steps=steps), *found.infos[1:])
        return found


def _joins(node: Node) -> int:
    """Return the axis along which a node joins tensors."""
    return int(node.args[1] if len(node.args) > 1 else 0) % len(node.shapes[0])


@dataclass
class Taken:
    """The frames that an operation takes of an operand, and those that differ at the ends.

    `middle` has one frame for each place; `ends` has others, by the step and the place.
    """

    middle: list[Frame]
    ends: dict[int, dict[int, Source]] = field(default_factory=dict)


class StepAhead(Step):
    """What a step in the middle of a window computes, and what the steps at the ends need."""

    def __init__(self, clock: Clock, graph: Graph, step: int, wanted: Sequence[Wanted]) -> None:
        self.taken: dict[tuple[str, str, int, int], Taken] = {}  # consumer, operand, its frames
        self.clock, self._apart = clock, set[tuple[str, int]]()
        self.result = graph.result
        super().__init__(clock, graph, step, wanted)

    def rate(self, name: str) -> int:
        """Return how many frames of a tensor are known in each step; 0 of those at one end."""
        low, high = self.range(name)
        return high - low

    def _need(self, name: str, low: int, high: int) -> None:
        if name == self.result and (low, high) == self.range(name):
            self._take("", name, same, (low, high), len(self._steps(name)))
            return
        super()._need(name, low, high)

    def _need_inputs(self, node: Node, low: int, high: int) -> None:
        spans = self.clock.timings[node.name].spans
        if self._timed(node.name) and not self.rate(node.name):
            raise NotCausal(f"{node.name} is not known in every step")
        for name in self.sources(node):
            if name in spans and self._timed(name):
                self._take(node.name, name, spans[name], (low, high), self._count(node))
            elif self.clock.timings[name].infos[0] is None:
                super()._need(name, 0, 1)
            else:
                raise NotCausal(f"{packet_name(node.target)} needs all slices of the window")

    def _steps(self, name: str) -> tuple[int, ...]:
        info = self.clock.timings[name].infos[0]
        assert isinstance(info, Timed)
        return info.steps

    def _take(
        self, consumer: str, name: str, span: Span, frames: tuple[int, int], count: int
    ) -> None:
        """Plan what an operation takes of an operand for its frames, and what it takes at the ends.

        `count` is the number of its frames in the window.
        """
        rate = self.rate(consumer or name)
        if not rate:
            raise NotCausal(TOO_SHORT)
        if (inner := self.inside_margins(name)) is not None:
            self._take(consumer, inner, span, frames, count)
            return
        found = Taken([])
        for at in range(*span(*frames)):
            source = self.follow(consumer, name, at)
            if not isinstance(source, tuple) or not self._flows(source[0]):
                raise NotCausal(TOO_SHORT)
            found.middle.append(source)
            self._need_at(source, self.step)
        turn = self.step - frames[1] // rate - 1
        while (low := frames[0] + rate * (turn - self.step)) < count:
            high = low + frames[1] - frames[0]
            for frame in range(max(low, 0), min(high, count)):
                for at in range(*span(frame, frame + 1)):
                    place = at - span(low, high)[0]
                    usual, number = found.middle[place]
                    usually = usual, number + self.rate(usual) * (turn - self.step)
                    if (source := self.follow(consumer, name, at)) != usually:
                        found.ends.setdefault(turn, {})[place] = source
                        self._need_at(source, turn)
            turn += 1
        if self.step in found.ends:
            raise NotCausal(TOO_SHORT)
        self.taken[consumer, name, *span(*frames)] = found

    def inside_margins(self, name: str) -> str | None:
        """Return what a padding adds margins to, if it adds nothing else."""
        node = self.clock.nodes[name]
        if "_pad" not in packet_name(node.target) or not self._timed(name):
            return None
        source = node.args[0].name
        info = self.clock.timings[source].infos[0]
        if not isinstance(info, Timed):
            return None
        added = frames_added(node.args[1], len(node.shapes[0]), info.axis)
        return source if added == (0, 0) else None

    def _flows(self, name: str) -> bool:
        """Return whether some frames of a tensor are known in every step."""
        return self._timed(name) and self.rate(name) > 0

    def _need_at(self, source: Source, turn: int) -> None:
        """Let a frame be there in another step of the stream."""
        if not isinstance(source, tuple):
            return
        name, frame = source
        if self._flows(name):
            frame -= self.rate(name) * (turn - self.step)
            if frame >= self.range(name)[1]:
                raise NotCausal("frames at the ends need later slices than those in the middle")
            super()._need(name, frame, frame + 1)
        elif self.clock.timings[name].infos[0] is None:
            super()._need(name, 0, 1)
        elif not self._timed(name):
            raise NotCausal(f"{name} needs all slices of the window")
        elif (name, turn) not in self._apart:
            self._apart.add((name, turn))
            node = self.clock.nodes[name]
            spans = self.clock.timings[name].spans
            for operand in self.sources(node):
                if operand in spans:
                    for at in range(*spans[operand](0, len(self._steps(name)))):
                        self._need_at(self.follow(name, operand, at), turn)
                else:
                    self._need_at((operand, 0), turn)

    def follow(self, consumer: str, name: str, at: int) -> Source:
        """Return the frame that an operation takes as frame `at` of an operand."""
        if 0 <= at < self._frames(name):
            return self._followed(name, at)
        node = self.clock.nodes.get(consumer)
        if node is not None and packet_name(node.target) == "convolution":
            return 0.0
        if node is not None and interpolates(node):
            return self._followed(name, min(max(at, 0), self._frames(name) - 1))
        raise NotCausal("frames are taken beyond the ends")

    def _frames(self, name: str) -> int:
        info = self.clock.timings[name].infos[0]
        return len(info.steps) if isinstance(info, Timed) else 1

    def _followed(self, name: str, at: int) -> Source:
        """Return the frame that was computed, through all that only moves frames."""
        node = self.clock.nodes[name]
        info = self.clock.timings[name].infos[0]
        if not isinstance(info, Timed) or node.target in ("input", "weight"):
            return name, at
        kind, args = packet_name(node.target), node.args
        if kind in SAME:
            return self._followed(args[0].name, at)
        if self.joins_frames(node):
            ((operand, first, _),) = self.joined(node, at, at + 1)
            return self._followed(operand, first)
        source = self.sources(node)[0]
        inside = self.clock.info(Ref(source))
        if not isinstance(inside, Timed):
            return name, at
        if "_pad" in kind:
            return self._padded(node, inside, at)
        dim = _axis(self.clock, node, source)
        if dim == inside.axis and kind in ("slice", "item"):
            start, _ = self.clock.timings[name].spans[source](at, at + 1)
            return self._followed(source, start)
        if kind in ("repeat", "expand") and len(inside.steps) == 1 < len(info.steps):
            return self._followed(source, 0)
        return name, at

    def _padded(self, node: Node, inside: Timed, at: int) -> Source:
        """Return a frame of a padding along frames; one of margins alone is computed."""
        source, kind, count = node.args[0].name, packet_name(node.target), len(inside.steps)
        low, high = frames_added(node.args[1], len(node.shapes[0]), inside.axis)
        if not low and not high:
            return node.name, at
        if 0 <= at - low < count:
            return self._followed(source, at - low)
        if "constant" in kind:
            return float(node.args[2] if len(node.args) > 2 else 0.0)
        beyond = at - low
        if "reflection" in kind:
            return self._followed(source, -beyond if beyond < 0 else 2 * (count - 1) - beyond)
        return self._followed(source, min(max(beyond, 0), count - 1))


def _axis(clock: Clock, node: Node, source: str) -> int:
    """Return the axis of a slice, or of the split that an item is of; -1 of other operations."""
    rank, args = len(clock.shape(Ref(source))), node.args
    if packet_name(node.target) == "slice":
        return int(args[1] if len(args) > 1 else 0) % rank
    if node.target != "item":
        return -1
    parent = clock.nodes[args[0].name]
    if "split" not in packet_name(parent.target):
        return -1
    given: Any = parent.args[2] if len(parent.args) > 2 else parent.kwargs.get("dim", 0)
    return int(given) % rank
