"""Attention of all tokens to all keys, without storing the matrix of scores.

    y = softmax(q @ k^T / sqrt(d)) @ v

It is computed in blocks of keys with a running maximum and sum (Dao et al., "FlashAttention",
2022). The kernel has two uses: one wide head over the tokens of a frame (Wan 384, SD 512), and many
narrow heads, as self-attention or as cross-attention to a text whose keys all frames share (U-Net,
32). The number of tokens is free.

Layout: q, y [B, N, heads, d], k, v [B or 1, M, heads, d], as linear layers write them; d is
contiguous, the other strides are free. A head wider than 256 is computed in two pieces, so that 384
channels cost 384 and not the next power of two. Scores, softmax and sums are float32.

Why by hand: the plain graph writes and reads the scores (for a frame of 64x64 tokens: 67 MB in
float32 for one head) and transposes the heads before and after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvae_deploy.kernels.blocks import Blocks, Choose, Needs, first, fitting, magnitude
from fvae_deploy.kernels.chips import Chip, like
from fvae_deploy.kernels.inlined import multiply
from fvae_deploy.kernels.norm_silu import check_layout
from fvae_deploy.kernels.optional import jit, tl, triton, upcast
from fvae_deploy.kernels.record import Spec, traffic

LOG2E = math.log2(math.e)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention in torch: y [B, N, heads, d]."""
    queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, n, d]
    scores = queries @ keys.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ values).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention with the implementation that torch selects."""
    queries, keys, values = (t.expand(q.shape[0], -1, -1, -1).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


# fmt: off
@jit
def kernel(
    q, k, v, y, N, M, heads, factor,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, y_b, y_n, y_h,
    D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):
    # fmt: on
    """Compute BN tokens of one head; grid (tokens, batch * heads, 1 if WHOLE else 2)."""
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
    half = tl.program_id(2) * D0  # 0 if WHOLE
    highest = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, M, BM):
        there = start + key < M
        keys = k + batch * k_b + head * k_h + (start + key)[None, :] * k_n
        k0 = tl.load(keys + d0[:, None], mask=there[None, :], other=0.0)
        scores = multiply(q0, k0, None, PRECISION, UPCAST)
        if D1 > 0:
            k1 = tl.load(keys + d1[:, None], mask=there[None, :], other=0.0)
            scores = multiply(q1, k1, scores, PRECISION, UPCAST)
        scores = tl.where(there[None, :], scores * factor, float("-inf"))
        weights, shrink, highest, total = _update_softmax(scores, highest, total)
        values = v + batch * v_b + head * v_h + (start + key)[:, None] * v_n
        weights = weights.to(v.dtype.element_ty)
        v0 = tl.load(values + half + d0[None, :], mask=there[:, None], other=0.0)
        acc0 = multiply(weights, v0, acc0 * shrink[:, None], PRECISION, UPCAST)
        if WHOLE and D1 > 0:
            v1 = tl.load(values + d1[None, :], mask=there[:, None], other=0.0)
            acc1 = multiply(weights, v1, acc1 * shrink[:, None], PRECISION, UPCAST)
    out = y + batch * y_b + head * y_h + token[:, None] * y_n
    tl.store(out + half + d0[None, :], (acc0 / total[:, None]).to(y.dtype.element_ty), mask=real)
    if WHOLE and D1 > 0:
        tl.store(out + d1[None, :], (acc1 / total[:, None]).to(y.dtype.element_ty), mask=real)


@jit
def _update_softmax(scores, highest, total):
    """Return the weights of a block of scores [BN, BM], and the new state of the softmax.

    That is the factor by which sums of earlier blocks shrink, and the running maximum and sum of
    every row. Scores are base-2 logarithms.
    """
    above = tl.maximum(highest, tl.max(scores, 1))
    shrink = tl.exp2(highest - above)
    weights = tl.exp2(scores - above[:, None])
    total = total * shrink + tl.sum(weights, 1)
    return weights, shrink, above, total


@cache  # called for every launch
def offered(width: int, size: int, chip: Chip) -> list[Blocks]:
    """Return the blocks to choose from, for heads of this width and elements of `size` bytes.

    With `whole=False`, two programs compute the halves of a wide head. Both compute the scores,
    which is 1.5 times the work, but the sums of half the channels fit into registers or tensor
    memory where those of all channels do not. Only a head of two equal pieces, 512, has halves.
    """
    tall = "HGMMA" in chip.matrix or "UTCHMMA" in chip.matrix  # these need at least 64 rows
    if width <= 128:
        numbers = [(64, 32, width, 4, 2 if width <= 64 else 1), (128, 32, width, 8, 2)]
        if not chip.tensor:  # with tensor memory, the compiler puts an array on the stack
            numbers += [(64, 64, width, 4, 2), (128, 64, width, 8, 2)]
        numbers += [] if tall or width <= 64 else [(32, 32, width, 4, 1)]
        candidates = [Blocks(*each) for each in numbers]
    else:
        candidates = [Blocks(*((16, 16, width, 8, 1) if size > 2 else (64, 32, width, 8, 2)))]
        candidates += [replace(candidates[0], whole=False)] if _has_halves(width) else []
        if size == 2:
            candidates += [Blocks(64, 16, width, 8, 2)]
            candidates += [] if tall else [Blocks(32, 32, width, 8, 1), Blocks(32, 16, width, 8, 1)]
    return fitting(candidates, lambda blocks: needs(blocks, size, chip), chip)


def needs(blocks: Blocks, size: int, chip: Chip) -> Needs:
    """Return upper bounds of what a program needs."""
    threads, width = 32 * blocks.warps, blocks.depth
    summed = width if blocks.whole else min(256, width)
    pair = blocks.columns * (width + summed)  # keys and values
    scores = blocks.rows * blocks.columns
    ahead = blocks.stages if chip.nvidia else max(1, blocks.stages - 1)
    queries = blocks.rows * width if chip.nvidia else 0  # on AMD they stay in registers
    loaded = queries + ahead * pair + scores
    operands = blocks.rows * width * size // 4
    if blocks.stages == 1 or not chip.nvidia:
        operands += pair * size // 4  # pass through registers on their way to shared memory
    return Needs(
        shared=loaded * size,
        registers=60 + (blocks.rows * summed + operands) // threads,
        tensor=summed + blocks.columns,
    )


def _cut(width: int) -> tuple[int, int]:
    """Split a head's width into the largest power of two up to 256, and the rest."""
    main = min(256, 1 << (width.bit_length() - 1))
    return main, width - main


