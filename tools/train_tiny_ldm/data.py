"""Make training data of `tiny-ldm`: latents of phantoms, their masks, reports and brightness.

    python tools/train_tiny_ldm/data.py build/tiny_ldm/data --patients 1000
    python tools/train_tiny_ldm/data.py build/tiny_ldm/held_out --patients 24 --first 100

Every patient is one file. It contains latents and the label of every voxel (`OUTSIDE` the body).
For every label in every slice, it also contains the number of voxels and the sums of their HU, in
the phantom and in its reconstruction by `tiny`. Volumes have 65 to 257 slices of 128x128 over the
same 450 mm, so slices are 7 to 1.8 mm thick. Each is encoded as one causal stream, which can be cut
anywhere. Seeds below `HELD_OUT` are never used for training, only for evaluation.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))
from brightness import OUTSIDE
from generation import body_of
from palette import BACKGROUND, OFFSET, palette

from fvae_deploy.phantom.patient import Patient, varied
from fvae_deploy.phantom.torso import FIELD_OF_VIEW, Torso
from fvae_deploy.stream.codec import Codec, open_codec

HELD_OUT = 10_000
SIDE = 128
SLICES = (65, 65, 97, 129, 193, 257)
Frames = NDArray[np.float32]


def drawn(patient: Patient, slices: int, seed: int) -> tuple[Frames, Frames, Frames]:
    """Return HU, organ labels and finding labels [z, x, y] of a patient."""
    shape = (SIDE, SIDE, slices)
    x, y, z = (mm / n for mm, n in zip(FIELD_OF_VIEW, shape, strict=True))
    torso = Torso(shape, (x, y, z), seed, patient)
    maps = zip(*(torso.slice(k) for k in range(slices)), strict=True)
    hu, organs, findings = (np.stack(m) for m in maps)
    return hu, organs, findings


def painted(organs: NDArray[np.uint8], findings: NDArray[np.uint8] | None = None) -> Frames:
    """Return labels as the palette's gray values in HU, float32."""
    table = np.full(OFFSET + 256, BACKGROUND, np.float32)
    for label, hu in palette().items():
        table[label] = hu
    labels = organs.astype(np.int32)
    if findings is not None:
        labels = np.where(findings > 0, OFFSET + findings.astype(np.int32), labels)
    return table[labels]


def latents(codec: Codec, hu: Frames) -> Frames:
    """Encode frames in HU [z, x, y] to latents [T, D, h, w]."""
    z: Frames = codec.encode((hu.clip(-1000, 1000) / 2000).astype(np.float32)[None])
    return z.transpose(1, 0, 2, 3)


def brightness(
    codec: Codec, hu: Frames, organs: NDArray[np.uint8], ct: Frames
) -> dict[str, NDArray[Any]]:
    """Return labels [z, x, y]; by label, voxels and sums of HU before and after `tiny` [z, 256]."""
    body = body_of(hu.transpose(1, 2, 0)).transpose(2, 0, 1)
    labels = np.where(body | (organs > 0), organs, np.uint8(OUTSIDE))
    reconstruction = 2000 * codec.decode(ct.astype(np.float32).transpose(1, 0, 2, 3))[0]

    def sums(volume: Frames) -> Frames:
        rows = [np.bincount(a.ravel(), b.ravel(), 256) for a, b in zip(labels, volume, strict=True)]
        return np.stack(rows).astype(np.float32)

    counts = sums(np.ones_like(hu))
    return {
        "labels": labels,
        "counts": counts,
        "drawn": sums(hu),
        "reconstructed": sums(reconstruction),
    }


@cache
def _codec(device: str) -> Codec:
    """Return the codec, opened once per process."""
    return open_codec("tiny", device=device)


def make(folder: Path, device: str, seed: int) -> None:
    """Draw and encode one patient and write the file, unless it exists."""
    path = folder / f"{seed}.npz"
    if path.exists():
        return
    patient = varied(seed)
    random = np.random.default_rng([seed, 11])
    hu, organs, findings = drawn(patient, int(random.choice(SLICES)), seed)
    codec = _codec(device)
    arrays = {
        "ct": latents(codec, hu),
        "organs": latents(codec, painted(organs)),
        "ill": latents(codec, painted(organs, findings)),
    }
    small = {name: array.astype(np.float16) for name, array in arrays.items()}
    reports = [patient.report(n) for n in range(8)]
    with path.with_suffix(".new").open("wb") as file:
        means = brightness(codec, hu, organs, small["ct"])
        np.savez(file, **small, **means, reports=np.array(reports))
    path.with_suffix(".new").rename(path)


def main() -> None:
    """Write a file for every patient; those that exist are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=1200)
    parser.add_argument("--first", type=int, default=HELD_OUT, help="seed of the first patient")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--device", default="cpu", help="device that encodes: cpu or cuda")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    seeds = range(options.first, options.first + options.patients)
    with ProcessPoolExecutor(options.jobs) as pool:
        one = partial(make, options.folder, options.device)
        for count, _ in enumerate(pool.map(one, seeds), start=1):
            if count % 50 == 0:
                print(f"{count} of {len(seeds)} patients", flush=True)


if __name__ == "__main__":
    main()
