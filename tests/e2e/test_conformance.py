"""Check derived series with dciodvfy and dcentvfy, the DICOM validators of dicom3tools."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from dicom_series import write_series

import fvae_deploy as fvae

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("dtype", ["int16", "float32"])
@pytest.mark.parametrize("source", ["dicom", "nifti"])
def test_a_derived_series_is_a_valid_ct_series(source, dtype, fake_bundle, tmp_path):
    assert shutil.which("dciodvfy"), "needs the Debian package dicom3tools: make e2e"
    fake = {"model": fake_bundle, "engine": "fake"}
    write_series(tmp_path / "ct", (16, 24, 5))
    ct = tmp_path / "ct"
    if source == "nifti":
        ct = tmp_path / "ct.nii"
        fvae.reconstruct(tmp_path / "ct", ct, **fake)
    fvae.reconstruct(ct, tmp_path / "r.dcm", dtype=dtype, **fake)
    files = sorted((tmp_path / "r.dcm").iterdir())
    for command in (["dciodvfy", files[0]], ["dcentvfy", *files]):
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        errors = [text for text in finished.stderr.splitlines() if text.startswith("Error")]
        # Laterality is required for paired body parts; the body part of this series is unknown.
        assert [text for text in errors if "<Laterality>" not in text] == []
        assert "CTImage" in finished.stderr or command[0] == "dcentvfy"
