"""Run the comparisons of kernels with their references, with the blocks of any chip.

The same trials run on a GPU (`fvae kernels test`) and in Triton's interpreter (tests).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fvae_deploy.kernels.blocks import Blocks, Choose, Launch
from fvae_deploy.kernels.chips import CHIPS
from fvae_deploy.kernels.comparisons import TRIALS, Trial
from fvae_deploy.kernels.dispatch import named
from fvae_deploy.kernels.guards import Guarded, Source
from fvae_deploy.kernels.optional import INTERPRETED
from fvae_deploy.kernels.timing import describe, require_context

Offers = dict[str, list[Blocks]]  # the blocks of every launch of a trial, by the launch's key

# Limits of `error`. The references compute in float64 on the same rounded inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def error(result: Tensor, expected: Tensor) -> float:
    """Return the largest relative error; NaN if any value is NaN.

    An error is relative to the expected value plus the standard deviation of all.
    """
    result, expected = result.double(), expected.double()
    return float(((result - expected).abs() / (expected.abs() + expected.std())).max())


def offers(
    trial: Trial, device: str, dtype: torch.dtype, targets: Sequence[str] = ("sm_80",)
) -> Offers:
    """Return the blocks that the launches of a trial are offered on any of these chips.

    The interpreter knows no warps and stages: blocks that differ in nothing else count as one.
    """
    found: dict[str, dict[Blocks, Blocks]] = {}

    def collect(key: str, offered: Sequence[Blocks], launch: Launch) -> None:
        for blocks in offered:
            plain = replace(blocks, warps=1, stages=1) if INTERPRETED else blocks
            found.setdefault(key, {}).setdefault(plain, blocks)

    for target in targets:
        source = Source(device, dtype, target, collect)
        with Guarded(source):
            for _ in trial.run(source):
                pass
    return {key: list(blocks.values()) for key, blocks in found.items()}


def _numbered(number: int, among: Offers) -> Choose:
    """Return a `Choose` of blocks number `number`, or the last if there are fewer."""

    def choose(key: str, offered: Sequence[Blocks], launch: Launch) -> None:
        blocks = among.get(key, offered)
        launch(blocks[min(number, len(blocks) - 1)])

    return choose


def worst(
    trial: Trial,
    device: str,
    dtype: torch.dtype,
    targets: Sequence[str] = ("sm_80",),
    every: bool = False,
) -> float:
    """Run a trial and return its largest error.

    With `every`, run it with all blocks that are offered on any of these chips, otherwise with the
    default of the first. The error is infinite if the kernel read or wrote outside its tensors.
    """
    errors: list[float] = []
    among = offers(trial, device, dtype, targets) if every else {}
    for number in range(max((len(blocks) for blocks in among.values()), default=1)):
        source = Source(device, dtype, targets[0], _numbered(number, among))
        with Guarded(source):
            errors += [error(result, expected) for result, expected in trial.run(source)]
        if not source.untouched() or any(e != e for e in errors):
            return math.inf
    return max(errors)


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial in one type: its largest error, or why it failed."""

    kernel: str
    trial: str
    type: str
    error: float | None
    limit: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the kernel equals its reference within the limit."""
        return self.error is not None and self.error <= self.limit


def run_trials(
    kernels: Sequence[str],
    device: str,
    target: str,
    every: bool = False,
    types: Sequence[torch.dtype] = tuple(TOLERANCE),
) -> Iterator[TrialResult]:
    """Run the trials of these kernels, or of all kernels, in these types.

    A failed trial is reported and does not stop the others. With `every`, the interpreter tries
    the blocks of all chips. Raises EngineError if the GPU cannot compute any more after a failure.
    """
    targets = tuple(CHIPS) if INTERPRETED and every else (target,)
    for kernel in named(kernels):
        for trial in TRIALS[kernel]:
            for dtype in types:
                limit = TOLERANCE[dtype]
                largest, failure = None, ""
                try:
                    largest = worst(trial, device, dtype, targets, every)
                except Exception as error:  # an unknown GPU can fail in any way: report it
                    failure = describe(error)
                if largest == math.inf:
                    largest, failure = None, "NaN, or a read or write outside its tensors"
                kind = str(dtype).removeprefix("torch.")
                yield TrialResult(kernel, trial.name, kind, largest, limit, failure)
                if failure and device != "cpu":
                    require_context(f"{trial.name} in {kind}")
