"""Causal layers of every kind, and networks of them: streams that export must find by itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cut_layers import Layer, attention, channels_last_norm, each_frame, fused_attention
from torch import nn


class Causal(nn.Module):
    """A convolution over the past: zeros, or the first frame repeated, in front."""

    def __init__(self, c: int, repeat: bool, stride: int = 1, margins: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv3d(c, c, 3, (stride, 1, 1), 0 if margins else (0, 1, 1))
        self.repeat, self.margins = repeat, margins

    def forward(self, x: Any) -> Any:
        if self.repeat:
            x = torch.cat([x[:, :, :1].repeat(1, 1, 2, 1, 1), x], 2)
            return self.conv(F.pad(x, (1, 1, 1, 1)) if self.margins else x)
        sides = (1, 1, 1, 1) if self.margins else (0, 0, 0, 0)
        return self.conv(F.pad(x, (*sides, 2, 0)))


class Replicated(Causal):
    """The same, in front by replication together with the margins."""

    def forward(self, x: Any) -> Any:
        return self.conv(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"))


def halved_and_doubled(m: Any, x: Any) -> Any:
    """Half as many frames after the first, then twice as many, from channels or by repeating."""
    first, rest = x[:, :, :1], x[:, :, 1:]
    rest = F.avg_pool3d(rest, (2, 1, 1))
    y = torch.cat([first, rest], 2)
    z = m.a(y[:, :, 1:])
    b, c, t, h, w = z.shape
    z = torch.stack([z[:, : c // 2], z[:, c // 2 :]], 3).reshape(b, c // 2, 2 * t, h, w)
    again = F.interpolate(y[:, :, 1:], scale_factor=(2, 1, 1))
    return torch.cat([y[:, :, :1], z + again], 2)


def wavelet(m: Any, x: Any) -> Any:
    """A transform of pairs of frames after the first one doubled, and back without the first."""
    y = F.conv3d(torch.cat([x[:, :, :1], x], 2), m.a, stride=(2, 1, 1))
    return F.conv_transpose3d(y, m.a, stride=(2, 1, 1))[:, :, 1:]


def mixed(m: Any, x: Any) -> Any:
    a, b = x.chunk(2, 1)
    y = torch.cat([b * torch.sigmoid(a), a], 1).clone()
    y[:, :1] = y[:, :1] + x[:, :1]
    return y.transpose(1, 2).flatten(0, 1).unflatten(0, (1, -1)).transpose(1, 2)


def corner(m: Any, x: Any) -> Any:
    """Half the plane by a convolution over the past that is padded to one side, and back."""
    y = F.pad(x, (0, 1, 0, 1, 0, 0))
    y = m.a(torch.cat([y[:, :, :1].repeat(1, 1, 2, 1, 1), y], 2))
    return F.interpolate(y, scale_factor=(1, 2, 2), mode="trilinear")


def channels_written(_: Any, x: Any) -> Any:
    y = torch.empty_like(x)
    for i in range(x.shape[1]):
        y[:, i] = x[:, -1 - i].tanh()
    return y


def frames_written(_: Any, x: Any) -> Any:
    y = x.clone()
    y[:, :, 1:] += x[:, :, :-1] * 2
    y[:, :, :1].mul_(3)
    y[:, :1].zero_()
    return y


CAUSAL = {
    "channels written": lambda c: Layer(channels_written),
    "frames written": lambda c: Layer(frames_written),
    "zeros in front": lambda c: Causal(c, False),
    "first frame repeated": lambda c: Causal(c, True),
    "margins too, repeated": lambda c: Causal(c, True, margins=True),
    "margins too, zeros": lambda c: Causal(c, False, margins=True),
    "replicated": lambda c: Replicated(c, False, margins=True),
    "within frames": lambda c: nn.Conv3d(c, c, (1, 3, 3), padding=(0, 1, 1)),
    "layers of frames": lambda c: Layer(each_frame, a=nn.Conv2d(c, c, 3, padding=1)),
    "layer norm": lambda c: Layer(channels_last_norm, a=torch.randn(c)),
    "normalised": lambda c: Layer(
        lambda m, x: F.normalize(x, dim=1) * m.a, a=torch.randn(c, 1, 1, 1)
    ),
    "group norm of frames": lambda c: Layer(each_frame, a=nn.GroupNorm(2, c)),
    "attention in a frame": lambda c: Layer(each_frame, a=attention(c, fused_attention)),
    "halved and doubled": lambda c: Layer(halved_and_doubled, a=nn.Conv3d(c, 2 * c, 1)),
    "wavelet": lambda c: Layer(wavelet, a=torch.randn(c, c, 2, 1, 1) / 2),
    "mixed channels": lambda c: Layer(mixed),
    "corner": lambda c: Layer(corner, a=nn.Conv3d(c, c, 3, (1, 2, 2))),
    "silu": lambda c: nn.SiLU(),
}  # fmt: skip
AHEAD = {
    "centred": lambda c: nn.Conv3d(c, c, 3, padding=1),
    "group norm": lambda c: nn.GroupNorm(2, c),
    "interpolated frames": lambda c: Layer(
        lambda m, x: F.interpolate(F.avg_pool3d(x[:, :, 1:], (2, 1, 1)), scale_factor=(2, 1, 1),
                                   mode="trilinear").sum(2, True) + x
    ),
    "reversed": lambda c: Layer(lambda m, x: x + x.flip(2)),
    "mean of frames": lambda c: Layer(lambda m, x: x - x.mean(2, keepdim=True)),
    "next frame": lambda c: Layer(lambda m, x: F.pad(x[:, :, 1:], (0, 0, 0, 0, 0, 1))),
    "position in time": lambda c: Layer(
        lambda m, x: x + torch.arange(x.shape[2]).to(x)[:, None, None]
    ),
}  # fmt: skip


class Halving(nn.Module):
    """Encoder of 1 + 2n slices: layers before and after a causal halving of frames and plane."""

    def __init__(self, layers: list[Any], residual: list[bool]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(1, 4, 1), nn.Conv3d(4, 2, 1)
        self.layers, self.residual = nn.ModuleList(layers), residual
        self.halving = Causal(4, True, 2)

    def forward(self, x: Any) -> tuple[Any]:
        x = self.first(x)
        for layer, residual in zip(self.layers, self.residual, strict=True):
            x = x + layer(x) if residual else layer(x)
        return (self.last(self.halving(x)),)


class Turns(nn.Module):
    """Encoder that goes through its latent frames in a loop, and keeps what it needs in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.halving = (
            nn.Conv3d(1, 4, 3, padding=(0, 1, 1)),
            nn.Conv3d(4, 2, (2, 1, 1), 2),
        )

    def turn(self, x: Any, kept: list[Any]) -> Any:
        past = kept[0] if kept else x[:, :, :1].repeat(1, 1, 2, 1, 1)
        y = F.silu(self.conv(torch.cat([past, x], 2)))
        kept[:] = [torch.cat([past, x], 2)[:, :, -2:].clone()]
        return self.halving(y if x.shape[2] > 1 else y.repeat(1, 1, 2, 1, 1))

    def forward(self, x: Any) -> tuple[Any]:
        kept: list[Any] = []
        found = [self.turn(x[:, :, :1], kept)]
        for i in range(1, x.shape[2], 2):
            found.append(self.turn(x[:, :, i : i + 2], kept))
        return (torch.cat(found, 2),)
