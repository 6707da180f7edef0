"""The public face: what `import fvae_deploy as fvae` offers, as the documents show it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fvae_deploy as fvae
from fvae_deploy.errors import BundleError, EngineError, PlanError, UsageError


@pytest.fixture
def ct(write_ct, tmp_path):
    write_ct(tmp_path / "ct.nii.gz", (20, 13, 30))
    return tmp_path / "ct.nii.gz"


@pytest.fixture
def fake(fake_bundle):
    return {"model": fake_bundle, "engine": "fake"}


def voxels(path):
    return np.concatenate([*fvae.open_volume(path).slabs(16)])


@pytest.mark.parametrize("name", fvae.__all__)
def test_every_public_name_is_there(name):
    assert getattr(fvae, name) is not None


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'teleport'"):
        fvae.teleport  # noqa: B018


def test_a_codec_encodes_and_decodes_arrays():
    pytest.importorskip("openvino")
    frames = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 6, 16, 24)).astype(np.float32)
    with fvae.open_codec("tiny") as codec:
        z = codec.encode(frames)
        x = codec.decode(z)
    assert (z.dtype, z.shape) == (np.float32, (16, 3, 2, 3))
    assert (x.dtype, x.shape) == (np.float32, (1, 9, 16, 24))


def test_a_ct_goes_through_latents_to_the_same_voxels_as_in_one_stream(ct, fake, tmp_path):
    fvae.encode(ct, tmp_path / "z.zarr", latent_dtype="float32", **fake)
    fvae.decode(tmp_path / "z.zarr", tmp_path / "a.nii", **fake)
    fvae.reconstruct(ct, tmp_path / "b.nii", **fake)
    np.testing.assert_array_equal(voxels(tmp_path / "a.nii"), voxels(tmp_path / "b.nii"))


def test_paths_may_be_strings_and_memory_text_or_bytes(ct, fake, tmp_path):
    text = fvae.reconstruct(str(ct), str(tmp_path / "a.nii"), memory="1GiB", **fake)
    number = fvae.reconstruct(ct, tmp_path / "b.nii", memory=2**30, **fake)
    assert text["plan"] == number["plan"]
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()


def test_reports_are_json_and_repeat_the_call(ct, fake, tmp_path):
    report = fvae.encode(ct, tmp_path / "z.zarr", step=2, **fake)
    assert json.loads(json.dumps(report)) == report
    assert report["command"] == "encode"
    assert report["plan"]["latent_frames_per_step"] == 2
    assert report["model"]["name"] == "fake"


def test_a_store_names_the_built_in_model_that_decodes_it(ct, tmp_path):
    pytest.importorskip("openvino")
    fvae.encode(ct, tmp_path / "z.zarr")
    report = fvae.decode(tmp_path / "z.zarr", tmp_path / "a.nii", slices=(3, 9))
    assert report["model"]["name"] == "tiny"
    assert report["volume"]["slices"] == 6


def test_a_comparison_finds_a_copy_to_be_the_same(ct):
    found = fvae.compare(ct, ct)
    assert (found.max, found.psnr) == (0, np.inf)


def test_a_volume_can_be_written_and_read_slab_by_slab(ct, tmp_path):
    reader = fvae.open_volume(ct)
    with fvae.create_volume(tmp_path / "copy.zarr", reader.geometry) as writer:
        for slab in reader.slabs(7):
            writer.write(slab)
    np.testing.assert_array_equal(voxels(tmp_path / "copy.zarr"), voxels(ct))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param({"memory": "plenty"}, UsageError, id="memory that is no amount"),
        pytest.param({"memory": 1}, PlanError, id="memory that cannot do"),
        pytest.param({"protocol": "x"}, UsageError, id="an unknown protocol"),
        pytest.param({"step": 0}, UsageError, id="steps of nothing"),
        pytest.param({"dtype": "int8"}, UsageError, id="an unknown dtype"),
        pytest.param({"engine": "x"}, EngineError, id="an unknown engine"),
        pytest.param({"precision": "x"}, EngineError, id="an unknown precision"),
        pytest.param({"device": "x"}, EngineError, id="an unknown device"),
        pytest.param({"model": "x"}, BundleError, id="an unknown model"),
    ],
)
def test_an_option_that_cannot_be_is_one_error_of_the_tree(ct, fake, tmp_path, options, error):
    with pytest.raises(error) as caught:
        fvae.reconstruct(ct, tmp_path / "out.nii", **{**fake, **options})
    assert isinstance(caught.value, fvae.FvaeError)
    assert [p.name for p in tmp_path.iterdir()] == ["ct.nii.gz"]
