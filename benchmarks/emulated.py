"""Emulate number formats of GPUs in torch on a CPU, and measure what they cost on a CT.

    python benchmarks/emulated.py BUNDLE... --measure CT [--slices 2] [--size 256]

Rounds inputs and weights of convolutions and linear layers, sums in float32, and compares with
float32. An input has one scale, a weight one for each output channel; both map the largest value to
the largest number of the format (448 in fp8 E4M3, 127 in int8). As in the int8 of `fvae export
--calibrate`, fp8 and int8 leave layers with fewer than 64 input or output channels in float32.
No time is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from int8 import clip_of
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fvae_deploy.stream.codec import bundle_path, open_codec

FORMATS = ("fp32", "bf16", "fp8", "int8")
LAYERS = (F.conv2d, F.conv3d, F.linear)
LEAST = 64  # input and output channels of layers in fp8 and int8


class Emulated(TorchFunctionMode):
    """Computes layers with inputs and weights rounded to a format."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind
        self.rounded = self.layers = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Round what a layer multiplies; other functions run as they are."""
        kwargs = kwargs or {}
        if func not in LAYERS or self._kind == "fp32":
            return func(*args, **kwargs)
        x, weight, *rest = args
        self.layers += 1
        if self._kind in ("fp8", "int8") and min(weight.shape[:2]) < LEAST:
            return func(*args, **kwargs)
        self.rounded += 1
        if self._kind in ("fp8", "int8"):
            axes = tuple(range(1, weight.ndim))
            scaled = rounded(x, x.abs().max(), self._kind)
            return func(scaled, rounded(weight, weight.abs().amax(axes, True), self._kind), *rest)
        return func(half(x), half(weight), *rest, **kwargs)


def rounded(x: Tensor, most: Tensor, kind: str) -> Tensor:
    """Round to fp8 or int8, with `most` as the largest number."""
    step = most.clamp(min=1e-30) / (448 if kind == "fp8" else 127)
    scaled = x / step
    near = scaled.to(torch.float8_e4m3fn).float() if kind == "fp8" else scaled.round()
    return near * step


def half(x: Tensor) -> Tensor:
    """Round to bf16."""
    return x.bfloat16().float()


def measure(bundle: str, ct: Path, slices: int, size: int | None) -> None:
    """Print one row for each format."""
    results: dict[str, tuple[Any, Any]] = {}
    with open_codec(bundle_path(bundle), engine="torch") as codec:
        intensity = codec.manifest.intensity
        least, most = intensity.model_min, intensity.model_max
        clip = clip_of(ct, codec.manifest, slices, size)
        for kind in FORMATS:
            with Emulated(kind) as mode:
                z = codec.encode(clip).copy()
                x = np.clip(codec.decode(z), least, most)
            results[kind] = z, x
            (z0, x0), hu = results["fp32"], (intensity.hu_max - intensity.hu_min) / (most - least)
            difference = np.abs(x.astype(np.float64) - x0)
            error = np.square(x.astype(np.float64) - clip.clip(least, most)).mean()
            cells = (
                codec.manifest.name,
                kind,
                f"{mode.rounded} of {mode.layers}",
                f"{np.abs(z - z0).mean() / z0.std():.4f}",
                f"{difference.mean() * hu:.2f}, {np.quantile(difference, 0.99) * hu:.1f}",
                f"{10 * np.log10((most - least) ** 2 / error):.2f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure all bundles."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--measure", type=Path, required=True)
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--size", type=int, help="side of the middle of a slice, in pixels")
    given = parser.parse_args()
    headings = "network", "format", "layers", "latents, deviations", "mean, 99 %, HU", "PSNR, dB"
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}", flush=True)
    for bundle in given.bundles:
        measure(bundle, given.measure, given.slices, given.size)


if __name__ == "__main__":
    main()
