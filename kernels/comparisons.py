"""Comparisons of kernels with their references: odd sizes, tiles, first and later steps, views.

Widths are such that blocks do not divide them, and every kernel with heads gets several without a
gap between them. Each tensor lies between guards, so that a read or write outside is detected.
"""

from __future__ import annotations

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
from fvae_deploy.kernels.guards import Source
from fvae_deploy.kernels.norm_silu import Activation

Pair = tuple[Tensor, Tensor]  # result of the kernel, expected result


@dataclass(frozen=True)
class Trial:
    """One comparison: `run` yields results of the kernel, each with the expected result."""

    name: str
    run: Callable[[Source], Iterator[Pair]]


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
    size: tuple[int, int] = (7, 9),
) -> Callable[[Source], Iterator[Pair]]:
    """Return a trial of one convolution; `later` gives it a state."""
    height, width = size

    def run(source: Source) -> Iterator[Pair]:
        kept = taps[0] - window.stride[0]
        tall, across = window.plane(height, width, taps[1:])
        steps = (frames + kept - taps[0]) // window.stride[0] + 1
        x = source.normal(frames, height, width, channels[0])
        depth = (channels[0] * taps[0] * taps[1] * taps[2]) ** -0.5
        weight = source.solid(*taps, *channels, scale=depth)
        bias = source.solid(channels[1])
        state = source.normal(kept, height, width, channels[0]) if later else None
        added = source.normal(steps, tall, across, channels[1]) if residual else None
        norm = _random_activation(source, kind, (frames, height, width, channels[0]))
        place = box or (0, tall, 0, across)
        out = source.blank(steps, place[1] - place[0], place[3] - place[2], channels[1])
        part = (slice(None), slice(*place[:2]), slice(*place[2:]))
        kept_shape = (kept, height, width, channels[0])
        after = source.blank(*kept_shape, gaps=False, part=part) if kept else None
        options: dict[str, Any] = {"window": window, "activation": norm, "clamp": clamp, "box": box}
        y, after = causal_conv3d.launch(
            x,
            weight,
            bias,
            state=state,
            residual=added,
            out=out,
            after=after,
            **options,
            **source.how,
        )
        exact = [_double(tensor) for tensor in (x, weight, bias)]
        expected, next_state = causal_conv3d.reference(
            *exact, state=_double(state), residual=_double(added), **options
        )
        yield y, expected
        if kept:
            yield after[part], next_state[part]

    return run


def _random_activation(
    source: Source, kind: str, shape: tuple[int, int, int, int]
) -> Activation | None:
    """Return a random activation of a slab of this shape: "rms", "affine", or none for ""."""
    single = torch.float32
    if kind.startswith("rms"):
        gain, inverse = (source.solid(*s, dtype=single) for s in (shape[3:], shape[:3]))
        return Activation(gain, inverse=inverse, silu=kind == "rms")
    if kind == "affine":
        gain, shift = (source.solid(shape[0], shape[3], dtype=single) for _ in range(2))
        return Activation(gain, shift=shift)
    return None


def _activated(kind: str) -> Callable[[Source], Iterator[Pair]]:
    """Return a trial that activation before the convolution equals activation on reading."""

    def run(source: Source) -> Iterator[Pair]:
        size, inputs, outputs = (2, 5, 7), 24, 16
        x, state = source.solid(*size, inputs), source.normal(*size, inputs)
        weight = source.solid(*ROWS, inputs, outputs, scale=0.1)
        norm = _random_activation(source, kind, (*size, inputs))
        results: list[Pair] = []

        def both(key: str, offered: Sequence[Blocks], launch: Launch) -> None:
            def launch_twice(blocks: Blocks) -> None:
                for fused in (False, True):
                    launch(replace(blocks, fused=fused))
                    results.append((y.clone(), after.clone()))

            source.how["choose"](key, offered, launch_twice)

        y, after = source.blank(*size, outputs), source.blank(*size, inputs, gaps=False)
        how = source.how | {"choose": both}
        causal_conv3d.launch(
            x, weight, state=state, window=TALL, activation=norm, out=y, after=after, **how
        )
        yield from zip(*results, strict=True)

    return run


