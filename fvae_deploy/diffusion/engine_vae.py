"""An object that pipelines of diffusers take for their AutoencoderKL, computed by an engine."""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from fvae_deploy.stream.codec import Codec


class EngineVAE:
    """A VAE of a pipeline, with the interface of `AutoencoderKL`.

    `config` is the configuration of the network that it stands for. Tensors may lie on any device
    and have any floating type; results come back on the same device, in the same type. Computation
    is in the precision of the engine, on its device. One picture runs at a time, whole.
    """

    def __init__(self, codec: Codec, config: Any, device: torch.device) -> None:
        self.codec, self.config, self.device = codec, config, device
        self.dtype = torch.float32  # so pipelines do not convert it before they decode
        self._channels = codec.manifest.geometry.latent_channels // 2

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode pictures [B, C, H, W] to the posterior of their latents [B, D, h, w].

        Returns an `AutoencoderKLOutput`, or with `return_dict=False` a tuple of its
        `latent_dist`, whose `sample(generator)` and `mode()` are diffusers' own. Raises
        VolumeError unless H and W are multiples of the network's factor.
        """
        moments = _to_torch(self.codec.encode(_to_numpy(x)), x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Decode latents [B, D, h, w] to pictures [B, C, H, W].

        Returns a `DecoderOutput`, or with `return_dict=False` a tuple of its `sample`.
        `generator` is not used, as in `AutoencoderKL`. Raises VolumeError for another D.
        """
        latents = _to_numpy(z)  # [D, B, h, w]
        if latents.shape[0] == self._channels:  # else the codec says what is wrong
            latents = np.concatenate([latents, np.zeros_like(latents)])  # no log-variances
        sample = _to_torch(self.codec.decode(latents), z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Note the device that is asked for; the engine stays where it is."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, str | torch.device):
                self.device = torch.device(value)
        return self

    def eval(self) -> Self:
        """Return this object: it never trains."""
        return self

    def requires_grad_(self, requires_grad: bool = False) -> Self:
        """Return this object: it has no gradients."""
        return self

    def enable_tiling(self, *args: Any, **kwargs: Any) -> None:
        """Say that pictures still run whole: blended tiles would change them."""
        warnings.warn(
            "fvae runs every picture whole: tiling is not enabled", UserWarning, stacklevel=2
        )

    def disable_tiling(self) -> None:
        """Do nothing: there is no tiling."""

    def enable_slicing(self) -> None:
        """Do nothing: one picture runs at a time anyway."""

    def disable_slicing(self) -> None:
        """Do nothing: one picture runs at a time in any case."""

    def close(self) -> None:
        """Release the engine."""
        self.codec.close()


def _to_numpy(x: Tensor) -> Any:
    """Return a batch [B, C, H, W] as a clip [C, B, H, W] of float32."""
    if x.ndim != 4:
        return x.detach().to("cpu", torch.float32).numpy()  # the codec says what is wrong
    return x.detach().to("cpu", torch.float32).transpose(0, 1).contiguous().numpy()


def _to_torch(clip: Any, like: Tensor) -> Tensor:
    """Return a clip [C, B, H, W] as a batch [B, C, H, W] on the device of a tensor."""
    return torch.from_numpy(clip).transpose(0, 1).contiguous().to(like.device, like.dtype)
