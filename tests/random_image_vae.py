"""Small AutoencoderKL and AutoencoderTiny networks of diffusers with random weights."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

TWO = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "latent_channels": 3,
}
KL = {
    "like SD": TWO,
    "like FLUX, without quant_conv and with a shift": {
        **TWO,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "with a shift through quant_conv": {**TWO, "shift_factor": -0.4, "layers_per_block": 2},
    "with statistics of every channel": {
        **TWO,
        "use_post_quant_conv": False,
        "latents_mean": [0.5, -1.0, 0.2],
        "latents_std": [2.0, 0.3, 1.1],
        "scaling_factor": 0.5,
    },
    "of one level, without attention": {
        **TWO,
        "block_out_channels": [6],
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "mid_block_add_attention": False,
        "force_upcast": False,
    },
    "of three levels, with attention in one": {
        **TWO,
        "block_out_channels": [4, 6, 6],
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "latent_channels": 4,
    },
}
TAESD = {
    "encoder_block_out_channels": [4, 4, 4],
    "decoder_block_out_channels": [4, 4, 4],
    "num_encoder_blocks": [1, 2, 1],
    "num_decoder_blocks": [2, 1, 1],
    "latent_channels": 3,
}
TINY = {
    "like TAESD": TAESD,
    "of two levels, with a shift and a factor": {
        **TAESD,
        "encoder_block_out_channels": [4, 4],
        "decoder_block_out_channels": [4, 4],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
        "shift_factor": 0.3,
        "scaling_factor": 1.5,
    },
    "of one level": {
        **TAESD,
        "encoder_block_out_channels": [4],
        "decoder_block_out_channels": [4],
        "num_encoder_blocks": [1],
        "num_decoder_blocks": [1],
    },
    "of unequal depth and another activation": {
        **TAESD,
        "num_encoder_blocks": [0, 2, 1],
        "num_decoder_blocks": [1, 0, 2],
        "act_fn": "silu",
    },
}
ALL = {
    **{f"AutoencoderKL {name}": ("AutoencoderKL", config) for name, config in KL.items()},
    **{f"AutoencoderTiny {name}": ("AutoencoderTiny", config) for name, config in TINY.items()},
}


def random_image_vae(kind: str, config: dict[str, Any], seed: int = 0) -> Any:
    """Every gain and bias random too, so that none can be left out unnoticed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(diffusers, kind)(**config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model
