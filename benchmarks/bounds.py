"""Bits a voxel that a bound on the error costs, beside JPEG-LS with the same bound.

    python benchmarks/bounds.py ct.nii.gz --model tiny --latent-dtypes int8 -o bounds.json

Encodes the CT with each bound, decodes it again, and measures the largest and the mean error.
JPEG-LS (imagecodecs, CharLS) codes each slice by itself. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray

import fvae_deploy as fvae
from fvae_deploy.stream.report import machine

Voxels = NDArray[np.int32]  # [z, x, y]


def voxels_of(path: Path) -> Voxels:
    """Read a whole CT of whole HU."""
    return np.concatenate([*fvae.open_volume(path).slabs(16)]).astype(np.int32)


def errors(original: Voxels, other: Voxels) -> dict[str, float]:
    """Return the largest and the mean error in HU."""
    error = np.abs(original - other)
    return {"largest_hu": int(error.max()), "mean_hu": float(error.mean())}


def of_fvae(ct: Path, original: Voxels, options: dict[str, object]) -> dict[str, object]:
    """Encode and decode with fvae; return bits a voxel, errors and seconds."""
    with tempfile.TemporaryDirectory() as name:
        store, output = Path(name) / "z.zarr", Path(name) / "out.nii"
        encoded = fvae.encode(ct, store, **options)
        decoded = fvae.decode(store, output, model=options["model"])
        seconds = {"encode": encoded["seconds"]["total"], "decode": decoded["seconds"]["total"]}
        found = errors(original, voxels_of(output))
        return {"bits": encoded["bits_per_voxel"], **found, "seconds": seconds}


def of_jpeg_ls(original: Voxels, bound: int) -> dict[str, object]:
    """Code each slice with JPEG-LS; return bits a voxel and errors."""
    offset = original.min()
    packed = [
        imagecodecs.jpegls_encode((plane - offset).astype(np.uint16), level=bound)
        for plane in original
    ]
    planes = [imagecodecs.jpegls_decode(data).astype(np.int32) + offset for data in packed]
    bits = 8 * sum(map(len, packed)) / original.size
    return {"bits": {"total": bits}, **errors(original, np.stack(planes))}


def main() -> None:
    """Measure all bounds, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ct", type=Path)
    parser.add_argument("--model", action="append", help="built-in model or folder of a bundle")
    parser.add_argument("--latent-dtypes", default="float16,int8", help="separated by commas")
    parser.add_argument("--bounds", default="0,5,10,20,50", help="HU, separated by commas")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    original = voxels_of(options.ct)
    facts = []
    print("| bound, HU | codec | latents | residual | bits a voxel | mean error, HU | largest |")
    print("|---|---|---|---|---|---|---|")
    for bound in (int(text) for text in options.bounds.split(",")):
        rows = {"JPEG-LS": of_jpeg_ls(original, bound)}
        for model in options.model or ["tiny"]:
            for dtype in options.latent_dtypes.split(","):
                settings = {"model": model, "max_error": bound, "latent_dtype": dtype}
                rows[f"{Path(model).name}, {dtype}"] = of_fvae(options.ct, original, settings)
        for name, row in rows.items():
            bits = row["bits"]
            parts = [
                f"{bits[part]:.2f}" if part in bits else "" for part in ("latents", "residual")
            ]
            print(
                f"| {bound} | {name} | {' | '.join(parts)} | {bits['total']:.2f} "
                f"| {row['mean_hu']:.2f} | {row['largest_hu']} |"
            )
            facts.append({"bound_hu": bound, "codec": name, **row})
    options.output.write_text(json.dumps({"rows": facts, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
