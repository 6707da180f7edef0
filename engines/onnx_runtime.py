"""ONNX Runtime, the portable engine. Between runs, states stay OrtValues: no copies to numpy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# On import, ONNX Runtime sends usage data to Microsoft and writes an identifier into the home
# folder. Hospitals want neither. Setting the variable to 0 allows it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from fvae_deploy.engines.base import check_inputs
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Bundle

# Execution providers of each device, in order: CUDA computes what TensorRT does not support.
# TF32 is off: it is less precise than fp32.
CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})
PROVIDERS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "cpu": [("CPUExecutionProvider", {})],
    "cuda": [CUDA],
    "tensorrt": [("TensorrtExecutionProvider", {}), CUDA],
}
REMEDY = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'"


class OnnxRuntimeEngine:
    """See `fvae_deploy.engines.base.Engine`."""

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Path,
        manifest: Bundle,
        device: str,
        precision: str,
        threads: int | None = None,
    ) -> None:
        if precision != manifest.precision:
            raise EngineError(
                f"expected {manifest.precision}, the precision of this bundle, found {precision}: "
                "onnxruntime cannot convert it, use openvino or torch"
            )
        if device not in PROVIDERS:
            raise EngineError(
                f"expected one of {', '.join(PROVIDERS)}, found device {device!r}: use one of them"
            )
        for name, _ in PROVIDERS[device]:
            if name not in ort.get_available_providers():
                raise EngineError(
                    f"expected ONNX Runtime with {name}, found "
                    f"{', '.join(ort.get_available_providers())}: {REMEDY}"
                )
        # The system's loader does not search the folders where pip installs CUDA's libraries.
        if device != "cpu" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        self.precision, self._threads = precision, threads
        self._bundle, self._manifest, self._device = bundle, manifest, device
        self._memory = "cpu" if device == "cpu" else "cuda"  # where tensors are stored
        self._sessions: dict[str, ort.InferenceSession] = {}

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute one part."""
        spec = self._manifest.part(part)
        check_inputs(spec, inputs)
        try:
            session = self._session(part)
            binding = session.io_binding()
            for tensor in spec.inputs:
                value = self._value(inputs[tensor.name], tensor.type)
                binding.bind_ortvalue_input(tensor.name, value)
            for i, tensor in enumerate(spec.outputs):
                binding.bind_output(tensor.name, self._memory if i else "cpu")
            session.run_with_iobinding(binding, self._run_options(spec.heavy))
            values = binding.get_outputs()
        except EngineError:
            raise
        except Exception as error:  # the binding raises many classes without a common base
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise EngineError(f"ONNX Runtime failed in {part}: {reason}") from error
        outputs: dict[str, Any] = {
            tensor.name: value for tensor, value in zip(spec.outputs, values, strict=True)
        }
        data = spec.outputs[0].name
        outputs[data] = outputs[data].numpy()
        return outputs

    def host(self, state: Any) -> Any:
        """Return a state as a numpy array."""
        return state.numpy() if isinstance(state, ort.OrtValue) else state

    def release(self, part: str, compiled: bool) -> None:
        """Drop a part's session if `compiled`; heavy parts free working memory after every run."""
        if compiled:
            self._sessions.pop(part, None)

    def close(self) -> None:
        """Drop all sessions."""
        self._sessions.clear()

    def _value(self, value: Any, kind: str) -> ort.OrtValue:
        if isinstance(value, ort.OrtValue):
            return value
        array = np.ascontiguousarray(value, dtype=kind)
        return ort.OrtValue.ortvalue_from_numpy(array, self._memory)

    def _run_options(self, heavy: bool) -> ort.RunOptions:
        """Return options with which a heavy part frees its working memory after the run."""
        options = ort.RunOptions()
        if heavy and self._device == "cpu":
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return options

    def _session(self, part: str) -> ort.InferenceSession:
        if part not in self._sessions:
            options = ort.SessionOptions()
            if self._device != "cpu":
                options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            options.log_severity_level = 3
            options.intra_op_num_threads = self._threads or 0  # 0 means all cores
            # With memory patterns, a heavy part takes 1.1 GiB instead of 0.7 GiB.
            options.enable_mem_pattern = not self._manifest.part(part).heavy
            session = ort.InferenceSession(
                str(self._bundle / self._manifest.part(part).file),
                options,
                providers=PROVIDERS[self._device],
            )
            # ONNX Runtime only warns when it drops a provider whose libraries do not load.
            for name, _ in PROVIDERS[self._device]:
                if name not in session.get_providers():
                    raise EngineError(
                        f"expected {name} to run {part}, found that its libraries do not load: "
                        f"{REMEDY}"
                    )
            session.disable_fallback()
            if self._device != "cpu":
                check_placement(session, part)
            self._sessions[part] = session
        return self._sessions[part]


def check_placement(session: ort.InferenceSession, part: str) -> None:
    """Raise EngineError if ONNX Runtime placed convolutions or matrix products on the CPU.

    Computing tensor sizes on the CPU is intended. The option session.disable_cpu_ep_fallback
    would refuse that as well.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # older versions lack it
        return
    on_cpu = {
        node.op_type
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name == "CPUExecutionProvider"
        for node in subgraph.get_nodes()
        if any(heavy in node.op_type for heavy in ("Conv", "MatMul", "Gemm"))
    }
    if on_cpu:
        raise EngineError(
            f"expected the GPU to compute all of {part}, found that ONNX Runtime leaves "
            f"{', '.join(sorted(on_cpu))} to the CPU: use --engine torch, or --device cpu"
        )


def open(
    bundle: Path, manifest: Bundle, device: str, precision: str, threads: int | None
) -> OnnxRuntimeEngine:
    """Open a bundle; raises EngineError if the device or precision is not available."""
    return OnnxRuntimeEngine(bundle, manifest, device, precision, threads)


def precisions(device: str = "cpu") -> list[str]:
    """Return fp32, the precision of all bundles: the runtime does not convert it."""
    available = ort.get_available_providers()
    providers = PROVIDERS.get(device, [])
    return ["fp32"] if providers and all(name in available for name, _ in providers) else []
