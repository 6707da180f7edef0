"""Causal depthwise 3x3x3 convolution of tokens, with state and residual.

    y[t, h, w, c] = sum over (i, j, k) of f[t + i - 2, h + j - 1, w + k - 1, c] * weight[i, j, k, c]
                    + bias[c]

Here f is the slab preceded by the two frames of the state, or by zeros without a state. Outside the
image, f is zero. The export folds a residual x + y into the weights: it adds 1 to the centre tap of
the last frame. `box` selects the rows and columns to compute, as in `causal_conv3d`.

Layout: x, state, y [T, H, W, C] channels last, weight [27, C]. Sums are float32.

Why by hand: with only 27 multiplications per value, memory traffic limits the speed. The plain
graph concatenates [state | slab] and computes three 2-D convolutions, whose sums go through memory.
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
from fvae_deploy.kernels.inlined import locate
from fvae_deploy.kernels.norm_silu import check_contiguous, check_layout
from fvae_deploy.kernels.optional import jit, tl, triton
from fvae_deploy.kernels.record import Spec, traffic

KEPT = 2  # frames in the state


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    box: Box | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the convolution in torch: y [T, H, W, C] and the next state [2, H, W, C]."""
    past = x.new_zeros(KEPT, *x.shape[1:]) if state is None else state
    frames = torch.cat([past, x])
    volume = F.pad(frames.permute(3, 0, 1, 2)[None], (1, 1, 1, 1))
    kernels = weight.T.reshape(-1, 1, 3, 3, 3)
    y = F.conv3d(volume, kernels, bias, groups=len(kernels))[0].permute(1, 2, 3, 0)
    if box is not None:
        y = y[:, box[0] : box[1], box[2] : box[3]]
    return y, frames[-KEPT:]


# fmt: off
@jit
def kernel(
    x, state, weight, bias, y, after, T, H, W, top, left, box_height, box_width,
    x_t, x_h, x_w, s_t, s_h, s_w, y_t, y_h, y_w,
    C: tl.constexpr, STATE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):
    # fmt: on
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
        base, offset = locate(x, state, frame, h, w, x_t, x_h, x_w, s_t, s_h, s_w, 2, STATE)
        mask = live[:, None] & real
        value = tl.load(base + offset[:, None] + c[None, :], mask=mask, other=0.0)
        factor = tl.load(weight + tap * C + c, mask=c < C, other=0.0).to(tl.float32)
        acc += value.to(tl.float32) * factor[None, :]
    keep = inside[:, None] & real
    offset = ((row - top) * y_h + (column - left) * y_w)[:, None] + c[None, :]
    tl.store(y + t.to(tl.int64) * y_t + offset, acc.to(y.dtype.element_ty), mask=keep)
    if t == T - 1:
        _store_state(x, state, after, row, column, c, keep, T, H, W,
                     x_t, x_h, x_w, s_t, s_h, s_w, C, STATE, BP, BC)  # fmt: skip


# fmt: off
@jit
def _store_state(
    x, state, after, row, column, c, keep, T, H, W, x_t, x_h, x_w, s_t, s_h, s_w,
    C: tl.constexpr, STATE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):
    # fmt: on
    """Write the state for the next step: the last two frames of state and slab, [2, H, W, C]."""
    pixel = (row * W + column)[:, None] * C + c[None, :]
    for slot in tl.static_range(2):
        frame = T - 2 + slot
        value = tl.zeros((BP, BC), x.dtype.element_ty)
        if frame >= 0:
            address = x + frame.to(tl.int64) * x_t + (row * x_h + column * x_w)[:, None]
            value = tl.load(address + c[None, :], mask=keep, other=0.0)
        elif STATE:
            address = state + (frame + 2).to(tl.int64) * s_t + (row * s_h + column * s_w)[:, None]
            value = tl.load(address + c[None, :], mask=keep, other=0.0)
        tl.store(after + slot * H * W * C + pixel, value, mask=keep)


def offered(channels: int) -> list[Blocks]:
    """Return the blocks to choose from; all are small enough for every chip."""
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
    """Compute the convolution with the kernel; arguments and results as in `reference`.

    `out` [T, h, w, C] and `after` [2, H, W, C], contiguous, are optional buffers for the results;
    tiles share one `after`. Raises ValueError for wrong shapes, layouts and boxes.
    """
    frames, height, width, channels = x.shape
    box = box or (0, height, 0, width)
    if not (0 <= box[0] < box[1] <= height and 0 <= box[2] < box[3] <= width):
        raise ValueError(f"expected a box inside {height}x{width}, found {box}")
    rows, columns = box[1] - box[0], box[3] - box[2]
    check_layout("x", x, (frames, height, width, weight.shape[1]))
    check_layout("state", state, (KEPT, height, width, channels))
    check_layout("out", out, (frames, rows, columns, channels))
    check_contiguous("after", after, (KEPT, height, width, channels))
    check_contiguous("weight", weight, (27, channels))
    check_contiguous("bias", bias, (channels,))
    y = x.new_empty(frames, rows, columns, channels) if out is None else out
    if after is None:
        after = x.new_empty(KEPT, height, width, channels)
    past = x if state is None else state

    def run_with(blocks: Blocks) -> None:
        grid = triton.cdiv(rows * columns, blocks.rows), triton.cdiv(channels, blocks.columns)
        tensors = (x, past, weight, bias, y, after)
        sizes = (frames, height, width, box[0], box[2], rows, columns)
        run[(*grid, frames)](
            *tensors,
            *sizes,
            *x.stride()[:3],
            *past.stride()[:3],
            *y.stride()[:3],
            C=channels,
            STATE=state is not None,
            BP=blocks.rows,
            BC=blocks.columns,
            num_warps=blocks.warps,
        )

    key = f"depthwise {x.dtype} {channels}, {magnitude(frames * rows * columns)}"
    choose(key, offered(channels), run_with)
    return y, after


def specs(device: str = "meta") -> Iterator[tuple[Spec, Any]]:
    """Yield launches of LeanVAE."""
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        x, state, weight, bias = (
            torch.randn(*shape, 512, dtype=kind, device=device)
            for shape in ((1, 64, 64), (2, 64, 64), (27,), ())
        )
        one, eager = (partial(f, x, weight, bias, state=state) for f in (launch, reference))
        title = f"LeanVAE 512 {str(kind).removeprefix('torch.')}"
        # Writing [state | slab], three convolutions, two sums, and slicing the next state.
        plain = (
            2 * traffic(x, state) + 3 * traffic(x, x) + 2 * traffic(x, x, x) + 2 * traffic(state)
        )
        yield Spec(title, one, eager, 2 * 27 * x.numel(), plain, dot=False), kernel
