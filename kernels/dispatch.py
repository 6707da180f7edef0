"""The choice between the torch references and the Triton kernels.

`auto` uses the kernels if Triton is installed and `chips` knows the GPU's generation, and the
references otherwise. `reference` and `triton` request one of them; a request that cannot run is an
error with the remedy. In Triton's interpreter (TRITON_INTERPRET=1), kernels also run on a CPU,
slowly, for tests. On a GPU, float32 is never computed as TF32, not even by the references.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fvae_deploy.errors import EngineError
from fvae_deploy.kernels import (
    attention,
    causal_conv3d,
    depthwise_conv3d,
    gated_linear,
    norm_silu,
    upsample2x_conv,
)
from fvae_deploy.kernels.blocks import first
from fvae_deploy.kernels.chips import known, like
from fvae_deploy.kernels.optional import INTERPRETED, triton
from fvae_deploy.kernels.tuning import on_gpu

BACKENDS = ("auto", "reference", "triton")
KERNELS: dict[str, ModuleType] = {
    "causal_conv3d": causal_conv3d,
    "upsample2x_conv": upsample2x_conv,
    "depthwise_conv3d": depthwise_conv3d,
    "gated_linear": gated_linear,
    "attention": attention,
    "norm_silu": norm_silu,
}


def named(names: Sequence[str] = ()) -> dict[str, ModuleType]:
    """Return the modules of these kernels, or of all; raises EngineError for unknown names."""
    for name in names:
        if name not in KERNELS:
            raise EngineError(f"expected one of {', '.join(KERNELS)}, found {name!r}")
    return {name: KERNELS[name] for name in names or KERNELS}


class Kernels:
    """The functions of all kernels on one device, with the arguments of their references."""

    def __init__(
        self, device: str = "cpu", backend: str = "auto", tuning: Path | None = None
    ) -> None:
        """Choose the backend; raises EngineError if it cannot run on this device.

        `tuning` is the folder that stores which blocks were fastest on a GPU. Without it, launches
        use their default blocks.
        """
        if backend not in BACKENDS:
            raise EngineError(
                f"expected kernels {', '.join(BACKENDS)}, found {backend!r}: name one of them"
            )
        gpu = device.startswith("cuda")
        if gpu:
            compute_in_float32()
        if backend == "triton":
            if triton is None:
                raise EngineError(
                    "expected triton for kernels, found none: pip install 'fvae-deploy[kernels]'"
                )
            if not gpu and not INTERPRETED:
                raise EngineError(
                    f"expected a GPU for Triton kernels, found device {device}: "
                    "use the reference, or TRITON_INTERPRET=1 to interpret them"
                )
        self.asked = backend == "triton"  # kernels were requested by name
        able = gpu and triton is not None and backend != "reference"
        self.target = _target(device) if able else "sm_80"
        self.triton = self.asked or (able and known(self.target))
        if self.asked:
            like(self.target)  # or raise
        self._launch_options: dict[str, Any] = {
            "target": self.target,
            "choose": on_gpu(tuning, device) if gpu and self.triton and tuning else first,
        }

    def causal_conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **more: Any
    ) -> Any:
        """See `causal_conv3d.reference`."""
        if self.triton:
            return causal_conv3d.launch(x, weight, bias, **self._launch_options, **more)
        return causal_conv3d.reference(x, weight, bias, **more)

    def upsample2x_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **more: Any
    ) -> Any:
        """See `upsample2x_conv.reference`."""
        if self.triton:
            return upsample2x_conv.launch(x, weight, bias, **self._launch_options, **more)
        return upsample2x_conv.reference(x, weight, bias, **more)

    def depthwise_conv3d(self, x: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Any:
        """See `depthwise_conv3d.reference`."""
        if self.triton:
            return depthwise_conv3d.launch(x, weight, bias, **self._launch_options, **more)
        return depthwise_conv3d.reference(x, weight, bias, **more)

    def gated_linear(self, x: Tensor, *weights: Tensor, eps: float) -> Tensor:
        """See `gated_linear.reference`."""
        value, gate, value_bias, gate_bias = weights
        tensors = (x, value, gate, value_bias, gate_bias)
        if self.triton:
            return gated_linear.launch(*tensors, eps=eps, **self._launch_options)
        return gated_linear.reference(*tensors, eps)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `attention.reference`.

        Torch computes heads of widths that the kernel does not take, such as 640 and 1024 of
        Wan2.2. It also computes wide heads in float32, for which it is nine times as fast on an
        H100 (docs/kernels.md), unless kernels were requested by name.
        """
        width = q.shape[-1]
        wide = q.dtype == torch.float32 and width > 128 and not self.asked
        if self.triton and attention.fits(width) and not wide:
            return attention.launch(q, k, v, **self._launch_options)
        return attention.eager(q, k, v) if self.triton else attention.reference(q, k, v)

    def rms(self, x: Tensor) -> Tensor:
        """See `norm_silu.rms_reference`."""
        if self.triton:
            return norm_silu.rms(x, choose=self._launch_options["choose"])
        return norm_silu.rms_reference(x)


def compute_in_float32() -> None:
    """Keep torch from computing float32 as TF32 on a GPU, its default for convolutions.

    TF32 has a mantissa of ten bits, like float16. The setting applies to the whole process. It
    uses the older of torch's two interfaces, because torch.export fails after the newer one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the interface is deprecated
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _target(device: str) -> str:
    """Return the chip of a CUDA or ROCm device under its name in `chips`."""
    properties = torch.cuda.get_device_properties(torch.device(device))
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else ""
    return name or f"sm_{properties.major}{properties.minor}"
