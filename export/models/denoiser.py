"""The denoiser of the latent diffusion model: a pseudo-3-D U-Net, 2-D with convolutions in time.

    x, mask_latent [f, D, h, w], time [1, W], context [tokens, dim]  -->  noise [f, D, h, w]

The U-Net is that of latent diffusion (Rombach et al., 2022), with 2-D convolutions on every latent
frame. Each 3x3 convolution is followed by a convolution over three frames at every pixel,
reflected at both ends of the window. Attention is within a frame, to itself and to the text.

The published code has frames as batch; here the network is computed as one volume
[1, C, f, h, w]. Runtimes then keep one layout from end to end, while convolutions along the batch
spent half of the time on reordering (docs/log.md). Attention reads the same memory as tokens
[f, h * w, C]. `fold` turns all convolutions into 3-D ones for this; before that, in training, they
have the form that is fastest in eager torch.

The text's keys and values depend neither on the frame nor on the step, so they are a separate
part, computed once per generation (`models.denoiser_parts`); the result is the same. Time enters
as the reference's sinusoidal embedding (`export.generator.timestep_embedding`), computed outside:
inside, in half precision, neighbouring times would become equal.

Parameter names are those of the published checkpoints (`model.diffusion_model.*`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.models.denoiser_layers import (
    GEGLU,
    GROUPS,
    AlongFrames,
    Attention,
    Downsample,
    FrameNorm,
    InFrame,
    ResBlock,
    SpatialTransformer,
    Transformer,
    Upsample,
)

# Options of latent diffusion that these networks do not use, with the values that switch them off.
UNUSED: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "num_classes": (None,),
    "use_scale_shift_norm": (False,),
    "resblock_updown": (False,),
    "conv_resample": (True,),
    "use_spatial_transformer": (True,),
    "n_embed": (None,),
    "legacy": (False,),
}


@dataclass(frozen=True)
class DenoiserConfig:
    """The architecture, by the names of the reference's `unet_config`."""

    in_channels: int
    out_channels: int
    model_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]  # downsampling factors
    channel_mult: tuple[int, ...]
    num_head_channels: int
    context_dim: int
    transformer_depth: int = 1

    def __post_init__(self) -> None:
        widths = [m * self.model_channels for m in self.channel_mult]
        for divisor, what in ((GROUPS, "groups of a norm"), (self.num_head_channels, "heads")):
            if any(width % divisor for width in widths):
                raise BundleError(
                    f"expected widths that divide into {what} of {divisor}, found "
                    f"{', '.join(map(str, widths))}: give the unet_config of this network"
                )
        if self.in_channels != 2 * self.out_channels:
            raise BundleError(
                f"expected as many mask as latent channels, found {self.in_channels} input "
                f"and {self.out_channels} output channels: give the unet_config of this network"
            )

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> DenoiserConfig:
        """Read a reference `unet_config`; raises BundleError for options that are not supported.

        Options that do not matter at inference (image_size, dropout, use_checkpoint, …) are
        ignored.
        """
        for name, allowed in UNUSED.items():
            value = config.get(name, allowed[0])
            if value not in allowed:
                raise BundleError(
                    f"expected {name} {allowed[0]} in unet_config, found {value!r}: other values "
                    "are not supported"
                )
        fields: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            value = config.get(name, 1 if name == "transformer_depth" else None)
            several = name in ("attention_resolutions", "channel_mult")
            numbers = list(value) if several and isinstance(value, list | tuple) else [value]
            if not numbers or not all(type(n) is int and n > 0 for n in numbers):
                raise BundleError(
                    f"expected {'whole numbers' if several else 'a whole number'} {name} in "
                    f"unet_config, found {value!r}: give the unet_config of this network"
                )
            fields[name] = tuple(numbers) if several else value
        return cls(**fields)


