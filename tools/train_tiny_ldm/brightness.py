"""What predicted latents mean in HU: the mean of every organ, and of the body in every slice.

The squared error of latents is mostly edges and texture, which no mask tells; that an aorta is
80 HU too dark hardly shows in it. So predictions are decoded as well, by the frozen decoder of
`tiny`, and means over many voxels, where chance averages out, are held to the phantom's.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fvae_deploy.export.models.lean_vae import STRIDE, CausalState
from fvae_deploy.export.sources import load_lean_vae
from fvae_deploy.organs import ORGANS
from fvae_deploy.patient import ARTERIES

VAE = Path(__file__).parents[1] / "train_tiny" / "tiny.safetensors"
OUTSIDE = 255  # label of what is not the body
VOXELS = 1000  # least of an organ in a window
REACH = 30.0  # HU: most that a mean is asked to be nearer the phantom's than the VAE's is
ORGAN, SLICE = 40.0, 15.0  # HU, one unit of the loss
# Of organs that the arterial phase makes brighter: it makes more of them darker, and neither may
# stand for the whole phase.
ARTERIAL = 5.0
LABELLED = [ORGANS.get(label, "") for label in range(256)]
UNSEEN = 2  # latent frames that need those before the window


class Voxels(NamedTuple):
    """A window's labels [slices, x, y], and the sums of HU [slices, 256] under them."""

    labels: Tensor
    drawn: Tensor  # in the phantom
    reconstructed: Tensor  # in its reconstruction
    begins: bool  # its first frame is one slice, the volume's first


class Brightness:
    """Errors of means in HU, differentiable; `shift` and `scale` normalise latents."""

    def __init__(self, shift: list[float], scale: list[float]) -> None:
        self.vae, facts = load_lean_vae(VAE)
        self.vae.requires_grad_(False)
        unit = torch.tensor(facts["latent_scale"])
        self.factor = (1 / (torch.tensor(scale) * unit))[:, None, None]
        self.offset = (torch.tensor(shift) / unit)[:, None, None]
        self.weights = torch.tensor(
            [ARTERIAL if organ.startswith((*ARTERIES, "heart")) else 1.0 for organ in LABELLED]
        )

    def decoded(self, z: Tensor, begins: bool) -> Tensor:
        """HU [slices, x, y] of normalised latents [f, D, h, w]."""
        latents = (z * self.factor + self.offset).transpose(0, 1)[None]
        tokens = self.vae.expand(latents, CausalState())
        parts = [self.vae.unembed(tokens[:, int(begins) :], "video")]
        if begins:
            parts.insert(0, self.vae.unembed(tokens[:, :1], "image"))
        return 2000 * torch.cat(parts, dim=2)[0, 0]

    def off(self, z: Tensor, voxels: Voxels) -> tuple[Tensor, Tensor, Tensor]:
        """HU by which means of organs [organs] and of slices [slices] are off; organs' weights."""
        seen = slice(0 if voxels.begins else UNSEEN * STRIDE, None)
        labels = voxels.labels[seen].long()
        rows = torch.arange(len(labels))[:, None, None] * 256
        places = (labels + rows).reshape(-1)
        counts = torch.bincount(places, minlength=256 * len(labels)).reshape(-1, 256)
        found = torch.zeros(256 * len(labels)).index_add(
            0, places, self.decoded(z, voxels.begins)[seen].reshape(-1)
        )
        sums = [found.reshape(-1, 256), voxels.drawn[seen], voxels.reconstructed[seen]]
        organs, slices = counts.sum(0)[1:OUTSIDE], counts[:, :OUTSIDE].sum(1)
        several, there = organs >= VOXELS, slices > 0
        return (
            _off(*(s.sum(0)[1:OUTSIDE][several] / organs[several] for s in sums)),
            _off(*(s[:, :OUTSIDE].sum(1)[there] / slices[there] for s in sums)),
            self.weights[1:OUTSIDE][several],
        )

    def loss(self, z: Tensor, voxels: Voxels) -> Tensor:
        """Huber loss of both, equal shares; of slices, every latent frame has the same weight."""
        organs, slices, weights = self.off(z, voxels)
        frames = torch.ones_like(slices)
        if voxels.begins:
            frames[0] = STRIDE
        total = (frames * _huber(slices / SLICE)).sum() / frames.sum()
        if len(organs):
            total = total + (weights * _huber(organs / ORGAN)).sum() / weights.sum()
        return total


def _huber(off: Tensor) -> Tensor:
    return F.huber_loss(off, torch.zeros_like(off), reduction="none", delta=2.0)


def _off(found: Tensor, drawn: Tensor, reconstructed: Tensor) -> Tensor:
    """Difference of means from what a decoder of latents can be asked for."""
    return found - reconstructed - (drawn - reconstructed).clamp(-REACH, REACH)
