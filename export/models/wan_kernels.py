"""Wan's stages on hand-written kernels: computing layers are replaced one by one.

Replacements have the interface of diffusers' layers, [1, C, T, H, W] and the cache, so that the
blocks around them stay unchanged; in memory, channels are last throughout. A residual block takes
four launches: 1 / RMS of its input, convolution, 1 / RMS, convolution with the residual. A
convolution applies norm and SiLU to its input while reading it, or a launch before it does so where
that is faster. The convolution also writes the next state.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from fvae_deploy.export.models.slicewise import Doubling
from fvae_deploy.export.models.wan import Causal, Plain, Upsample, WanStage
from fvae_deploy.kernels.causal_conv3d import SAME, Window
from fvae_deploy.kernels.dispatch import Kernels
from fvae_deploy.kernels.norm_silu import Activation


def _frames(x: Tensor) -> Tensor:
    """Return x [1, C, T, H, W] as [T, H, W, C]; no copy if channels are last in memory."""
    return x[0].permute(1, 2, 3, 0).contiguous()


def _volume(frames: Tensor) -> Tensor:
    """Return a view of frames [T, H, W, C] as [1, C, T, H, W]."""
    return frames.permute(3, 0, 1, 2)[None]


def _past(cache: list[Any], slot: int, frames: int) -> Tensor | None:
    """Return the last frames in a slot of the cache as [T, H, W, C], or None if it is empty."""
    return None if cache[slot] is None else _frames(cache[slot])[-frames:]


class Convolution(nn.Module):
    """A 2-D or 3-D convolution with its weights packed for the kernel."""

    def __init__(
        self, layer: nn.Conv2d | nn.Conv3d, kernels: Kernels, window: Window | None = None
    ) -> None:
        super().__init__()
        weight = layer.weight if layer.weight.ndim == 5 else layer.weight[:, :, None]
        self.weight = nn.Parameter(weight.permute(2, 3, 4, 1, 0).contiguous(), requires_grad=False)
        self.bias, self.kernels = layer.bias, kernels
        self.window = window or (SAME if self.weight.shape[1] == 3 else Window())

    def frames(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Convolve x [T, H, W, C]; see `causal_conv3d.reference` for options and results."""
        results: tuple[Tensor, Tensor] = self.kernels.causal_conv3d(
            x, self.weight, self.bias, window=self.window, **options
        )
        return results

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [1, C, T, H, W] without state."""
        return _volume(self.frames(_frames(x))[0])


class Normed(nn.Module):
    """RMS norm, SiLU (not before attention) and a convolution."""

    def __init__(self, norm: wan.WanRMS_norm, layer: Any, kernels: Kernels, silu: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(norm.gamma.float().flatten(), requires_grad=False)
        self.convolution, self.kernels, self.silu = Convolution(layer, kernels), kernels, silu

    def frames(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Normalise and convolve x [T, H, W, C]."""
        activation = Activation(self.gamma, inverse=self.kernels.rms(x), silu=self.silu)
        return self.convolution.frames(x, activation=activation, **options)


class KernelCausal(nn.Module):
    """`Causal` on kernels, together with the norm before it if there is one."""

    def __init__(self, layer: Causal, kernels: Kernels, before: Plain | None = None) -> None:
        super().__init__()
        convolution: Any = layer.convolution
        norm: Any = None if before is None else before.layers[0]
        self.convolution = (
            Convolution(convolution, kernels)
            if norm is None
            else Normed(norm, convolution, kernels, silu=True)
        )

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Convolve x [1, C, T, H, W]; read and replace this layer's slot of the cache."""
        slot = feat_idx[0]
        y, state = self.convolution.frames(_frames(x), state=_past(feat_cache, slot, 2))
        feat_cache[slot], feat_idx[0] = _volume(state), slot + 1
        return _volume(y)


class KernelResidual(nn.Module):
    """`WanResidualBlock` on kernels."""

    def __init__(self, block: wan.WanResidualBlock, kernels: Kernels) -> None:
        super().__init__()
        self.first = Normed(block.norm1, block.conv1, kernels, silu=True)
        self.second = Normed(block.norm2, block.conv2, kernels, silu=True)
        shortcut = block.conv_shortcut
        self.shortcut = (
            None if isinstance(shortcut, nn.Identity) else Convolution(shortcut, kernels)
        )

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Apply the block to x [1, C, T, H, W]; read and replace two slots of the cache."""
        slot, frames = feat_idx[0], _frames(x)
        residual = frames if self.shortcut is None else self.shortcut.frames(frames)[0]
        y, first = self.first.frames(frames, state=_past(feat_cache, slot, 2))
        y, second = self.second.frames(y, state=_past(feat_cache, slot + 1, 2), residual=residual)
        feat_cache[slot : slot + 2] = [_volume(first), _volume(second)]
        feat_idx[0] = slot + 2
        return _volume(y)


class KernelAttention(nn.Module):
    """`WanAttentionBlock` on kernels: one head over the tokens of every frame."""

    def __init__(self, block: wan.WanAttentionBlock, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.to_qkv = Normed(block.norm, block.to_qkv, kernels, silu=False)
        self.proj = Convolution(block.proj, kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention with a residual to x [1, C, T, H, W]."""
        frames = _frames(x)
        qkv, _ = self.to_qkv.frames(frames)
        tokens = qkv.flatten(1, 2)[:, :, None]  # [T, H * W, one head, 3 C]
        y = self.kernels.attention(*tokens.chunk(3, dim=-1)).reshape(frames.shape)
        return _volume(self.proj.frames(y, residual=frames)[0])


