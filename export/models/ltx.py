"""The VAEs of LTX-Video and LTX-2, cut into stages: streams, causal or with a decoder that is late.

    x [1, C, 1 + 8n, H, W]  -- encode -->  z [1, D, 1 + n, H/32, W/32]  -- decode -->  x

diffusers' `AutoencoderKLLTXVideo` and `AutoencoderKLLTX2Video` run a clip at once. Every
convolution pads in time by repeating the first frame, if it is causal, or the first and the last.
A causal half (every encoder by default) is a stream: the last frames of every convolution's input
are its state, and only the first part repeats a frame. The first part also treats changes of the
number of frames apart, as diffusers does: a halving repeats its first frames, and a doubling drops
its first ones.

In a decoder that is not causal (the default of LTX-Video) a frame depends on later ones: it is a
stream that looks ahead, whose slices come late (`late.py`). A network whose encoder is not causal
takes windows of 65 slices, each as diffusers would take it.

A stage ends where the resolution changes. Nothing normalises over the plane and nothing attends,
so all stages run in exact tiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Averaging, Geometry, Intensity, LatentNormalisation
from fvae_deploy.export.models.colours import clamp_of
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.late import Delay, held
from fvae_deploy.export.models.slicewise import channels_of, fold_pixels
from fvae_deploy.export.models.tape import Tape, TapedStage

INTENSITY = Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-1.0, model_max=1.0)
CLASSES = ("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video")
WINDOW = 65


class Convolution(nn.Module):
    """A convolution with diffusers' padding in time, and with its state in a stream.

    With a delay, a stream looks ahead.
    """

    def __init__(self, layer: Any, tape: Tape, causal: bool, delay: Delay | None = None) -> None:
        super().__init__()
        self.conv, self.tape, self.causal = layer.conv, tape, causal
        self.ahead = self.conv.kernel_size[0] // 2
        self.delay = delay.after(self.ahead) if delay else None

    def forward(self, x: Tensor, causal: bool | None = None) -> Tensor:
        """Convolve x [1, C, T, H, W]; `causal` is diffusers' argument and is not used."""
        width, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if width > 1 and self.delay:
            x = self.delay.with_past(self.tape, x, width - 1)
        elif width > 1 and not self.causal:
            sides = (x[:, :, i:j].repeat(1, 1, width // 2, 1, 1) for i, j in ((0, 1), (-1, None)))
            first, last = sides
            x = torch.cat([first, x, last], dim=2)
        elif width > 1:
            x = torch.cat([self.tape.take(x, width - 1), x], dim=2)
            self.tape.next.append(x[:, :, stride - width :])
        y: Tensor = self.conv(x)
        return y


class Downsampler(nn.Module):
    """diffusers' downsampler: pixels to channels, of the input averaged and of a convolution."""

    def __init__(self, layer: Any, tape: Tape, causal: bool, delay: Delay | None = None) -> None:
        super().__init__()
        self.conv, self.tape = Convolution(layer.conv, tape, causal), tape
        self.stride, self.group = tuple(layer.stride), layer.group_size

    def forward(self, x: Tensor, causal: bool | None = None) -> Tensor:
        """Map x [1, C, T, H, W] to fewer frames, rows and columns, and more channels."""
        if not self.tape.past:
            x = torch.cat([x[:, :, : self.stride[0] - 1], x], dim=2)
        average = self._fold(x).unflatten(1, (-1, self.group)).mean(dim=2)
        y: Tensor = self._fold(self.conv(x)) + average
        return y

    def _fold(self, x: Tensor) -> Tensor:
        for axis in (4, 3, 2):
            x = x.unflatten(axis, (-1, self.stride[axis - 2]))
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


class Upsampler(nn.Module):
    """diffusers' upsampler: a convolution, and channels to pixels; the input added if residual."""

    def __init__(self, layer: Any, tape: Tape, causal: bool, delay: Delay | None = None) -> None:
        super().__init__()
        self.conv, self.tape = Convolution(layer.conv, tape, causal, delay), tape
        self.stride, self.residual = tuple(layer.stride), layer.residual
        t, h, w = self.stride
        self.repeats = t * h * w // layer.upscale_factor
        self.drops = delay is None  # later, a stream that looks ahead drops them at its end
        if delay:
            delay.multiplied(t)

    def forward(self, x: Tensor, causal: bool | None = None) -> Tensor:
        """Map x [1, C, T, H, W] to more frames, rows and columns, and fewer channels."""
        y = self._unfold(self.conv(x))
        if not self.residual:
            return y
        if self.conv.delay:
            x = held(self.tape, x, self.conv.ahead)
        return y + self._unfold(x).repeat(1, self.repeats, 1, 1, 1)

    def _unfold(self, x: Tensor) -> Tensor:
        _, _, frames, height, width = x.shape
        x = x.reshape(1, -1, *self.stride, frames, height, width)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, self.stride[0] - 1 :] if self.drops and not self.tape.past else x


class NormAct(nn.Module):
    """A norm over channels, and the activation before a convolution."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, act
        self.last = type(norm).__name__ == "RMSNorm"  # LTX-Video's norm takes channels last

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to the same shape."""
        x = self.norm(x.movedim(1, -1)).movedim(-1, 1) if self.last else self.norm(x)
        y: Tensor = self.act(x)
        return y


class Residual(nn.Module):
    """diffusers' residual block, whose input waits for the convolutions that look ahead."""

    def __init__(self, layer: Any, tape: Tape, causal: bool, delay: Delay) -> None:
        super().__init__()
        self.tape, self.norm3 = tape, layer.norm3
        self.act1, self.act2 = (NormAct(n, layer.nonlinearity) for n in (layer.norm1, layer.norm2))
        self.conv1, self.conv2 = (
            Convolution(conv, tape, causal, delay) for conv in (layer.conv1, layer.conv2)
        )
        shortcut = layer.conv_shortcut
        self.shortcut = getattr(shortcut, "conv", shortcut)  # one frame wide

    def forward(self, x: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
        """Map x [1, C, T, H, W] to [1, D, T, H, W]; diffusers' further arguments are not used."""
        y: Tensor = self.conv2(self.act2(self.conv1(self.act1(x))))
        x = held(self.tape, x, self.conv1.ahead + self.conv2.ahead)
        if self.norm3 is not None:
            x = self.norm3(x.movedim(1, -1)).movedim(-1, 1)
        waited: Tensor = x if self.shortcut is None else self.shortcut(x)
        return y + waited


class Patches(nn.Module):
    """Pixels to channels, or back; in a patch, rows vary fastest among the channels."""

    def __init__(self, size: int, back: bool) -> None:
        super().__init__()
        self.size, self.back = size, back

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, C, T, H, W] to [1, C * size^2, T, H / size, W / size], or back."""
        p = self.size
        if self.back:
            x = x.unflatten(1, (-1, p, p))  # [1, C, p (w), p (h), T, H, W]
            return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # [1, C, T, H, p, W, p]
        return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


class Unscale(nn.Module):
    """Undo the latent normalisation: stored / scale + shift."""

    def __init__(self, latent: LatentNormalisation) -> None:
        super().__init__()
        with torch.device("cpu"):
            scale, shift = torch.tensor(latent.scale), torch.tensor(latent.shift)
        self.scale = nn.Parameter((1 / scale).view(-1, 1, 1, 1), requires_grad=False)
        self.shift = nn.Parameter(shift.view(-1, 1, 1, 1), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        """Map z [1, D, t, h, w] to the same shape."""
        return z * self.scale + self.shift


def ltx_model(model: Any, channels: int | None = None, clamped: bool = False) -> Model:
    """Cut the network into stages, folding it in place; `channels` is 1 for gray.

    With `clamped`, output channels are clamped to the model's range before they are averaged.
    Raises BundleError for a network that draws noise, takes a timestep, or joins frames in
    patches, and for halves that change the resolution differently.
    """
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    _check(config)
    factors = [
        tuple(_product(half, axis) for axis in (0, 1))
        for half in (model.encoder.down_blocks, model.decoder.up_blocks)
    ]
    if factors[0] != factors[1]:
        raise BundleError(
            f"expected a decoder that undoes the encoder's strides in time and plane, "
            f"{factors[0]}, found {factors[1]}: take the config.json of the weights"
        )
    temporal, spatial = factors[0]
    stream = bool(config["encoder_causal"])
    geometry = Geometry(
        temporal=temporal,
        spatial=config["patch_size"] * spatial,
        latent_channels=config["latent_channels"],
        channels=channels_of(config, channels),
        window=WINDOW,
        first_slices=1 if stream else WINDOW,
        first_frames=1 if stream else 1 + (WINDOW - 1) // temporal,
    )
    mean, deviation = (v.double().tolist() for v in (model.latents_mean, model.latents_std))
    factor = float(config["scaling_factor"])
    latent = LatentNormalisation(tuple(mean), tuple(factor / d for d in deviation))
    averaging = Averaging(clamped and config["out_channels"] > 1)
    kept = {"class": type(model).__name__, **config}
    stages, lags = _stages(model, geometry, latent, averaging)
    return Model(
        network=Network("ltx", json.loads(json.dumps(kept))),
        geometry=geometry,
        intensity=INTENSITY,
        latent=latent,
        stages=stages,
        kinds=("first", "step") if stream else ("first",),
        any_step=stream and not lags,
        averaging=averaging,
        lags=lags,
    )


def rebuild(
    config: Mapping[str, Any],
    geometry: Geometry,
    latent: LatentNormalisation,
    averaging: Averaging,
) -> dict[str, nn.Module]:
    """Build the stages of an exported bundle, without weights."""
    options = dict(config)
    kind = options.pop("class")
    if kind not in CLASSES:
        raise ValueError(f"the class {kind!r:.40}")
    return _stages(getattr(diffusers, kind)(**options), geometry, latent, averaging)[0]


def _check(config: Mapping[str, Any]) -> None:
    """Raise BundleError for what a stage cannot do."""
    noise = config["decoder_inject_noise"]
    for unwanted, what in (
        (config["timestep_conditioning"], "a decoder that takes a timestep"),
        (noise if isinstance(noise, bool) else any(noise), "a decoder that draws noise"),
        (config["patch_size_t"] != 1, f"patches of {config['patch_size_t']} frames"),
    ):
        if unwanted:
            raise BundleError(
                f"expected a VAE that maps each clip to one result, frame by frame, found {what}: "
                "export it from Python code with --model module:factory"
            )


def _samplers(block: Any) -> list[Any]:
    """Return the layers of a block that change the resolution."""
    return list(getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or ())


def _stride(sampler: Any) -> tuple[int, ...]:
    """Return a sampler's stride in time, height and width."""
    return tuple(sampler.stride if hasattr(sampler, "stride") else sampler.conv.stride)


def _product(blocks: Any, axis: int) -> int:
    """Return how much the blocks change the number of frames (axis 0) or rows (1)."""
    factor = 1
    for block in blocks:
        for sampler in _samplers(block):
            factor *= _stride(sampler)[axis]
    return factor


def _stages(
    model: Any, geometry: Geometry, latent: LatentNormalisation, averaging: Averaging
) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """Fold the network in place and return the stages `encode0`, ... and `decode0`, ...

    Returns also by how many frames the results of those stages come late that look ahead.
    """
    encoder, decoder, patch = model.encoder, model.decoder, model.config.patch_size
    stream = geometry.first_slices == 1
    with torch.no_grad():
        _fold_latent(encoder.conv_out.conv, latent)
        if geometry.channels == 1:
            last = None if averaging.clamped else decoder.conv_out.conv
            fold_pixels(encoder.conv_in.conv, last, patch * patch)
    clamp = clamp_of(averaging, geometry, INTENSITY, model.config.out_channels)
    ends = [*([] if clamp is None else [clamp]), Patches(patch, back=True)]
    stages: dict[str, nn.Module] = {}
    lags: dict[str, int] = {}
    for direction, causal, cut in (
        ("encode", model.config.encoder_causal, _encoder_layers(encoder, patch)),
        ("decode", model.config.decoder_causal, _decoder_layers(decoder, Unscale(latent), ends)),
    ):
        delay = Delay() if stream and not causal else None
        for i, layers in enumerate(cut):
            tape = Tape()
            replaced = [_replaced(layer, tape, causal, delay) for layer in layers]
            stages[f"{direction}{i}"] = TapedStage(replaced, tape, stream, delay is not None)
            if delay:
                lags[f"{direction}{i}"] = delay.frames
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}, lags


