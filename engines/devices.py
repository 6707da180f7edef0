"""What keeps each engine from a GPU on this machine, with what to install."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator

from fvae_deploy.engines.base import load, obstacle

DRIVER = (
    "an NVIDIA GPU with its driver (nvidia-smi shows them): install the driver of NVIDIA's site"
)
MAJOR, MINOR = 75, 76  # of the compute capability, among the driver's attributes
CUDA_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cu130"


def problems(name: str) -> list[str]:
    """Name all that an engine lacks on this machine to run on a GPU; empty when nothing is."""
    first = obstacle(name)
    found = [] if first is None else [first]
    if name != "openvino" and target() is None:
        found.append(f"needs {DRIVER}")
    if first is None:
        found += CHECKS[name]()
    return found


def unfit(name: str) -> str | None:
    """Say all that keeps an engine from a GPU in one line; None when nothing does."""
    return "; ".join(problems(name)) or None


def remarks(name: str) -> list[str]:
    """Name what an engine runs without on a GPU, though it would be faster with it."""
    if name == "torch" and importlib.util.find_spec("triton") is None:
        return [
            "runs on torch's operations; for kernels needs the package triton: "
            "pip install 'fvae-deploy[kernels]'"
        ]
    return []


def _tensorrt() -> Iterator[str]:
    if importlib.util.find_spec("cuda") is None:
        yield "needs the package cuda-bindings: pip install 'fvae-deploy[tensorrt]'"


def _onnxruntime() -> Iterator[str]:
    engine = load("onnxruntime")
    if "CUDAExecutionProvider" not in engine.ort.get_available_providers():
        yield f"needs ONNX Runtime with CUDA: {engine.REMEDY}"


def _openvino() -> Iterator[str]:
    if "GPU" not in load("openvino").ov.Core().available_devices:
        yield "needs an Intel GPU with its OpenCL runtime: apt install intel-opencl-icd"


def _torch() -> Iterator[str]:
    import torch

    if torch.version.cuda is None:
        yield f"needs a CUDA build of torch, found {torch.__version__}: {CUDA_TORCH}"


CHECKS: dict[str, Callable[[], Iterator[str]]] = {
    "tensorrt": _tensorrt,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch": _torch,
}


def target() -> str | None:
    """Architecture of the first GPU of NVIDIA's driver, as sm_90; None without either."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = (ctypes.c_int() for _ in range(3))
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    )
    return None if failed else f"sm_{major.value}{minor.value}"
