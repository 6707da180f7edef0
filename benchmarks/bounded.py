"""Run windows of a bundle within memory budgets and whole, and compare; one case per process.

    python benchmarks/bounded.py build/wfvae --size 128 --case 1GiB --case whole --case torch

A case is a memory budget, `whole` (the engine, whole planes), `torch` (the authors' code in
float32) or `float64` (the same in float64); `torch:4GiB` and `float64:4GiB` run torch in segments,
planned for float32, so that float64 takes up to twice that budget. For a bundle of foreign code,
torch cases need that code on PYTHONPATH. Prints a Markdown table: seconds, seconds of processors,
peak MiB beyond the libraries, bytes written to the file of maps and read from it, and the error
against the last case, root mean square and largest, in deviations of its result. A case that is
stopped has printed how far it came, and its peak so far, on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.bench.worker import _data
from fvae_deploy.engines.base import open_engine
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.parse import parse_bytes
from fvae_deploy.stream import schedule
from fvae_deploy.stream.codec import pad_frames
from fvae_deploy.stream.plan import plan
from fvae_deploy.stream.rss import begin_measuring, peak_rss
from fvae_deploy.stream.stages import CausalStream, whole_grids
from fvae_deploy.stream.within import StepProgress

TORCH = ("torch", "float64")
KEYS = ("bundle", "size", "slices", "engine", "folder")  # of a job, as the options are called
HEADINGS = ("direction", "case", "s", "processor s", "peak MiB", "file GB", "plan", "error")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Pass windows through one direction; the result is saved to a file."""
    bundle, direction = Path(job["bundle"]), job["direction"]
    kind, budget = _case(job["case"])
    manifest = Manifest.load(bundle, verify=False)
    plane = (job["size"] // manifest.geometry.spatial,) * 2
    name = "torch" if kind in TORCH else job["engine"]
    before = begin_measuring()
    engine = open_engine(bundle, manifest, name, threads=os.cpu_count())
    if kind == "float64":
        import torch

        engine._dtype = torch.float64
    grids, facts, plan_text = whole_grids(manifest, (direction,), plane), {}, "whole"
    if budget:
        chosen = plan(
            manifest,
            (direction,),
            plane,
            engine=name,
            precision="fp32",
            memory=parse_bytes(budget),
            segments=True,
        )
        grids, plan_text = chosen.grids, chosen.describe()
        facts = {"spilled": chosen.spilled, "lean": chosen.lean, "pieces": chosen.pieces}
    progress = StepProgress(_Teller(job, before), facts.get("pieces") or {})
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        stream = CausalStream(
            engine, manifest, direction, grids, folder=Path(folder), advance=progress.add, **facts
        )
        geometry = manifest.geometry
        window = (
            schedule.steps(job["slices"] or geometry.window, "windows", 1, geometry)
            if geometry.temporal > 1
            else schedule.steps(1, "causal", 1, geometry)  # a network for slices takes one
        )
        x = _data(manifest, direction, plane[0], window)
        begin, busy, moved = time.perf_counter(), os.times(), _moved()
        results = []
        for step in window:
            span, size = (
                (step.slices, step.depth) if direction == "encode" else (step.latents, step.frames)
            )
            progress.begin(1000 // len(window))
            results.append(stream.run(pad_frames(x[:, slice(*span)], size), step.first))
        stream.close()
    seconds, after = time.perf_counter() - begin, os.times()
    np.save(job["result"], np.concatenate(results, axis=1))
    return {
        "s": round(seconds, 1),
        "processor s": round(after.user + after.system - busy.user - busy.system, 1),
        "peak MiB": round((peak_rss() - before) / 2**20),
        "file GB": round((_moved() - moved) / 1e9, 2),
        "plan": plan_text,
    }


def _case(text: str) -> tuple[str, str]:
    """Return what a case runs on ("" is the engine) and its budget ("" is none)."""
    kind, _, budget = text.partition(":")
    return (kind, budget) if kind in TORCH or text == "whole" else ("", text)


class _Teller:
    """Prints thousandths of a step as they are done."""

    def __init__(self, job: dict[str, Any], before: int) -> None:
        self._job, self._before, self._done = job, before, 0
        self._begin = time.perf_counter()

    def __call__(self, thousandths: int) -> None:
        self._done += thousandths
        peak = (peak_rss() - self._before) / 2**20
        seconds = time.perf_counter() - self._begin
        print(
            f"{self._job['direction']} {self._job['case']}: {self._done / 10:.1f} % after "
            f"{seconds:.0f} s, peak {peak:.0f} MiB",
            file=sys.stderr,
            flush=True,
        )


def _moved() -> int:
    """Return the bytes that this process has read and written by system calls."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    counts = dict(line.split(": ") for line in lines)
    return int(counts["rchar"]) + int(counts["wchar"])


def main() -> None:
    """Run all cases of both directions, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="a folder of a bundle")
    parser.add_argument("--size", type=int, default=128, help="side of a slice in pixels")
    parser.add_argument("--slices", type=int, help="a whole number of windows; default one")
    parser.add_argument("--case", action="append", required=True)
    parser.add_argument("--direction", choices=("encode", "decode"), action="append")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="of the file of maps")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(json.loads(options.job))))
        return
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    for direction in options.direction or ("encode", "decode"):
        with tempfile.TemporaryDirectory() as results:
            rows = []
            for i, case in enumerate(options.case):
                job = {key: getattr(options, key) for key in KEYS}
                job |= {"case": case, "direction": direction, "result": f"{results}/{i}.npy"}
                command = [sys.executable, __file__, options.bundle, "--case", case]
                command += ["--job", json.dumps(job)]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows.append(json.loads(run.stdout.splitlines()[-1]))
            found = [np.load(f"{results}/{i}.npy").astype(np.float64) for i in range(len(rows))]
        for case, row, value in zip(options.case, rows, found, strict=True):
            error = np.abs(value - found[-1]) / found[-1].std()
            errors = f"{np.sqrt((error**2).mean()):.1e}, {error.max():.1e}"
            row |= {"direction": direction, "case": case, "error": errors}
            print(f"| {' | '.join(str(row[key]) for key in HEADINGS)} |", flush=True)


if __name__ == "__main__":
    main()
