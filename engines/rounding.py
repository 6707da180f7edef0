"""float32 to the bits of a half-precision type and back, in numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STORED = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int64": "int64"}


def narrow(array: NDArray[Any], kind: str) -> NDArray[Any]:
    """Round an array to a type; bfloat16, which numpy has not, is the upper half of a float32."""
    if kind != "bfloat16":
        return np.ascontiguousarray(array, dtype=kind)
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(stored: NDArray[Any], kind: str) -> NDArray[Any]:
    """Return stored values as float32."""
    if kind != "bfloat16":
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)
