"""Attention of all tokens to all keys, without a matrix of scores in memory.

    y = softmax(q @ k^T / sqrt(d)) @ v

by blocks of keys with a running maximum and sum (Dao et al., "FlashAttention", 2022). Two uses,
one kernel: one wide head over a frame's tokens (Wan 384, SD 512), and many narrow heads, to
themselves or to a text, whose keys may be shared by all frames (U-Net, 32). Any number of tokens.

Layout: q, y [B, N, heads, d], k, v [B or 1, M, heads, d], the layout in which linear layers write
them; d contiguous, any other strides. A head wider than 256 is computed in two pieces, so that 384
costs 384 and not the next power of two. Scores, softmax and sums are float32.

Why by hand: the plain graph writes and reads the scores (a frame of 64x64 tokens: 67 MB in
float32 for one head) and transposes heads in and out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvae_deploy.kernels.blocks import Blocks, Choose, Needs, first, fitting, magnitude
from fvae_deploy.kernels.chips import Chip, like
from fvae_deploy.kernels.optional import jit, tl, triton, upcast
from fvae_deploy.kernels.record import Spec, traffic

LOG2E = math.log2(math.e)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute it in torch: y [B, N, heads, d]."""
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, n, d]
    scores = queries @ keys.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ values).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute it by the form of attention that torch chooses."""
    queries, keys, values = (t.expand(q.shape[0], -1, -1, -1).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


@jit
def kernel(
    q,
    k,
    v,
    y,
    N,
    M,
    heads,
    factor,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    y_b,
    y_n,
    y_h,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute a block of BN tokens of a head; grid (tokens, batch * heads, 1 or 2 halves)."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    key = tl.arange(0, BM)
    d0 = tl.arange(0, D0)
    row = q + batch * q_b + head * q_h + token[:, None] * q_n
    real = (token < N)[:, None]
    q0 = tl.load(row + d0[None, :], mask=real, other=0.0)
    acc0 = tl.zeros((BN, D0), tl.float32)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = tl.load(row + d1[None, :], mask=real, other=0.0)
    if WHOLE and D1 > 0:
        acc1 = tl.zeros((BN, D1), tl.float32)
    half = tl.program_id(2) * D0  # where WHOLE, 0
    highest = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, M, BM):
        there = start + key < M
        keys = k + batch * k_b + head * k_h + (start + key)[None, :] * k_n
        k0 = tl.load(keys + d0[:, None], mask=there[None, :], other=0.0)
        if UPCAST:
            q0, k0 = q0.to(tl.float32), k0.to(tl.float32)
        scores = tl.dot(q0, k0, input_precision=PRECISION)
        if D1 > 0:
            k1 = tl.load(keys + d1[:, None], mask=there[None, :], other=0.0)
            if UPCAST:
                q1, k1 = q1.to(tl.float32), k1.to(tl.float32)
            scores = tl.dot(q1, k1, scores, input_precision=PRECISION)
        scores = tl.where(there[None, :], scores * factor, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - above)
        weights = tl.exp2(scores - above[:, None])
        total = total * shrink + tl.sum(weights, 1)
        highest = above
        values = v + batch * v_b + head * v_h + (start + key)[:, None] * v_n
        weights = weights.to(v.dtype.element_ty)
        v0 = tl.load(values + half + d0[None, :], mask=there[:, None], other=0.0)
        if UPCAST:
            weights, v0 = weights.to(tl.float32), v0.to(tl.float32)
        acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        if WHOLE and D1 > 0:
            v1 = tl.load(values + d1[None, :], mask=there[:, None], other=0.0)
            if UPCAST:
                v1 = v1.to(tl.float32)
            acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    out = y + batch * y_b + head * y_h + token[:, None] * y_n
    tl.store(out + half + d0[None, :], (acc0 / total[:, None]).to(y.dtype.element_ty), mask=real)
    if WHOLE and D1 > 0:
        tl.store(out + d1[None, :], (acc1 / total[:, None]).to(y.dtype.element_ty), mask=real)


@cache  # it is asked at every launch
def offered(width: int, size: int, chip: Chip) -> list[Blocks]:
    """Blocks for heads of this width and elements of this many bytes on a chip.

    Apart, the halves of a wide head compute scores twice, for 1.5 times the work: where the sums
    of all its channels do not fit registers or tensor memory.
    """
    tall = "HGMMA" in chip.matrix or "UTCHMMA" in chip.matrix  # these take 64 rows at least
    if width <= 128:
        numbers = [(64, 32, width, 4, 2 if width <= 64 else 1), (128, 32, width, 8, 2)]
        if not chip.tensor:  # the compiler keeps an array on the stack there
            numbers += [(64, 64, width, 4, 2), (128, 64, width, 8, 2)]
        numbers += [] if tall or width <= 64 else [(32, 32, width, 4, 1)]
        cut = [Blocks(*each) for each in numbers]
    elif size > 2:
        cut = [Blocks(16, 16, width, 8, 1), Blocks(16, 16, width, 8, 1, whole=False)]
    else:
        cut = [Blocks(64, 32, width, 8, 2), Blocks(64, 32, width, 8, 2, whole=False)]
        cut += [Blocks(64, 16, width, 8, 2)]
        cut += [] if tall else [Blocks(32, 32, width, 8, 1), Blocks(32, 16, width, 8, 1)]
    return fitting(cut, lambda blocks: needs(blocks, size, chip), chip)


def needs(blocks: Blocks, size: int, chip: Chip) -> Needs:
    """Bound what a program takes."""
    threads, width = 32 * blocks.warps, blocks.depth
    summed = width if blocks.whole else min(256, width)
    pair = blocks.columns * (width + summed)  # keys and values
    scores = blocks.rows * blocks.columns
    ahead = blocks.stages if chip.nvidia else max(1, blocks.stages - 1)
    queries = blocks.rows * width if chip.nvidia else 0  # else they stay in registers
    loaded = queries + ahead * pair + scores
    held = blocks.rows * width * size // 4
    if blocks.stages == 1 or not chip.nvidia:
        held += pair * size // 4  # on their way to shared memory
    return Needs(
        shared=loaded * size,
        registers=60 + (blocks.rows * summed + held) // threads,
        tensor=summed + blocks.columns,
    )


def _cut(width: int) -> tuple[int, int]:
    """Cut a head into the largest power of two up to 256, and what is left."""
    main = min(256, 1 << (width.bit_length() - 1))
    return main, width - main


def fits(width: int) -> bool:
    """Whether the kernel takes heads of this width: 16, 32, ... 256, or the sum of two such."""
    main, rest = _cut(width)
    return width >= 16 and not rest & (rest - 1) and not 0 < rest < 16 and rest <= main


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tf32: bool = False,
    target: str = "sm_80",
    choose: Choose = first,
    out: Tensor | None = None,
    run: Any = kernel,
) -> Tensor:
    """Compute it by the kernel, arguments and result as in `reference`; `out` is written in place.

    Raises ValueError for heads that do not fit and other layouts.
    """
    batch, tokens, heads, width = q.shape
    if not fits(width):
        raise ValueError(
            f"expected a head of 16, 32, … 256 or the sum of two such, found {width}: "
            "use the reference"
        )
    main, rest = _cut(width)
    y = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", y)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"expected {name} with channels last, found {tensor.stride()}")

    def strides(tensor: Tensor) -> tuple[int, ...]:
        shared = tensor.shape[0] == 1 and batch > 1
        return (0 if shared else tensor.stride(0), tensor.stride(1), tensor.stride(2))

    def once(blocks: Blocks) -> None:
        run[triton.cdiv(tokens, blocks.rows), batch * heads, 1 if blocks.whole else 2](
            q,
            k,
            v,
            y,
            tokens,
            k.shape[1],
            heads,
            LOG2E / math.sqrt(width),
            *strides(q),
            *strides(k),
            *strides(v),
            *strides(y),
            D0=main,
            D1=rest,
            PRECISION="tf32" if tf32 else "ieee",
            BN=blocks.rows,
            BM=blocks.columns,
            WHOLE=blocks.whole,
            UPCAST=upcast(q.dtype),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    alike = f"attention {q.dtype} {heads} of {width}, {magnitude(batch * tokens)}"
    alike += f" to {magnitude(k.shape[1])}"
    choose(alike, offered(width, q.element_size(), like(target)), once)
    return y


def specs(device: str = "meta") -> Iterator[tuple[Spec, Any]]:
    """Yield launches that Wan, SD and the U-Net make."""

    def made(
        name: str, batch: int, tokens: int, keys: int, heads: int, width: int, kind: torch.dtype
    ) -> Spec:
        def tensor(n: int, b: int = batch) -> Tensor:
            return torch.randn(b, n, heads, width, dtype=kind, device=device)

        shared = 1 if keys != tokens else batch
        q, k, v = tensor(tokens), tensor(keys, shared), tensor(keys, shared)
        work = 4 * batch * heads * tokens * keys * width
        title = f"{name} {str(kind).removeprefix('torch.')}"
        # Heads turned in and out, scores written, softmax in one pass, scores read.
        scores = batch * heads * tokens * keys * q.element_size()
        plain = 3 * traffic(q, k, v) + 3 * traffic(q) + 4 * scores
        return Spec(title, partial(launch, q, k, v), partial(eager, q, k, v), work, plain)

    for kind in (torch.float16, torch.bfloat16):
        yield made("Wan 1x384", 1, 4096, 4096, 1, 384, kind), kernel
    half = torch.float16
    yield made("SD 1x512", 1, 4096, 4096, 1, 512, half), kernel
    yield made("U-Net 14x32", 17, 1024, 1024, 14, 32, half), kernel
    yield made("U-Net text 14x32", 17, 1024, 77, 14, 32, half), kernel
    yield made("Wan 1x384", 1, 4096, 4096, 1, 384, torch.float32), kernel
