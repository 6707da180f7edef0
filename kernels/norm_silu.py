"""Norms, and the statistics that a convolution's activation needs.

    RMS norm      inverse[t, h, w] = sqrt(C) / max(|x[t, h, w, :]|, 1e-12)
                  y = silu(x * inverse * scale)
    group norm    y = silu(x * scale[t, c] + shift[t, c])
                  `channels` computes count, mean and sum of squared deviations of every frame and
                  channel, in chunks of positions; `merged` turns them into scale and shift

Statistics and application are separate. Statistics of tiles can be merged (Chan, Golub and LeVeque,
1983), so that a tiled group norm is exact. `causal_conv3d` applies either norm as it reads its
input. `apply` does so for other consumers, and for slabs that are faster activated before.

Layout: x, y [T, H, W, C], channels last and contiguous. Statistics are float32, merged in float64.

Why by hand: for norm and SiLU, the plain graph reads a map three times and writes it twice. Here
it is read once for the statistics; the rest is part of the convolution, or one more pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvae_deploy.kernels.blocks import Blocks, Choose, first, magnitude
from fvae_deploy.kernels.optional import jit, tl, triton
from fvae_deploy.kernels.record import Spec, traffic

TINY = 1e-12
# Kinds of activation in kernels.
NONE, RMS, AFFINE, RMS_ALONE = 0, 1, 2, 3


@dataclass(frozen=True)
class Activation:
    """The norm and SiLU of a slab before a convolution.

    Either `inverse` [T, H, W] and `scale` [C], or `scale` and `shift` [T, C]; float32. An RMS
    norm can leave out SiLU.
    """

    scale: Tensor
    inverse: Tensor | None = None
    shift: Tensor | None = None
    silu: bool = True

    @property
    def kind(self) -> int:
        """Return RMS, AFFINE or RMS_ALONE."""
        if self.inverse is None:
            return AFFINE
        return RMS if self.silu else RMS_ALONE

    def __call__(self, x: Tensor) -> Tensor:
        """Activate x [T, H, W, C] in float32."""
        wide = x.float() if x.dtype != torch.float64 else x
        if self.inverse is not None:
            normed = wide * self.inverse[..., None] * self.scale
            return F.silu(normed) if self.silu else normed
        assert self.shift is not None
        return F.silu(wide * self.scale[:, None, None] + self.shift[:, None, None])


def rms_reference(x: Tensor) -> Tensor:
    """Return 1 / RMS of every position of x [T, H, W, C]: [T, H, W]."""
    wide = x.float() if x.dtype != torch.float64 else x
    inverse: Tensor = x.shape[-1] ** 0.5 / wide.norm(dim=-1).clamp_min(TINY)
    return inverse


def channels_reference(x: Tensor) -> Tensor:
    """Return count, mean and sum of squared deviations of x [T, H, W, C]: [T, C, 1, 3]."""
    wide = x.float() if x.dtype != torch.float64 else x
    values = wide.flatten(1, 2).transpose(1, 2)  # [T, C, H * W]
    mean = values.mean(2)
    deviation = (values - mean[..., None]).square().sum(2)
    count = torch.full_like(mean, values.shape[2])
    return torch.stack([count, mean, deviation], dim=-1)[:, :, None]


def apply_reference(x: Tensor, activation: Activation) -> Tensor:
    """Return `activation(x)` in x's type."""
    return activation(x).to(x.dtype)


def merged(statistics: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Activation:
    """Merge statistics [T, C, chunks, 3], also of tiles, into scale and shift [T, C] by groups."""
    parts = statistics.double().unflatten(1, (groups, -1)).flatten(2, 3)
    count, mean, deviation = parts.unbind(-1)  # [T, groups, channels * chunks]
    total = count.sum(2)
    middle = (count * mean).sum(2) / total
    spread = (deviation + count * (mean - middle[..., None]).square()).sum(2) / total
    each = weight.numel() // groups
    root, middle = (v.repeat_interleave(each, 1) for v in ((spread + eps).rsqrt(), middle))
    scale = root * weight.double()
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return Activation(scale.to(kind), shift=(bias.double() - middle * scale).to(kind))


@jit
def rms_kernel(x, y, positions, C: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr):
    """Compute 1 / RMS of BP positions."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    c = tl.arange(0, WIDE)
    live = (p < positions)[:, None] & (c < C)[None, :]
    value = tl.load(x + p[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(value * value, 1))
    root: tl.constexpr = C**0.5
    tl.store(y + p, root / tl.maximum(norm, 1e-12), mask=p < positions)


@jit
def channels_kernel(
    x, statistics, positions, chunks, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """Compute statistics of BP positions and BC channels; grid (chunks, channels, T)."""
    chunk, t = tl.program_id(0), tl.program_id(2)
    p, c = chunk * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    live = (p < positions)[:, None] & (c < C)[None, :]
    at = x + t.to(tl.int64) * positions * C + p[:, None] * C + c[None, :]
    value = tl.load(at, mask=live, other=0.0).to(tl.float32)
    count = tl.minimum(positions - chunk * BP, BP).to(tl.float32)
    mean = tl.sum(value, 0) / count
    apart = tl.where(live, value - mean[None, :], 0.0)
    at = statistics + ((t * C + c).to(tl.int64) * chunks + chunk) * 3
    tl.store(at, count + tl.zeros((BC,), tl.float32), mask=c < C)
    tl.store(at + 1, mean, mask=c < C)
    tl.store(at + 2, tl.sum(apart * apart, 0), mask=c < C)


@jit
def apply_kernel(
    x,
    y,
    inverse,
    scale,
    shift,
    positions,
    C: tl.constexpr,
    KIND: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Normalise and activate BP positions and BC channels; grid (positions, channels, T)."""
    t = tl.program_id(2)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = (p < positions)[:, None] & (c < C)[None, :]
    at = t.to(tl.int64) * positions * C + p[:, None] * C + c[None, :]
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    if KIND != 2:
        root = tl.load(inverse + t.to(tl.int64) * positions + p, mask=p < positions, other=0.0)
        value = value * root[:, None] * tl.load(scale + c, mask=c < C, other=0.0)[None, :]
    else:
        value *= tl.load(scale + t * C + c, mask=c < C, other=0.0)[None, :]
        value += tl.load(shift + t * C + c, mask=c < C, other=0.0)[None, :]
    if KIND != 3:
        value *= tl.sigmoid(value)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=live)


