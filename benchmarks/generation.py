"""Measure a generator on unseen phantoms, and compare it with two bounds.

    python benchmarks/generation.py                    # tiny-ldm, 20 patients
    python benchmarks/generation.py -m build/tiny-ldm --patients 4 --json figures.json
    python benchmarks/generation.py --patients 2 --shape 128,128,260    # longer than a window

Each patient is drawn by the code of `fvae phantom`, with a seed that was not used in training. The
generator gets organ mask, disease mask and report, and its volume is compared with the phantom. Two
other volumes are bounds that no generator is expected to exceed: the plain reconstruction of the
phantom, and that of a twin. A twin is the same patient with other vessels, texture and noise, which
mask and report do not describe. A perfect generator would draw a twin.

Air (below -500 HU) counts only inside the body, whose outline is filled slice by slice. Soft tissue
is -200 to 200 HU. Bone is above 200 HU and includes vessels that contrast makes as bright. In
volumes longer than a window, the seam is the change between slices where chained windows would
meet, divided by the change where other latent frames meet. (Within a latent frame, slices are
similar in any reconstruction.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.ndimage import binary_fill_holes, binary_opening

import fvae_deploy as fvae
from fvae_deploy.organs import organ_name
from fvae_deploy.phantom.patient import varied
from fvae_deploy.phantom.torso import write_phantom
from fvae_deploy.stream.report import machine

WINDOW = 65  # slices
FRAME = 4  # slices of a latent frame
FIRST = 200  # the first seed; training uses seeds from 10,000 on
TWIN = 5000  # added to a seed to draw the random details of a patient again
KINDS = ("generated", "twin", "recon")
Volume = NDArray[np.float64]  # [x, y, z]


def body_of(hu: Volume) -> NDArray[np.bool_]:
    """Return the mask of the patient: lungs filled and couch removed, slice by slice."""
    planes = [
        binary_fill_holes(binary_opening(plane > -500, iterations=2))
        for plane in hu.transpose(2, 0, 1)
    ]
    return np.stack(planes, axis=2)


def tissues(hu: Volume, body: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """Return the masks of three classes of HU."""
    return {
        "air": (hu < -500) & body,
        "soft tissue": (hu >= -200) & (hu <= 200) & body,
        "bone": (hu > 200) & body,
    }


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the Dice coefficient of two masks."""
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def blockiness(hu: Volume, body: NDArray[np.bool_], grid: int = 8) -> float:
    """Return the mean step between neighbours across cell borders, relative to inside cells."""
    across, inside = [], []
    for axis in (0, 1):
        step = np.abs(np.diff(hu, axis=axis))
        both = np.logical_and(
            np.take(body, range(1, body.shape[axis]), axis),
            np.take(body, range(step.shape[axis]), axis),
        )
        place = (np.arange(step.shape[axis]) + 1) % grid == 0
        shape = [1, 1, 1]
        shape[axis] = -1
        on = np.broadcast_to(place.reshape(shape), step.shape)
        across.append(step[on & both])
        inside.append(step[~on & both])
    return float(np.concatenate(across).mean() / np.concatenate(inside).mean())


def seam(hu: Volume, body: NDArray[np.bool_]) -> float:
    """Return the mean step between slices at window ends, relative to other latent frame ends."""
    step, both = np.abs(np.diff(hu, axis=2)), body[..., 1:] & body[..., :-1]
    frames = set(range(0, step.shape[2], FRAME))
    windows = set(range(WINDOW - 1, step.shape[2], WINDOW - 1))
    at, elsewhere = (sorted(places) for places in (windows, frames - windows))
    return float(
        step[..., at][both[..., at]].mean() / step[..., elsewhere][both[..., elsewhere]].mean()
    )


