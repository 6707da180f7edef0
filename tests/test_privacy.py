"""Nothing is reported to anybody; nothing but compiled graphs is written into the home folder."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_run_leaves_the_home_folder_empty(engine, compiled, tmp_path, write_ct):
    home = tmp_path / "home"
    home.mkdir()
    write_ct(tmp_path / "ct.nii", (16, 16, 5))
    command = [sys.executable, "-m", "fvae_deploy", "reconstruct", str(tmp_path / "ct.nii")]
    command += ["-o", str(tmp_path / "out.nii"), "-e", engine, "-q"]
    others = ("ORT_DISABLE_TELEMETRY", "FVAE_CACHE", "XDG_CACHE_HOME")
    kept = {k: v for k, v in os.environ.items() if k not in others} | {"FVAE_COMPILED": compiled}
    done = subprocess.run(
        command, env={**kept, "HOME": str(home)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in home.rglob("*") if path.is_file()]
    if engine == "openvino" and compiled == "on":
        assert {path.parent for path in files} == {home / ".cache/fvae/compiled"}
    else:
        assert files == []
