"""The interface of an engine, and the table of the engines that `fvae` offers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from fvae_deploy.engines.pages import share_heap
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Bundle, Part
from fvae_deploy.export.manifest import QUANTISED

Array = Any  # numpy float32 for data; each engine has its own type for state


class Engine(Protocol):
    """A bundle opened in one runtime, on one device and at one precision."""

    name: str
    precision: str

    def run(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one part of the network.

        The data input is a C-contiguous array of the type that the part declares. The data output
        is a float32 array that stays valid until the same part runs again; the results of a segment
        stay valid as long as anything refers to them. A state input is a state that this engine
        returned, or a numpy array. If the part returns new state, its state inputs are consumed:
        the engine may overwrite them.

        Raises EngineError when the inputs do not fit the part or the runtime fails.
        """
        ...

    def host(self, state: Array) -> Any:
        """Return a state as a numpy array, without a copy where possible.

        `run` accepts the array in place of the state and computes exactly the same bits.
        """
        ...

    def release(self, part: str, compiled: bool) -> None:
        """Free a part's working memory and, if `compiled`, its compiled network as well.

        The part may run again: it then allocates both anew. The results of its last run stay
        valid.
        """
        ...

    def close(self) -> None:
        """Free all memory of the runtime."""
        ...


@runtime_checkable
class BuiltAhead(Protocol):
    """An engine that only runs the tile sizes it was built for."""

    def extents(self, part: str) -> tuple[tuple[int, int], ...]:
        """Return the tile sizes (h, w) in latent cells that a part was built for.

        Empty if the part takes every size.
        """
        ...


@runtime_checkable
class KeepsCompiled(Protocol):
    """An engine that can keep what it compiles in a folder, for the next program to use."""

    def keep_compiled(self, folder: Path) -> None:
        """Keep compiled parts in a folder from now on; the results are the same bits."""
        ...


@dataclass(frozen=True)
class Entry:
    """The module of an engine, the package it needs and how to install that."""

    module: str
    requires: tuple[str, ...]  # any one of these packages is enough
    remedy: str


# In the order in which `auto` tries them.
ENGINES = {
    "tensorrt": Entry(
        "fvae_deploy.engines.tensor_rt",
        ("tensorrt_rtx", "tensorrt"),
        "pip install 'fvae-deploy[tensorrt]'",
    ),
    "openvino": Entry("fvae_deploy.engines.open_vino", ("openvino",), "pip install openvino"),
    "onnxruntime": Entry(
        "fvae_deploy.engines.onnx_runtime", ("onnxruntime",), "pip install 'fvae-deploy[cpu]'"
    ),
    "torch": Entry("fvae_deploy.engines.eager", ("torch",), "pip install 'fvae-deploy[export]'"),
}
AUTO = {"cpu": ("openvino", "onnxruntime", "torch"), "cuda": ("tensorrt", "onnxruntime", "torch")}
PRECISIONS = ("fp32", "bf16", "fp16")


def missing(name: str) -> str | None:
    """Return which package an engine lacks and how to install it; None if it is installed.

    Imports nothing.
    """
    entry = ENGINES[name]
    if not _installed(entry):
        return f"needs the package {' or '.join(entry.requires)}: {entry.remedy}"
    return None


def obstacle(name: str) -> str | None:
    """Return why an engine cannot run on this machine, with the remedy; None if it can.

    Imports the engine's package. The import fails if a system library is missing, or if two
    packages have overwritten each other's files.
    """
    problem = missing(name)
    if problem is not None:
        return problem
    entry = ENGINES[name]
    package = _installed(entry)[0]
    try:
        importlib.import_module(entry.module)
        # The folder that an uninstalled package leaves behind imports, but has no version.
        importlib.import_module(package).__version__  # noqa: B018
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        return (
            f"needs {package} to import, found {reason}: pip uninstall -y {package} && "
            f"{entry.remedy}"
        )
    return None


def offered(name: str) -> tuple[str, ...]:
    """Return the precisions that an engine accepts on at least one device."""
    more = {"tensorrt": QUANTISED, "openvino": ("int8",)}
    return (*PRECISIONS, *more.get(name, ()))


def precisions(name: str, device: str = "cpu") -> list[str]:
    """Return the precisions in which an engine computes on a device of this machine.

    Opens no bundle. Empty if the engine does not have the device. TensorRT on a GPU returns all
    that can be built: only opening a bundle shows which were; the same holds for OpenVINO's int8.
    Raises EngineError with the remedy
    if the engine cannot run on this machine.
    """
    able: list[str] = load(name).precisions(device)
    return able


def precision_problem(name: str, precision: str, device: str = "cpu") -> str | None:
    """Return why an engine cannot compute in a precision on a device; None if it can.

    Opens no bundle. Raises EngineError as `precisions` does: call `obstacle` first.
    """
    able = precisions(name, device)
    if not able:
        return f"does not run on device {device} of this machine"
    if precision not in able:
        return f"does not compute in {precision} on device {device}, only in {', '.join(able)}"
    return None


def load(name: str) -> ModuleType:
    """Import an engine's module and its runtime; raises EngineError with the remedy."""
    problem = obstacle(name)
    if problem is not None:
        raise EngineError(f"engine {name} cannot run here: it {problem}")
    return importlib.import_module(ENGINES[name].module)


def _installed(entry: Entry) -> list[str]:
    return [name for name in entry.requires if importlib.util.find_spec(name) is not None]


def choose(device: str = "cpu", unfit: Callable[[str], str | None] = obstacle) -> tuple[str, str]:
    """Return the engine that `auto` selects for a device, and the reason.

    `unfit` returns why an engine cannot run, or None if it can.
    """
    reasons: list[str] = []
    for name in AUTO["cuda" if device.startswith("cuda") else "cpu"]:
        problem = unfit(name)
        if problem is None:
            return name, "; ".join([*reasons, f"{name} is installed"])
        reasons.append(f"{name} {problem}")
    raise EngineError(f"expected an engine that can run here, found none: {'; '.join(reasons)}")


def check_inputs(part: Part, inputs: Mapping[str, Array]) -> None:
    """Raise EngineError if an input is missing, or if the data's shape does not fit the part.

    Every engine calls this at the start of `run`: some runtimes compute wrong results from data
    of a wrong shape instead of failing.
    """
    for tensor in part.inputs:
        if tensor.name not in inputs:
            given = ", ".join(inputs) or "none"
            raise EngineError(f"expected an input {tensor.name} of {part.name}, found {given}")
    data = part.inputs[0]
    shape = tuple(inputs[data.name].shape)
    if not data.accepts(shape):
        raise EngineError(
            f"expected {data.name} [{', '.join(map(str, data.shape))}] in {part.name}, "
            f"found {list(shape)}"
        )


def open_engine(
    bundle: Path,
    manifest: Bundle,
    name: str,
    device: str = "cpu",
    precision: str = "fp32",
    threads: int | None = None,
) -> Engine:
    """Open a bundle in the engine of this name; raises EngineError with the remedy.

    `threads` limits the engine's threads on a CPU; None means all cores.
    """
    if name not in ENGINES:
        raise EngineError(f"expected one of {', '.join(ENGINES)}, found engine {name!r}")
    able = offered(name)
    if precision not in able:
        raise EngineError(
            f"expected one of {', '.join(able)}, found precision {precision!r} for {name}"
        )
    share_heap()
    engine: Engine = load(name).open(bundle, manifest, device, precision, threads)
    return engine
