"""Which formulation computes: the torch reference, or the Triton kernel.

One visible choice. `auto` takes the kernels where Triton is installed on a GPU of a generation that
`chips` knows, and the references everywhere else; `reference` and `triton` are asked for by name,
and what cannot run is refused with the remedy. Under Triton's interpreter (TRITON_INTERPRET=1)
kernels also run on a CPU, for tests, slowly. On a GPU float32 is float32, also in the references.
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
    """Return the modules of these kernels, or of all; raises EngineError for other names."""
    for name in names:
        if name not in KERNELS:
            raise EngineError(f"expected one of {', '.join(KERNELS)}, found {name!r}")
    return {name: KERNELS[name] for name in names or KERNELS}


class Kernels:
    """The kernels' functions for one device; every one takes what its reference takes."""

    def __init__(
        self, device: str = "cpu", backend: str = "auto", tuning: Path | None = None
    ) -> None:
        """Choose; raises EngineError for a backend that cannot run on this device.

        `tuning` is the folder that keeps which blocks were fastest on a GPU; without it launches
        take their defaults.
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
        self.asked = backend == "triton"
        able = gpu and triton is not None and backend != "reference"
        self.target = _target(device) if able else "sm_80"
        self.triton = self.asked or (able and known(self.target))
        if self.asked:
            like(self.target)  # or raise
        self._how: dict[str, Any] = {
            "target": self.target,
            "choose": on_gpu(tuning, device) if gpu and self.triton and tuning else first,
        }

    def causal_conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **more: Any
    ) -> Any:
        """See `causal_conv3d.reference`."""
        if self.triton:
            return causal_conv3d.launch(x, weight, bias, **self._how, **more)
        return causal_conv3d.reference(x, weight, bias, **more)

    def upsample2x_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **more: Any
    ) -> Any:
        """See `upsample2x_conv.reference`."""
        if self.triton:
            return upsample2x_conv.launch(x, weight, bias, **self._how, **more)
        return upsample2x_conv.reference(x, weight, bias, **more)

    def depthwise_conv3d(self, x: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Any:
        """See `depthwise_conv3d.reference`."""
        if self.triton:
            return depthwise_conv3d.launch(x, weight, bias, **self._how, **more)
        return depthwise_conv3d.reference(x, weight, bias, **more)

    def gated_linear(self, x: Tensor, *weights: Tensor, eps: float) -> Tensor:
        """See `gated_linear.reference`."""
        value, gate, value_bias, gate_bias = weights
        given = (x, value, gate, value_bias, gate_bias)
        if self.triton:
            return gated_linear.launch(*given, eps=eps, **self._how)
        return gated_linear.reference(*given, eps)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `attention.reference`.

        Heads that do not fit are torch's, as Wan2.2's of 640 and 1024; and wide ones in float32,
        but where kernels are asked for by name: on an H100 it is nine times as fast at them
        (docs/kernels.md).
        """
        width = q.shape[-1]
        wide = q.dtype == torch.float32 and width > 128 and not self.asked
        if self.triton and attention.fits(width) and not wide:
            return attention.launch(q, k, v, **self._how)
        return attention.eager(q, k, v) if self.triton else attention.reference(q, k, v)

    def rms(self, x: Tensor) -> Tensor:
        """See `norm_silu.rms_reference`."""
        if self.triton:
            return norm_silu.rms(x, choose=self._how["choose"])
        return norm_silu.rms_reference(x)


def compute_in_float32() -> None:
    """Keep torch from computing float32 in TF32 on a GPU, as it does in convolutions by itself.

    TF32 has float16's ten bits. It is a setting of the whole process: threads share it. Set by the
    newer names, torch.export would refuse: it reads these.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are newer names
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _target(device: str) -> str:
    """Name the chip of a CUDA or ROCm device as `chips` does."""
    found = torch.cuda.get_device_properties(torch.device(device))
    name = found.gcnArchName.split(":")[0] if torch.version.hip else ""
    return name or f"sm_{found.major}{found.minor}"
