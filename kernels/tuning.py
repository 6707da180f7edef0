"""Measure once which blocks are fastest on this machine's GPU, and store that in the bundle.

The first launch with a new key (kernel, type, channels, window, and number of positions to a factor
of two) is timed with each of its blocks. The fastest blocks are written to `tuning/<GPU>.json` in
the bundle. They are measured again on another GPU, with another version of Triton, and when the
offered blocks have changed: what is no longer offered is never launched.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from fvae_deploy.kernels.blocks import Blocks, Launch

Clock = Callable[[Callable[[], None]], float]


class Tuner:
    """Choose the fastest blocks by measurement; a `Choose` for launchers.

    `seconds` times a launch. If the folder cannot be written, the tuner warns and keeps its
    measurements only in memory.
    """

    def __init__(self, folder: Path, gpu: str, compiler: str, seconds: Clock) -> None:
        self._about = {"gpu": gpu, "compiler": compiler}
        self._path = folder / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
        self._seconds = seconds
        self._known = self._read()

    def __call__(self, key: str, offered: Sequence[Blocks], launch: Launch) -> None:
        """Launch with the fastest blocks; time all of them first if that is not known yet."""
        if len(offered) == 1:
            launch(offered[0])
            return
        if self._known.get(key) not in offered:
            self._known[key] = min(offered, key=lambda b: self._seconds(lambda: launch(b)))
            self._write()
        # The offered blocks, not those of the file: 64.0 rows equal 64, but cannot be launched.
        launch(offered[offered.index(self._known[key])])

    def _read(self) -> dict[str, Blocks]:
        """Return the blocks measured before with the same GPU and compiler."""
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["about"] == self._about:
                return {key: Blocks(**numbers) for key, numbers in stored["blocks"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # missing or damaged: measure again
        return {}

    def _write(self) -> None:
        """Store all measurements; the file appears under its name only when complete."""
        stored = {"about": self._about, "blocks": {k: asdict(b) for k, b in self._known.items()}}
        new = self._path.with_suffix(f".{os.getpid()}.new")
        try:
            self._path.parent.mkdir(exist_ok=True)
            new.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
            new.replace(self._path)
        except OSError as error:
            warnings.warn(
                f"the fastest blocks for {self._about['gpu']} cannot be stored in {self._path} and "
                f"will be measured again by the next process: {error.strerror}",
                stacklevel=2,
            )


def on_gpu(folder: Path, device: str) -> Tuner:
    """Return a tuner that measures with the GPU's own clock.

    Blocks that the GPU cannot launch count as slower than all others.
    """
    import torch
    import triton
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def seconds(launch: Callable[[], None]) -> float:
        try:
            milliseconds: float = do_bench(launch, warmup=5, rep=20, return_mode="median")
        except OutOfResources:
            return math.inf
        return milliseconds / 1e3

    gpu = torch.cuda.get_device_name(torch.device(device))
    return Tuner(folder, gpu, f"triton {triton.__version__}", seconds)
