"""What napari gets: where voxels lie, which axis is which, and a manifest that npe2 accepts."""

from __future__ import annotations

import tomllib
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fvae_deploy import api
from fvae_deploy.errors import FvaeError
from fvae_deploy.storage.latents import LatentReader
from fvae_deploy.viewing import napari_reader
from fvae_deploy.viewing.napari_reader import _cells, get_decoder, get_reader, placed, read
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "fvae_deploy" / "viewing" / "napari.yaml"
LPS = np.diag([-1.0, -1.0, 1.0])
SHAPE = (20, 13, 30)
ORIGIN = [12.5, -80.25, 300.75]
AXES = {  # matrices of RAS affines
    "LPS": np.diag([-0.7, -0.8, 2.5]),
    "RAS": np.diag([0.7, 0.8, 2.5]),
    "RPI": np.diag([0.7, -0.8, -2.5]),
    "coronal": np.array([[-0.7, 0, 0], [0, 0, 2.5], [0, -0.8, 0]]),
    "sagittal": np.array([[0, 0, 2.5], [-0.7, 0, 0], [0, 0.8, 0]]),
    "oblique": np.array([[-0.7, 0.0, 0.05], [0.0, -0.8, 0.1], [0.02, 0.0, 2.5]]),
}


def affine_of(name):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = AXES[name], ORIGIN
    return affine


def world(place, index):
    """Where napari shows a voxel, as x, y, z of LPS millimetres."""
    index = np.array(index, np.float64)
    if "affine" in place:
        matrix = np.asarray(place["affine"])
        return (matrix[:-1, :-1] @ index + matrix[:-1, -1])[-3:][::-1]
    return (np.array(place["scale"]) * index + place["translate"])[-3:][::-1]


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("channels", [(), (4,)], ids=["a CT", "latents"])
def test_every_voxel_is_shown_where_it_lies(name, channels):
    affine, (x, y, z) = affine_of(name), (3, 4, 5)
    frames = np.arange(np.prod([*channels, z, x, y])).reshape(*channels, z, x, y)
    data, place = placed(frames, affine)
    assert ("affine" in place) == (name == "oblique")
    for index in np.ndindex(*data.shape):
        *_, k, i, j = np.argwhere(frames == data[index])[0]
        expected = LPS @ (affine @ [i, j, k, 1])[:3]
        np.testing.assert_allclose(world(place, index), expected, atol=1e-9)
    if name != "oblique":
        assert min(place["scale"]) > 0  # napari refuses no other, but shows it mirrored
        assert len(place["scale"]) == len(place["translate"]) == data.ndim


@pytest.mark.parametrize("suffix", [".nii.gz", ".zarr"])
def test_a_ct_is_read_in_hu_with_z_y_x_in_millimetres(tmp_path, suffix):
    values = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    with create_volume(tmp_path / f"ct{suffix}", Geometry(SHAPE, affine_of("RAS"))) as writer:
        writer.write(values.transpose(2, 0, 1))
    path = str(tmp_path / f"ct{suffix}")
    reader = get_reader(path)
    [(data, about, kind)] = reader(path)
    assert kind == "image"
    assert data.dtype == np.int16
    np.testing.assert_array_equal(data, values.transpose(2, 1, 0)[:, ::-1, ::-1])
    np.testing.assert_allclose(about["scale"], [2.5, 0.8, 0.7], rtol=1e-6)
    # The last voxel along x and y comes first, at -(12.5 + 19 * 0.7) to the left.
    expected = [300.75, 80.25 - 12 * 0.8, -12.5 - 19 * 0.7]
    np.testing.assert_allclose(about["translate"], expected, rtol=1e-6)
    assert about["name"] == f"ct{suffix}"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Latents of a CT in which one block is bright, and that block's place in LPS millimetres."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("latents")
    values = np.full((48, 32, 21), -1000, np.int16)
    values[32:40, 8:16, 9:13] = 1000
    affine = affine_of("LPS")
    nibabel.save(nibabel.Nifti1Image(values, affine), folder / "ct.nii")
    api.encode(folder / "ct.nii", folder / "ct.zarr", model="tiny")
    return folder / "ct.zarr", LPS @ (affine @ [35.5, 11.5, 10.5, 1])[:3]


