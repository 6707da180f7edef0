"""OpenVINO, the fastest engine on CPUs. Compiles each graph for the input shapes it receives.

States stay in OpenVINO's own buffers. The tensors of a consumed state become the outputs of the
next run, so a stream allocates nothing after its first two steps. At half precision, states are
stored in half precision as well: this halves their memory and avoids conversions in every step.

At int8, the convolutions that a bundle has ranges for are computed in int8 (see `int8.py`), all
else in bfloat16 where the processor has it, otherwise in float32.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
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
from fvae_deploy.engines.compiled import SMALL, CompiledGraphs, processor  # noqa: E402
from fvae_deploy.engines.frames import frame_name, split_states  # noqa: E402
from fvae_deploy.engines.int8 import apply_int8, supported  # noqa: E402
from fvae_deploy.engines.large_maps import apply_large_transposes, check_sizes  # noqa: E402
from fvae_deploy.engines.layout import apply_channels_last  # noqa: E402
from fvae_deploy.engines.norms import apply_exact_norms  # noqa: E402
from fvae_deploy.engines.openvino_core import CORE  # noqa: E402
from fvae_deploy.engines.pages import trim, unmap  # noqa: E402
from fvae_deploy.engines.shuffle import apply_final_shuffle  # noqa: E402
from fvae_deploy.engines.winograd import apply_winograd  # noqa: E402
from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.export.bundle import Bundle, Part, sha256  # noqa: E402
from fvae_deploy.export.int8 import FILE as RANGES  # noqa: E402
from fvae_deploy.export.int8 import Layer, read  # noqa: E402
from fvae_deploy.version import __version__  # noqa: E402

logger = logging.getLogger("fvae")
TYPES = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16, "fp16": ov.Type.f16}
ARRAYS = {ov.Type.f32: np.float32, ov.Type.bf16: ml_dtypes.bfloat16, ov.Type.f16: np.float16}
# What rewrites graphs before they are compiled.
CODE = (
    "open_vino.py",
    "frames.py",
    "int8.py",
    "large_maps.py",
    "layout.py",
    "norms.py",
    "shuffle.py",
    "winograd.py",
)
CAPABILITY = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}


class _State(list[ov.Tensor]):
    """A state: its frames, oldest first, if the graph takes them one by one; else one tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the state as a part declares it."""
        frames, *rest = self[0].shape
        return (frames * len(self), *rest)


class _Results:
    """Memory for the results of a segment."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.arrays = [np.empty(shape, np.float32) for shape in shapes]
        self.tensors = [ov.Tensor(array, shared_memory=True) for array in self.arrays]
        self._references = self._counted()

    @property
    def is_free(self) -> bool:
        """Whether nobody refers to the arrays, or to views of them, any more."""
        return self._counted() == self._references

    def _counted(self) -> list[int]:
        return [sys.getrefcount(array) for array in self.arrays]


