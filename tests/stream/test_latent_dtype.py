"""Latents in fewer bits: what is read again, what it adds in HU, and stores of before."""

from __future__ import annotations

import contextlib
import json
import re
import shutil

import nibabel
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import fvae_deploy as fvae
from fvae_deploy import api
from fvae_deploy.errors import LatentError, UsageError, VolumeError
from fvae_deploy.storage.latents import LatentReader, partial_path
from fvae_deploy.storage.packing import STEPS, pack, unpack
from fvae_deploy.stream.options import LATENT_DTYPES
from fvae_deploy.stream.report import summary

SMALL = ("float16", "int16", "int8")
LATENTS = arrays(np.float32, (3, 2, 4, 5), elements=st.floats(-(2.0**15), 2.0**15, width=16))


@given(LATENTS, st.sampled_from(LATENT_DTYPES))
def test_a_stored_latent_is_half_a_step_off_at_most(z, dtype):
    values, scales = pack(z, dtype)
    assert values.dtype == dtype
    again = unpack(values, scales)
    assert again.dtype == np.float32
    step = np.abs(z) * 2.0**-10 + 2.0**-24  # of float16
    largest = np.abs(z).max(axis=(2, 3), keepdims=True)
    if dtype == "float32":
        step = np.zeros_like(z)
    if dtype == "int8":
        step = largest / 127
    if dtype == "int16":
        step = np.maximum(largest / 32767, z.std(axis=(2, 3), keepdims=True) / STEPS)
    assert (np.abs(again - z) <= step / 2 + 1e-6 * np.abs(z) + 1e-30).all()
    np.testing.assert_array_equal(unpack(*pack(z[:, :1], dtype)), again[:, :1])  # frame by frame


def test_latents_beyond_float16_are_refused():
    z = np.full((1, 1, 2, 2), 70000, np.float32)
    with pytest.raises(VolumeError, match="70000: pass --latent-dtype float32"):
        pack(z, "float16")


@pytest.fixture
def ct(write_ct, tmp_path):
    write_ct(tmp_path / "ct.nii", (19, 21, 50))
    return tmp_path / "ct.nii"


