"""Compare networks with JPEG-LS at equal bits, on CTs: prints a Markdown table.

    pip install imagecodecs
    fvae export -m weights/taef2 -o build/taef2
    python benchmarks/weights_comparison.py ct.nii.gz dicom_folder --models tiny,build/taef2

For every CT and network, three steps: encode; round the latents to 8 bits (256 equal steps between
the ends of each channel) and decode; code the same CT by JPEG-LS with the smallest error bound
that takes no more bits than the rounded latents. Latents are not entropy-coded; JPEG-LS codes each
slice, in whole HU. Errors are over all voxels, both volumes clipped to [-1000, 1000] HU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fvae_deploy as fvae
from fvae_deploy.stream.intensity import ClippingTally, to_hu, to_model
from fvae_deploy.stream.report import machine
from fvae_deploy.volume.open import open_volume

LOW, HIGH = -1000, 1000  # HU
BITS = 8  # of a latent value
WIDEST = 255  # the largest error bound of JPEG-LS

Volume = NDArray[np.float32]  # [z, x, y] in HU


@dataclass(frozen=True)
class Row:
    """Errors of one method on one CT."""

    ct: str
    method: str
    bits_per_voxel: float
    psnr: float  # dB
    mae: float  # HU
    p99: float  # HU
    max: float  # HU


def read(path: Path) -> Volume:
    """Read a whole CT as [z, x, y], clipped to the window and rounded to whole HU."""
    with contextlib.closing(open_volume(path)) as reader:
        frames = np.concatenate(list(reader.slabs(8)))
    whole: Volume = np.rint(np.clip(frames, LOW, HIGH)).astype(np.float32)
    return whole


def through(codec: Any, hu: Volume) -> tuple[Volume, float]:
    """Return a CT after encoding, rounding and decoding, and the bits per voxel of its latents."""
    limits, geometry = codec.manifest.intensity, codec.manifest.geometry
    height, width = (-(-n // geometry.spatial) * geometry.spatial for n in hu.shape[1:])
    x = to_model(hu, limits, height, width, ClippingTally())
    z = codec.encode(x.repeat(geometry.channels, axis=0))
    y = codec.decode(rounded(z))[:, : len(hu)]
    return np.rint(to_hu(y, limits, *hu.shape[1:])), BITS * z.size / hu.size


def rounded(z: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round latents [D, t, h, w] to 2**BITS equal steps between the ends of each channel."""
    low, high = (f(z, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    step = np.maximum((high - low) / (2**BITS - 1), np.finfo(np.float32).tiny)
    result: NDArray[np.float32] = (low + np.rint((z - low) / step) * step).astype(np.float32)
    return result


def jpeg_ls(hu: Volume, bits_per_voxel: float) -> tuple[Volume, float, int]:
    """Return a CT after JPEG-LS, its bits per voxel, and the bound in HU; slices one by one.

    The bound is the smallest one that takes at most `bits_per_voxel`, or the widest.
    """
    import imagecodecs

    slices = (hu - LOW).astype(np.uint16)

    def coded(bound: int) -> tuple[list[bytes], float]:
        streams = [imagecodecs.jpegls_encode(s, level=bound) for s in slices]
        return streams, 8 * sum(map(len, streams)) / hu.size

    few, many = 0, WIDEST
    while few < many:
        middle = (few + many) // 2
        if coded(middle)[1] <= bits_per_voxel:
            many = middle
        else:
            few = middle + 1
    streams, bits = coded(few)
    decoded = np.stack([imagecodecs.jpegls_decode(s) for s in streams])
    return decoded.astype(np.float32) + LOW, bits, few


def errors(ct: str, method: str, bits: float, hu: Volume, result: Volume) -> Row:
    """Compare a result with its original."""
    off = np.abs(np.clip(result, LOW, HIGH).astype(np.float64) - hu)
    psnr = 10 * np.log10((HIGH - LOW) ** 2 / max(float(np.mean(off**2)), 1e-30))
    return Row(ct, method, bits, psnr, off.mean(), float(np.percentile(off, 99)), off.max())


def rows(cts: list[Path], models: list[str], engine: str) -> Iterator[Row]:
    """Yield a row for every network, and one of JPEG-LS after each, on every CT."""
    for model in models:
        with fvae.open_codec(model, engine=engine) as codec:
            for path in cts:
                hu = read(path)
                name, network = path.name.removesuffix(".nii.gz"), codec.manifest.name
                result, bits = through(codec, hu)
                yield errors(name, network, bits, hu, result)
                result, used, bound = jpeg_ls(hu, bits)
                method = f"JPEG-LS at the bits of {network}, bound {bound} HU"
                yield errors(name, method, used, hu, result)


def main(show: Callable[[str], None] = print) -> None:
    """Measure, print the table and, if requested, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cts", nargs="+", type=Path)
    parser.add_argument("--models", default="tiny", help="built-in networks or bundles, by comma")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("-o", "--output", type=Path, help="JSON with all numbers and the machine")
    options = parser.parse_args()
    show("| CT | method | bits per voxel | PSNR, dB | mean, HU | 99 % below, HU | most, HU |")
    show("|---|---|---|---|---|---|---|")
    table = []
    for row in rows(options.cts, options.models.split(","), options.engine):
        table.append(row)
        show(
            f"| {row.ct} | {row.method} | {row.bits_per_voxel:.2f} | {row.psnr:.2f} | "
            f"{row.mae:.1f} | {row.p99:.0f} | {row.max:.0f} |"
        )
    if options.output:
        facts = {"machine": machine(), "rows": [asdict(row) for row in table]}
        options.output.write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