class _Compiled:
    """One part, compiled for one set of input shapes.

    `depths` has the number of frames of each state that is cut into frames, by its index.
    """

    def __init__(
        self,
        compiled: ov.CompiledModel,
        part: Part,
        element: ov.Type,
        depths: Mapping[int, int],
        content: ov.Tensor | None = None,
    ) -> None:
        self._content = content  # of the file that `compiled` was read from: its weights lie there
        self.part, self.depths = part, depths
        self.element = element  # type of the states' elements
        self.compiled = compiled
        self.request: ov.InferRequest | None = None
        self.spare: list[list[ov.Tensor]] = []  # consumed frames or states, reused as outputs
        self._results: list[_Results] = []  # of a segment; reused when nobody refers to them

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        request = self.request = self.request or self.compiled.create_infer_request()
        for spec in self.part.inputs[: len(self.part.inputs) - len(self.part.state_inputs)]:
            request.set_tensor(spec.name, _data(inputs[spec.name], spec.type))
        if self.part.maps:
            return self._mapped(request)
        past = [
            self._given(inputs[spec.name], index)
            for index, spec in enumerate(self.part.state_inputs)
        ]
        for index, spec in enumerate(self.part.state_inputs):
            names = [frame_name(spec.name, frame) for frame in range(self.depths.get(index, 0))]
            for name, tensor in zip(names or [spec.name], past[index], strict=True):
                request.set_tensor(name, tensor)
        new = self.spare.pop() if self.spare else self._new_outputs()
        for spec, tensor in zip(self.part.state_outputs, new, strict=True):
            request.set_tensor(spec.name, tensor)
        request.infer()
        if self.part.state_outputs and self.part.state_inputs:
            self.spare.append([state.pop(0) for state in past])
        else:
            past = [self._zeros(index) for index in range(len(new))]
        data = self.part.outputs[: len(self.part.outputs) - len(self.part.state_outputs)]
        named = {
            spec.name: _State([*state, tensor])
            for spec, state, tensor in zip(self.part.state_outputs, past, new, strict=True)
        }
        return {**{o.name: request.get_tensor(o.name).data for o in data}, **named}

    def _mapped(self, request: ov.InferRequest) -> dict[str, Any]:
        """Compute a segment, whose results are the caller's."""
        results = next((each for each in self._results if each.is_free), None)
        if results is None:
            outputs = (self.compiled.output(spec.name) for spec in self.part.outputs)
            results = _Results([tuple(output.shape) for output in outputs])
            self._results.append(results)
        for spec, tensor in zip(self.part.outputs, results.tensors, strict=True):
            request.set_tensor(spec.name, tensor)
        request.infer()
        names = (spec.name for spec in self.part.outputs)
        return dict(zip(names, results.arrays, strict=True))

    def release(self) -> None:
        """Free intermediate buffers and spare states, and the request, which refers to both."""
        self.spare.clear()
        self._results.clear()
        self.request = None
        self.compiled.release_memory()

    def _given(self, value: Any, index: int) -> _State:
        """Return a state as this part takes it."""
        depth = self.depths.get(index, 1)
        if isinstance(value, _State) and len(value) == depth:
            return value
        array = _array(value)
        frames = np.split(array, depth) if depth > 1 else [array]
        return _State(_tensor(frame, self.element) for frame in frames)

    def _new_outputs(self) -> list[ov.Tensor]:
        shapes = (self.compiled.output(spec.name).shape for spec in self.part.state_outputs)
        return [ov.Tensor(self.element, shape) for shape in shapes]

    def _zeros(self, index: int) -> _State:
        """Return the frames of zeros before the first one; none if a state is one tensor."""
        shape = list(self.compiled.output(self.part.state_outputs[index].name).shape)
        zeros = (np.zeros(shape, np.float32) for _ in range(1, self.depths.get(index, 1)))
        return _State(_tensor(frame, self.element) for frame in zeros)


def _data(value: Any, kind: str = "float32") -> ov.Tensor:
    return ov.Tensor(np.require(value, kind, ["C", "W"]), shared_memory=True)


def _tensor(value: Any, element: ov.Type) -> ov.Tensor:
    """Return an array as a tensor of the element type, without a copy where possible."""
    array = np.require(value, ARRAYS[element], ["C", "W"])
    if element == ov.Type.bf16:  # OpenVINO does not know numpy's bfloat16: pass its bits
        return ov.Tensor(array.view(np.uint16), list(array.shape), element)
    return ov.Tensor(array, shared_memory=True)


