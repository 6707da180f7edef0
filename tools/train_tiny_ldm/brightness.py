"""What predicted latents mean in HU: of every organ and what has no label, and of every slice.

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
from fvae_deploy.phantom.patient import ARTERIES

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
    """Labels of B windows [B, slices, x, y], and what lies under them [B, slices, 256].

    All have `STRIDE` slices for a latent frame. A volume's first frame is one slice: the last of
    its four, the others are `OUTSIDE`.
    """

    labels: Tensor  # int64
    counts: Tensor  # voxels
    drawn: Tensor  # their HU in the phantom, summed
    reconstructed: Tensor  # and in its reconstruction
    begins: Tensor  # [B] whether the first frame is the volume's first

    def seen(self) -> Voxels:
        """Leave out the slices that need frames before the window."""
        begun = self.begins[:, None]
        late = torch.arange(self.labels.shape[1], device=begun.device) >= UNSEEN * STRIDE
        kept = begun | late[None]
        return Voxels(
            self.labels.where(kept[..., None, None], OUTSIDE),
            *(sums * kept[..., None] for sums in (self.counts, self.drawn, self.reconstructed)),
            self.begins,
        )


class Off(NamedTuple):
    """HU by which means are off, and whether there is anything to have a mean."""

    organs: Tensor  # [B, labels]
    several: Tensor
    slices: Tensor  # [B, slices]
    there: Tensor


class Brightness:
    """Errors of means in HU, differentiable; `shift` and `scale` normalise latents."""

    def __init__(self, shift: list[float], scale: list[float], device: torch.device) -> None:
        self.vae, facts = load_lean_vae(VAE)
        self.vae.requires_grad_(False).to(device)
        unit = torch.tensor(facts["latent_scale"])
        factor, offset = 1 / (torch.tensor(scale) * unit), torch.tensor(shift) / unit
        self.factor, self.offset = (v[:, None, None, None].to(device) for v in (factor, offset))
        weights = [
            ARTERIAL if organ.startswith((*ARTERIES, "heart")) else 1.0 for organ in LABELLED
        ]
        self.weights = torch.tensor(weights, device=device)[:OUTSIDE]

    def decoded(self, z: Tensor, begins: Tensor) -> Tensor:
        """HU [B, slices, x, y] of normalised latents [B, D, f, h, w]."""
        tokens = self.vae.expand(z * self.factor + self.offset, CausalState())
        slices = self.vae.unembed(tokens, "video")[:, 0]
        image = self.vae.unembed(tokens[:, :1], "image")[:, 0, 0]
        first = torch.where(begins[:, None, None], image, slices[:, STRIDE - 1])
        return 2000 * torch.cat([slices[:, : STRIDE - 1], first[:, None], slices[:, STRIDE:]], 1)

    def off(self, z: Tensor, voxels: Voxels) -> Off:
        """Compare the means of organs, and of the body in slices, with what they are to be."""
        voxels = voxels.seen()
        windows, slices = voxels.labels.shape[:2]
        rows = torch.arange(windows * slices, device=z.device).view(windows, slices, 1, 1) * 256
        found = torch.zeros(windows * slices * 256, device=z.device).index_add(
            0, (voxels.labels + rows).flatten(), self.decoded(z, voxels.begins).flatten()
        )
        counts = voxels.counts
        sums = (found.view_as(counts), voxels.drawn, voxels.reconstructed)
        organs, planes = counts.sum(1)[:, :OUTSIDE], counts[..., :OUTSIDE].sum(2)
        return Off(
            _off(*(s.sum(1)[:, :OUTSIDE] / organs.clamp(min=1) for s in sums)),
            organs >= VOXELS,
            _off(*(s[..., :OUTSIDE].sum(2) / planes.clamp(min=1) for s in sums)),
            planes > 0,
        )

    def loss(self, z: Tensor, voxels: Voxels) -> Tensor:
        """Huber loss of both, equal shares; of slices, every latent frame has the same weight."""
        off = self.off(z, voxels)
        slices = off.there.float()
        slices[:, STRIDE - 1] *= torch.where(voxels.begins, STRIDE, 1)
        organs = off.several * self.weights
        shares = _mean(slices, off.slices / SLICE) + _mean(organs, off.organs / ORGAN)
        return shares.mean()


def _mean(weights: Tensor, off: Tensor) -> Tensor:
    """Mean Huber loss of every window; 0 where nothing has a weight."""
    lost = F.huber_loss(off, torch.zeros_like(off), reduction="none", delta=2.0)
    return (weights * lost).sum(1) / weights.sum(1).clamp(min=1e-6)


def _off(found: Tensor, drawn: Tensor, reconstructed: Tensor) -> Tensor:
    """Difference of means from what a decoder of latents can be asked for."""
    return found - reconstructed - (drawn - reconstructed).clamp(-REACH, REACH)
