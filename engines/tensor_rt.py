"""TensorRT and TensorRT for RTX, with engines that `fvae build` built ahead of time.

    data    numpy --two page-locked buffers--> device --graph--> device --> page-locked numpy
    states  stay on the device: the next run reads them by address, then their memory is reused
            for new states

The second run on the same addresses is recorded as a CUDA graph. A stream over whole planes has
two graphs, since its states alternate between two sets of buffers. After that, a step allocates
nothing.

This engine has not yet run on a GPU. The tests run its logic on a stand-in for the device and the
runtime, and check the names that it uses against the installed packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy the type name bfloat16
import numpy as np
from numpy.typing import NDArray

from fvae_deploy.engines.base import check_inputs, offered
from fvae_deploy.engines.cuda import Gpu
from fvae_deploy.errors import EngineError
from fvae_deploy.export.built import ANY, BuiltEngine, Shape, find, read_engine
from fvae_deploy.export.bundle import Bundle, Part

GRAPHS = 16  # per engine file: two for each tile size; further tiles run without a graph


@dataclass(eq=False)
class DeviceArray:
    """A state on the device. Its memory is freed once consumed, or with its last reference."""

    gpu: Gpu
    address: int
    shape: Shape
    kind: str
    freed: bool = False

    @classmethod
    def new(cls, gpu: Gpu, shape: Shape, kind: str) -> DeviceArray:
        """Allocate an array on the device."""
        return cls(gpu, gpu.take(_bytes(shape, kind)), shape, kind)

    def free(self) -> None:
        """Make the memory available to other arrays."""
        if not self.freed:
            self.freed = True
            self.gpu.give(self.address, _bytes(self.shape, self.kind))

    def __del__(self) -> None:
        self.free()


class _Loaded:
    """A loaded engine file with its execution context, buffers and CUDA graphs."""

    def __init__(self, gpu: Gpu, engine: Any, built: BuiltEngine, part: Part) -> None:
        self._gpu, self._built, self._part = gpu, built, part
        self._engine = engine  # the context needs it to stay alive
        self._context = engine.create_execution_context()
        self._shapes: dict[str, Shape] = {}
        self._buffers: dict[tuple[str, Shape], DeviceArray] = {}
        self._results: dict[Shape, list[NDArray[np.float32]]] = {}
        self._graphs: dict[tuple[Any, ...], Any] = {}
        self._launched = False  # since the shapes last changed

    def run(self, inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Compute on the device; return data as numpy and states as device arrays."""
        part, states = self._part, bool(self._part.state_outputs)
        arguments: dict[str, DeviceArray] = {}
        for spec in part.inputs:
            value = inputs[spec.name]
            if states and spec in part.state_inputs:
                arguments[spec.name] = self._state(value)
            else:
                arguments[spec.name] = self._data(spec.name, value, spec.type)
        data, *rest = part.outputs
        outputs = {data.name: self._buffer(data.name, data.sized(**sizes), "float32")}
        for spec in rest:
            outputs[spec.name] = DeviceArray.new(self._gpu, spec.sized(**sizes), self._built.state)
        self._compute({**arguments, **outputs})
        result = self._result(data.sized(**sizes))
        self._gpu.download(result, outputs[data.name].address)
        self._gpu.wait()
        for spec in part.state_inputs if states else ():
            arguments[spec.name].free()
        return {**outputs, data.name: result}

    def close(self) -> None:
        """Destroy the graphs and free the buffers."""
        for graph in self._graphs.values():
            if graph is not None:
                self._gpu.forget(graph)
        self._graphs.clear()
        self._buffers.clear()

    def _compute(self, bound: Mapping[str, DeviceArray]) -> None:
        """Launch the engine on these arrays, as a CUDA graph from their second run on."""
        key = tuple((array.address, array.shape) for array in bound.values())
        graph = self._graphs.get(key)
        if graph is not None:
            self._gpu.launch(graph)
            return
        for name, array in bound.items():
            if name in self._built.profile and self._shapes.get(name) != array.shape:
                self._check(self._context.set_input_shape(name, array.shape), "set_input_shape")
                self._shapes[name] = array.shape
                self._launched = False
            self._check(self._context.set_tensor_address(name, array.address), "set_tensor_address")
        # Only the second run is recorded: the first does one-time work for these shapes.
        if key in self._graphs and self._launched and self._capturable():
            graph = self._graphs[key] = self._gpu.capture(self._enqueue)
            self._gpu.launch(graph)
            return
        self._enqueue()
        self._launched = True
        if len(self._graphs) < GRAPHS:
            self._graphs[key] = None

    def _enqueue(self) -> None:
        self._check(self._context.execute_async_v3(self._gpu.stream), "execute_async_v3")

    def _capturable(self) -> bool:
        """Return whether the engine runs without allocating memory, as graphs require.

        Only TensorRT for RTX has this check; other engines are assumed to allow graphs.
        """
        capturable = getattr(self._context, "is_stream_capturable", None)
        return capturable is None or bool(capturable(self._gpu.stream))

    def _check(self, succeeded: bool, call: str) -> None:
        if not succeeded:
            raise EngineError(f"TensorRT failed in {self._part.name}: {call} refused its arguments")

    def _state(self, value: Any) -> DeviceArray:
        if isinstance(value, DeviceArray) and value.kind == self._built.state and not value.freed:
            return value
        array = np.ascontiguousarray(_to_host(value), dtype=self._built.state)
        state = DeviceArray.new(self._gpu, array.shape, self._built.state)
        self._gpu.upload(state.address, array)
        return state

    def _data(self, name: str, value: Any, kind: str) -> DeviceArray:
        array = np.ascontiguousarray(_to_host(value), dtype=kind)
        buffer = self._buffer(name, array.shape, kind)
        self._gpu.upload(buffer.address, array)
        return buffer

    def _buffer(self, name: str, shape: Shape, kind: str) -> DeviceArray:
        if (name, shape) not in self._buffers:
            self._buffers[name, shape] = DeviceArray.new(self._gpu, shape, kind)
        return self._buffers[name, shape]

    def _result(self, shape: Shape) -> NDArray[np.float32]:
        """Return a page-locked array for a result, alternating between two.

        The caller may still read the previous one.
        """
        if shape not in self._results:
            self._results[shape] = [self._gpu.pinned(shape, "float32") for _ in range(2)]
        self._results[shape].reverse()
        return self._results[shape][0]


