"""Copy, encode and reconstruct one CT in every format, and measure what the format costs.

    python benchmarks/formats.py                        # 512x512x1200
    python benchmarks/formats.py --shape 512,512,300 --format nii --format nii.gz

A synthetic torso is drawn once. `copy` reads it and writes it in slabs of 16 slices, in the same
format. `encode` and `reconstruct` are commands, program start included; their `processor` is the
time of all their threads, and `waited` is what the network's thread did not compute: it waited for
slices to be read or written, and for the start.
The formats take turns; with `--rounds 3` each cell is the median of three runs. The page cache is
warm for reading; writing ends with a flush to the disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fvae_deploy.phantom.torso import write_phantom
from fvae_deploy.stream.report import machine
from fvae_deploy.volume.open import create_volume, open_volume

FORMATS = ("nii", "nii.gz", "nrrd", "mha", "zarr", "dcm")
SLAB = 16  # slices
HEADINGS = (
    "format", "GB", "copy, s", "encode, s", "processor, s", "waited, s", "peak MiB",
    "reconstruct, s", "processor, s", "waited, s", "peak MiB",
)  # fmt: skip


def copy(source: Path, target: Path) -> float:
    """Write a volume in the format of the target's suffix; returns seconds."""
    begin = time.perf_counter()
    reader = open_volume(source)
    try:
        with create_volume(target, reader.geometry) as writer:
            for slab in reader.slabs(SLAB):
                writer.write(slab)
    finally:
        reader.close()
    return time.perf_counter() - begin


def command(verb: str, source: Path, output: Path, model: str) -> tuple[float, float, float, float]:
    """Run a command; returns seconds, of the processor, not computing, and its peak in MiB."""
    report = output.with_name(f"{verb}.json")
    words = [verb, source, "-o", output, "--model", model, "--json", report, "--overwrite", "-q"]
    begin, used = time.perf_counter(), _processor_seconds()
    subprocess.run([sys.executable, "-m", "fvae_deploy", *map(str, words)], check=True)
    seconds, used = time.perf_counter() - begin, _processor_seconds() - used
    facts = json.loads(report.read_text())
    busy = sum(facts["seconds"].get(stage, 0.0) for stage in ("engine", "encode", "decode"))
    return seconds, used, seconds - busy, facts["memory"]["peak_rss_bytes"] / 2**20


def _processor_seconds() -> float:
    """Return the time on processors of all commands that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def measure(source: Path, folder: Path, model: str) -> list[float]:
    """Return a row of the table: seconds and MiB of a copy and of both commands."""
    output = folder / source.name.replace("ct.", "recon.", 1)
    row = [copy(source, output)]
    for verb, target in (("encode", folder / "latents.zarr"), ("reconstruct", output)):
        row += command(verb, source, target, model)
    return row


def main() -> None:
    """Print the table after the last round, and on stderr when a round is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="tiny", help="built-in name or bundle")
    parser.add_argument("--shape", default="512,512,1200")
    parser.add_argument("--format", action="append", choices=FORMATS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary folder")
    options = parser.parse_args()
    x, y, z = (int(n) for n in options.shape.split(","))
    print(f"{options.shape}, {machine()['processor']}, {machine()['cores']} cores", flush=True)
    chosen = options.format or FORMATS
    rows: dict[str, list[list[float]]] = {suffix: [] for suffix in chosen}
    sizes = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        drawn = folder / "drawn.nii"
        write_phantom(drawn, (x, y, z))
        for suffix in chosen:
            copy(drawn, folder / f"ct.{suffix}")
            sizes[suffix] = size_of(folder / f"ct.{suffix}") / 1e9
        for number in range(options.rounds):
            for suffix in chosen:
                rows[suffix].append(measure(folder / f"ct.{suffix}", folder, options.model))
            print(f"round {number + 1} of {options.rounds} is done", file=sys.stderr, flush=True)
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for suffix in chosen:
        medians = [statistics.median(column) for column in zip(*rows[suffix], strict=True)]
        digits = ["0f" if name.startswith("peak") else "1f" for name in HEADINGS[2:]]
        cells = [f"{n:.{form}}" for n, form in zip(medians, digits, strict=True)]
        print(f"| {suffix} | {sizes[suffix]:.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
