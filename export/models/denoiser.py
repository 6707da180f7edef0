"""The denoiser of the latent diffusion model: a 2-D U-Net over frames, made pseudo-3-D.

    x, mask_latent [f, D, h, w], time [1, W], context [tokens, dim]  -->  noise [f, D, h, w]

The U-Net is that of latent diffusion (Rombach et al., 2022), its convolutions 2-D with the
latent frames as batch. After every 3x3 convolution a convolution of three frames joins the
frames at every pixel, reflected at both ends of the window. Attention stays within a frame:
to itself and to the text.

The text's keys and values depend neither on frame nor on step, so they are a part of their
own, computed once a generation (`models.denoiser_parts`). That is exact. Time enters
as the waves that the reference makes of it (`export.generator.waves`): computed inside, in half
precision, neighbouring times would be one.

Parameter names are those of the published checkpoints (`model.diffusion_model.*`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.models.slicewise import Doubling

GROUPS = 32
# Options of latent diffusion that none of these networks uses, and the values that mean so.
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
                    f"{', '.join(map(str, widths))}: the unet_config is not this network's"
                )
        if self.in_channels != 2 * self.out_channels:
            raise BundleError(
                f"expected as many mask as latent channels, found {self.in_channels} channels in "
                f"and {self.out_channels} out: the unet_config is not this network's"
            )

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> DenoiserConfig:
        """Read a reference `unet_config`; raises BundleError for options that are not this net's.

        What does not shape the network at inference (image_size, dropout, use_checkpoint, …)
        is ignored.
        """
        for name, allowed in UNUSED.items():
            value = config.get(name, allowed[0])
            if value not in allowed:
                raise BundleError(f"expected {name} {allowed[0]} in unet_config, found {value!r}")
        found: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            value = config.get(name, 1 if name == "transformer_depth" else None)
            several = name in ("attention_resolutions", "channel_mult")
            numbers = list(value) if several and isinstance(value, list | tuple) else [value]
            if not numbers or not all(type(n) is int and n > 0 for n in numbers):
                raise BundleError(
                    f"expected {'whole numbers' if several else 'a whole number'} {name} in "
                    f"unet_config, found {value!r}"
                )
            found[name] = tuple(numbers) if several else value
        return cls(**found)


class AlongFrames(nn.Module):
    """A convolution of three frames at every pixel, the ends reflected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.temporal_conv = nn.Conv1d(width, width, 3)
        self.product: nn.Conv2d | None = None

    def fold(self) -> None:
        """Hold the weights in the order in which `forward` takes them."""
        self.product = nn.Conv2d(1, 1, 1)
        self.product.weight = nn.Parameter(self._weight())
        self.product.bias = self.temporal_conv.bias
        del self.temporal_conv

    def forward(self, x: Tensor) -> Tensor:
        """X [f, C, h, w], at least two frames, to as many."""
        frames = torch.cat([x[1][None], x, x[-2][None]])
        # Three frames side by side as channels: one matrix product, whatever the layout.
        beside = torch.cat([frames[:-2], frames[1:-1], frames[2:]], dim=1)
        if self.product is None:
            return F.conv2d(beside, self._weight(), self.temporal_conv.bias)
        return F.conv2d(beside, self.product.weight, self.product.bias)

    def _weight(self) -> Tensor:
        weight = self.temporal_conv.weight.transpose(1, 2).flatten(1)  # [C, 3 C]
        return weight[..., None, None].contiguous()


class ResBlock(nn.Module):
    """Norm, SiLU and convolution twice, the time embedding added between."""

    def __init__(self, width: int, out: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1)
        )
        self.in_layers_tem = AlongFrames(out)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.out_layers_tem = AlongFrames(out)
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """X [f, C, h, w] and embedding [1, E] -> [f, C', h, w]."""
        y = self.in_layers_tem(self.in_layers(x))
        y = y + self.emb_layers(embedding)[..., None, None]
        y = self.out_layers_tem(self.out_layers(y))
        result: Tensor = self.skip_connection(x) + y
        return result


class Attention(nn.Module):
    """Attention of many narrow heads; keys and values may be given."""

    def __init__(self, width: int, context: int, head: int) -> None:
        super().__init__()
        self.heads = width // head
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [..., n, dim] to keys and values [..., heads, n, d]."""
        return self._split(self.to_k(tokens)), self._split(self.to_v(tokens))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Tokens x [f, n, C] attend to keys and values [f or 1, heads, m, d]."""
        queries = self._split(self.to_q(x))
        shape = (x.shape[0], *keys.shape[1:])
        y = F.scaled_dot_product_attention(queries, keys.expand(shape), values.expand(shape))
        result: Tensor = self.to_out(y.transpose(-3, -2).flatten(-2))
        return result

    def _split(self, tokens: Tensor) -> Tensor:
        split: Tensor = tokens.unflatten(-1, (self.heads, -1))
        return split.transpose(-3, -2)