def figures(phantom: Volume, organs: NDArray[np.int64], volume: Volume) -> dict[str, Any]:
    """Compare a volume with the phantom from which its mask comes."""
    body = body_of(phantom)
    expected, actual = tissues(phantom, body), tissues(volume, body)
    off = {
        organ_name(int(n)): float(volume[organs == n].mean() - phantom[organs == n].mean())
        for n, count in zip(*np.unique(organs, return_counts=True), strict=True)
        if n and count > 2000
    }
    worst = max(off, key=lambda name: abs(off[name]))
    drift = [
        volume[..., k][body[..., k]].mean() - phantom[..., k][body[..., k]].mean()
        for k in range(phantom.shape[2])
        if body[..., k].any()
    ]
    return {
        **{f"dice {name}": dice(expected[name], actual[name]) for name in expected},
        "organ, worst HU": off[worst],
        "organ, worst": worst,
        "organs beyond 40 HU": sum(abs(v) > 40 for v in off.values()),
        "organs": len(off),
        "brightness, mean HU off": float(np.abs(drift).mean()),
        "brightness, worst HU": float(np.abs(drift).max()),
        "brightness change, worst HU": float(np.abs(np.diff(drift)).max()),
        "blockiness": blockiness(volume, body),
        **({"seam": seam(volume, body)} if phantom.shape[2] > WINDOW else {}),
    }


def load(path: Path) -> Volume:
    """Read a volume in HU [x, y, z]."""
    return np.asarray(nibabel.load(path).dataobj, np.float64)  # type: ignore[attr-defined]


def one(seed: int, folder: Path, options: dict[str, Any], shape: tuple[int, int, int]) -> Any:
    """Measure one patient; return the figures of each of KINDS."""
    patient = varied(seed)
    names = ("ct", "organs", "findings", "recon", "generated", "normal", "drawn", "twin")
    files = {name: folder / f"{name}{seed}.nii.gz" for name in names}
    write_phantom(
        files["ct"], shape, files["organs"], patient=patient, findings=files["findings"], seed=seed
    )
    write_phantom(files["drawn"], shape, patient=patient, seed=seed + TWIN)
    fvae.reconstruct(files["ct"], files["recon"])
    fvae.reconstruct(files["drawn"], files["twin"])
    report = fvae.generate(
        files["organs"],
        files["generated"],
        findings=patient.report(seed),
        disease_mask=files["findings"],
        seed=seed,
        **options,
    )
    phantom, organs = load(files["ct"]), load(files["organs"]).astype(int)
    diseased = load(files["findings"]) > 0
    rows = {name: figures(phantom, organs, load(files[name])) for name in KINDS}
    rows["generated"]["seconds"] = report["seconds"]["total"]
    if diseased.sum() > 50:
        normal = dataclasses.replace(patient, findings=())
        fvae.generate(
            files["organs"], files["normal"], findings=normal.report(seed), seed=seed, **options
        )
        change = np.abs(load(files["generated"]) - load(files["normal"]))
        elsewhere = body_of(phantom) & ~diseased
        rows["generated"]["change in finding, HU"] = float(change[diseased].mean())
        rows["generated"]["change elsewhere, HU"] = float(change[elsewhere].mean())
    return rows


def main() -> None:
    """Print the table, and write all figures to the file of --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="tiny-ldm", help="built-in name or bundle")
    parser.add_argument("--patients", type=int, default=20)
    parser.add_argument("--shape", default="128,128,65")
    parser.add_argument("--scheduler")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--eta", type=float)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="keep the volumes in this folder")
    options = parser.parse_args()
    x, y, z = (int(n) for n in options.shape.split(","))
    chosen = {
        "model": options.model,
        "sampler": options.scheduler,
        "steps": options.steps,
        "eta": options.eta,
    }
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(FIRST, FIRST + options.patients):
            rows.append(one(seed, folder, chosen, (x, y, z)))
    table = Table(title=f"{options.patients} unseen phantoms of {options.shape}: mean (worst)")
    for column in ("", options.model, "a twin, reconstructed", "reconstruction"):
        table.add_column(column)
    names = [k for k, v in rows[0]["recon"].items() if not isinstance(v, str)]
    names += ["seconds", "change in finding, HU", "change elsewhere, HU"]
    for name in names:
        cells = []
        for kind in KINDS:
            values = [row[kind][name] for row in rows if name in row[kind]]
            if not values:
                cells.append("-")
                continue
            worst = min(values) if name.startswith("dice") else max(values, key=abs)
            cells.append(f"{np.mean(np.abs(values)):.3g} ({worst:.3g})")
        table.add_row(name, *cells)
    Console(width=100).print(table)
    ratio = np.mean([r["generated"]["blockiness"] / r["recon"]["blockiness"] for r in rows])
    print(f"blockiness over the reconstruction's: {ratio:.3f}")
    print(f"{machine()['processor']}, {machine()['cores']} cores")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
