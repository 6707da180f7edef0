"""Layers of every kind that a cutter meets, and networks of them with random weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fvae_deploy.export.bundle import TensorSpec
from fvae_deploy.export.cut.cutter import Cut, cut_stage

FINE = 4  # elements of the input per cell: networks may halve twice


class Layer(nn.Module):
    """Any function of a module's weights and x."""

    def __init__(self, function: Any, **weights: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            held = value if isinstance(value, nn.Module) else nn.Parameter(value)
            setattr(self, name, held)

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def weight(*shape: int) -> Any:
    return torch.randn(shape) / max(1, shape[-1]) ** 0.5


def tokens(x: Any) -> Any:
    """[B, C, ..., h, w] -> [B, N, C]."""
    return x.flatten(2).transpose(1, 2)


def back(y: Any, x: Any) -> Any:
    return y.transpose(1, 2).reshape(x.shape)


def fused_attention(m: Any, x: Any) -> Any:
    b, c = x.shape[:2]
    q, k, v = (tokens(x) @ getattr(m, n) for n in "qkv")
    q, k, v = (t.view(b, -1, 2, c // 2).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    return x + back(y.transpose(1, 2).reshape(b, -1, c), x)


def written_attention(m: Any, x: Any) -> Any:
    """As in the code of latent diffusion: products, softmax, and queries last in the second."""
    c = x.shape[1]
    q, k, v = ((tokens(x) @ getattr(m, n)).transpose(1, 2) for n in "qkv")
    scores = torch.bmm(q.permute(0, 2, 1), k) * c**-0.5
    scores = F.softmax(scores, dim=2).permute(0, 2, 1)
    return x + torch.bmm(v, scores).reshape(x.shape)


def linear_attention(m: Any, x: Any) -> Any:
    q, k, v = ((tokens(x) @ getattr(m, n)) for n in "qkv")
    context = k.softmax(dim=1).transpose(1, 2) @ v
    return x + back(q.softmax(dim=-1) @ context, x)


def packed_attention(m: Any, x: Any) -> Any:
    q, k, v = (tokens(x) @ m.qkv).chunk(3, dim=-1)
    return x + back((q @ k.transpose(-1, -2)).softmax(-1) @ v, x)


def written_norm(m: Any, x: Any) -> Any:
    """A group norm by hand, as one reshape, mean and variance."""
    groups = x.reshape(x.shape[0], 2, -1)
    mean, var = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
    return ((groups - mean) / torch.sqrt(var + 1e-5)).reshape(x.shape)


def squeeze(m: Any, x: Any) -> Any:
    axes = tuple(range(2, x.ndim))
    gate = torch.sigmoid(x.mean(axes) @ m.a)
    peak = x.amax(axes, keepdim=True)
    return x * gate.view(*gate.shape, *[1] * len(axes)) + 0.1 * peak


def channels_last_norm(m: Any, x: Any) -> Any:
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],), m.a).movedim(-1, 1)


def in_place(m: Any, x: Any) -> Any:
    y = F.silu(x)
    y[:, :1] += 1
    y *= 0.5
    return F.relu(y, inplace=True) + x


def gated(m: Any, x: Any) -> Any:
    a, b = torch.cat([x, x.flip(1)], dim=1).chunk(2, dim=1)
    return torch.stack([a * torch.sigmoid(b), x], dim=0).mean(0)


def attention(c: int, function: Any) -> Any:
    return Layer(function, q=weight(c, c), k=weight(c, c), v=weight(c, c))


def products(m: Any, x: Any) -> Any:
    """Every place with every other one, reshaped in a way that no rule follows."""
    y = tokens(x).mean(-1)
    pairs = (y[:, :, None] * y[:, None]).tanh()
    return x + pairs.flip(1).amax(1).reshape(x.shape[0], 1, *x.shape[-2:])


def counted(m: Any, x: Any) -> Any:
    """Places, counted by adding up ones."""
    ones = torch.ones_like(x[:, :1])
    return x + torch.sin(ones.cumsum(-1) + 2 * ones.cumsum(-2))


