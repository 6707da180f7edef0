"""diffusers' `AutoencoderTiny` (TAESD and similar), slice by slice, cut into local stages.

    x [1, C, k, H, W]  -- encode0, encode1, ... -->  z [1, D, k, h, w]  -- decode0, ... -->  x

The slices are a batch and do not influence each other. A stage ends where the resolution
changes, at the smaller of the two maps: in the encoder after a convolution of stride 2, in the
decoder before an upsampling. Only convolutions reach beyond a pixel, so every stage runs in
exact tiles.

These operations are folded into weights: the network's own range [0, 1], except for the shift
that a convolution with zero padding cannot absorb; the latent normalisation into the encoder's
last convolution; replicated input channels into the first layer, and averaged output channels
into the last one where they are not clamped first; upsampling into smaller convolutions.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Averaging, Geometry, Intensity, LatentNormalisation
from fvae_deploy.export.models.colours import clamp_of
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.slicewise import Doubling, Slices, channels_of, fold_pixels

INTENSITY = Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-1.0, model_max=1.0)
LIMIT = 3.0  # the decoder limits latents to (-3, 3) with tanh


class Lift(nn.Module):
    """Shift pixels from [-1, 1] to [0, 2]; the next convolution contains the factor 1/2."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x + 1; x is [k, C, H, W]."""
        return x + 1


class Squash(nn.Module):
    """tanh(stored / (LIMIT * scale) + shift / LIMIT); the next layer multiplies by LIMIT."""

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        self.factor, self.offset = 1 / (LIMIT * scale), shift / LIMIT

    def forward(self, z: Tensor) -> Tensor:
        """Limit latents z [k, D, h, w]."""
        return torch.tanh(z * self.factor + self.offset)


def tiny_model(model: AutoencoderTiny, channels: int | None = None, clamped: bool = False) -> Model:
    """Cut the network into stages, folding it in place; `channels` is 1 for gray.

    With `clamped`, output channels are clamped to the model's range before they are averaged.

    Raises BundleError if encoder and decoder change the resolution by different factors, or if
    the upsampling is not nearest neighbour.
    """
    known = inspect.signature(AutoencoderTiny.__init__).parameters
    config = {k: v for k, v in model.config.items() if k in known}
    levels = len(config["num_encoder_blocks"])
    decoder_levels, factor = len(config["num_decoder_blocks"]), config["upsampling_scaling_factor"]
    if (decoder_levels, factor, config["upsample_fn"]) != (levels, 2, "nearest"):
        raise BundleError(
            f"expected a decoder of {levels} levels with nearest-neighbour upsampling by 2, like "
            f"the encoder, found {decoder_levels} levels, times {factor} by "
            f"{config['upsample_fn']}: export it from Python code with --model module:factory"
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
    averaging = Averaging(clamped and config["out_channels"] > 1)
    return Model(
        network=Network("tiny", json.loads(json.dumps(config))),
        geometry=geometry,
        intensity=INTENSITY,
        latent=latent,
        stages=stages_of(*_halves(model), geometry, latent, averaging),
        kinds=("step",),
        any_step=True,
        averaging=averaging,
    )


def rebuild(
    config: Mapping[str, Any],
    geometry: Geometry,
    latent: LatentNormalisation,
    averaging: Averaging,
) -> dict[str, nn.Module]:
    """Build the stages of an exported bundle, without weights."""
    return stages_of(*_halves(AutoencoderTiny(**config)), geometry, latent, averaging)


def _halves(model: AutoencoderTiny) -> tuple[nn.Sequential, nn.Sequential]:
    return model.encoder.layers, model.decoder.layers


def stages_of(
    encoder: Any,
    decoder: Any,
    geometry: Geometry,
    latent: LatentNormalisation,
    averaging: Averaging,
) -> dict[str, nn.Module]:
    """Fold a network in place and return the stages `encode0`, ... and `decode0`, ...

    Encoder and decoder are sequences of layers (nn.Sequential).
    """
    shift, scale = latent.shift[0], latent.scale[0]
    with torch.no_grad():
        encoder[0].weight = nn.Parameter(encoder[0].weight / 2)
        _fold_affine(encoder[-1], scale, -shift * scale)
        decoder[0].weight = nn.Parameter(decoder[0].weight * LIMIT)
        _fold_affine(decoder[-1], 2.0, -1.0)
        if geometry.channels == 1:
            fold_pixels(encoder[0], None if averaging.clamped else decoder[-1], 1)
        squash = Squash(shift, scale)
        clamp = clamp_of(averaging, geometry, INTENSITY, decoder[-1].out_channels)
        last = [] if clamp is None else [clamp]
        stages = {f"encode{i}": Slices(s) for i, s in enumerate(_encoder_stages(encoder))}
        stages |= {
            f"decode{i}": Slices(s)
            for i, s in enumerate(_decoder_stages([*decoder, *last], squash))
        }
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}


def _encoder_stages(encoder: nn.Sequential) -> Iterator[list[nn.Module]]:
    """Yield the layers of each stage of the encoder."""
    layers: list[nn.Module] = [Lift()]
    for layer in encoder:
        layers.append(layer)
        if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1:
            yield layers
            layers = []
    yield layers


def _decoder_stages(decoder: Sequence[nn.Module], squash: Squash) -> Iterator[list[nn.Module]]:
    """Yield the layers of each stage of the decoder."""
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
    """Make a convolution return factor * result + offset."""
    assert last.bias is not None
    last.weight = nn.Parameter(last.weight * factor)
    last.bias = nn.Parameter(last.bias * factor + offset)
