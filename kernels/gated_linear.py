"""Layer norm and two linear layers: the product of one with the GELU of the other (GEGLU).

    y[p, :] = (n[p, :] @ value + value_bias) * gelu(n[p, :] @ gate + gate_bias)
    n[p, :] = (x[p, :] - mean) / sqrt(variance + eps)        over the channels of position p

Gain and offset of the norm are folded into the linear layers (W * gain, b + W @ offset). Mean and
variance are merged block by block (Chan, Golub and LeVeque, 1983); they and all sums are float32.
The linear layer that follows, with the residual, is a `causal_conv3d` with a 1x1x1 kernel.

Layout: x [P, C], value and gate [C, N], y [P, N], contiguous.

Why by hand: the plain graph writes the normalised map and both wide maps, the largest of a LeanVAE
layer, and reads them again for the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvae_deploy.kernels.blocks import Blocks, Choose, first, fitting, magnitude, product
from fvae_deploy.kernels.chips import Chip, like
from fvae_deploy.kernels.norm_silu import check_contiguous
from fvae_deploy.kernels.optional import jit, tl, triton, upcast
from fvae_deploy.kernels.record import Spec, traffic


def reference(
    x: Tensor,
    value: Tensor,
    gate: Tensor,
    value_bias: Tensor,
    gate_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Compute it in torch: y [P, N]. The norm is computed in float32 or better."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    n = F.layer_norm(wide, x.shape[-1:], eps=eps).to(x.dtype)
    return torch.addmm(value_bias, n, value) * F.gelu(torch.addmm(gate_bias, n, gate))


# fmt: off
@jit
def kernel(
    x, value, gate, value_bias, gate_bias, y, positions, eps,
    C: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    # fmt: on
    """Compute BP positions and BN channels; grid (positions, channels)."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    real, rows = (p < positions)[:, None], x + p.to(tl.int64)[:, None] * C
    mean, spread = tl.zeros((BP,), tl.float32), tl.zeros((BP,), tl.float32)
    for start in range(0, C, BK):
        there = (start + k < C)[None, :]
        a = tl.load(rows + (start + k)[None, :], mask=real & there, other=0.0).to(tl.float32)
        count = tl.minimum(C - start, BK)
        part = tl.sum(a, 1) / count
        apart = tl.where(there, a - part[:, None], 0.0)
        step = part - mean
        joined = start + count
        spread += tl.sum(apart * apart, 1) + step * step * (start * count / joined)
        mean += step * (count / joined)
    root = 1 / tl.sqrt(spread / C + eps)
    left, right = tl.zeros((BP, BN), tl.float32), tl.zeros((BP, BN), tl.float32)
    for start in range(0, C, BK):
        c = start + k
        a = tl.load(rows + c[None, :], mask=real & (c < C)[None, :], other=0.0).to(tl.float32)
        a = ((a - mean[:, None]) * root[:, None]).to(x.dtype.element_ty)
        live = (c < C)[:, None] & (n < N)[None, :]
        v = tl.load(value + c[:, None] * N + n[None, :], mask=live, other=0.0)
        g = tl.load(gate + c[:, None] * N + n[None, :], mask=live, other=0.0)
        if UPCAST:
            a, v, g = a.to(tl.float32), v.to(tl.float32), g.to(tl.float32)
        left = tl.dot(a, v, left, input_precision=PRECISION)
        right = tl.dot(a, g, right, input_precision=PRECISION)
    left += tl.load(value_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    right += tl.load(gate_bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = left * right * 0.5 * (1 + tl.erf(right * 0.7071067811865476))
    at = y + p.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=real & (n < N)[None, :])


@cache  # called for every launch
def offered(size: int, chip: Chip) -> list[Blocks]:
    """Return the blocks to choose from, for elements of `size` bytes."""
    half = ((64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (128, 64, 32, 8, 2), (128, 32, 32, 4, 3))
    single = ((32, 32, 32, 4, 2), (64, 32, 32, 8, 2))
    candidates = [Blocks(*numbers) for numbers in (single if size > 2 else half)]
    return fitting(candidates, lambda blocks: product(blocks, size, results=2), chip)


def launch(
    x: Tensor,
    value: Tensor,
    gate: Tensor,
    value_bias: Tensor,
    gate_bias: Tensor,
    *,
    eps: float = 1e-5,
    target: str = "sm_80",
    tf32: bool = False,
    choose: Choose = first,
    run: Any = kernel,
) -> Tensor:
    """Compute it with the kernel; arguments and result as in `reference`.

    Raises ValueError for tensors of wrong shapes, and for those that are not contiguous.
    """
    positions, channels = x.shape
    hidden = value.shape[1]
    check_contiguous("x", x, (positions, channels))
    for name, tensor in (("value", value), ("gate", gate)):
        check_contiguous(name, tensor, (channels, hidden))
    for name, tensor in (("value_bias", value_bias), ("gate_bias", gate_bias)):
        check_contiguous(name, tensor, (hidden,))
    y = x.new_empty(positions, hidden)

    def run_with(blocks: Blocks) -> None:
        run[triton.cdiv(positions, blocks.rows), triton.cdiv(hidden, blocks.columns)](
            x,
            value,
            gate,
            value_bias,
            gate_bias,
            y,
            positions,
            eps,
            C=channels,
            N=hidden,
            PRECISION="tf32" if tf32 else "ieee",
            UPCAST=upcast(x.dtype),
            BP=blocks.rows,
            BN=blocks.columns,
            BK=blocks.depth,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    key = f"gated linear {x.dtype} {channels} to {hidden}, {magnitude(positions)}"
    choose(key, offered(x.element_size(), like(target)), run_with)
    return y


def specs(device: str = "meta") -> Iterator[tuple[Spec, Any]]:
    """Yield launches of LeanVAE and the U-Net."""
    for name, positions, channels, hidden, kind in (
        ("LeanVAE 512", 4096, 512, 352, torch.float16),
        ("LeanVAE 512", 4096, 512, 352, torch.bfloat16),
        ("U-Net 448", 17 * 1024, 448, 1792, torch.float16),
        ("LeanVAE 512", 4096, 512, 352, torch.float32),
    ):
        x, value, gate, bias = (
            torch.randn(shape, dtype=kind, device=device)
            for shape in ((positions, channels), (channels, hidden), (channels, hidden), (hidden,))
        )
        one, eager = (partial(f, x, value, gate, bias, bias) for f in (launch, reference))
        map_, work = positions * hidden * x.element_size(), 4 * positions * channels * hidden
        # Writing and reading the norm twice, writing both maps, GELU, product.
        plain = 4 * traffic(x) + traffic(value, gate) + (2 + 2 + 3) * map_
        yield Spec(f"{name} {str(kind).removeprefix('torch.')}", one, eager, work, plain), kernel
