"""Build the networks of four papers at their published width with random weights, for benchmarks.

    git clone https://github.com/PKU-YuanGroup/WF-VAE && cd WF-VAE
    PYTHONPATH=.../benchmarks fvae export -m authors:wfvae --window 65 -o wfvae

Each function needs the authors' code in the current folder or on PYTHONPATH, at the commit that
docs/any-vae.md names. Speed and memory do not depend on the weights, but fidelity does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fvae_deploy.export.models.foreign import call

CONTRAST = 0.3  # deviation of a decoded clip, so that no picture saturates


def cvvae(settle: bool = True) -> nn.Module:
    """Build CV-VAE, `vae3d`: windows of 1 + 4n slices."""
    from models import vae_models
    from models.modeling_vae import CVVAEModel

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    vae_models.xformers = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attention))
    torch.manual_seed(0)
    network = CVVAEModel()
    network.pixel_tile_size = network.latent_tile_size = None
    return _settled(network, network.decoder.conv_out, 17) if settle else network


def ivvae(settle: bool = True) -> nn.Module:
    """Build iv-VAE, `ivvae_z16_dim96`: windows of 1 + 4n slices."""
    from models.vae3d import VAutoencoder3d

    torch.manual_seed(0)
    network = VAutoencoder3d(dim=96, z_dim=16, scale_factor=0.7619, shift_factor=-0.0483)
    network.sample = lambda mean, log_variance: mean
    head = network.decoder.head[-1]
    return _settled(network, nn.ModuleList([head.conv_2d, head.conv_3d]), 9) if settle else network


def ivvae_stream(settle: bool = True) -> nn.Module:
    """Build iv-VAE as a causal stream."""
    network = ivvae(settle)
    network.as_stream = True
    return network


def videovaeplus(settle: bool = True) -> nn.Module:
    """Build VideoVAE+, `config_16z.yaml`: windows of 4n slices."""
    from omegaconf import OmegaConf
    from utils.common_utils import instantiate_from_config

    config = OmegaConf.load(_found("configs/inference/config_16z.yaml")).model
    config.params.ckpt_path = None
    config.params.lossconfig = {"target": "torch.nn.Identity"}
    torch.manual_seed(0)
    network = instantiate_from_config(config)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = nn.GroupNorm  # theirs casts to float32, in float64 too
    spatial, temporal = network.encode_2plus1d, network.encode_temporal
    network.encode = lambda x: temporal(spatial(x).mode()).mode()
    return _settled(network, network.decoder.conv_out, 16) if settle else network


def wfvae(settle: bool = True) -> nn.Module:
    """Build WF-VAE, `wfvae-large-16chn.json`: windows of 1 + 4n slices."""
    from causalvideovae.model import ModelRegistry

    config = json.loads(_found("examples/wfvae-large-16chn.json").read_text())
    torch.manual_seed(0)
    network = ModelRegistry.get_model("WFVAE").from_config(config)
    last = [
        network.decoder.conv_out,
        network.decoder.connect_l1[-1],
        network.decoder.connect_l2[-1],
    ]
    return _settled(network, nn.ModuleList(last), 9) if settle else network


def _found(name: str) -> Path:
    """Return a file of the authors' code, in the folder that holds their modules."""
    return next(file for folder in sys.path if (file := Path(folder or ".") / name).is_file())


def _settled(network: nn.Module, last: nn.Module, window: int) -> nn.Module:
    """Fill weights that begin at zero, and scale the last ones to pictures of little contrast."""
    seeded = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim > 1 and not weight.any():
                weight.normal_(0, weight[0].numel() ** -0.5 / 2, generator=seeded)
        x = torch.rand((1, 3, window, 32, 64), generator=seeded) * 2 - 1
        network.eval()
        y = call(network, "decode", call(network, "encode", x))
        scale = CONTRAST / float(y.std())
        for weights in last.parameters():
            weights *= scale
    return network
