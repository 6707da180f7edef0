"""Nothing is reported to anybody, and nothing is written into the user's home folder."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_a_run_leaves_the_home_folder_empty(engine, tmp_path, write_ct):
    home = tmp_path / "home"
    home.mkdir()
    write_ct(tmp_path / "ct.nii", (16, 16, 5))
    command = [sys.executable, "-m", "fvae_deploy", "reconstruct", str(tmp_path / "ct.nii")]
    command += ["-o", str(tmp_path / "out.nii"), "-e", engine, "-q"]
    kept = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        command, env={**kept, "HOME": str(home)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(home.rglob("*")) == []
