"""Launches of a kernel, specified without data and recorded instead of run.

A specification is a launch on tensors without data: shapes, strides and types are real, and what
the launcher would hand to the GPU is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fvae_deploy.kernels.blocks import Blocks, Choose, Launch

OPTIONS = ("num_warps", "num_stages")
Launcher = Callable[..., Any]  # takes run=, target= and choose=, launches once


@dataclass(frozen=True)
class Spec:
    """A launch that some network really makes."""

    name: str
    launch: Launcher
    eager: Callable[[], Any]  # the same on the same tensors by torch's own operations
    flops: float
    plain: float  # bytes that the plain graph moves for it, each of its operations by itself
    dot: bool = True  # multiplies matrices


@dataclass(frozen=True)
class Recorded:
    """What a launcher handed over at once: arguments by name, and options."""

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    @property
    def moved(self) -> int:
        """Bytes of all tensors, each read or written once."""
        tensors = {id(a): a for a in self.arguments.values() if torch.is_tensor(a)}
        return traffic(*tensors.values())

    @property
    def half(self) -> bool:
        """Whether it computes on float16 or bfloat16."""
        return any(
            a.dtype in (torch.float16, torch.bfloat16)
            for a in self.arguments.values()
            if torch.is_tensor(a)
        )


def traffic(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def as_torch_reads(weight: torch.Tensor) -> torch.Tensor:
    """Lay weights [..., C, C'] out as torch's convolution with channels last reads them fastest."""
    spatial = range(weight.ndim - 2)
    last = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
    turned = weight.permute(-1, -2, *spatial).contiguous(memory_format=last)
    return turned.permute(*(i + 2 for i in spatial), 1, 0)


def beside(run: Any, kernel: Any) -> Any:
    """Give what launches a further kernel where `run` launches the main one."""
    return run.beside(kernel) if isinstance(run, Recorder) else kernel


class Recorder:
    """Stands for a kernel and keeps the launches made of it."""

    def __init__(self, kernel: Any, found: list[Recorded] | None = None) -> None:
        self.kernel = getattr(kernel, "fn", kernel)
        self.found: list[Recorded] = [] if found is None else found

    def beside(self, kernel: Any) -> Recorder:
        """Stand for another kernel of the same launch."""
        return Recorder(kernel, self.found)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        """Take the grid, which does not matter."""

        def keep(*args: Any, **kwargs: Any) -> None:
            options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
            names = self.kernel.__code__.co_varnames
            given = dict(zip(names, args, strict=False)) | kwargs
            self.found.append(Recorded(self.kernel, given, options))

        return keep


def record(spec: Spec, kernel: Any, target: str, number: int = 0) -> list[Recorded]:
    """Make the launches of a specification as for a chip, with its nth blocks, and keep them."""
    recorder = Recorder(kernel)
    spec.launch(run=recorder, target=target, choose=nth(number))
    return recorder.found


def nth(number: int) -> Choose:
    """Choose the nth of what is offered."""

    def choose(alike: str, offered: Sequence[Blocks], launch: Launch) -> None:
        launch(offered[number])

    return choose


def choices(spec: Spec, kernel: Any, target: str) -> Sequence[Blocks | None]:
    """Blocks that a launch is offered on a chip; None alone where there is no choice."""
    seen: list[Sequence[Blocks | None]] = [[None]]

    def choose(alike: str, offered: Sequence[Blocks], launch: Launch) -> None:
        seen.append(offered)
        launch(offered[0])

    spec.launch(run=Recorder(kernel), target=target, choose=choose)
    return seen[-1]
