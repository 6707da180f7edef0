"""Write `stores-VERSION.zip`: latent stores of every kind, as this version of fvae writes them.

    python tests/storage/write_old_stores.py

Run once for every release. Later versions must read them: see test_old_stores.py.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import numpy as np

import fvae_deploy
from fvae_deploy.storage.latents import LatentReader
from fvae_deploy.version import __version__

KINDS = {dtype: {"latent_dtype": dtype} for dtype in ("float32", "float16", "int16", "int8")}
KINDS["bounded"] = {"max_error": 20}


def main() -> None:
    """Encode a small phantom in every way, and keep what a reader must find."""
    target = Path(__file__).with_name(f"stores-{__version__}.zip")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fvae_deploy.write_phantom(folder / "ct.nii.gz", (24, 16, 6))
        for kind, options in KINDS.items():
            fvae_deploy.encode(folder / "ct.nii.gz", folder / f"{kind}.zarr", **options)
            store = LatentReader(folder / f"{kind}.zarr")
            found = {"latents": store.read(0, store.shape[1]), "affine": store.info.geometry.affine}
            if store.info.max_error is not None:
                slices = store.residuals(0, store.shape[1])
                found["counts"] = np.stack([each.counts for each in slices])
            np.savez_compressed(folder / f"{kind}.npz", **found)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path.name != "ct.nii.gz":
                    archive.write(path, path.relative_to(folder))


if __name__ == "__main__":
    main()
