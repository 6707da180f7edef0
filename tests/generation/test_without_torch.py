"""`fvae generate` runs where torch and diffusers are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs the dev extra")

ABSENT = ("torch", "diffusers", "transformers")
# A module that is None in sys.modules is found and imported as one that is not installed.
PROGRAM = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None
from fvae_deploy.cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("openvino", ["--eta", "1"]),
        ("onnxruntime", ["--stitch", "reference"]),
        ("openvino", ["--scheduler", "dpmsolver++", "--guidance", "2"]),
        ("openvino", ["--scheduler", "unipc"]),
    ],
    ids=["joint", "reference", "dpmsolver++", "unipc"],
)
def test_a_ct_is_generated_without_torch_and_diffusers(tmp_path: Path, engine, options):
    pytest.importorskip(engine, reason="needs the cpu extra")
    labels = np.zeros((12, 12, 5), np.uint8)
    labels[3:9, 3:9] = 5
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([3, 3, 5, 1.0])), tmp_path / "mask.nii")
    command = ["generate", "--mask", "mask.nii", "-o", "ct.nii", "-e", engine, "--steps", "2", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = np.asarray(nibabel.load(tmp_path / "ct.nii").dataobj)
    assert made.shape == labels.shape
    assert made.std() > 1