def edges(m: Any, x: Any) -> Any:
    """Weights that differ at the first row and at the last column."""
    weights = torch.ones_like(x)
    weights[..., 0, :] = 0
    weights[..., -1] = 2
    return x * weights


def reverse_rows(m: Any, x: Any) -> Any:
    return x + x.flip(-2)


# Layers that keep the shape of [1, c, h, w].
PLAIN = {
    "convolution": lambda c: nn.Conv2d(c, c, 3, padding=1),
    "wide": lambda c: nn.Conv2d(c, c, (5, 1), padding=(2, 0)),
    "dilated, grouped": lambda c: nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=2),
    "reflected": lambda c: nn.Conv2d(c, c, 3, padding=1, padding_mode="reflect"),
    "replicated": lambda c: nn.Conv2d(c, c, 3, padding=1, padding_mode="replicate"),
    "padded to one side": lambda c: Layer(
        lambda m, x: F.pad(m.a(x), (2, 0, 0, 2)), a=nn.Conv2d(c, c, 3)
    ),
    "cropped": lambda c: Layer(
        lambda m, x: m.a(F.pad(x, (2, 2, 2, 2)))[..., 1:-1, 1:-1], a=nn.Conv2d(c, c, 3)
    ),
    "a border of zeros": lambda c: Layer(lambda m, x: F.pad(x[..., 1:-1, 2:-2], (2, 2, 1, 1))),
    "an inner border": lambda c: Layer(
        lambda m, x: F.pad(m.a(x[..., 1:, :-1]), (0, 1, 1, 0)), a=nn.Conv2d(c, c, 3, padding=1)
    ),
    "cropped, spread": lambda c: Layer(
        lambda m, x: F.avg_pool2d(m.a(x[..., 1:-1, 1:-1]), 2, 2, 1),
        a=nn.ConvTranspose2d(c, c, 4, 2),
    ),
    "silu": lambda c: nn.SiLU(),
    "in place": lambda c: Layer(in_place),
    "gated": lambda c: Layer(gated),
    "group norm": lambda c: nn.GroupNorm(2, c),
    "group norm of one": lambda c: nn.GroupNorm(1, c),
    "group norm without weights": lambda c: nn.GroupNorm(c, c, affine=False),
    "written norm": lambda c: Layer(written_norm),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True),
    "batch norm": lambda c: nn.BatchNorm2d(c).eval(),
    "layer norm of channels": lambda c: Layer(channels_last_norm, a=torch.randn(c)),
    "rms norm": lambda c: Layer(lambda m, x: F.normalize(x, dim=1) * m.a, a=torch.randn(c, 1, 1)),
    "squeeze": lambda c: Layer(squeeze, a=weight(c, c)),
    "attention": lambda c: attention(c, fused_attention),
    "written attention": lambda c: attention(c, written_attention),
    "packed attention": lambda c: Layer(packed_attention, qkv=weight(c, 3 * c)),
    "linear attention": lambda c: attention(c, linear_attention),
    "down and up": lambda c: nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, 2), nn.ConvTranspose2d(c, c, 4, 2, 1)
    ),
    "pooled, interpolated": lambda c: nn.Sequential(
        nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")
    ),
    "largest, repeated": lambda c: nn.Sequential(
        nn.MaxPool2d(3, 2, 1), nn.Upsample(scale_factor=2)
    ),
    "unshuffled, shuffled": lambda c: nn.Sequential(
        nn.PixelUnshuffle(2), nn.Conv2d(4 * c, 4 * c, 3, padding=1), nn.PixelShuffle(2)
    ),
    "repeated": lambda c: Layer(
        lambda m, x: m.a(x.repeat_interleave(2, -1).repeat_interleave(2, -2)),
        a=nn.Conv2d(c, c, 2, 2),
    ),
}  # fmt: skip
WHOLE = {
    "products of places": lambda c: Layer(products),
    "reversed": lambda c: Layer(reverse_rows),
    "column sums": lambda c: Layer(lambda m, x: x - x.mean(-1, keepdim=True)),
    "counted places": lambda c: Layer(counted),
    "edges": lambda c: Layer(edges),
    "middle value": lambda c: Layer(lambda m, x: x - x.flatten(1).median(1).values),
    "least and largest": lambda c: Layer(lambda m, x: x / (1 + torch.aminmax(x).max)),
    "position": lambda c: Layer(lambda m, x: x + torch.arange(x.shape[-1], dtype=x.dtype) / 9),
    "corners aligned": lambda c: nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.AvgPool2d(2)
    ),
}  # fmt: skip