class GEGLU(nn.Module):
    """A linear layer to twice the width: value * gelu(gate), the second half being the gate."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., C] -> [..., inner]."""
        wide: Tensor = self.proj(x)
        value, gate = wide.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 4 * width
        self.net = nn.Sequential(GEGLU(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """X [..., C] -> [..., C]."""
        result: Tensor = self.net(x)
        return result


class Transformer(nn.Module):
    """Attention within the frame, attention to the text, feed-forward; each with a residual."""

    def __init__(self, width: int, context: int, head: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, width, head)
        self.attn2 = Attention(width, context, head)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Tokens x [f, n, C]; keys and values of the text [1, heads, m, d]."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, *self.attn1.keys_values(normed))
        x = x + self.attn2(self.norm2(x), keys, values)
        result: Tensor = x + self.ff(self.norm3(x))
        return result


class SpatialTransformer(nn.Module):
    """Transformers on the pixels of every frame as tokens, with a residual around them."""

    def __init__(self, width: int, config: DenoiserConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            Transformer(width, config.context_dim, config.num_head_channels)
            for _ in range(config.transformer_depth)
        )
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: Iterator[Tensor]) -> Tensor:
        """X [f, C, h, w]; takes two tensors of the text for every transformer."""
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # [f, h * w, C]
        for block in self.transformer_blocks:
            tokens = block(tokens, next(text), next(text))
        y = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        result: Tensor = x + self.proj_out(y)
        return result


class Downsample(nn.Module):
    """A convolution of stride 2, then one along the frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.op_tem = AlongFrames(width)

    def forward(self, x: Tensor) -> Tensor:
        """X [f, C, h, w], h and w even -> [f, C, h/2, w/2]."""
        # Of the border of 1 all around, none is met at the far sides; so sizes stay exact.
        y = F.conv2d(F.pad(x, (1, 0, 1, 0)), self.op.weight, self.op.bias, stride=2)
        result: Tensor = self.op_tem(y)
        return result


class Upsample(nn.Module):
    """Nearest neighbour by 2, a convolution, then one along the frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.conv_tem = AlongFrames(width)
        self.doubling: Doubling | None = None

    def fold(self) -> None:
        """Do both in 4/9 of the work from now on."""
        self.doubling = Doubling(self.conv)
        del self.conv

    def forward(self, x: Tensor) -> Tensor:
        """X [f, C, h, w] -> [f, C, 2h, 2w]."""
        if self.doubling is None:
            x = self.conv(F.interpolate(x, scale_factor=2.0))
        else:
            x = self.doubling(x)
        result: Tensor = self.conv_tem(x)
        return result


class UNet(nn.Module):
    """The network as published, keys and values of the text given."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        width, embedding = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        first = [nn.Conv2d(config.in_channels, width, 3, padding=1), AlongFrames(width)]
        inputs, skips, factor = [nn.ModuleList(first)], [width], 1

        def layers(inside: int, outside: int) -> list[nn.Module]:
            block: list[nn.Module] = [ResBlock(inside, outside, embedding)]
            if factor in config.attention_resolutions:
                block.append(SpatialTransformer(outside, config))
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
                SpatialTransformer(width, config),
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
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, config.out_channels, 3, padding=1),
        )
        self.out_tem = AlongFrames(config.out_channels)

    @property
    def text_attention(self) -> list[Attention]:
        """The layers that attend to the text, in the order in which they run."""
        return [m.attn2 for m in self.modules() if isinstance(m, Transformer)]

    def fold(self) -> None:
        """Take what saves work and changes no result; weights then have other names."""
        for module in list(self.modules()):
            if isinstance(module, AlongFrames | Upsample):
                module.fold()

    def keys_values(self, context: Tensor) -> tuple[Tensor, ...]:
        """Context [tokens, dim] -> keys, values, keys, ... [1, heads, tokens, d] for `forward`."""
        pairs = [layer.keys_values(context[None]) for layer in self.text_attention]
        return tuple(tensor for pair in pairs for tensor in pair)

    def forward(self, x: Tensor, mask_latent: Tensor, time: Tensor, *text: Tensor) -> Tensor:
        """Predict the noise of x [f, D, h, w], given time [1, W], keys and values of the text."""
        waiting = iter(text)
        embedding = self.time_embed(time)
        y = torch.cat([x, mask_latent], dim=1)
        skips = []
        for block in self.input_blocks:
            y = _through(block, y, embedding, waiting)
            skips.append(y)
        y = _through(self.middle_block, y, embedding, waiting)
        for block in self.output_blocks:
            y = _through(block, torch.cat([y, skips.pop()], dim=1), embedding, waiting)
        result: Tensor = self.out_tem(self.out(y))
        return result


def _through(block: nn.Module, x: Tensor, embedding: Tensor, text: Iterator[Tensor]) -> Tensor:
    for layer in block.children():
        if isinstance(layer, ResBlock):
            x = layer(x, embedding)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, text)
        else:
            x = layer(x)
    return x
