"""Record the launches of a kernel instead of running them.

A specification is a launch on tensors without data, but with real shapes, strides and types. What
the launcher would pass to the GPU is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fvae_deploy.kernels.blocks import Blocks, Choose, Launch

OPTIONS = ("num_warps", "num_stages")
Launcher = Callable[..., Any]  # launches once; takes the arguments run, target and choose


@dataclass(frozen=True)
class Spec:
    """A launch as one of the networks makes it."""

    name: str
    launch: Launcher
    eager: Callable[[], Any]  # the same computation by torch's own operations
    flops: float
    plain: float  # bytes that the plain graph moves for it, without fused operations
    dot: bool = True  # whether it multiplies matrices


@dataclass(frozen=True)
class Recorded:
    """One recorded launch: its arguments by name, and Triton's options."""

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    @property
    def moved(self) -> int:
        """Return the bytes of all tensors, each read or written once."""
        tensors = {id(a): a for a in self.arguments.values() if torch.is_tensor(a)}
        return traffic(*tensors.values())

    @property
    def half(self) -> bool:
        """Return whether it computes with float16 or bfloat16."""
        return any(
            a.dtype in (torch.float16, torch.bfloat16)
            for a in self.arguments.values()
            if torch.is_tensor(a)
        )


def traffic(*tensors: torch.Tensor | None) -> int:
    """Return the bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def as_torch_reads(weight: torch.Tensor) -> torch.Tensor:
    """Return weights [..., C, C'] in the memory format that torch's convolution reads fastest."""
    spatial = range(weight.ndim - 2)
    last = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
    permuted = weight.permute(-1, -2, *spatial).contiguous(memory_format=last)
    return permuted.permute(*(i + 2 for i in spatial), 1, 0)


def launcher_of(kernel: Any, run: Any) -> Any:
    """Return what launches a second kernel: the kernel, or a recorder if `run` is one."""
    return run.for_kernel(kernel) if isinstance(run, Recorder) else kernel


class Recorder:
    """Takes the place of a kernel and records its launches."""

    def __init__(self, kernel: Any, launches: list[Recorded] | None = None) -> None:
        self.kernel = getattr(kernel, "fn", kernel)
        self.launches: list[Recorded] = [] if launches is None else launches

    def for_kernel(self, kernel: Any) -> Recorder:
        """Return a recorder of another kernel, which adds to the same list."""
        return Recorder(kernel, self.launches)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        """Return a function that records a launch; the grid is ignored."""

        def add(*args: Any, **kwargs: Any) -> None:
            options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
            names = self.kernel.__code__.co_varnames
            arguments = dict(zip(names, args, strict=False)) | kwargs
            self.launches.append(Recorded(self.kernel, arguments, options))

        return add


def record(spec: Spec, kernel: Any, target: str, number: int = 0) -> list[Recorded]:
    """Record the launches of a specification for a chip, with blocks number `number`."""
    recorder = Recorder(kernel)
    spec.launch(run=recorder, target=target, choose=nth(number))
    return recorder.launches


def nth(number: int) -> Choose:
    """Return a `Choose` that launches with blocks number `number`."""

    def choose(key: str, offered: Sequence[Blocks], launch: Launch) -> None:
        launch(offered[number])

    return choose


def choices(spec: Spec, kernel: Any, target: str) -> Sequence[Blocks | None]:
    """Return the blocks that a launch is offered on a chip; [None] if there is no choice."""
    offers: list[Sequence[Blocks | None]] = [[None]]

    def choose(key: str, offered: Sequence[Blocks], launch: Launch) -> None:
        offers.append(offered)
        launch(offered[0])

    spec.launch(run=Recorder(kernel), target=target, choose=choose)
    return offers[-1]
