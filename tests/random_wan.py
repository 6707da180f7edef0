"""Small Wan2.1 and Wan2.2 networks of diffusers with random weights and latent statistics."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan

SMALL = {"base_dim": 4, "z_dim": 3, "num_res_blocks": 1}
WAN21 = {**SMALL, "dim_mult": [1, 2, 2, 2]}
SHALLOW = {**SMALL, "dim_mult": [1, 2], "temperal_downsample": [True]}
UNEVEN = {**SMALL, "dim_mult": [1, 2, 3], "temperal_downsample": [True, True], "num_res_blocks": 2}
WAN22 = {
    **SMALL,
    "decoder_base_dim": 6,
    "dim_mult": [1, 2, 2, 2],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
CONFIGS = {"wan2.1": WAN21, "wan2.2": WAN22, "shallow": SHALLOW, "uneven": UNEVEN}


def random_wan(config: dict[str, Any], seed: int = 0) -> AutoencoderKLWan:
    """Every gain and bias random too, so that none can be left out unnoticed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        statistics = {
            "latents_mean": torch.randn(config["z_dim"]).tolist(),
            "latents_std": (0.5 + torch.rand(config["z_dim"])).tolist(),
        }
        model = AutoencoderKLWan(**config, **statistics).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model
