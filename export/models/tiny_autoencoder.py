"""diffusers' `AutoencoderTiny` (TAESD and its kin), slice by slice, cut into local stages.

    x [1, C, k, H, W]  -- encode0, encode1, ... -->  z [1, D, k, h, w]  -- decode0, ... -->  x

The slices are a batch; nothing passes from one to another. A stage ends where the
resolution changes, at the smaller of the two maps: in the encoder behind a convolution of
stride 2, in the decoder before a doubling. Nothing but convolutions reaches beyond a pixel,
so every stage runs in exact tiles.

Folded: the network's own range [0, 1], as far as its convolutions, which pad with zeros,
can take it; the latent normalisation into the encoder's last convolution; replicated input
and averaged output channels into the first and last layer; the doubling of maps into
smaller convolutions.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Geometry, Intensity, LatentNormalisation
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.slicewise import Doubling, Slices, channels_of, fold_gray

INTENSITY = Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-1.0, model_max=1.0)
LIMIT = 3.0  # the decoder squashes latents into (-3, 3)


class Lift(nn.Module):
    """Pixels from [-1, 1] to [0, 2]; the factor 1/2 is in the convolution that follows."""

    def forward(self, x: Tensor) -> Tensor:
        """X [k, C, H, W] + 1."""
        return x + 1


class Squash(nn.Module):
    """tanh of stored latents / (LIMIT * scale) + shift / LIMIT; the convolution has LIMIT."""

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        self.factor, self.offset = 1 / (LIMIT * scale), shift / LIMIT

    def forward(self, z: Tensor) -> Tensor:
        """Z [k, D, h, w]."""
        return torch.tanh(z * self.factor + self.offset)


def tiny_model(model: AutoencoderTiny, channels: int | None = None) -> Model:
    """Cut the network into stages, folding it in place; `channels` is 1 for gray.

    Raises BundleError for a configuration whose encoder and decoder differ in their factor,
    or that enlarges maps in another way than by repeating pixels.
    """
    known = inspect.signature(AutoencoderTiny.__init__).parameters
    config = {k: v for k, v in model.config.items() if k in known}
    levels = len(config["num_encoder_blocks"])
    found = config["num_decoder_blocks"], config["upsampling_scaling_factor"]
    if (len(found[0]), found[1], config["upsample_fn"]) != (levels, 2, "nearest"):
        raise BundleError(
            f"expected a decoder of {levels} levels, doubled by nearest as the encoder halves, "
            f"found {len(found[0])} levels, times {found[1]} by {config['upsample_fn']}: export "
            "it from Python code with --model module:factory"
        )
    geometry = Geometry(
        temporal=1,
        spatial=2 ** (levels - 1),
        latent_channels=config["latent_channels"],
        channels=channels_of(config, channels),
        window=65,
    )
    count = geometry.latent_channels
    latent = LatentNormalisation(
        shift=(float(config["shift_factor"] or 0.0),) * count,
        scale=(float(config["scaling_factor"]),) * count,
    )
    return Model(
        network=Network("tiny", json.loads(json.dumps(config))),
        geometry=geometry,
        intensity=INTENSITY,
        latent=latent,
        stages=_stages(model, geometry, latent),
        kinds=("step",),
        any_step=True,
    )


def rebuild(
    config: Mapping[str, Any], geometry: Geometry, latent: LatentNormalisation
) -> dict[str, nn.Module]:
    """Build the stages of an exported bundle, weights to be loaded."""
    return _stages(AutoencoderTiny(**config), geometry, latent)


def _stages(
    model: AutoencoderTiny, geometry: Geometry, latent: LatentNormalisation
) -> dict[str, nn.Module]:
    """Fold and cut: `encode0`, ... and `decode0`, ..."""
    encoder, decoder = model.encoder.layers, model.decoder.layers
    shift, scale = latent.shift[0], latent.scale[0]
    with torch.no_grad():
        encoder[0].weight = nn.Parameter(encoder[0].weight / 2)
        _fold_affine(encoder[-1], scale, -shift * scale)
        decoder[0].weight = nn.Parameter(decoder[0].weight * LIMIT)
        _fold_affine(decoder[-1], 2.0, -1.0)
        if geometry.channels == 1:
            fold_gray(encoder[0], decoder[-1])
        found = {f"encode{i}": Slices(s) for i, s in enumerate(_encoder(encoder))}
        found |= {
            f"decode{i}": Slices(s) for i, s in enumerate(_decoder(decoder, Squash(shift, scale)))
        }
    return {name: stage.eval().requires_grad_(False) for name, stage in found.items()}


def _encoder(encoder: nn.Sequential) -> Iterator[list[nn.Module]]:
    layers: list[nn.Module] = [Lift()]
    for layer in encoder:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1:
            yield layers
            layers = []
    yield layers


def _decoder(decoder: nn.Sequential, squash: Squash) -> Iterator[list[nn.Module]]:
    layers: list[nn.Module] = [squash]
    for before, layer in zip([None, *decoder], decoder, strict=False):
        if isinstance(layer, nn.Upsample):
            yield layers
            layers = []
        elif isinstance(before, nn.Upsample) and isinstance(layer, nn.Conv2d):
            layers.append(Doubling(layer))
        else:
            layers.append(layer)
    yield layers


def _fold_affine(last: nn.Conv2d, factor: float, offset: float) -> None:
    """Let a convolution give factor * its result + offset."""
    assert last.bias is not None
    last.weight = nn.Parameter(last.weight * factor)
    last.bias = nn.Parameter(last.bias * factor + offset)
