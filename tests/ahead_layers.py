"""Layers that look ahead, and decoders of them: streams that export must find by itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from causal_layers import CAUSAL
from cut_layers import Layer
from torch import nn


class Centred(nn.Module):
    """A convolution centred in time, whose ends are padded in one of several ways."""

    def __init__(self, c: int, mode: str, width: int = 3) -> None:
        super().__init__()
        self.mode, self.side = mode, width // 2
        inside = mode in ("zeros", "ends")
        self.conv = nn.Conv3d(
            c, c, (width, 3, 3), padding=(self.side * (mode == "zeros"), int(inside), int(inside))
        )

    def forward(self, x: Any) -> Any:
        if self.mode == "ends":
            first, last = (e.repeat(1, 1, self.side, 1, 1) for e in (x[:, :, :1], x[:, :, -1:]))
            x = torch.cat([first, x, last], 2)
        elif self.mode != "zeros":
            x = F.pad(x, (1, 1, 1, 1, self.side, self.side), mode=self.mode)
        return self.conv(x)


def next_frame(m: Any, x: Any) -> Any:
    """The frame after each, and zeros after the last."""
    return x + F.pad(x[:, :, 1:], (0, 0, 0, 0, 0, 1)) * m.a


def next_but_one(m: Any, x: Any) -> Any:
    """The frame after the next, or the last one."""
    last = x[:, :, -1:].expand(-1, -1, 2, -1, -1)
    return x - m.a * torch.cat([x, last], 2)[:, :, 2:]


def smoothed(m: Any, x: Any) -> Any:
    """Twice as many frames between those that are there, and every second one of these."""
    y = F.interpolate(x, scale_factor=(2, 1, 1), mode="trilinear")
    return y[:, :, ::2] + m.a * y[:, :, 1::2]


AHEAD = {
    "zeros": lambda c: Centred(c, "zeros"),
    "five wide, zeros": lambda c: Centred(c, "zeros", 5),
    "replicated": lambda c: Centred(c, "replicate"),
    "five wide, replicated": lambda c: Centred(c, "replicate", 5),
    "ends repeated": lambda c: Centred(c, "ends"),
    "next frame": lambda c: Layer(next_frame, a=torch.randn(c, 1, 1, 1)),
    "next but one": lambda c: Layer(next_but_one, a=torch.randn(c, 1, 1, 1)),
    "smoothed": lambda c: Layer(smoothed, a=torch.randn(c, 1, 1, 1)),
    **{
        name: CAUSAL[name]
        for name in ("zeros in front", "margins too, repeated", "layer norm", "silu",
                     "attention in a frame", "layers of frames")
    },
}  # fmt: skip
MIRRORED = {
    "mirrored": lambda c: Centred(c, "reflect"),
    "five wide, mirrored": lambda c: Centred(c, "reflect", 5),
}


def unfolded(m: Any, x: Any) -> Any:
    """Twice as many frames from channels, of which the first is dropped."""
    y = m.a(x)
    b, c, t, h, w = y.shape
    return y.reshape(b, c // 2, 2, t, h, w).permute(0, 1, 3, 2, 4, 5).flatten(2, 3)[:, :, 1:]


def interpolated(m: Any, x: Any) -> Any:
    """The first frame alone, and twice as many of the others, between them."""
    if x.shape[2] == 1:
        return m.a(1.5 * x)
    rest = F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear")
    return m.a(torch.cat([x[:, :, :1] * 1.5, rest], 2))


def repeated(m: Any, x: Any) -> Any:
    """Every frame twice, of which the first is dropped."""
    return m.a(F.interpolate(x, scale_factor=(2, 1, 1))[:, :, 1:])


DOUBLED = {
    "unfolded": lambda c: Layer(unfolded, a=nn.Conv3d(c, 2 * c, 3, padding=1)),
    "interpolated": lambda c: Layer(interpolated, a=nn.Conv3d(c, c, 3, padding=1)),
    "repeated": lambda c: Layer(repeated, a=nn.Conv3d(c, c, 1)),
}


class Doubling(nn.Module):
    """Decoder of 1 + 2 (n - 1) slices from n latent frames: layers before and after a doubling."""

    def __init__(self, before: list[Any], doubled: Any, after: list[Any], residual: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(2, 4, 1), nn.Conv3d(4, 1, 1)
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)
        self.doubled, self.residual = doubled, residual

    def forward(self, z: Any) -> tuple[Any]:
        x = self.first(z)
        for layers in (self.before, self.after):
            for layer in layers:
                x = x + layer(x) if self.residual else layer(x)
            if layers is self.before:
                x = self.doubled(x)
        return (self.last(x),)
