"""CTs that nothing can be calibrated with are refused before anything is exported or built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("openvino", reason="needs the cpu extra")

from fvae_deploy.engines import int8
from fvae_deploy.errors import VolumeError
from fvae_deploy.make.bundle import make_bundle
from fvae_deploy.make.engines import make_engines

SHAPE = (16, 24, 21)
BAD = {
    "missing": (None, "found no"),
    "air": (np.full(SHAPE, -1000), "found -1000 HU everywhere in the middle of"),
    "zeros": (np.zeros(SHAPE), "found 0 HU everywhere in the middle of"),
    "mask": (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 3, "mask, another modality"),
    "normalised": (np.linspace(-1, 1, np.prod(SHAPE)).reshape(SHAPE), "were they normalised"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_ct_that_shows_nothing_is_refused_first(kind: str, write_ct: Any, tmp_path: Path) -> None:
    if not int8.supported():
        pytest.skip("needs a CPU with VNNI")
    good, bad = tmp_path / "good.nii", tmp_path / "bad.nii"
    write_ct(good, SHAPE)
    values, reason = BAD[kind]
    if values is not None:
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), bad)
    with pytest.raises(VolumeError, match=reason) as found:
        make_bundle(tmp_path / "no such weights", tmp_path / "bundle", calibration=[good, bad])
    assert "--any-range" not in str(found.value)  # which export does not have
    with pytest.raises(VolumeError, match=reason):
        make_engines("no such bundle", ["sm_89"], ["int8"], calibration=[good, bad])
    assert not (tmp_path / "bundle").exists()
