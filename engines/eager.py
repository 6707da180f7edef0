"""Eager torch, the reference engine. Rebuilds the exported network from the bundle's weights.

On a GPU with Triton installed, LeanVAE and Wan run on hand-written kernels. The environment
variable FVAE_KERNELS selects them: `auto`, `reference` or `triton` (see `kernels.dispatch`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from fvae_deploy.engines.base import check_inputs
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Bundle, Part, origin_of
from fvae_deploy.export.cut.cutter import cut_part
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.models.family import ON_KERNELS, fill, on_kernels, rebuild
from fvae_deploy.kernels.dispatch import Kernels
from fvae_deploy.kernels.optional import FAILURES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EagerEngine:
    """See `fvae_deploy.engines.base.Engine`. State is a torch tensor in the engine's dtype."""

    name = "torch"

    def __init__(
        self,
        bundle: Path,
        manifest: Bundle,
        device: str,
        precision: str,
        threads: int | None = None,
    ) -> None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise EngineError(
                f"expected a CUDA device, found torch {torch.__version__} without one: "
                "use --device cpu, or install a CUDA build of torch"
            )
        self.precision = precision
        if threads is not None:
            torch.set_num_threads(threads)  # of the whole process: torch has no other setting
        try:
            self._device, self._dtype = torch.device(device), DTYPES[precision]
        except RuntimeError:
            raise EngineError(
                f"expected a device that torch supports, found {device!r}: use cpu or cuda"
            ) from None
        backend = os.environ.get("FVAE_KERNELS", "auto")
        self._kernels = Kernels(device, backend, bundle / "tuning")
        # Reported: `triton` for the hand-written kernels, `reference` for torch's operations.
        uses_kernels = self._kernels.triton and manifest.network.family in ON_KERNELS
        self.kernels = "triton" if uses_kernels else "reference"
        _check_code(bundle, manifest)
        self._manifest = manifest
        self._weights = bundle / "weights.safetensors"
        self._empty = rebuild(manifest)
        self._stages: dict[str, torch.nn.Module] = {}
        self._on_gpu = self._device.type == "cuda"

    @torch.inference_mode()
    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute one part."""
        spec = self._manifest.part(part)
        check_inputs(spec, inputs)
        try:
            # Triton launches on the current GPU, even if the tensors are on another one.
            with torch.cuda.device(self._device) if self._on_gpu else nullcontext():
                tensors = [self._tensor(inputs[each.name], each.type) for each in spec.inputs]
                network = self._segment(spec) if spec.maps else self._stage(spec.stage)
                outputs = network(*tensors)
                result = outputs[0].to("cpu", torch.float32).contiguous().numpy()
        except FAILURES as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            # Triton's errors start with the code that it could not compile; the reason is last.
            reason = lines[0 if isinstance(error, RuntimeError) else -1]
            raise EngineError(f"torch failed in {part}: {reason}") from error
        named = dict(zip((tensor.name for tensor in spec.outputs), outputs, strict=True))
        named[spec.outputs[0].name] = result
        return named

    def host(self, state: Any) -> Any:
        """Return a state as a float32 numpy array."""
        return state.to("cpu", torch.float32).numpy() if torch.is_tensor(state) else state

    def release(self, part: str, compiled: bool) -> None:
        """Do nothing: the first and the step part share their weights."""

    def close(self) -> None:
        """Free the network, and return GPU memory to other processes."""
        self._stages.clear()
        if self._on_gpu:
            torch.cuda.empty_cache()

    def _segment(self, part: Part) -> torch.nn.Module:
        """Return a segment of a stage, which is cut again as at export."""
        if part.name not in self._stages:
            assert isinstance(self._manifest, Manifest)
            program = next(p for p in self._manifest.programs if part in p.parts)
            first = program.stage.endswith("_first")
            whole = self._manifest.stage_part(program.of, first)
            cut = cut_part(self._filled(program.of), whole, program.stage)
            if cut.program != program:
                raise EngineError(
                    f"expected stage {program.of} to be cut as at export, found other segments "
                    f"with torch {torch.__version__}: export the bundle again, or use another "
                    "engine"
                )
            for key, module in cut.modules.items():
                self._stages[key] = module.to(self._device, self._dtype)
        return self._stages[part.name]

    def _filled(self, name: str) -> torch.nn.Module:
        """Return a stage with its weights."""
        stage, prefix = self._empty[name], f"{name}."
        with safe_open(self._weights, "pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            weights = {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
        fill(stage, weights, self._manifest)
        return stage

    def _stage(self, name: str) -> torch.nn.Module:
        """Return a stage; load its weights on first use, since a decoder needs no encoder."""
        if name not in self._stages:
            stage = self._filled(name)
            stage.to(self._device, self._dtype)
            for weight in stage.parameters():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            self._stages[name] = on_kernels(stage, self._manifest, self._kernels)
        return self._stages[name]

    def _tensor(self, value: Any, kind: str) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            value = torch.from_numpy(np.require(value, requirements="W"))
        tensor: torch.Tensor = value.to(
            self._device, self._dtype if kind == "float32" else torch.int64
        )
        return tensor


def _check_code(bundle: Path, manifest: Bundle) -> None:
    """Raise EngineError for a pulled bundle whose network torch would build with other code."""
    origin = origin_of(bundle)
    if manifest.network.family == "any_torch" and origin is not None:
        raise EngineError(
            f"expected a network that fvae can build, found {manifest.name} from {origin}, for "
            "which torch would run code that the bundle only names: use --engine openvino or "
            "onnxruntime"
        )


def open(
    bundle: Path, manifest: Bundle, device: str, precision: str, threads: int | None
) -> EagerEngine:
    """Open a bundle; raises EngineError if the device is not available."""
    return EagerEngine(bundle, manifest, device, precision, threads)


def precisions(device: str = "cpu") -> list[str]:
    """Return the precisions in which torch computes these networks; empty without the device."""
    if device.startswith("cuda"):
        return list(DTYPES) if torch.cuda.is_available() else []
    return list(DTYPES) if device == "cpu" else []
