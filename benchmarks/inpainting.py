"""Put findings into unseen phantoms with `fvae generate --change`, and measure what comes out.

    python benchmarks/inpainting.py                          # tiny-ldm, 20 patients
    python benchmarks/inpainting.py --patients 4 --shape 256,256,64 --json figures.json

Each patient is drawn without findings, with a seed that was not used in training. A lesion is
placed by the patient's seed. Three volumes are compared within it and around it: the CT after the
change, the plain reconstruction of the CT, and a bound, which is the reconstruction of the CT in
which the lesion was drawn at the phantom's own HU. No generator in this latent space does better.

    inside            mean HU in the lesion's voxels
    around            mean change in HU, in the body, by the distance from the changed latent cells
    border            step across the outer border of the changed cells over the steps 1 to 3 lines
                      beside it, as in `fvae report`; 1 means that nothing is to be seen
    seam, blockiness  the gate's measures of the whole volume, over those of the reconstruction
    kept              share of the voxels that are the CT's bit for bit with --keep-original, and
                      the largest distance in mm from the changed cells of one that is not
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.ndimage import distance_transform_edt

import fvae_deploy as fvae
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.generation.measures import Measures
from fvae_deploy.generation.networks import Networks
from fvae_deploy.generation.region import Region, region_of
from fvae_deploy.phantom.patient import varied
from fvae_deploy.phantom.torso import write_phantom
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.report import machine

FIRST = 400  # the first seed; training uses seeds from 10,000 on
# What is placed, the phantom's HU of it, and guidance.
CASES = (
    ("nodule 24mm", 45.0, 1.0),
    ("nodule 24mm", 45.0, 1.5),
    ("consolidation", 12.0, 1.0),
    ("pleural effusion", 8.0, 1.0),
)
RINGS = ((0, 10), (10, 30), (30, 80), (80, 1000))  # mm
Volume = NDArray[np.float64]  # [x, y, z]
Mask = NDArray[np.bool_]


def load(path: Path) -> Volume:
    """Read a volume in HU [x, y, z]."""
    return np.asarray(nibabel.load(path).dataobj, np.float64)  # type: ignore[attr-defined]


def cells_of(region: Region, shape: tuple[int, ...], cell: int) -> Mask:
    """Return the voxels of the changed cells."""
    changed = np.zeros(shape, np.bool_)
    for frame, cells in region.cells.items():
        plane = cells.repeat(cell, axis=0).repeat(cell, axis=1)
        changed[..., slice(*region.slices[frame])] = plane[..., None]
    return changed


def border(hu: Volume, changed: Mask, body: Mask) -> float:
    """Return the mean step across the outer border of the cells over those beside it."""
    across, beside = [], []
    for axis in range(2):
        step = np.moveaxis(np.abs(np.diff(hu, axis=axis)), axis, 0)
        inside, within = (np.moveaxis(each, axis, 0) for each in (changed, body))
        at = np.argwhere(inside[1:] != inside[:-1])
        at = at[[bool(within[tuple(n)]) for n in at]]
        for shift in range(-3, 4):
            moved = at[:, 0] + shift
            fits = (moved >= 0) & (moved < len(step))
            values = step[moved[fits], at[fits, 1], at[fits, 2]]
            (across if shift == 0 else beside).append(values)
    return float(np.concatenate(across).mean() / np.concatenate(beside).mean())


def gate(hu: Volume, organs: NDArray[np.int64], vae: Manifest) -> dict[str, float]:
    """Return seam and blockiness as the gate measures them."""
    measures = Measures(vae.geometry.spatial, vae.geometry.temporal)
    for k in range(hu.shape[2]):
        measures.add(hu[..., k], organs[..., k])
    found = measures.result()
    return {name: found[name] for name in ("seam", "blockiness") if name in found}


def one(
    seed: int, folder: Path, shape: tuple[int, int, int], networks: Networks, model: str
) -> dict[str, dict[str, float]]:
    """Return the figures of one patient by case."""
    patient = varied(seed, findings=())
    ct, organs, plain = folder / "ct.nii", folder / "organs.nii", folder / "plain.nii"
    write_phantom(ct, shape, organs, patient=patient, seed=seed, overwrite=True)
    codec = networks.open(RunOptions(model=model))[1]
    fvae.reconstruct(ct, plain, codec=codec, overwrite=True)
    vae = codec.manifest
    hu, labels, recon = load(ct), load(organs).astype(np.int64), load(plain)
    spacing = nibabel.load(ct).header.get_zooms()  # type: ignore[attr-defined]
    rows = {}
    for lesion, level, guidance in CASES:
        made, kept, added = folder / "made.nii", folder / "kept.nii", folder / "added.nii"
        for output, keep in ((made, False), (kept, True)):
            report = fvae.generate(
                organs, output, like=ct, change="lesion", lesions=lesion, seed=seed, model=model,
                findings=None, guidance=guidance, keep_original=keep, labels_out=added,
                overwrite=True, networks=networks,
            )  # fmt: skip
        lesion_mask = load(added) > 0
        drawn = hu.copy()
        noise = np.random.default_rng(seed).normal(0, patient.noise, int(lesion_mask.sum()))
        drawn[lesion_mask] = level + noise
        target, best = folder / "target.nii", folder / "best.nii"
        image = nibabel.Nifti1Image(drawn.round().astype(np.int16), nibabel.load(ct).affine)
        nibabel.save(image, target)
        fvae.reconstruct(target, best, codec=codec, overwrite=True)
        out, bound, keeping = load(made), load(best), load(kept)
        scale = shape[0] // 128
        shares = (lesion_mask[..., k].astype(float) for k in range(shape[2]))
        region = region_of(shares, shape[2], vae)
        changed = cells_of(region, shape, vae.geometry.spatial)
        body = (hu > -500) | (labels > 0)
        away = distance_transform_edt(~changed, sampling=spacing)
        row = {
            "voxels": float(lesion_mask.sum()),
            "inside, before": recon[lesion_mask].mean(),
            "inside": keeping[lesion_mask].mean(),
            "inside, bound": bound[lesion_mask].mean(),
            "kept, share": float((keeping == hu).mean()),
            "kept, mm": float(away[keeping != hu].max()),
            "seconds": report["seconds"]["total"],
        }
        if scale == 1:  # on the generator's own plane, which the reconstruction has too
            change = np.abs(out - recon)
            for a, b in RINGS:
                row[f"around {a}-{b} mm"] = change[body & (away > a) & (away <= b)].mean()
            row["error of the VAE"] = np.abs(recon - hu)[body].mean()
            row |= {
                "border": border(out, changed, body),
                "border, kept": border(keeping, changed, body),
                "border, reconstruction": border(recon, changed, body),
                "border, bound": border(bound, changed, body),
            }
            before, after = (gate(each, labels, vae) for each in (recon, out))
            row |= {f"{name}, over": after[name] / before[name] for name in before}
        rows[f"{lesion}, guidance {guidance:g}"] = {n: float(v) for n, v in row.items()}
    return rows


def main() -> None:
    """Print the table, and write all figures to the file of --json after each patient."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="tiny-ldm", help="built-in name or bundle")
    parser.add_argument("--patients", type=int, default=20)
    parser.add_argument("--shape", default="128,128,65")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    x, y, z = (int(n) for n in options.shape.split(","))
    rows = []
    with tempfile.TemporaryDirectory() as temporary, Networks() as networks:
        for seed in range(FIRST, FIRST + options.patients):
            rows.append(one(seed, Path(temporary), (x, y, z), networks, options.model))
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table(title=f"{options.patients} unseen phantoms of {options.shape}: mean (range)")
    for column in ("", *rows[0]):
        table.add_column(column)
    for name in next(iter(rows[0].values())):
        cells = []
        for case in rows[0]:
            values = [row[case][name] for row in rows]
            cells.append(f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})")
        table.add_row(name, *cells)
    Console(width=200).print(table)
    print(f"{machine()['processor']}, {machine()['cores']} cores")


if __name__ == "__main__":
    main()
