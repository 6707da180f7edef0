"""How far a network reaches in space and time, derived from its convolutions in one run.

Every tensor of the run carries the reach of its farthest path: a convolution adds the overhang
of its kernel, any other operation passes on the largest reach of its inputs. Distances are
measured in the stage's cells, so a convolution at twice the resolution adds half as much.
Padding is assumed to be centred, as in all these networks; the impulse test
(`probe.check_reach`) confirms the result on the actual weights.

A state is the tail of some layer's input, so it reaches back as far as that input plus its own
length. That length becomes visible where it is concatenated: `cat([state, x])`, of a state of n
frames and x of r frames per latent frame, reaches n / r latent frames further back than x.

Attention over positions and group normalisation reach the whole plane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
PLANE = 16  # side of the plane that is run, in cells


@dataclass(frozen=True)
class Reach:
    """Reach in cells along H and W and in latent frames; `whole` is why it is the whole plane."""

    halo: Fraction = Fraction(0)
    context: Fraction = Fraction(0)
    whole: str = ""
    state: bool = False  # the tensor is a state, or a view of one


@dataclass(frozen=True)
class Analysis:
    """Reach and cost of one stage, as returned by `analyse`."""

    halo: int | None
    context: int
    whole: str
    mac_per_cell: int


def analyse(stage: nn.Module, inputs: Sequence[Tensor], clock: bool, frames: int) -> Analysis:
    """Return reach and cost of a stage, from runs on PLANE x PLANE cells and `frames` frames.

    The inputs are data, a clock if the stage has one, and states.
    """
    tracker = _ReachTracker(inputs[0], inputs[1 + clock :], frames)
    with torch.inference_mode(False), torch.no_grad(), tracker:
        outputs = stage(*inputs)
    reaches = [tracker.known.get(output, Reach()) for output in outputs]
    whole = next((reach.whole for reach in reaches if reach.whole), "")
    return Analysis(
        halo=None if whole else math.ceil(max(reach.halo for reach in reaches)),
        context=math.ceil(max(reach.context for reach in reaches)),
        whole=whole,
        mac_per_cell=macs(stage, inputs) // (PLANE * PLANE * frames),
    )


def macs(stage: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Return the multiply-adds of one run."""
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        stage(*inputs)
    return int(count.get_total_flops()) // 2


class _ReachTracker(TorchDispatchMode):
    """Tracks the reach of every tensor through one run."""

    def __init__(self, data: Tensor, state: Sequence[Tensor], frames: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.frames = frames
        self.known = WeakTensorKeyDictionary()
        self.known[data] = Reach()
        for tensor in state:
            self.known[tensor] = Reach(state=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        reaches = [self.known[t] for t in inputs if t in self.known]
        if reaches:
            reach = self._reach_of_result(func.overloadpacket, args, reaches)
            for result in tree_leaves(results):
                if isinstance(result, Tensor):
                    self.known[result] = reach
        return results

    def _reach_of_result(self, operation: Any, args: Any, reaches: list[Reach]) -> Reach:
        """Return the reach of an operation's result, given those of its inputs."""
        halo = max(reach.halo for reach in reaches)
        context = max(reach.context for reach in reaches)
        whole = next((reach.whole for reach in reaches if reach.whole), "")
        if operation is aten.convolution:
            halo += _overhang(*args)
        elif operation is aten.cat and {reach.state for reach in reaches} == {True, False}:
            context += self._state_length(*args)
        elif "native_group_norm" in str(operation):
            whole = whole or "group normalisation takes its statistics over the whole plane"
        elif "scaled_dot_product" in str(operation) or (
            operation in (aten.bmm, aten.baddbmm) and len(reaches) > 1
        ):
            whole = whole or "attention looks at the whole plane"
        if operation is aten.where:  # frames at either end of a volume replace its last operand
            reaches = [self.known[args[2]]] if args[2] in self.known else reaches
        return Reach(halo, context, whole, all(reach.state for reach in reaches))

    def _state_length(self, tensors: Sequence[Tensor], axis: int = 0) -> Fraction:
        """Return the length of the state among concatenated tensors, in latent frames."""
        states = [t for t in tensors if t in self.known and self.known[t].state]
        others = [t for t in tensors if t in self.known and not self.known[t].state]
        past, now = (sum(t.shape[axis] for t in ts) for ts in (states, others))
        return Fraction(past * self.frames, now)


def _overhang(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    *rest: Any,
) -> Fraction:
    """Return how many cells a convolution reaches beyond its output cell.

    A 1-D convolution may run along H, W or time; it is counted as one along H or W.
    """
    largest = Fraction(0)
    for axis in (-2, -1)[-len(stride) :]:
        width = (weight.shape[axis] - 1) * dilation[axis] + 1
        if transposed:
            beyond = -(-width // stride[axis]) - 1
        else:
            beyond = max(0, -(-(width - stride[axis]) // 2))
        largest = max(largest, Fraction(beyond, max(1, round(x.shape[axis] / PLANE))))
    return largest
