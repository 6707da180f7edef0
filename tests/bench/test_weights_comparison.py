"""The comparison with JPEG-LS counts bits and errors as it says."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import weights_comparison as comparison
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays


@given(arrays.arrays(np.float32, (3, 2, 4, 5), elements=st.floats(-9, 9, width=32)))
@settings(max_examples=30)
def test_latents_are_rounded_to_256_steps_of_each_channel(z: np.ndarray) -> None:
    found = comparison.rounded(z)
    for before, after in zip(z, found, strict=True):
        assert len(np.unique(after)) <= 256
        half = (before.max() - before.min()) / 255 / 2
        assert np.abs(after - before).max() <= half + 1e-5


@pytest.mark.parametrize("bits", [0.5, 4.0, 40.0])
def test_jpeg_ls_takes_the_smallest_bound_of_no_more_bits(bits: float) -> None:
    imagecodecs = pytest.importorskip("imagecodecs", reason="pip install imagecodecs")
    noise = np.random.default_rng(0).normal(0, 40, (3, 64, 48)).cumsum(axis=2)
    hu = np.rint(np.clip(noise, -1000, 1000)).astype(np.float32)
    result, used, bound = comparison.jpeg_ls(hu, bits)
    assert np.abs(result - hu).max() <= bound
    assert used <= bits or bound == 255

    def size(level: int) -> float:
        slices = (hu + 1000).astype(np.uint16)
        return 8 * sum(len(imagecodecs.jpegls_encode(s, level=level)) for s in slices) / hu.size

    assert used == pytest.approx(size(bound))
    assert not bound or size(bound - 1) > bits


def test_a_table_has_a_row_for_each_method_on_each_ct(tmp_path: Path) -> None:
    pytest.importorskip("imagecodecs", reason="pip install imagecodecs")
    pytest.importorskip("openvino")
    hu = np.random.default_rng(1).normal(-200, 300, (20, 28, 6)).round().astype(np.int16)
    path = tmp_path / "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(hu, np.eye(4)), path)
    network, jpeg = comparison.rows([path], ["tiny"], "openvino")
    assert (network.ct, network.method) == ("ct", "tiny")
    assert jpeg.method.startswith("JPEG-LS at the bits of tiny, bound ")
    # 6 slices are 3 latent frames of 3 x 4 cells and 16 channels.
    assert network.bits_per_voxel == pytest.approx(8 * 3 * 3 * 4 * 16 / hu.size)
    assert jpeg.max <= 255
    assert 0 < network.mae <= network.p99 <= network.max
