"""Wan2.1 and Wan2.2 through diffusers' `AutoencoderKLWan`, cut into stages with explicit state.

    x [1, C, 1 + 4n, H, W]  -- encode -->  z [1, D, 1 + n, H/8, W/8]  -- decode -->  x

diffusers runs the network one latent frame at a time and passes every causal convolution its
last frames through a list, `feat_cache`. Here that list is the state: filled from inputs and
returned as outputs, so that each stage is a pure function. A stage ends where the resolution
changes, at the smaller of the two maps. Only the innermost stages, at the latent's resolution,
have attention and need the whole frame.

Differences between the first frame and later ones are removed: a convolution's cache that holds
only one frame gets a zero frame in front; the decoder's marker "Rep" is replaced by the cache of
zeros that it stands for.

Folded into weights: the mean of the posterior and the latent normalisation into the 1x1x1
convolutions next to the latent; replicated input channels into the first layer, and averaged
output channels into the last one where they are not clamped first. diffusers clamps each channel
to [-1, 1], and so do exported graphs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Averaging, Geometry, Intensity, LatentNormalisation
from fvae_deploy.export.models.colours import Clamp, clamp_of
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.slicewise import Doubling, fold_pixels

INTENSITY = Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-1.0, model_max=1.0)
UP_BLOCKS = (wan.WanUpBlock, wan.WanResidualUpBlock)


class Causal(nn.Module):
    """A causal convolution outside of diffusers' blocks, with a cache like that of the blocks."""

    def __init__(self, convolution: wan.WanCausalConv3d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Convolve x [1, C, T, H, W]; read and replace this layer's slot of the cache."""
        slot = feat_idx[0]
        past = feat_cache[slot]
        frames = x if past is None else torch.cat([past, x], dim=2)
        feat_cache[slot], feat_idx[0] = frames[:, :, -2:], slot + 1
        if past is None:
            # After zeros, only the last time tap meets the frame. OpenVINO 2026.4 computes the
            # padded form wrongly in bfloat16 for a single channel.
            last, bias = self.convolution.weight[:, :, -1:], self.convolution.bias
            return F.conv3d(x, last, bias, padding=(0, 1, 1))
        result: Tensor = self.convolution(x, past)
        return result


class Plain(nn.Module):
    """A sequence of layers without state."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Apply the layers to x; the cache stays unchanged."""
        for layer in self.layers:
            x = layer(x)
        return x


class Upsample(nn.Module):
    """Upsampling by 2 in space, and in time except for the first frame; replaces diffusers'."""

    def __init__(self, layer: wan.WanResample) -> None:
        super().__init__()
        if layer.mode == "upsample3d":
            self.time_conv = layer.time_conv
        self.doubling = Doubling(layer.resample[1])

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Map x [1, C, T, H, W] to [1, C', T or 2T, 2H, 2W]."""
        if hasattr(self, "time_conv"):
            slot = feat_idx[0]
            past = feat_cache[slot]
            if past is None:  # the first frame is not doubled and not kept in the cache
                feat_cache[slot] = torch.zeros_like(x).repeat(1, 1, 2, 1, 1)
            else:
                feat_cache[slot] = torch.cat([past, x], dim=2)[:, :, -2:]
                doubled = self.time_conv(x, past).unflatten(1, (2, -1))
                x = doubled.movedim(1, 3).flatten(2, 3)
            feat_idx[0] = slot + 1
        result: Tensor = self.doubling(x[0].transpose(0, 1)).transpose(0, 1)[None]
        return result


class Patches(nn.Module):
    """Wan2.2's patches: pixels to channels, or back."""

    def __init__(self, size: int, back: bool) -> None:
        super().__init__()
        self.size, self.turn = size, wan.unpatchify if back else wan.patchify

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to [1, C * size^2, T, H / size, W / size], or back."""
        result: Tensor = self.turn(x, self.size)
        return result


class WanStage(nn.Module):
    """Consecutive layers of encoder or decoder, as one function of data and state."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        # A convolution with time stride 2 needs one frame of state, one with stride 1 two.
        self.frames = [
            2 // m.stride[0]
            for m in self.modules()
            if isinstance(m, wan.WanCausalConv3d) and m.kernel_size[0] > 1
        ]

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map data [1, C, T, H, W] and states [1, C, 1 or 2, H, W] to (data, *states)."""
        cache: list[Any] = list(past) if past else [None] * len(self.frames)
        slot = [0]
        for layer in self.layers:
            options = {} if past or not isinstance(layer, UP_BLOCKS) else {"first_chunk": True}
            x = layer(x, feat_cache=cache, feat_idx=slot, **options)
        return x, *(
            _padded(value, frames) for value, frames in zip(cache, self.frames, strict=True)
        )


def _padded(value: Tensor, frames: int) -> Tensor:
    """Prepend zero frames to a state that has fewer than `frames` frames."""
    missing = frames - value.shape[2]
    if missing < 1:
        return value
    return torch.cat([torch.zeros_like(value[:, :, :missing]), value], dim=2)


def wan_model(
    model: wan.AutoencoderKLWan, channels: int | None = None, clamped: bool = False
) -> Model:
    """Cut the network into stages, folding it in place; `channels` is 1 for gray.

    With `clamped`, output channels are clamped to the model's range before they are averaged.

    Raises BundleError if the latent statistics do not fit the latent channels.
    """
    config = dict(model.config)
    patch = config["patch_size"] or 1
    geometry = Geometry(
        temporal=2 ** sum(config["temperal_downsample"]),
        spatial=patch * 2 ** (len(config["dim_mult"]) - 1),
        latent_channels=config["z_dim"],
        channels=channels or config["in_channels"] // patch**2,
        window=65,
    )
    shift, deviation = config["latents_mean"], config["latents_std"]
    if not len(shift) == len(deviation) == config["z_dim"]:
        raise BundleError(
            f"expected {config['z_dim']} latents_mean and latents_std in the configuration, "
            f"found {len(shift)} and {len(deviation)}: correct config.json"
        )
    latent = LatentNormalisation(tuple(shift), tuple(1 / d for d in deviation))
    averaging = Averaging(clamped and config["out_channels"] // patch**2 > 1)
    kept = {k: v for k, v in config.items() if not k.startswith("_")}
    return Model(
        network=Network("wan", json.loads(json.dumps(kept))),
        geometry=geometry,
        intensity=INTENSITY,
        latent=latent,
        stages=_stages(model, geometry, latent, averaging),
        averaging=averaging,
    )


def rebuild(
    config: Mapping[str, Any],
    geometry: Geometry,
    latent: LatentNormalisation,
    averaging: Averaging,
) -> dict[str, nn.Module]:
    """Build the stages of an exported bundle, without weights."""
    return _stages(wan.AutoencoderKLWan(**config), geometry, latent, averaging)


def _stages(
    model: wan.AutoencoderKLWan,
    geometry: Geometry,
    latent: LatentNormalisation,
    averaging: Averaging,
) -> dict[str, nn.Module]:
    """Fold the network in place and return the stages `encode0`, ... and `decode0`, ..."""
    with torch.no_grad():
        _fold_latent(
            model.quant_conv,
            model.post_quant_conv,
            torch.tensor(latent.shift, dtype=torch.float64),
            torch.tensor(latent.scale, dtype=torch.float64),
        )
        patch = model.config.patch_size or 1
        if geometry.channels == 1:
            last = None if averaging.clamped else model.decoder.conv_out
            fold_pixels(model.encoder.conv_in, last, patch**2)
        colours = model.config.out_channels // patch**2
        clamp = clamp_of(averaging, geometry, INTENSITY, colours)
        stages = {f"encode{i}": WanStage(s) for i, s in enumerate(_encoder_stages(model, patch))}
        stages |= {
            f"decode{i}": WanStage(s) for i, s in enumerate(_decoder_stages(model, patch, clamp))
        }
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}


def _encoder_stages(model: wan.AutoencoderKLWan, patch: int) -> Iterator[list[nn.Module]]:
    """Yield the layers of each stage of the encoder."""
    encoder = model.encoder
    layers: list[nn.Module] = [Plain(Patches(patch, back=False))] if patch > 1 else []
    layers.append(Causal(encoder.conv_in))
    for block in encoder.down_blocks:
        layers.append(Plain(block) if isinstance(block, wan.WanAttentionBlock) else block)
        if isinstance(block, wan.WanResample) or getattr(block, "downsampler", None) is not None:
            yield layers
            layers = []
    head = [
        encoder.mid_block,
        Plain(encoder.norm_out, encoder.nonlinearity),
        Causal(encoder.conv_out),
        Plain(model.quant_conv),
    ]
    yield layers + head


def _decoder_stages(
    model: wan.AutoencoderKLWan, patch: int, clamp: Clamp | None
) -> Iterator[list[nn.Module]]:
    """Yield the layers of each stage of the decoder."""
    decoder = model.decoder
    layers: list[nn.Module] = [
        Plain(model.post_quant_conv),
        Causal(decoder.conv_in),
        decoder.mid_block,
    ]
    for block in decoder.up_blocks:
        if isinstance(block, wan.WanResidualUpBlock):  # its shortcut spans the upsampling
            layers.append(block)
            if block.upsampler is not None:
                block.upsampler = Upsample(block.upsampler)
                yield layers
                layers = []
            continue
        layers += block.resnets
        if block.upsamplers is not None:
            yield layers
            layers = [Upsample(block.upsamplers[0])]
    layers += [Plain(decoder.norm_out, decoder.nonlinearity), Causal(decoder.conv_out)]
    layers += [] if clamp is None else [Plain(clamp)]
    yield [*layers, Plain(Patches(patch, back=True))] if patch > 1 else layers


def _fold_latent(last: Any, first: Any, shift: Tensor, scale: Tensor) -> None:
    """Make latents (mean - shift) * scale; the mean is the posterior's first half."""
    moved = first.bias + first.weight.flatten(1).double() @ shift.double()
    shift, scale = shift.to(last.weight), scale.to(last.weight)
    weight, bias = last.weight[: len(shift)], last.bias[: len(shift)]
    last.weight = nn.Parameter(weight * scale.view(-1, 1, 1, 1, 1))
    last.bias = nn.Parameter((bias - shift) * scale)
    first.bias = nn.Parameter(moved.to(first.bias))
    first.weight = nn.Parameter(first.weight / scale.view(1, -1, 1, 1, 1))
