"""A frozen VAE opened for use: bundle, engine, and one causal stream per direction."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fvae_deploy import schedule
from fvae_deploy.engines.base import Engine, choose, open_engine
from fvae_deploy.errors import BundleError, VolumeError
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.tiles import Grid

BUILT_IN = Path(__file__).parent / "bundles"


def bundle_path(model: str | Path) -> Path:
    """Folder of a built-in model or of a bundle; raises BundleError when there is none."""
    if isinstance(model, str) and (BUILT_IN / model / "manifest.json").is_file():
        return BUILT_IN / model
    path = Path(model)
    if not path.is_dir():
        names = ", ".join(sorted(p.parent.name for p in BUILT_IN.glob("*/manifest.json")))
        raise BundleError(
            f"expected a built-in model ({names}) or the folder of a bundle, found {model}: "
            "see fvae models, or make one with fvae export"
        )
    return path


class CausalStream:
    """One direction of one volume through an engine, plane by plane, tile by tile.

    Every tile keeps its own causal state; results are pasted into the assembled plane.
    """

    def __init__(self, engine: Engine, manifest: Manifest, direction: str, grid: Grid) -> None:
        self._engine, self._manifest, self._direction = engine, manifest, direction
        self._tiles = grid.tiles
        self._grid = grid
        cells = manifest.geometry.spatial
        self._scale_in, self._scale_out = (cells, 1) if direction == "encode" else (1, cells)
        self._states: list[dict[str, Any]] = []
        self.seconds = 0.0

    def run(self, x: NDArray[np.float32], first: bool) -> NDArray[np.float32]:
        """Advance by one step: x [C, T, H, W] -> z [D, k, h, w], or the other way round.

        `first` starts a new run; a step without a state before it starts from zeros, which is
        exact after the part's `context` latent frames.
        """
        begin = time.perf_counter()
        part = self._manifest.part(f"{self._direction}_{'first' if first else 'step'}")
        follower = self._manifest.part(f"{self._direction}_step")
        data, result = part.inputs[0].name, part.outputs[0].name
        if not first and not self._states:
            h, w = self._grid.extent
            h, w = min(h, self._grid.height), min(w, self._grid.width)
            self._states = [
                {s.name: np.zeros(s.sized(1, h, w), np.float32) for s in part.state_inputs}
                for _ in self._tiles
            ]
        states: list[dict[str, Any]] = []
        whole: NDArray[np.float32] | None = None
        for i, tile in enumerate(self._tiles):
            (top, bottom), (left, right) = tile.rows.read, tile.columns.read
            s = self._scale_in
            piece = x[None, :, :, s * top : s * bottom, s * left : s * right]
            inputs = {data: np.ascontiguousarray(piece)}
            if not first:
                inputs |= self._states[i]
            outputs = self._engine.run(part.name, inputs)
            names = zip(follower.state_inputs, part.state_outputs, strict=True)
            states.append({new.name: outputs[old.name] for new, old in names})
            y = outputs[result][0]
            s = self._scale_out
            if whole is None:
                plane = (s * self._grid.height, s * self._grid.width)
                whole = np.empty((*y.shape[:2], *plane), y.dtype)
            rows, columns = tile.rows, tile.columns
            whole[
                :, :, s * rows.keep[0] : s * rows.keep[1], s * columns.keep[0] : s * columns.keep[1]
            ] = y[
                :,
                :,
                s * rows.crop.start : s * rows.crop.stop,
                s * columns.crop.start : s * columns.crop.stop,
            ]
        self._states = states
        self.seconds += time.perf_counter() - begin
        assert whole is not None
        return whole


class Codec:
    """A bundle opened in an engine. A context manager; see `open_codec`."""

    def __init__(self, bundle: Path, engine: str, precision: str, device: str) -> None:
        self.bundle = bundle
        self.manifest = Manifest.load(bundle)
        self.why = "asked for"
        if engine == "auto":
            engine, self.why = choose()
        self.engine = open_engine(bundle, self.manifest, engine, device, precision)
        self.device = device

    def encode(self, frames: NDArray[np.float32], *, k: int = 1, grid: Grid | None = None) -> Any:
        """Encode a clip [C, T, H, W] in the model's range to latents [D, t, h, w].

        C is the bundle's channels, H and W multiples of its spatial factor; T may be any
        length: the tail is padded by repeating the last frame. Raises VolumeError for other
        shapes.
        """
        geometry = self.manifest.geometry
        c, t, height, width = _four(frames, "a clip [C, T, H, W]")
        s = geometry.spatial
        if c != geometry.channels or t < 1 or height % s or width % s or not height or not width:
            raise VolumeError(
                f"expected a clip [{geometry.channels}, T, H, W] with H and W multiples of {s}, "
                f"found {list(frames.shape)}: pad it by repeating the edge"
            )
        grid = grid or Grid(height // s, width // s, (height // s, width // s), 0)
        stream = CausalStream(self.engine, self.manifest, "encode", grid)
        pieces = []
        for step in schedule.steps(t, "causal", k, geometry.temporal):
            x = pad_frames(frames[:, slice(*step.slices)], step.depth)
            pieces.append(stream.run(x, step.first)[:, : step.latents[1] - step.latents[0]])
        return np.concatenate(pieces, axis=1)

    def decode(self, latents: NDArray[np.float32], *, k: int = 1, grid: Grid | None = None) -> Any:
        """Decode latents [D, t, h, w] to a clip [C, 1 + 4 (t - 1), H, W] in the model's range.

        Raises VolumeError for another number of latent channels.
        """
        geometry = self.manifest.geometry
        d, t, h, w = _four(latents, "latents [D, t, h, w]")
        if d != geometry.latent_channels or not t or not h or not w:
            raise VolumeError(
                f"expected latents [{geometry.latent_channels}, t, h, w], found "
                f"{list(latents.shape)}: they are of another model"
            )
        stream = CausalStream(self.engine, self.manifest, "decode", grid or Grid(h, w, (h, w), 0))
        slices = 1 + geometry.temporal * (t - 1)
        pieces = []
        for step in schedule.steps(slices, "causal", k, geometry.temporal):
            z = pad_frames(latents[:, slice(*step.latents)], step.frames)
            pieces.append(stream.run(z, step.first)[:, : step.slices[1] - step.slices[0]])
        return np.concatenate(pieces, axis=1)

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


def open_codec(
    model: str | Path = "tiny",
    *,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
) -> Codec:
    """Open a built-in model or a bundle folder.

    Raises BundleError for a missing or damaged bundle and EngineError for an engine, device
    or precision that cannot run here, each with the remedy.
    """
    return Codec(bundle_path(model), engine, precision, device)


def pad_frames(x: NDArray[np.float32], frames: int) -> NDArray[np.float32]:
    """Repeat the last frame of x [C, T, H, W] until there are `frames`."""
    missing = frames - x.shape[1]
    return x if missing <= 0 else np.concatenate([x, x[:, -1:].repeat(missing, axis=1)], axis=1)


def _four(array: NDArray[Any], wanted: str) -> tuple[int, int, int, int]:
    if array.ndim != 4:
        raise VolumeError(f"expected {wanted}, found {array.ndim} dimensions")
    a, b, c, d = array.shape
    return a, b, c, d
