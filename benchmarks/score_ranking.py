"""Check that `fvae score` ranks three sets of generated CTs rightly against real ones.

    python benchmarks/score_ranking.py build/ranking              # 20 patients each
    python benchmarks/score_ranking.py build/ranking --patients 6 --noise 50

All sets are compared with the same `real` phantoms. `perfect` are phantoms of other patients, which
no generator can surpass. `generated` is what `tiny-ldm` makes from the masks and findings of those
patients, and `noisier` is the same with white noise. A metric ranks rightly if perfect is not worse
than generated, and generated not worse than noisier. The folders and pages stay, to be looked at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import fvae_deploy as fvae
from fvae_deploy.phantom.patient import varied
from fvae_deploy.phantom.torso import write_phantom
from fvae_deploy.score.cases import find_set
from fvae_deploy.score.run import Request, score
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.open import create_volume, open_volume

SHAPE = (128, 128, 64)
FIRST = 200  # the first seed; tiny-ldm learnt from seeds from 10,000 on
SETS = ("perfect", "generated", "noisier")


def make_sets(folder: Path, patients: int, noise: float) -> None:
    """Write real, perfect, generated and noisier CTs with their masks; what exists is kept."""
    for name in ("real", "real_labels", "masks", "findings", *SETS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(patients):
        real, other = f"real{number:02}.nii.gz", f"case{number:02}.nii.gz"
        _phantom(folder / "real" / real, folder / "real_labels" / real, FIRST + number)
        mask, ct = folder / "masks" / other, folder / "perfect" / other
        seed = FIRST + patients + number
        findings = _phantom(ct, mask, seed, folder / "findings" / other)
        made = folder / "generated" / other
        if not made.exists():
            text = varied(seed).report(seed)
            fvae.generate(mask, made, findings=text, disease_mask=findings, seed=seed)
        if not (folder / "noisier" / other).exists():
            _with_noise(made, folder / "noisier" / other, noise, seed)


def _phantom(ct: Path, labels: Path, seed: int, findings: Path | None = None) -> Path | None:
    if not ct.exists():
        patient = varied(seed)
        write_phantom(
            ct, SHAPE, labels, seed=seed, patient=patient, findings=findings, overwrite=True
        )
    return findings


def _with_noise(source: Path, target: Path, deviation: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    reader = open_volume(source)
    with create_volume(target, reader.geometry) as writer:
        for slab in reader.slabs(16):
            noisy = slab + random.normal(0, deviation, slab.shape)
            writer.write(noisy.astype(np.float32))
    reader.close()


def main() -> None:
    """Make the sets, score them and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where sets and pages are written")
    parser.add_argument("--patients", type=int, default=20, help="CTs of each set")
    parser.add_argument("--noise", type=float, default=30.0, help="HU that noisier has more")
    options = parser.parse_args()
    folder: Path = options.folder
    make_sets(folder, options.patients, options.noise)
    request = Request(
        RunOptions(overwrite=True),
        real_labels=folder / "real_labels",
        masks=folder / "masks",
    )
    real, _ = find_set(folder / "real", "REAL")
    scores = {
        name: score(real, find_set(folder / name, "GENERATED")[0], folder / f"{name}.html", request)
        for name in SETS
    }
    Console(width=120).print(_table(scores))
    print(json.dumps(next(iter(scores.values()))["machine"]))


def _table(scores: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="value (95 % interval)")
    for column in ("metric", "real CTs", *SETS, "ranked"):
        table.add_column(column)
    rows = zip(*([r for r in s["metrics"] if not r["part"]] for s in scores.values()), strict=True)
    for same in rows:
        cells = [f"{r['value']:.3g} ({r['low']:.3g} to {r['high']:.3g})" for r in same]
        usual = "-" if same[0]["real"] is None else f"{same[0]['real']:.3g}"
        table.add_row(same[0]["metric"], usual, *cells, _ranked(same))
    return table


def _ranked(rows: Sequence[dict[str, Any]]) -> str:
    """Return whether perfect, generated and noisier are in this order; "-" for other metrics."""
    if rows[0]["better"] == "1" or rows[0]["metric"].startswith("share"):
        return "-"
    values = [abs(row["value"]) for row in rows]
    return "yes" if values == sorted(values, reverse=rows[0]["better"] == "higher") else "NO"


if __name__ == "__main__":
    main()