def _array(value: Any) -> Any:
    """Return a state as one array, in its own type; without a copy unless it is several frames."""
    if not isinstance(value, _State):
        return value
    arrays = [tensor.data.view(ARRAYS[tensor.element_type]) for tensor in value]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


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
        self._core = CORE
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
        self._graphs: CompiledGraphs | None = None

    def keep_compiled(self, folder: Path) -> None:
        """Look for compiled graphs in a folder and keep new ones there, if the network is small."""
        weights = self._bundle / "weights.safetensors"
        if self._device == "CPU" and weights.stat().st_size <= SMALL:
            self._graphs = CompiledGraphs(folder)

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
        """Return a state in its own type: a view, or a copy if it is kept frame by frame."""
        return _array(state)

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
        """Take a graph from the cache, or compile it and put it there."""
        element, options = TYPES[self._float], self._options()
        if not part.state_outputs:
            element = ov.Type.f32  # the inputs beside the data are not states: keep fp32
        facts = self._facts(part, shapes, options) if self._graphs else {}
        kept = self._graphs.load(facts) if self._graphs else None
        if kept is not None:
            notes, graph = kept
            depths = {int(index): depth for index, depth in notes["depths"].items()}
            try:
                content = ov.Tensor(np.frombuffer(graph, np.uint8), shared_memory=True)
                compiled = self._core.import_model(content, self._device, options)
                return _Compiled(compiled, part, element, depths, content)
            except RuntimeError as error:
                logger.info("compiled graph of %s not taken: %s", part.name, error)
        compiled, depths = self._compile_anew(part, shapes, element, options)
        if self._graphs:
            notes = {"depths": depths}
            self._graphs.store(facts, notes, lambda: compiled.export_model().getvalue())
        return _Compiled(compiled, part, element, depths)

    def _compile_anew(
        self,
        part: Part,
        shapes: tuple[tuple[int, ...], ...],
        element: ov.Type,
        options: dict[str, Any],
    ) -> tuple[ov.CompiledModel, dict[int, int]]:
        """Compile a part for these shapes; returns also how its states are cut into frames."""
        model = self._core.read_model(str(self._bundle / part.file))
        model.reshape({i.name: list(s) for i, s in zip(part.inputs, shapes, strict=True)})
        check_sizes(model, part.name)
        if part.name in self._layers:
            apply_int8(model, part, self._layers[part.name])
        depths: dict[int, int] = {}
        if self._device == "CPU":
            apply_winograd(model)
            if part.maps:
                apply_channels_last(model)
            if self._float == "fp32" and self._manifest.exact_norms:
                apply_exact_norms(model)
            model, depths = split_states(model, part)
            apply_final_shuffle(model)
            apply_large_transposes(model)
        model = _typed(_states_first(model), part, element, depths)
        compiled = self._core.compile_model(model, self._device, options)
        unmap(self._bundle / "weights.safetensors")
        return compiled, depths

    def _options(self) -> dict[str, Any]:
        # Without the hint of a precision, OpenVINO uses bfloat16 on every CPU that supports it.
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": TYPES[self._float],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if self._threads is not None and self._device == "CPU":
            options["INFERENCE_NUM_THREADS"] = self._threads
        return options

    def _facts(
        self, part: Part, shapes: tuple[tuple[int, ...], ...], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return everything that a compiled graph depends on."""
        return {
            "fvae": [__version__, *(sha256(Path(__file__).with_name(name)) for name in CODE)],
            "openvino": ov.get_version(),
            "device": self._core.get_property(self._device, "FULL_DEVICE_NAME"),
            "able": sorted(self._core.get_property(self._device, "OPTIMIZATION_CAPABILITIES")),
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
            "part": part.name,
            "graph": self._manifest.files[part.file],
            "weights": self._manifest.files["weights.safetensors"],
            "int8": self._manifest.files.get(RANGES, "") if part.name in self._layers else "",
            "exact_norms": self._manifest.exact_norms,
            "shapes": shapes,
            "options": {name: str(value) for name, value in options.items()},
        }


def _states_first(model: ov.Model) -> ov.Model:
    """Move the data output to the end, so that OpenVINO computes each state early.

    Otherwise it keeps the arrays that the states are slices of until the end of the run: 1099
    instead of 811 MiB for a stage of Wan2.1's decoder.
    """
    data, *states = model.get_results()
    return ov.Model([*states, data], model.get_parameters(), model.get_friendly_name())


def _typed(model: ov.Model, part: Part, element: ov.Type, depths: Mapping[int, int]) -> ov.Model:
    """Set the type of a part's state inputs and outputs to the precision it computes in."""
    if element == ov.Type.f32 or not part.state_outputs:
        return model
    typed = PrePostProcessor(model)
    for index, spec in enumerate(part.state_inputs):
        names = [frame_name(spec.name, frame) for frame in range(depths.get(index, 0))]
        for name in names or [spec.name]:
            typed.input(name).tensor().set_element_type(element)
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
    if device.upper() not in CORE.available_devices:
        return []
    able = CORE.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
    floats = [precision for precision, name in CAPABILITY.items() if name in able]
    return [*floats, "int8"] if device.upper() == "CPU" and supported() else floats
