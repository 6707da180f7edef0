"""Layers that look ahead in a stream: convolutions centred in time, with their results late.

A convolution of width 3 that is centred in time needs the frame after the one that it computes. In
a stream it computes each frame once that one is there, so its results are one frame late, and it
keeps the last two frames as any causal convolution does. What runs beside it is late by as much.

    frames of this step          4   5   6   7      of a rate of 4 frames per step
    frames kept          2   3
    results                  3   4   5   6          one frame late

Every layer of a stage treats the same number of frames in every step. Before the first frame of the
volume, and after its last, these are no frames at all; where a convolution would use such a frame,
the first or the last one stands in its place, as diffusers repeats them. Which frame of a step that
is does not change from volume to volume; in which step, the clock tells (see `bundle.Part`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fvae_deploy.export.models.tape import Tape


@dataclass
class Delay:
    """Where a network's layers are: frames per step, and by how many the results are late.

    The layers of a network are built one after the other; each takes its own from here.
    """

    rate: int = 1
    frames: int = 0

    def after(self, ahead: int) -> Delay:
        """Return a copy, and add what a layer adds that needs so many frames ahead."""
        before = Delay(self.rate, self.frames)
        self.frames += ahead
        return before

    def multiplied(self, factor: int) -> None:
        """Let every frame become several, of which the first ones of the volume are dropped."""
        self.rate *= factor
        self.frames = factor * self.frames + factor - 1

    def with_past(self, tape: Tape, x: Tensor, count: int) -> Tensor:
        """Return x [1, C, T, H, W] with `count` frames before it, and keep its own last ones.

        Frames that are not of the volume are replaced by its first or its last one.
        """
        step, at = divmod(self.frames, self.rate)
        assert tape.clock is not None
        since, until = tape.clock
        past = tape.take(x, count)
        x = torch.where(until > step, past[:, :, -1:], x)
        edge = x[:, :, at : at + 1]
        pieces = [torch.where(since <= step, edge, past)]
        if at:
            pieces.append(torch.where(since <= step, edge, x[:, :, :at]))
        pieces.append(edge)
        if at + 1 < self.rate:
            pieces.append(torch.where(until >= step, edge, x[:, :, at + 1 :]))
        x = torch.cat(pieces, dim=2)
        tape.next.append(x[:, :, -count:])
        return x


def held(tape: Tape, x: Tensor, count: int) -> Tensor:
    """Return the frames [1, C, T, H, W] that came `count` before those of x."""
    joined = torch.cat([tape.take(x, count), x], dim=2)
    tape.next.append(joined[:, :, -count:])
    return joined[:, :, :-count]
