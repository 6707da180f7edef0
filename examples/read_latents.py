"""Read a latent store without fvae, by the description in docs/formats.md.

    python examples/read_latents.py ct.zarr latents.npy

Needs zarr and numpy alone. Prints what the store says about itself, and writes its latents as
float32 [D, T, h, w].
"""

import sys
from pathlib import Path

import numpy as np
import zarr


def read_latents(path):
    """Return the latents of a store, float32 [D, T, h, w], and its attributes."""
    array = zarr.open_array(path, mode="r")  # zarr checks the checksum of every chunk
    attributes = dict(array.attrs)
    if attributes.get("fvae_latents") not in (1, 2) or not attributes["complete"]:
        sys.exit(f"{path} is no complete latent store of format 1 or 2")
    latents = array[:].astype(np.float32)
    if np.issubdtype(array.dtype, np.integer):
        scales = zarr.open_array(Path(path) / "scales", mode="r")[:]  # [D, T]
        latents *= scales[:, :, None, None]
    return latents, attributes


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    latents, attributes = read_latents(sys.argv[1])
    np.save(sys.argv[2], latents)
    for name in ("model", "identity", "shape", "spacing", "orientation", "hu_window", "max_error"):
        print(f"{name:12} {attributes.get(name)}")
    print(f"{'latents':12} {latents.shape} in {sys.argv[2]}")
