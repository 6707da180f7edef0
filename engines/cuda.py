"""Memory, copies and graphs on one NVIDIA GPU, through NVIDIA's bindings of the CUDA runtime.

The package `cuda-bindings` is a wheel of about 10 MB; torch would take gigabytes for the same
(ADR 15). It is imported when a `Gpu` is opened.
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

STAGE = 4 << 20  # bytes of each of the two page-locked buffers used for uploads
REMEDY = "install NVIDIA's driver (nvidia-smi shows it), or use an engine for the CPU"


class Gpu:
    """A GPU with one CUDA stream, which orders all work."""

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
            failed = error != runtime.cudaError_t.cudaSuccess
            reason = error.name if failed else f"{count} GPUs"
            raise EngineError(f"expected an NVIDIA GPU number {ordinal}, found {reason}: {REMEDY}")
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
        # The default stream would wait for all other streams.
        self.stream = int(self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))
        # Free memory by size. First in, first out: a stream of steps then alternates between the
        # same addresses, so that its graphs can be reused.
        self._spare: defaultdict[int, deque[int]] = defaultdict(deque)
        self._owned: set[int] = set()
        self._reads: dict[tuple[tuple[int, ...], str], NDArray[Any]] = {}
        self._stages = [(self.pinned((STAGE,), "uint8"), self._event()) for _ in range(2)]
        self._turn = 0

    def use(self) -> None:
        """Make this the current GPU of the calling thread; CUDA keeps one per thread."""
        self._call("cudaSetDevice", self._ordinal)

    def take(self, size: int) -> int:
        """Return the address of `size` bytes of device memory, reused or newly allocated."""
        if self._spare[size]:
            return self._spare[size].popleft()
        address = int(self._call("cudaMalloc", size))
        self._owned.add(address)
        return address

    def give(self, address: int, size: int) -> None:
        """Make device memory available to `take` again.

        Work that still uses it comes first, since all work is in one stream.
        """
        self._spare[size].append(address)

    def pinned(self, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
        """Allocate a page-locked host array, freed with its last reference."""
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        address = int(self._call("cudaMallocHost", size))
        buffer = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(buffer, self._cuda.cudaFreeHost, address)
        array: NDArray[Any] = np.asarray(buffer).view(kind).reshape(shape)
        return array

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device through two page-locked buffers.

        One is filled while the other is copied to the device.
        """
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, STAGE):
            piece = flat[start : start + STAGE]
            stage, copied = self._stages[self._turn]
            self._turn = 1 - self._turn
            self._call("cudaEventSynchronize", copied)
            stage[: piece.size] = piece
            self._copy(address + start, stage.ctypes.data, piece.size, "HostToDevice")
            self._call("cudaEventRecord", copied, self.stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Start a copy from the device to a page-locked array; call `wait` before reading it."""
        self._copy(array.ctypes.data, address, array.nbytes, "DeviceToHost")

    def read(self, address: int, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
        """Return an array from the device, valid until the next read of its shape and type."""
        if (shape, kind) not in self._reads:
            self._reads[shape, kind] = self.pinned(shape, kind)
        self.download(self._reads[shape, kind], address)
        self.wait()
        return self._reads[shape, kind]

    def wait(self) -> None:
        """Wait until all work of the stream is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Record the launches of `work` as a CUDA graph, without executing them."""
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
        """Return unused device memory to the driver."""
        self.wait()
        for addresses in self._spare.values():
            for address in addresses:
                self._call("cudaFree", address)
                self._owned.remove(address)
        self._spare.clear()

    def close(self) -> None:
        """Free all device memory."""
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
        """Call the CUDA runtime; raises EngineError with the name of its error."""
        error, *results = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            remedy = "use a smaller --memory" if "MemoryAllocation" in error.name else REMEDY
            raise EngineError(f"expected {name} to succeed, found {error.name}: {remedy}")
        return results[0] if results else None
