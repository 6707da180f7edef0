"""LeanVAE's four parts, rewritten for inference engines: weights folded, frames as batch.

The results equal those of `LeanVAE` up to rounding. Done once at export:

- Haar transform and patch embedding are linear, so together they are one strided
  convolution from pixels to tokens, and one 1x1 convolution and a pixel shuffle back.
- Gray (`channels=1` of a three-channel checkpoint): weights of the three replicated input
  channels are summed. The three output channels are clamped and averaged by the last operations,
  or averaged without a clamp in the weights.
- The layer norm's gain and bias go into the following linear layer. The residual around a
  depthwise convolution is 1 added to its centre tap. The first frame of a stream uses only the
  last time tap, since its past is zero.
- The hidden width is padded with zeros to a multiple of 16, a vector register: in OpenVINO
  341 channels took 1.2 times as long as 352.
- The latent normalisation is applied inside.

Tokens are [k, E, h, w], so that every linear layer is a 1x1 convolution. States are
[2, h, w, E]: channels last, the layout that CPU convolutions use internally, so states need no
reordering (70 ms instead of 76 ms per decoder step of 512x512x4 voxels).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Averaging, Geometry, Intensity, LatentNormalisation
from fvae_deploy.export.models.colours import Clamp, clamp_of
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.lean_vae import PATCH, STRIDE, Layers, LeanVAE, LeanVAEConfig

INTENSITY = Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-0.5, model_max=0.5)
VECTOR = 16  # floats in the widest CPU vector register


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone().contiguous(), requires_grad=False)


def _pad(value: Tensor, axis: int) -> Tensor:
    """Append zeros along one axis up to a multiple of VECTOR."""
    missing = -value.shape[axis] % VECTOR
    zeros = value.new_zeros([missing if i == axis else n for i, n in enumerate(value.shape)])
    return torch.cat([value, zeros], dim=axis)


def _matrix(value: Tensor) -> nn.Parameter:
    """Return a matrix [out, in] as the weight of a 1x1 convolution."""
    return _frozen(value[:, :, None, None])


class FoldedLayer(nn.Module):
    """One depthwise convolution and feed-forward of a `Layers` stack, folded."""

    def __init__(self, layers: Layers, index: int) -> None:
        super().__init__()
        depthwise: Any = layers.dconv_layer[index]
        feed: Any = layers.ffd_layer[index]
        convolution = depthwise.ds_conv
        norm, widen, narrow = (feed[i] for i in (0, 1, 4))
        kernel = convolution.weight.detach().clone()
        if layers.residual:
            kernel[:, :, 2, 1, 1] += 1
        self.residual = layers.residual
        self.epsilon = norm.eps
        self.tap0, self.tap1, self.tap2 = (_frozen(kernel[:, :, i]) for i in range(3))
        self.bias = _frozen(convolution.bias)
        value, gate = (widen.weight * norm.weight).chunk(2)
        value_bias, gate_bias = (widen.weight @ norm.bias).chunk(2)
        self.value, self.gate = _matrix(_pad(value, 0)), _matrix(_pad(gate, 0))
        self.value_bias = _frozen(_pad(value_bias, 0))
        self.gate_bias = _frozen(_pad(gate_bias, 0))
        self.narrow = _matrix(_pad(narrow.weight, 1))

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map tokens x [k, E, h, w] and past [2, h, w, E], None at the start, to (x, next past)."""
        channels = x.shape[1]

        def tap(frames: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.conv2d(frames, weight, bias, padding=1, groups=channels)

        if past is None:  # a single frame with zeros before it
            frames = torch.cat([torch.zeros_like(x), x])
            y = tap(x, self.tap2, self.bias)
        else:
            frames = torch.cat([past.permute(0, 3, 1, 2), x])
            y = tap(frames[:-2], self.tap0, self.bias)
            y = y + tap(frames[1:-1], self.tap1) + tap(x, self.tap2)
        # Sums of squares may overflow in half precision.
        wide = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
        centred = wide - wide.mean(1, keepdim=True)
        variance = (centred * centred).mean(1, keepdim=True)
        scaled = (centred * torch.rsqrt(variance + self.epsilon)).to(y.dtype)
        gate = F.gelu(F.conv2d(scaled, self.gate, self.gate_bias))
        value = F.conv2d(scaled, self.value, self.value_bias)
        out = F.conv2d(value * gate, self.narrow)
        return (y + out if self.residual else out), frames[-2:].permute(0, 2, 3, 1)


class FoldedStack(nn.Module):
    """A `Layers` stack, folded."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FoldedLayer(layers, i) for i in range(len(layers.dconv_layer)))

    def forward(self, x: Tensor, past: Iterator[Tensor], states: list[Tensor]) -> Tensor:
        """Map tokens x [k, E, h, w]; take each layer's past and append its next to `states`."""
        for layer in self.layers:
            x, state = layer(x, next(past, None))
            states.append(state)
        return x


def _folded(stacks: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(FoldedStack(cast(Layers, stack)) for stack in stacks)


class EncodeParts(nn.Module):
    """`encode_first` and `encode_step` on shared weights."""

    def __init__(self, model: LeanVAE, channels: int, scale: Sequence[float]) -> None:
        super().__init__()
        config = model.config
        self.low_width = config.l_dim
        for kind, frames in (("image", 1), ("video", STRIDE)):
            weight, bias = _patch_weights(model, frames)
            if channels < config.in_channels:
                weight = weight.sum(1, keepdim=True)
            self.register_parameter(f"{kind}_embed", _matrix(weight.flatten(1)))
            self.register_parameter(f"{kind}_embed_bias", _frozen(bias))
        encoder = model.encoder
        self.low, self.high = FoldedStack(encoder.low_layer), FoldedStack(encoder.high_layer)
        self.fusion = FoldedStack(encoder.fusion_layer)
        phi = model.latent_bottleneck.phi
        self.phi = _matrix(phi * torch.tensor(scale, dtype=phi.dtype)[:, None])

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map frames x [1, C, 1 or 4k, H, W] and the state to (z [1, D, k, h, w], *state)."""
        kind, frames = ("video", STRIDE) if past else ("image", 1)
        _, c, t, height, width = x.shape
        x = x.reshape(c, t // frames, frames, height, width).transpose(0, 1)
        x = x.reshape(t // frames, c * frames, height, width)
        weight, bias = self.get_parameter(f"{kind}_embed"), self.get_parameter(f"{kind}_embed_bias")
        # Pixel unshuffle and 1x1 convolution took 4.2 ms in ONNX Runtime, this takes 1.2 (OpenVINO:
        # 2.6 and 1.9; 512x512, 4 frames, 128 channels, one thread on Zen 5).
        x = F.conv2d(x, weight.reshape(len(weight), -1, PATCH, PATCH), bias, stride=PATCH)
        history, states = iter(past), list[Tensor]()
        low = self.low(x[:, : self.low_width], history, states)
        high = self.high(x[:, self.low_width :], history, states)
        x = self.fusion(torch.cat([low, high], dim=1), history, states)
        return F.conv2d(x, self.phi).transpose(0, 1)[None], *states


class DecodeParts(nn.Module):
    """`decode_first` and `decode_step` on shared weights."""

    def __init__(
        self, model: LeanVAE, channels: int, scale: Sequence[float], clamp: Clamp | None
    ) -> None:
        super().__init__()
        config, bottleneck = model.config, model.latent_bottleneck
        self.low_width, self.channels, self.clamp = config.l_dim, channels, clamp
        self.unscale = _frozen(1 / torch.tensor(scale, dtype=bottleneck.Q.dtype)[:, None, None])
        self.q, self.phi = _matrix(bottleneck.Q), _matrix(bottleneck.phi)
        self.descent = nn.ParameterList(_matrix(w * bottleneck.phi.T) for w in bottleneck.weights)
        self.thresholds = nn.ParameterList(_frozen(t) for t in bottleneck.threshold)
        self.forward_l = _folded(bottleneck.forward_l)
        self.backward_l = _folded(bottleneck.backward_l)
        decoder = model.decoder
        self.fusion = FoldedStack(decoder.fusion_layer)
        self.low, self.high = FoldedStack(decoder.low_layer), FoldedStack(decoder.high_layer)
        for kind in ("image", "video"):
            weight, bias = _unpatch_weights(model, kind)  # [E, C, frames, 8, 8]
            if channels < config.in_channels and clamp is None:
                weight, bias = weight.mean(1, keepdim=True), bias.mean(0, keepdim=True)
            rows = bias.numel()
            weight = weight.reshape(config.embedding_dim, rows).T
            self.register_parameter(f"{kind}_unembed", _matrix(weight))
            self.register_parameter(f"{kind}_unembed_bias", _frozen(bias.reshape(rows)))

    def forward(self, z: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map latents z [1, D, k, h, w] and the state to (x [1, C, 1 or 4k, H, W], *state)."""
        kind, frames = ("video", STRIDE) if past else ("image", 1)
        history, states = iter(past), list[Tensor]()
        z = z[0].transpose(0, 1) * self.unscale  # [k, D, h, w]
        x = F.conv2d(z, self.q)
        for i, threshold in enumerate(self.thresholds):
            descended = x - F.conv2d(F.conv2d(x, self.phi) - z, self.descent[i])
            x = self.forward_l[i](descended, history, states)
            x = x.sign() * F.relu(x.abs() - threshold)  # a learned threshold may be negative
            x = descended + self.backward_l[i](x, history, states)
        x = self.fusion(x, history, states)
        low = self.low(x[:, : self.low_width], history, states)
        high = self.high(x[:, self.low_width :], history, states)
        weight = self.get_parameter(f"{kind}_unembed")
        bias = self.get_parameter(f"{kind}_unembed_bias")
        x = F.conv2d(torch.cat([low, high], dim=1), weight, bias)
        x = F.pixel_shuffle(x if self.clamp is None else self.clamp(x), PATCH)
        k, _, height, width = x.shape
        x = x.reshape(k, self.channels, frames, height, width).transpose(0, 1)
        return x.reshape(1, self.channels, k * frames, height, width), *states


def lean_vae_model(
    model: LeanVAE,
    channels: int | None = None,
    scale: Sequence[float] | None = None,
    clamped: bool = False,
) -> Model:
    """Fold a network into its two stages.

    Parameters
    ----------
    channels
        1 for gray; None for the network's own number.
    scale
        One factor per latent channel that scales it to unit standard deviation; None leaves
        the latents unchanged.
    clamped
        Clamp each of several output channels to the model's range, before they are averaged.
    """
    config = model.config
    geometry = Geometry(STRIDE, PATCH, config.latent_dim, channels or config.in_channels, window=65)
    scale = tuple(scale or [1.0] * config.latent_dim)
    averaging = Averaging(clamped and config.in_channels > 1)
    return Model(
        network=Network("lean_vae", dataclasses.asdict(config)),
        geometry=geometry,
        intensity=INTENSITY,
        latent=LatentNormalisation((0.0,) * config.latent_dim, scale),
        stages=_stages(model, geometry, scale, averaging),
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
    return _stages(LeanVAE(LeanVAEConfig(**config)), geometry, latent.scale, averaging)


def _stages(
    model: LeanVAE, geometry: Geometry, scale: Sequence[float], averaging: Averaging
) -> dict[str, nn.Module]:
    channels, dtype = geometry.channels, model.latent_bottleneck.phi.dtype
    clamp = clamp_of(averaging, geometry, INTENSITY, model.config.in_channels)
    model = copy.deepcopy(
        model
    ).double()  # sums in float32 would differ from processor to processor
    with torch.no_grad():
        encode = EncodeParts(model, channels, scale)
        decode = DecodeParts(model, channels, scale, clamp)
    return {"encode": encode.to(dtype).eval(), "decode": decode.to(dtype).eval()}


def _patch_weights(model: LeanVAE, frames: int) -> tuple[Tensor, Tensor]:
    """Return `embed` of one patch as a matrix [E, C, frames, 8, 8] and a bias."""
    c, dtype = model.config.in_channels, model.latent_bottleneck.phi.dtype
    n = c * frames * PATCH * PATCH
    basis = torch.eye(n, dtype=dtype).reshape(n, c, frames, PATCH, PATCH)
    bias = model.embed(torch.zeros_like(basis[:1])).reshape(-1)
    # The images of the unit vectors are the columns of the matrix.
    weight = (model.embed(basis).reshape(n, -1) - bias).T
    return weight.reshape(-1, c, frames, PATCH, PATCH), bias


def _unpatch_weights(model: LeanVAE, kind: str) -> tuple[Tensor, Tensor]:
    """Return `unembed` of one token as a matrix [E, C, frames, 8, 8] and a bias without E."""
    width, dtype = model.config.embedding_dim, model.latent_bottleneck.phi.dtype
    basis = torch.eye(width, dtype=dtype).reshape(width, 1, 1, 1, width)
    bias = model.unembed(torch.zeros_like(basis[:1]), kind)
    return model.unembed(basis, kind) - bias, bias[0]
