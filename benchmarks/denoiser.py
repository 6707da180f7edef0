"""Time one step of the generator's U-Net: the published formulation in torch, and the engines.

    python benchmarks/denoiser.py                     # 43 M parameters, 17 frames of 32x32 cells
    python benchmarks/denoiser.py --width 224 --plane 64    # as published, 482 M parameters

All run with the same random weights, in turn (A B C A B C …), and the table shows medians. The
published formulation runs eagerly in float32: 2-D convolutions over frames, 1-D convolutions along
the frames of every pixel, and keys and values of the text for every frame at every step. The
operations are counted once, in the folded form.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from random_weights import UNET as PUBLISHED
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fvae_deploy.bench.run import ceiling
from fvae_deploy.engines.base import missing, precisions
from fvae_deploy.export.generator import timestep_embedding
from fvae_deploy.export.generators import load_generator
from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet
from fvae_deploy.export.models.denoiser_layers import AlongFrames, Attention, FrameNorm, InFrame
from fvae_deploy.export.to_onnx import write_bundle
from fvae_deploy.generation.denoiser import open_denoiser
from fvae_deploy.stream.report import machine

FRAMES, TOKENS = 17, 512


def frames_of(volume: Tensor) -> Tensor:
    """View a volume [1, C, f, h, w] as frames [f, C, h, w]."""
    return volume[0].transpose(0, 1)


def volume_of(frames: Tensor) -> Tensor:
    """View frames [f, C, h, w] as a volume [1, C, f, h, w]."""
    return frames.transpose(0, 1)[None]


class PublishedInFrame(InFrame):
    """A 2-D convolution with the frames as its batch."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, f, h, w] to [1, C', f, h', w']."""
        return volume_of(nn.Conv2d.forward(self, frames_of(x)))


class PublishedAlongFrames(AlongFrames):
    """A 1-D convolution along the frames of every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, f, h, w] to the same shape."""
        pixels = x[0].permute(2, 3, 0, 1).flatten(0, 1)  # [h * w, C, f]
        y = self.temporal_conv(F.pad(pixels, (1, 1), mode="reflect"))
        return volume_of(y.unflatten(0, x.shape[3:]).permute(3, 2, 0, 1))


class PublishedNorm(FrameNorm):
    """Group norm with the frames as its batch."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, f, h, w] to the same shape."""
        return volume_of(nn.GroupNorm.forward(self, frames_of(x)))


class PublishedUNet(UNet):
    """The same network, with skip connections joined as frames."""

    @staticmethod
    def joined(x: Tensor, skip: Tensor) -> Tensor:
        """Concatenate channels of [1, C, f, h, w]."""
        return volume_of(torch.cat([frames_of(x), frames_of(skip)], dim=1))


def published(network: UNet) -> UNet:
    """Change a network to the published formulation, in place; the weights stay."""
    classes = {
        UNet: PublishedUNet,
        InFrame: PublishedInFrame,
        AlongFrames: PublishedAlongFrames,
        FrameNorm: PublishedNorm,
    }
    for module in network.modules():
        module.__class__ = classes.get(type(module), type(module))
    return network


@torch.inference_mode()
def published_step(
    network: UNet, x: Tensor, mask: Tensor, time_: Tensor, context: Tensor
) -> np.ndarray:
    """Compute one step, with keys and values for every frame."""
    per_frame = context.expand(len(x), -1, -1)
    layers: list[Attention] = network.text_attention
    text = [t for layer in layers for t in layer.keys_values(per_frame)]
    return np.asarray(network(x, mask, time_, *text))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64, help="model_channels")
    parser.add_argument("--plane", type=int, default=32, help="latent cells along h and w")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--only", help="time only these, such as openvino:fp32,torch:fp32")
    options = parser.parse_args()
    config = {**PUBLISHED, "model_channels": options.width}
    torch.manual_seed(0)
    network = UNet(DenoiserConfig.read(config)).eval().requires_grad_(False)
    count = sum(p.numel() for p in network.parameters())
    random = np.random.default_rng(0)
    shape = (FRAMES, 16, options.plane, options.plane)
    x, mask = (random.standard_normal(shape, dtype=np.float32) for _ in range(2))
    context = random.standard_normal((TOKENS, 768), dtype=np.float32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = {f"model.diffusion_model.{k}": v for k, v in network.state_dict().items()}
        torch.save({"state_dict": weights, "unet_config": config}, folder / "unet.ckpt")
        loaded = load_generator(folder / "unet.ckpt", version="bench")
        manifest = write_bundle(loaded, folder / "bundle")
        del loaded
        published(network)
        arguments = (
            network,
            *map(torch.from_numpy, (x, mask, timestep_embedding(500, options.width), context)),
        )
        runs: dict[str, Callable[[], np.ndarray]] = {
            "published, torch fp32": lambda: published_step(*arguments)
        }
        chosen = (options.only or "openvino:fp32,openvino:bf16,onnxruntime:fp32,torch:fp32").split(
            ","
        )
        opened = []
        for each in chosen:
            engine, _, precision = each.partition(":")
            if missing(engine) is not None or precision not in precisions(engine):
                print(f"{each} does not run here")
                continue
            denoiser = open_denoiser(folder / "bundle", engine=engine, precision=precision)
            opened.append(denoiser)
            runs[each.replace(":", " ")] = lambda d=denoiser: d.denoise(
                x, mask_latent=mask, t=500, context=context
            )
        results = {name: run() for name, run in runs.items()}  # compiles and warms up
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
        for denoiser in opened:
            denoiser.close()
    cost = 2 * manifest.part("denoise").mac_per_cell * FRAMES * options.plane**2
    first = next(iter(runs))
    base, expected = statistics.median(seconds[first]), results[first]
    title = f"{count / 1e6:.0f} M parameters, {FRAMES}x{options.plane}x{options.plane}"
    table = Table(title=f"{title}, {cost / 1e9:.0f} GFLOP a step")
    for column in ("", "seconds", "× published", "GFLOP/s", "mean, max error (deviations)"):
        table.add_column(column)
    for name in runs:
        median = statistics.median(seconds[name])
        error = np.abs(results[name] - expected) / expected.std()
        table.add_row(
            name,
            f"{median:.2f}",
            f"{base / median:.2f}",
            f"{cost / median / 1e9:.0f}",
            f"{error.mean():.1e}, {error.max():.1e}",
        )
    Console(width=100).print(table)
    tops = (f"{ceiling(precision=p) / 1e9:.0f} GFLOP/s in {p}" for p in precisions("openvino"))
    print(f"ceiling {', '.join(tops)}; {machine()['processor']}, ", end="")
    print(f"{machine()['cores']} cores")


if __name__ == "__main__":
    main()
