"""LeanVAE in streaming form: causal state is an explicit input and output, not a cache inside.

LeanVAE (Cheng et al., "LeanVAE: An Ultra-Efficient Reconstruction VAE for Video
Diffusion Models", 2025) maps 8x8 pixels of 4 frames to one token: a Haar wavelet
transform and a linear patch embedding, layers of depthwise convolution and gated
feed-forward, and a compressed-sensing bottleneck (unrolled ISTA). The first frame of a
clip becomes one token frame, and so does each further group of 4 frames.

    x [B, C, 1 + 4k, H, W]  -- encode -->  z [B, D, 1 + k, H/8, W/8]  -- decode -->  x

Every layer is local. The only state in time is the last two input frames of every depthwise
convolution. So a clip of any length is `*_first` on its first frame followed by `*_step` on any
grouping of the rest; the result does not depend on the grouping.

Parameter names are those of the published checkpoints (`{"args", "state_dict"}`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.checkpoint import misfits, shapes

PATCH = 8  # pixels along H and W per token
STRIDE = 4  # frames per token frame, after the first
STATE_FRAMES = 2  # frames of state for a causal kernel of 3 frames


@dataclass(frozen=True)
class LeanVAEConfig:
    """The architecture, by the names of the reference checkpoint's `args`.

    `in_channels` is 3 in the published models and 1 for those folded to gray.
    """

    embedding_dim: int = 512
    latent_dim: int = 16
    ista_iter_num: int = 2
    ista_layer_num: int = 2
    l_dim: int = 128
    h_dim: int = 384
    sep_num_layer: int = 2
    fusion_num_layer: int = 4
    in_channels: int = 3

    def __post_init__(self) -> None:
        if self.l_dim + self.h_dim != self.embedding_dim:
            raise BundleError(
                f"expected l_dim + h_dim == embedding_dim in LeanVAE's args, found {self.l_dim} + "
                f"{self.h_dim} != {self.embedding_dim}: give a LeanVAE checkpoint"
            )

    @classmethod
    def from_args(cls, args: Mapping[str, object]) -> LeanVAEConfig:
        """Read the reference's `args`, ignoring those that do not define the network."""
        known = {f.name for f in fields(cls)}
        numbers: dict[str, int] = {}
        for name, value in args.items():
            if name in known:
                if not isinstance(value, int):
                    raise BundleError(
                        f"expected an integer {name} in LeanVAE's args, found {value!r}: correct "
                        "the checkpoint"
                    )
                numbers[name] = value
        return cls(**numbers)

    @property
    def encoder_layers(self) -> int:
        """Number of depthwise convolutions in a row in the encoder, which is its halo in tokens."""
        return self.sep_num_layer + self.fusion_num_layer

    @property
    def decoder_layers(self) -> int:
        """Number of depthwise convolutions in a row in the decoder, which is its halo in tokens."""
        return self.encoder_layers + 2 * self.ista_iter_num * self.ista_layer_num


class CausalState:
    """Gives every causal convolution its past, in execution order, and collects the next state.

    At the start of a stream `past` is empty, which means two frames of zeros, as in the reference.
    """

    def __init__(self, past: Sequence[Tensor] = ()) -> None:
        self._past: Iterator[Tensor] | None = iter(past) if past else None
        self.next: list[Tensor] = []

    def extend(self, x: Tensor) -> Tensor:
        """Prepend the past to x [B, T, H, W, D] and store the last two frames as next state."""
        past = next(self._past) if self._past else torch.zeros_like(x[:, :1]).repeat(1, 2, 1, 1, 1)
        x = torch.cat([past, x], dim=1)
        self.next.append(x[:, -STATE_FRAMES:])
        return x


