r"""Train a small network that reads a CT's latents, and test it on scans that it has not seen.

    fvae encode scans/ -o latents/
    python examples/lungs_from_latents.py latents/ organs/

For every window of latent frames it learns which share of the voxels is lung. The truth comes from
label maps in `organs/`, with TotalSegmentator's numbers and the names of the scans. It takes
seconds on a CPU, and is a start for a target of your own: replace `LungShare`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fvae_deploy as fvae

LUNGS = (10, 11, 12, 13, 14)  # the five lobes in TotalSegmentator's label maps
SLICES = 4  # slices of a latent frame of `tiny`; the first one stands for a single slice


class LungShare:
    """Turn an item of `fvae.LatentDataset` into latents and the share of lung in their slices."""

    def __init__(self, organs: Path) -> None:
        self.organs = organs
        self.shares: dict[str, Any] = {}  # of each slice, by the store's path

    def __call__(self, item: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return latents [D, T, h, w] and the share of lung [1]."""
        path, start = item["path"], item["start"]
        if path not in self.shares:
            labels = nibabel.load(self.organs / f"{Path(path).stem}.nii.gz").dataobj
            self.shares[path] = np.isin(np.asarray(labels), LUNGS).mean(axis=(0, 1))  # [z]
        first = max(0, SLICES * (start - 1) + 1)
        last = SLICES * (start + item["frames"] - 1)
        share = self.shares[path][first : last + 1].mean()
        return item["latents"], torch.tensor([share], dtype=torch.float32)


class Regressor(nn.Module):
    """Latents [B, D, T, h, w] -> a number [B, 1] between 0 and 1."""

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.cells = nn.Sequential(
            nn.BatchNorm3d(channels), nn.Conv3d(channels, width, 1), nn.SiLU()
        )
        self.head = nn.Linear(width, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Look at each latent cell alone, then at the mean over all cells."""
        return torch.sigmoid(self.head(self.cells(z).mean(dim=(2, 3, 4))))


def train(network: Regressor, loader: DataLoader[Any], epochs: int, rate: float) -> None:
    """Fit the network to the windows, by the squared error."""
    optimiser = torch.optim.AdamW(network.parameters(), rate)
    for _ in range(epochs):
        for z, share in loader:
            loss = F.mse_loss(network(z), share)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


@torch.no_grad()
def errors(network: Regressor, loader: DataLoader[Any], guess: float) -> tuple[float, float]:
    """Return the mean error of the network, and that of guessing the same share everywhere."""
    network.eval()
    off = [(network(z) - share, guess - share) for z, share in loader]
    ours, guessed = (torch.cat(column).abs().mean().item() for column in zip(*off, strict=True))
    return ours, guessed


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train on most scans, test on the others; return the errors of the network and of a guess."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents", type=Path, help="a folder of fvae encode")
    parser.add_argument("organs", type=Path, help="a folder of label maps, .nii.gz")
    parser.add_argument("--window", type=int, default=3, help="latent frames")
    parser.add_argument("--held-out", type=int, default=3, help="scans to test on, the last ones")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-2)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    stores = sorted(options.latents.glob("*.zarr"))
    truth = LungShare(options.organs)
    # Scans are split, not windows: windows of one scan resemble each other.
    seen, unseen = (
        fvae.LatentDataset(part, options.window, truth)
        for part in (stores[: -options.held_out], stores[-options.held_out :])
    )
    network = Regressor(channels=seen[0][0].shape[0])
    train(network, DataLoader(seen, 8, shuffle=True), options.epochs, options.rate)  # type: ignore[arg-type]
    guess = float(torch.cat([seen[i][1] for i in range(len(seen))]).mean())
    ours, guessed = errors(network, DataLoader(unseen, 8), guess)  # type: ignore[arg-type]
    print(
        f"trained on {len(seen)} windows of {len(seen.stores)} scans, "
        f"tested on {len(unseen)} windows of {len(unseen.stores)} others"
    )
    print(f"share of lung: {100 * ours:.1f} percentage points off on average")
    print(f"always guessing {100 * guess:.1f} %: {100 * guessed:.1f} percentage points off")
    return ours, guessed


if __name__ == "__main__":
    main()
