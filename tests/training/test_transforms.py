"""EncodeLatentd and DecodeLatentd: the verbs' values, in dictionaries, in any process."""

from __future__ import annotations

import pickle

import nibabel
import numpy as np
import pytest
import zarr

from fvae_deploy import DecodeLatentd, EncodeLatentd, api
from fvae_deploy.errors import LatentError, VolumeError

OPTIONS = {"engine": "fake"}


@pytest.fixture
def ct(write_ct, tmp_path):
    return write_ct(tmp_path / "ct.nii", (19, 30, 22)), tmp_path / "ct.nii"


def test_the_values_are_those_of_encode_and_decode(fake_bundle, fake_codec, ct, tmp_path):
    values, path = ct
    encode, decode = (t("image", fake_bundle, **OPTIONS) for t in (EncodeLatentd, DecodeLatentd))
    data = {"image": values[None], "label": 3}
    found = encode(data)
    api.encode(path, tmp_path / "z.zarr", codec=fake_codec, latent_dtype="float32")
    expected = zarr.open_array(str(tmp_path / "z.zarr"), mode="r")[:]
    np.testing.assert_array_equal(found["image"], expected)
    assert found["label"] == 3
    assert data["image"].shape == (1, 19, 30, 22)  # the input is not changed
    api.decode(tmp_path / "z.zarr", tmp_path / "out.nii", codec=fake_codec, dtype="float32")
    decoded = decode(found)["image"]
    assert decoded.shape == (1, 19, 30, 22)
    np.testing.assert_array_equal(decoded[0], nibabel.load(tmp_path / "out.nii").get_fdata())


def test_tensors_give_tensors_and_a_copy_works_in_another_process(fake_bundle, ct):
    torch = pytest.importorskip("torch")
    encode = EncodeLatentd(["image"], fake_bundle, **OPTIONS)
    image = torch.from_numpy(ct[0].astype(np.float32))
    found = encode({"image": image})["image"]
    assert isinstance(found, torch.Tensor)
    again = pickle.loads(pickle.dumps(encode))
    assert torch.equal(again({"image": image})["image"], found)
    decoded = DecodeLatentd(["image"], fake_bundle, **OPTIONS)({"image": found})["image"]
    assert tuple(decoded.shape) == (1, 24, 32, 25)  # of the latents: nothing says the CT's own


def test_missing_keys_and_what_is_no_ct_are_refused(fake_bundle, ct):
    encode = EncodeLatentd(("image", "other"), fake_bundle, **OPTIONS)
    with pytest.raises(KeyError, match="other"):
        encode({"image": ct[0]})
    lenient = EncodeLatentd(("image", "other"), fake_bundle, allow_missing_keys=True, **OPTIONS)
    assert set(lenient({"image": ct[0]})) == {"image", "image_latents"}
    encode = EncodeLatentd("image", fake_bundle, **OPTIONS)
    for bad, words in (
        (np.zeros((2, 8, 8, 8)) - 5, "add or remove channels"),
        (np.full((8, 8, 8), np.nan), "finite values"),
        (np.ones((8, 8, 8)), "a CT in HU"),
    ):
        with pytest.raises(VolumeError, match=words):
            encode({"image": bad})
    assert EncodeLatentd("i", fake_bundle, any_range=True, **OPTIONS)({"i": np.ones((8, 8, 8))})


def test_latents_of_another_model_are_refused(fake_bundle, ct):
    found = EncodeLatentd("image", fake_bundle, **OPTIONS)({"image": ct[0]})
    found["image_latents"]["model"] = "other"
    with pytest.raises(LatentError, match="decode with the model that encoded them"):
        DecodeLatentd("image", fake_bundle, **OPTIONS)(found)
