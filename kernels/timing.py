"""Kernels timed on the GPU that is here: all blocks they are offered, and torch beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fvae_deploy.errors import EngineError
from fvae_deploy.kernels.blocks import Blocks
from fvae_deploy.kernels.chips import CHIPS
from fvae_deploy.kernels.dispatch import Kernels, named
from fvae_deploy.kernels.record import Spec, choices, nth, record


@dataclass(frozen=True)
class Median:
    """Median seconds of a launch, or what kept it from being timed."""

    seconds: float | None
    failure: str = ""
    blocks: Blocks | None = None  # None where there is no choice, and for torch


@dataclass(frozen=True)
class Timed:
    """One launch of a network: with each of its blocks, the default first, and by torch."""

    kernel: str
    spec: str
    tried: tuple[Median, ...]
    torch: Median  # the same on the same tensors by torch's own operations
    flops: float  # counted
    moved: int  # bytes, counted
    roofline: float | None  # seconds on the card that `chips` names for this target

    @property
    def best(self) -> Median | None:
        """The fastest; None where nothing ran."""
        ran = [m for m in self.tried if m.seconds is not None]
        return min(ran, key=lambda m: m.seconds or 0.0, default=None)

    @property
    def failures(self) -> list[str]:
        """What went wrong, by blocks."""
        return [f"{m.blocks}: {m.failure}" for m in self.tried if m.failure]


def timed(kernels: Sequence[str] = ()) -> Iterator[Timed]:
    """Time every specification of these kernels, or of all.

    What fails is reported in its row, and the others go on. Raises EngineError without a GPU, and
    where a failure leaves none that computes.
    """
    require_gpu()
    target = Kernels("cuda", "triton").target
    chip = CHIPS.get(target)
    for name, module in named(kernels).items():
        for spec, kernel in module.specs(device="cuda"):
            launched = record(spec, kernel, target)
            moved = sum(launch.moved for launch in launched)
            found = Timed(
                kernel=name,
                spec=spec.name,
                tried=tuple(_each(spec, kernel, target)),
                torch=median(spec.eager),
                flops=spec.flops,
                moved=moved,
                roofline=chip.seconds(spec.flops, moved, launched[0].half) if chip else None,
            )
            yield found
            require_context(f"{name} ({spec.name})")


def _each(spec: Spec, kernel: Any, target: str) -> Iterator[Median]:
    for number, blocks in enumerate(choices(spec, kernel, target)):
        launch, choose = spec.launch, nth(number)
        yield median(lambda: launch(run=kernel, target=target, choose=choose), blocks)  # noqa: B023


def median(work: Callable[[], Any], blocks: Blocks | None = None) -> Median:
    """Time it by the GPU's own clock, its cache emptied before each of many runs."""
    from triton.testing import do_bench

    try:
        return Median(do_bench(work, return_mode="median") / 1e3, blocks=blocks)
    except Exception as error:  # whatever a GPU nobody has seen does: it belongs in the report
        return Median(None, said(error), blocks)


def said(error: Exception) -> str:
    """Class and first words of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def require_gpu() -> None:
    """Raise EngineError where torch finds no GPU."""
    if not torch.cuda.is_available():
        raise EngineError(
            f"expected a GPU, found torch {torch.__version__} without one: run it on a machine "
            "with a GPU; `fvae kernels check` needs none"
        )


def require_context(after: str) -> None:
    """Raise EngineError where the GPU computes nothing more for this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise EngineError(
            f"expected the GPU to go on after {after}, found {said(error)}: what follows was not "
            "tried, name other kernels with --kernel"
        ) from None
