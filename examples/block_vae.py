r"""A small VAE, its training in a second, and the factory that fvae calls.

    cp examples/block_vae.py . && python block_vae.py ct.nii.gz -o weights.safetensors
    fvae export -m block_vae:vae --weights weights.safetensors --window 16 -o mine
    fvae reconstruct ct.nii.gz -o recon.nii.gz --model mine

The network is linear: a block of 4x8x8 voxels becomes 16 numbers and comes back. Its weights are
the principal components of the blocks of one CT, which are found in closed form, so that the whole
way can be tried without hours of training. Put your network and your training in their place.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fvae_deploy as fvae

BLOCK = (4, 8, 8)  # slices and pixels of a latent cell
CHANNELS = 16


class BlockVAE(nn.Module):
    """Frames [1, 1, T, H, W] in -1..1 <-> latents [1, 16, T / 4, H / 8, W / 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv3d(1, 2 * CHANNELS, BLOCK, BLOCK, bias=False)
        self.decoder = nn.ConvTranspose3d(CHANNELS, 1, BLOCK, BLOCK, bias=False)

    def encode(self, x: Tensor) -> Tensor:
        """Return moments, mean and log-variance in one tensor, as many VAEs do."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return frames."""
        return self.decoder(z)


def vae() -> BlockVAE:
    """Build the network anew; `fvae export` calls this and loads the weights itself."""
    network = BlockVAE()
    moments = network.encode
    network.encode = lambda x: moments(x).chunk(2, dim=1)[0]  # type: ignore[method-assign]
    return network


def blocks(ct: Path) -> Any:
    """Return the blocks of a CT in -1..1 as float32 [n, 256]."""
    t, h, w = BLOCK
    found = []
    for slab in fvae.open_volume(ct).slabs(t):  # HU [4, x, y]
        if len(slab) == t:
            x = slab[:, : slab.shape[1] // h * h, : slab.shape[2] // w * w].clip(-1000, 1000) / 1000
            cells = x.reshape(t, x.shape[1] // h, h, x.shape[2] // w, w)
            found.append(cells.transpose(1, 3, 0, 2, 4).reshape(-1, t * h * w))
    return np.concatenate(found).astype(np.float32)


def train(ct: Path) -> BlockVAE:
    """Return the network whose latents are the principal components of a CT's blocks."""
    x = torch.from_numpy(blocks(ct))
    _, vectors = torch.linalg.eigh(x.T @ x)  # from the smallest to the largest
    basis = vectors[:, -CHANNELS:].T.reshape(CHANNELS, 1, *BLOCK)
    network = BlockVAE()
    with torch.no_grad():
        network.encoder.weight.copy_(torch.cat([basis, torch.zeros_like(basis)]))
        network.decoder.weight.copy_(basis)
    return network


def main(arguments: list[str] | None = None) -> None:
    """Train on one CT and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ct", type=Path, help="a CT in any format that fvae reads")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .safetensors file")
    options = parser.parse_args(arguments)
    save_file(train(options.ct).state_dict(), options.output)
    print(f"{options.output}: weights of {CHANNELS} components of {BLOCK} voxels")


if __name__ == "__main__":
    main()
