"""Causal 3-D convolution of a slab of frames and the state before it, as a matrix product.

    y[t, h, w, :] = sum over (i, j, k) of  f[t * st + i - S, h * sh + j - ph, w * sw + k - pw, :]
                    @ weight[i, j, k] + bias + residual[t, h, w, :]

Here f is the activated slab. Its frames before 0 are the S = KT - st frames of the state, or zeros
without a state. Outside the image, f is zero. `box` selects the rows and columns of the output to
compute. A tile reads its halo from the whole frame and is padded only at the image border:
tiles need no copies and equal the whole image.

The slab is activated as it is read:

    RMS      silu(x * inverse[t, h, w] * scale[c])     `inverse` is 1 / RMS of a position
    affine   silu(x * scale[t, c] + shift[t, c])       a group norm with known statistics
    none     x

Layout: channels last. Slab, state, residual and result are [T, H, W, C]; C has stride 1, the other
strides are free. Weights are [KT, KH, KW, C, C'], contiguous. Sums are float32.

Why by hand: the plain graph concatenates [state | slab], writes the activation and adds the
residual, one pass over memory each. The kernel reads these tensors in place and writes the state
for the next step in the same launch. With a framework's convolution, tiles also need padded copies.

Activation on reading is repeated for every tap, 27 times for 3x3x3. A separate pass before takes a
fiftieth of the convolution's time (docs/kernels.md). Whole planes may therefore be activated by a
launch of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvae_deploy.kernels import norm_silu
from fvae_deploy.kernels.blocks import Blocks, Choose, first, fitting, magnitude, product
from fvae_deploy.kernels.causal_conv3d_kernel import kernel
from fvae_deploy.kernels.chips import Chip, like
from fvae_deploy.kernels.norm_silu import (
    AFFINE,
    NONE,
    RMS,
    Activation,
    check_activation,
    check_contiguous,
    check_layout,
)
from fvae_deploy.kernels.optional import INTERPRETED, triton, upcast
from fvae_deploy.kernels.record import Spec, as_torch_reads, launcher_of, traffic

Box = tuple[int, int, int, int]  # of the output: first row, end of rows, first column, end


@dataclass(frozen=True)
class Window:
    """Strides and spatial padding of a convolution. The state pads the time axis."""

    stride: tuple[int, int, int] = (1, 1, 1)
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    def plane(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the output."""
        tall = height + self.top + self.bottom - kernel[0]
        wide = width + self.left + self.right - kernel[1]
        return tall // self.stride[1] + 1, wide // self.stride[2] + 1


