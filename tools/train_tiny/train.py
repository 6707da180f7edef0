"""Train `tiny`, the built-in LeanVAE, on natural photographs.

    python tools/train_tiny/photographs.py build/photographs
    python tools/train_tiny/train.py --photographs build/photographs --out build/tiny

Starts from the linear optimum, principal components, which the network can represent exactly, and
learns the rest. Saves a checkpoint every `--save-every` steps; the same command continues from it.
`build/tiny/tiny.safetensors` contains the averaged weights, `build/tiny/log.jsonl` is the log.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

# Big activations are allocated and freed every step; returning them to the system each
# time costs half the step in page faults, so keep them (must be set before libc starts).
if os.environ.get("MALLOC_MMAP_MAX_") is None and sys.platform == "linux":
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from clips import ClipMaker
from photographs import load

from fvae_deploy.export.models.lean_vae import (
    Layers,
    LeanVAE,
    LeanVAEConfig,
    haar,
    inverse_haar,
    to_patches,
)

CONFIG = LeanVAEConfig(
    embedding_dim=128,
    latent_dim=16,
    ista_iter_num=1,
    ista_layer_num=1,
    l_dim=32,
    h_dim=96,
    sep_num_layer=1,
    fusion_num_layer=3,
    in_channels=1,
)


def components(rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the first principal directions [keep, n] of rows [m, n] and their deviations."""
    covariance = (rows.T @ rows / len(rows)).double()
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:keep], vectors.flip(1)[:, :keep]
    return vectors.T.float(), values.clamp_min(1e-12).sqrt().float()


@torch.no_grad()
def start_from_principal_components(model: LeanVAE, maker: ClipMaker) -> None:
    """Set the network to the 16-component block PCA codec of the clips, exactly.

    Tokens are divided by the square root of their deviation, so that the first components do not
    dominate the others in the layer norms. The first frame is coded like a still clip.
    """
    x = torch.cat([maker.batch(8, 9, 64) for _ in range(40)])[:, :, 1:] / 2
    bands, scales = haar(x), []
    for band, part in (("low", bands[:, :1]), ("high", bands[:, 1:])):
        encode = model.encoder.projection(f"video_{band}")
        decode = model.decoder.projection(f"video_{band}")
        directions, deviation = components(to_patches(part, 2).flatten(0, 3), encode.out_features)
        scale = deviation.sqrt().clamp_min(1e-2)
        encode.weight.copy_(directions / scale[:, None])
        decode.weight.copy_(directions.T * scale)
        encode.bias.zero_()
        decode.bias.zero_()
        scales.append(scale)
        # One unit of each band value of the first frame, as a still clip of 4 frames.
        still = torch.eye(64)[:16] if band == "low" else torch.eye(64)[16:]
        patch = inverse_haar(still.reshape(-1, 4, 1, 4, 4), 1)  # [n, 1, 1, 8, 8]
        tokens = model.embed(patch.expand(-1, -1, 4, -1, -1)).flatten(1)
        part_of = slice(0, CONFIG.l_dim) if band == "low" else slice(CONFIG.l_dim, None)
        model.encoder.projection(f"image_{band}").weight.copy_(tokens[:, part_of].T)
    for band in ("low", "high"):
        model.encoder.projection(f"image_{band}").bias.zero_()
        model.decoder.projection(f"image_{band}").bias.zero_()
    shown = model.unembed(torch.eye(128)[:, None, None, None], "video").mean(2, keepdim=True)
    image_bands = haar(shown).flatten(1)  # [128 tokens, 64 band values]
    model.decoder.projection("image_low").weight.copy_(image_bands[: CONFIG.l_dim, :16].T)
    model.decoder.projection("image_high").weight.copy_(image_bands[CONFIG.l_dim :, 16:].T)

    for module in model.modules():
        if isinstance(module, Layers):
            for convolution, feed in zip(module.dconv_layer, module.ffd_layer, strict=True):
                convolution.ds_conv.weight.zero_()
                convolution.ds_conv.bias.zero_()
                if module.residual:
                    feed[-1].weight.zero_()
                else:
                    convolution.ds_conv.weight[:, :, 2, 1, 1] = 1
    for layers in model.latent_bottleneck.backward_l:
        layers.ffd_layer[-1][-1].weight.zero_()
    scale = torch.cat(scales)
    pixels = model.embed(x) * scale  # tokens, on the scale of the picture again
    directions, deviation = components(pixels.flatten(0, 3), CONFIG.latent_dim)
    model.latent_bottleneck.phi.copy_(directions * scale / deviation[:, None])
    model.latent_bottleneck.Q.copy_((directions / scale).T * deviation)


