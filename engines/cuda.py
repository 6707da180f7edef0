"""One NVIDIA GPU: memory, copies and graphs, through NVIDIA's own bindings of the CUDA runtime.

`cuda-bindings` is one wheel of some 10 MB; torch would do the same with gigabytes (ADR 15). It is
imported when a `Gpu` is opened.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import EngineError

STAGE = 4 << 20  # bytes of each of the two pinned buffers that uploads go through
REMEDY = "install NVIDIA's driver (nvidia-smi shows it), or use an engine for the CPU"


class Gpu:
    """A GPU with one stream, in whose order everything happens."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise EngineError(
                "expected the package cuda-bindings, found none: pip install 'fvae-deploy[gpu]'"
            ) from None
        self._cuda = runtime
        error, count = runtime.cudaGetDeviceCount()
        if error != runtime.cudaError_t.cudaSuccess or ordinal >= count:
            found = error.name if error != runtime.cudaError_t.cudaSuccess else f"{count} of them"
            raise EngineError(f"expected an NVIDIA GPU number {ordinal}, found {found}: {REMEDY}")
        self._ordinal = ordinal
        self.use()
        attributes = runtime.cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", attribute, ordinal)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.target = f"sm_{major}{minor}"
        # Work in the default stream would wait for all others.
        self.stream = int(self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))
        # First in, first out: states that change places find the same addresses again.
        self._spare: defaultdict[int, deque[int]] = defaultdict(deque)
        self._owned: set[int] = set()
        self._reads: dict[tuple[tuple[int, ...], str], NDArray[Any]] = {}
        self._stages = [(self.pinned((STAGE,), "uint8"), self._event()) for _ in range(2)]
        self._turn = 0

    def use(self) -> None:
        """Make it the GPU of the calling thread: each has its own."""
        self._call("cudaSetDevice", self._ordinal)

    def take(self, size: int) -> int:
        """Return device memory of so many bytes: some that was given back, or new."""
        if self._spare[size]:
            return self._spare[size].popleft()
        address = int(self._call("cudaMalloc", size))
        self._owned.add(address)
        return address

    def give(self, address: int, size: int) -> None:
        """Give device memory back for the next to take; the stream's order keeps it safe."""
        self._spare[size].append(address)

    def pinned(self, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
        """Make an array in host memory that copies need no detour to; it lives as others do."""
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        address = int(self._call("cudaMallocHost", size))
        buffer = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(buffer, self._cuda.cudaFreeHost, address)
        array: NDArray[Any] = np.asarray(buffer).view(kind).reshape(shape)
        return array

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device, through two pinned buffers in turn.

        While one goes to the device, the other is filled.
        """
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, STAGE):
            piece = flat[start : start + STAGE]
            stage, free = self._stages[self._turn]
            self._turn = 1 - self._turn
            self._call("cudaEventSynchronize", free)
            stage[: piece.size] = piece
            self._copy(address + start, stage.ctypes.data, piece.size, "HostToDevice")
            self._call("cudaEventRecord", free, self.stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Begin to copy from the device to a pinned array; `wait` before reading it."""
        self._copy(array.ctypes.data, address, array.nbytes, "DeviceToHost")

    def read(self, address: int, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
        """Return an array from the device; valid until the next of its shape and type."""
        if (shape, kind) not in self._reads:
            self._reads[shape, kind] = self.pinned(shape, kind)
        self.download(self._reads[shape, kind], address)
        self.wait()
        return self._reads[shape, kind]

    def wait(self) -> None:
        """Wait until all that was begun is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` would launch as a graph, and launch nothing."""
        modes = self._cuda.cudaStreamCaptureMode
        self._call("cudaStreamBeginCapture", self.stream, modes.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        finally:
            graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Launch a graph."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def forget(self, graph: Any) -> None:
        """Destroy a graph."""
        self._call("cudaGraphExecDestroy", graph)

    def trim(self) -> None:
        """Return spare memory to the driver."""
        self.wait()
        for addresses in self._spare.values():
            for address in addresses:
                self._call("cudaFree", address)
                self._owned.remove(address)
        self._spare.clear()

    def close(self) -> None:
        """Release the device's memory."""
        self.wait()
        for address in self._owned:
            self._call("cudaFree", address)
        self._owned.clear()
        self._spare.clear()
        self._reads.clear()

    def _copy(self, target: int, source: int, size: int, direction: str) -> None:
        kind = getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{direction}")
        self._call("cudaMemcpyAsync", target, source, size, kind, self.stream)

    def _event(self) -> Any:
        return self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call the runtime; raises EngineError with its name for what failed."""
        error, *results = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            remedy = "use a smaller --memory" if "MemoryAllocation" in error.name else REMEDY
            raise EngineError(f"expected {name} to succeed, found {error.name}: {remedy}")
        return results[0] if results else None