class KernelDown(nn.Module):
    """`WanResample` on kernels: half the size, and half the frames except for the first."""

    def __init__(self, layer: wan.WanResample, kernels: Kernels) -> None:
        super().__init__()
        half = Window(stride=(1, 2, 2), bottom=1, right=1)
        self.resample = Convolution(layer.resample[1], kernels, half)
        self.time = (
            Convolution(layer.time_conv, kernels, Window(stride=(2, 1, 1)))
            if layer.mode == "downsample3d"
            else None
        )

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Map x [1, C, T, H, W] to [1, C, T or T / 2, H / 2, W / 2]."""
        y, _ = self.resample.frames(_frames(x))
        if self.time is not None:
            slot = feat_idx[0]
            past, state = _past(feat_cache, slot, 1), y
            if past is not None:
                y, state = self.time.frames(y, state=past)
            feat_cache[slot], feat_idx[0] = _volume(state), slot + 1
        return _volume(y)


class KernelUpsample(nn.Module):
    """`Upsample` on kernels."""

    def __init__(self, layer: Upsample, kernels: Kernels) -> None:
        super().__init__()
        doubling: Doubling = layer.doubling
        positions = [doubling.get_parameter(f"weight{i}{j}") for i in (0, 1) for j in (0, 1)]
        packed = torch.stack(tuple(positions)).unflatten(0, (2, 2))  # [2, 2, D, C, 2, 2]
        packed = packed.permute(0, 1, 4, 5, 3, 2)[:, :, None].contiguous()
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), doubling.bias
        self.kernels = kernels
        self.time = Convolution(layer.time_conv, kernels) if hasattr(layer, "time_conv") else None

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Map x [1, C, T, H, W] to [1, C', T or 2T, 2H, 2W]."""
        frames = _frames(x)
        if self.time is not None:
            slot = feat_idx[0]
            past = _past(feat_cache, slot, 2)
            if past is None:  # the first frame is not doubled and not kept in the cache
                state = torch.zeros_like(frames).repeat(2, 1, 1, 1)
            else:
                doubled, state = self.time.frames(frames, state=past)
                pairs = doubled.unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4)
                frames = pairs.flatten(0, 1).contiguous()  # [2 T, H, W, C]
            feat_cache[slot], feat_idx[0] = _volume(state), slot + 1
        y: Tensor = self.kernels.upsample2x_conv(frames, self.weight, self.bias)
        return _volume(y)


def on_kernels(stage: nn.Module, kernels: Kernels) -> nn.Module:
    """Return the form of a stage, weights loaded, that runs on kernels."""
    assert isinstance(stage, WanStage)
    layers: list[nn.Module] = []
    for layer in stage.layers:
        before = layers[-1] if layers else None
        if isinstance(layer, Causal) and isinstance(before, Plain) and _norm_first(before):
            layers[-1] = KernelCausal(layer, kernels, before)
        else:
            layers.append(layer)
    stage.layers = nn.ModuleList(_replaced(layer, kernels) for layer in layers)
    return stage


def _norm_first(layer: Plain) -> bool:
    """Return whether a sequence of layers begins with an RMS norm."""
    return isinstance(layer.layers[0], wan.WanRMS_norm)


def _replaced(layer: nn.Module, kernels: Kernels) -> nn.Module:
    """Return the layer's replacement on kernels; of other layers, replace the children."""
    if isinstance(layer, wan.WanResidualBlock):
        return KernelResidual(layer, kernels)
    if isinstance(layer, wan.WanAttentionBlock):
        return KernelAttention(layer, kernels)
    if isinstance(layer, wan.WanResample):
        return KernelDown(layer, kernels)
    if isinstance(layer, Upsample):
        return KernelUpsample(layer, kernels)
    if isinstance(layer, Causal):
        return KernelCausal(layer, kernels)
    if isinstance(layer, wan.WanCausalConv3d):
        return Convolution(layer, kernels)
    for name, child in list(layer.named_children()):
        setattr(layer, name, _replaced(child, kernels))
    return layer
