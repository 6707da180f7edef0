"""Turn trained weights into the published file: half precision, with the facts for the bundle.

python tools/train_tiny_ldm/finish.py build/tiny_ldm/tiny_ldm.safetensors
fvae export -m tools/train_tiny_ldm/tiny_ldm.safetensors -o build/tiny-ldm --name tiny-ldm
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.codec import BUILT_IN

FACTS = {
    "description": "working miniature of a CT generator, trained on phantoms; no medical model",
    "licence": "Apache-2.0",
    "vae": "tiny",
    "plane": [128, 128],
    "window": 17,
    "orientation": "LPS",  # of phantoms
    "sampler": "ddim",
    "steps": 8,  # more steps do not improve the figures of benchmarks/generation.py
    "eta": 0.0,
    "findings": "No finding. Portal venous phase.",
}


def main() -> None:
    """Write the published weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="weights that train.py wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_ldm.safetensors")
    options = parser.parse_args()
    with safe_open(options.weights, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        trained = {k: json.loads(v) for k, v in file.metadata().items() if k != "format"}
    identity = Manifest.load(BUILT_IN / "tiny").identity
    ranges = json.loads((Path(__file__).parent / "ranges.json").read_text())
    facts = {**trained, **FACTS, "vae_identity": identity, "training": ranges}
    small = {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in weights.items()}
    save_file(small, options.out, {name: json.dumps(value) for name, value in facts.items()})


if __name__ == "__main__":
    main()