def psnr_and_mae(
    model: LeanVAE, clips: Tensor, noise: float = 0.0, frames: int | None = None
) -> tuple[float, float]:
    """Return PSNR in dB (peak 2000 HU) and mean absolute error in HU of clips [B, 1, T, H, W].

    1.0 is 1000 HU. `noise` is added to the latent, in standard deviations of each channel;
    `frames` is the number of frames before the padding.
    """
    with torch.no_grad():
        z = model.encode(clips / 2)
        if noise:
            seeded = torch.Generator().manual_seed(0)
            deviation = z.std(dim=(0, 2, 3, 4), keepdim=True)
            z = z + noise * deviation * torch.randn(z.shape, generator=seeded)
        error = ((2 * model.decode(z)).clamp(-1, 1) - clips)[:, :, :frames]
    return -10 * math.log10(error.square().mean().item() / 4), 1000 * error.abs().mean().item()


def shape_at(progress: float) -> tuple[int, int, int]:
    """Return clips, frames and size of a batch: longer and larger later, for borders and time."""
    if progress < 0.6:
        return 8, 9, 64
    return (4, 13, 80) if progress < 0.9 else (3, 17, 96)


def main() -> None:
    """Train; continue from a checkpoint if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument(
        "--latent-noise",
        type=float,
        default=0.02,
        help="largest noise on latents, in standard deviations of each channel",
    )
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    model = LeanVAE(CONFIG)
    maker = ClipMaker(load(options.photographs, held_out=False), options.seed)
    held_out = ClipMaker(load(options.photographs, held_out=True), 1).batch(24, 17, 96)
    start_from_principal_components(model, maker)
    average = LeanVAE(CONFIG)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate, betas=(0.9, 0.98))
    step = 0
    saved = options.out / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        maker.random = np.random.default_rng(options.seed + step)

    def log(**row: object) -> None:
        print(json.dumps(row), flush=True)
        with (options.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    log(
        step=step,
        held_out=psnr_and_mae(average, held_out),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    begin, losses = time.monotonic(), []
    while step < options.steps:
        progress = step / options.steps
        warm = min(1.0, (step + 1) / 200)
        optimizer.param_groups[0]["lr"] = (
            options.rate * warm * (0.5 * (1 + math.cos(math.pi * progress)) + 0.005)
        )
        clips = maker.batch(*shape_at(progress))
        z = model.encode(clips / 2)
        deviation = z.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        level = options.latent_noise * torch.rand(len(z), 1, 1, 1, 1)
        error = 2 * model.decode(z + level * deviation * torch.randn_like(z)) - clips
        loss = error.abs().mean() + 10 * error.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        step += 1
        with torch.no_grad():
            decay = min(0.999, (1 + step) / (10 + step))
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        losses.append(loss.item())
        if step % options.save_every == 0:
            weights = {k: v.contiguous() for k, v in average.state_dict().items()}
            save_file(weights, options.out / "tiny.safetensors")
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            torch.save(state, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
            log(
                step=step,
                loss=round(sum(losses) / len(losses), 5),
                held_out=psnr_and_mae(average, held_out),
                held_out_5_percent_noise=psnr_and_mae(average, held_out, 0.05),
                steps_per_second=round(len(losses) / (time.monotonic() - begin), 2),
            )
            begin, losses = time.monotonic(), []


if __name__ == "__main__":
    main()
