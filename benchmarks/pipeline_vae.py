"""Time the VAE of a diffusers pipeline: AutoencoderKL in torch, and in an engine of fvae.

    python benchmarks/pipeline_vae.py --size 512 --rounds 3

The network has random weights and, by default, the sizes of Stable Diffusion's. Both take turns, in
one process, with as many threads as cores; the medians of the rounds are printed, and the largest
difference of a decoded picture. CPU seconds are those of all threads: with one thread, they count
little of what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL

import fvae_deploy as fvae


def random_vae(widths: tuple[int, ...]) -> AutoencoderKL:
    """Return a network with these channels by level, with random weights."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, widths[0] // 2),
    ).eval()


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that a call takes, and its CPU seconds."""
    start, busy = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - busy


def measure(vae: Any, fast: Any, size: int, rounds: int) -> None:
    """Run both in turn, and print a table."""
    x = torch.rand(1, 3, size, size) * 2 - 1
    with torch.inference_mode():
        z = vae.encode(x).latent_dist.mode()
        fast.encode(x)  # compiles for this size, as the first decode does
        apart = float((vae.decode(z).sample - fast.decode(z).sample).abs().max())
        rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(rounds):
            for name, network in (("torch", vae), ("fvae", fast)):
                for verb, data in (("encode", x), ("decode", z)):
                    run = getattr(network, verb)
                    rows.setdefault((verb, name), []).append(timed(lambda: run(data)))  # noqa: B023
    print(f"| {size}x{size} | torch, s | fvae, s | times faster |\n|---|---|---|---|")
    for verb in ("encode", "decode"):
        for kind, what in enumerate((verb, f"{verb}, CPU seconds")):
            slow, quick = (
                statistics.median(row[kind] for row in rows[verb, name])
                for name in ("torch", "fvae")
            )
            print(f"| {what} | {slow:.3g} | {quick:.3g} | {slow / quick:.2f} |")
    print(f"\nlargest difference of a decoded picture: {apart:.2g}")


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--widths", default="128,256,512,512", help="channels by level")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    vae = random_vae(tuple(int(width) for width in given.widths.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        pipeline = SimpleNamespace(vae=vae)
        fvae.accelerate(
            pipeline,
            bundle=Path(folder) / "vae",
            engine=given.engine,
            precision=given.precision,
            threads=given.threads,
        )
        print(f"{given.threads} threads, {pipeline.vae.codec.engine.name} {given.precision}")
        measure(vae, pipeline.vae, given.size, given.rounds)
        pipeline.vae.close()


if __name__ == "__main__":
    main()
