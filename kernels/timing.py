"""Time kernels on this machine's GPU with all their blocks, and torch's operations to compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fvae_deploy.errors import EngineError
from fvae_deploy.kernels.blocks import Blocks
from fvae_deploy.kernels.chips import rated
from fvae_deploy.kernels.dispatch import Kernels, named
from fvae_deploy.kernels.record import Spec, choices, nth, record


@dataclass(frozen=True)
class Median:
    """Median seconds of a launch, or why it could not be timed."""

    seconds: float | None
    failure: str = ""
    blocks: Blocks | None = None  # None for torch, and for kernels without a choice of blocks


@dataclass(frozen=True)
class Timed:
    """Times of a launch with each of its blocks, the default first, and of torch."""

    kernel: str
    spec: str
    tried: tuple[Median, ...]
    torch: Median  # the same computation by torch's own operations on the same tensors
    flops: float  # counted
    moved: int  # bytes, counted
    roofline: float | None  # seconds at the rates of this card in `chips`; None: unknown card

    @property
    def best(self) -> Median | None:
        """Return the fastest; None if none could be timed."""
        measured = [m for m in self.tried if m.seconds is not None]
        return min(measured, key=lambda m: m.seconds or 0.0, default=None)

    @property
    def failures(self) -> list[str]:
        """Return the failures with their blocks."""
        return [f"{m.blocks}: {m.failure}" for m in self.tried if m.failure]


def timed(kernels: Sequence[str] = ()) -> Iterator[Timed]:
    """Time every specification of these kernels, or of all kernels.

    A failure is reported in its row and does not stop the others. Raises EngineError without a GPU,
    and if the GPU cannot compute any more after a failure.
    """
    require_gpu()
    target = Kernels("cuda", "triton").target
    chip = rated(target, torch.cuda.get_device_name())
    for name, module in named(kernels).items():
        for spec, kernel in module.specs(device="cuda"):
            launches = record(spec, kernel, target)
            moved = sum(launch.moved for launch in launches)
            yield Timed(
                kernel=name,
                spec=spec.name,
                tried=tuple(_each(spec, kernel, target)),
                torch=median(spec.eager),
                flops=spec.flops,
                moved=moved,
                roofline=chip.seconds(spec.flops, moved, launches[0].half) if chip else None,
            )
            require_context(f"{name} ({spec.name})")


def compile_all(kernels: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Launch every specification with each of its blocks once, so that timing compiles nothing.

    Yields kernel and specification after each. Failures are left to `timed`, which reports them.
    """
    require_gpu()
    target = Kernels("cuda", "triton").target
    for name, module in named(kernels).items():
        for spec, kernel in module.specs(device="cuda"):
            for number, _ in enumerate(choices(spec, kernel, target)):
                with contextlib.suppress(Exception):
                    spec.launch(run=kernel, target=target, choose=nth(number))
            yield name, spec.name


def _each(spec: Spec, kernel: Any, target: str) -> Iterator[Median]:
    for number, blocks in enumerate(choices(spec, kernel, target)):
        launch, choose = spec.launch, nth(number)
        yield median(lambda: launch(run=kernel, target=target, choose=choose), blocks)  # noqa: B023


def median(work: Callable[[], Any], blocks: Blocks | None = None) -> Median:
    """Time many runs with the GPU's own clock; the GPU's cache is emptied before each."""
    from triton.testing import do_bench

    try:
        return Median(do_bench(work, return_mode="median") / 1e3, blocks=blocks)
    except Exception as error:  # an unknown GPU can fail in any way: report it
        return Median(None, describe(error), blocks)


def describe(error: Exception) -> str:
    """Return class and message of an error in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def require_gpu() -> None:
    """Raise EngineError if torch finds no GPU."""
    if not torch.cuda.is_available():
        raise EngineError(
            f"expected a GPU, found torch {torch.__version__} without one: run this on a machine "
            "with a GPU, or run fvae kernels check, which needs none"
        )


def require_context(after: str) -> None:
    """Raise EngineError if the GPU cannot compute any more in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise EngineError(
            f"expected the GPU to keep working after {after}, found {describe(error)}: the "
            "remaining kernels were not run, select them with --kernel"
        ) from None
