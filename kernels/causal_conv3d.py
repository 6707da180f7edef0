"""Causal 3-D convolution of a slab and its past, one tile at a time: an implicit matrix product.

    y[t, h, w, :] = sum over (i, j, k) of  f[t * st + i - S, h * sh + j - ph, w * sw + k - pw, :]
                    @ weight[i, j, k] + bias + residual[t, h, w, :]

where f is the slab after its activation, and before frame 0 come the S = KT - st frames of the
state (none: zeros). Outside the image f is zero. `box` names the rows and columns of the output to
be computed: a tile reads its halo from the whole frame and stops at the true border by itself, so
that tiles need no copies and equal the whole.

Activation of the slab, as it is read:

    RMS      silu(x * inverse[t, h, w] * scale[c])     `inverse` is 1 / RMS of a position
    affine   silu(x * scale[t, c] + shift[t, c])       a group norm whose statistics are known
    none     x

Layout: channels last. Slab, state, residual and result are [T, H, W, C] with any strides but that
of C, which is 1; weights [KT, KH, KW, C, C'] packed. Sums are float32.

Why by hand: the plain graph concatenates [state | slab] (one pass), writes the activation (one
pass) and adds the residual (one pass); here they are read where they lie and the state of the next
step is written on the way. Tiles of a framework's convolution need padded copies, too.

As it is read a slab is activated for every tap: 27 times for 3x3x3, where one pass before costs a
fiftieth of the convolution (docs/kernels.md). Whole planes may therefore be activated before.
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
from fvae_deploy.kernels.chips import Chip, like
from fvae_deploy.kernels.norm_silu import AFFINE, NONE, RMS, Activation, check_layout
from fvae_deploy.kernels.optional import INTERPRETED, jit, tl, triton, upcast
from fvae_deploy.kernels.record import Spec, as_torch_reads, beside, traffic

Box = tuple[int, int, int, int]  # rows and columns of the output: top, bottom, left, right


@dataclass(frozen=True)
class Window:
    """Strides and padding of a convolution; time is padded by the state alone."""

    stride: tuple[int, int, int] = (1, 1, 1)
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    def plane(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the output."""
        tall = height + self.top + self.bottom - kernel[0]
        wide = width + self.left + self.right - kernel[1]
        return tall // self.stride[1] + 1, wide // self.stride[2] + 1


SAME = Window(top=1, left=1, bottom=1, right=1)  # of a 3x3 kernel


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
    """Compute it in torch: (y [T', H', W', C'], the next state [S, H, W, C]).

    `x` is [T, H, W, C], `weight` [KT, KH, KW, C, C']. With a box, y has its size; the state is
    whole, for the reference sees all of it.
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


@jit
def _activate(
    a, pixels, frame, channels, live, inverse, scale, shift, plane, C, KIND: tl.constexpr
):
    """Activate a block [M, K] of one frame in float32; KIND is one of `norm_silu`'s."""
    a = a.to(tl.float32)
    if KIND != 2:
        root = tl.load(inverse + frame.to(tl.int64) * plane + pixels, mask=live, other=0.0)
        gain = tl.load(scale + channels, mask=channels < C, other=0.0)
        a = a * root[:, None] * gain[None, :]
    else:
        gain = tl.load(scale + frame * C + channels, mask=channels < C, other=0.0)
        offset = tl.load(shift + frame * C + channels, mask=channels < C, other=0.0)
        a = a * gain[None, :] + offset[None, :]
    return a if KIND == 3 else a * tl.sigmoid(a)


