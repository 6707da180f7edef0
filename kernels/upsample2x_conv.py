"""Nearest-neighbour upsampling by 2 and a 3x3 convolution, without storing the upsampled map.

Pixels of the upsampled map are repeated, so that the nine taps of an output pixel only read four
source pixels. The upper pixel of a pair uses rows (-1, 0) with weights (w0, w1 + w2), the lower one
rows (0, 1) with (w0 + w1, w2), and columns likewise. This makes four 2x2 convolutions, one for each
place in a 2x2 cell, with 4/9 of the work. Each writes every second row and column of the result,
with the kernel of `causal_conv3d`.

Layout: x [T, H, W, C], y [T, 2H, 2W, C'], weight [3, 3, C, C'] packed to [2, 2, 1, 2, 2, C, C'].

Why by hand: the plain graph writes the upsampled map and reads it nine times. Wan's last one has
512x512 pixels of 192 channels, 101 MB per frame in float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvae_deploy.kernels import causal_conv3d
from fvae_deploy.kernels.blocks import Choose, first
from fvae_deploy.kernels.causal_conv3d import Box, Window
from fvae_deploy.kernels.causal_conv3d_kernel import kernel
from fvae_deploy.kernels.record import Spec, as_torch_reads, traffic


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute it with the upsampled map and the weight [3, 3, C, C'], for comparison."""
    upsampled = F.interpolate(x.movedim(-1, 1), scale_factor=2.0, mode="nearest")
    return F.conv2d(upsampled, weight.permute(3, 2, 0, 1), bias, padding=1).movedim(1, -1)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, box: Box | None = None
) -> Tensor:
    """Compute it in torch: y [T, 2H, 2W, C'].

    `weight` is packed. `box` selects rows and columns of x: y is then their upsampled image.
    """
    frames = x.movedim(-1, 1)
    y = x.new_empty(x.shape[0], 2 * x.shape[1], 2 * x.shape[2], weight.shape[-1])
    for i in (0, 1):
        for j in (0, 1):
            place = weight[i, j, 0].permute(3, 2, 0, 1)  # [C', C, 2, 2]
            padded = F.pad(frames, (1 - j, j, 1 - i, i))
            y[:, i::2, j::2] = F.conv2d(padded, place, bias).movedim(1, -1)
    if box is not None:
        y = y[:, 2 * box[0] : 2 * box[1], 2 * box[2] : 2 * box[3]]
    return y


def packed(weight: Tensor) -> Tensor:
    """Return weights [3, 3, C, C'] as those of the four places: [2, 2, 1, 2, 2, C, C']."""
    upper = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]).to(weight)
    places = torch.stack([upper, upper.flip(0, 1)])  # [place, tap, of three]
    return torch.einsum("iar,jbs,rscd->ijabcd", places, places, weight)[:, :, None].contiguous()


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    box: Box | None = None,
    target: str = "sm_80",
    choose: Choose = first,
    run: Any = kernel,
) -> Tensor:
    """Compute it with the kernel; arguments and result as in `reference`."""
    frames, height, width, _ = x.shape
    box = box or (0, height, 0, width)
    y = x.new_empty(frames, 2 * (box[1] - box[0]), 2 * (box[3] - box[2]), weight.shape[-1])
    for i in (0, 1):
        for j in (0, 1):
            causal_conv3d.launch(
                x,
                weight[i, j],
                bias,
                window=Window(top=1 - i, left=1 - j, bottom=i, right=j),
                box=box,
                out=y[:, i::2, j::2],
                target=target,
                choose=choose,
                run=run,
            )
    return y


def specs(device: str = "meta") -> Iterator[tuple[Spec, Any]]:
    """Yield launches of Wan and the U-Net; each consists of four."""
    for name, size, channels in (
        ("Wan 192 to 96", (4, 256, 256), (192, 96)),
        ("U-Net 448", (17, 32, 32), (448, 448)),
    ):
        x, weight = (
            torch.randn(*shape, dtype=torch.float16, device=device)
            for shape in ((*size, channels[0]), (3, 3, *channels))
        )
        work = 2 * 16 * channels[0] * channels[1] * size[0] * size[1] * size[2]
        # Writing the upsampled map, reading it, and writing the result.
        moved = traffic(x) * (1 + 4 + 4) + traffic(weight) + work / channels[0] / 4
        one, eager = partial(launch, x, packed(weight)), partial(plain, x, as_torch_reads(weight))
        yield Spec(f"{name} float16", one, eager, work, moved), kernel
