"""Small sets of phantoms, and networks to stand in for those that no test can have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.phantom.patient import varied
from fvae_deploy.phantom.torso import write_phantom
from fvae_deploy.volume.open import create_volume, open_volume

SHAPE = (96, 96, 20)


def phantoms(folder: Path, seeds: range, shape: tuple[int, int, int] = SHAPE) -> Path:
    """Write a phantom for each seed, its labels to FOLDER_labels; return the folder."""
    labels = folder.with_name(f"{folder.name}_labels")
    folder.mkdir(parents=True)
    labels.mkdir()
    for number, seed in enumerate(seeds):
        name = f"{folder.name[0]}{number}.nii.gz"
        write_phantom(folder / name, shape, labels / name, seed=seed, patient=varied(seed))
    return folder


def changed(source: Path, target: Path, change: Any) -> Path:
    """Write every CT of a folder anew, its frames [t, x, y] changed by a function of them."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        reader = open_volume(path)
        frames = np.concatenate([*reader.slabs(8)])
        with create_volume(target / path.name, reader.geometry) as writer:
            writer.write(change(frames.astype(np.float32)).astype(np.float32))
        reader.close()
    return target


def noisy(deviation: float) -> Any:
    """Return a function that adds white noise."""
    random = np.random.default_rng(0)
    return lambda frames: frames + random.normal(0, deviation, frames.shape)


def scripted(module: Any, path: Path) -> Path:
    """Save a module as TorchScript, whose writing torch deprecates."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def write_i3d(path: Path) -> Path:
    """Write a TorchScript file with the arguments of StyleGAN's I3D, and 6 features."""
    import torch

    class StandIn(torch.nn.Module):
        def forward(
            self,
            x: torch.Tensor,
            rescale: bool = True,
            resize: bool = True,
            return_features: bool = False,
        ) -> torch.Tensor:
            if rescale or resize or not return_features:
                raise RuntimeError("the arguments of the published evaluation were expected")
            assert x.shape[1:] == (3, 17, 224, 224)
            steps = (x[:, :, 1:] - x[:, :, :-1]).abs().mean(dim=[2, 3, 4])
            return torch.cat([x.mean(dim=[2, 3, 4]), steps], dim=1)

    return scripted(StandIn(), path)


def write_picture_network(path: Path) -> Path:
    """Write a TorchScript file of a small network of pictures, with maps of 4 features."""
    import torch

    class StandIn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 4, 5, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).abs()

    torch.manual_seed(0)
    return scripted(StandIn(), path)