class CausalDepthwise(nn.Module):
    """Depthwise 3x3x3 convolution, zero-padded in space, causal in time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ds_conv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        """Map tokens [B, T, H, W, D] to tokens of the same shape."""
        # One 2-D depthwise convolution per time tap with frames as batch: CPU libraries have fast
        # depthwise kernels in 2-D but not in 3-D (forward and backward were 9x faster).
        b, t, h, w, d = x.shape
        frames = state.extend(x)  # [B, 2 + T, H, W, D]
        out: Tensor | None = None
        for tap in range(3):
            shifted = frames[:, tap : tap + t].reshape(b * t, h, w, d).permute(0, 3, 1, 2)
            bias = self.ds_conv.bias if tap == 0 else None
            y = F.conv2d(shifted, self.ds_conv.weight[:, :, tap], bias, padding=1, groups=d)
            out = y if out is None else out + y
        assert out is not None
        return out.permute(0, 2, 3, 1).reshape(b, t, h, w, d)


class GatedGELU(nn.Module):
    """value * gelu(gate), with value and gate the first and second half of the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., 2 D] to [..., D]."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


def feed_forward(dim: int) -> nn.Sequential:
    """Return LayerNorm, Linear, gated GELU, identity (the reference's dropout) and Linear."""
    inner = int(4 * (2 / 3) * dim)
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 2 * inner, bias=False),
        GatedGELU(),
        nn.Identity(),
        nn.Linear(inner, dim, bias=False),
    )


class Layers(nn.Module):
    """Depthwise convolution and feed-forward, `layers` times, with or without residuals."""

    def __init__(self, layers: int, dim: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.dconv_layer = nn.ModuleList(CausalDepthwise(dim) for _ in range(layers))
        self.ffd_layer = nn.ModuleList(feed_forward(dim) for _ in range(layers))

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        """Map tokens [B, T, H, W, D] to tokens of the same shape."""
        for convolution, feed in zip(self.dconv_layer, self.ffd_layer, strict=True):
            if self.residual:
                x = x + convolution(x, state)
                x = x + feed(x)
            else:
                x = feed(convolution(x, state))
        return x


class Bottleneck(nn.Module):
    """Compressed sensing: latent = phi @ token, and unrolled ISTA from latent to token."""

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        dim, latent = config.embedding_dim, config.latent_dim
        self.phi = nn.Parameter(torch.randn(latent, dim) / dim**0.5)
        self.Q = nn.Parameter(self.phi.detach().T.clone())
        iterations, layers = config.ista_iter_num, config.ista_layer_num
        self.forward_l = nn.ModuleList(Layers(layers, dim, False) for _ in range(iterations))
        self.backward_l = nn.ModuleList(Layers(layers, dim, False) for _ in range(iterations))
        self.weights = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in range(iterations))
        self.threshold = nn.ParameterList(
            nn.Parameter(torch.tensor([0.01])) for _ in range(iterations)
        )

    def forward(self, y: Tensor, state: CausalState) -> Tensor:
        """Map latents [B, T, h, w, D] to tokens [B, T, h, w, embedding]."""
        x = F.linear(y, self.Q)
        for i in range(len(self.weights)):
            mismatch = F.linear(x, self.phi) - y
            descended = x - self.weights[i] * F.linear(mismatch, self.phi.T)
            x = self.forward_l[i](descended, state)
            x = torch.sign(x) * F.relu(torch.abs(x) - self.threshold[i])
            x = descended + self.backward_l[i](x, state)
        return x


class Coder(nn.Module):
    """Encoder or decoder: linear patch layers on wavelet bands, and the layer stacks."""

    def __init__(self, config: LeanVAEConfig, decoder: bool) -> None:
        super().__init__()
        low, high, c = config.l_dim, config.h_dim, config.in_channels
        for kind, frames, bands in (("video", 2, 8), ("image", 1, 4)):
            pixels = c * frames * 4 * 4  # values of one band per token
            for band, dim, size in (
                ("low", low, pixels),
                ("high", high, pixels * (bands - 1)),
            ):
                # The layer's index, 0 or 1, must be that in the published names.
                projection = (
                    nn.Sequential(nn.Linear(dim, size))
                    if decoder
                    else nn.Sequential(nn.Identity(), nn.Linear(size, dim))
                )
                self.add_module(f"{kind}_{band}_proj", projection)
        self.low_layer = Layers(config.sep_num_layer, low, residual=True)
        self.high_layer = Layers(config.sep_num_layer, high, residual=True)
        self.fusion_layer = Layers(config.fusion_num_layer, low + high, residual=True)

    def projection(self, name: str) -> nn.Linear:
        """Return the linear patch layer `video_low`, `video_high`, `image_low` or `image_high`."""
        layer = self.get_submodule(f"{name}_proj")[-1]  # type: ignore[index]
        assert isinstance(layer, nn.Linear)
        return layer