def _tiles(source: Source) -> Iterator[Pair]:
    """Compare tiles of a convolution, put together, with the whole image; also their states."""
    x = source.normal(1, 7, 11, 16)
    state = source.normal(2, 7, 11, 16)
    weight = source.solid(3, 3, 3, 16, 16, scale=0.05)
    out, after = source.blank(1, 7, 11, 16), source.blank(2, 7, 11, 16, gaps=False)
    for rows in ((0, 3), (3, 7)):
        for columns in ((0, 6), (6, 11)):
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
    frames: int, later: bool, box: Box | None = None, channels: int = 72
) -> Callable[[Source], Iterator[Pair]]:
    def run(source: Source) -> Iterator[Pair]:
        x = source.normal(frames, 7, 9, channels)
        state = source.normal(2, 7, 9, channels) if later else None
        weight, bias = source.solid(27, channels, scale=0.2), source.solid(channels)
        place = box or (0, 7, 0, 9)
        part = (slice(None), slice(*place[:2]), slice(*place[2:]))
        y, after = depthwise_conv3d.launch(
            x,
            weight,
            bias,
            state=state,
            box=box,
            out=source.blank(frames, place[1] - place[0], place[3] - place[2], channels),
            after=source.blank(2, 7, 9, channels, gaps=False, part=part),
            **source.how,
        )
        expected, next_state = depthwise_conv3d.reference(
            x.double(), weight.double(), bias.double(), state=_double(state), box=box
        )
        yield y, expected
        yield after[part], next_state[part]

    return run


def _attention(
    batch: int, tokens: int, keys: int, heads: int, width: int
) -> Callable[[Source], Iterator[Pair]]:
    """Return a trial of heads that lie side by side, as linear layers write them."""

    def run(source: Source) -> Iterator[Pair]:
        def beside(tensor: Tensor) -> Tensor:
            return tensor.view(*tensor.shape[:-1], heads, width)

        shared, channels = batch if keys == tokens else 1, heads * width
        q = beside(source.normal(batch, tokens, channels))
        k, v = (beside(source.normal(shared, keys, channels)) for _ in range(2))
        out = beside(source.blank(batch, tokens, channels))
        yield (
            attention.launch(q, k, v, out=out, **source.how),
            attention.reference(q.double(), k.double(), v.double()),
        )

    return run


def _doubling(box: Box | None) -> Callable[[Source], Iterator[Pair]]:
    def run(source: Source) -> Iterator[Pair]:
        x = source.normal(2, 5, 7, 24)
        weight, bias = source.normal(3, 3, 24, 20, scale=0.07), source.solid(20)
        packed = source.inserted(upsample2x_conv.packed(weight.double()))
        exact, offset = x.double(), bias.double()
        expected = upsample2x_conv.plain(exact, weight.double(), offset)
        top, bottom, left, right = (2 * edge for edge in box or (0, 5, 0, 7))
        result = upsample2x_conv.launch(x, packed, bias, box=box, **source.how)
        yield result, expected[:, top:bottom, left:right]
        yield result, upsample2x_conv.reference(exact, packed.double(), offset, box=box)

    return run


def _gated(channels: int, hidden: int) -> Callable[[Source], Iterator[Pair]]:
    def run(source: Source) -> Iterator[Pair]:
        x = source.solid(70, channels, mean=3.0)
        value, gate = (source.solid(channels, hidden, scale=0.05) for _ in range(2))
        value_bias, gate_bias = (source.solid(hidden) for _ in range(2))
        tensors = [x, value, gate, value_bias, gate_bias]
        result = gated_linear.launch(*tensors, **source.how)
        exact, value, gate, value_bias, gate_bias = (tensor.double() for tensor in tensors)
        yield result, gated_linear.reference(exact, value, gate, value_bias, gate_bias)

    return run


