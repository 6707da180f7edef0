"""Make training clips from still photographs: motion, dissolves, contrast, flat areas and noise.

A CT read as a video has properties that ordinary video lacks: structures that appear and disappear
between frames, large saturated flat areas (air), narrow contrast under noise, and no common
exposure. The clips imitate these properties with photographs only.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class ClipMaker:
    """Makes random clips [1, T, S, S] in [-1, 1] from luminance images in [0, 1], without end."""

    def __init__(self, photographs: list[np.ndarray], seed: int) -> None:
        self.photographs = photographs
        self.random = np.random.default_rng(seed)

    def batch(self, clips: int, frames: int, size: int) -> Tensor:
        """Return clips [clips, 1, frames, size, size]."""
        return torch.stack([self.clip(frames, size) for _ in range(clips)])

    def clip(self, frames: int, size: int) -> Tensor:
        """Return one clip [1, frames, size, size]."""
        random = self.random
        x = self.moving(frames, size)
        if random.random() < 0.35:  # cross-dissolve into another scene
            ramp = torch.linspace(-1, 1, frames) * random.uniform(1, 6) + random.uniform(-2, 2)
            alpha = torch.sigmoid(ramp)[:, None, None]
            x = x * (1 - alpha) + self.moving(frames, size) * alpha
        gain = 2 * math.exp(random.normal(-0.3, 0.8))
        centre = float(random.choice(x.flatten().numpy()))
        x = (x - centre) * gain + random.normal(0, 0.3)
        if random.random() < 0.5:
            x = -x
        if random.random() < 0.45:  # a saturated flat area with a sharp, moving edge, like air
            mask = self.moving(frames, size, blur=int(random.integers(1, 5)))
            edge = torch.quantile(mask[0], random.uniform(0.1, 0.7))
            flat = -1.05 if random.random() < 0.8 else random.uniform(-1, 1)
            soft = torch.sigmoid((mask - edge) * random.uniform(40, 400))
            x = x * soft + flat * (1 - soft)
        if random.random() < 0.8:
            x = x + self.noise(frames, size) * random.uniform(0, 0.05)
        return x.clamp(-1, 1)[None]

    def moving(self, frames: int, size: int, blur: int = 0) -> Tensor:
        """Pan, zoom and rotate over one photograph: [frames, size, size] in [0, 1]."""
        random = self.random
        photo = self.photographs[random.integers(len(self.photographs))]
        reach = min(2 * size, *photo.shape)
        top, left = (int(random.integers(n - reach + 1)) for n in photo.shape)
        region = torch.from_numpy(photo[top : top + reach, left : left + reach])[None, None]
        if blur:
            region = F.avg_pool2d(region, 4 * blur + 1, stride=1, padding=2 * blur)
        t = torch.arange(frames, dtype=torch.float32) - frames / 2
        speed = abs(random.normal(0, 1.0)) * 0.02
        angle = random.uniform(0, 2 * math.pi)
        zoom = random.uniform(0.55, 1.1) * size / reach
        zooms = zoom * torch.exp(t * random.normal(0, 0.015))
        turns = random.uniform(0, 2 * math.pi) * (random.random() < 0.5) + t * random.normal(
            0, 0.02
        )
        theta = torch.stack(
            [
                torch.stack(
                    [zooms * turns.cos(), -zooms * turns.sin(), t * speed * math.cos(angle)]
                ),
                torch.stack(
                    [zooms * turns.sin(), zooms * turns.cos(), t * speed * math.sin(angle)]
                ),
            ]
        ).permute(2, 0, 1)
        grid = F.affine_grid(theta, [frames, 1, size, size], align_corners=False)
        seen = F.grid_sample(
            region.expand(frames, -1, -1, -1), grid, padding_mode="reflection", align_corners=False
        )
        return seen[:, 0]

    def noise(self, frames: int, size: int) -> Tensor:
        """Return unit noise, white or smoothed in the plane as a reconstruction kernel does."""
        noise = torch.from_numpy(
            self.random.standard_normal((frames, 1, size + 4, size + 4), dtype=np.float32)
        )
        width = self.random.uniform(0.0, 1.2)
        taps = torch.exp(-0.5 * (torch.arange(-2, 3) / max(width, 1e-3)) ** 2)
        kernel = torch.outer(taps, taps)
        kernel = kernel / kernel.square().sum().sqrt()
        return F.conv2d(noise, kernel[None, None])[:, 0]
