"""Compare samplers and numbers of steps by what the quality gate measures.

    python benchmarks/steps.py                          # tiny-ldm, 4 patients
    python benchmarks/steps.py --patients 8 --precision bf16

Every patient is generated with the same noise by each sampler. Two things are measured: how far the
volume is from that of DDIM with 50 steps, which is nearly the exact solution, and what the gate
says. DDIM runs with eta 0 here, so that all samplers solve the same equation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import fvae_deploy as fvae
from fvae_deploy.generation.gate import ORGAN_SLACK
from fvae_deploy.stream.report import machine

FIRST = 200  # the first seed; training uses seeds from 10,000 on
EXACT = ("ddim", 50)
CHOICES = (
    ("ddim", 20), ("ddim", 10), ("ddim", 8), ("dpmsolver++", 10), ("dpmsolver++", 8),
    ("dpmsolver++", 5), ("unipc", 10), ("unipc", 8), ("unipc", 5),
)  # fmt: skip
Volume = NDArray[np.float64]


def load(path: Path) -> Volume:
    """Read a volume in HU [x, y, z]."""
    return np.asarray(nibabel.load(path).dataobj, np.float64)  # type: ignore[attr-defined]


def figures(report: dict[str, Any], made: Volume, exact: Volume) -> dict[str, float]:
    """Return the figures of one volume: its distance, and the gate's verdicts."""
    verdicts = report["checks"]["measures"]
    beyond = [
        max(v["low"] + ORGAN_SLACK - v["value"], v["value"] - v["high"] + ORGAN_SLACK, 0)
        for name, v in verdicts.items()
        if name != "noise" and v["low"] is not None and v["high"] is not None
    ]
    return {
        "HU from exact, mean": float(np.abs(made - exact).mean()),
        "checks failed": float(sum(not v["passed"] for v in verdicts.values())),
        "organs beyond their range, HU": float(np.mean(beyond)),
        **{name: verdicts[name]["value"] for name in ("noise", "blockiness", "seam")},
        "denoise, s": report["seconds"]["denoise"],
    }


def main() -> None:
    """Print the table, and write all figures to the file of --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="tiny-ldm", help="built-in name or bundle")
    parser.add_argument("--patients", type=int, default=4)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, fvae.Networks() as networks:
        for seed in range(FIRST, FIRST + options.patients):
            exact: Volume | None = None
            for sampler, steps in (EXACT, *CHOICES):
                output = Path(folder) / "made.nii"
                report = fvae.generate(
                    None, output, patient=seed, model=options.model, sampler=sampler, steps=steps,
                    eta=0.0, seed=seed, overwrite=True, networks=networks,
                    precision=options.precision,
                )  # fmt: skip
                made = load(output)
                exact = made if exact is None else exact
                rows.setdefault(f"{sampler}, {steps}", []).append(figures(report, made, exact))
    table = Table(title=f"{options.patients} patients, {options.precision}: mean (worst)")
    for column in ("", *next(iter(rows.values()))[0]):
        table.add_column(column)
    for name, each in rows.items():
        values = {key: [row[key] for row in each] for key in each[0]}
        table.add_row(name, *(f"{np.mean(v):.3g} ({max(v):.3g})" for v in values.values()))
    Console(width=160).print(table)
    print(f"{machine()['processor']}, {machine()['cores']} cores")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