# fmt: off
@jit
def kernel(
    x, state, weight, bias, residual, inverse, scale, shift, y, after,
    T, H, W, top, left, box_height, box_width,
    x_t, x_h, x_w, s_t, s_h, s_w, r_t, r_h, r_w, y_t, y_h, y_w, low, high,
    C: tl.constexpr, N: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    KIND: tl.constexpr, STATE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    CLAMP: tl.constexpr, AFTER: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    # fmt: on
    """Compute BM pixels of one frame and BN channels; grid (pixels, channels, frames)."""
    S: tl.constexpr = KT - ST
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    t = tl.program_id(2)
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = place < box_height * box_width
    row, column = place // box_width, place % box_width
    channel = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    # Without a state, what lies before the first frame is zero: its taps are left out.
    first = 0 if STATE else tl.maximum(S - t * ST, 0) * (KH * KW * BLOCKS)
    for i in range(first, KT * KH * KW * BLOCKS):
        tap, c = i // BLOCKS, (i % BLOCKS) * BK + channel
        frame = t * ST + tap // (KH * KW) - S
        h = (top + row) * SH + (tap // KW) % KH - PH
        w = (left + column) * SW + tap % KW - PW
        live = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        if STATE:
            old = frame < 0
            base = tl.where(old, state, x)
            base += tl.where(old, frame + S, frame).to(tl.int64) * tl.where(old, s_t, x_t)
            at = h * tl.where(old, s_h, x_h) + w * tl.where(old, s_w, x_w)
        else:
            base = x + frame.to(tl.int64) * x_t
            at = h * x_h + w * x_w
        a = tl.load(
            base + at[:, None] + c[None, :], mask=live[:, None] & (c < C)[None, :], other=0.0
        )
        if KIND != 0:
            # The state holds activated frames, and what is outside the image stays zero.
            new = tl.maximum(frame, 0)
            lit = _activate(a, h * W + w, new, c, live, inverse, scale, shift, H * W, C, KIND)
            lit = tl.where(live[:, None] & (c < C)[None, :], lit, 0.0).to(x.dtype.element_ty)
            a = tl.where(frame < 0, a, lit) if STATE else lit
        b = tl.load(
            weight + (tap * C + c)[:, None] * N + n[None, :],
            mask=(c < C)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    keep = inside[:, None] & (n < N)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        at = (top + row) * r_h + (left + column) * r_w
        at = residual + t.to(tl.int64) * r_t + at[:, None] + n[None, :]
        acc += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    if CLAMP:
        acc = tl.minimum(tl.maximum(acc, low), high)
    at = y + t.to(tl.int64) * y_t + (row * y_h + column * y_w)[:, None] + n[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=keep)
    if AFTER:
        # The last frame's programs of the first channels write what the next step remembers.
        if (t == tl.num_programs(2) - 1) & (tl.program_id(1) == 0):
            pixel = (top + row) * W + left + column
            for slot in tl.static_range(S):
                frame = T - S + slot
                for block in range(BLOCKS):
                    part = block * BK + channel
                    held = inside[:, None] & (part < C)[None, :]
                    value = tl.zeros((BM, BK), x.dtype.element_ty)
                    if frame >= 0:
                        pixels = (top + row) * x_h + (left + column) * x_w
                        spot = x + frame.to(tl.int64) * x_t + pixels[:, None] + part[None, :]
                        value = tl.load(spot, mask=held, other=0.0)
                        if KIND != 0:
                            value = _activate(value, pixel, frame, part, inside, inverse, scale,
                                              shift, H * W, C, KIND)  # fmt: skip
                            value = value.to(x.dtype.element_ty)
                    elif STATE:
                        pixels = (top + row) * s_h + (left + column) * s_w
                        spot = (
                            state + (frame + S).to(tl.int64) * s_t + pixels[:, None] + part[None, :]
                        )
                        value = tl.load(spot, mask=held, other=0.0)
                    target = after + slot * H * W * C + pixel[:, None] * C + part[None, :]
                    tl.store(target, value, mask=held)


@cache  # it is asked at every launch
def offered(outputs: int, size: int, chip: Chip, apart: bool) -> list[Blocks]:
    """Blocks for this many channels out and elements of this many bytes on a chip.

    The first is the fastest of most launches on an H100. `apart`: the slab may be activated
    before.
    """
    columns = min(128, max(16, 1 << (outputs - 1).bit_length()))
    if INTERPRETED:  # which pays for every program
        return [Blocks(512, columns, 64, fused=not apart)]
    if outputs % 128 and outputs % 96 == 0:
        columns = 32 if size > 2 else 64  # 96 and 192 in blocks of a power of two
    narrow = min(columns, 64)
    half = ((128, columns, 64, 8, 3), (128, columns, 64, 8, 2), (64, columns, 64, 4, 3),
            (128, columns, 32, 8, 2), (256, narrow, 32, 8, 2))  # fmt: skip
    single = ((64, narrow, 16, 4, 3), (64, narrow, 32, 4, 2), (128, narrow, 16, 8, 2))
    cut = [Blocks(*numbers) for numbers in (single if size > 2 else half)]
    fit = fitting(cut, lambda blocks: product(blocks, size), chip)
    return [replace(blocks, fused=False) for blocks in fit[:3]] + fit[-3:-1] if apart else fit


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
    """Compute it by the kernel, arguments and results as in `reference`.

    `out` [T', h, w, C'] and `after` [S, H, W, C] are written in place where given: tiles share
    one `after`, each writing its own box of it. `run` is what is launched, for those who count.
    Raises ValueError for other shapes and layouts: a kernel would read what lies beside.
    """
    frames, height, width, channels = x.shape
    kt, kh, kw, _, outputs = weight.shape
    kept = kt - window.stride[0]
    tall, wide = window.plane(height, width, (kh, kw))
    box = box or (0, tall, 0, wide)
    if not (0 <= box[0] < box[1] <= tall and 0 <= box[2] < box[3] <= wide):
        raise ValueError(f"expected a box inside {tall}x{wide}, found {box}")
    remembers = kept > 0
    if remembers and (tall, wide) != (height, width):
        raise ValueError("expected a stride in time or in space, found both")
    rows, columns = box[1] - box[0], box[3] - box[2]
    steps = (frames + kept - kt) // window.stride[0] + 1
    past = (kept, height, width, channels)
    check_layout("x", x, (frames, height, width, weight.shape[3]))
    check_layout("state", state, past)
    check_layout("residual", residual, (steps, tall, wide, outputs))
    check_layout("out", out, (steps, rows, columns, outputs))
    check_layout("after", after, past)
    if out is None:
        out = x.new_empty(steps, rows, columns, outputs)
    if after is None:
        after = x.new_empty(past)
    held = x if state is None else state
    added = out if residual is None else residual

    kind = NONE if activation is None else activation.kind
    lit = activation or Activation(x)  # what is not there is not read, but has a pointer

    def once(blocks: Blocks) -> None:
        slab, as_read = x, kind
        if not blocks.fused:
            how = beside(run, norm_silu.apply_kernel)
            slab, as_read = norm_silu.apply(x, lit, run=how), NONE
        run[triton.cdiv(rows * columns, blocks.rows), triton.cdiv(outputs, blocks.columns), steps](
            slab,
            held,
            weight,
            weight if bias is None else bias,
            added,
            lit.scale if lit.inverse is None else lit.inverse,
            lit.scale,
            lit.scale if lit.shift is None else lit.shift,
            y=out,
            after=after,
            T=frames,
            H=height,
            W=width,
            top=box[0],
            left=box[2],
            box_height=rows,
            box_width=columns,
            **_strides("x", slab),
            **_strides("s", held),
            **_strides("r", added),
            **_strides("y", out),
            low=0.0 if clamp is None else clamp[0],
            high=0.0 if clamp is None else clamp[1],
            C=channels,
            N=outputs,
            **dict(zip(("KT", "KH", "KW"), weight.shape, strict=False)),
            **dict(zip(("ST", "SH", "SW"), window.stride, strict=True)),
            PH=window.top,
            PW=window.left,
            KIND=as_read,
            STATE=state is not None,
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            CLAMP=clamp is not None,
            AFTER=remembers,
            PRECISION="tf32" if tf32 else "ieee",
            UPCAST=upcast(x.dtype),
            BM=blocks.rows,
            BN=blocks.columns,
            BK=blocks.depth,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    whole = box == (0, tall, 0, wide)
    apart = kind in (RMS, AFFINE) and kt * kh * kw > 1 and whole and x.is_contiguous()
    alike = f"{channels} to {outputs} by {kt}x{kh}x{kw} at {window.stride}, {kind}"
    alike += " or before" if apart else ""
    alike = f"convolution {x.dtype} {alike}, {magnitude(steps * rows * columns)}"
    choose(alike, offered(outputs, x.element_size(), like(target), apart), once)
    return out, after


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Strides along frames, rows and columns under the kernel's names."""
    return {f"{name}_{axis}": tensor.stride(i) for i, axis in enumerate("thw")}


def specs(device: str = "meta") -> Iterator[tuple[Spec, Any]]:
    """Yield launches that Wan, LeanVAE and the U-Net make."""

    def frames(*shape: int, kind: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=kind, device=device)

    def made(
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
        # Concatenation, norm and SiLU read and write a map each, the sum reads two.
        slab, past = traffic(x), traffic(state)
        y = steps * tall * wide * channels[1] * x.element_size()
        plain = slab + past + traffic(weight, bias) + y
        plain += 3 * past + 2 * slab if kept else 0  # [state | slab], and the next state cut
        plain += 4 * slab + 3 * y if normed else 0
        return Spec(f"{name} {str(kind).removeprefix('torch.')}", one, eager, work, plain)

    for kind in (torch.float16, torch.bfloat16):
        yield made("Wan 96", (4, 256, 256), (96, 96), (3, 3, 3), SAME, kind, True), kernel
        yield made("Wan 384", (1, 64, 64), (384, 384), (3, 3, 3), SAME, kind, True), kernel
    half, point = torch.float16, Window()
    down, time = Window(stride=(1, 2, 2), bottom=1, right=1), Window(stride=(2, 1, 1))
    yield made("Wan down", (4, 512, 512), (96, 96), (1, 3, 3), down, half, False), kernel
    yield made("Wan time", (4, 128, 128), (192, 192), (3, 1, 1), time, half, False), kernel
    yield made("LeanVAE 1x1", (1, 64, 64), (352, 512), (1, 1, 1), point, half, False), kernel
    yield made("U-Net 224", (17, 64, 64), (224, 224), (1, 3, 3), SAME, half, False), kernel
    yield made("Wan 96", (4, 64, 64), (96, 96), (3, 3, 3), SAME, torch.float32, True), kernel
