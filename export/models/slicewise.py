"""Code shared by families: slices as a batch, gray folding, exact upsampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_deploy.errors import BundleError


class Slices(nn.Module):
    """A sequence of layers on a batch of slices: a stage without state."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Map x [1, C, k, H, W] to [1, D, k, h, w]."""
        y = x[0].transpose(0, 1)  # [k, C, H, W]
        for layer in self.layers:
            y = layer(y)
        return (y.transpose(0, 1)[None],)


class Doubling(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution, in 4/9 of the work.

    Both together are four 2x2 convolutions, one for each position of a pixel in its doubled cell:
    rows (-1, 0) with weights (w0, w1 + w2) for the upper position, rows (0, 1) with (w0 + w1, w2)
    for the lower; the same for columns. A single transposed 4x4 convolution of stride 2 is no
    faster in OpenVINO, and takes 1.7 times the memory in ONNX Runtime (docs/adr/0009).
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight = convolution.weight
        upper = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
        for i, rows in enumerate((upper, upper.flip(0, 1))):
            for j, columns in enumerate((upper, upper.flip(0, 1))):
                combined = torch.einsum("ar,bc,oirc->oiab", rows, columns, weight.double())
                combined = combined.to(weight.dtype)
                self.register_parameter(f"weight{i}{j}", nn.Parameter(combined))
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x [k, C, H, W] to [k, D, 2H, 2W]."""
        positions = [
            F.conv2d(F.pad(x, (1 - j, j, 1 - i, i)), self.get_parameter(f"weight{i}{j}"), self.bias)
            for i in (0, 1)
            for j in (0, 1)
        ]  # [k, D, H, W] each
        # The positions stay whole among the channels: OpenVINO then keeps its layout, channels
        # last, where a pixel shuffle of interleaved channels would have it reorder every map.
        y = torch.cat(positions, dim=1).unflatten(1, (2, 2, -1))  # [k, i, j, D, H, W]
        doubled: Tensor = y.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
        return doubled


def channels_of(config: Mapping[str, Any], channels: int | None) -> int:
    """Return `channels`, or the network's own number; raises BundleError if it has two numbers."""
    inside, outside = config["in_channels"], config["out_channels"]
    if channels is None and inside != outside:
        raise BundleError(
            f"expected as many input as output channels, found {inside} and {outside}: export "
            "without --channels rgb"
        )
    return channels or int(inside)


def fold_pixels(first: Any, last: Any | None, pixels: int) -> None:
    """Fold gray into the weights: sum over input channels, mean over output channels.

    Of a convolution on patches, the pixels vary fastest among the channels.
    `last` is None if the output channels are clamped before they are averaged. All sums are in
    float64, so that every processor gives the same weights.
    """
    weight = first.weight.double().unflatten(1, (-1, pixels)).sum(1)
    first.weight = nn.Parameter(weight.to(first.weight))
    if last is None:
        return
    for name in ("weight", "bias"):
        value = getattr(last, name)
        mean = value.double().unflatten(0, (-1, pixels)).mean(0)
        setattr(last, name, nn.Parameter(mean.to(value)))
