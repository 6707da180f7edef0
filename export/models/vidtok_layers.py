"""The layers of VidTok's causal networks; see `vidtok`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_deploy.export.models.slicewise import Doubling
from fvae_deploy.export.models.tape import Tape

Size = tuple[int, int, int]  # a kernel's frames, rows and columns
LEVELS = 8  # values per latent channel of the quantised networks
FRAME, TIME, BOTH = (1, 3, 3), (3, 1, 1), (3, 3, 3)


class Norm(nn.Module):
    """Layer normalisation over the channels of every voxel, and the activation after it."""

    def __init__(self, channels: int, active: bool = True) -> None:
        super().__init__()
        self.norm, self.active = nn.LayerNorm(channels, eps=1e-6), active

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to the same shape."""
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return F.silu(x) if self.active else x


class Taped(nn.Module):
    """A layer whose stage has a tape; `repeat` says what stands before the first frame."""

    tape: Tape
    repeat = False


class Causal(Taped):
    """A convolution that looks back in time: its state is the end of its input."""

    def __init__(self, inside: int, outside: int, size: Size = BOTH, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            inside, outside, size, stride=(stride, 1, 1), padding=(0, size[1] // 2, size[2] // 2)
        )
        self.frames = size[0] - stride

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [1, C, T, H, W]."""
        if self.frames:
            tape = self.tape
            if tape.past:
                past = tape.past[len(tape.next)]
            else:
                begin = x[:, :, :1] if self.repeat else torch.zeros_like(x[:, :, :1])
                past = begin.repeat(1, 1, self.frames, 1, 1)
            x = torch.cat([past, x], dim=2)
            tape.next.append(x[:, :, -self.frames :])
        y: Tensor = self.conv(x)
        return y


class Residual(nn.Module):
    """x + two convolutions, each after a norm; along time alone, in the plane alone, or both."""

    def __init__(self, inside: int, outside: int, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(inside), Norm(outside)
        self.conv1, self.conv2 = (_convolution(n, outside, size) for n in (inside, outside))
        if inside != outside:
            self.nin_shortcut = nn.Conv3d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to [1, D, T, H, W]."""
        y: Tensor = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Attention among the positions of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, active=False)
        self.q, self.k, self.v, self.proj_out = (
            Causal(channels, channels, (1, 1, 1)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to the same shape."""
        y = self.norm(x)
        q, k, v = (f(y).flatten(3).permute(2, 0, 3, 1) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # [T, 1, H * W, C]
        y = y.permute(1, 3, 0, 2).unflatten(3, x.shape[3:])
        added: Tensor = self.proj_out(y)
        return x + added


class Halving(nn.Module):
    """A convolution of stride 2 in the plane, padded at the far ends."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, FRAME, stride=(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to [1, C, T, H / 2, W / 2]."""
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class Mixed(nn.Module):
    """The weights of a change of the frame rate: a convolution, mixed with a plain resampling."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = Causal(channels, channels, BOTH, stride)
        self.mix_factor = nn.Parameter(torch.zeros(1))

    def folded(self, taps: Sequence[float]) -> Causal:
        """Return one convolution that mixes its result with that sum of its input's frames."""
        weight, bias = self.conv.conv.weight, self.conv.conv.bias
        assert bias is not None
        plain = torch.zeros_like(weight)
        for i, tap in enumerate(taps):
            plain[:, :, i, 1, 1] = tap * torch.eye(len(weight), dtype=weight.dtype)
        share = torch.sigmoid(self.mix_factor)
        self.conv.conv.weight = nn.Parameter(share * plain + (1 - share) * weight)
        self.conv.conv.bias = nn.Parameter((1 - share) * bias)
        return self.conv


class DoublingPlane(nn.Module):
    """Nearest-neighbour upsampling of the plane by 2 and a convolution, in 4/9 of the work."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        convolution.weight = nn.Parameter(convolution.weight[:, :, 0])
        self.doubling = Doubling(convolution)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to [1, C, T, 2H, 2W]."""
        y: Tensor = self.doubling(x[0].transpose(0, 1)).transpose(0, 1)[None]
        return y


class DoublingTime(nn.Module):
    """Every frame twice, and a causal convolution over 3 frames, in 2/3 of the work.

    Of frames a, a, b, b, the convolution (w0, w1, w2) makes (w0 + w1) a + w2 b and w0 a +
    (w1 + w2) b: two convolutions over 2 frames, here as one with twice the channels.
    """

    def __init__(self, convolution: Causal) -> None:
        super().__init__()
        old = convolution.conv
        assert old.bias is not None
        w0, w1, w2 = old.weight.unbind(2)
        pairs = [torch.stack(pair, dim=2) for pair in ((w0 + w1, w2), (w0, w1 + w2))]
        self.pair = Causal(old.in_channels, 2 * old.out_channels, (2, 3, 3))
        self.pair.conv.weight = nn.Parameter(torch.cat(pairs))
        self.pair.conv.bias = nn.Parameter(old.bias.repeat(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to [1, C, 2T, H, W]."""
        return self.pair(x).unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)  # type: ignore[no-any-return]


class BlendingTime(nn.Module):
    """Linear interpolation to twice the frames, and a causal convolution; for whole windows.

    The frames of the first latent frame, `first`, are interpolated apart from the others.
    """

    def __init__(self, convolution: Causal, first: int) -> None:
        super().__init__()
        self.conv, self.first = convolution, first

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to [1, C, 2T, H, W]."""
        parts = x[:, :, : self.first], x[:, :, self.first :]
        y: Tensor = self.conv(torch.cat([_blended(part) for part in parts], dim=2))
        return y


class Opening(Taped):
    """Before the encoder: as many copies of the first slice as the others have per latent frame."""

    def __init__(self, temporal: int) -> None:
        super().__init__()
        self.temporal = temporal

    def forward(self, x: Tensor) -> Tensor:
        """Return x [1, C, T, H, W], with copies in front in the first run."""
        if self.tape.past:
            return x
        return torch.cat([x[:, :, :1].repeat(1, 1, self.temporal - 1, 1, 1), x], dim=2)


class Closing(Taped):
    """After the decoder: drop the copies of the first slice."""

    def __init__(self, temporal: int) -> None:
        super().__init__()
        self.temporal = temporal

    def forward(self, x: Tensor) -> Tensor:
        """Return x [1, C, T, H, W], without the copies in the first run."""
        return x if self.tape.past else x[:, :, self.temporal - 1 :]


class Bound(nn.Module):
    """Limit latents to the range of the codes, -1 to 0.75, not yet rounded to them."""

    def forward(self, z: Tensor) -> Tensor:
        """Map z [1, D, T, H, W] to the same shape."""
        half = (LEVELS - 1) * (1 + 1e-3) / 2
        return (torch.tanh(z + math.atanh(0.5 / half)) * half - 0.5) / (LEVELS // 2)


class Codes(nn.Module):
    """Round latents to the nearest code, a multiple of a quarter."""

    def forward(self, z: Tensor) -> Tensor:
        """Map z [1, D, T, H, W] to the same shape."""
        return torch.round(z * (LEVELS // 2)) / (LEVELS // 2)


def _convolution(inside: int, outside: int, size: Size) -> nn.Module:
    if size == FRAME:
        return nn.Conv3d(inside, outside, size, padding=(0, 1, 1))
    return Causal(inside, outside, size)


def _blended(x: Tensor) -> Tensor:
    """Double the frames of x [1, C, T, H, W]: a quarter of each neighbour, ends repeated."""
    before, after = torch.cat([x[:, :, :1], x], dim=2), torch.cat([x, x[:, :, -1:]], dim=2)
    halves = [0.75 * x + 0.25 * near for near in (before[:, :, :-1], after[:, :, 1:])]
    return torch.stack(halves, dim=3).flatten(2, 3)