SAME = Window(top=1, left=1, bottom=1, right=1)  # keeps the size with a 3x3 kernel


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    window: Window = Window(),
    activation: Activation | None = None,
    residual: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    box: Box | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the convolution in torch: y [T', H', W', C'] and the next state [S, H, W, C].

    `x` is [T, H, W, C], `weight` [KT, KH, KW, C, C']. With a box, y has the size of the box; the
    next state always covers the whole image.
    """
    frames = x if activation is None else activation(x).to(x.dtype)
    kept = weight.shape[0] - window.stride[0]
    past = frames.new_zeros(kept, *frames.shape[1:]) if state is None else state
    volume = torch.cat([past, frames]).permute(3, 0, 1, 2)[None]  # [1, C, S + T, H, W]
    padded = F.pad(volume, (window.left, window.right, window.top, window.bottom))
    y = F.conv3d(padded, weight.permute(4, 3, 0, 1, 2), bias, window.stride)[0]
    y = y.permute(1, 2, 3, 0)  # [T', H', W', C']
    if residual is not None:
        y = y + residual
    if clamp is not None:
        y = y.clamp(*clamp)
    if box is not None:
        y = y[:, box[0] : box[1], box[2] : box[3]]
    return y, torch.cat([past, frames])[frames.shape[0] :]


@cache  # called for every launch
def offered(outputs: int, size: int, chip: Chip, apart: bool) -> list[Blocks]:
    """Return the blocks to choose from, for `outputs` channels and elements of `size` bytes.

    The first is the fastest for most launches on an H100. With `apart`, some of them activate the
    slab in a launch of its own.
    """
    columns = min(128, max(16, 1 << (outputs - 1).bit_length()))
    # Large blocks first: the interpreter's cost grows with the number of programs.
    large = [Blocks(512, columns, 64, fused=not apart)] if INTERPRETED else []
    if outputs % 128 and outputs % 96 == 0:
        columns = 32 if size > 2 else 64  # a power of two that divides 96 and 192
    narrow = min(columns, 64)
    half = ((128, columns, 64, 8, 3), (128, columns, 64, 8, 2), (64, columns, 64, 4, 3),
            (128, columns, 32, 8, 2), (256, narrow, 32, 8, 2))  # fmt: skip
    single = ((64, narrow, 16, 4, 3), (64, narrow, 32, 4, 2), (128, narrow, 16, 8, 2))
    candidates = [Blocks(*numbers) for numbers in (single if size > 2 else half)]
    fit = fitting(candidates, lambda blocks: product(blocks, size), chip)
    if apart:
        fit = [replace(blocks, fused=False) for blocks in fit[:3]] + fit[-3:-1]
    return large + fit


@dataclass(frozen=True)
class Shapes:
    """Shapes of the tensors of one launch."""

    slab: tuple[int, int, int, int]
    state: tuple[int, int, int, int]
    image: tuple[int, int, int, int]  # of the output without a box
    box: Box

    @property
    def result(self) -> tuple[int, int, int, int]:
        """Shape of the output in the box."""
        top, bottom, left, right = self.box
        return self.image[0], bottom - top, right - left, self.image[3]

    @property
    def is_whole(self) -> bool:
        """Whether the box is the whole image."""
        return self.box == (0, self.image[1], 0, self.image[2])


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    window: Window = Window(),
    activation: Activation | None = None,
    residual: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    box: Box | None = None,
    out: Tensor | None = None,
    after: Tensor | None = None,
    tf32: bool = False,
    target: str = "sm_80",
    choose: Choose = first,
    run: Any = kernel,
) -> tuple[Tensor, Tensor]:
    """Compute the convolution with the kernel; arguments and results as in `reference`.

    `out` [T', h, w, C'] and `after` [S, H, W, C], contiguous, are optional buffers for the results:
    tiles share one `after`, and each writes its own box of it. `run` replaces the kernel to record
    launches. Raises ValueError for wrong shapes and layouts: a kernel would read other memory.
    """
    shapes = _shapes(x, weight, window, box)
    check_layout("x", x, shapes.slab)
    check_layout("state", state, shapes.state)
    check_layout("residual", residual, shapes.image)
    check_layout("out", out, shapes.result)
    check_contiguous("after", after, shapes.state)
    check_contiguous("weight", weight, tuple(weight.shape))
    check_contiguous("bias", bias, weight.shape[4:])
    check_activation(activation, x)
    out = x.new_empty(shapes.result) if out is None else out
    after = x.new_empty(shapes.state) if after is None else after
    steps, rows, columns, outputs = shapes.result
    kind = NONE if activation is None else activation.kind
    norm = activation or Activation(x)  # without one, the kernel gets pointers but reads nothing
    arguments = _sizes(shapes, weight, window, clamp)
    arguments |= _tensors(x, weight, bias, state, residual, norm, out, after)

    def run_with(blocks: Blocks) -> None:
        slab, kind_on_reading = x, kind
        if not blocks.fused:
            apply = launcher_of(norm_silu.apply_kernel, run)
            slab, kind_on_reading = norm_silu.apply(x, norm, run=apply), NONE
        grid = triton.cdiv(rows * columns, blocks.rows), triton.cdiv(outputs, blocks.columns), steps
        precision = {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": upcast(x.dtype)}
        sizes = {"BM": blocks.rows, "BN": blocks.columns, "BK": blocks.depth}
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        slab_strides = _strides("x", slab)
        run[grid](
            slab, **arguments, **slab_strides, KIND=kind_on_reading, **precision, **sizes, **options
        )

    several_taps = weight.shape[:3].numel() > 1
    apart = kind in (RMS, AFFINE) and several_taps and shapes.is_whole and x.is_contiguous()
    offers = offered(outputs, x.element_size(), like(target), apart)
    choose(_key(x, weight, window, kind, apart, steps * rows * columns), offers, run_with)
    return out, after


def _shapes(x: Tensor, weight: Tensor, window: Window, box: Box | None) -> Shapes:
    """Return the shapes of a launch; raises ValueError if box or strides are impossible."""
    frames, height, width, channels = x.shape
    kt, kh, kw, inputs, outputs = weight.shape
    kept = kt - window.stride[0]
    tall, wide = window.plane(height, width, (kh, kw))
    box = box or (0, tall, 0, wide)
    if not (0 <= box[0] < box[1] <= tall and 0 <= box[2] < box[3] <= wide):
        raise ValueError(f"expected a box inside {tall}x{wide}, found {box}")
    if kept > 0 and (tall, wide) != (height, width):
        raise ValueError("expected a stride in time or in space, found both")
    steps = (frames + kept - kt) // window.stride[0] + 1
    return Shapes(
        slab=(frames, height, width, inputs),
        state=(kept, height, width, channels),
        image=(steps, tall, wide, outputs),
        box=box,
    )


def _sizes(
    shapes: Shapes, weight: Tensor, window: Window, clamp: tuple[float, float] | None
) -> dict[str, Any]:
    """Return the kernel's arguments that are numbers and do not depend on blocks."""
    frames, height, width, channels = shapes.slab
    _, rows, columns, outputs = shapes.result
    low, high = clamp or (0.0, 0.0)
    return {
        **dict(zip(("T", "H", "W"), (frames, height, width), strict=True)),
        **dict(zip(("KT", "KH", "KW"), weight.shape[:3], strict=True)),
        **dict(zip(("ST", "SH", "SW"), window.stride, strict=True)),
        "PH": window.top,
        "PW": window.left,
        "C": channels,
        "N": outputs,
        "top": shapes.box[0],
        "left": shapes.box[2],
        "box_height": rows,
        "box_width": columns,
        "low": low,
        "high": high,
        "CLAMP": clamp is not None,
        "AFTER": shapes.state[0] > 0,
    }


def _tensors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None,
    norm: Activation,
    out: Tensor,
    after: Tensor,
) -> dict[str, Any]:
    """Return the kernel's arguments that are tensors, with their strides, except the slab.

    A missing tensor is replaced by another one: the kernel needs a pointer but does not read it.
    """
    past = x if state is None else state
    added = out if residual is None else residual
    return {
        "state": past,
        "weight": weight,
        "bias": weight if bias is None else bias,
        "residual": added,
        "inverse": norm.scale if norm.inverse is None else norm.inverse,
        "scale": norm.scale,
        "shift": norm.scale if norm.shift is None else norm.shift,
        "y": out,
        "after": after,
        **_strides("s", past),
        **_strides("r", added),
        **_strides("y", out),
        "STATE": state is not None,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
    }


