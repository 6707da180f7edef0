"""Triton if it is installed, and otherwise stand-ins with which the kernels' files import.

All engines use the references in those files, which do not need Triton. Without Triton, a kernel is
a plain function that is never called: `dispatch` raises an error with the remedy before.
"""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ModuleNotFoundError:
    triton = tl = None
    jit = staticmethod

# Errors of a computation: ValueErrors come from launchers, and Triton has errors of its own.
FAILURES: tuple[type[Exception], ...] = (RuntimeError, ValueError)
FAILURES += () if triton is None else (triton.TritonError,)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def upcast(kind: torch.dtype) -> bool:
    """Return whether to multiply in float32: the interpreter multiplies bfloat16 wrongly."""
    return INTERPRETED and kind == torch.bfloat16


__all__ = ["FAILURES", "INTERPRETED", "jit", "tl", "triton", "upcast"]
