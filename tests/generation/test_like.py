"""`--like`: the organs of a CT from TotalSegmentator, for which a small program stands in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fvae_deploy.errors import ConditionError, VolumeError
from fvae_deploy.generation.segmenting import SegmentedCt

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
PROGRAM = """#!{python}
import sys
import nibabel, numpy
assert sys.argv[1::2] == ["-i", "-o", "--ml"], sys.argv
image = nibabel.load(sys.argv[2])
hu = numpy.asarray(image.dataobj)
assert hu.dtype == numpy.int16
{change}
"""
WRITE = """labels = (hu > 0).astype(numpy.uint8) * 5
nibabel.save(nibabel.Nifti1Image(labels[:{cut}], image.affine), sys.argv[4])"""


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    hu = np.random.default_rng(0).integers(-1000, 900, (9, 8, 7)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(hu, AFFINE), tmp_path / "ct.nii")
    return tmp_path / "ct.nii"


def install(folder: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir()
    program = folder / "bin" / "TotalSegmentator"
    program.write_text(PROGRAM.format(python=sys.executable, change=change))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_the_organs_come_from_the_program_and_nothing_is_left(ct, tmp_path, monkeypatch):
    install(tmp_path, WRITE.format(cut=""), monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reader = SegmentedCt(ct)
    labels = np.concatenate([*reader.slabs(3)]).transpose(1, 2, 0)
    np.testing.assert_array_equal(labels, (np.asarray(nibabel.load(ct).dataobj) > 0) * 5)
    np.testing.assert_allclose(reader.geometry.affine, AFFINE)
    assert reader.remarks == ("The organs are those that TotalSegmentator found.",)
    reader.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "ct.nii"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sys.exit('no licence')", "no licence"),
        ("pass", "exit code 0"),
        (WRITE.format(cut="8"), "another grid"),
    ],
)
def test_a_program_that_fails_is_told(change, words, ct, tmp_path, monkeypatch):
    install(tmp_path, change, monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConditionError, match=words):
        SegmentedCt(ct)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "ct.nii"]


def test_without_the_program_a_mask_is_asked_for(ct, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConditionError, match=r"pip install TotalSegmentator, or give .* --mask"):
        SegmentedCt(ct)


def test_no_ct_is_told_before_the_program_runs(tmp_path, monkeypatch):
    install(tmp_path, "pass", monkeypatch)
    with pytest.raises(VolumeError):
        SegmentedCt(tmp_path / "none.nii")
