"""Latent stores that released versions wrote are read by this one, and without fvae at all."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fvae_deploy.storage.latents import LatentReader

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples/read_latents.py"
ARCHIVES = sorted(HERE.glob("stores-*.zip"))
KINDS = ("float32", "float16", "int16", "int8", "bounded")


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.stem)
def stores(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("read_latents", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_an_archive():
    assert ARCHIVES


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_store_is_read(stores, kind):
    wanted = np.load(stores / f"{kind}.npz")
    store = LatentReader(stores / f"{kind}.zarr")
    np.testing.assert_array_equal(store.read(0, store.shape[1]), wanted["latents"])
    np.testing.assert_array_equal(store.info.geometry.affine, wanted["affine"])
    assert (store.info.model, store.info.hu_window) == ("tiny", (-1000, 1000))
    if kind == "bounded":
        slices = store.residuals(0, store.shape[1])
        np.testing.assert_array_equal(np.stack([s.counts for s in slices]), wanted["counts"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_reads_it_without_fvae(stores, kind, example):
    latents, attributes = example.read_latents(stores / f"{kind}.zarr")
    np.testing.assert_array_equal(latents, np.load(stores / f"{kind}.npz")["latents"])
    assert attributes["shape"] == [24, 16, 6]


def test_the_example_runs_as_its_text_says(stores, tmp_path):
    code = "import sys; sys.modules['fvae_deploy'] = None; import runpy; sys.argv = sys.argv[1:]; "
    code += f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    words = ["read_latents.py", stores / "int16.zarr", tmp_path / "z.npy"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert "tiny" in done.stdout
    np.testing.assert_array_equal(
        np.load(tmp_path / "z.npy"), np.load(stores / "int16.npz")["latents"]
    )
