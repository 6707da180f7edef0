"""The Triton kernel of `causal_conv3d`, which documents the computation and the layout."""

from __future__ import annotations

from fvae_deploy.kernels.inlined import locate, multiply
from fvae_deploy.kernels.optional import jit, tl


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
    # Without a state, frames before the first are zero: their taps are skipped.
    first = 0 if STATE else tl.maximum(S - t * ST, 0) * (KH * KW * BLOCKS)
    for i in range(first, KT * KH * KW * BLOCKS):
        tap, c = i // BLOCKS, (i % BLOCKS) * BK + channel
        frame = t * ST + tap // (KH * KW) - S
        h = (top + row) * SH + (tap // KW) % KH - PH
        w = (left + column) * SW + tap % KW - PW
        live = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        base, offset = locate(x, state, frame, h, w, x_t, x_h, x_w, s_t, s_h, s_w, S, STATE)
        mask = live[:, None] & (c < C)[None, :]
        a = tl.load(base + offset[:, None] + c[None, :], mask=mask, other=0.0)
        if KIND != 0:
            # Frames of the state are already activated. Outside the image, zeros stay zero.
            new = tl.maximum(frame, 0)
            active = _activate(a, h * W + w, new, c, live, inverse, scale, shift, H * W, C, KIND)
            active = tl.where(mask, active, 0.0).to(x.dtype.element_ty)
            a = tl.where(frame < 0, a, active) if STATE else active
        b = tl.load(
            weight + (tap * C + c)[:, None] * N + n[None, :],
            mask=(c < C)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        acc = multiply(a, b, acc, PRECISION, UPCAST)
    keep = inside[:, None] & (n < N)[None, :]
    acc = _finish(acc, bias, residual, t, top, left, row, column, n, keep,
                  r_t, r_h, r_w, low, high, N, BIAS, RESIDUAL, CLAMP)  # fmt: skip
    out = y + t.to(tl.int64) * y_t + (row * y_h + column * y_w)[:, None] + n[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=keep)
    if AFTER:
        # The programs of the last frame and the first channels write the state for the next step.
        if (t == tl.num_programs(2) - 1) & (tl.program_id(1) == 0):
            _store_state(x, state, after, inverse, scale, shift, top, left, row, column, channel,
                         inside, T, H, W, x_t, x_h, x_w, s_t, s_h, s_w,
                         C, S, KIND, STATE, BM, BK)  # fmt: skip


@jit
def _activate(
    a, pixels, frame, channels, live, inverse, scale, shift, plane, C, KIND: tl.constexpr
):
    """Activate a block [M, K] of one frame in float32; KIND is one of `norm_silu`'s kinds."""
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
def _finish(
    acc, bias, residual, t, top, left, row, column, n, keep, r_t, r_h, r_w, low, high,
    N: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, CLAMP: tl.constexpr,
):
    # fmt: on
    """Add bias and residual to a block of sums [M, N], and clamp it."""
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        offset = (top + row) * r_h + (left + column) * r_w
        address = residual + t.to(tl.int64) * r_t + offset[:, None] + n[None, :]
        acc += tl.load(address, mask=keep, other=0.0).to(tl.float32)
    if CLAMP:
        acc = tl.minimum(tl.maximum(acc, low), high)
    return acc


# fmt: off
@jit
def _store_state(
    x, state, after, inverse, scale, shift, top, left, row, column, channel, inside, T, H, W,
    x_t, x_h, x_w, s_t, s_h, s_w,
    C: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr, STATE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):
    # fmt: on
    """Write the state for the next step: the last S of state and slab, activated, [S, H, W, C]."""
    pixel = (top + row) * W + left + column
    for slot in tl.static_range(S):
        frame = T - S + slot
        for block in range((C + BK - 1) // BK):
            c = block * BK + channel
            mask = inside[:, None] & (c < C)[None, :]
            value = tl.zeros((BM, BK), x.dtype.element_ty)
            if frame >= 0:
                offset = (top + row) * x_h + (left + column) * x_w
                address = x + frame.to(tl.int64) * x_t + offset[:, None] + c[None, :]
                value = tl.load(address, mask=mask, other=0.0)
                if KIND != 0:
                    value = _activate(value, pixel, frame, c, inside, inverse, scale, shift,
                                      H * W, C, KIND)  # fmt: skip
                    value = value.to(x.dtype.element_ty)
            elif STATE:
                offset = (top + row) * s_h + (left + column) * s_w
                address = state + (frame + S).to(tl.int64) * s_t + offset[:, None] + c[None, :]
                value = tl.load(address, mask=mask, other=0.0)
            target = after + slot * H * W * C + pixel[:, None] * C + c[None, :]
            tl.store(target, value, mask=mask)
