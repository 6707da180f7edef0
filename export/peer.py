"""The published formulation of LeanVAE, as a peer to measure against, on the same weights.

Eager torch, a whole window at once, tokens channels last in memory, and around every 3-D
depthwise convolution a permutation to channels first, explicit padding and back; Haar bands
by strided convolution. Nothing is folded. What it computes equals `LeanVAE` (tested).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fvae_deploy.export.models.lean_vae import CausalDepthwise, CausalState, LeanVAE
from fvae_deploy.export.sources import load_lean_vae


class PublishedDepthwise(nn.Module):
    """The depthwise layer as published: permute, pad, 3-D convolution, permute back."""

    def __init__(self, layer: CausalDepthwise) -> None:
        super().__init__()
        self.ds_conv = layer.ds_conv

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        """X [B, T, H, W, D] of a whole window; the state stays unused."""
        padded = F.pad(x.permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))
        convolved: Tensor = self.ds_conv(padded.contiguous())
        return convolved.permute(0, 2, 3, 4, 1)


def _along(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Add and subtract neighbours of x [B, C, T, H, W] along one axis, by convolutions."""
    shape, stride = [1, 1, 1, 1, 1], [1, 1, 1]
    shape[axis], stride[axis - 2] = 2, 2
    groups = x.shape[1]
    kernels = [
        torch.tensor(taps, dtype=x.dtype).reshape(shape).repeat(groups, 1, 1, 1, 1)
        for taps in ((1.0, 1.0), (1.0, -1.0))
    ]
    low, high = (F.conv3d(x, kernel, stride=tuple(stride), groups=groups) for kernel in kernels)
    return low, high


def _back(low: Tensor, high: Tensor, axis: int) -> Tensor:
    """Undo `_along` by transposed convolutions."""
    shape, stride = [1, 1, 1, 1, 1], [1, 1, 1]
    shape[axis], stride[axis - 2] = 2, 2
    groups = low.shape[1]
    first, second = (
        torch.tensor(taps, dtype=low.dtype).reshape(shape).repeat(groups, 1, 1, 1, 1) / 2
        for taps in ((1.0, 1.0), (1.0, -1.0))
    )
    y: Tensor = F.conv_transpose3d(low, first, stride=tuple(stride), groups=groups)
    y += F.conv_transpose3d(high, second, stride=tuple(stride), groups=groups)
    return y


def published_haar(x: Tensor) -> Tensor:
    """Equal `haar`, one axis and one band after the other, by strided grouped convolutions."""
    bands = [x]
    for axis in (4, 3) if x.shape[2] == 1 else (2, 3, 4):
        bands = [half for band in bands for half in _along(band, axis)]
    return torch.cat(bands, dim=1)


def published_inverse_haar(bands: Tensor, channels: int) -> Tensor:
    """Equal `inverse_haar`, by transposed convolutions."""
    found = list(torch.split(bands, channels, dim=1))
    for axis in (3, 4) if len(found) == 4 else (4, 3, 2):
        found = [_back(low, high, axis) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


class Published(LeanVAE):
    """`LeanVAE` in the published formulation; computes the same."""

    def __init__(self, model: LeanVAE) -> None:
        super().__init__(model.config)
        self.load(model.state_dict())
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, CausalDepthwise):
                    setattr(module, name, PublishedDepthwise(child))

    def bands(self, x: Tensor) -> Tensor:
        """Wavelet bands, by convolutions."""
        return published_haar(x)

    def pixels(self, bands: Tensor) -> Tensor:
        """Undo `bands`."""
        return published_inverse_haar(bands, self.config.in_channels)


def reference_window(
    weights: Path, direction: str, x: NDArray[np.float32], slices: int
) -> Callable[[], Any]:
    """Make a function that passes one whole window through encoder or decoder.

    x [C, 1, H, W] is repeated to `slices` frames, or [D, 1, h, w] to their latent frames; a
    gray x is replicated to the network's channels, as the published scripts do.
    """
    model = Published(load_lean_vae(weights)[0]).eval()
    frames = slices if direction == "encode" else 1 + (slices - 1) // 4
    window = torch.from_numpy(x)[None].repeat(1, 1, frames, 1, 1)
    if direction == "encode":
        window = window.expand(-1, model.config.in_channels, -1, -1, -1).contiguous()
    work = model.encode if direction == "encode" else model.decode

    @torch.inference_mode()
    def run() -> Any:
        return work(window)

    return run
