r"""Train a small diffusion model on a folder of latents, and decode what it draws to CTs.

    fvae encode scans/ -o latents/
    python examples/train_latent_diffusion.py latents/ -o drawn.nii.gz

Windows of latent frames are cut to a square at random places. A network of 3-D convolutions learns
to tell the noise that was added to them (DDPM, cosine schedule); DDIM draws a new window from pure
noise, which the VAE decodes to HU. It takes minutes on a CPU, and is a start for your own network,
not a good generator.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fvae_deploy as fvae


class RandomSquare:
    """Cut `side` x `side` cells out of the latents at a random place."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, item: dict[str, Any]) -> Tensor:
        """Return the latents [D, T, side, side] of an item."""
        z = item["latents"]
        short = [max(0, self.side - n) for n in z.shape[2:]]
        z = F.pad(z, (0, short[1], 0, short[0]), mode="replicate") if any(short) else z
        y, x = (int(torch.randint(n - self.side + 1, ())) for n in z.shape[2:])
        return z[..., y : y + self.side, x : x + self.side]


class Block(nn.Module):
    """A residual block that knows the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.time = nn.GroupNorm(8, width), nn.Linear(width, width)
        self.first = nn.Conv3d(width, width, 3, padding=1)
        self.second = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return x [B, C, T, h, w] and what was learned to add to it."""
        y = self.first(F.silu(self.norm(x))) + self.time(time)[:, :, None, None, None]
        return x + self.second(F.silu(y))


class Denoiser(nn.Module):
    """Tells the noise in latents [B, D, T, h, w] at times [B] in 0..1."""

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Conv3d(channels, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.leave = nn.Conv3d(width, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the predicted noise [B, D, T, h, w]."""
        waves = torch.exp(torch.linspace(0, 6, self.width // 2)) * time[:, None]
        embedded = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        y = self.enter(x)
        for block in self.blocks:
            y = block(y, embedded)
        return self.leave(y)


def signal_and_noise(time: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much of the latents and of the noise there is at times [B]: a cosine schedule."""
    angle = (time.clamp(0.001, 0.999) * math.pi / 2)[:, None, None, None, None]
    return angle.cos(), angle.sin()


def train(
    network: Denoiser, loader: DataLoader[Tensor], scale: Tensor, steps: int, rate: float
) -> list[float]:
    """Train for so many steps; return the losses."""
    optimiser, losses = torch.optim.AdamW(network.parameters(), rate), []
    while len(losses) < steps:
        for z in loader:
            time, noise = torch.rand(len(z)), torch.randn_like(z)
            signal, amount = signal_and_noise(time)
            loss = F.mse_loss(network(signal * z / scale + amount * noise, time), noise)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
            if len(losses) % 50 == 0:
                print(f"step {len(losses)}: loss {np.mean(losses[-50:]):.3f}")
            if len(losses) == steps:
                break
    return losses


@torch.no_grad()
def draw(network: Denoiser, shape: tuple[int, ...], steps: int) -> Tensor:
    """Draw latents [1, D, T, h, w] from noise with DDIM."""
    x, times = torch.randn(shape), torch.linspace(1, 0, steps + 1)
    for now, then in pairwise(times):
        signal, amount = signal_and_noise(now[None])
        noise = network(x, now[None])
        clean = ((x - amount * noise) / signal).clamp(-6, 6)
        signal, amount = signal_and_noise(then[None])
        x = signal * clean + amount * noise
    return x


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, draw and decode; return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents", type=Path, help="a folder of fvae encode")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the CT to write, .nii.gz")
    parser.add_argument("--model", default="tiny", help="the model that encoded the latents")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=5, help="latent frames")
    parser.add_argument("--side", type=int, default=16, help="latent cells")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--draws", type=int, default=50, help="steps of DDIM")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    data = fvae.LatentDataset(
        options.latents, options.window, RandomSquare(options.side), stride=1, short="skip"
    )
    loader: DataLoader[Tensor] = DataLoader(
        data,  # type: ignore[arg-type]
        options.batch,
        shuffle=True,
        num_workers=options.workers,
    )
    some = torch.stack([data[i] for i in range(0, len(data), max(1, len(data) // 32))])
    scale = some.std(dim=(0, 2, 3, 4))[None, :, None, None, None].clamp(min=1e-3)
    network = Denoiser(some.shape[1], options.width, blocks=4)
    print(
        f"{len(data)} windows of {len(data.stores)} scans, "
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} million parameters"
    )
    losses = train(network, loader, scale, options.steps, options.rate)
    z = (draw(network, (1, *some.shape[1:]), options.draws) * scale)[0]
    ct = fvae.DecodeLatentd("ct", options.model)({"ct": z})["ct"][0].numpy()
    nibabel.save(nibabel.Nifti1Image(np.rint(ct).astype(np.int16), np.eye(4)), options.output)
    print(f"{options.output}: {ct.shape} voxels, {ct.min():.0f} to {ct.max():.0f} HU")
    return losses


if __name__ == "__main__":
    main()
