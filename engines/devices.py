"""Why an engine cannot use a GPU on this machine, and what to install."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator

from fvae_deploy.engines.base import load, missing, obstacle

NVIDIA = "an NVIDIA GPU with its driver (nvidia-smi lists both)"
DRIVER = f"{NVIDIA}: install the driver from nvidia.com"
MAJOR, MINOR = 75, 76  # the driver's attribute numbers for the compute capability
CUDA_ONNX_RUNTIME = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
CUDA_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cu130"


def problems(name: str) -> list[str]:
    """Return everything that an engine lacks on this machine to run on a GPU."""
    first = obstacle(name)
    if name == "onnxruntime" and missing(name):
        first = f"needs the package onnxruntime-gpu: {CUDA_ONNX_RUNTIME}"
    lacking = [] if first is None else [first]
    if name != "openvino" and target() is None:
        lacking.append(f"needs {DRIVER}")
    if first is None:
        lacking += CHECKS[name]()
    return lacking


def unfit(name: str) -> str | None:
    """Return in one line everything that an engine lacks to run on a GPU; None if nothing."""
    return "; ".join(problems(name)) or None


def remarks(name: str) -> list[str]:
    """Return what would make an engine faster on a GPU, though it runs without it."""
    if name == "torch" and importlib.util.find_spec("triton") is None:
        return [
            "runs on torch's own operations; the faster kernels need the package triton: "
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
    if "GPU" not in load("openvino").CORE.available_devices:
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
    """Return the architecture of the first NVIDIA GPU, as sm_90; None without GPU or driver."""
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