class UNet(nn.Module):
    """The network as published, except that keys and values of the text are inputs."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        width, embedding = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        first = [InFrame(config.in_channels, width, 3, padding=1), AlongFrames(width)]
        inputs, skips, factor = [nn.ModuleList(first)], [width], 1

        def transformer(width: int) -> SpatialTransformer:
            head, depth = config.num_head_channels, config.transformer_depth
            return SpatialTransformer(width, config.context_dim, head, depth)

        def layers(inside: int, outside: int) -> list[nn.Module]:
            block: list[nn.Module] = [ResBlock(inside, outside, embedding)]
            if factor in config.attention_resolutions:
                block.append(transformer(outside))
            return block

        for level, multiple in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                inputs.append(nn.ModuleList(layers(width, multiple * config.model_channels)))
                width = multiple * config.model_channels
                skips.append(width)
            if level < len(config.channel_mult) - 1:
                inputs.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)
                factor *= 2
        self.input_blocks = nn.ModuleList(inputs)
        self.middle_block = nn.ModuleList(
            [
                ResBlock(width, width, embedding),
                transformer(width),
                ResBlock(width, width, embedding),
            ]
        )
        outputs = []
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                block = layers(width + skips.pop(), multiple * config.model_channels)
                width = multiple * config.model_channels
                if level and i == config.num_res_blocks:
                    block.append(Upsample(width))
                    factor //= 2
                outputs.append(nn.ModuleList(block))
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(
            FrameNorm(GROUPS, width),
            nn.SiLU(),
            InFrame(width, config.out_channels, 3, padding=1),
        )
        self.out_tem = AlongFrames(config.out_channels)

    @staticmethod
    def joined(x: Tensor, skip: Tensor) -> Tensor:
        """Concatenate x [B, C, f, h, w] with a skip connection along the channels."""
        return torch.cat([x, skip], dim=1)

    @property
    def text_attention(self) -> list[Attention]:
        """Layers that attend to the text, in the order in which they run."""
        return [m.attn2 for m in self.modules() if isinstance(m, Transformer)]

    def fold(self) -> None:
        """Change the layers to forms that save work at inference; this reshapes the weights."""
        for kind in (Upsample, InFrame, AlongFrames, GEGLU):
            for module in list(self.modules()):
                if isinstance(module, kind):
                    module.fold()

    def keys_values(self, context: Tensor) -> tuple[Tensor, ...]:
        """Map context [tokens, dim] to keys, values, keys, ... [1, heads, tokens, d]."""
        pairs = [layer.keys_values(context[None]) for layer in self.text_attention]
        return tuple(tensor for pair in pairs for tensor in pair)

    def forward(self, x: Tensor, mask_latent: Tensor, time: Tensor, *text: Tensor) -> Tensor:
        """Predict the noise in x [f, D, h, w] from time [1, W], keys and values of the text."""
        embedding = self.time_embed(time)
        y = torch.cat([x, mask_latent], dim=1).transpose(0, 1)[None]
        return self.predict(y, embedding, text)[0].transpose(0, 1)

    def predict(self, y: Tensor, embedding: Tensor, text: Iterable[Tensor]) -> Tensor:
        """Map latents and mask [B, 2D, f, h, w] and time embeddings [B, E] to [B, D, f, h, w].

        Keys and values of the text are [B * f, heads, m, d], or [1, heads, m, d] for a single text.
        """
        keys_values = iter(text)
        skips = []
        for block in self.input_blocks:
            y = _apply(block, y, embedding, keys_values)
            skips.append(y)
        y = _apply(self.middle_block, y, embedding, keys_values)
        for block in self.output_blocks:
            y = _apply(block, self.joined(y, skips.pop()), embedding, keys_values)
        result: Tensor = self.out_tem(self.out(y))
        return result


def _apply(block: nn.Module, x: Tensor, embedding: Tensor, text: Iterator[Tensor]) -> Tensor:
    """Run the layers of a block; each transformer takes its keys and values from `text`."""
    for layer in block.children():
        if isinstance(layer, ResBlock):
            x = layer(x, embedding)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, text)
        else:
            x = layer(x)
    return x
