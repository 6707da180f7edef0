"""Ranges of convolutions that run in int8 on a CPU: chosen from samples, stored in the bundle.

    int8.json    {PART: {LAYER: {"high": [C], "signed": false, "bias": [O]}}}

A layer's weights have one scale per output channel. Its input has one scale, but its channels are
divided by factors first, and the weights multiplied by them: channels of a network differ in size
by orders of magnitude, and the small ones would get a few steps of 256. `high` is the largest value
that each input channel can represent: its factor times the largest one of all. A signed input
represents -128/127 of that at the least, another one 0. `bias` is what rounding adds to each output
channel in the mean, to be subtracted.

Both the factors and the range are those with the smallest error of the layer's output, as predicted
from samples of its input. The factors balance inputs and weights as in SmoothQuant (Xiao et al.,
2023, arXiv:2211.10438).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import BundleError, EngineError
from fvae_deploy.export.bundle import Bundle

Array = NDArray[np.float32]
FILE = "int8.json"
BALANCES = (0.0, 0.25, 0.5, 0.75, 1.0)  # how far the factors even out the inputs; 0: no factors
RANGES = np.linspace(1, 0.3, 15)  # tried shares of the largest value
LIMIT = 0.03  # predicted error of a layer, relative to its output, above which it stays float
FACTOR = 1e-4  # the smallest factor, relative to the largest


@dataclass(frozen=True)
class Layer:
    """Ranges of one convolution with C input and O output channels."""

    high: Array  # [C], above 0
    signed: bool
    bias: Array  # [O]

    @property
    def low(self) -> Array:
        """Return the smallest value that each input channel represents."""
        return self.high * np.float32(-128 / 127 if self.signed else 0)


def chosen(x: Array, weight: Array) -> Layer | None:
    """Choose the ranges of a layer from samples of its input.

    Parameters
    ----------
    x
        Samples of the input, [C, n].
    weight
        Weights [O, C, kernel...].

    Returns
    -------
    Layer
        The ranges with the smallest predicted error; None if that error is above `LIMIT`.
    """
    most = np.abs(x).max(1)
    if not most.max() > 0:
        return None
    kernel = tuple(range(2, weight.ndim))
    inputs = np.maximum(most, 1e-6 * most.max())
    weights = np.maximum(np.abs(weight).max(axis=(0, *kernel)), 1e-9)
    signal = float((np.square(weight).sum((0, *kernel)) * np.square(x).mean(1)).sum())
    best, least = None, LIMIT**2 * signal
    for balance in BALANCES:
        raw = inputs**balance / weights ** (1 - balance) if balance else np.ones_like(inputs)
        factors = np.maximum(raw / raw.max(), FACTOR).astype(np.float32)
        layer, error = _predicted(x, weight, factors)
        if error < least:
            best, least = layer, error
    return best


def rounded_weight(weight: Array, factors: Array) -> Array:
    """Return the weights [O, C, kernel...] that a layer computes with, factors divided out."""
    shaped = factors.reshape(1, -1, *[1] * (weight.ndim - 2))
    scaled = weight * shaped
    step = np.maximum(np.abs(scaled).max(axis=tuple(range(1, weight.ndim)), keepdims=True), 1e-12)
    result: Array = np.round(scaled / step * 127) * step / 127 / shaped
    return result


def _predicted(x: Array, weight: Array, factors: Array) -> tuple[Layer, float]:
    """Return the best ranges with these factors, and the squared error of the output."""
    kernel = tuple(range(2, weight.ndim))
    scaled = x / factors[:, None]
    signed, most = bool(x.min() < 0), float(np.abs(scaled).max())
    rounded, high = min(
        ((_rounded(scaled, most * share, signed), most * share) for share in RANGES),
        key=lambda tried: float(np.square(tried[0] - scaled).mean()),
    )
    input_error = (rounded - scaled) * factors[:, None]
    weight_error = rounded_weight(weight, factors) - weight
    error = (np.square(weight).sum((0, *kernel)) * np.square(input_error).mean(1)).sum()
    error += (np.square(weight_error).sum((0, *kernel)) * np.square(x).mean(1)).sum()
    bias = weight_error.sum(kernel) @ x.mean(1) + weight.sum(kernel) @ input_error.mean(1)
    layer = Layer((high * factors).astype(np.float32), signed, bias.astype(np.float32))
    return layer, float(error)


def _rounded(x: Array, high: float, signed: bool) -> Array:
    least, most = (-128, 127) if signed else (0, 255)
    step = np.float32(high / most)
    result: Array = np.clip(np.round(x / step), least, most) * step
    return result


def write(folder: Path, layers: Mapping[str, Mapping[str, Layer]]) -> None:
    """Write the ranges of all layers, by part and name, into a bundle's folder."""
    content = {
        part: {
            name: {
                "high": [float(f"{value:.6g}") for value in layer.high],
                "signed": layer.signed,
                "bias": [float(f"{value:.6g}") for value in layer.bias],
            }
            for name, layer in by_name.items()
        }
        for part, by_name in layers.items()
    }
    (folder / FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read(folder: Path, bundle: Bundle) -> dict[str, dict[str, Layer]]:
    """Read the ranges of all layers, by part and name.

    Raises EngineError if the bundle has none, BundleError if the file is not what `write` writes.
    """
    if FILE not in bundle.files:
        raise EngineError(
            f"expected {bundle.name} to be calibrated for int8, found no {FILE}: export it again "
            "with --calibrate CT, or use --precision bf16"
        )
    try:
        content = json.loads((folder / FILE).read_bytes())
        return {
            part: {name: _layer(**fields) for name, fields in by_name.items()}
            for part, by_name in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"expected the ranges of layers in {folder / FILE}, found {type(error).__name__}: "
            "export the bundle again"
        ) from None


def _layer(high: list[float], signed: bool, bias: list[float]) -> Layer:
    """Check the types and values of a layer's fields; raises ValueError."""
    layer = Layer(np.array(high, np.float32), bool(signed), np.array(bias, np.float32))
    if not (layer.high > 0).all() or not np.isfinite([*layer.high, *layer.bias]).all():
        raise ValueError("ranges that are not above 0 and finite")
    return layer