def _norms(channels: int, groups: int) -> Callable[[Source], Iterator[Pair]]:
    def run(source: Source) -> Iterator[Pair]:
        x = source.solid(3, 7, 9, channels, scale=2.0, mean=1.0)
        exact = x.double()
        root = norm_silu.rms(x, choose=source.how["choose"])
        yield root, norm_silu.rms_reference(exact)
        gain, shift = (source.solid(channels, dtype=torch.float32) for _ in range(2))
        for silu in (True, False):
            norm = Activation(gain, inverse=root, silu=silu)
            yield norm_silu.apply(x, norm), norm(exact)
        parts = [norm_silu.channels(source.inserted(part)) for part in (x[:, :3], x[:, 3:])]
        statistics = torch.cat(parts, dim=2)
        norm = norm_silu.merged(statistics, groups, gain, shift, 1e-6)
        assert norm.shift is not None
        scale, offset = (source.inserted(each, each.dtype) for each in (norm.scale, norm.shift))
        result = norm_silu.apply(x, Activation(scale, shift=offset))
        gain, shift = gain.double(), shift.double()
        yield result, norm_silu.group_norm_reference(exact, groups, gain, shift, 1e-6)

    return run


DOWN = Window(stride=(1, 2, 2), bottom=1, right=1)
TIME = Window(stride=(2, 1, 1))
TALL = Window(top=1, bottom=1)
CUBE, ROWS, ALONG = (3, 3, 3), (3, 3, 1), (3, 1, 1)
INNER, CORNER = (2, 6, 1, 7), (4, 7, 5, 9)
LARGE = (17, 19)  # more pixels than a block has
TRIALS: dict[str, tuple[Trial, ...]] = {
    "causal_conv3d": (
        Trial("convolution, first frame", _convolution(1, CUBE)),
        Trial("convolution, first frames, RMS", _convolution(2, CUBE, kind="rms")),
        Trial(
            "convolution, step of 1, RMS, residual", _convolution(1, CUBE, SAME, "rms", True, True)
        ),
        Trial("convolution, step of 3, group norm", _convolution(3, ROWS, TALL, "affine", True)),
        Trial("convolution, clamped", _convolution(1, CUBE, later=True, clamp=(-0.5, 0.5))),
        Trial("convolution, inner tile", _convolution(1, CUBE, SAME, "rms", True, True, INNER)),
        Trial("convolution, corner tile", _convolution(1, CUBE, SAME, "", True, True, CORNER)),
        Trial(
            "convolution, wide",
            _convolution(1, ALONG, Window(), later=True, channels=(72, 136)),
        ),
        Trial(
            "convolution, 96 channels",
            _convolution(1, ALONG, Window(), later=True, channels=(20, 96)),
        ),
        Trial("convolution, from one channel", _convolution(1, CUBE, channels=(1, 24))),
        Trial("convolution, to one channel", _convolution(1, (1, 3, 3), channels=(20, 1))),
        Trial("convolution, stride 2 in space", _convolution(2, (1, 3, 3), DOWN)),
        Trial("convolution, stride 2 in time", _convolution(4, ALONG, TIME, later=True)),
        Trial(
            "convolution, along frames", _convolution(2, ALONG, Window(), later=True, size=LARGE)
        ),
        Trial(
            "convolution, 1x1x1, RMS alone",
            _convolution(2, (1, 1, 1), Window(), "rms alone", residual=True, size=LARGE),
        ),
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
        Trial("depthwise, first frames", _depthwise(2, later=False, channels=20)),
        Trial("depthwise, step of 1", _depthwise(1, later=True)),
        Trial(
            "depthwise, tile of a step of 3",
            _depthwise(3, later=True, box=(2, 6, 3, 9), channels=20),
        ),
    ),
    "attention": (
        Trial("attention, 3 heads of 32", _attention(2, 37, 37, 3, 32)),
        Trial("attention, to a shared text", _attention(3, 17, 5, 2, 32)),
        *(
            Trial(f"attention, 2 heads of {width}", _attention(1, 130, 37, 2, width))
            for width in (16, 48, 96, 128)
        ),
        *(
            Trial(f"attention, 2 heads of {width}", _attention(1, 70, 37, 2, width))
            for width in (192, 256, 320, 384, 512)
        ),
    ),
    "gated_linear": (
        Trial("norm and gated linear layers", _gated(72, 40)),
        Trial("norm and gated linear layers, wide", _gated(20, 136)),
    ),
    "norm_silu": (
        Trial("norms of 96 channels", _norms(96, 32)),
        Trial("norms of 20 channels", _norms(20, 5)),
    ),
}