def files(store):
    found = {p.relative_to(store): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    content = json.loads(found.pop(next(p for p in found if str(p) == "zarr.json")))
    content["attributes"].pop("added_error", None)  # a resumed run measures on other slices
    return found, content


@pytest.mark.parametrize("dtype", LATENT_DTYPES)
def test_a_store_is_plain_zarr_and_decodes_as_what_it_holds(fake_codec, ct, tmp_path, dtype):
    exact, store = tmp_path / "exact.zarr", tmp_path / "z.zarr"
    api.encode(ct, exact, codec=fake_codec, latent_dtype="float32")
    api.encode(ct, store, codec=fake_codec, latent_dtype=dtype)
    array = zarr.open_array(str(store), mode="r")
    assert array.dtype == dtype
    z = array[:].astype(np.float32)
    if dtype.startswith("int"):
        z *= zarr.open_array(str(store / "scales"), mode="r")[:][:, :, None, None]
    reader = LatentReader(store)
    np.testing.assert_array_equal(reader.read(0, reader.shape[1]), z)
    np.testing.assert_array_equal(reader.read(3, 5), z[:, 3:5])
    np.testing.assert_array_equal(z, unpack(*pack(zarr.open_array(str(exact), mode="r")[:], dtype)))
    api.decode(store, tmp_path / "out.nii", codec=fake_codec)
    api.decode(exact, tmp_path / "exact.nii", codec=fake_codec)
    a, b = (nibabel.load(tmp_path / f"{name}.nii").get_fdata() for name in ("out", "exact"))
    assert np.abs(a - b).mean() < 6


def test_the_default_is_float16_unmeasured(fake_codec, ct, tmp_path):
    api.encode(ct, tmp_path / "z.zarr", codec=fake_codec)
    report = api.encode(ct, tmp_path / "named.zarr", codec=fake_codec, latent_dtype="float16")
    assert report["added_error"]["slices"] >= 8
    assert files(tmp_path / "z.zarr") == files(tmp_path / "named.zarr")
    attributes = json.loads((tmp_path / "z.zarr/zarr.json").read_text())["attributes"]
    assert attributes["latent_dtype"] == "float16"
    assert attributes["fvae_latents"] == 1  # which older versions read as it is
    assert "added_error" not in attributes


def test_float16_adds_less_than_a_tenth_of_a_hu(tmp_path):
    pytest.importorskip("openvino")
    fvae.write_phantom(tmp_path / "ct.nii", (128, 128, 24))
    report = api.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", latent_dtype="float16")
    assert 0 < report["added_error"]["mean_hu"] < 0.1


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("protocol", ["causal", "windows"])
def test_the_added_error_is_that_of_decoded_volumes(fake_codec, ct, tmp_path, dtype, protocol):
    options = {"codec": fake_codec, "protocol": protocol}
    report = api.encode(ct, tmp_path / "z.zarr", latent_dtype=dtype, **options)
    api.encode(ct, tmp_path / "exact.zarr", latent_dtype="float32", **options)
    for name in ("z", "exact"):
        output = tmp_path / f"{name}.nii"
        api.decode(tmp_path / f"{name}.zarr", output, codec=fake_codec, dtype="float32")
    volumes = [nibabel.load(tmp_path / f"{name}.nii").get_fdata() for name in ("z", "exact")]
    error, added = np.abs(volumes[0] - volumes[1]), report["added_error"]
    count = added["slices"]
    means = [error[..., a : a + count].mean() for a in range(51 - count)]
    nearest = int(np.argmin(np.abs(np.array(means) - added["mean_hu"])))
    assert means[nearest] == pytest.approx(added["mean_hu"], rel=1e-3)
    assert error[..., nearest : nearest + count].max() == pytest.approx(added["max_hu"], rel=1e-3)
    attributes = json.loads((tmp_path / "z.zarr/zarr.json").read_text())["attributes"]
    assert attributes["added_error"] == added
    assert re.search(rf"latents in {dtype} add .* measured on {count} slices", summary(report))


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("slices", [1, 18, 49])
def test_a_resumed_encode_has_the_same_bytes(fake_codec, ct, tmp_path, dtype, slices):
    options = {"codec": fake_codec, "latent_dtype": dtype, "max_error": 9}
    api.encode(ct, tmp_path / "whole.zarr", **options)
    done = 0

    def stop(count):
        nonlocal done
        done += count
        if done >= slices:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        api.encode(ct, tmp_path / "z.zarr", progress=stop, **options)
    other = {"int8": "int16", "int16": "int8", "float16": "float32"}[dtype]
    changed = options | {"latent_dtype": other}
    with pytest.raises(LatentError, match=f"latent_dtype '{dtype}' instead of '{other}'"):
        api.encode(ct, tmp_path / "z.zarr", resume=True, **changed)
    api.encode(ct, tmp_path / "z.zarr", resume=True, **options)
    assert files(tmp_path / "z.zarr") == files(tmp_path / "whole.zarr")


def test_a_partial_store_with_a_bound_is_not_continued_without(fake_codec, ct, tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    options = {"codec": fake_codec, "latent_dtype": "int8"}
    with contextlib.suppress(KeyboardInterrupt):
        api.encode(ct, tmp_path / "z.zarr", progress=stop, max_error=9, **options)
    with pytest.raises(LatentError, match=r"max_error 9.0 instead of None"):
        api.encode(ct, tmp_path / "z.zarr", resume=True, **options)


def change(key, value):
    def damage(store):
        content = json.loads((store / "zarr.json").read_text())
        content["attributes"][key] = value
        (store / "zarr.json").write_text(json.dumps(content))

    return damage


def flip(name):
    def damage(store):
        data = bytearray((store / name).read_bytes())
        data[3] ^= 1
        (store / name).write_bytes(data)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(flip("scales/c/0/2"), "undamaged latent frames 2 to 2", id="a flipped bit"),
        pytest.param(flip("c/0/2/0/0"), "undamaged latent frames 2 to 2", id="of a latent"),
        pytest.param(lambda s: (s / "scales/c/0/2").unlink(), "scales of.*frame 2", id="a file"),
        pytest.param(lambda s: (s / "scales/zarr.json").unlink(), "the scales", id="metadata"),
        pytest.param(change("latent_dtype", "int16"), "latents in int16.*int8", id="a type"),
        pytest.param(change("latent_dtype", "float32"), "latents in float32", id="no scales"),
    ],
)
def test_damage_is_refused(fake_codec, ct, tmp_path, damage, words):
    api.encode(ct, tmp_path / "z.zarr", codec=fake_codec, latent_dtype="int8")
    damage(tmp_path / "z.zarr")
    with pytest.raises(LatentError, match=words):
        api.decode(tmp_path / "z.zarr", tmp_path / "out.nii", codec=fake_codec)
    assert not (tmp_path / "out.nii").exists()
    assert not partial_path(tmp_path / "out.nii").exists()


def test_a_store_of_an_earlier_version_decodes_as_before(fake_codec, ct, tmp_path):
    store, old = tmp_path / "z.zarr", tmp_path / "old.zarr"
    api.encode(ct, store, codec=fake_codec, latent_dtype="float32")
    shutil.copytree(store, old)
    content = json.loads((old / "zarr.json").read_text())
    for name in ("latent_dtype", "max_error", "margin"):
        del content["attributes"][name]
    (old / "zarr.json").write_text(json.dumps(content))
    api.decode(store, tmp_path / "a.nii", codec=fake_codec)
    api.decode(old, tmp_path / "b.nii", codec=fake_codec)
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()


def test_an_unknown_type_is_a_usage_error():
    with pytest.raises(UsageError, match="float32, float16, int16, int8"):
        api.encode("ct.nii", "z.zarr", latent_dtype="int4")
