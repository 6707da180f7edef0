"""A frozen VAE, opened from a bundle in an engine: encodes and decodes clips in memory."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.engines.base import (
    KeepsCompiled,
    choose,
    obstacle,
    open_engine,
    precision_problem,
)
from fvae_deploy.errors import BundleError, EngineError, VolumeError
from fvae_deploy.export.bundle import Bundle
from fvae_deploy.export.hub import is_hub_id
from fvae_deploy.export.hub_bundles import kept
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.storage.cache import cache_folder, compiled_folder
from fvae_deploy.stream import schedule
from fvae_deploy.stream.arrays import LatentFrames, ModelFrames
from fvae_deploy.stream.pieces import Pieces
from fvae_deploy.stream.stages import CausalStream, whole_grids
from fvae_deploy.stream.tiles import Grid

Kind = TypeVar("Kind", bound=Bundle)
C = TypeVar("C", bound="Codec")
R = TypeVar("R")
P = ParamSpec("P")

logger = logging.getLogger("fvae")
BUILT_IN = Path(__file__).parents[1] / "bundles"


def bundle_path(model: str | Path) -> Path:
    """Return the folder of a built-in model or a bundle; raises BundleError if there is none.

    A bundle on a hub, hf:OWNER/NAME[@REVISION], is pulled into the cache unless it is there.
    """
    if is_hub_id(str(model)):
        return kept(str(model), cache_folder() / "hub", logger.info)
    if isinstance(model, str) and (BUILT_IN / model / "manifest.json").is_file():
        return BUILT_IN / model
    path = Path(model)
    if not path.is_dir():
        names = ", ".join(sorted(p.parent.name for p in BUILT_IN.glob("*/manifest.json")))
        raise BundleError(
            f"expected a built-in model ({names}), the folder of a bundle or hf:OWNER/NAME, found "
            f"{model}: run fvae models for a list, or create a bundle with fvae export"
        )
    return path


class Opened(Generic[Kind]):
    """A bundle opened in an engine; a context manager that releases the engine."""

    def __init__(
        self,
        bundle: Path,
        manifest: Kind,
        engine: str,
        precision: str,
        device: str,
        threads: int | None = None,
    ) -> None:
        self.bundle, self.manifest, self.device = bundle, manifest, device
        self.why, self._used = "asked for", threading.Lock()
        if engine == "auto":
            engine, self.why = _choose_engine(bundle, manifest, precision, device)
        self.engine = open_engine(bundle, manifest, engine, device, precision, threads)
        if (folder := compiled_folder()) and isinstance(self.engine, KeepsCompiled):
            self.engine.keep_compiled(folder)
        logger.info("engine: %s %s on %s (%s)", engine, precision, device, self.why)

    def close(self) -> None:
        """Release the engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _choose_engine(bundle: Path, manifest: Bundle, precision: str, device: str) -> tuple[str, str]:
    """Return an engine that runs here, and why; TensorRT only with engines for this GPU."""
    from fvae_deploy.engines.devices import NVIDIA, target, unfit

    if device.startswith("cuda") and target() is None:
        raise EngineError(
            f"expected {NVIDIA} for --device {device}, found none: install the driver from "
            "nvidia.com, or leave --device out to compute on the CPU"
        )

    def problem(name: str) -> str | None:
        reason = obstacle(name) if device == "cpu" else unfit(name)
        reason = reason or precision_problem(name, precision, device)
        if reason is not None or name != "tensorrt":
            return reason
        try:
            open_engine(bundle, manifest, name, device, precision).close()
        except EngineError as error:
            return f"cannot serve: {error}"
        return None

    return choose(device, problem)


