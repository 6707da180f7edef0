"""ONNX Runtime: the portable engine; state travels as OrtValues, never through numpy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# ONNX Runtime reports its use to its maker, and writes an identity into the home folder, from
# the moment it is imported: hospitals want neither. Whoever does may set 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from fvae_deploy.engines.base import check_inputs
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Bundle

# What a device asks for, in order: TensorRT leaves to CUDA what it cannot take. TF32 would be
# called fp32 and is not.
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

    def __init__(self, bundle: Path, manifest: Bundle, device: str, precision: str) -> None:
        if precision != manifest.precision:
            raise EngineError(
                f"expected precision {manifest.precision}, which this bundle holds, found "
                f"{precision}: onnxruntime computes as exported, use openvino or torch"
            )
        if device not in PROVIDERS:
            raise EngineError(f"expected a device, found {device!r}: use {' or '.join(PROVIDERS)}")
        for name, _ in PROVIDERS[device]:
            if name not in ort.get_available_providers():
                raise EngineError(
                    f"expected ONNX Runtime with {name}, found "
                    f"{', '.join(ort.get_available_providers())}: {REMEDY}"
                )
        # CUDA's libraries from pip lie where the loader does not look.
        if device != "cpu" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        self.precision = precision
        self._bundle, self._manifest, self._device = bundle, manifest, device
        self._place = "cpu" if device == "cpu" else "cuda"  # where tensors are
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
                binding.bind_output(tensor.name, self._place if i else "cpu")
            session.run_with_iobinding(binding, self._run_options(spec.heavy))
            values = binding.get_outputs()
        except EngineError:
            raise
        except Exception as error:  # the binding raises many classes, all RuntimeError-like
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
        """Forget a part's session; working memory of heavy parts is never kept."""
        if compiled:
            self._sessions.pop(part, None)

    def close(self) -> None:
        """Release the sessions."""
        self._sessions.clear()

    def _value(self, value: Any, kind: str) -> ort.OrtValue:
        if isinstance(value, ort.OrtValue):
            return value
        array = np.ascontiguousarray(value, dtype=kind)
        return ort.OrtValue.ortvalue_from_numpy(array, self._place)

    def _run_options(self, heavy: bool) -> ort.RunOptions:
        """Let a heavy part give its working memory back after every run."""
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
            # With patterns, heavy parts plan one block anew for every run: 1.1 GiB where 0.7 do.
            options.enable_mem_pattern = not self._manifest.part(part).heavy
            session = ort.InferenceSession(
                str(self._bundle / self._manifest.part(part).file),
                options,
                providers=PROVIDERS[self._device],
            )
            # A provider whose libraries do not load is left out with a warning alone.
            for name, _ in PROVIDERS[self._device]:
                if name not in session.get_providers():
                    raise EngineError(
                        f"expected {name} to run {part}, found that its libraries do not load: "
                        f"{REMEDY}"
                    )
            session.disable_fallback()
            if self._device != "cpu":
                check_place(session, part)
            self._sessions[part] = session
        return self._sessions[part]


def check_place(session: ort.InferenceSession, part: str) -> None:
    """Raise EngineError where the CPU would do a GPU's work: asked for and absent is an error.

    Sizes are computed on the CPU by intention; session.disable_cpu_ep_fallback would refuse them.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # older ones do not tell
        return
    placed = session.get_provider_graph_assignment_info()
    left = {
        node.op_type
        for piece in placed
        if piece.ep_name == "CPUExecutionProvider"
        for node in piece.get_nodes()
        if any(work in node.op_type for work in ("Conv", "MatMul", "Gemm"))
    }
    if left:
        raise EngineError(
            f"expected the GPU to compute all of {part}, found that ONNX Runtime leaves "
            f"{', '.join(sorted(left))} to the CPU: use --engine torch, or --device cpu"
        )


def open(bundle: Path, manifest: Bundle, device: str, precision: str) -> OnnxRuntimeEngine:
    """Open a bundle; raises EngineError when the device or precision is not there."""
    return OnnxRuntimeEngine(bundle, manifest, device, precision)


def precisions() -> list[str]:
    """Precisions that bundles hold: the runtime computes as exported."""
    return ["fp32"]
