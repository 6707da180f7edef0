"""Measure what `tiny-ldm` was trained on: grids, and what its VAE makes of the training phantoms.

    python tools/train_tiny_ldm/ranges.py --patients 40
    fvae export -m tools/train_tiny_ldm/tiny_ldm.safetensors -o build/tiny-ldm --name tiny-ldm

`finish.py` puts `ranges.json` into the published weights; `fvae generate` compares masks and
samples with it. Every phantom is drawn and reconstructed as in `data.py`, with its findings in the
mask.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from data import HELD_OUT, SLICES, drawn, latents
from palette import OFFSET

from fvae_deploy.generation.measures import Measures, spread
from fvae_deploy.organs import FINDINGS
from fvae_deploy.phantom.patient import varied
from fvae_deploy.phantom.torso import FIELD_OF_VIEW
from fvae_deploy.stream.codec import Codec, open_codec

OUT = Path(__file__).parent / "ranges.json"


def measured(codec: Codec, seed: int) -> tuple[dict[str, float], int, set[int]]:
    """Return the measures of a training phantom's reconstruction, its slices and its findings."""
    slices = int(np.random.default_rng([seed, 11]).choice(SLICES))
    hu, organs, findings = drawn(varied(seed), slices, seed)
    z = latents(codec, hu)
    made = 2000 * codec.decode(z.transpose(1, 0, 2, 3))[0]
    labels = np.where(findings > 0, findings.astype(np.int64) + OFFSET, organs)
    geometry = codec.manifest.geometry
    measures = Measures(geometry.spatial, geometry.temporal)
    for frame, plane in zip(made, labels, strict=True):
        measures.add(frame, plane)
    return measures.result(), slices, {int(n) for n in np.unique(findings) if n}


def main() -> None:
    """Write the ranges of the first patients of the training data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=40)
    options = parser.parse_args()
    every, depths, ill = [], [], set[int]()
    with open_codec("tiny") as codec:
        for seed in range(HELD_OUT, HELD_OUT + options.patients):
            measures, slices, findings = measured(codec, seed)
            every.append(measures)
            depths.append(slices)
            ill |= findings
            print(seed, slices, flush=True)
    least = max(2, options.patients // 10)
    facts = {
        "volumes": options.patients,
        "field_of_view": {"low": FIELD_OF_VIEW[0], "high": FIELD_OF_VIEW[0]},
        "spacing": {
            "low": round(FIELD_OF_VIEW[2] / max(depths), 4),
            "high": round(FIELD_OF_VIEW[2] / min(depths), 4),
        },
        "slices": {"low": min(depths), "high": max(depths)},
        "findings": sorted(ill & FINDINGS.keys()),
        "measures": {
            name: {"low": round(low, 4), "high": round(high, 4)}
            for name, (low, high) in sorted(spread(every, least).items())
        },
    }
    OUT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
