"""Stages whose causal convolutions keep their own state, on a tape that the stage winds."""

from __future__ import annotations

from torch import Tensor, nn


class Tape:
    """The states of one run of a stage: those of the past, in order, and the next ones."""

    def __init__(self) -> None:
        self.past: list[Tensor] = []
        self.next: list[Tensor] = []

    def begin(self, past: tuple[Tensor, ...]) -> None:
        """Start a run; without a past it is the first of a stream, or a window."""
        self.past, self.next = list(past), []


class TapedStage(nn.Module):
    """Consecutive layers as one function of data and, in a stream, state."""

    def __init__(self, layers: list[nn.Module], tape: Tape, stream: bool) -> None:
        super().__init__()
        self.layers, self.tape, self.stream = nn.ModuleList(layers), tape, stream

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map data [1, C, T, H, W] and states [1, C, 1 or 2, H, W] to (data, *states)."""
        self.tape.begin(past)
        for layer in self.layers:
            x = layer(x)
        return (x, *self.tape.next) if self.stream else (x,)