def haar(x: Tensor) -> Tensor:
    """Return the unnormalised Haar bands of x [B, C, T, H, W]: sums and differences of neighbours.

    With T == 1 only H and W are transformed. Returns [B, bands * C, T/2 or 1, H/2, W/2], with
    bands varying slowest. 3-D bands count in binary over (t, h, w), with 1 for the difference;
    2-D bands count over (w, h), which is the reference's order.
    """
    b, c, t, h, w = x.shape
    if t == 1:
        x = x.reshape(b, c, 1, 1, h // 2, 2, w // 2, 2)
        order = (3, 7, 5)  # (t, w, h): the last pair varies fastest
    else:
        x = x.reshape(b, c, t // 2, 2, h // 2, 2, w // 2, 2)
        order = (3, 5, 7)
    for axis in (3, 5, 7):
        if x.shape[axis] == 2:
            first, second = torch.split(x, 1, dim=axis)
            x = torch.cat([first + second, first - second], dim=axis)
    x = x.permute(0, *order, 1, 2, 4, 6)
    return x.flatten(1, 4)


def inverse_haar(bands: Tensor, channels: int) -> Tensor:
    """Invert `haar`: [B, bands * C, T', H/2, W/2] to [B, C, T, H, W]."""
    b, n, t, h, w = bands.shape
    n //= channels
    if n == 4:
        x = bands.reshape(b, 1, 2, 2, channels, t, h, w).permute(0, 4, 5, 1, 6, 3, 7, 2)
    else:
        x = bands.reshape(b, 2, 2, 2, channels, t, h, w).permute(0, 4, 5, 1, 6, 2, 7, 3)
    for axis in (3, 5, 7):
        if x.shape[axis] == 2:
            mean, half = torch.split(x / 2, 1, dim=axis)
            x = torch.cat([mean + half, mean - half], dim=axis)
    return x.reshape(b, channels, t * n // 4, 2 * h, 2 * w)


def to_patches(x: Tensor, frames: int) -> Tensor:
    """Reshape [B, C, T, H, W] to [B, T/frames, H/4, W/4, C * frames * 16]."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // frames, frames, h // 4, 4, w // 4, 4)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def from_patches(x: Tensor, frames: int) -> Tensor:
    """Invert `to_patches`."""
    b, t, h, w, n = x.shape
    x = x.reshape(b, t, h, w, n // (16 * frames), frames, 4, 4)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, -1, t * frames, 4 * h, 4 * w)


class LeanVAE(nn.Module):
    """The network; its pixels are in [-0.5, 0.5], for CT in [-1000, 1000] HU."""

    def __init__(self, config: LeanVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.latent_bottleneck = Bottleneck(config)
        self.encoder = Coder(config, decoder=False)
        self.decoder = Coder(config, decoder=True)

    # The linear ends: pixels <-> wavelet bands <-> tokens.

    def bands(self, x: Tensor) -> Tensor:
        """Return the wavelet bands of frames; subclasses may compute them in another way."""
        return haar(x)

    def pixels(self, bands: Tensor) -> Tensor:
        """Invert `bands`."""
        return inverse_haar(bands, self.config.in_channels)

    def embed(self, x: Tensor) -> Tensor:
        """Map frames [B, C, T, H, W] to tokens [B, T', h, w, E]; T == 1 is an image, else video."""
        kind, frames = ("image", 1) if x.shape[2] == 1 else ("video", 2)
        bands, c = self.bands(x), self.config.in_channels
        low = self.encoder.projection(f"{kind}_low")(to_patches(bands[:, :c], frames))
        high = self.encoder.projection(f"{kind}_high")(to_patches(bands[:, c:], frames))
        return torch.cat([low, high], dim=-1)

    def unembed(self, tokens: Tensor, kind: str) -> Tensor:
        """Map tokens [B, T', h, w, E] to frames [B, C, T, H, W]; kind is "image" or "video"."""
        frames = 1 if kind == "image" else 2
        low, high = torch.split(tokens, [self.config.l_dim, self.config.h_dim], dim=-1)
        bands = torch.cat(
            [
                from_patches(self.decoder.projection(f"{kind}_low")(low), frames),
                from_patches(self.decoder.projection(f"{kind}_high")(high), frames),
            ],
            dim=1,
        )
        return self.pixels(bands)

    # The layers between: tokens <-> latents, with causal state.

    def compress(self, tokens: Tensor, state: CausalState) -> Tensor:
        """Map tokens [B, T, h, w, E] to latents [B, D, T, h, w]."""
        low, high = torch.split(tokens, [self.config.l_dim, self.config.h_dim], dim=-1)
        low, high = self.encoder.low_layer(low, state), self.encoder.high_layer(high, state)
        tokens = self.encoder.fusion_layer(torch.cat([low, high], dim=-1), state)
        return F.linear(tokens, self.latent_bottleneck.phi).permute(0, 4, 1, 2, 3)

    def expand(self, z: Tensor, state: CausalState) -> Tensor:
        """Map latents [B, D, T, h, w] to tokens [B, T, h, w, E]."""
        tokens = self.latent_bottleneck(z.permute(0, 2, 3, 4, 1), state)
        tokens = self.decoder.fusion_layer(tokens, state)
        low, high = torch.split(tokens, [self.config.l_dim, self.config.h_dim], dim=-1)
        low, high = self.decoder.low_layer(low, state), self.decoder.high_layer(high, state)
        return torch.cat([low, high], dim=-1)

    # The four parts of the stream.

    def encode_first(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map the first frame x [B, C, 1, H, W] to (z [B, D, 1, h, w], *state)."""
        state = CausalState()
        return self.compress(self.embed(x), state), *state.next

    def encode_step(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map frames x [B, C, 4k, H, W] and the state to (z [B, D, k, h, w], *state)."""
        state = CausalState(past)
        return self.compress(self.embed(x), state), *state.next

    def decode_first(self, z: Tensor) -> tuple[Tensor, ...]:
        """Map the first latents z [B, D, 1, h, w] to (x [B, C, 1, H, W], *state)."""
        state = CausalState()
        return self.unembed(self.expand(z, state), "image"), *state.next

    def decode_step(self, z: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Map latents z [B, D, k, h, w] and the state to (x [B, C, 4k, H, W], *state)."""
        state = CausalState(past)
        return self.unembed(self.expand(z, state), "video"), *state.next

    # Whole clips, for training and as the reference for streaming.

    def encode(self, x: Tensor) -> Tensor:
        """Map frames x [B, C, 1 + 4k, H, W] to z [B, D, 1 + k, h, w] in one pass."""
        tokens = [self.embed(x[:, :, :1])]
        if x.shape[2] > 1:
            tokens.append(self.embed(x[:, :, 1:]))
        return self.compress(torch.cat(tokens, dim=1), CausalState())

    def decode(self, z: Tensor) -> Tensor:
        """Map latents z [B, D, 1 + k, h, w] to x [B, C, 1 + 4k, H, W] in one pass."""
        tokens = self.expand(z, CausalState())
        frames = [self.unembed(tokens[:, :1], "image")]
        if z.shape[2] > 1:
            frames.append(self.unembed(tokens[:, 1:], "video"))
        return torch.cat(frames, dim=2)

    def load(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load published weights without `std_layer`, which is not used at inference.

        Raises BundleError if names or shapes do not fit this configuration.
        """
        weights = {k: v for k, v in state_dict.items() if not k.startswith("std_layer.")}
        if reason := misfits(shapes(weights), shapes(self.state_dict())):
            raise BundleError(
                f"expected the weights of this LeanVAE, found {reason}: take the args and weights "
                "of one checkpoint"
            )
        self.load_state_dict(weights)
