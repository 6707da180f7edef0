"""Stages whose causal convolutions keep their own state, on a tape that the stage winds."""

from __future__ import annotations

from torch import Tensor, nn


class Tape:
    """The states of one run of a stage: those of the past, in order, and the next ones."""

    def __init__(self) -> None:
        self.past: list[Tensor] = []
        self.next: list[Tensor] = []
        self.clock: Tensor | None = None  # of a stage that looks ahead

    def begin(self, past: tuple[Tensor, ...], clock: Tensor | None = None) -> None:
        """Start a run; without a past it is the first of a stream, or a window."""
        self.past, self.next, self.clock = list(past), [], clock

    def take(self, x: Tensor, count: int) -> Tensor:
        """Return the next state, `count` frames; at first it is the first frame of x, repeated."""
        if not self.past:
            return x[:, :, :1].repeat(1, 1, count, 1, 1)
        return self.past[len(self.next)]


class TapedStage(nn.Module):
    """Consecutive layers as one function of data and, in a stream, state.

    With `ahead`, the first of the states is the clock of a stage that looks ahead.
    """

    def __init__(
        self, layers: list[nn.Module], tape: Tape, stream: bool, ahead: bool = False
    ) -> None:
        super().__init__()
        self.layers, self.tape = nn.ModuleList(layers), tape
        self.stream, self.ahead = stream, ahead

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map data [1, C, T, H, W] and states [1, C, 1 or 2, H, W] to (data, *states)."""
        if self.ahead:
            self.tape.begin(past[1:], past[0])
        else:
            self.tape.begin(past)
        for layer in self.layers:
            x = layer(x)
        return (x, *self.tape.next) if self.stream else (x,)
