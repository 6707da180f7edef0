"""TensorRT, and TensorRT for RTX: engines built ahead of time (`fvae build`), on the GPU.

    data    numpy --two pinned buffers in turn--> device --graph--> device --> pinned numpy
    states  stay on the device; the next run gets their address, and they give theirs to the
            states that it makes

Each set of addresses becomes a CUDA graph when it comes the second time; a stream over whole
planes has two, since its states change places. After that a step allocates nothing. Not yet run
on a GPU: its logic is tested on a stand-in for the device and the runtime, and the names it uses
against the installed packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # numpy knows bfloat16 by its name then
import numpy as np
from numpy.typing import NDArray

from fvae_deploy.engines.base import check_inputs
from fvae_deploy.engines.cuda import Gpu
from fvae_deploy.errors import EngineError
from fvae_deploy.export.built import ANY, BuiltEngine, Shape, find, read_engine
from fvae_deploy.export.bundle import Bundle, Part

GRAPHS = 16  # of one engine: two for each of so many tiles; more are launched without


@dataclass(eq=False)
class DeviceArray:
    """A state on the device; its memory goes back when it was used up, or is forgotten."""

    gpu: Gpu
    address: int
    shape: Shape
    kind: str
    used: bool = False

    @classmethod
    def new(cls, gpu: Gpu, shape: Shape, kind: str) -> DeviceArray:
        """Take memory for one."""
        return cls(gpu, gpu.take(_bytes(shape, kind)), shape, kind)

    def give_back(self) -> None:
        """Let others have its memory."""
        if not self.used:
            self.used = True
            self.gpu.give(self.address, _bytes(self.shape, self.kind))

    def __del__(self) -> None:
        self.give_back()


class _Loaded:
    """One engine file, loaded, with its context, buffers and graphs."""

    def __init__(self, gpu: Gpu, engine: Any, built: BuiltEngine, part: Part) -> None:
        self._gpu, self._built, self._part = gpu, built, part
        self._engine = engine  # the context lives in it
        self._context = engine.create_execution_context()
        self._shapes: dict[str, Shape] = {}
        self._fixed: dict[tuple[str, Shape], DeviceArray] = {}
        self._results: dict[Shape, list[NDArray[np.float32]]] = {}
        self._graphs: dict[tuple[Any, ...], Any] = {}
        self._settled = False  # launched since its shapes changed

    def run(self, inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Compute on the device: data come back as numpy, states stay."""
        part, states = self._part, bool(self._part.state_outputs)
        given: dict[str, DeviceArray] = {}
        for spec in part.inputs:
            value = inputs[spec.name]
            if states and spec in part.state_inputs:
                given[spec.name] = self._state(value)
            else:
                given[spec.name] = self._data(spec.name, value, spec.type)
        data, *rest = part.outputs
        made = {data.name: self._buffer(data.name, data.sized(**sizes), "float32")}
        for spec in rest:
            made[spec.name] = DeviceArray.new(self._gpu, spec.sized(**sizes), self._built.state)
        self._compute({**given, **made})
        result = self._result(data.sized(**sizes))
        self._gpu.download(result, made[data.name].address)
        self._gpu.wait()
        for spec in part.state_inputs if states else ():
            given[spec.name].give_back()
        return {**made, data.name: result}

    def close(self) -> None:
        """Destroy the graphs, and give the buffers back."""
        for graph in self._graphs.values():
            if graph is not None:
                self._gpu.forget(graph)
        self._graphs.clear()
        self._fixed.clear()

    def _compute(self, bound: Mapping[str, DeviceArray]) -> None:
        """Launch the engine on these arrays: its graph from the second time on."""
        key = tuple((array.address, array.shape) for array in bound.values())
        graph = self._graphs.get(key)
        if graph is not None:
            self._gpu.launch(graph)
            return
        for name, array in bound.items():
            if name in self._built.profile and self._shapes.get(name) != array.shape:
                self._check(self._context.set_input_shape(name, array.shape), "set_input_shape")
                self._shapes[name] = array.shape
                self._settled = False
            self._check(self._context.set_tensor_address(name, array.address), "set_tensor_address")
        # The second time: what it needed once for these arrays and shapes, it has done.
        if key in self._graphs and self._settled and self._capturable():
            graph = self._graphs[key] = self._gpu.capture(self._enqueue)
            self._gpu.launch(graph)
            return
        self._enqueue()
        self._settled = True
        if len(self._graphs) < GRAPHS:
            self._graphs[key] = None

    def _enqueue(self) -> None:
        self._check(self._context.execute_async_v3(self._gpu.stream), "execute_async_v3")

    def _capturable(self) -> bool:
        """Whether it needs no memory that it takes as it runs; TensorRT for RTX tells."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._gpu.stream))

    def _check(self, succeeded: bool, call: str) -> None:
        if not succeeded:
            raise EngineError(f"TensorRT failed in {self._part.name}: {call} refused its arguments")

    def _state(self, value: Any) -> DeviceArray:
        if isinstance(value, DeviceArray) and value.kind == self._built.state and not value.used:
            return value
        array = np.ascontiguousarray(_host(value), dtype=self._built.state)
        state = DeviceArray.new(self._gpu, array.shape, self._built.state)
        self._gpu.upload(state.address, array)
        return state

    def _data(self, name: str, value: Any, kind: str) -> DeviceArray:
        array = np.ascontiguousarray(_host(value), dtype=kind)
        buffer = self._buffer(name, array.shape, kind)
        self._gpu.upload(buffer.address, array)
        return buffer

    def _buffer(self, name: str, shape: Shape, kind: str) -> DeviceArray:
        if (name, shape) not in self._fixed:
            self._fixed[name, shape] = DeviceArray.new(self._gpu, shape, kind)
        return self._fixed[name, shape]

    def _result(self, shape: Shape) -> NDArray[np.float32]:
        """Two in turn: one may still be read while the other is filled."""
        if shape not in self._results:
            self._results[shape] = [self._gpu.pinned(shape, "float32") for _ in range(2)]
        self._results[shape].reverse()
        return self._results[shape][0]


class TensorRTEngine:
    """See `fvae_deploy.engines.base.Engine`. State is a `DeviceArray`."""

    name = "tensorrt"

    def __init__(self, bundle: Path, manifest: Bundle, gpu: Gpu, precision: str) -> None:
        self.precision = precision
        self._bundle, self._manifest, self._gpu = bundle, manifest, gpu
        self._built = find(bundle, manifest, gpu.target, precision)
        self._trt = runtime_of([each for those in self._built.values() for each in those], bundle)
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime: Any = None
        self._loaded: dict[str, _Loaded] = {}

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute one part, by the first of its engines that takes these sizes."""
        spec = self._manifest.part(part)
        check_inputs(spec, inputs)
        shapes = {tensor.name: tuple(inputs[tensor.name].shape) for tensor in spec.inputs}
        sizes = sizes_of(spec, shapes)
        self._gpu.use()
        for built in self._built[part]:
            if built.takes(shapes):
                return self._load(built, spec).run(inputs, sizes)
        data, known = spec.inputs[0].name, ", ".join(b.variant for b in self._built[part])
        raise EngineError(
            f"expected {data} of {part} in sizes {known}, found {list(shapes[data])}: "
            f"fvae build {self._bundle} with --size or --any-size"
        )

    def extents(self, part: str) -> tuple[tuple[int, int], ...]:
        """Cells (h, w) of the tiles that a part was built for; none where any size will do."""
        spec, found = self._manifest.part(part), self._built[part]
        if any(built.variant == ANY for built in found):
            return ()
        shapes = ({name: most for name, (_, _, most) in b.profile.items()} for b in found)
        return tuple((s["h"], s["w"]) for s in (sizes_of(spec, each) for each in shapes))

    def host(self, state: Any) -> Any:
        """Return a copy of a state, in its own type."""
        return _host(state)

    def release(self, part: str, compiled: bool) -> None:
        """Give back a part's engines, with all they hold, where nothing of them will serve."""
        if compiled:
            for name in [b.file for b in self._built[part] if b.file in self._loaded]:
                self._loaded.pop(name).close()
            self._gpu.trim()

    def close(self) -> None:
        """Release the engines and the device's memory."""
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
                    "that it does not on this driver: update the driver, or fvae build again"
                )
            self._loaded[built.file] = _Loaded(self._gpu, engine, built, part)
        return self._loaded[built.file]