def alone(verb: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Let a function of a codec run only while no other uses the same codec."""

    @functools.wraps(verb)
    def run(codec: C, /, *args: P.args, **keywords: P.kwargs) -> R:
        with codec.in_use():
            return verb(codec, *args, **keywords)

    return run


class Codec(Opened[Manifest]):
    """A VAE opened in an engine; see `open_codec`.

    A codec is not thread-safe, since its engine reuses the memory of inputs and outputs. Threads
    may use it one after the other; two at the same time raise EngineError.
    """

    _settled: tuple[dict[str, Grid | Pieces], int] | None = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the codec; raises EngineError if another run holds it."""
        if not self._used.acquire(blocking=False):
            raise EngineError(
                "expected one run at a time with this codec, found another run that uses it: wait "
                "for that run, or open one codec per thread"
            )
        try:
            yield
        finally:
            self._used.release()

    def settle(self, grids: Mapping[str, Grid | Pieces], k: int) -> None:
        """Prepare for a volume with these tiles; release what was compiled for other tiles.

        A codec that stays open thus takes no more memory than its last volume needs.
        """
        settings = dict(grids), k
        if self._settled not in (None, settings):
            for part in self.manifest.graphs:
                self.engine.release(part.name, compiled=True)
        self._settled = settings

    @alone
    def encode(
        self,
        frames: ModelFrames,
        *,
        k: int | None = None,
        grids: Mapping[str, Grid] | None = None,
    ) -> LatentFrames:
        """Encode a clip [C, T, H, W] in the model's range to latents [D, t, h, w].

        C is the bundle's number of channels; H and W are multiples of its spatial factor. T may
        be any length: the end is padded by repeating the last frame. `k` is the number of latent
        frames per step; `grids` cuts stages into tiles. Raises VolumeError for other shapes.
        """
        geometry = self.manifest.geometry
        c, t, height, width = _shape_4d(frames, "a clip [C, T, H, W]")
        s = geometry.spatial
        if c != geometry.channels or t < 1 or height % s or width % s or not height or not width:
            raise VolumeError(
                f"expected a clip [{geometry.channels}, T, H, W] with H and W multiples of {s}, "
                f"found {list(frames.shape)}: pad it by repeating the edge"
            )
        stream = self._stream("encode", (height // s, width // s), grids)
        pieces = []
        for step in self._steps(t, k):
            x = pad_frames(frames[:, slice(*step.slices)], step.depth)
            pieces.append(stream.run(x, step.first)[:, : step.latents[1] - step.latents[0]])
        return np.concatenate(pieces, axis=1)

    @alone
    def decode(
        self,
        latents: LatentFrames,
        *,
        k: int | None = None,
        grids: Mapping[str, Grid] | None = None,
    ) -> ModelFrames:
        """Decode latents [D, t, h, w] to a clip [C, 1 + 4 (t - 1), H, W] in the model's range.

        Raises VolumeError for another number of latent channels, or windows that are not whole.
        """
        geometry = self.manifest.geometry
        d, t, h, w = _shape_4d(latents, "latents [D, t, h, w]")
        if d != geometry.latent_channels or not t or not h or not w:
            raise VolumeError(
                f"expected latents [{geometry.latent_channels}, t, h, w], found "
                f"{list(latents.shape)}: they come from another model"
            )
        stream = self._stream("decode", (h, w), grids)
        windows, rest = divmod(t, geometry.first_frames)
        slices = windows * geometry.first_slices
        if geometry.first_slices == 1:
            slices, rest = 1 + geometry.temporal * (t - 1), 0
        if rest:
            raise VolumeError(
                f"expected whole windows of {geometry.first_frames} latent frames each, found {t} "
                "frames: pass the latents of whole windows"
            )
        pieces = []
        geometry, lag = self.manifest.geometry, self.manifest.lag
        for step in schedule.decoding(self._steps(slices, k), geometry.temporal, lag):
            z = pad_frames(latents[:, slice(*step.latents)], step.frames)
            pieces.append(stream.run(z, step.first, step.clock)[:, step.shown])
        return np.concatenate(pieces, axis=1)

    def _stream(
        self, direction: str, plane: tuple[int, int], grids: Mapping[str, Grid] | None
    ) -> CausalStream:
        grids = whole_grids(self.manifest, (direction,), plane) | dict(grids or {})
        return CausalStream(self.engine, self.manifest, direction, grids)

    def _steps(self, slices: int, k: int | None) -> list[schedule.Step]:
        geometry = self.manifest.geometry
        k = self.manifest.check_step(k)
        protocol = "causal" if "causal" in geometry.protocols else "windows"  # a clip is one run
        return schedule.steps(slices, protocol, k, geometry)


def open_codec(
    model: str | Path = "tiny",
    *,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    threads: int | None = None,
) -> Codec:
    """Open a built-in model, a bundle folder, or a bundle on a hub, hf:OWNER/NAME[@REVISION].

    Raises BundleError for a missing or damaged bundle, and EngineError for an engine, device or
    precision that cannot run here. Each message contains the remedy.
    """
    path = bundle_path(model)
    return Codec(path, Manifest.load(path), engine, precision, device, threads)


def pad_frames(x: NDArray[np.float32], frames: int) -> NDArray[np.float32]:
    """Repeat the last frame of x [C, T, H, W] until there are `frames`; of none, return zeros."""
    missing = frames - x.shape[1]
    if missing <= 0:
        return x
    last = x[:, -1:] if x.shape[1] else np.zeros_like(x, shape=(len(x), 1, *x.shape[2:]))
    return np.concatenate([x, last.repeat(missing, axis=1)], axis=1)


def _shape_4d(array: NDArray[Any], expected: str) -> tuple[int, int, int, int]:
    """Return the shape of an array; raises VolumeError unless it has four dimensions."""
    if array.ndim != 4:
        raise VolumeError(f"expected {expected}, found {array.ndim} dimensions")
    a, b, c, d = array.shape
    return a, b, c, d