class Network(nn.Module):
    """Layers in a row; some are residual, some go down to half and up again at their end."""

    def __init__(self, layers: list[Any], residual: list[bool], down: bool) -> None:
        super().__init__()
        self.layers, self.residual = nn.ModuleList(layers), residual
        self.down = nn.Conv2d(4, 4, 2, 2) if down else None
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Any) -> tuple[Any]:
        x = x.repeat(1, 4, 1, 1)
        skip = x
        if self.down is not None:
            x = self.down(x)
        for layer, residual in zip(self.layers, self.residual, strict=True):
            x = x + layer(x) if residual else layer(x)
        if self.down is not None:
            x = F.interpolate(x, scale_factor=2) + skip
        return (self.last(x),)


def apart(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def seeded(make: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    network = make().double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network.requires_grad_(False)


def cut_of(network: Any, *front: int) -> Cut:
    return cut_stage(network, "encode", TensorSpec("x", (1, *front, f"{FINE}*h", f"{FINE}*w")))


class CausalConv(nn.Conv3d):
    """Pads in front of time by zeros, or by repeating the first frame, written as one cat."""

    def __init__(self, c: int, repeat: bool) -> None:
        super().__init__(c, c, 3)
        self.repeat = repeat

    def forward(self, x: Any) -> Any:
        x = F.pad(x, (1, 1, 1, 1, 0, 0))
        front = x[:, :, :1].repeat(1, 1, 2, 1, 1)
        return super().forward(torch.cat([front if self.repeat else 0 * front, x], dim=2))


def each_frame(m: Any, x: Any) -> Any:
    """A 2-D network on every frame."""
    b, c, t, h, w = x.shape
    y = m.a(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))
    return y.reshape(b, t, c, h, w).permute(0, 2, 1, 3, 4)


def each_cell(m: Any, x: Any) -> Any:
    """A 1-D network over the frames of every cell."""
    b, c, t, h, w = x.shape
    y = m.a(x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t))
    return y.reshape(b, h, w, c, t).permute(0, 3, 4, 1, 2)


def over_time(m: Any, x: Any) -> Any:
    """Causal attention over the frames of every cell."""
    b, c, t, h, w = x.shape
    q, k, v = (
        x.permute(0, 3, 4, 2, 1).reshape(b * h * w, 1, t, c) @ getattr(m, name) for name in "qkv"
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + y.reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2)


def to_the_past(m: Any, x: Any) -> Any:
    """Attention over the frames of every cell, masked by a triangle of the input's type."""
    b, c, t, h, w = x.shape
    mask = torch.tril(x.new_ones(t, t)).bool()
    y = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, 1, t, c)
    y = F.scaled_dot_product_attention(y @ m.q, y @ m.k, y @ m.v, attn_mask=mask)
    return x + y.reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2)


def frame_by_frame(m: Any, x: Any) -> Any:
    """Attention over all tokens of this frame and of earlier ones, by an expanded mask."""
    b, _, t, h, w = x.shape
    frame = torch.arange(1, t + 1, dtype=torch.int32).repeat_interleave(h * w)
    keys, queries = frame.view(1, -1).expand(t * h * w, -1), frame.view(-1, 1).expand(-1, t * h * w)
    mask = torch.where(keys <= queries, 0, -float("inf")).to(x.dtype)
    mask = mask.unsqueeze(0).expand(b, -1, -1)[:, None]
    q, k, v = (tokens(x)[:, None] @ getattr(m, n) for n in "qkv")
    return x + back(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0], x)


