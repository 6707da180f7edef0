"""A finding put into a phantom by the built-in generator, as benchmarks/inpainting.py does."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

for package in ("tokenizers", "openvino"):
    pytest.importorskip(package, reason="needs the dev extra")
import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.phantom.patient import varied  # noqa: E402

SHAPE, SEED = (128, 128, 65), 400


def test_a_consolidation_appears_where_it_is_asked_for_and_the_rest_stays(tmp_path):
    ct, organs, out = (tmp_path / f"{name}.nii" for name in ("ct", "organs", "out"))
    fvae.write_phantom(ct, SHAPE, organs, patient=varied(SEED, findings=()), seed=SEED)
    report = fvae.generate(
        organs, out, like=ct, change="lesion", lesions="consolidation", seed=SEED,
        keep_original=True, labels_out=tmp_path / "added.nii", check=True,
    )  # fmt: skip
    before, after, added = (
        np.asarray(nibabel.load(path).dataobj, np.float64)
        for path in (ct, out, tmp_path / "added.nii")
    )
    inside = added > 0
    assert inside.sum() > 500
    assert before[inside].mean() < -600
    assert -150 < after[inside].mean() < 150  # the phantom's own are -20 to 45 HU
    assert report["checks"]["passed"]
    away = distance_transform_edt(~inside, sampling=nibabel.load(ct).header.get_zooms())
    change = np.abs(after - before)
    assert change[away > 60].mean() < 1
    assert (change[away > 180] == 0).all()
    assert (change == 0).mean() > 0.9
