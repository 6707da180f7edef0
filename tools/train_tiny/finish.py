"""Turn trained weights into the published file: add latent scale and metadata, print figures.

    python tools/train_tiny/finish.py build/tiny/tiny.safetensors \
        --photographs build/photographs --ct FOLDER_OR_NIFTI

Writes `tools/train_tiny/tiny.safetensors`, which `fvae export` reads. Prints the table of the model
card as JSON: the network and a 16-component block PCA of the same photographs, without noise and
with 5 % noise on the latent. CT is used only here, for these figures, and never for training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from clips import ClipMaker
from photographs import load
from train import CONFIG, psnr_and_mae, start_from_principal_components

from fvae_deploy.export.models.lean_vae import LeanVAE
from fvae_deploy.volume.open import open_volume

DESCRIPTION = "small LeanVAE trained on natural photographs alone, 4x8x8, 16 latent channels"


def ct_clip(path: Path) -> tuple[Tensor, int]:
    """Read a CT as a clip [1, 1, T, H, W] in [-1, 1], padded by repetition, and its true length."""
    hu = np.concatenate(list(open_volume(path).slabs(64))).astype(np.float32)
    slices, x, y = hu.shape
    padding = ((0, (1 - slices) % 4), (0, -x % 8), (0, -y % 8))
    hu = np.pad(hu, padding, mode="edge")
    return torch.from_numpy(hu.clip(-1000, 1000) / 1000)[None, None], slices


@torch.no_grad()
def latent_scale(model: LeanVAE, clips: Tensor) -> list[float]:
    """Return one factor per channel that scales latents of the clips to standard deviation 1."""
    return [round(1 / float(s), 6) for s in model.encode(clips / 2).std(dim=(0, 2, 3, 4))]


def main() -> None:
    """Write the published weights and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="weights that train.py wrote")
    parser.add_argument(
        "--photographs", type=Path, required=True, help="folder that photographs.py wrote"
    )
    parser.add_argument("--ct", type=Path, action="append", default=[], help="may be repeated")
    options = parser.parse_args()
    torch.manual_seed(0)
    models = {"tiny": LeanVAE(CONFIG), "block PCA": LeanVAE(CONFIG)}
    models["tiny"].load(load_file(options.weights))
    maker = ClipMaker(load(options.photographs, held_out=False), 0)
    start_from_principal_components(models["block PCA"], maker)
    held_out = ClipMaker(load(options.photographs, held_out=True), 1).batch(24, 17, 96)
    figures = {}
    for name, model in models.items():
        for noise in (0.0, 0.05):
            rows = {"held-out photographs": psnr_and_mae(model, held_out, noise)}
            for path in options.ct:
                clip, slices = ct_clip(path)
                rows[path.name] = psnr_and_mae(model, clip, noise, slices)
            figures[f"{name}, {noise:.0%} latent noise"] = {
                row: {"psnr_db": round(psnr, 2), "mae_hu": round(mae, 2)}
                for row, (psnr, mae) in rows.items()
            }
    metadata = {
        "args": json.dumps(
            {k: v for k, v in dataclasses.asdict(CONFIG).items() if k != "in_channels"}
        ),
        "description": json.dumps(DESCRIPTION),
        "licence": json.dumps("Apache-2.0"),
        "latent_scale": json.dumps(latent_scale(models["tiny"], maker.batch(24, 9, 96))),
    }
    weights = {name: value.contiguous() for name, value in models["tiny"].state_dict().items()}
    save_file(weights, Path(__file__).parent / "tiny.safetensors", metadata)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