class TensorRTEngine:
    """See `fvae_deploy.engines.base.Engine`. A state is a `DeviceArray`."""

    name = "tensorrt"

    def __init__(self, bundle: Path, manifest: Bundle, gpu: Gpu, precision: str) -> None:
        self.precision = precision
        self._bundle, self._manifest, self._gpu = bundle, manifest, gpu
        self._built = find(bundle, manifest, gpu.target, precision)
        self._trt = import_runtime(
            [each for files in self._built.values() for each in files], bundle
        )
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime: Any = None
        self._loaded: dict[str, _Loaded] = {}

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute one part with the first of its engine files that takes these sizes."""
        spec = self._manifest.part(part)
        check_inputs(spec, inputs)
        shapes = {tensor.name: tuple(inputs[tensor.name].shape) for tensor in spec.inputs}
        sizes = sizes_of(spec, shapes)
        self._gpu.use()
        for built in self._built[part]:
            if built.takes(shapes):
                return self._load(built, spec).run(inputs, sizes)
        data, variants = spec.inputs[0].name, ", ".join(b.variant for b in self._built[part])
        raise EngineError(
            f"expected {data} of {part} in sizes {variants}, found {list(shapes[data])}: "
            f"fvae build {self._bundle} with --size or --any-size"
        )

    def extents(self, part: str) -> tuple[tuple[int, int], ...]:
        """Return the tile sizes (h, w) in latent cells that a part was built for, or none.

        None means that it takes every size.
        """
        spec, files = self._manifest.part(part), self._built[part]
        if any(built.variant == ANY for built in files):
            return ()
        shapes = ({name: most for name, (_, _, most) in b.profile.items()} for b in files)
        return tuple((s["h"], s["w"]) for s in (sizes_of(spec, each) for each in shapes))

    def host(self, state: Any) -> Any:
        """Return a copy of a state, in the state's own type."""
        return _to_host(state)

    def release(self, part: str, compiled: bool) -> None:
        """Unload a part's engine files with their buffers if `compiled`; else do nothing."""
        if compiled:
            for name in [b.file for b in self._built[part] if b.file in self._loaded]:
                self._loaded.pop(name).close()
            self._gpu.trim()

    def close(self) -> None:
        """Unload all engine files and free the device's memory."""
        for loaded in self._loaded.values():
            loaded.close()
        self._loaded.clear()
        self._runtime = None
        self._gpu.close()

    def _load(self, built: BuiltEngine, part: Part) -> _Loaded:
        if built.file not in self._loaded:
            content = read_engine(self._bundle, built)
            self._runtime = self._runtime or self._trt.Runtime(self._logger)
            engine = self._runtime.deserialize_cuda_engine(content)
            if engine is None:
                raise EngineError(
                    f"expected {built.file} to load with {built.package} {built.version}, found "
                    "that this driver refuses it: update the driver, or run fvae build again"
                )
            self._loaded[built.file] = _Loaded(self._gpu, engine, built, part)
        return self._loaded[built.file]


