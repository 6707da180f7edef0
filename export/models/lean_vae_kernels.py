"""LeanVAE's stages on hand-written kernels: the same functions with the same weights.

Tokens are channels last, [k, h, w, E]. A layer takes three launches: the depthwise convolution
with its state and residual, the norm with both widening linear layers and their gate, and the
narrowing linear layer with the residual. Pixels become tokens by one convolution whose channels
are 8 pixels of a row, so that nothing is reordered before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_deploy.export.models.lean_vae import PATCH, STRIDE
from fvae_deploy.export.models.lean_vae_parts import (
    DecodeParts,
    EncodeParts,
    FoldedLayer,
    FoldedStack,
)
from fvae_deploy.kernels.causal_conv3d import Window
from fvae_deploy.kernels.dispatch import Kernels


def _point(weight: Tensor) -> nn.Parameter:
    """Return the weight [out, in, 1, 1] of a 1x1 convolution as a kernel's [1, 1, 1, in, out]."""
    return _frozen(weight[:, :, 0, 0].T[None, None, None])


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=False)


class KernelLayer(nn.Module):
    """`FoldedLayer` on kernels."""

    def __init__(self, layer: FoldedLayer, kernels: Kernels) -> None:
        super().__init__()
        self.kernels, self.residual, self.epsilon = kernels, layer.residual, layer.epsilon
        taps = torch.stack([layer.tap0, layer.tap1, layer.tap2])[:, :, 0]  # [3, E, 3, 3]
        self.taps, self.bias = _frozen(taps.permute(0, 2, 3, 1).flatten(0, 2)), layer.bias
        self.value, self.gate = (_frozen(w[:, :, 0, 0].T) for w in (layer.value, layer.gate))
        self.value_bias, self.gate_bias = layer.value_bias, layer.gate_bias
        self.narrow = _point(layer.narrow)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map tokens x [k, h, w, E] and past [2, h, w, E], None at the start, to (x, next past)."""
        y, after = self.kernels.depthwise_conv3d(x, self.taps, self.bias, state=past)
        weights = (self.value, self.gate, self.value_bias, self.gate_bias)
        wide = self.kernels.gated_linear(y.flatten(0, 2), *weights, eps=self.epsilon)
        wide = wide.unflatten(0, y.shape[:3])
        out, _ = self.kernels.causal_conv3d(
            wide, self.narrow, residual=y if self.residual else None
        )
        return out, after


class KernelStack(nn.Module):
    """`FoldedStack` on kernels."""

    def __init__(self, stack: FoldedStack, kernels: Kernels) -> None:
        super().__init__()
        layers = [layer for layer in stack.layers if isinstance(layer, FoldedLayer)]
        self.layers = nn.ModuleList(KernelLayer(layer, kernels) for layer in layers)

    def forward(self, x: Tensor, past: Iterator[Tensor], states: list[Tensor]) -> Tensor:
        """Map tokens x [k, h, w, E]; take each layer's past and append its next to `states`."""
        for layer in self.layers:
            x, state = layer(x, next(past, None))
            states.append(state)
        return x


def _stacks(stacks: nn.ModuleList, kernels: Kernels) -> nn.ModuleList:
    return nn.ModuleList(KernelStack(s, kernels) for s in stacks if isinstance(s, FoldedStack))


