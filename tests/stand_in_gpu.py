"""A stand-in for the CUDA runtime and for TensorRT, in host memory and ONNX Runtime.

With it the engine's own logic (addresses, states that change places, graphs, what is copied when)
runs on any machine. An "engine" is an ONNX graph. What the names are called in the real packages
is held by tests against these.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from fvae_deploy.export.built import ANY, BuiltEngine, Profile, describe, fingerprint, folder_of
from fvae_deploy.export.bundle import Bundle, Part
from fvae_deploy.export.precision import halve

VERSION = "0.stand.in"
OK = SimpleNamespace(name="cudaSuccess")


class Runtime:
    """What engines.cuda calls of cuda.bindings.runtime; work happens when it is begun."""

    cudaError_t = SimpleNamespace(cudaSuccess=OK)  # noqa: N815
    cudaStreamNonBlocking, cudaEventDisableTiming = 1, 2  # noqa: N815
    cudaDeviceAttr = Enum(  # noqa: N815
        "cudaDeviceAttr",
        ["cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"],
    )
    cudaMemcpyKind = Enum(  # noqa: N815
        "cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"]
    )
    cudaStreamCaptureMode = Enum(  # noqa: N815
        "cudaStreamCaptureMode", ["cudaStreamCaptureModeThreadLocal"]
    )

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.calls: dict[str, int] = {}
        self.captured: list[Callable[[], None]] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Do work, or keep it where a graph is being captured."""
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def cudaGetDeviceCount(self) -> Any:  # noqa: N802
        return OK, 1

    def cudaDeviceGetAttribute(self, attribute: Any, ordinal: int) -> Any:  # noqa: N802
        return OK, 8 if attribute.name.endswith("Major") else 9

    def cudaMalloc(self, size: int) -> Any:  # noqa: N802
        self.calls["cudaMalloc"] = self.calls.get("cudaMalloc", 0) + 1
        block = (ctypes.c_uint8 * max(size, 1))()
        self.memory[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cudaMallocHost(self, size: int) -> Any:  # noqa: N802
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> Any:  # noqa: N802
        del self.memory[address]
        return (OK,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: int) -> Any:  # noqa: N802
        assert self.captured is None
        ctypes.memmove(to, source, size)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:  # noqa: N802
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        graph, self.captured = self.captured, None
        return OK, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:  # noqa: N802
        return OK, graph

    def cudaGraphLaunch(self, graph: Any, stream: int) -> Any:  # noqa: N802
        self.calls["cudaGraphLaunch"] = self.calls.get("cudaGraphLaunch", 0) + 1
        for work in graph:
            work()
        return (OK,)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        return lambda *arguments: (OK, 7)


class Context:
    """An execution context: an ONNX Runtime session on addresses."""

    def __init__(self, cuda: Runtime, session: Any) -> None:
        self.cuda, self.session = cuda, session
        self.shapes = {i.name: tuple(i.shape) for i in session.get_inputs()}
        self.addresses: dict[str, int] = {}
        self.settled = False

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        self.settled = False
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address in self.cuda.memory
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.settled or self.cuda.captured is None, "captured right after new shapes"
        self.settled = True
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        kinds = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(int64)": "i8"}

        def work() -> None:
            given = {}
            for i in self.session.get_inputs():
                block = self.cuda.memory[addresses[i.name]]
                array = np.frombuffer(block, kinds[i.type], int(np.prod(shapes[i.name])))
                given[i.name] = array.reshape(shapes[i.name]).copy()
            for o, result in zip(
                self.session.get_outputs(), self.session.run(None, given), strict=True
            ):
                block = self.cuda.memory[addresses[o.name]]
                assert len(block) == max(result.nbytes, 1)
                np.frombuffer(block, np.uint8)[:] = (
                    np.ascontiguousarray(result).reshape(-1).view(np.uint8)
                )

        self.cuda.begin(work)
        return True


def install(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """Put the stand-ins where the engine imports the packages from."""
    cuda = Runtime()

    class Loader:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, content: bytes) -> Any:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
            return SimpleNamespace(create_execution_context=lambda: Context(cuda, session))

    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    trt = SimpleNamespace(
        __version__=VERSION,
        __spec__=ModuleSpec("tensorrt_rtx", None),
        Logger=logger,
        Runtime=Loader,
    )
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", trt)
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", SimpleNamespace(runtime=cuda))
    return cuda


def write_engines(
    bundle: Path, manifest: Bundle, precision: str = "fp32", cells: tuple[int, int] | None = None
) -> None:
    """Write graphs with their weights as engines for sm_89 beside a bundle, for any size or one."""
    folder = folder_of(bundle, "sm_89", precision)
    folder.mkdir(parents=True)
    for part in manifest.parts:
        graph = (
            onnx.load(bundle / part.file)
            if precision == "fp32"
            else halve(bundle / part.file, part, precision)
        )
        path = folder / f"{part.name}.{ANY if cells is None else 'one'}.engine"
        path.write_bytes(graph.SerializeToString())
        built_of(path, part, manifest, precision, cells).save(folder)


def built_of(
    path: Path, part: Part, manifest: Bundle, precision: str, cells: tuple[int, int] | None
) -> BuiltEngine:
    least, most = {"k": 1, "h": 1, "w": 1}, {"k": 9, "h": 99, "w": 99}
    if cells is not None:
        least = most = {"k": 1, "h": cells[0], "w": cells[1]}
    profile: Profile = {
        spec.name: (spec.sized(**least), spec.sized(**most), spec.sized(**most))
        for spec in part.inputs
    }
    return describe(
        path,
        part=part.name,
        variant=ANY if cells is None else "one",
        target="sm_89",
        precision=precision,
        package="tensorrt_rtx",
        version=VERSION,
        bundle=fingerprint(manifest),
        state={"fp32": "float32", "fp16": "float16"}[precision],
        profile=profile,
    )


def change(path: Path, **fields: Any) -> None:
    """Change what an engine says of itself."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
