r"""An engine of your own: ONNX's reference implementation runs the graphs of a bundle.

    python examples/reference_engine.py reconstruct ct.nii.gz -o recon.nii.gz --engine reference

It computes with numpy alone, operator by operator, in one thread: slow, and good for a check of a
faster engine. It needs the package `onnx`. A runtime of yours takes the place of
`ReferenceEvaluator`; all else can stay.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator

from fvae_deploy.engines.base import ENGINES, Entry, check_inputs
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Bundle
from fvae_deploy.export.graphs import read_graph


class ReferenceEngine:
    """A bundle opened in ONNX's reference implementation; see `fvae_deploy.engines.base.Engine`."""

    name = "reference"

    def __init__(self, bundle: Path, manifest: Bundle, device: str, precision: str) -> None:
        if (device, precision) != ("cpu", "fp32"):
            raise EngineError(
                f"expected device cpu and precision fp32, found {device} and {precision}: "
                "use --device cpu --precision fp32"
            )
        self.precision = precision
        self._bundle, self._manifest = bundle, manifest
        self._graphs: dict[str, ReferenceEvaluator] = {}  # by the name of the part

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute one part; states are numpy arrays."""
        spec = self._manifest.part(part)
        check_inputs(spec, inputs)  # no runtime is trusted with data of a wrong shape
        if part not in self._graphs:
            self._graphs[part] = ReferenceEvaluator(read_graph(self._bundle / spec.file))
        arrays = {t.name: np.asarray(inputs[t.name], dtype=t.type) for t in spec.inputs}
        try:
            values = self._graphs[part].run([t.name for t in spec.outputs], arrays)
        except Exception as error:  # numpy raises many classes
            raise EngineError(f"ONNX's reference failed in {part}: {error}") from error
        named = zip(spec.outputs, values, strict=True)
        return {t.name: np.ascontiguousarray(value) for t, value in named}

    def host(self, state: Any) -> Any:
        """Return a state, which is already an array."""
        return state

    def release(self, part: str, compiled: bool) -> None:
        """Drop a part's graph if `compiled`; there is no other memory to free."""
        if compiled:
            self._graphs.pop(part, None)

    def close(self) -> None:
        """Drop all graphs."""
        self._graphs.clear()


def open(
    bundle: Path, manifest: Bundle, device: str, precision: str, threads: int | None
) -> ReferenceEngine:
    """Open a bundle; raises EngineError for a GPU or another precision than fp32."""
    return ReferenceEngine(bundle, manifest, device, precision)


def precisions(device: str = "cpu") -> list[str]:
    """Return the precisions that the engine computes in on a device; none on a GPU."""
    return ["fp32"] if device == "cpu" else []


def register() -> None:
    """Add the engine to the table that `--engine` chooses from, in this process."""
    ENGINES["reference"] = Entry("reference_engine", ("onnx",), "pip install onnx")


if __name__ == "__main__":
    register()
    from fvae_deploy.cli.main import main

    sys.exit(main())