def test_latents_are_one_layer_whose_cells_lie_over_their_voxels(store):
    path, bright = store
    [(data, about, kind)] = read(str(path))
    latents = LatentReader(path).read(0, 6)
    assert (kind, data.shape) == ("image", (16, 6, 4, 6))
    np.testing.assert_array_equal(data, latents.transpose(0, 1, 3, 2))
    np.testing.assert_allclose(about["scale"], [1, 10, 6.4, 5.6], rtol=1e-6)
    change = np.abs(data - data[:, -1:, -1:, :1]).sum(0)
    cell = np.unravel_index(change.argmax(), change.shape)
    np.testing.assert_allclose(world(about, (0, *cell)), bright, atol=1e-4)
    assert about["metadata"]["model"] == "tiny"


def test_latents_are_decoded_to_hu_on_the_grid_of_the_ct(store, tmp_path):
    path, bright = store
    decode = get_decoder(str(path))
    [(data, about, _)] = decode(str(path))
    api.decode(path, tmp_path / "decoded.nii")
    [(expected, place, _)] = read(str(tmp_path / "decoded.nii"))
    np.testing.assert_array_equal(data, expected)
    assert (about["scale"], about["translate"]) == (place["scale"], place["translate"])
    index = np.argwhere(data > 0).mean(0)
    np.testing.assert_allclose(world(about, index), bright, atol=2)


def test_what_fvae_cannot_read_is_left_to_other_plugins(tmp_path, store):
    (tmp_path / "other.zarr").mkdir()
    assert get_reader(str(tmp_path / "other.zarr")) is None
    assert get_reader([str(store[0])]) is None
    assert get_decoder(str(tmp_path / "other.zarr")) is None
    (tmp_path / "damaged.nii").write_bytes(b"no volume")
    with pytest.raises(FvaeError):
        get_reader(str(tmp_path / "damaged.nii"))(str(tmp_path / "damaged.nii"))


@pytest.mark.parametrize(
    ("latent", "volume", "cells"),
    [
        ((64, 64, 41), (512, 512, 161), (8, 8, 4)),
        ((3, 2, 9), (20, 13, 30), (8, 8, 4)),
        ((32, 32, 41), (512, 512, 160), (16, 16, 4)),
        ((16, 16, 21), (512, 512, 161), (32, 32, 8)),
        ((64, 64, 160), (512, 512, 160), (8, 8, 1)),
        ((64, 64, 51), (512, 512, 195), (8, 8, 4)),  # three windows of 65 slices
        ((30, 30, 16), (90, 90, 64), (3, 3, 4)),
    ],
)
def test_the_size_of_a_cell_follows_from_the_shapes(latent, volume, cells):
    assert _cells(latent, volume) == cells


def test_the_manifest_is_an_entry_point_and_names_functions_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, file = project["project"]["entry-points"]["napari.manifest"][
        "fvae-deploy"
    ].partition(":")
    assert ROOT / Path(*module.split(".")) / file == MANIFEST
    assert file in project["tool"]["setuptools"]["package-data"][module]
    yaml = pytest.importorskip("yaml")
    contents = yaml.safe_load(MANIFEST.read_text())
    assert contents["name"] == project["project"]["name"]
    commands = contents["contributions"]["commands"]
    for command in commands:
        module, _, name = command["python_name"].partition(":")
        assert module == napari_reader.__name__
        assert callable(getattr(napari_reader, name))
    assert {r["command"] for r in contents["contributions"]["readers"]} == {
        c["id"] for c in commands
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of npe2 about pydantic
def test_npe2_accepts_the_manifest_and_reads_with_it(store):
    npe2 = pytest.importorskip("npe2", reason="npe2 is not installed")
    manager = npe2.PluginManager()
    manifest = npe2.PluginManifest.from_file(MANIFEST)
    manager.register(manifest)
    path = str(store[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npe2.PluginManager, "instance", classmethod(lambda cls: manager))
        [(data, _, kind)] = npe2.read([path], stack=False)
        assert (kind, data.ndim) == ("image", 4)
        [(data, _, _)] = npe2.read([path], stack=False, plugin_name="fvae-deploy.decode")
        assert data.ndim == 3