def _has_halves(width: int) -> bool:
    """Return whether both pieces of a head have the same width, as two programs take them.

    A second program for a narrower piece would need a mask in its innermost loop: for 384 it would
    multiply 1280 channels per score instead of 768, and the sums of all 384 fit every chip.
    """
    main, rest = _cut(width)
    return main == rest


def fits(width: int) -> bool:
    """Return whether the kernel takes a head width: 16, 32, ... 256, or a sum of two of these."""
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
    """Compute attention with the kernel; arguments and result as in `reference`.

    `out` is an optional buffer for the result. Raises ValueError for head widths that the kernel
    does not take, for wrong shapes and layouts, and for blocks that would leave a head.
    """
    batch, tokens, heads, width = q.shape
    if not fits(width):
        raise ValueError(
            f"expected a head width of 16, 32, ... 256 or a sum of two of these, found {width}: "
            "use the reference"
        )
    main, rest = _cut(width)
    y = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    check_layout("q", q, (batch, tokens, heads, width))
    check_layout("k", k, (_shared(k, batch), k.shape[1], heads, width))
    check_layout("v", v, (_shared(v, batch), k.shape[1], heads, width))
    check_layout("out", y, (batch, tokens, heads, width))
    tensors = (q, k, v, y)
    strides = [stride for tensor in tensors for stride in _strides(tensor, batch)]

    def run_with(blocks: Blocks) -> None:
        if not (blocks.whole or _has_halves(width)):
            raise ValueError(
                f"expected blocks that cover a head of {width}, found {blocks}: "
                "only a head of 512 has halves"
            )
        run[triton.cdiv(tokens, blocks.rows), batch * heads, 1 if blocks.whole else 2](
            *tensors,
            tokens,
            k.shape[1],
            heads,
            LOG2E / math.sqrt(width),
            *strides,
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

    key = f"attention {q.dtype} {heads} of {width}, {magnitude(batch * tokens)}"
    key += f" to {magnitude(k.shape[1])}"
    choose(key, offered(width, q.element_size(), like(target)), run_with)
    return y


def _strides(tensor: Tensor, batch: int) -> tuple[int, int, int]:
    """Return the strides of batch, tokens and heads; 0 for a batch that shares one tensor."""
    one_for_all = _shared(tensor, batch) < batch
    return 0 if one_for_all else tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _shared(tensor: Tensor, batch: int) -> int:
    """Return how many batches a tensor must have: one may be shared by all."""
    return 1 if tensor.shape[0] == 1 else batch


def specs(device: str = "meta") -> Iterator[tuple[Spec, Any]]:
    """Yield launches of Wan, SD and the U-Net."""

    def spec(
        name: str, batch: int, tokens: int, keys: int, heads: int, width: int, kind: torch.dtype
    ) -> Spec:
        def tensor(n: int, b: int = batch) -> Tensor:
            return torch.randn(b, n, heads, width, dtype=kind, device=device)

        shared = 1 if keys != tokens else batch
        q, k, v = tensor(tokens), tensor(keys, shared), tensor(keys, shared)
        work = 4 * batch * heads * tokens * keys * width
        title = f"{name} {str(kind).removeprefix('torch.')}"
        # Transposing heads before and after, writing scores, softmax in one pass, reading scores.
        scores = batch * heads * tokens * keys * q.element_size()
        plain = 3 * traffic(q, k, v) + 3 * traffic(q) + 4 * scores
        return Spec(title, partial(launch, q, k, v), partial(eager, q, k, v), work, plain)

    for kind in (torch.float16, torch.bfloat16):
        yield spec("Wan 1x384", 1, 4096, 4096, 1, 384, kind), kernel
    half = torch.float16
    yield spec("SD 1x512", 1, 4096, 4096, 1, 512, half), kernel
    yield spec("U-Net 14x32", 17, 1024, 1024, 14, 32, half), kernel
    yield spec("U-Net text 14x32", 17, 1024, 77, 14, 32, half), kernel
    yield spec("Wan 1x384", 1, 4096, 4096, 1, 384, torch.float32), kernel
