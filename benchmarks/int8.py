"""Measure int8 beside fp32 and bf16 in OpenVINO: time, processor time, and error on a CT.

    python benchmarks/int8.py BUNDLE --calibrate CT... --measure CT [--slices 2] [-o int8.json]

A copy of the bundle is calibrated on some CTs and measured on another. The precisions take turns,
and the rows hold medians, so that other work on the machine meets all alike. `psnr` is that of the
reconstruction against the CT clipped to the HU window; `latent_mean` and `decoded_mean` the mean
difference from fp32's, in deviations of fp32's, and `hu_mean` the latter in HU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.engines.base import open_engine
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.make.bundle import calibrated
from fvae_deploy.stream.codec import bundle_path, open_codec
from fvae_deploy.stream.intensity import ClippingTally, to_model
from fvae_deploy.volume.open import open_volume

PRECISIONS = ("fp32", "bf16", "int8")


def clip_of(path: Path, manifest: Manifest, slices: int, size: int | None) -> NDArray[np.float32]:
    """Return the middle of a CT as the network's input [C, T, H, W]."""
    reader = open_volume(path)
    z, spatial = reader.geometry.shape[2], manifest.geometry.spatial
    frames = next(reader.slabs(min(z, slices), start=max(0, (z - slices) // 2)))
    reader.close()
    x, y = ((n - min(n, size or n)) // 2 for n in frames.shape[1:])
    frames = frames[:, x : x + (size or frames.shape[1]), y : y + (size or frames.shape[2])]
    height, width = (-(-n // spatial) * spatial for n in frames.shape[1:])
    clip = to_model(frames, manifest.intensity, height, width, ClippingTally())
    return clip.repeat(manifest.geometry.channels, axis=0)


def measure(bundle: Path, clip: NDArray[np.float32], rounds: int) -> list[dict[str, Any]]:
    """Return one row for each precision."""
    with open_codec(bundle, engine="openvino") as codec:
        manifest = codec.manifest
        i = manifest.intensity
        gain, span = (i.hu_max - i.hu_min) / (i.model_max - i.model_min), i.model_max - i.model_min
        engines = {p: open_engine(bundle, manifest, "openvino", precision=p) for p in PRECISIONS}
        times: dict[str, list[list[float]]] = defaultdict(list)
        results = {}
        for number in range(rounds + 1):
            for precision, codec.engine in engines.items():
                marks = [(time.perf_counter(), time.process_time())]
                z = codec.encode(clip).copy()
                marks.append((time.perf_counter(), time.process_time()))
                x = codec.decode(z)
                marks.append((time.perf_counter(), time.process_time()))
                results[precision] = (z, np.clip(x, i.model_min, i.model_max))
                if number:  # the first compiles
                    times[precision].append(np.diff(marks, axis=0).ravel().tolist())
    rows = []
    z0, x0 = results["fp32"]
    for precision, (z, x) in results.items():
        names = ("encode_seconds", "encode_cpu_seconds", "decode_seconds", "decode_cpu_seconds")
        row = dict(zip(names, np.median(times[precision], axis=0).tolist(), strict=True))
        error = np.square(x.astype(np.float64) - clip.clip(i.model_min, i.model_max)).mean()
        difference = np.abs(x.astype(np.float64) - x0) * gain
        row |= {
            "latent_mean": float(np.abs(z - z0).mean() / z0.std()),
            "decoded_mean": float(difference.mean() / gain / x0.std()),
            "hu_mean": float(difference.mean()),
            "hu_p99": float(np.quantile(difference, 0.99)),
            "psnr": float(10 * np.log10(span**2 / error)),
        }
        rows.append({"network": manifest.name, "precision": precision} | row)
    return rows


def main() -> None:
    """Calibrate a copy of a bundle, measure it, and print and store the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--measure", type=Path, required=True)
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--size", type=int, help="side of the middle of a slice, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(bundle_path(given.bundle), Path(folder) / "bundle"))
        manifest = calibrated(copy, Manifest.load(copy), given.calibrate, print)
        clip = clip_of(given.measure, manifest, given.slices, given.size)
        rows = measure(copy, clip, given.rounds)
    for row in rows:
        print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
    if given.output:
        given.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
