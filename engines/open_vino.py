"""OpenVINO: the fastest engine on CPUs; graphs compiled for the very shapes that come.

States never leave OpenVINO's own buffers: the tensors of a state that was used up become
the outputs of the next run, so a stream allocates nothing after its first two steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Importing OpenVINO reports to its maker over the network, and writes an identity into the
# home folder, unless its telemetry package cannot be imported: hospitals want neither.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402

from fvae_deploy.engines.base import check_inputs  # noqa: E402
from fvae_deploy.engines.pages import trim, unmap  # noqa: E402
from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.export.manifest import Manifest, Part  # noqa: E402

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
CAPABILITY = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


class _Compiled:
    """One part compiled for one set of input shapes."""

    def __init__(self, compiled: ov.CompiledModel, part: Part) -> None:
        self.part = part
        self.compiled = compiled
        self.request: ov.InferRequest | None = None
        self.spare: list[list[ov.Tensor]] = []

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        given = [_tensor(inputs[spec.name]) for spec in self.part.inputs]
        request = self.request = self.request or self.compiled.create_infer_request()
        for spec, tensor in zip(self.part.inputs, given, strict=True):
            request.set_tensor(spec.name, tensor)
        state = self.spare.pop() if self.spare else self._new_state()
        for spec, tensor in zip(self.part.state_outputs, state, strict=True):
            request.set_tensor(spec.name, tensor)
        request.infer()
        if self.part.state_inputs:
            self.spare.append(given[1:])
        data = self.part.outputs[0].name
        named = zip((spec.name for spec in self.part.state_outputs), state, strict=True)
        return {data: request.get_tensor(data).data, **dict(named)}

    def release(self) -> None:
        """Give back intermediate buffers, spare states, and what the request holds of both."""
        self.spare.clear()
        self.request = None
        self.compiled.release_memory()

    def _new_state(self) -> list[ov.Tensor]:
        shapes = (self.compiled.output(spec.name).shape for spec in self.part.state_outputs)
        return [ov.Tensor(ov.Type.f32, shape) for shape in shapes]


def _tensor(value: Any) -> ov.Tensor:
    if isinstance(value, ov.Tensor):
        return value
    return ov.Tensor(np.ascontiguousarray(value, dtype=np.float32), shared_memory=True)


class OpenVINOEngine:
    """See `fvae_deploy.engines.base.Engine`."""

    name = "openvino"

    def __init__(self, bundle: Path, manifest: Manifest, device: str, precision: str) -> None:
        self.precision = precision
        self._bundle, self._manifest, self._device = bundle, manifest, device.upper()
        self._core = ov.Core()
        if self._device not in self._core.available_devices:
            raise EngineError(
                f"expected an OpenVINO device among {', '.join(self._core.available_devices)}, "
                f"found {device!r}: choose one of them"
            )
        able = self._core.get_property(self._device, "OPTIMIZATION_CAPABILITIES")
        if CAPABILITY[precision] not in able:
            raise EngineError(
                f"expected a {device} that computes in {precision}, found one with "
                f"{', '.join(c for c in able if c in CAPABILITY.values())}: use --precision fp32"
            )
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute one part; the first call with new shapes compiles it for them."""
        spec = self._manifest.part(part)
        check_inputs(spec, inputs)
        shapes = tuple(tuple(inputs[i.name].shape) for i in spec.inputs)
        compiled = self._compiled.get((part, *shapes))
        try:
            if compiled is None:
                compiled = self._compiled[(part, *shapes)] = self._compile(spec, shapes)
            return compiled.run(inputs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise EngineError(f"OpenVINO failed in {part} on {shapes[0]}: {reason}") from error

    def host(self, state: Any) -> Any:
        """Return a state as a numpy array, in place."""
        return state.data if isinstance(state, ov.Tensor) else state

    def release(self, part: str, compiled: bool) -> None:
        """Give back intermediate buffers and spare states, or all that was compiled."""
        for key in [key for key in self._compiled if key[0] == part]:
            if compiled:
                del self._compiled[key]
            else:
                self._compiled[key].release()
        trim()

    def close(self) -> None:
        """Release the compiled parts."""
        self._compiled.clear()

    def _compile(self, part: Part, shapes: tuple[tuple[int, ...], ...]) -> _Compiled:
        model = self._core.read_model(str(self._bundle / part.file))
        model.reshape({i.name: list(s) for i, s in zip(part.inputs, shapes, strict=True)})
        # OpenVINO takes bfloat16 by itself where the CPU has it: the hint is always given.
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[self.precision],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        compiled = self._core.compile_model(model, self._device, options)
        unmap(self._bundle / "weights.safetensors")
        return _Compiled(compiled, part)


def open(bundle: Path, manifest: Manifest, device: str, precision: str) -> OpenVINOEngine:
    """Open a bundle; raises EngineError when the device cannot compute at this precision."""
    return OpenVINOEngine(bundle, manifest, device, precision)


def precisions() -> list[str]:
    """Precisions in which this machine's CPU computes."""
    able = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [precision for precision, name in CAPABILITY.items() if name in able]