def check_layout(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError if a tensor has another shape, or if its channels are not contiguous."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"expected {name} {list(shape)}, found {list(tensor.shape)}")
    if shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"expected {name} with channels last, found strides {tensor.stride()}")


def check_contiguous(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError if a tensor has another shape, or if it is not contiguous."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"expected {name} {list(shape)}, found {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"expected {name} contiguous, found strides {tensor.stride()}")


def check_activation(activation: Activation | None, x: Tensor) -> None:
    """Raise ValueError if an activation's tensors do not have the shapes for x [T, H, W, C]."""
    if activation is None:
        return
    whole, channels = activation.kind == AFFINE, (x.shape[3],)
    shape = (x.shape[0], *channels) if whole else channels
    check_contiguous("scale", activation.scale, shape)
    check_contiguous("shift", activation.shift, shape)
    check_contiguous("inverse", activation.inverse, tuple(x.shape[:3]))


def rms(x: Tensor, *, choose: Choose = first, run: Any = rms_kernel) -> Tensor:
    """Compute `rms_reference` with the kernel."""
    check_contiguous("x", x, tuple(x.shape))
    positions, channels = x.numel() // x.shape[-1], x.shape[-1]
    wide = triton.next_power_of_2(channels)
    y = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)

    def run_with(blocks: Blocks) -> None:
        grid = (triton.cdiv(positions, blocks.rows),)
        run[grid](x, y, positions, C=channels, WIDE=wide, BP=blocks.rows, num_warps=blocks.warps)

    offered = [Blocks(max(1, values // wide), wide) for values in (4096, 2048, 8192)]
    choose(f"rms {x.dtype} {channels}, {magnitude(positions)}", offered, run_with)
    return y


def channels(x: Tensor, *, run: Any = channels_kernel) -> Tensor:
    """Compute `channels_reference` with the kernel, in chunks of positions: [T, C, chunks, 3]."""
    check_contiguous("x", x, tuple(x.shape))
    frames, positions, width = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
    chunks = triton.cdiv(positions, 128)
    statistics = torch.empty(frames, width, chunks, 3, dtype=torch.float32, device=x.device)
    run[chunks, triton.cdiv(width, 64), frames](
        x, statistics, positions, chunks, C=width, BP=128, BC=64, num_warps=4
    )
    return statistics


def apply(x: Tensor, activation: Activation, *, run: Any = apply_kernel) -> Tensor:
    """Compute `apply_reference` with the kernel."""
    check_contiguous("x", x, tuple(x.shape))
    check_activation(activation, x)
    frames, positions, channels = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
    inverse, shift = activation.inverse, activation.shift
    y = torch.empty_like(x)
    run[triton.cdiv(positions, 64), triton.cdiv(channels, 64), frames](
        x,
        y,
        activation.scale if inverse is None else inverse,
        activation.scale,
        activation.scale if shift is None else shift,
        positions,
        C=channels,
        KIND=activation.kind,
        BP=64,
        BC=64,
        num_warps=4,
    )
    return y


def group_norm_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Return silu(group norm) of every frame of x [T, H, W, C] by torch, for comparison."""
    return F.silu(F.group_norm(x.movedim(-1, 1), groups, weight, bias, eps)).movedim(1, -1)


def specs(device: str = "meta") -> Iterator[tuple[Spec, Any]]:
    """Yield launches of Wan and SD."""

    def spec(name: str, x: Tensor, one: Any, eager: Any, passes: int, work: int) -> Spec:
        title = f"{name} {str(x.dtype).removeprefix('torch.')}"
        flops, plain = float(work * x.numel()), float(passes * traffic(x))
        return Spec(title, one, eager, flops, plain, dot=False)

    for kind in (torch.float16, torch.bfloat16):
        x = torch.randn(4, 256, 256, 96, dtype=kind, device=device)
        gain, root = (torch.randn(shape, device=device) for shape in ((96,), x.shape[:-1]))
        norm = Activation(gain, inverse=root)
        # The plain graph writes the squares and reads them for their sum.
        one = partial(lambda x, target, **how: rms(x, **how), x)
        yield spec("rms Wan 96", x, one, partial(rms_reference, x), 3, 2), rms_kernel
        # The plain graph writes the normalised map and reads it for SiLU.
        one = partial(lambda x, norm, run, **_: apply(x, norm, run=run), x, norm)
        yield spec("apply Wan 96", x, one, partial(apply_reference, x, norm), 4, 6), apply_kernel
    x = torch.randn(1, 512, 512, 128, dtype=torch.float16, device=device)
    # The plain graph reads the map for the mean, and writes and reads the centred squares.
    one = partial(lambda x, run, **_: channels(x, run=run), x)
    eager = partial(channels_reference, x)
    yield spec("channels SD 128", x, one, eager, 4, 4), channels_kernel
