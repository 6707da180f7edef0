"""What every engine offers, and the one table from names to modules."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Bundle, Part

Array = Any  # numpy float32 for data; state is the engine's own kind


class Engine(Protocol):
    """A bundle opened in one runtime on one device at one precision."""

    name: str
    precision: str

    def run(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute one part.

        The data input is a C-contiguous array of the part's type; the data output is a float32
        array, valid until the next run of the same part. State inputs are what this engine
        returned, or arrays. Where the part returns state they are used up: the engine
        may write the next state into them.

        Raises EngineError when the inputs do not fit the part or the runtime fails.
        """
        ...

    def host(self, state: Array) -> Any:
        """Return a state as a numpy array that `run` takes back to the bit: a view if possible."""
        ...

    def release(self, part: str, compiled: bool) -> None:
        """Give back a part's working memory, and with `compiled` all it holds.

        It may be run again, and then takes both anew. Results of its last run stay valid.
        """
        ...

    def close(self) -> None:
        """Release the runtime's memory."""
        ...


@runtime_checkable
class BuiltAhead(Protocol):
    """An engine that takes the sizes alone that it was built for."""

    def extents(self, part: str) -> tuple[tuple[int, int], ...]:
        """Cells (h, w) of the tiles that a part was built for; none where any size will do."""
        ...


@dataclass(frozen=True)
class Entry:
    """Where an engine lives, what it needs and what would install it."""

    module: str
    requires: tuple[str, ...]  # any one of these packages
    remedy: str


# In the order in which `auto` tries them.
ENGINES = {
    "tensorrt": Entry(
        "tensor_rt", ("tensorrt_rtx", "tensorrt"), "pip install 'fvae-deploy[tensorrt]'"
    ),
    "openvino": Entry("open_vino", ("openvino",), "pip install 'fvae-deploy[cpu]'"),
    "onnxruntime": Entry("onnx_runtime", ("onnxruntime",), "pip install 'fvae-deploy[cpu]'"),
    "torch": Entry("eager", ("torch",), "pip install 'fvae-deploy[export]'"),
    "fake": Entry("fake", ("numpy",), ""),
}
AUTO = {"cpu": ("openvino", "onnxruntime", "torch"), "cuda": ("tensorrt", "onnxruntime", "torch")}
PRECISIONS = ("fp32", "bf16", "fp16")
QUANTISED = ("int8", "fp8")  # states in float32; only where engines are built ahead, with CTs


def missing(name: str) -> str | None:
    """Say which package an engine lacks, with the remedy; nothing is imported."""
    entry = ENGINES[name]
    if not _installed(entry):
        return f"needs the package {' or '.join(entry.requires)}: {entry.remedy}"
    return None


def obstacle(name: str) -> str | None:
    """Say what keeps an engine from running here, with the remedy; None when nothing does.

    What is installed is imported: that may fail where a library of the system is missing, or
    two packages have overwritten each other.
    """
    problem = missing(name)
    if problem is not None:
        return problem
    entry = ENGINES[name]
    package = _installed(entry)[0]
    try:
        _module(entry)
        importlib.import_module(package).__version__  # noqa: B018  # a folder left over has none
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        return (
            f"needs {package} to import, found {reason}: pip uninstall -y {package} && "
            f"{entry.remedy}"
        )
    return None


def offered(name: str) -> tuple[str, ...]:
    """Precisions that an engine may be asked for, on one device or another."""
    return (*PRECISIONS, *QUANTISED) if name == "tensorrt" else PRECISIONS


def precisions(name: str) -> list[str]:
    """Precisions in which an installed engine computes on this machine's CPU."""
    found: list[str] = load(name).precisions()
    return found


def load(name: str) -> ModuleType:
    """Import an engine's module, and its runtime with it; raises EngineError with the remedy."""
    problem = obstacle(name)
    if problem is not None:
        raise EngineError(f"engine {name} cannot run here: it {problem}")
    return _module(ENGINES[name])


def _installed(entry: Entry) -> list[str]:
    return [name for name in entry.requires if importlib.util.find_spec(name) is not None]


def _module(entry: Entry) -> ModuleType:
    return importlib.import_module(f"fvae_deploy.engines.{entry.module}")


def choose(device: str = "cpu", unfit: Callable[[str], str | None] = obstacle) -> tuple[str, str]:
    """Return the engine that `auto` takes here for a device, and why.

    `unfit` says what keeps an engine from running; None when nothing does.
    """
    reasons: list[str] = []
    for name in AUTO["cuda" if device.startswith("cuda") else "cpu"]:
        problem = unfit(name)
        if problem is None:
            return name, "; ".join([*reasons, f"{name} is installed"])
        reasons.append(f"{name} {problem}")
    raise EngineError(f"expected one engine to run here, found none: {'; '.join(reasons)}")


def check_inputs(part: Part, inputs: Mapping[str, Array]) -> None:
    """Raise EngineError for an input left out, or data that this part has no k, h and w for.

    Every engine's `run` begins with it: a graph may well compute nonsense from such data.
    """
    for tensor in part.inputs:
        if tensor.name not in inputs:
            found = ", ".join(inputs) or "none"
            raise EngineError(f"expected an input {tensor.name} of {part.name}, found {found}")
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
    """Open a bundle in an engine of this name; raises EngineError with the remedy."""
    if name not in ENGINES:
        raise EngineError(f"expected one of {', '.join(ENGINES)}, found engine {name!r}")
    able = offered(name)
    if precision not in able:
        raise EngineError(
            f"expected one of {', '.join(able)}, found precision {precision!r} for {name}"
        )
    engine: Engine = load(name).open(bundle, manifest, device, precision)
    return engine
