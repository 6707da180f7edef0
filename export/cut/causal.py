"""A window's network as a stream, found from its graph: a first slice, then steps; or ahead.

The window is traced with TURNS latent frames, in which every step of the stream occurs. `timing.py`
finds what is known in which step, and `steps.py` writes each step as a function. The stream is
offered if the result of every step is known in that step, if the second and the third step are the
same function of the same states, and if longer windows, the network's own among them, give the same
as the stream.

A decoder that needs later latent frames is a stream that looks ahead (`ahead.py`): one function for
all steps, whose result comes late. It is offered if windows of every length up to a longer one, and
the network's own, give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import TensorSpec
from fvae_deploy.export.cut.ahead import ClockAhead, StepAhead
from fvae_deploy.export.cut.ahead_graph import AheadEmitter
from fvae_deploy.export.cut.axes import SIZES, Triple
from fvae_deploy.export.cut.lower import packet_name
from fvae_deploy.export.cut.margins import margins_last
from fvae_deploy.export.cut.step_graph import StepEmitter
from fvae_deploy.export.cut.steps import Step, in_cells
from fvae_deploy.export.cut.timing import Clock, NotCausal, Timed, latest
from fvae_deploy.export.cut.trace import Graph, trace_stage
from fvae_deploy.export.cut.writes import joined

TURNS = 4  # latent frames of the window that is traced
LENGTHS = (16, 32, 64)  # latent frames of the window in which a stream that looks ahead is found
LONGER = 2  # more latent frames in the window that confirms the stream
PLANE, TOLERANCE = (2, 3), 1e-4  # latent cells; of the largest value, in float32


@dataclass(frozen=True)
class Pace:
    """One direction's data: channels, pixels per latent cell, and slices per latent frame."""

    encode: bool
    channels: int
    spatial: int
    temporal: int

    def frames(self, turns: int, encode: bool) -> list[int]:
        """Return the step of every slice, or of every latent frame."""
        count = self.temporal if encode else 1
        return [0, *(1 + i // count for i in range(count * (turns - 1)))]

    def spec(self, turns: int) -> TensorSpec:
        """Return the data of a window of this many latent frames."""
        count = len(self.frames(turns, self.encode))
        s = self.spatial if self.encode else 1
        plane = [f"{s}*{symbol}" if s > 1 else symbol for symbol in ("h", "w")]
        return TensorSpec("x", (1, self.channels, count, *plane))


Function = Callable[..., tuple[Tensor, ...]]


class CausalStage(nn.Module):
    """Encoder or decoder as a function (data, *state) -> (data, *state); no state at first."""

    def __init__(self, network: nn.Module, first: Function, step: Function) -> None:
        super().__init__()
        self.network = network
        self._first, self._step = first, step

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map the first slice, or those of one latent frame, and the states of the step before."""
        run = self._step if past else self._first
        return run(self.network, x, *past)


def causal_stage(network: nn.Module, pace: Pace, check: bool = True, own: int = 0) -> CausalStage:
    """Find the stream of a network that maps a window to (result,).

    Raises NotCausal, with the reason, if there is none, and BundleError for code that cannot be
    traced. The stream is compared with the network on a window longer than the traced one, and on
    the network's own window of `own` latent frames; without `check`, it is not compared.
    """
    graph = margins_last(joined(trace_stage(network, pace.spec(TURNS))))
    clock = Clock(graph, pace.frames(TURNS, pace.encode))
    found = clock.timings[graph.result].infos[0]
    due = tuple(pace.frames(TURNS, not pace.encode))
    if not isinstance(found, Timed) or (found.axis, found.steps) != (2, due):
        raise NotCausal(_reason(clock, graph))
    plans: list[Step] = []
    states: list[Any] = []
    for turn in range(TURNS - 1, -1, -1):
        low, high = due.index(turn), len(due) - due[::-1].index(turn)
        plans.insert(0, Step(clock, graph, turn, [(graph.result, low, high), *states]))
        states = plans[0].states
    if not plans[1].states:
        raise NotCausal("its slices do not influence each other")
    _check_cells(clock, plans[1])
    cells = pace.spatial if pace.encode else 1
    emitters = [StepEmitter(plan, network, cells) for plan in plans[:3]]
    codes = [_code(emitter, plan, clock) for emitter, plan in zip(emitters, plans[:3], strict=True)]
    if codes[1] != codes[2]:
        raise NotCausal("its second step differs from its third")
    functions = [type(torch.fx.GraphModule(network, e.graph)).forward for e in emitters[:2]]
    stage = CausalStage(network, *functions).eval()
    if check:
        for turns in sorted({TURNS + LONGER, max(own, TURNS + LONGER)}):
            _confirm(network, stage, pace, turns)
    return stage


class AheadStage(nn.Module):
    """A decoder that looks ahead, as a function (z, clock, *state) -> (slices, *state).

    The slices come `lag` late.
    """

    def __init__(
        self, network: nn.Module, step: Function, lag: int, states: Sequence[Sequence[Triple]]
    ) -> None:
        super().__init__()
        self.network, self.lag = network, lag
        self._step, self._states = step, states

    def forward(self, z: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map one latent frame, the clock, and the states of the step before; at first, zeros."""
        clock, *states = past
        if not states:
            cells = z.shape[3], z.shape[4]
            states = [z.new_zeros([_sized(n, *cells) for n in shape]) for shape in self._states]
        return self._step(self.network, z, clock, *states)


def _sized(sizes: Triple, h: int, w: int) -> int:
    """Return a size for h x w cells, of a size at the traced planes that grows with one of them."""
    (rows, columns), (taller, _), (_, wider) = SIZES
    a, b, c = sizes
    return int(
        a + (b - a) // (taller - rows) * (h - rows) + (c - a) // (wider - columns) * (w - columns)
    )


def ahead_stage(network: nn.Module, pace: Pace, check: bool = True, own: int = 0) -> AheadStage:
    """Find the stream of a decoder that looks ahead; parameters and errors are `causal_stage`'s."""
    for turns in LENGTHS:
        try:
            stage = _ahead(network, pace, turns)
            break
        except NotCausal:
            if turns == LENGTHS[-1]:
                raise
    if check:
        longest = stage.lag // pace.temporal + LONGER
        for length in sorted({*range(1, longest + 1), max(own, 1)}):
            _confirm_ahead(network, stage, pace, length)
    return stage


def _ahead(network: nn.Module, pace: Pace, turns: int) -> AheadStage:
    """Find the stream in a window of so many latent frames."""
    graph = margins_last(joined(trace_stage(network, pace.spec(turns))))
    clock = ClockAhead(graph, turns)
    found = clock.timings[graph.result].infos[0]
    count = 1 + pace.temporal * (turns - 1)
    if not isinstance(found, Timed) or (found.axis, len(found.steps)) != (2, count):
        raise NotCausal(_reason(clock, graph, turns))
    middle = turns // 2
    plans: list[StepAhead] = []
    states: list[Any] = []
    for step in (middle + 2, middle + 1, middle):
        low, high = (sum(s < at for s in found.steps) for at in (step, step + 1))
        plans.insert(0, StepAhead(clock, graph, step, [(graph.result, low, high), *states]))
        states = plans[0].states
    if high - low != pace.temporal:
        raise NotCausal("its slices do not come in equal steps")
    if not plans[0].states:
        raise NotCausal("its slices do not influence each other")
    _check_cells(clock, plans[0])
    cells = pace.spatial if pace.encode else 1
    emitters = [AheadEmitter(plan, network, cells, turns) for plan in plans[:2]]
    codes = [_code(emitter, plan, clock) for emitter, plan in zip(emitters, plans[:2], strict=True)]
    if codes[0] != codes[1]:
        raise NotCausal("its steps differ from each other")
    function = type(torch.fx.GraphModule(network, emitters[0].graph)).forward
    lag = pace.temporal * middle - low
    return AheadStage(network, function, lag, _states(clock, plans[0])).eval()


def _states(clock: Clock, plan: Step) -> list[list[Triple]]:
    """Return the shapes of a step's states at the traced sizes of the plane."""
    return [[(a, b, c) for a, b, c in _sizes(clock, *state)] for state in plan.states]


def _confirm_ahead(network: nn.Module, stage: AheadStage, pace: Pace, turns: int) -> None:
    """Raise NotCausal unless a window of `turns` latent frames gives what the stream gives."""
    seeded = torch.Generator().manual_seed(turns)
    z = torch.randn(pace.spec(turns).sized(1, *PLANE), generator=seeded)
    z = z.to(next(network.parameters()).dtype)
    found: list[Tensor] = []
    states: list[Tensor] = []
    with torch.no_grad():
        try:
            (expected,) = network(z)
            for turn in range(turns + stage.lag // pace.temporal):
                at = min(turn, turns - 1)
                clock = torch.tensor((turn, turn - turns + 1))
                result, *states = stage(z[:, :, at : at + 1], clock, *states)
                found.append(result)
        except (RuntimeError, BundleError) as error:
            reason = str(error).splitlines()[0]
            raise NotCausal(f"a window of {turns} latent frames does not run: {reason}") from error
    joined = torch.cat(found, dim=2)[:, :, stage.lag : stage.lag + expected.shape[2]]
    if joined.shape != expected.shape or not bool(
        (joined - expected).abs().max() <= TOLERANCE * expected.abs().max()
    ):
        raise NotCausal(f"its steps give another result than a window of {turns} latent frames")


def _code(emitter: StepEmitter, plan: Step, clock: Clock) -> tuple[str, Any]:
    sizes = [_sizes(clock, *state) for state in plan.states]
    return emitter.graph.python_code("self").src, sizes


def _sizes(clock: Clock, name: str, low: int, high: int) -> list[tuple[int, ...]]:
    """Return a state's sizes at the traced sizes of the plane."""
    info, sizes = clock.timings[name].infos[0], []
    for axis, triple in enumerate(clock.nodes[name].shapes[0]):
        if isinstance(info, Timed) and axis == info.axis:
            triple = tuple(n * (high - low) // len(info.steps) for n in triple)  # type: ignore[assignment]
        sizes.append(tuple(triple))
    return sizes


def _check_cells(clock: Clock, plan: Step) -> None:
    """Raise NotCausal unless every state is a map of whole cells."""
    for name, *_ in plan.states:
        if not in_cells(clock.nodes[name].shapes[0]):
            raise NotCausal(f"its state {name} is not a map of whole cells")


def _reason(clock: Clock, graph: Graph, turns: int = TURNS) -> str:
    """Return which operation first needs all slices, or at least later ones than it may."""
    for node in graph.nodes:
        timed = [n for n in node.inputs if isinstance(clock.timings[n].infos[0], Timed)]
        now = clock.timings[node.name].infos[0]
        sliced = packet_name(node.target) in ("slice", "select", "item")
        if timed and not isinstance(now, Timed) and latest(now) == turns - 1 and not sliced:
            return f"{packet_name(node.target)} needs all slices of the window"
    return "its frames need later slices"


def _confirm(network: nn.Module, stage: CausalStage, pace: Pace, turns: int) -> None:
    """Raise NotCausal unless a window of `turns` latent frames gives what the stream gives."""
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(pace.spec(turns).sized(1, *PLANE), generator=seeded)
    x = x.to(next(network.parameters()).dtype)
    arrival = pace.frames(turns, pace.encode)
    with torch.no_grad():
        (expected,) = network(x)
        found, states = [], ()
        for turn in range(turns):
            low, high = arrival.index(turn), len(arrival) - arrival[::-1].index(turn)
            try:
                result, *states = stage(x[:, :, low:high], *states)
            except RuntimeError as error:
                raise NotCausal(f"its steps do not run: {str(error).splitlines()[0]}") from error
            found.append(result)
    joined = torch.cat(found, dim=2)
    if joined.shape != expected.shape or not bool(
        (joined - expected).abs().max() <= TOLERANCE * expected.abs().max()
    ):
        raise NotCausal("its steps give another result than its windows")


Stream = CausalStage | AheadStage


Networks = Sequence[tuple[str, nn.Module, Pace]]


def find_streams(networks: Networks, own: int = 0) -> tuple[dict[str, Stream], str]:
    """Return the streams of both directions, or none and the reason."""
    found: dict[str, Stream] = {}
    for name, network, pace in networks:
        try:
            try:
                found[name] = causal_stage(network, pace, own=own)
            except NotCausal:
                if pace.encode:
                    raise
                found[name] = ahead_stage(network, pace, own=own)
        except (NotCausal, BundleError) as error:
            return {}, f"{name}: {error}"
    return found, ""


def same_streams(networks: Networks, ahead: Collection[str]) -> dict[str, Stream]:
    """Return the streams that were found at export; `ahead` names those that look ahead.

    Raises BundleError if they are not found again.
    """
    try:
        return {
            name: (ahead_stage if name in ahead else causal_stage)(network, pace, check=False)
            for name, network, pace in networks
        }
    except NotCausal as error:
        raise BundleError(f"expected the streams found at export, found: {error}") from error
