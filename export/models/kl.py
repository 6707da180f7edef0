"""diffusers' `AutoencoderKL` (Stable Diffusion, SDXL, SD3, FLUX), slice by slice.

    x [1, C, k, H, W]  -- encode -->  z [1, D, k, h, w]  -- decode -->  x

The slices are a batch and do not influence each other. Encoder and decoder are one stage each:
every group normalisation takes its statistics over the whole slice. Where a slice does not fit,
they run in segments (docs/adr/0027-graphs-cut-by-themselves.md).

These operations are folded into weights:

- the mean of the posterior, `quant_conv` and the latent normalisation into the encoder's last
  convolution;
- the inverse normalisation into `post_quant_conv`. A network without it gets an identity there,
  since the next convolution pads with zeros and therefore cannot absorb a shift;
- replicated input channels into the first layer, and averaged output channels into the last one
  where they are not clamped first;
- upsampling into smaller convolutions.

For pipelines of diffusers the bundle keeps what `AutoencoderKL` itself returns: `moments`, mean and
log-variance of the posterior, as 2 * D latent channels without a normalisation, of which the
decoder reads the first D.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Averaging, Geometry, Intensity, LatentNormalisation
from fvae_deploy.export.models.colours import clamp_of
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.slicewise import Doubling, Slices, channels_of, fold_pixels

INTENSITY = Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-1.0, model_max=1.0)
DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


class Linear(nn.Module):
    """A linear layer with its weight transposed, so that a graph needs no transposed copy of it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map x [k, n, C] to [k, n, D]."""
        return x @ self.weight + self.bias


def kl_model(
    model: AutoencoderKL,
    channels: int | None = None,
    clamped: bool = False,
    moments: bool = False,
) -> Model:
    """Take the network as two stages, folding it in place; `channels` is 1 for gray.

    With `clamped`, output channels are clamped to the model's range before they are averaged. With
    `moments`, latents are mean and log-variance.

    Raises BundleError for blocks that are not of this family, or input and output channels
    that differ and are not folded.
    """
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    for name, known in (("down_block_types", DOWN), ("up_block_types", UP)):
        foreign = sorted(set(config[name]) - set(known))
        if foreign:
            raise BundleError(
                f"expected {name} among {', '.join(known)}, found {', '.join(foreign)}: export "
                "it from Python code with --model module:factory"
            )
    count = config["latent_channels"] * (2 if moments else 1)
    geometry = Geometry(
        temporal=1,
        spatial=2 ** (len(config["block_out_channels"]) - 1),
        latent_channels=count,
        channels=channels_of(config, channels),
        window=65,
    )
    latent = LatentNormalisation((0.0,) * count, (1.0,) * count)
    if not moments:
        latent = _normalisation(config)
    averaging = Averaging(clamped and config["out_channels"] > 1)
    return Model(
        network=Network("kl", json.loads(json.dumps(config))),
        geometry=geometry,
        intensity=INTENSITY,
        latent=latent,
        stages=_stages(model, geometry, latent, averaging),
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
    return _stages(AutoencoderKL(**config), geometry, latent, averaging)


def _normalisation(config: Mapping[str, Any]) -> LatentNormalisation:
    """Return diffusers' normalisation: statistics per channel, or one shift and one factor."""
    count, factor = config["latent_channels"], config["scaling_factor"]
    mean, deviation = config["latents_mean"], config["latents_std"]
    if mean is None or deviation is None:
        mean, deviation = (config["shift_factor"] or 0.0,) * count, (1.0,) * count
    if not len(mean) == len(deviation) == count:
        raise BundleError(
            f"expected {count} latents_mean and latents_std in the configuration, found "
            f"{len(mean)} and {len(deviation)}: correct config.json"
        )
    return LatentNormalisation(
        tuple(float(m) for m in mean), tuple(float(factor / d) for d in deviation)
    )


def _stages(
    model: AutoencoderKL,
    geometry: Geometry,
    latent: LatentNormalisation,
    averaging: Averaging,
) -> dict[str, nn.Module]:
    """Fold the network in place and return the stages `encode` and `decode`."""
    encoder, decoder = model.encoder, model.decoder
    clamp = clamp_of(averaging, geometry, INTENSITY, decoder.conv_out.out_channels)
    with torch.no_grad():
        shift, scale = (torch.tensor(v, dtype=torch.float64) for v in (latent.shift, latent.scale))
        _fold_posterior(encoder.conv_out, model.quant_conv, shift, scale)
        inner = decoder.conv_in
        first = _fold_inverse(
            model.post_quant_conv, inner.in_channels, inner.weight.dtype, shift, scale
        )
        if geometry.channels == 1:
            fold_pixels(encoder.conv_in, None if averaging.clamped else decoder.conv_out, 1)
        for block in decoder.up_blocks:
            if block.upsamplers is not None:
                block.upsamplers = nn.ModuleList(Doubling(u.conv) for u in block.upsamplers)
        for module in model.modules():
            if isinstance(module, Attention):
                for name in ("to_q", "to_k", "to_v"):
                    setattr(module, name, Linear(getattr(module, name)))
                module.to_out[0] = Linear(module.to_out[0])
        last = [] if clamp is None else [clamp]
        stages = {"encode": Slices([encoder]), "decode": Slices([first, decoder, *last])}
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}


def _fold_posterior(last: nn.Conv2d, quant: nn.Conv2d | None, shift: Tensor, scale: Tensor) -> None:
    """Make the encoder return (mean - shift) * scale; the mean is the first half of its output.

    Of moments, which have twice the channels, it returns both halves.
    """
    assert last.bias is not None
    count, dtype = len(shift), last.weight.dtype
    weight, bias = last.weight.double(), last.bias.double()
    if quant is None:
        weight, bias = weight[:count], bias[:count]
    else:
        assert quant.bias is not None
        mix = quant.weight[:count, :, 0, 0].double()
        weight, bias = torch.einsum("om,mirc->oirc", mix, weight), mix @ bias + quant.bias[:count]
    last.weight = nn.Parameter((weight * scale.view(-1, 1, 1, 1)).to(dtype))
    last.bias = nn.Parameter(((bias - shift) * scale).to(dtype))


def _fold_inverse(
    quant: nn.Conv2d | None, channels: int, dtype: torch.dtype, shift: Tensor, scale: Tensor
) -> nn.Conv2d:
    """Return the decoder's first 1x1 convolution, with stored / scale + shift folded into it.

    It has one input for each of `shift`, of which those beyond `channels`, log-variances, count
    nothing.
    """
    mix, bias = torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if quant is not None:
        assert quant.bias is not None
        mix, bias = quant.weight[:, :, 0, 0].double(), quant.bias.double()
    mix = torch.cat([mix, mix.new_zeros(channels, len(shift) - channels)], dim=1)
    first = nn.Conv2d(len(shift), channels, 1)
    first.weight = nn.Parameter((mix / scale)[:, :, None, None].to(dtype))
    first.bias = nn.Parameter((bias + mix @ shift).to(dtype))
    return first
