"""Compare mean HU of predicted latents with the phantom: by organ, unlabelled tissue and slice.

The squared error of latents consists mostly of edges and texture, which no mask determines. An
aorta that is 80 HU too dark hardly changes it. So predictions are also decoded, by the frozen
decoder of `tiny`, and means over many voxels, in which random details average out, are compared
with those of the phantom.
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
OUTSIDE = 255  # label of voxels outside the body
VOXELS = 1000  # minimum number of voxels of an organ in a window
REACH = 30.0  # HU: largest correction of the VAE's own error that a mean is trained towards
ORGAN, SLICE = 40.0, 15.0  # HU that count as one unit of the loss
# Weight of organs that the arterial phase makes brighter. It makes more organs darker; without this
# weight, those would dominate.
ARTERIAL = 5.0
LABELLED = [ORGANS.get(label, "") for label in range(256)]
UNSEEN = 2  # latent frames whose decoding needs frames before the window


class Voxels(NamedTuple):
    """Labels of B windows [B, slices, x, y], and sums for every label [B, slices, 256].

    Every latent frame has `STRIDE` slices. A volume's first frame is one slice, the last of
    the four; the others are `OUTSIDE`.
    """

    labels: Tensor  # int64
    counts: Tensor  # number of voxels
    drawn: Tensor  # sum of their HU in the phantom
    reconstructed: Tensor  # sum of their HU in its reconstruction
    begins: Tensor  # [B] whether the first frame is the volume's first

    def seen(self) -> Voxels:
        """Exclude the slices whose decoding needs frames before the window."""
        begun = self.begins[:, None]
        late = torch.arange(self.labels.shape[1], device=begun.device) >= UNSEEN * STRIDE
        kept = begun | late[None]
        return Voxels(
            self.labels.where(kept[..., None, None], OUTSIDE),
            *(sums * kept[..., None] for sums in (self.counts, self.drawn, self.reconstructed)),
            self.begins,
        )


class Off(NamedTuple):
    """Errors of means in HU, and whether there are enough voxels for a mean."""

    organs: Tensor  # [B, labels]
    several: Tensor
    slices: Tensor  # [B, slices]
    there: Tensor


class Brightness:
    """Differentiable errors of means in HU; `shift` and `scale` normalise latents."""

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
        """Decode normalised latents [B, D, f, h, w] to HU [B, slices, x, y]."""
        tokens = self.vae.expand(z * self.factor + self.offset, CausalState())
        slices = self.vae.unembed(tokens, "video")[:, 0]
        image = self.vae.unembed(tokens[:, :1], "image")[:, 0, 0]
        first = torch.where(begins[:, None, None], image, slices[:, STRIDE - 1])
        return 2000 * torch.cat([slices[:, : STRIDE - 1], first[:, None], slices[:, STRIDE:]], 1)

    def off(self, z: Tensor, voxels: Voxels) -> Off:
        """Compare the means of organs, and of the body in each slice, with their targets."""
        voxels = voxels.seen()
        windows, slices = voxels.labels.shape[:2]
        rows = torch.arange(windows * slices, device=z.device).view(windows, slices, 1, 1) * 256
        predicted = torch.zeros(windows * slices * 256, device=z.device).index_add(
            0, (voxels.labels + rows).flatten(), self.decoded(z, voxels.begins).flatten()
        )
        counts = voxels.counts
        sums = (predicted.view_as(counts), voxels.drawn, voxels.reconstructed)
        organs, planes = counts.sum(1)[:, :OUTSIDE], counts[..., :OUTSIDE].sum(2)
        return Off(
            _off(*(s.sum(1)[:, :OUTSIDE] / organs.clamp(min=1) for s in sums)),
            organs >= VOXELS,
            _off(*(s[..., :OUTSIDE].sum(2) / planes.clamp(min=1) for s in sums)),
            planes > 0,
        )

    def loss(self, z: Tensor, voxels: Voxels) -> Tensor:
        """Return the Huber loss of organs and slices, in equal shares.

        Among the slices, every latent frame has the same weight.
        """
        off = self.off(z, voxels)
        slices = off.there.float()
        slices[:, STRIDE - 1] *= torch.where(voxels.begins, STRIDE, 1)
        organs = off.several * self.weights
        shares = _mean(slices, off.slices / SLICE) + _mean(organs, off.organs / ORGAN)
        return shares.mean()


def _mean(weights: Tensor, off: Tensor) -> Tensor:
    """Return the mean Huber loss of every window; 0 if all weights are 0."""
    lost = F.huber_loss(off, torch.zeros_like(off), reduction="none", delta=2.0)
    return (weights * lost).sum(1) / weights.sum(1).clamp(min=1e-6)


def _off(predicted: Tensor, drawn: Tensor, reconstructed: Tensor) -> Tensor:
    """Return the difference of means from a target that a decoder of latents can reach."""
    return predicted - reconstructed - (drawn - reconstructed).clamp(-REACH, REACH)
