"""Triton where it is installed; else what lets the kernels' files be read without it.

The references in those files serve every engine and must not need Triton. Without it a kernel is
a plain function that nobody calls: `dispatch` refuses before, with the remedy.
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

# What computing raises: Triton's own errors are no RuntimeErrors, launchers refuse shapes.
FAILURES: tuple[type[Exception], ...] = (RuntimeError, ValueError)
FAILURES += () if triton is None else (triton.TritonError,)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def upcast(kind: torch.dtype) -> bool:
    """Whether products are taken in float32: the interpreter's of bfloat16 are wrong."""
    return INTERPRETED and kind == torch.bfloat16


__all__ = ["FAILURES", "INTERPRETED", "jit", "tl", "triton", "upcast"]
