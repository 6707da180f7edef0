"""Write a network of a published size with random weights, for benchmarks without real weights.

    python benchmarks/random_weights.py wan2.1 build/wan2.1
    fvae export -m build/wan2.1 -o build/wan2.1-bundle

Speed and memory do not depend on the weights, but fidelity does. So a bundle of random weights is
useful only for benchmarks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

NAMES = ("wan2.1", "wan2.2", "leanvae4", "leanvae16", "sd", "flux", "unet43", "unet482")
WAN22 = {  # the configuration that Wan2.2-TI2V-5B publishes
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}

FLUX = {  # what FLUX.1 publishes beside the sizes that it shares with Stable Diffusion
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
UNET = {  # the form that the paper publishes, at a width of 64 instead of 224
    "in_channels": 32,
    "out_channels": 16,
    "model_channels": 64,
    "num_res_blocks": 2,
    "attention_resolutions": [8, 4, 2],
    "channel_mult": [1, 2, 3, 4],
    "num_head_channels": 32,
    "context_dim": 768,
    "legacy": False,
}
UNETS = {"unet43": UNET, "unet482": UNET | {"model_channels": 224}}


def build(name: str) -> nn.Module:
    """Return the network `name` with random weights, the same in every process."""
    torch.manual_seed(0)
    if name.startswith("unet"):
        from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet

        return UNet(DenoiserConfig.read(UNETS[name]))
    if name.startswith("wan"):
        from diffusers import AutoencoderKLWan

        network: nn.Module = AutoencoderKLWan(**(WAN22 if name == "wan2.2" else {}))
        with torch.no_grad():  # so that no channel saturates: a clamp would hide differences
            network.decoder.conv_out.weight *= 0.1
        return network
    if name in ("sd", "flux"):
        from diffusers import AutoencoderKL

        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            **(FLUX if name == "flux" else {}),
        )
    from fvae_deploy.export.models.lean_vae import LeanVAE, LeanVAEConfig

    return LeanVAE(LeanVAEConfig(latent_dim=int(name.removeprefix("leanvae"))))


def write(name: str, target: Path) -> None:
    """Write the network `name` to a folder in diffusers' format, or to a checkpoint."""
    target.parent.mkdir(parents=True, exist_ok=True)
    network = build(name)
    if name.startswith("unet"):
        weights = network.state_dict()
        state = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
        torch.save({"state_dict": state, "unet_config": UNETS[name]}, target)
    elif name.startswith(("wan", "sd", "flux")):
        network.save_pretrained(target)
    else:
        args = {"latent_dim": int(name.removeprefix("leanvae"))}
        torch.save({"args": args, "state_dict": network.state_dict()}, target)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: random_weights.py {'|'.join(NAMES)} TARGET")
    write(sys.argv[1], Path(sys.argv[2]))