def _key(x: Tensor, weight: Tensor, window: Window, kind: int, apart: bool, positions: int) -> str:
    """Return the key under which the fastest blocks of similar launches are stored."""
    kt, kh, kw, _, outputs = weight.shape
    label = f"{x.shape[3]} to {outputs} by {kt}x{kh}x{kw} at {window.stride}, {kind}"
    label += " or before" if apart else ""
    return f"convolution {x.dtype} {label}, {magnitude(positions)}"


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Return the strides of frames, rows and columns under the kernel's argument names."""
    return {f"{name}_{axis}": tensor.stride(i) for i, axis in enumerate("thw")}


def specs(device: str = "meta") -> Iterator[tuple[Spec, Any]]:
    """Yield launches of Wan, LeanVAE and the U-Net."""

    def frames(*shape: int, kind: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=kind, device=device)

    def spec(
        name: str,
        size: tuple[int, int, int],
        channels: tuple[int, int],
        taps: tuple[int, int, int],
        window: Window,
        kind: torch.dtype,
        normed: bool,
    ) -> Spec:
        x = frames(*size, channels[0], kind=kind)
        weight = frames(*taps, *channels, kind=kind)
        bias = frames(channels[1], kind=kind)
        kept = taps[0] - window.stride[0]
        state = frames(kept, *size[1:], channels[0], kind=kind) if kept else None
        tall, wide = window.plane(*size[1:], taps[1:])
        steps = (size[0] + kept - taps[0]) // window.stride[0] + 1
        root = torch.randn(size, device=device) if normed else None
        gain = torch.randn(channels[0], device=device)
        activation = Activation(gain, inverse=root) if normed else None
        residual = frames(steps, tall, wide, channels[1], kind=kind) if normed else None
        work = 2 * steps * tall * wide * channels[0] * channels[1] * taps[0] * taps[1] * taps[2]
        more: dict[str, Any] = {"state": state, "activation": activation, "residual": residual}
        more["window"] = window
        one = partial(launch, x, weight, bias, **more)
        eager = partial(reference, x, as_torch_reads(weight), bias, **more)
        # Concatenation, norm and SiLU each read and write a map; the residual sum reads two.
        slab, past = traffic(x), traffic(state)
        y = steps * tall * wide * channels[1] * x.element_size()
        plain = slab + past + traffic(weight, bias) + y
        plain += 3 * past + 2 * slab if kept else 0  # [state | slab], and slicing the next state
        plain += 4 * slab + 3 * y if normed else 0
        return Spec(f"{name} {str(kind).removeprefix('torch.')}", one, eager, work, plain)

    for kind in (torch.float16, torch.bfloat16):
        yield spec("Wan 96", (4, 256, 256), (96, 96), (3, 3, 3), SAME, kind, True), kernel
        yield spec("Wan 384", (1, 64, 64), (384, 384), (3, 3, 3), SAME, kind, True), kernel
    half, point = torch.float16, Window()
    down, time = Window(stride=(1, 2, 2), bottom=1, right=1), Window(stride=(2, 1, 1))
    yield spec("Wan down", (4, 512, 512), (96, 96), (1, 3, 3), down, half, False), kernel
    yield spec("Wan time", (4, 128, 128), (192, 192), (3, 1, 1), time, half, False), kernel
    yield spec("LeanVAE 1x1", (1, 64, 64), (352, 512), (1, 1, 1), point, half, False), kernel
    yield spec("U-Net 224", (17, 64, 64), (224, 224), (1, 3, 3), SAME, half, False), kernel
    yield spec("Wan 96", (4, 64, 64), (96, 96), (3, 3, 3), SAME, torch.float32, True), kernel