def _encoder_layers(encoder: Any, patch: int) -> Iterator[list[nn.Module]]:
    """Yield the layers of each stage of the encoder."""
    layers: list[nn.Module] = [Patches(patch, back=False), encoder.conv_in]
    for block in encoder.down_blocks:
        layers.append(block)
        if any(_stride(sampler)[1] > 1 for sampler in _samplers(block)):
            yield layers
            layers = []
    yield [
        *layers,
        encoder.mid_block,
        NormAct(encoder.norm_out, encoder.conv_act),
        encoder.conv_out,
    ]


def _decoder_layers(
    decoder: Any, unscale: Unscale, ends: list[nn.Module]
) -> Iterator[list[nn.Module]]:
    """Yield the layers of each stage of the decoder."""
    layers: list[nn.Module] = [unscale, decoder.conv_in, decoder.mid_block]
    for block in decoder.up_blocks:
        if any(_stride(sampler)[1] > 1 for sampler in _samplers(block)):
            yield layers
            layers = []
        layers.append(block)
    layers += [NormAct(decoder.norm_out, decoder.conv_act), decoder.conv_out]
    yield layers + ends


def _replaced(layer: nn.Module, tape: Tape, causal: bool, delay: Delay | None) -> nn.Module:
    """Return the layer's replacement that uses a tape; of other layers, replace the children.

    Children are in the order in which they run, except in residual blocks.
    """
    for ending, replacement in (
        ("CausalConv3d", Convolution),
        ("Downsampler3d", Downsampler),
        ("Upsampler3d", Upsampler),
    ):
        if type(layer).__name__.endswith(ending):
            return replacement(layer, tape, causal, delay)
    if delay and type(layer).__name__.endswith("ResnetBlock3d"):
        return Residual(layer, tape, causal, delay)
    for name, child in list(layer.named_children()):
        setattr(layer, name, _replaced(child, tape, causal, delay))
    return layer


def _fold_latent(last: nn.Conv3d, latent: LatentNormalisation) -> None:
    """Make the encoder return (mean - shift) * scale; the mean is the first part of its output."""
    assert last.bias is not None
    count = len(latent.shift)
    with torch.device("cpu"):
        shift, scale = (torch.tensor(v, dtype=torch.float64) for v in (latent.shift, latent.scale))
    shift, scale = shift.to(last.weight), scale.to(last.weight)
    last.weight = nn.Parameter(last.weight[:count] * scale.view(-1, 1, 1, 1, 1))
    last.bias = nn.Parameter((last.bias[:count] - shift) * scale)
