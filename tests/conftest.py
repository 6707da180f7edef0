from __future__ import annotations

import fcntl
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fake_engine
import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from fvae_deploy.engines.base import ENGINES
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume

# Tests that import OpenVINO directly must not send usage data to Intel either.
sys.modules.setdefault("openvino_telemetry", None)

if TYPE_CHECKING:
    from fvae_deploy.export.models.lean_vae import LeanVAE

# The test networks are tiny. On a busy machine, torch's threads would spend 20 times longer waiting
# for each other than computing. Must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests compile what they test, and leave the user's cache alone.
os.environ.setdefault("FVAE_COMPILED", "off")

pytest.register_assert_rewrite("engine_contract")

# torch's exporter makes millions of objects that live on: looking through all of them for garbage,
# again and again, takes a fifth of an export's time.
gc.set_threshold(100_000, 20, 100)

# A slow example on a busy machine is no defect of the code.
settings.register_profile("fvae", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fvae")

TILTED = np.array(
    [[-0.7, 0.0, 0.05, 120.5], [0.0, -0.8, 0.1, 95.25], [0.02, 0.0, 2.5, -300.75], [0, 0, 0, 1]]
)


def _built_once(
    name: str, build: Callable[[Path], object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder that is built once, by the first pytest process that needs it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / name).exists():
            build(base / name)
    return base / name


@pytest.fixture(scope="session")
def small_model() -> LeanVAE:
    """A three-channel LeanVAE with random weights, small enough to export in seconds."""
    pytest.importorskip("torch", reason="needs the export extra")
    from random_lean_vae import SMALL, random_lean_vae

    return random_lean_vae(SMALL, seed=0)


@pytest.fixture(scope="session")
def small_bundle(small_model: LeanVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model exported for CT, shared by all tests: read only."""
    pytest.importorskip("onnxscript", reason="needs the export extra")
    from random_lean_vae import SMALL_SCALE

    from fvae_deploy.export.bundle import Source
    from fvae_deploy.export.draft import LoadedModel
    from fvae_deploy.export.models.lean_vae_parts import lean_vae_model
    from fvae_deploy.export.to_onnx import export_bundle

    def build(folder: Path) -> None:
        model = lean_vae_model(small_model, 1, SMALL_SCALE)
        source = Source("random", "0", "0" * 64)
        loaded = LoadedModel(model, source, "small", "random weights", "Apache-2.0")
        export_bundle(loaded, folder, version="0.1.0")

    return _built_once("small", build, tmp_path_factory)


@pytest.fixture(scope="session")
def small_generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported generator with random weights, for the latents of `tiny`: read only."""
    for package in ("onnxscript", "transformers", "diffusers", "openvino"):
        pytest.importorskip(package, reason="needs the export extra")
    from small_generator import write_weights

    from fvae_deploy.make.bundle import make_generator_bundle

    weights = tmp_path_factory.mktemp("weights") / "small.safetensors"
    return _built_once(
        "small_generator",
        lambda folder: make_generator_bundle(write_weights(weights), folder),
        tmp_path_factory,
    )


@pytest.fixture(scope="session", autouse=True)
def _fake_engine() -> Iterator[None]:
    """Offer the fake engine to all tests and to the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        fake_engine.register(patch)
        yield


@pytest.fixture
def shipped_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer only the engines that users have."""
    monkeypatch.delitem(ENGINES, "fake")


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the fake engine: read only."""
    folder = tmp_path_factory.mktemp("bundles") / "fake"
    fake_engine.write_fake_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def fake_codec(fake_bundle: Path) -> Iterator[Codec]:
    """A codec with the fake engine."""
    with open_codec(fake_bundle, engine="fake") as codec:
        yield codec


@pytest.fixture(scope="session")
def write_ct() -> Callable[..., Any]:
    """Return a function that writes a CT of random HU, some outside [-1000, 1000]."""
    return _write_ct


def _write_ct(
    path: Path,
    shape: tuple[int, int, int],
    seed: int = 0,
    dtype: str = "int16",
    low: int = -1200,
    high: int = 1100,
) -> np.ndarray:
    """Write a CT with nibabel, or with our own writer for Zarr; return the voxels."""
    values = np.random.default_rng(seed).integers(low, high, shape).astype(dtype)
    if dtype != "int16":
        values += np.asarray(0.25, dtype)
    values[0, 0, 0] = low  # recognised as CT with every seed
    if path.name.endswith(".zarr"):
        with create_volume(path, Geometry(shape, TILTED), dtype) as writer:
            writer.write(values.transpose(2, 0, 1))
        return values
    image = nibabel.Nifti1Image(values, TILTED)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(np.diag([-0.7, -0.8, 2.5, 1.0]), code=1)
    image.set_sform(TILTED, code=2)
    nibabel.save(image, path)
    return values
