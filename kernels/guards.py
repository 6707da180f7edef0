"""Tensors between guards, which show every read and every write outside of them.

Inputs lie between NaN and large numbers in turn: a read outside makes a result wrong, also where a
maximum or a mask drops one of the two. An input must not change at all. Outputs lie between finite
numbers, because a NaN that is written over a NaN shows nothing. What launchers allocate lies
between guards too (`Guarded`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fvae_deploy.kernels.blocks import Choose, first

POISON = (math.nan, 30000.0)  # around inputs
MARKS = (-21000.0, 17000.0)  # around outputs
UNWRITTEN = 25000.0  # in the part of an output that must stay as it is
MARGIN = 1 << 13  # elements before and after a buffer: more than any block is wide
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Part = tuple[slice, ...]
ALL: Part = ()


class Source:
    """Random tensors of one type on one device, each between guards.

    Launches get `how` as further arguments: they run as on the chip `target`, with the blocks that
    `choose` chooses.
    """

    def __init__(
        self, device: str, dtype: torch.dtype, target: str = "sm_80", choose: Choose = first
    ) -> None:
        self.device, self.dtype = device, dtype
        self.how: dict[str, Any] = {"target": target, "choose": choose}
        self.random = torch.Generator().manual_seed(0)
        self.guards: list[tuple[Tensor, Tensor, Tensor]] = []  # buffer, its copy, may change

    def normal(
        self,
        *shape: int,
        scale: float = 1.0,
        mean: float = 0.0,
        dtype: torch.dtype | None = None,
        gaps: bool = True,
    ) -> Tensor:
        """Return an input of normal values; with `gaps`, a view that is not contiguous."""
        flat, view = self._buffer(shape, dtype or self.dtype, POISON, gaps)
        view.copy_(torch.randn(shape, generator=self.random) * scale + mean)
        self.guards.append((flat, flat.clone(), torch.zeros_like(flat, dtype=torch.bool)))
        return view

    def solid(self, *shape: int, **options: Any) -> Tensor:
        """Return an input of normal values that is contiguous."""
        return self.normal(*shape, gaps=False, **options)

    def inserted(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a contiguous input with these values."""
        view = self.solid(*values.shape, dtype=dtype, scale=0.0)
        view.copy_(values)
        flat, _, fixed = self.guards.pop()
        self.guards.append((flat, flat.clone(), fixed))
        return view

    def blank(self, *shape: int, gaps: bool = True, part: Part = ALL) -> Tensor:
        """Return an output of which the kernel must write all of `part` and nothing else."""
        flat, view = self._buffer(shape, self.dtype, MARKS, gaps)
        view.fill_(UNWRITTEN)
        view[part] = math.nan
        changing = torch.zeros_like(flat, dtype=torch.bool)
        changing.as_strided(view.size(), view.stride(), view.storage_offset())[part] = True
        self.guards.append((flat, flat.clone(), changing))
        return view

    def enclosed(self, made: Tensor) -> Tensor:
        """Return an output in place of a tensor that a launcher has just allocated."""
        assert made.is_contiguous(), "launchers allocate contiguous tensors"
        flat, view = self._buffer(made.shape, made.dtype, MARKS, gaps=False)
        view.fill_(math.nan)
        changing = torch.zeros_like(flat, dtype=torch.bool)
        changing[MARGIN:-MARGIN] = True
        self.guards.append((flat, flat.clone(), changing))
        return view

    def _buffer(
        self, shape: Sequence[int], dtype: torch.dtype, around: tuple[float, float], gaps: bool
    ) -> tuple[Tensor, Tensor]:
        """Return a buffer filled with guards, and the view of this shape in it."""
        wider = [n + 2 for n in shape[:-1]] + [shape[-1] + 16] if gaps else list(shape)
        flat = torch.full((math.prod(wider) + 2 * MARGIN,), around[0], dtype=dtype)
        flat[1::2] = around[1]
        flat = flat.to(self.device)
        inner = (*(slice(1, n + 1) for n in shape[:-1]), slice(8, 8 + shape[-1]))
        view = flat[MARGIN:-MARGIN].view(wider)
        return flat, view[inner] if gaps else view

    def untouched(self) -> bool:
        """Return whether inputs, all guards and what must not be written are as they were."""
        for flat, before, changing in self.guards:
            same = _bits(flat) == _bits(before)  # NaN equals NaN here
            if not bool((same | changing).all()):
                return False
        return True

    def encloses(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies between guards."""
        start = tensor.untyped_storage().data_ptr()
        return any(flat.untyped_storage().data_ptr() == start for flat, _, _ in self.guards)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


class Guarded(TorchFunctionMode):
    """Places what torch.empty, empty_like and new_empty return between the guards of a source."""

    ALLOCATORS = (torch.empty, torch.empty_like, Tensor.new_empty)

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function; replace what it allocates, but for the interpreter's empty ones."""
        result = func(*args, **(kwargs or {}))
        if func in self.ALLOCATORS and result.numel():
            return self.source.enclosed(result)
        return result
