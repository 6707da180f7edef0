"""OpenVINO, the fastest engine on CPUs. Compiles each graph for the input shapes it receives.

States stay in OpenVINO's own buffers. The tensors of a consumed state become the outputs of the
next run, so a stream allocates nothing after its first two steps. At half precision, states are
stored in half precision as well: this halves their memory and avoids conversions in every step.

At int8, the convolutions that a bundle has ranges for are computed in int8 (see `int8.py`), all
else in bfloat16 where the processor has it, otherwise in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# On import, OpenVINO sends usage data to Intel and writes an identifier into the home folder,
# unless its telemetry package cannot be imported. Hospitals want neither.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402
from openvino.preprocess import PrePostProcessor  # noqa: E402

from fvae_deploy.engines.base import check_inputs  # noqa: E402
from fvae_deploy.engines.int8 import apply_int8, supported  # noqa: E402
from fvae_deploy.engines.pages import trim, unmap  # noqa: E402
from fvae_deploy.engines.winograd import apply_winograd  # noqa: E402
from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.export.bundle import Bundle, Part  # noqa: E402
from fvae_deploy.export.int8 import Layer, read  # noqa: E402

TYPES = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16, "fp16": ov.Type.f16}
ARRAYS = {ov.Type.f32: np.float32, ov.Type.bf16: ml_dtypes.bfloat16, ov.Type.f16: np.float16}
CAPABILITY = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


class _Compiled:
    """One part, compiled for one set of input shapes."""

    def __init__(self, compiled: ov.CompiledModel, part: Part, element: ov.Type) -> None:
        self.part = part
        self.element = element  # type of the states' elements
        self.compiled = compiled
        self.request: ov.InferRequest | None = None
        self.spare: list[list[ov.Tensor]] = []  # consumed states, reused as outputs

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        states = self.part.state_inputs
        tensors = [
            _state(inputs[spec.name], self.element)
            if spec in states
            else _data(inputs[spec.name], spec.type)
            for spec in self.part.inputs
        ]
        request = self.request = self.request or self.compiled.create_infer_request()
        for spec, tensor in zip(self.part.inputs, tensors, strict=True):
            request.set_tensor(spec.name, tensor)
        state = self.spare.pop() if self.spare else self._new_state()
        for spec, tensor in zip(self.part.state_outputs, state, strict=True):
            request.set_tensor(spec.name, tensor)
        request.infer()
        if self.part.state_outputs and self.part.state_inputs:
            self.spare.append(tensors[-len(states) :])
        data = self.part.outputs[: len(self.part.outputs) - len(self.part.state_outputs)]
        named = zip((spec.name for spec in self.part.state_outputs), state, strict=True)
        return {**{o.name: request.get_tensor(o.name).data for o in data}, **dict(named)}

    def release(self) -> None:
        """Free intermediate buffers and spare states, and the request, which refers to both."""
        self.spare.clear()
        self.request = None
        self.compiled.release_memory()

    def _new_state(self) -> list[ov.Tensor]:
        shapes = (self.compiled.output(spec.name).shape for spec in self.part.state_outputs)
        return [ov.Tensor(self.element, shape) for shape in shapes]


def _data(value: Any, kind: str = "float32") -> ov.Tensor:
    return ov.Tensor(np.require(value, kind, ["C", "W"]), shared_memory=True)


def _state(value: Any, element: ov.Type) -> ov.Tensor:
    """Return a state unchanged, or convert an array to a tensor of the element type."""
    if isinstance(value, ov.Tensor):
        return value
    array = np.require(value, ARRAYS[element], ["C", "W"])
    if element == ov.Type.bf16:  # OpenVINO does not know numpy's bfloat16: pass its bits
        return ov.Tensor(array.view(np.uint16), list(array.shape), element)
    return ov.Tensor(array, shared_memory=True)


class OpenVINOEngine:
    """See `fvae_deploy.engines.base.Engine`."""

    name = "openvino"

    def __init__(
        self,
        bundle: Path,
        manifest: Bundle,
        device: str,
        precision: str,
        threads: int | None = None,
    ) -> None:
        self.precision, self._threads = precision, threads
        self._bundle, self._manifest, self._device = bundle, manifest, device.upper()
        self._core = ov.Core()
        if self._device not in self._core.available_devices:
            raise EngineError(
                f"expected an OpenVINO device among {', '.join(self._core.available_devices)}, "
                f"found {device!r}: choose one of them"
            )
        able = precisions(device)
        if precision not in able:
            remedy = "fp32" if precision != "int8" or "bf16" not in able else "bf16"
            raise EngineError(
                f"expected a {device} that computes in {precision}, found one with "
                f"{', '.join(able)}: use --precision {remedy}"
            )
        self._layers: dict[str, dict[str, Layer]] = {}
        self._float = precision  # of the layers that are not in int8
        if precision == "int8":
            self._layers = read(bundle, manifest)
            self._float = "bf16" if "bf16" in able else "fp32"
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute one part; the first call with new input shapes compiles it."""
        spec = self._manifest.part(part)
        check_inputs(spec, inputs)
        shapes = tuple(tuple(inputs[i.name].shape) for i in spec.inputs)
        compiled = self._compiled.get((part, *shapes))
        try:
            if compiled is None:
                compiled = self._compiled[(part, *shapes)] = self._compile(spec, shapes)
            return compiled.run(inputs)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise EngineError(f"OpenVINO failed in {part} on {shapes[0]}: {reason}") from error

    def host(self, state: Any) -> Any:
        """Return a view of a state, in the state's own type."""
        if not isinstance(state, ov.Tensor):
            return state
        return state.data.view(ARRAYS[state.element_type])

    def release(self, part: str, compiled: bool) -> None:
        """Free intermediate buffers and spare states; if `compiled`, the compiled part as well."""
        for key in [key for key in self._compiled if key[0] == part]:
            if compiled:
                del self._compiled[key]
            else:
                self._compiled[key].release()
        trim()

    def close(self) -> None:
        """Free all compiled parts."""
        self._compiled.clear()

    def _compile(self, part: Part, shapes: tuple[tuple[int, ...], ...]) -> _Compiled:
        model = self._core.read_model(str(self._bundle / part.file))
        model.reshape({i.name: list(s) for i, s in zip(part.inputs, shapes, strict=True)})
        if part.name in self._layers:
            apply_int8(model, part, self._layers[part.name])
        if self._device == "CPU":
            apply_winograd(model)
        # Without this hint, OpenVINO uses bfloat16 on every CPU that supports it.
        element = TYPES[self._float]
        options = {
            "INFERENCE_PRECISION_HINT": element,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if self._threads is not None and self._device == "CPU":
            options["INFERENCE_NUM_THREADS"] = self._threads
        if not part.state_outputs:
            element = ov.Type.f32  # the inputs beside the data are not states: keep fp32
        model = _typed(_states_first(model), part, element)
        compiled = self._core.compile_model(model, self._device, options)
        unmap(self._bundle / "weights.safetensors")
        return _Compiled(compiled, part, element)


def _states_first(model: ov.Model) -> ov.Model:
    """Move the data output to the end, so that OpenVINO computes each state early.

    Otherwise it keeps the arrays that the states are slices of until the end of the run: 1099
    instead of 811 MiB for a stage of Wan2.1's decoder.
    """
    data, *states = model.get_results()
    return ov.Model([*states, data], model.get_parameters(), model.get_friendly_name())


def _typed(model: ov.Model, part: Part, element: ov.Type) -> ov.Model:
    """Set the type of a part's state inputs and outputs to the precision it computes in."""
    if element == ov.Type.f32 or not part.state_outputs:
        return model
    typed = PrePostProcessor(model)
    for spec in part.state_inputs:
        typed.input(spec.name).tensor().set_element_type(element)
    for spec in part.state_outputs:
        typed.output(spec.name).tensor().set_element_type(element)
    return typed.build()


def open(
    bundle: Path, manifest: Bundle, device: str, precision: str, threads: int | None
) -> OpenVINOEngine:
    """Open a bundle; raises EngineError if the device cannot compute at this precision."""
    return OpenVINOEngine(bundle, manifest, device, precision, threads)


def precisions(device: str = "cpu") -> list[str]:
    """Return the precisions in which a device of this machine computes; empty without it.

    int8 only computes bundles that were calibrated for it.
    """
    core = ov.Core()
    if device.upper() not in core.available_devices:
        return []
    able = core.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
    floats = [precision for precision, name in CAPABILITY.items() if name in able]
    return [*floats, "int8"] if device.upper() == "CPU" and supported() else floats
