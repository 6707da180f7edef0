"""Comparisons of kernels with their references: odd sizes, tiles, first and later steps, views.

Each tensor is a view into a larger one filled with NaN, so that a read or write outside is
detected. The same trials run on a GPU (`fvae kernels test`) and in Triton's interpreter (tests).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fvae_deploy.kernels import (
    attention,
    causal_conv3d,
    depthwise_conv3d,
    gated_linear,
    norm_silu,
    upsample2x_conv,
)
from fvae_deploy.kernels.blocks import Blocks, Launch
from fvae_deploy.kernels.causal_conv3d import SAME, Box, Window
from fvae_deploy.kernels.dispatch import named
from fvae_deploy.kernels.norm_silu import Activation
from fvae_deploy.kernels.timing import describe, require_context

Pair = tuple[Tensor, Tensor]  # result of the kernel, expected result

# Limits of `error`. The references compute in float64 on the same rounded inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Trial:
    """One comparison: `run` yields results of the kernel, each with the expected result."""

    name: str
    run: Callable[[Source], Iterator[Pair]]


class Source:
    """Random tensors of one type on one device, each surrounded by NaN.

    Launches get `how` as further arguments. With these they run as on the chip `target`, with
    blocks number `number` of those offered, or the last if there are fewer. `most` is the largest
    number of blocks that a launch was offered.
    """

    def __init__(
        self, device: str, dtype: torch.dtype, target: str = "sm_80", number: int = 0
    ) -> None:
        self.device, self.dtype = device, dtype
        self.number, self.most = number, 1
        self.how: dict[str, Any] = {"target": target, "choose": self._choose_blocks}
        self.random = torch.Generator().manual_seed(0)
        self.guards: list[tuple[Tensor, Tensor]] = []  # buffers, and masks of the parts in use

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal values of standard deviation `scale`, in a view surrounded by NaN."""
        view = self.blank(*shape, dtype=dtype)
        view.copy_(torch.randn(shape, generator=self.random) * scale)
        return view

    def blank(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a view filled with NaN and surrounded by NaN."""
        padded = [n + 2 for n in shape[:-1]] + [shape[-1] + 16]
        buffer = torch.full(padded, torch.nan, dtype=dtype or self.dtype, device=self.device)
        used = torch.zeros(padded, dtype=torch.bool, device=self.device)
        inner = (*(slice(1, n + 1) for n in shape[:-1]), slice(8, 8 + shape[-1]))
        used[inner] = True
        self.guards.append((buffer, used))
        return buffer[inner]

    def _choose_blocks(self, key: str, offered: Sequence[Blocks], launch: Launch) -> None:
        self.most = max(self.most, len(offered))
        launch(offered[min(self.number, len(offered) - 1)])

    def untouched(self) -> bool:
        """Return whether everything around the views is still NaN."""
        return all(bool(buffer[~used].isnan().all()) for buffer, used in self.guards)


def error(result: Tensor, expected: Tensor) -> float:
    """Return the largest relative error; NaN if any value is NaN.

    An error is relative to the expected value plus the standard deviation of all.
    """
    result, expected = result.double(), expected.double()
    return float(((result - expected).abs() / (expected.abs() + expected.std())).max())


def worst(
    trial: Trial, device: str, dtype: torch.dtype, target: str = "sm_80", every: bool = False
) -> float:
    """Run a trial and return its largest error; with `every`, run it with all offered blocks.

    The error is infinite if the kernel read or wrote outside its tensors.
    """
    errors: list[float] = []
    number, most = 0, 1
    while number < most:
        source = Source(device, dtype, target, number)
        errors += [error(result, expected) for result, expected in trial.run(source)]
        if not source.untouched() or any(e != e for e in errors):
            return math.inf
        number, most = number + 1, source.most if every else 1
    return max(errors)


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial in one type: its largest error, or why it failed."""

    kernel: str
    trial: str
    type: str
    error: float | None
    limit: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the kernel equals its reference within the limit."""
        return self.error is not None and self.error <= self.limit


def run_trials(
    kernels: Sequence[str], device: str, target: str, every: bool = False
) -> Iterator[TrialResult]:
    """Run the trials of these kernels, or of all kernels, in every type.

    A failed trial is reported and does not stop the others. Raises EngineError if the GPU cannot
    compute any more after a failure.
    """
    for kernel in named(kernels):
        for trial in TRIALS[kernel]:
            for dtype, limit in TOLERANCE.items():
                largest, failure = None, ""
                try:
                    largest = worst(trial, device, dtype, target, every)
                except Exception as error:  # an unknown GPU can fail in any way: report it
                    failure = describe(error)
                if largest == math.inf:
                    largest, failure = None, "NaN, or a read or write outside its tensors"
                kind = str(dtype).removeprefix("torch.")
                yield TrialResult(kernel, trial.name, kind, largest, limit, failure)
                if failure and device != "cpu":
                    require_context(f"{trial.name} in {kind}")


def _double(value: Tensor | None) -> Any:
    return None if value is None else value.double()


def _convolution(
    frames: int,
    taps: tuple[int, int, int],
    window: Window = SAME,
    kind: str = "",
    later: bool = False,
    residual: bool = False,
    box: Box | None = None,
    clamp: tuple[float, float] | None = None,
    channels: tuple[int, int] = (20, 24),
) -> Callable[[Source], Iterator[Pair]]:
    """Return a trial of one convolution; `later` gives it a state."""
    height, width = 10, 12

    def run(source: Source) -> Iterator[Pair]:
        kept = taps[0] - window.stride[0]
        tall, across = window.plane(height, width, taps[1:])
        steps = (frames + kept - taps[0]) // window.stride[0] + 1
        x = source.normal(frames, height, width, channels[0])
        depth = (channels[0] * taps[0] * taps[1] * taps[2]) ** -0.5
        weight = source.normal(*taps, *channels, scale=depth).contiguous()
        bias = source.normal(channels[1])
        state = source.normal(kept, height, width, channels[0]) if later else None
        added = source.normal(steps, tall, across, channels[1]) if residual else None
        norm = _random_activation(source, kind, (frames, height, width, channels[0]))
        place = box or (0, tall, 0, across)
        out = source.blank(steps, place[1] - place[0], place[3] - place[2], channels[1])
        options: dict[str, Any] = {"window": window, "activation": norm, "clamp": clamp, "box": box}
        y, after = causal_conv3d.launch(
            x, weight, bias, state=state, residual=added, out=out, **options, **source.how
        )
        exact = [_double(tensor) for tensor in (x, weight, bias)]
        expected, next_state = causal_conv3d.reference(
            *exact, state=_double(state), residual=_double(added), **options
        )
        yield y, expected
        if kept:
            part = (slice(None), slice(*place[:2]), slice(*place[2:]))
            yield after[part], next_state[part]

    return run


def _random_activation(
    source: Source, kind: str, shape: tuple[int, int, int, int]
) -> Activation | None:
    """Return a random activation of a slab of this shape: "rms", "affine", or none for ""."""
    single = torch.float32
    if kind == "rms":
        gain = source.normal(shape[3], dtype=single)
        return Activation(gain, inverse=source.normal(*shape[:3], dtype=single).contiguous())
    if kind == "affine":
        gain, shift = (source.normal(shape[0], shape[3], dtype=single) for _ in range(2))
        return Activation(gain.contiguous(), shift=shift.contiguous())
    return None


def _activated(kind: str) -> Callable[[Source], Iterator[Pair]]:
    """Return a trial that activation before the convolution equals activation on reading."""

    def run(source: Source) -> Iterator[Pair]:
        x = source.normal(2, 7, 9, 24).contiguous()
        state = source.normal(2, 7, 9, 24)
        weight = source.normal(3, 3, 3, 24, 16, scale=0.05).contiguous()
        gain, shift = (source.normal(2, 24, dtype=torch.float32).contiguous() for _ in range(2))
        norm = (
            Activation(gain[0], inverse=norm_silu.rms(x))
            if kind == "rms"
            else Activation(gain, shift=shift)
        )
        results: list[Pair] = []

        def both(key: str, offered: Sequence[Blocks], launch: Launch) -> None:
            for blocks in (offered[0], replace(offered[0], fused=True)):
                launch(blocks)
                results.append((y.clone(), after.clone()))

        y, after = torch.empty(2, 7, 9, 16).to(x), torch.empty(2, 7, 9, 24).to(x)
        how = source.how | {"choose": both}
        causal_conv3d.launch(
            x, weight, state=state, window=SAME, activation=norm, out=y, after=after, **how
        )
        yield from zip(*results, strict=True)

    return run


def _tiles(source: Source) -> Iterator[Pair]:
    """Compare tiles of a convolution, put together, with the whole image; also their states."""
    x = source.normal(2, 11, 13, 16)
    state = source.normal(2, 11, 13, 16)
    weight = source.normal(3, 3, 3, 16, 16, scale=0.05).contiguous()
    out, after = torch.empty(2, 11, 13, 16).to(x), torch.empty(2, 11, 13, 16).to(x)
    for rows in ((0, 4), (4, 11)):
        for columns in ((0, 7), (7, 13)):
            causal_conv3d.launch(
                x,
                weight,
                state=state,
                window=SAME,
                box=(*rows, *columns),
                out=out[:, slice(*rows), slice(*columns)],
                after=after,
                **source.how,
            )
    whole, next_state = causal_conv3d.launch(x, weight, state=state, window=SAME, **source.how)
    yield out, whole
    yield after, next_state


def _depthwise(
    frames: int, later: bool, box: Box | None = None
) -> Callable[[Source], Iterator[Pair]]:
    def run(source: Source) -> Iterator[Pair]:
        x = source.normal(frames, 7, 9, 72)
        state = source.normal(2, 7, 9, 72) if later else None
        weight = source.normal(27, 72, scale=0.2).contiguous()
        bias = source.normal(72)
        place = box or (0, 7, 0, 9)
        out = source.blank(frames, place[1] - place[0], place[3] - place[2], 72)
        y, after = depthwise_conv3d.launch(
            x, weight, bias, state=state, box=box, out=out, **source.how
        )
        expected, next_state = depthwise_conv3d.reference(
            x.double(), weight.double(), bias.double(), state=_double(state), box=box
        )
        yield y, expected
        part = (slice(None), slice(*place[:2]), slice(*place[2:]))
        yield after[part], next_state[part]

    return run


def _attention(
    batch: int, tokens: int, keys: int, heads: int, width: int
) -> Callable[[Source], Iterator[Pair]]:
    def run(source: Source) -> Iterator[Pair]:
        shared = batch if keys == tokens else 1
        q = source.normal(batch, tokens, heads, width)
        k, v = (source.normal(shared, keys, heads, width) for _ in range(2))
        out = source.blank(batch, tokens, heads, width)
        yield (
            attention.launch(q, k, v, out=out, **source.how),
            attention.reference(q.double(), k.double(), v.double()),
        )

    return run


def _doubling(box: Box | None) -> Callable[[Source], Iterator[Pair]]:
    def run(source: Source) -> Iterator[Pair]:
        x = source.normal(2, 5, 7, 24)
        weight, bias = source.normal(3, 3, 24, 20, scale=0.07), source.normal(20)
        packed = upsample2x_conv.packed(weight.double()).to(weight.dtype)
        exact, offset = x.double(), bias.double()
        expected = upsample2x_conv.plain(exact, weight.double(), offset)
        top, bottom, left, right = (2 * edge for edge in box or (0, 5, 0, 7))
        result = upsample2x_conv.launch(x, packed, bias, box=box, **source.how)
        yield result, expected[:, top:bottom, left:right]
        yield result, upsample2x_conv.reference(exact, packed.double(), offset, box=box)

    return run


def _gated(source: Source) -> Iterator[Pair]:
    x = (source.normal(70, 72) + 3).contiguous()
    value, gate = (source.normal(72, 40, scale=0.05).contiguous() for _ in range(2))
    value_bias, gate_bias = (source.normal(40).contiguous() for _ in range(2))
    tensors = [x, value, gate, value_bias, gate_bias]
    result = gated_linear.launch(*tensors, **source.how)
    x, value, gate, value_bias, gate_bias = (tensor.double() for tensor in tensors)
    yield result, gated_linear.reference(x, value, gate, value_bias, gate_bias)


def _norms(source: Source) -> Iterator[Pair]:
    x = (source.normal(3, 7, 9, 96) * 2 + 1).contiguous()
    exact = x.double()
    root = norm_silu.rms(x, choose=source.how["choose"])
    yield root, norm_silu.rms_reference(exact)
    gain, shift = (source.normal(96, dtype=torch.float32).contiguous() for _ in range(2))
    norm = Activation(gain, inverse=root)
    yield norm_silu.apply(x, norm), norm(exact)
    parts = [norm_silu.channels(part.contiguous()) for part in (x[:, :3], x[:, 3:])]
    norm = norm_silu.merged(torch.cat(parts, dim=2), 32, gain, shift, 1e-6)
    gain, shift = gain.double(), shift.double()
    yield norm_silu.apply(x, norm), norm_silu.group_norm_reference(exact, 32, gain, shift, 1e-6)


DOWN = Window(stride=(1, 2, 2), bottom=1, right=1)
TIME = Window(stride=(2, 1, 1))
CUBE = (3, 3, 3)
INNER, CORNER = (3, 8, 2, 9), (6, 10, 7, 12)
TRIALS: dict[str, tuple[Trial, ...]] = {
    "causal_conv3d": (
        Trial("convolution, first frame", _convolution(1, CUBE)),
        Trial("convolution, first frames, RMS", _convolution(3, CUBE, kind="rms")),
        Trial(
            "convolution, step of 1, RMS, residual", _convolution(1, CUBE, SAME, "rms", True, True)
        ),
        Trial("convolution, step of 4, group norm", _convolution(4, CUBE, SAME, "affine", True)),
        Trial("convolution, clamped", _convolution(2, CUBE, later=True, clamp=(-0.5, 0.5))),
        Trial("convolution, inner tile", _convolution(2, CUBE, SAME, "rms", True, True, INNER)),
        Trial("convolution, corner tile", _convolution(2, CUBE, SAME, "", True, True, CORNER)),
        Trial("convolution, wide", _convolution(1, CUBE, later=True, channels=(72, 136))),
        Trial("convolution, one channel", _convolution(1, CUBE, channels=(1, 24))),
        Trial("convolution, stride 2 in space", _convolution(2, (1, 3, 3), DOWN)),
        Trial("convolution, stride 2 in time", _convolution(4, (3, 1, 1), TIME, later=True)),
        Trial("convolution, along frames", _convolution(2, (3, 1, 1), Window(), later=True)),
        Trial("convolution, 1x1x1", _convolution(2, (1, 1, 1), Window(), residual=True)),
        Trial("convolution, tiles equal the whole", _tiles),
        Trial("convolution, RMS before or on reading", _activated("rms")),
        Trial("convolution, group norm before or on reading", _activated("affine")),
    ),
    "upsample2x_conv": (
        Trial("doubling", _doubling(None)),
        Trial("doubling, tile", _doubling((1, 4, 2, 7))),
    ),
    "depthwise_conv3d": (
        Trial("depthwise, first frame", _depthwise(1, later=False)),
        Trial("depthwise, first frames", _depthwise(3, later=False)),
        Trial("depthwise, step of 1", _depthwise(1, later=True)),
        Trial("depthwise, tile of a step of 3", _depthwise(3, later=True, box=(2, 6, 3, 9))),
    ),
    "attention": (
        Trial("attention, 3 heads of 32", _attention(2, 37, 37, 3, 32)),
        Trial("attention, to a shared text", _attention(3, 17, 5, 2, 32)),
        Trial("attention, one head of 384", _attention(1, 50, 50, 1, 384)),
        Trial("attention, one head of 512", _attention(1, 33, 33, 1, 512)),
    ),
    "gated_linear": (Trial("norm and gated linear layers", _gated),),
    "norm_silu": (Trial("norms", _norms),),
}
