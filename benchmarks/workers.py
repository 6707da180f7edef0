"""Run a batch in one process and in several, and compare the time.

    python benchmarks/workers.py                       # 8 scans of 512x512x160
    python benchmarks/workers.py --workers 4 --workers 8 --scans 16

The runs take turns, `--rounds` times; the table has medians, program start included. `none` is the
usual batch: one process on all cores, which reads the next scan while one is computed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fvae_deploy.phantom.torso import write_phantom
from fvae_deploy.stream.report import cores, machine


def run(verb: str, scans: Path, output: Path, model: str, workers: int | None) -> float:
    """Run the batch; returns seconds."""
    words = [verb, scans, "-o", output, "--model", model, "-q"]
    words += [] if workers is None else ["--workers", workers]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fvae_deploy", *map(str, words)], check=True)
    seconds = time.perf_counter() - begin
    shutil.rmtree(output)
    return seconds


def main() -> None:
    """Print a table with a row for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="tiny", help="built-in name or bundle")
    parser.add_argument("--shape", default="512,512,160")
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--workers", type=int, action="append", help="default: 1 to all cores")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    x, y, z = (int(n) for n in options.shape.split(","))
    counts = [None, *(options.workers or range(1, len(cores()) + 1))]
    verbs = ("encode", "reconstruct")
    times: dict[tuple[str, int | None], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "scans").mkdir()
        for n in range(options.scans):
            write_phantom(folder / "scans" / f"{n}.nii.gz", (x, y, z), seed=n)
        for _ in range(options.rounds):
            for verb in verbs:
                for count in counts:
                    seconds = run(verb, folder / "scans", folder / "out", options.model, count)
                    times.setdefault((verb, count), []).append(seconds)
    print(f"{options.scans} scans of {options.shape} with {options.model}, ", end="")
    print(f"{machine()['processor']}, {machine()['cores']} cores")
    print("| workers | encode, s | slices/s | reconstruct, s | slices/s |\n|---|---|---|---|---|")
    for count in counts:
        row = [str(count or "none")]
        for verb in verbs:
            seconds = statistics.median(times[verb, count])
            row += [f"{seconds:.1f}", f"{options.scans * z / seconds:.1f}"]
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
