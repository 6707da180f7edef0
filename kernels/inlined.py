"""Parts that several kernels share. Triton inlines them: they cost no call."""

from __future__ import annotations

from fvae_deploy.kernels.optional import jit, tl


@jit
def multiply(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Return a @ b + acc, or a @ b if acc is None; sums are float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# fmt: off
@jit
def locate(
    x, state, frame, h, w, x_t, x_h, x_w, s_t, s_h, s_w, S: tl.constexpr, STATE: tl.constexpr
):
    # fmt: on
    """Return the address of a frame and the offsets of the pixels (h, w) in it.

    Frames before 0 are the last of the S frames of the state. Without a state there are none.
    """
    if STATE:
        in_state = frame < 0
        base = tl.where(in_state, state, x)
        base += tl.where(in_state, frame + S, frame).to(tl.int64) * tl.where(in_state, s_t, x_t)
        offset = h * tl.where(in_state, s_h, x_h) + w * tl.where(in_state, s_w, x_w)
    else:
        base = x + frame.to(tl.int64) * x_t
        offset = h * x_h + w * x_w
    return base, offset
