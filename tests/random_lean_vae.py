"""Small LeanVAE networks whose every weight is random, gains and thresholds too."""

from __future__ import annotations

import torch

from fvae_deploy.export.models.lean_vae import LeanVAE, LeanVAEConfig

SMALL = LeanVAEConfig(
    embedding_dim=32,
    latent_dim=4,
    ista_iter_num=1,
    ista_layer_num=1,
    l_dim=8,
    h_dim=24,
    sep_num_layer=1,
    fusion_num_layer=1,
    in_channels=3,
)
SMALL_SCALE = [0.5, 2.0, 1.0, 1.5]


def random_lean_vae(
    config: LeanVAEConfig, seed: int, dtype: torch.dtype = torch.float32
) -> LeanVAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LeanVAE(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            # Away from ones and zeros, which would hide a gain or bias that is left out.
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.to(dtype)