class KernelEncode(nn.Module):
    """`EncodeParts` on kernels."""

    def __init__(self, parts: EncodeParts, kernels: Kernels) -> None:
        super().__init__()
        self.kernels, self.low_width = kernels, parts.low_width
        for kind, frames in (("image", 1), ("video", STRIDE)):
            weight = parts.get_parameter(f"{kind}_embed")[:, :, 0, 0]
            weight = weight.unflatten(1, (-1, frames, PATCH, PATCH))  # [E, C, frames, 8, 8]
            weight = weight.permute(1, 2, 3, 4, 0)[:, :, :, None]
            self.register_parameter(f"{kind}_embed", _frozen(weight))
            bias = parts.get_parameter(f"{kind}_embed_bias")
            self.register_parameter(f"{kind}_embed_bias", bias)
        self.low, self.high = KernelStack(parts.low, kernels), KernelStack(parts.high, kernels)
        self.fusion, self.phi = KernelStack(parts.fusion, kernels), _point(parts.phi)

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map frames x [1, C, 1 or 4k, H, W] and the state to (z [1, D, k, h, w], *state)."""
        kind, frames = ("video", STRIDE) if past else ("image", 1)
        weight = self.get_parameter(f"{kind}_embed")
        window, tokens = Window(stride=(frames, PATCH, 1)), None
        for channel, channel_weight in zip(x[0].contiguous(), weight, strict=True):
            rows = channel.unflatten(2, (-1, PATCH))  # [T, H, W/8, 8]
            bias = self.get_parameter(f"{kind}_embed_bias") if tokens is None else None
            tokens, _ = self.kernels.causal_conv3d(
                rows, channel_weight, bias, window=window, residual=tokens
            )
        history, states = iter(past), list[Tensor]()
        assert tokens is not None
        low = self.low(tokens[..., : self.low_width], history, states)
        high = self.high(tokens[..., self.low_width :], history, states)
        both = self.fusion(torch.cat([low, high], dim=-1), history, states)
        z, _ = self.kernels.causal_conv3d(both, self.phi)
        return z.permute(3, 0, 1, 2)[None], *states


class KernelDecode(nn.Module):
    """`DecodeParts` on kernels."""

    def __init__(self, parts: DecodeParts, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.low_width, self.channels = parts.low_width, parts.channels
        self.clamp = parts.clamp
        self.unscale = _frozen(parts.unscale[:, 0, 0])
        self.q, self.phi = _point(parts.q), _point(parts.phi)
        self.ascent = nn.ParameterList(_point(-weight) for weight in parts.descent)
        self.thresholds = parts.thresholds
        self.forward_l = _stacks(parts.forward_l, kernels)
        self.backward_l = _stacks(parts.backward_l, kernels)
        self.fusion = KernelStack(parts.fusion, kernels)
        self.low, self.high = KernelStack(parts.low, kernels), KernelStack(parts.high, kernels)
        for kind in ("image", "video"):
            weight = _point(parts.get_parameter(f"{kind}_unembed"))
            self.register_parameter(f"{kind}_unembed", weight)
            bias = parts.get_parameter(f"{kind}_unembed_bias")
            self.register_parameter(f"{kind}_unembed_bias", bias)

    def forward(self, z: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map latents z [1, D, k, h, w] and the state to (x [1, C, 1 or 4k, H, W], *state)."""
        kind, frames = ("video", STRIDE) if past else ("image", 1)
        history, states = iter(past), list[Tensor]()
        latents = (z[0].permute(1, 2, 3, 0) * self.unscale).contiguous()  # [k, h, w, D]
        x = self._product(latents, self.q)
        for i, threshold in enumerate(self.thresholds):
            mismatch = self._product(x, self.phi) - latents
            descended = self._product(mismatch, self.ascent[i], residual=x)
            x = self.forward_l[i](descended, history, states)
            x = x.sign() * F.relu(x.abs() - threshold.flatten())
            x = descended + self.backward_l[i](x, history, states)
        x = self.fusion(x, history, states)
        low = self.low(x[..., : self.low_width], history, states)
        high = self.high(x[..., self.low_width :], history, states)
        weight = self.get_parameter(f"{kind}_unembed")
        bias = self.get_parameter(f"{kind}_unembed_bias")
        x = self._product(torch.cat([low, high], dim=-1), weight, bias)
        x = x if self.clamp is None else self.clamp(x, axis=3)
        x = x.unflatten(3, (self.channels, frames, PATCH, PATCH))  # [k, h, w, C, frames, 8, 8]
        x = x.permute(3, 0, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return x[None], *states

    def _product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        y: Tensor = self.kernels.causal_conv3d(x, weight, bias, residual=residual)[0]
        return y


def on_kernels(stage: nn.Module, kernels: Kernels) -> nn.Module:
    """Return the form of a stage, weights loaded, that runs on kernels."""
    if isinstance(stage, EncodeParts):
        return KernelEncode(stage, kernels)
    assert isinstance(stage, DecodeParts)
    return KernelDecode(stage, kernels)
