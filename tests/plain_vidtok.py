"""VidTok's formulas for a whole clip, on the tensors of a file: slow, plain, without state.

Also random tensors of any such network, under the names and in the shapes of the files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A network as its authors' configurations describe it."""

    widths: tuple[int, ...] = (4, 4, 8, 12)
    blocks: int = 1
    latents: int = 4
    quantised: bool = False
    down: tuple[int, ...] = (0, 1, 2)
    down_time: tuple[int, ...] = (1, 2)
    up: tuple[int, ...] = (1, 2, 3)
    up_time: tuple[int, ...] = (1, 2)


def random_state(shape: Shape, seed: int = 0) -> State:
    """Random tensors of a network."""
    draw = torch.Generator().manual_seed(seed)
    state: State = {}

    def conv(name: str, inside: int, outside: int, *taps: int) -> None:
        scale = 1.2 / (inside * torch.tensor(taps).prod()) ** 0.5
        state[f"{name}.weight"] = scale * torch.randn(outside, inside, *taps, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(outside, generator=draw)

    def norm(name: str, channels: int) -> None:
        state[f"{name}.norm.weight"] = 1 + 0.1 * torch.randn(channels, generator=draw)
        state[f"{name}.norm.bias"] = 0.1 * torch.randn(channels, generator=draw)

    def block(name: str, inside: int, outside: int, taps: tuple[int, ...], inner: str) -> None:
        norm(f"{name}.norm1", inside)
        norm(f"{name}.norm2", outside)
        conv(f"{name}.conv1{inner}", inside, outside, *taps)
        conv(f"{name}.conv2{inner}", outside, outside, *taps)
        if inside != outside:
            conv(f"{name}.nin_shortcut", inside, outside, 1, 1)

    def mix(name: str, width: int) -> None:
        conv(f"{name}.conv.conv", width, width, 3, 3, 3)
        state[f"{name}.mix_factor"] = torch.randn(1, generator=draw)

    def ends(half: str, inside: int, middle: int, last: int, outside: int) -> None:
        conv(f"{half}.conv_in.conv", inside, middle if half == "decoder" else widths[0], 3, 3, 3)
        for i in (1, 2):
            block(f"{half}.mid.block_{i}", middle, middle, (3, 3, 3), ".conv")
        norm(f"{half}.mid.attn_1.norm", middle)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{half}.mid.attn_1.{name}.conv", middle, middle, 1, 1, 1)
        norm(f"{half}.norm_out", last)
        conv(f"{half}.conv_out.conv", last, outside, 3, 3, 3)

    widths, deepest = shape.widths, shape.widths[-1]
    ends("encoder", 3, deepest, deepest, shape.latents * (1 if shape.quantised else 2))
    ends("decoder", shape.latents, deepest, widths[0], 3)
    for i, width in enumerate(widths):
        halves = (
            ("encoder", "down", widths[max(i - 1, 0)], shape.blocks, shape.down, shape.down_time),
            ("decoder", "up", (*widths, deepest)[i + 1], shape.blocks + 1, shape.up, shape.up_time),
        )
        for half, way, inside, blocks, plane, time in halves:
            for j in range(blocks):
                before = inside if j == 0 else width
                block(f"{half}.{way}.{i}.block.{j}", before, width, (3, 3), "")
                block(f"{half}.{way}_temporal.{i}.block.{j}", width, width, (3,), ".conv")
            if i in plane:
                conv(f"{half}.{way}.{i}.{way}sample.conv", width, width, 3, 3)
            if i in time:
                mix(f"{half}.{way}_temporal.{i}.{way}sample", width)
    return state


class Plain:
    """A network on a whole clip [C, T, H, W]; `new` is whether it is version 1.1."""

    def __init__(self, state: State, shape: Shape, new: bool) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.shape, self.new = shape, new

    def encode(self, x: Tensor) -> Tensor:
        """Return the mean of the posterior, or codes before they are rounded."""
        factor = 2 ** len(self.shape.down_time)
        x = torch.cat([x[:, :1]] * (factor - 1) + [x], dim=1)
        x = self.causal("encoder.conv_in", x)
        for i in range(len(self.shape.widths)):
            x = self.blocks("encoder.down", i, self.shape.blocks, x)
            if i in self.shape.down:
                padded = F.pad(x.transpose(0, 1), (0, 1, 0, 1))
                x = self.conv2d(f"encoder.down.{i}.downsample.conv", padded, 2).transpose(0, 1)
            if i in self.shape.down_time:
                name = f"encoder.down_temporal.{i}.downsample"
                padded = torch.cat([self.before(x, 1), x], dim=1)
                mean = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:])[:, ::2] / 3
                x = self.mixed(name, mean, self.causal(f"{name}.conv", x, stride=2))
        x = self.end("encoder", self.middle("encoder", x))[: self.shape.latents]
        if not self.shape.quantised:
            return x
        half = torch.tensor(7 * 1.001 / 2, dtype=x.dtype)
        return ((x + (0.5 / half).atanh()).tanh() * half - 0.5) / 4

    def decode(self, z: Tensor) -> Tensor:
        """Return the slices, not clamped."""
        z = (z * 4).round() / 4 if self.shape.quantised else z
        x = self.middle("decoder", self.causal("decoder.conv_in", z))
        apart = 1
        for i in reversed(range(len(self.shape.widths))):
            x = self.blocks("decoder.up", i, self.shape.blocks + 1, x)
            if i in self.shape.up:
                x = F.interpolate(x.transpose(0, 1), scale_factor=2.0, mode="nearest")
                name = f"decoder.up.{i}.upsample.conv"
                x = self.conv2d(name, F.pad(x, (1, 1, 1, 1))).transpose(0, 1)
            if i in self.shape.up_time:
                name = f"decoder.up_temporal.{i}.upsample"
                parts = [p for p in (x[:, :apart], x[:, apart:]) if p.shape[1]]
                x = torch.cat([self.doubled(part) for part in parts], dim=1)
                x, apart = self.mixed(name, x, self.causal(f"{name}.conv", x)), 2 * apart
        return self.end("decoder", x)[:, 2 ** len(self.shape.up_time) - 1 :]

    def doubled(self, x: Tensor) -> Tensor:
        scale = [2.0, 1.0, 1.0]
        return F.interpolate(
            x[None], scale_factor=scale, mode="trilinear" if self.new else "nearest"
        )[0]

    def before(self, x: Tensor, frames: int) -> Tensor:
        return torch.cat([x[:, :1] if self.new else 0 * x[:, :1]] * frames, dim=1)

    def causal(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """A causal convolution [C, T, H, W] of 3 frames, or 1, and 3x3 pixels, or 1x1."""
        weight, bias = self.state[f"{name}.conv.weight"], self.state[f"{name}.conv.bias"]
        frames = weight.shape[2] - stride
        x = torch.cat([self.before(x, frames), x], dim=1) if frames else x
        edge = weight.shape[3] // 2
        return F.conv3d(x[None], weight, bias, (stride, 1, 1), (0, edge, edge))[0]

    def conv2d(self, name: str, frames: Tensor, stride: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(frames, weight, bias, stride)

    def mixed(self, name: str, plain: Tensor, convolved: Tensor) -> Tensor:
        share = self.state[f"{name}.mix_factor"].sigmoid()
        return share * plain + (1 - share) * convolved

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean = x.mean(0, keepdim=True)
        x = (x - mean) / ((x - mean).square().mean(0, keepdim=True) + 1e-6).sqrt()
        weight, bias = (
            self.state[f"{name}.norm.{n}"].view(-1, 1, 1, 1) for n in ("weight", "bias")
        )
        return x * weight + bias

    def active(self, name: str, x: Tensor) -> Tensor:
        x = self.norm(name, x)
        return x * x.sigmoid()

    def blocks(self, name: str, level: int, count: int, x: Tensor) -> Tensor:
        for j in range(count):
            plane, time = f"{name}.{level}.block.{j}", f"{name}_temporal.{level}.block.{j}"
            y = x
            for n in (1, 2):
                padded = F.pad(self.active(f"{plane}.norm{n}", y), (1, 1, 1, 1)).transpose(0, 1)
                y = self.conv2d(f"{plane}.conv{n}", padded).transpose(0, 1)
            if f"{plane}.nin_shortcut.weight" in self.state:
                x = self.conv2d(f"{plane}.nin_shortcut", x.transpose(0, 1)).transpose(0, 1)
            x = y = x + y
            for n in (1, 2):
                y = self.active(f"{time}.norm{n}", y)
                y = torch.cat([self.before(y, 2), y], dim=1)
                weight, bias = (self.state[f"{time}.conv{n}.conv.{w}"] for w in ("weight", "bias"))
                columns = y.permute(2, 3, 0, 1).flatten(0, 1)  # [H * W, C, T]
                y = F.conv1d(columns, weight, bias).unflatten(0, y.shape[2:]).permute(2, 3, 0, 1)
            x = x + y
        return x

    def middle(self, half: str, x: Tensor) -> Tensor:
        for part in ("block_1", "attn_1", "block_2"):
            name, y = f"{half}.mid.{part}", x
            if part == "attn_1":
                y = self.norm(f"{name}.norm", y)
                q, k, v = (self.causal(f"{name}.{n}", y).flatten(2) for n in "qkv")
                weights = torch.einsum("ctn,ctm->tnm", q, k) / len(q) ** 0.5
                y = torch.einsum("tnm,ctm->ctn", weights.softmax(2), v).unflatten(2, y.shape[2:])
                x = x + self.causal(f"{name}.proj_out", y)
                continue
            for n in (1, 2):
                y = self.causal(f"{name}.conv{n}", self.active(f"{name}.norm{n}", y))
            x = x + y
        return x

    def end(self, half: str, x: Tensor) -> Tensor:
        return self.causal(f"{half}.conv_out", self.active(f"{half}.norm_out", x))
