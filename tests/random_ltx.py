"""VAEs of LTX-Video and LTX-2 with random weights, and what diffusers computes with them."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import RMSNorm

ONE = "AutoencoderKLLTXVideo"
TWO = "AutoencoderKLLTX2Video"
LTX = {
    "latent_channels": 5,
    "block_out_channels": (4, 6, 8, 8),
    "decoder_block_out_channels": (4, 6, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
}
SHALLOW = {
    "latent_channels": 8,
    "block_out_channels": (4, 8),
    "decoder_block_out_channels": (4, 8),
    "down_block_types": ("LTXVideoDownBlock3D",) * 2,
    "layers_per_block": (1, 2, 1),
    "decoder_layers_per_block": (1, 1, 2),
    "spatio_temporal_scaling": (True, False),
    "decoder_spatio_temporal_scaling": (True, False),
    "decoder_inject_noise": (False,) * 3,
    "upsample_residual": (False, False),
    "upsample_factor": (1, 1),
    "patch_size": 2,
}
LTX2 = {
    "latent_channels": 8,
    "block_out_channels": (16, 16, 32, 32),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
}
CONFIGS = {
    "LTX-Video": (ONE, LTX),
    "LTX-Video, causal": (ONE, {**LTX, "decoder_causal": True}),
    "LTX-Video of two levels": (ONE, SHALLOW),
    "LTX-Video of two levels, causal": (ONE, {**SHALLOW, "decoder_causal": True}),
    "LTX-Video, nothing causal": (ONE, {**LTX, "encoder_causal": False}),
    "LTX-Video with residual doublings": (
        ONE,
        {
            **SHALLOW,
            "spatio_temporal_scaling": (True, True),
            "decoder_spatio_temporal_scaling": (True, True),
            "decoder_block_out_channels": (16, 32),
            "upsample_residual": (True, True),
            "upsample_factor": (2, 2),
        },
    ),
    "LTX-2": (
        TWO,
        {
            **LTX2,
            "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal"),
            "downsample_type": ("spatial", "temporal", "temporal", "spatiotemporal"),
            "decoder_spatial_padding_mode": "zeros",
        },
    ),
    "LTX-2 as published, not causal": (
        TWO,
        {
            **LTX2,
            "decoder_causal": False,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        },
    ),
}
CAUSAL = ("LTX-Video, causal", "LTX-Video of two levels, causal", "LTX-2")
AHEAD = (
    "LTX-Video",
    "LTX-Video of two levels",
    "LTX-Video with residual doublings",
    "LTX-2 as published, not causal",
)


def random_ltx(name: str, seed: int = 0, *, plain: bool = False) -> Any:
    """With `plain`, latents are not normalised, which the stages do with float32 numbers."""
    kind, config = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = getattr(diffusers, kind)(**config, scaling_factor=1.0 if plain else 0.7)
        network.eval()
        for parameter in network.requires_grad_(False).parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
        if not plain:
            network.latents_mean += torch.randn(len(network.latents_mean))
            network.latents_std += torch.rand(len(network.latents_std))
    return network


def exact_norms(patch: pytest.MonkeyPatch) -> None:
    """Let diffusers' norms compute in float64 in a float64 network; they take float32 always."""

    def forward(norm: Any, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)

    patch.setattr(RMSNorm, "forward", forward)


def by_hand(network: Any, data: np.ndarray, direction: str) -> np.ndarray:
    """What diffusers makes of a whole clip, or of its latents, in float64."""
    shift = network.latents_mean.double().view(1, -1, 1, 1, 1)
    scale = (network.config.scaling_factor / network.latents_std.double()).view(1, -1, 1, 1, 1)
    x, network = torch.from_numpy(data)[None], copy.deepcopy(network).double()
    with torch.no_grad():
        if direction == "encode":
            return (((network.encode(x).latent_dist.mean) - shift) * scale)[0].numpy()
        return network.decode(x / scale + shift).sample[0].numpy()
