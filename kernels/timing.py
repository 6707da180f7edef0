"""Kernels timed on the GPU that is here, beside the roofline of its kind. Not yet run on one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fvae_deploy.errors import EngineError
from fvae_deploy.kernels.aot import record
from fvae_deploy.kernels.chips import CHIPS
from fvae_deploy.kernels.dispatch import KERNELS, Kernels


@dataclass(frozen=True)
class Timed:
    """One launch: median seconds, and what they mean."""

    kernel: str
    spec: str
    seconds: float
    flops: float  # counted
    moved: int  # bytes, counted
    roofline: float | None  # seconds on the card that `chips` names for this target


def timed() -> Iterator[Timed]:
    """Time every specification; raises EngineError without a GPU."""
    require_gpu()
    from triton.testing import do_bench

    target = Kernels("cuda", "triton").target
    chip = CHIPS.get(target)
    for name, module in KERNELS.items():
        for spec, kernel in module.specs(device="cuda"):
            launched = record(spec, kernel, target)
            milliseconds = do_bench(
                lambda spec=spec, kernel=kernel: spec.launch(run=kernel, target=target),
                return_mode="median",
            )
            yield Timed(
                kernel=name,
                spec=spec.name,
                seconds=milliseconds / 1e3,
                flops=spec.flops,
                moved=launched.moved,
                roofline=(
                    chip.seconds(spec.flops, launched.moved, launched.half) if chip else None
                ),
            )


def require_gpu() -> None:
    """Raise EngineError where torch finds no GPU."""
    if not torch.cuda.is_available():
        raise EngineError(
            f"expected a GPU, found torch {torch.__version__} without one: run it on a machine "
            "with a GPU; `fvae kernels check` needs none"
        )
