"""Layers of the denoiser, on volumes [B, C, f, h, w]; see `models.denoiser`.

After `fold`, for inference, B must be 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_deploy.export.models.slicewise import Doubling

GROUPS = 32


class InFrame(nn.Conv2d):
    """A 2-D convolution within every frame."""

    def fold(self) -> None:
        """Reshape the weights for the 3-D convolution that `forward` then uses."""
        self.weight = nn.Parameter(self.weight[:, :, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, f, h, w] to [B, C', f, h', w']."""
        if self.weight.ndim == 4:
            frames = super().forward(x.transpose(1, 2).flatten(0, 1))
            result: Tensor = frames.unflatten(0, (len(x), -1)).transpose(1, 2)
            return result
        padding = (0, *(int(n) for n in self.padding))
        return F.conv3d(x, self.weight, self.bias, (1, *self.stride), padding)


class AlongFrames(nn.Module):
    """A convolution over three frames at every pixel, with both ends reflected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.temporal_conv = nn.Conv1d(width, width, 3)

    def fold(self) -> None:
        """Reshape the weights for the 3-D convolution that `forward` then uses."""
        self.temporal_conv.weight = nn.Parameter(self.temporal_conv.weight[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, f, h, w], with f >= 2, to the same shape."""
        weight, bias = self.temporal_conv.weight, self.temporal_conv.bias
        frames = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], dim=2)
        if weight.ndim == 5:
            return F.conv3d(frames, weight, bias)
        neighbours = torch.cat([frames[:, :, :-2], frames[:, :, 1:-1], frames[:, :, 2:]], dim=1)
        return F.linear(neighbours.movedim(1, -1), weight.mT.flatten(1), bias).movedim(-1, 1)


class FrameNorm(nn.GroupNorm):
    """Group norm of every frame, computed from sums over planes, which keep the memory layout."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, f, h, w] to the same shape."""
        centred = x - self._group_means(x.mean((3, 4)))
        area = x.shape[3] * x.shape[4]
        squares: Tensor = torch.linalg.vector_norm(centred, dim=(3, 4)).square() / area
        inverse = torch.rsqrt(self._group_means(squares) + self.eps)
        scale = self.weight[:, None, None, None] * inverse
        result: Tensor = centred * scale + self.bias[:, None, None, None]
        return result

    def _group_means(self, means: Tensor) -> Tensor:
        """Map means of channels [B, C, f] to the means of their groups [B, C, f, 1, 1]."""
        share = means.shape[1] // self.num_groups
        # A single convolution, since TensorRT fused reshape, mean and expand with the layers around
        # them in ways that differed from build to build.
        ones = means.new_ones((means.shape[1], share, 1))
        result: Tensor = F.conv1d(means, ones, groups=self.num_groups) / share
        return result[..., None, None]


