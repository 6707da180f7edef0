"""What gray weights cost: colour channels averaged first, compared with clamping them first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fvae_deploy.export.check import Array, clip
from fvae_deploy.export.manifest import Averaging, Intensity
from fvae_deploy.export.models.family import Model


def measured(gray: Model, clamped: Model, cells: tuple[int, int], steps: int) -> Model:
    """Return the gray network with the error of its averaging, in HU.

    `clamped` is the same network with `Averaging.clamped`. Both decode the latents of one clip of
    `cells` latent cells and `steps` latent frames after the first; most of its voxels are at
    either end of the HU window, as air and bone are.
    """
    geometry, intensity = gray.geometry, gray.intensity
    height, width = (n * geometry.spatial for n in cells)
    x = saturated((1 + geometry.temporal * steps, height, width), intensity)
    heads = (geometry.first_slices, geometry.first_frames)
    z = run_stages(gray, "encode", torch.from_numpy(x)[None, None], heads[0], geometry.temporal)
    first, then = (
        run_stages(model, "decode", z, heads[1], 1).clamp(intensity.model_min, intensity.model_max)
        for model in (gray, clamped)
    )
    gain = (intensity.hu_max - intensity.hu_min) / (intensity.model_max - intensity.model_min)
    error = gain * (first.double() - then.double()).abs()
    averaging = Averaging(False, float(error.mean()), float(error.max()))
    return dataclasses.replace(gray, averaging=averaging)


def saturated(shape: tuple[int, int, int], intensity: Intensity) -> Array:
    """Make a clip [T, H, W] in the model's range whose air and bone are exactly at its ends."""
    middle = (intensity.model_min + intensity.model_max) / 2
    stretched = middle + 2 * (clip(shape, intensity, 0) - middle)
    x: Array = np.clip(stretched, intensity.model_min, intensity.model_max).astype(np.float32)
    return x


@torch.inference_mode()
def run_stages(model: Model, direction: str, data: Tensor, head: int, stride: int) -> Tensor:
    """Run all stages of a direction on [1, C, T, H, W], step by step."""
    lag = model.lag if direction == "decode" else 0
    starts = (0, *range(head, data.shape[2], stride))
    states: dict[str, Sequence[Tensor]] = {}
    results = []
    for number in range(len(starts) + lag // model.geometry.temporal):
        start = starts[min(number, len(starts) - 1)]
        x = data[:, :, start : start + (stride if start else head)].contiguous()
        clock = [torch.tensor((number, number - len(starts) + 1))] if lag else []
        for name, stage in model.stages.items():
            if name.startswith(direction):
                x, *states[name] = stage(x, *clock, *states.get(name, ()))
        results.append(x)
    result = torch.cat(results, dim=2)
    return result[:, :, lag : lag + model.geometry.slices(data.shape[2])] if lag else result
