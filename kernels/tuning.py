"""Which blocks are fastest on the GPU that is here: measured once, remembered in the bundle.

Launches that are alike (kernel, type, channels, window, and work to a factor of two) are timed
with every one of the few blocks they are offered when the first of them is made; the fastest is
written to `tuning/<GPU>.json` beside the bundle's graphs. Another GPU or another Triton measures
for itself, and so does a launch that is offered other blocks than it was.
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
    """Chooses blocks by what was measured; a `Choose` for launchers.

    `seconds` times a launch. A folder that cannot be written costs a warning: what was measured
    then lasts as long as the tuner.
    """

    def __init__(self, folder: Path, gpu: str, compiler: str, seconds: Clock) -> None:
        self._about = {"gpu": gpu, "compiler": compiler}
        self._path = folder / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
        self._seconds = seconds
        self._known = self._read()

    def __call__(self, alike: str, offered: Sequence[Blocks], launch: Launch) -> None:
        """Launch with the fastest of the blocks, timing them all if that is not known yet."""
        blocks = self._known.get(alike, offered[0])
        if len(offered) > 1 and (alike not in self._known or blocks not in offered):
            blocks = min(offered, key=lambda b: self._seconds(lambda: launch(b)))
            self._known[alike] = blocks
            self._write()
        launch(blocks)

    def _read(self) -> dict[str, Blocks]:
        """Take what was measured on such a GPU with such a compiler; else nothing."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["about"] == self._about:
                return {alike: Blocks(**numbers) for alike, numbers in kept["blocks"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # not there or damaged: measured again
        return {}

    def _write(self) -> None:
        """Keep what is known, under its name only when whole."""
        kept = {"about": self._about, "blocks": {k: asdict(b) for k, b in self._known.items()}}
        new = self._path.with_suffix(f".{os.getpid()}.new")
        try:
            self._path.parent.mkdir(exist_ok=True)
            new.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            new.replace(self._path)
        except OSError as error:
            warnings.warn(
                f"blocks measured for {self._about['gpu']} cannot be kept in {self._path}, and "
                f"will be measured again: {error.strerror}",
                stacklevel=2,
            )


def on_gpu(folder: Path, device: str) -> Tuner:
    """Make a tuner for a GPU, timed by its own clock.

    Blocks that the GPU cannot launch are slower than all others.
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
