from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from engine_contract import Array, EngineContract, Reference, Stream, sample
from fake_engine import GRAIN, write_fake_bundle
from scipy.ndimage import convolve

from fvae_deploy.engines.base import open_engine
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Manifest


def box(plane: Array) -> Array:
    return convolve(plane.astype(float), np.full((1, 3, 3), 1 / 9), mode="constant")


def later(x: Array) -> Array:
    """Shift by one latent frame; the first is zero."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


class WholeClip:
    """The formulas of the fake engine's docstring, on whole clips."""

    def encode(self, x: Array) -> Array:
        gray = x[0].astype(float).mean(axis=0)
        frames = [gray[:1], *np.split(gray[1:], len(gray) // 4)] if len(gray) > 1 else [gray]
        h, w = gray.shape[1] // 8, gray.shape[2] // 8
        mean = np.array([f.reshape(-1, h, 8, w, 8).mean(axis=(0, 2, 4)) for f in frames])
        return np.stack([mean, later(mean), box(mean)])[None]

    def decode(self, z: Array) -> Array:
        a, b, c = z[0].astype(float)
        cells = a + (box(b) + c - 2 * later(a)) / 16
        frames = [np.kron(cells[0], np.ones((8, 8))) * (1 + np.tile(GRAIN[0], cells.shape[1:]))]
        for cell in cells[1:]:
            for grain in GRAIN:
                frames.append(np.kron(cell, np.ones((8, 8))) * (1 + np.tile(grain, cell.shape)))
        return np.array(frames)[None, None]


class TestFake(EngineContract):
    engine_name = "fake"
    tolerance = 1e-6

    @pytest.fixture(scope="class")
    @classmethod
    def bundle(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("bundles") / "fake"
        write_fake_bundle(folder)
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls) -> Reference:
        return WholeClip()

    def test_three_channels_are_averaged_and_returned_equal(self, tmp_path: Path) -> None:
        manifest = write_fake_bundle(tmp_path / "rgb", channels=3)
        engine = open_engine(tmp_path / "rgb", manifest, "fake")
        x = sample(manifest, "encode", 1, 2, 2)
        z = Stream(engine, manifest, "encode").push_all(x, (1,))
        np.testing.assert_allclose(z, WholeClip().encode(x), atol=1e-6)
        y = Stream(engine, manifest, "decode").push_all(z, (1,))
        assert y.shape == x.shape
        np.testing.assert_array_equal(y[:, :1], y[:, 2:])

    def test_a_real_bundle_is_refused(self, bundle: Path, manifest: Manifest) -> None:
        other = dataclasses.replace(manifest, network=Network("lean_vae", {}))
        with pytest.raises(EngineError, match="family fake, found lean_vae"):
            open_engine(bundle, other, "fake")

    def test_another_precision_is_refused(self, bundle: Path, manifest: Manifest) -> None:
        with pytest.raises(EngineError, match="fp32, found cpu and bf16"):
            open_engine(bundle, manifest, "fake", precision="bf16")
