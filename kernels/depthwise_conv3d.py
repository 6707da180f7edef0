"""Causal depthwise 3x3x3 convolution of tokens, with its state and its residual.

    y[t, h, w, c] = sum over (i, j, k) of f[t + i - 2, h + j - 1, w + k - 1, c] * weight[i, j, k, c]
                    + bias[c]

where f continues the slab's frames by two frames of the state (none: zeros), and is zero outside
the image. A residual x + y is 1 added to the centre tap of the last time tap, at export. `box`
names rows and columns to be computed, as in `causal_conv3d`.

Layout: x, state, y [T, H, W, C] channels last, weight [27, C]. Sums are float32.

Why by hand: 27 multiplications a value, so that memory is the bound; the plain graph concatenates
[state | slab] and computes three 2-D convolutions whose sums it reads and writes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvae_deploy.kernels.blocks import Blocks, Choose, first, magnitude
from fvae_deploy.kernels.causal_conv3d import Box
from fvae_deploy.kernels.norm_silu import check_layout
from fvae_deploy.kernels.optional import jit, tl, triton
from fvae_deploy.kernels.record import Spec, traffic

KEPT = 2  # frames of the state


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    box: Box | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute it in torch: (y [T, H, W, C], the next state [2, H, W, C])."""
    past = x.new_zeros(KEPT, *x.shape[1:]) if state is None else state
    frames = torch.cat([past, x])
    volume = F.pad(frames.permute(3, 0, 1, 2)[None], (1, 1, 1, 1))
    kernels = weight.T.reshape(-1, 1, 3, 3, 3)
    y = F.conv3d(volume, kernels, bias, groups=len(kernels))[0].permute(1, 2, 3, 0)
    if box is not None:
        y = y[:, box[0] : box[1], box[2] : box[3]]
    return y, frames[-KEPT:]


@jit
def kernel(
    x,
    state,
    weight,
    bias,
    y,
    after,
    T,
    H,
    W,
    top,
    left,
    box_height,
    box_width,
    x_t,
    x_h,
    x_w,
    s_t,
    s_h,
    s_w,
    y_t,
    y_h,
    y_w,
    C: tl.constexpr,
    STATE: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute BP pixels of one frame and BC channels; grid (pixels, channels, frames)."""
    t = tl.program_id(2)
    place = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside, real = place < box_height * box_width, (c < C)[None, :]
    row, column = top + place // box_width, left + place % box_width
    acc = tl.zeros((BP, BC), tl.float32) + tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    for tap in range(0 if STATE else tl.maximum(2 - t, 0) * 9, 27):
        frame = t + tap // 9 - 2
        h, w = row + (tap // 3) % 3 - 1, column + tap % 3 - 1
        live = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        if STATE:
            old = frame < 0
            base = tl.where(old, state, x)
            base += tl.where(old, frame + 2, frame).to(tl.int64) * tl.where(old, s_t, x_t)
            at = h * tl.where(old, s_h, x_h) + w * tl.where(old, s_w, x_w)
        else:
            base = x + frame.to(tl.int64) * x_t
            at = h * x_h + w * x_w
        value = tl.load(base + at[:, None] + c[None, :], mask=live[:, None] & real, other=0.0)
        factor = tl.load(weight + tap * C + c, mask=c < C, other=0.0).to(tl.float32)
        acc += value.to(tl.float32) * factor[None, :]
    keep = inside[:, None] & real
    at = ((row - top) * y_h + (column - left) * y_w)[:, None] + c[None, :]
    tl.store(y + t.to(tl.int64) * y_t + at, acc.to(y.dtype.element_ty), mask=keep)
    if t == T - 1:
        pixel = (row * W + column)[:, None] * C + c[None, :]
        for slot in tl.static_range(2):
            frame = T - 2 + slot
            value = tl.zeros((BP, BC), x.dtype.element_ty)
            if frame >= 0:
                spot = x + frame.to(tl.int64) * x_t + (row * x_h + column * x_w)[:, None]
                value = tl.load(spot + c[None, :], mask=keep, other=0.0)
            elif STATE:
                spot = state + (frame + 2).to(tl.int64) * s_t + (row * s_h + column * s_w)[:, None]
                value = tl.load(spot + c[None, :], mask=keep, other=0.0)
            tl.store(after + slot * H * W * C + pixel, value, mask=keep)


def offered(channels: int) -> list[Blocks]:
    """Blocks for this many channels: few enough values a thread for any chip."""
    columns = 64 if channels >= 64 else 16
    return [Blocks(32, columns), Blocks(16, columns), Blocks(64, columns, warps=8)]


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    box: Box | None = None,
    out: Tensor | None = None,
    after: Tensor | None = None,
    choose: Choose = first,
    target: str = "sm_80",
    run: Any = kernel,
) -> tuple[Tensor, Tensor]:
    """Compute it by the kernel, arguments and results as in `reference`.

    `out` [T, h, w, C] and `after` [2, H, W, C] are written in place where given: tiles share
    one `after`. Raises ValueError for other shapes, layouts and boxes.
    """
    frames, height, width, channels = x.shape
    box = box or (0, height, 0, width)
    if not (0 <= box[0] < box[1] <= height and 0 <= box[2] < box[3] <= width):
        raise ValueError(f"expected a box inside {height}x{width}, found {box}")
    rows, columns = box[1] - box[0], box[3] - box[2]
    check_layout("x", x, (frames, height, width, weight.shape[1]))
    check_layout("state", state, (KEPT, height, width, channels))
    check_layout("out", out, (frames, rows, columns, channels))
    check_layout("after", after, (KEPT, height, width, channels))
    y = x.new_empty(frames, rows, columns, channels) if out is None else out
    if after is None:
        after = x.new_empty(KEPT, height, width, channels)
    past = x if state is None else state

    def once(blocks: Blocks) -> None:
        run[
            triton.cdiv(rows * columns, blocks.rows), triton.cdiv(channels, blocks.columns), frames
        ](
            x,
            past,
            weight,
            bias,
            y,
            after,
            frames,
            height,
            width,
            box[0],
            box[2],
            rows,
            columns,
            *x.stride()[:3],
            *past.stride()[:3],
            *y.stride()[:3],
            C=channels,
            STATE=state is not None,
            BP=blocks.rows,
            BC=blocks.columns,
            num_warps=blocks.warps,
        )

    alike = f"depthwise {x.dtype} {channels}, {magnitude(frames * rows * columns)}"
    choose(alike, offered(channels), once)
    return y, after


def specs(device: str = "meta") -> Iterator[tuple[Spec, Any]]:
    """Yield launches that LeanVAE makes."""
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        x, state, weight, bias = (
            torch.randn(*shape, 512, dtype=kind, device=device)
            for shape in ((1, 64, 64), (2, 64, 64), (27,), ())
        )
        one, eager = (partial(f, x, weight, bias, state=state) for f in (launch, reference))
        title = f"LeanVAE 512 {str(kind).removeprefix('torch.')}"
        # [state | slab] written, three convolutions, two sums, and the next state cut.
        plain = (
            2 * traffic(x, state) + 3 * traffic(x, x) + 2 * traffic(x, x, x) + 2 * traffic(state)
        )
        yield Spec(title, one, eager, 2 * 27 * x.numel(), plain, dot=False), kernel
