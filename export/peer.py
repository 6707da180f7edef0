"""The published formulation of LeanVAE, as a peer to measure against, on the same weights.

Eager torch, a whole window at once, tokens channels last in memory, and around every 3-D
depthwise convolution a permutation to channels first, explicit padding and back; Haar bands
by strided convolution. Nothing is folded. What it computes equals `LeanVAE` (tested).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fvae_deploy.export.models.lean_vae import CausalDepthwise, CausalState, LeanVAE
from fvae_deploy.export.sources import load_model


class PublishedDepthwise(nn.Module):
    """The depthwise layer as published: permute, pad, 3-D convolution, permute back."""

    def __init__(self, layer: CausalDepthwise) -> None:
        super().__init__()
        self.ds_conv = layer.ds_conv

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        """X [B, T, H, W, D] of a whole window; the state stays unused."""
        padded = F.pad(x.permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))
        convolved: Tensor = self.ds_conv(padded.contiguous())
        return convolved.permute(0, 2, 3, 4, 1)


def published(model: LeanVAE) -> LeanVAE:
    """Replace the depthwise layers of a network, in place, by the published formulation."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, CausalDepthwise):
                setattr(module, name, PublishedDepthwise(child))
    return model


def reference_window(
    weights: Path, direction: str, x: NDArray[np.float32], slices: int
) -> Callable[[], Any]:
    """Make a function that passes one whole window through encoder or decoder.

    x [C, 1, H, W] is repeated to `slices` frames, or [D, 1, h, w] to their latent frames; a
    gray x is replicated to the network's channels, as the published scripts do.
    """
    model, _, _ = load_model(weights)
    model = published(model)
    frames = slices if direction == "encode" else 1 + (slices - 1) // 4
    window = torch.from_numpy(x)[None].repeat(1, 1, frames, 1, 1)
    if direction == "encode":
        window = window.expand(-1, model.config.in_channels, -1, -1, -1).contiguous()
    work = model.encode if direction == "encode" else model.decode

    @torch.inference_mode()
    def run() -> Any:
        return work(window)

    return run