def import_runtime(built: list[BuiltEngine], bundle: Path) -> Any:
    """Import the package that built the engines; raises EngineError for another version."""
    versions = sorted({(each.package, each.version) for each in built})
    (package, version), *others = versions
    pip = f"{package.replace('_', '-')}=={version}"
    if others:
        raise EngineError(
            f"expected engines of {bundle} built with one TensorRT, found {versions}: "
            "run fvae build again"
        )
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise EngineError(
            f"expected the package {package} {version}, which built the engines of {bundle}, "
            f"found none: pip install {pip}"
        ) from None
    if module.__version__ != version:
        raise EngineError(
            f"expected {package} {version}, which built the engines of {bundle}, found "
            f"{module.__version__}: pip install {pip}, or run fvae build again"
        )
    return module


def sizes_of(part: Part, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return k, h, w and n of the inputs; raises EngineError if the inputs disagree."""
    sizes: dict[str, int] = {}
    for spec in part.inputs:
        if spec.name not in shapes:  # a profile omits inputs of constant size
            continue
        for dimension, size in zip(spec.shape, shapes[spec.name], strict=False):
            factor, _, symbol = str(dimension).rpartition("*")
            if symbol in ("k", "h", "w", "n"):
                sizes.setdefault(symbol, size // int(factor or 1))
        if spec.sized(**sizes) != shapes[spec.name]:
            raise EngineError(
                f"expected {spec.name} {list(spec.sized(**sizes))} in {part.name}, found "
                f"{list(shapes[spec.name])}"
            )
    return sizes


def _to_host(value: Any) -> Any:
    """Return a copy of a state as a numpy array; return a numpy array unchanged."""
    if not isinstance(value, DeviceArray):
        return value
    return value.gpu.read(value.address, value.shape, value.kind).copy()


def _bytes(shape: Shape, kind: str) -> int:
    return int(np.prod(shape)) * np.dtype(kind).itemsize


def open(
    bundle: Path, manifest: Bundle, device: str, precision: str, threads: int | None
) -> TensorRTEngine:
    """Open a bundle's engines for this machine's GPU; raises EngineError with the remedy.

    `threads` has no effect: nothing is computed on the CPU.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise EngineError(f"expected device cuda for tensorrt, found {device!r}: use --device cuda")
    return TensorRTEngine(bundle, manifest, Gpu(int(number or 0)), precision)


def precisions(device: str = "cpu") -> list[str]:
    """Return the precisions that can be built; empty on a CPU. Only a bundle shows which were."""
    return list(offered("tensorrt")) if device.startswith("cuda") else []