class ResBlock(nn.Module):
    """Twice norm, SiLU and convolution, with the time embedding added in between."""

    def __init__(self, width: int, out: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            FrameNorm(GROUPS, width), nn.SiLU(), InFrame(width, out, 3, padding=1)
        )
        self.in_layers_tem = AlongFrames(out)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(
            FrameNorm(GROUPS, out), nn.SiLU(), nn.Identity(), InFrame(out, out, 3, padding=1)
        )
        self.out_layers_tem = AlongFrames(out)
        self.skip_connection = nn.Identity() if width == out else InFrame(width, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x [B, C, f, h, w] and embedding [B, E] to [B, C', f, h, w]."""
        y = self.in_layers_tem(self.in_layers(x))
        y = y + self.emb_layers(embedding)[..., None, None, None]
        y = self.out_layers_tem(self.out_layers(y))
        result: Tensor = self.skip_connection(x) + y
        return result


class Attention(nn.Module):
    """Multi-head attention; keys and values are inputs."""

    def __init__(self, width: int, context: int, head: int) -> None:
        super().__init__()
        self.heads = width // head
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens [..., n, dim] to keys and values [..., heads, n, d]."""
        return self._split(self.to_k(tokens)), self._split(self.to_v(tokens))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Let tokens x [f, n, C] attend to keys and values [f or 1, heads, m, d]."""
        frames = x.shape[:2]
        if keys.shape[0] == 1:  # the same for all frames, so treat all tokens as one frame
            x = x.flatten(0, 1)[None]
        y = F.scaled_dot_product_attention(self._split(self.to_q(x)), keys, values)
        result: Tensor = self.to_out(y.transpose(-3, -2).flatten(-2))
        return result.view(*frames, -1)

    def _split(self, tokens: Tensor) -> Tensor:
        split: Tensor = tokens.unflatten(-1, (self.heads, -1))
        return split.transpose(-3, -2)


class GEGLU(nn.Module):
    """A linear layer to value and gate, the second half; returns value * gelu(gate)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)
        self.halves: nn.ModuleList | None = None

    def fold(self) -> None:
        """Split the layer into two for value and gate, which saves copying the halves."""
        self.halves = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, self.proj.in_features, self.proj.out_features // 2)
            for _ in range(2)
        )
        parts = zip(self.halves, self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        for half, weight, bias in parts:
            half.weight, half.bias = nn.Parameter(weight), nn.Parameter(bias)
        del self.proj

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] to [..., inner]."""
        if self.halves is None:
            value, gate = self.proj(x).chunk(2, dim=-1)
        else:
            value, gate = (half(x) for half in self.halves)
        result: Tensor = value * F.gelu(gate)
        return result


class FeedForward(nn.Module):
    """GEGLU to four times the width, and a linear layer back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 4 * width
        self.net = nn.Sequential(GEGLU(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., C] to [..., C]."""
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
        """Map tokens x [f, n, C], with keys and values of the text [f or 1, heads, m, d]."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, *self.attn1.keys_values(normed))
        x = x + self.attn2(self.norm2(x), keys, values)
        result: Tensor = x + self.ff(self.norm3(x))
        return result


class SpatialTransformer(nn.Module):
    """Transformers with the pixels of every frame as tokens, and a residual around them."""

    def __init__(self, width: int, context: int, head: int, depth: int) -> None:
        super().__init__()
        self.norm = FrameNorm(GROUPS, width, eps=1e-6)
        self.proj_in = InFrame(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            Transformer(width, context, head) for _ in range(depth)
        )
        self.proj_out = InFrame(width, width, 1)

    def forward(self, x: Tensor, text: Iterator[Tensor]) -> Tensor:
        """Map x [B, C, f, h, w] to the same shape; each transformer takes two tensors of `text`."""
        pixels = self.proj_in(self.norm(x)).permute(0, 2, 3, 4, 1)  # [B, f, h, w, C]
        frames = pixels[0] if len(x) == 1 else pixels.flatten(0, 1)
        tokens = frames.flatten(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, next(text), next(text))
        frames = tokens.unflatten(1, x.shape[3:])
        y = frames[None] if len(x) == 1 else frames.unflatten(0, (len(x), -1))
        y = y.permute(0, 4, 1, 2, 3)
        result: Tensor = x + self.proj_out(y)
        return result


class Downsample(nn.Module):
    """A convolution of stride 2, then a convolution along the frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = InFrame(width, width, 3, stride=2)
        self.op_tem = AlongFrames(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, f, h, w], with h and w even, to [B, C, f, h/2, w/2]."""
        # The published padding of 1 on all sides is never read at the bottom and right, so it is
        # left out there.
        result: Tensor = self.op_tem(self.op(F.pad(x, (1, 0, 1, 0))))
        return result


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, a convolution, then a convolution along the frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = InFrame(width, width, 3, padding=1)
        self.conv_tem = AlongFrames(width)
        self.doubling: Doubling | None = None

    def fold(self) -> None:
        """Combine upsampling and convolution, which takes 4/9 of the work."""
        self.doubling = Doubling(self.conv)
        del self.conv

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, f, h, w] to [B, C, f, 2h, 2w]."""
        if self.doubling is None:
            x = self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)))
        else:
            x = self.doubling(x[0].transpose(0, 1)).transpose(0, 1)[None]
        result: Tensor = self.conv_tem(x)
        return result
