"""Stores written by zarr as other programs write them, and what is read of them."""

import json

import numpy as np
import pytest
import zarr

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.open import open_volume

CT = np.random.default_rng(3).integers(-1024, 3000, (6, 5, 7), np.int16)  # x, y, z

# What `simple` writes: 0.7 x 0.8 x 2.5 mm at (-5, 6, 7) in LPS.
AFFINE = np.array([[-0.7, 0, 0, 5], [0, -0.8, 0, -6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
MILLIMETRES = {
    "millimeter": 1, "micrometer": 1e-3, "nanometer": 1e-6, "centimeter": 10, "meter": 1000,
    "mm": 1, "um": 1e-3, "µm": 1e-3, "cm": 10, "m": 1000, "angstrom": 1e-7, "inch": 25.4, None: 1,
}  # fmt: skip


def axis(name, unit="millimeter", **more):
    kind = {"t": "time", "c": "channel"}.get(name, "space")
    return (
        {"name": name, "type": kind} | ({"unit": unit} if unit and kind == "space" else {}) | more
    )


def scale(*values):
    return {"type": "scale", "scale": list(values)}


def translation(*values):
    return {"type": "translation", "translation": list(values)}


def stored(volume, names):
    """A volume (x, y, z) with the dimensions that `names` lists; t and c have size 1."""
    order = ["xyz".index(name) for name in names if name in "xyz"]
    array = volume.transpose(order)
    for position, name in enumerate(names):
        if name not in "xyz":
            array = np.expand_dims(array, position)
    return array


def ngff(path, levels, axes, common=None, version="0.5", zarr_format=3, **more):
    """Write a multiscale image; `levels` has (path, array, transformations) of each level."""
    key = "coordinateTransformations"
    datasets = [
        {"path": name} | ({key: steps} if steps is not None else {}) for name, _, steps in levels
    ]
    image = {"axes": axes, "datasets": datasets, **more}
    if common is not None:
        image[key] = common
    if version.startswith("0.5"):
        attributes = {"ome": {"version": version, "multiscales": [image]}}
    else:
        attributes = {"multiscales": [image | {"version": version}]}
    group = zarr.create_group(str(path), attributes=attributes, zarr_format=zarr_format)
    for name, array, _ in levels:
        names = {"dimension_names": [a["name"] for a in axes]} if zarr_format == 3 else {}
        try:
            group.create_array(name, data=array, **names)
        except ValueError:  # a test of another number of axes
            group.create_array(name, data=array)
    return group


def simple(path, axes="zyx", transformations=None, volume=CT, **more):
    """Write an image of one level, by default 0.7 x 0.8 x 2.5 mm, at -5, 6, 7 mm."""
    axes = [axis(a) if isinstance(a, str) else a for a in axes]
    names = [a["name"] for a in axes]
    if transformations is None:
        sizes, starts = {"x": 0.7, "y": 0.8, "z": 2.5}, {"x": -5.0, "y": 6.0, "z": 7.0}
        transformations = [
            scale(*(sizes.get(name, 1.0) for name in names)),
            translation(*(starts.get(name, 0.0) for name in names)),
        ]
    return ngff(path, [("0", stored(volume, names), transformations)], axes, **more)


def edit(file, change):
    """Change metadata in JSON in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def voxels(path, **options):
    reader = open_volume(path, **options)
    frames = np.concatenate(list(reader.slabs(2, 3)))
    reader.close()
    return frames.transpose(1, 2, 0)


def affine(path, **options):
    reader = open_volume(path, **options)
    reader.close()
    return reader.geometry.affine


def refusal(path, **options):
    with pytest.raises(VolumeError) as caught:
        voxels(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def public(path):
    """The images of a store as ngff-zarr reads them."""
    ngff_zarr = pytest.importorskip("ngff_zarr", reason="ngff-zarr, of the extra dev, is missing")
    return ngff_zarr.from_ngff_zarr(str(path)).images


def public_affine(image):
    """The affine to RAS of an image without orientations, as ngff-zarr hands it to ITK (LPS)."""
    matrix = np.eye(4)
    units = image.axes_units or {}
    for i, name in enumerate("xyz"):
        unit = MILLIMETRES[units.get(name)]
        matrix[i, i], matrix[i, 3] = image.scale[name] * unit, image.translation[name] * unit
    return np.diag([-1, -1, 1, 1]) @ matrix
