"""VidTok's causal networks, cut into stages: causal streams (version 1.0), or windows (1.1).

    x [1, C, 1 + 4n, H, W]  -- encode -->  z [1, D, 1 + n, H/8, W/8]  -- decode -->  x

The published code runs a clip at once. It repeats the first slice, so that the first latent frame
stands for 4 copies of it, and drops the first 3 of 4 slices that the decoder makes of that frame.
Every layer normalisation and every attention sees one frame alone, and every convolution along
time looks back only, so the last frames of the convolutions' inputs are all the state there is.

Version 1.0 pads convolutions in time with zeros and doubles frames by repeating them: a stream.
Version 1.1 pads with the first frame of each map, and its decoder interpolates frames linearly:
a slice depends on the next latent frame. Since a stream cannot look ahead, it takes windows, each
as the published code takes a clip of that length.

A stage ends where the plane's resolution changes, at the smaller of the two maps. The innermost
stages have attention and take the whole plane; all others run in exact tiles.

Folded into weights: the mean of the posterior; replicated input channels, and averaged output
channels where they are not clamped first; in changes of the frame rate, the average or the
repetition that is mixed with a convolution; upsampling into smaller convolutions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Averaging, Geometry, Intensity, LatentNormalisation
from fvae_deploy.export.models.colours import clamp_of
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.slicewise import fold_pixels
from fvae_deploy.export.models.tape import Tape, TapedStage
from fvae_deploy.export.models.vidtok_layers import (
    BOTH,
    FRAME,
    TIME,
    Attention,
    BlendingTime,
    Bound,
    Causal,
    Closing,
    Codes,
    DoublingPlane,
    DoublingTime,
    Halving,
    Mixed,
    Norm,
    Opening,
    Residual,
    Size,
    Taped,
)

INTENSITY = Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-1.0, model_max=1.0)
# Slices per window: the published script's default, and the clips that 1.1 was trained on for.
WINDOWS = {"1.0": 17, "1.1": 65}


@dataclass(frozen=True)
class VidTokConfig:
    """The layers of a network; levels are counted from the full resolution, 0.

    `widths` are the channels of the levels. Encoder levels in `down` halve the plane, those in
    `down_time` the frames too; decoder levels in `up` and `up_time` double them.
    """

    version: str
    colours: int
    first: int  # channels after the encoder's first layer
    widths: tuple[int, ...]
    blocks: int  # per level of the encoder; the decoder has one more
    latent_channels: int
    quantised: bool
    down: tuple[int, ...]
    down_time: tuple[int, ...]
    up: tuple[int, ...]
    up_time: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise ValueError if the two halves do not belong together."""
        if self.version not in WINDOWS:
            raise ValueError(f"version {self.version!r:.20}")
        if len(self.down) != len(self.up) or len(self.down_time) != len(self.up_time):
            raise ValueError(
                f"{len(self.down)} halvings of the plane and {len(self.down_time)} of the frames, "
                f"but {len(self.up)} and {len(self.up_time)} doublings"
            )

    @property
    def temporal(self) -> int:
        """Slices per latent frame."""
        return 1 << len(self.down_time)


def config_of(shapes: Mapping[str, Sequence[int]], version: str) -> VidTokConfig:
    """Return the layers that tensors of these shapes belong to.

    Raises ValueError and KeyError for tensors of another network.
    """

    def count(pattern: str) -> int:
        number = 0
        while pattern.format(number) in shapes:
            number += 1
        return number

    def having(pattern: str) -> tuple[int, ...]:
        return tuple(i for i in range(levels) if pattern.format(i) in shapes)

    levels = count("encoder.down.{}.block.0.conv1.weight")
    latent = shapes["decoder.conv_in.conv.weight"][1]
    moments = shapes["encoder.conv_out.conv.weight"][0]
    if moments not in (latent, 2 * latent):
        raise ValueError(f"{moments} channels out of the encoder, {latent} into the decoder")
    return VidTokConfig(
        version=version,
        colours=shapes["encoder.conv_in.conv.weight"][1],
        first=shapes["encoder.conv_in.conv.weight"][0],
        widths=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        blocks=count("encoder.down.0.block.{}.conv1.weight"),
        latent_channels=latent,
        quantised=moments == latent,
        down=having("encoder.down.{}.downsample.conv.weight"),
        down_time=having("encoder.down_temporal.{}.downsample.conv.conv.weight"),
        up=having("decoder.up.{}.upsample.conv.weight"),
        up_time=having("decoder.up_temporal.{}.upsample.conv.conv.weight"),
    )