def written_mask(m: Any, x: Any) -> Any:
    """The same with scores, mask and softmax written out."""
    t, h, w = x.shape[2:]
    frame = torch.arange(t).repeat_interleave(h * w)
    mask = torch.zeros((), dtype=x.dtype).masked_fill(frame[:, None] < frame[None], -float("inf"))
    q, k, v = (tokens(x) @ getattr(m, n) for n in "qkv")
    return x + back((q @ k.transpose(-1, -2) + mask).softmax(-1) @ v, x)


def chosen(m: Any, x: Any) -> Any:
    """Every other frame, taken by a list, beside an average of two; a split into one piece."""
    (first,) = x[:, :, [0, 2]].split(8, dim=0)
    second = F.avg_pool3d(x, (2, 1, 1))
    return torch.stack([first, second], dim=3).reshape(x.shape) + torch.full_like(x, 0.1)


def windows(m: Any, x: Any) -> Any:
    """Attention inside squares of 2x2 elements."""
    b, c, t, h, w = x.shape
    y = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 4, 6, 1)
    y = y.reshape(b * t * (h // 2) * (w // 2), 1, 4, c)
    y = F.scaled_dot_product_attention(y @ m.q, y @ m.k, y @ m.v)
    y = y.reshape(b, t, h // 2, w // 2, 2, 2, c).permute(0, 6, 1, 2, 4, 3, 5)
    return x + y.reshape(b, c, t, h, w)


MOVING = {
    "convolution": lambda c: nn.Conv3d(c, c, 3, padding=1),
    "causal": lambda c: CausalConv(c, False),
    "causal, repeating": lambda c: CausalConv(c, True),
    "half the frames": lambda c: nn.Sequential(
        nn.Conv3d(c, c, (2, 3, 3), (2, 1, 1), (0, 1, 1)), nn.Upsample(scale_factor=(2, 1, 1))
    ),
    "half the plane": lambda c: nn.Sequential(
        nn.Conv3d(c, c, (1, 4, 4), (1, 2, 2), (0, 1, 1)),
        nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear"),
    ),
    "group norm": lambda c: nn.GroupNorm(2, c),
    "group norm of frames": lambda c: Layer(each_frame, a=nn.GroupNorm(2, c)),
    "group norm of cells": lambda c: Layer(each_cell, a=nn.GroupNorm(2, c)),
    "instance norm": lambda c: nn.InstanceNorm3d(c, affine=True),
    "layer norm": lambda c: Layer(channels_last_norm, a=torch.randn(c)),
    "layers of frames": lambda c: Layer(each_frame, a=nn.Conv2d(c, c, 3, padding=1)),
    "layers of cells": lambda c: Layer(each_cell, a=nn.Conv1d(c, c, 3, padding=1)),
    "attention in a frame": lambda c: Layer(each_frame, a=attention(c, fused_attention)),
    "attention over all": lambda c: attention(c, written_attention),
    "attention over time": lambda c: attention(c, over_time),
    "attention to the past": lambda c: attention(c, to_the_past),
    "attention frame by frame": lambda c: attention(c, frame_by_frame),
    "attention with a written mask": lambda c: attention(c, written_mask),
    "chosen frames": lambda c: Layer(chosen),
    "attention in windows": lambda c: attention(c, windows),
    "silu": lambda c: nn.SiLU(),
}  # fmt: skip


class Window(nn.Module):
    """Layers on a window of 4 frames."""

    def __init__(self, layers: list[Any], residual: list[bool]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(1, 4, 1), nn.Conv3d(4, 2, 1)
        self.layers, self.residual = nn.ModuleList(layers), residual

    def forward(self, x: Any) -> tuple[Any]:
        x = self.first(x)
        for layer, residual in zip(self.layers, self.residual, strict=True):
            x = x + layer(x) if residual else layer(x)
        return (self.last(x),)