def runtime_of(built: list[BuiltEngine], bundle: Path) -> Any:
    """Import the package that engines were built with; raises EngineError for another version."""
    wanted = sorted({(each.package, each.version) for each in built})
    (package, version), *others = wanted
    pip = f"{package.replace('_', '-')}=={version}"
    if others:
        raise EngineError(
            f"expected all engines of {bundle} of one TensorRT, found {wanted}: fvae build again"
        )
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise EngineError(
            f"expected the package {package} {version} that the engines of {bundle} were built "
            f"with, found none: pip install {pip}"
        ) from None
    if module.__version__ != version:
        raise EngineError(
            f"expected {package} {version} that the engines of {bundle} were built with, found "
            f"{module.__version__}: pip install {pip}, or fvae build again"
        )
    return module


def sizes_of(part: Part, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Find k, h, w and n of inputs; raises EngineError where they contradict each other."""
    sizes: dict[str, int] = {}
    for spec in part.inputs:
        if spec.name not in shapes:  # of a size that never varies
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


def _host(value: Any) -> Any:
    """Return a copy of a state, an array as it is."""
    if not isinstance(value, DeviceArray):
        return value
    return value.gpu.read(value.address, value.shape, value.kind).copy()


def _bytes(shape: Shape, kind: str) -> int:
    return int(np.prod(shape)) * np.dtype(kind).itemsize


def open(bundle: Path, manifest: Bundle, device: str, precision: str) -> TensorRTEngine:
    """Open a bundle's engines for the GPU that is here; raises EngineError with the remedy."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise EngineError(f"expected device cuda for tensorrt, found {device!r}: use --device cuda")
    return TensorRTEngine(bundle, manifest, Gpu(int(number or 0)), precision)


def precisions() -> list[str]:
    """TensorRT computes nothing on a CPU."""
    return []