class VidTok(nn.Module):
    """The layers of encoder and decoder, under the names of the published checkpoints."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.config = config
        widths, last = config.widths, config.widths[-1]
        down, down_time, up, up_time = [], [], [], []
        before = (config.first, *widths)
        for i, width in enumerate(widths):
            halving = {"downsample": Halving(width)} if i in config.down else {}
            time = {"downsample": Mixed(width, 2)} if i in config.down_time else {}
            down.append(_level(before[i], width, config.blocks, FRAME, halving))
            down_time.append(_level(width, width, config.blocks, TIME, time))
            inside = (*widths, last)[i + 1]
            plane = {"conv": nn.Conv3d(width, width, FRAME)}
            doubling = {"upsample": nn.ModuleDict(plane)} if i in config.up else {}
            time = {"upsample": Mixed(width, 1)} if i in config.up_time else {}
            up.append(_level(inside, width, config.blocks + 1, FRAME, doubling))
            up_time.append(_level(width, width, config.blocks + 1, TIME, time))
        moments = config.latent_channels * (1 if config.quantised else 2)
        self.encoder: Any = nn.ModuleDict(
            {
                "conv_in": Causal(config.colours, config.first),
                "down": nn.ModuleList(down),
                "down_temporal": nn.ModuleList(down_time),
                "mid": _middle(last),
                "norm_out": Norm(last),
                "conv_out": Causal(last, moments),
            }
        )
        self.decoder: Any = nn.ModuleDict(
            {
                "conv_in": Causal(config.latent_channels, last),
                "mid": _middle(last),
                "up": nn.ModuleList(up),
                "up_temporal": nn.ModuleList(up_time),
                "norm_out": Norm(widths[0]),
                "conv_out": Causal(widths[0], config.colours),
            }
        )


def vidtok_model(model: VidTok, channels: int | None = None, clamped: bool = False) -> Model:
    """Cut the network into stages, folding it in place; `channels` is 1 for gray.

    With `clamped`, output channels are clamped to the model's range before they are averaged.
    """
    config = model.config
    window, stream = WINDOWS[config.version], config.version == "1.0"
    geometry = Geometry(
        temporal=config.temporal,
        spatial=2 ** len(config.down),
        latent_channels=config.latent_channels,
        channels=channels or config.colours,
        window=window,
        first_slices=1 if stream else window,
        first_frames=1 if stream else 1 + (window - 1) // config.temporal,
    )
    count = config.latent_channels
    averaging = Averaging(clamped and config.colours > 1)
    return Model(
        network=Network("vidtok", json.loads(json.dumps(dataclasses.asdict(config)))),
        geometry=geometry,
        intensity=INTENSITY,
        latent=LatentNormalisation((0.0,) * count, (1.0,) * count),
        stages=_stages(model, geometry, averaging),
        kinds=("first", "step") if stream else ("first",),
        any_step=stream,
        averaging=averaging,
    )


def rebuild(
    config: Mapping[str, Any],
    geometry: Geometry,
    latent: LatentNormalisation,
    averaging: Averaging,
) -> dict[str, nn.Module]:
    """Build the stages of an exported bundle, without weights."""
    return _stages(VidTok(VidTokConfig(**config)), geometry, averaging)


def _stages(model: VidTok, geometry: Geometry, averaging: Averaging) -> dict[str, nn.Module]:
    """Fold the network in place and return the stages `encode0`, ... and `decode0`, ..."""
    config, count = model.config, model.config.latent_channels
    with torch.no_grad():
        last = model.encoder["conv_out"].conv
        last.weight = nn.Parameter(last.weight[:count])
        last.bias = nn.Parameter(last.bias[:count])
        if geometry.channels == 1:
            end = None if averaging.clamped else model.decoder["conv_out"].conv
            fold_pixels(model.encoder["conv_in"].conv, end, 1)
        clamp = clamp_of(averaging, geometry, INTENSITY, config.colours)
        stages: dict[str, nn.Module] = {}
        for direction, cut in (
            ("encode", _encoder_layers(model)),
            ("decode", _decoder_layers(model, [] if clamp is None else [clamp])),
        ):
            for i, layers in enumerate(cut):
                tape = Tape()
                stage = TapedStage(layers, tape, stream=geometry.first_slices == 1)
                for layer in stage.modules():
                    if isinstance(layer, Taped):
                        layer.tape, layer.repeat = tape, config.version != "1.0"
                stages[f"{direction}{i}"] = stage
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}


def _encoder_layers(model: VidTok) -> Iterator[list[nn.Module]]:
    """Yield the layers of each stage of the encoder."""
    encoder, config = model.encoder, model.config
    layers: list[nn.Module] = [Opening(config.temporal), encoder["conv_in"]]
    for level, time in zip(encoder["down"], encoder["down_temporal"], strict=True):
        layers += _alternating(level, time)
        halves = "downsample" in level
        if halves:
            layers.append(level["downsample"])
        if "downsample" in time:
            layers.append(time["downsample"].folded((1 / 3, 1 / 3, 1 / 3)))
        if halves:
            yield layers
            layers = []
    layers += [*encoder["mid"].values(), encoder["norm_out"], encoder["conv_out"]]
    yield [*layers, Bound()] if config.quantised else layers


def _decoder_layers(model: VidTok, ends: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yield the layers of each stage of the decoder."""
    decoder, config = model.decoder, model.config
    layers: list[nn.Module] = [Codes()] if config.quantised else []
    layers += [decoder["conv_in"], *decoder["mid"].values()]
    first = 1  # frames of the first latent frame
    pairs = zip(decoder["up"], decoder["up_temporal"], strict=True)
    for level, time in reversed(list(pairs)):
        layers += _alternating(level, time)
        if "upsample" in level:
            yield layers
            layers = [DoublingPlane(level["upsample"]["conv"])]
        if "upsample" in time:
            convolution = time["upsample"].folded((0, 0, 1))
            stream = config.version == "1.0"
            layers.append(DoublingTime(convolution) if stream else BlendingTime(convolution, first))
            first *= 2
    yield [*layers, decoder["norm_out"], decoder["conv_out"], Closing(config.temporal), *ends]


def _alternating(level: Any, time: Any) -> list[nn.Module]:
    """Return a level's blocks: each one of the plane is followed by one along time."""
    pairs = zip(level["block"], time["block"], strict=True)
    return [block for pair in pairs for block in pair]


def _level(inside: int, outside: int, count: int, size: Size, end: dict[str, Any]) -> nn.ModuleDict:
    blocks = [Residual(inside if i == 0 else outside, outside, size) for i in range(count)]
    return nn.ModuleDict({"block": nn.ModuleList(blocks), **end})


def _middle(channels: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "block_1": Residual(channels, channels, BOTH),
            "attn_1": Attention(channels),
            "block_2": Residual(channels, channels, BOTH),
        }
    )
