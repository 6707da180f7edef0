"""The example of an engine passes what every engine passes, and runs the command line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from engine_contract import EngineContract

from fvae_deploy.engines.base import ENGINES, Entry, open_engine
from fvae_deploy.errors import EngineError

pytest.importorskip("onnx", reason="needs the export extra")

EXAMPLE = Path(__file__).parents[2] / "examples" / "reference_engine.py"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """Offer the example as an engine to the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE.parent)
        patch.setitem(ENGINES, "reference", Entry("reference_engine", ("onnx",), ""))
        yield


class TestReference(EngineContract):
    engine_name = "reference"

    def test_another_precision_is_refused(self, bundle, manifest):
        with pytest.raises(EngineError, match="fp32, found cpu and bf16: use --device cpu"):
            open_engine(bundle, manifest, "reference", precision="bf16")


def test_it_reconstructs_from_the_command_line_as_openvino_does(write_ct, tmp_path):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("needs openvino")
    write_ct(tmp_path / "ct.nii", (24, 17, 10))
    made = []
    for program, engine in ((EXAMPLE, "reference"), ("-m fvae_deploy", "openvino")):
        output = tmp_path / f"{engine}.nii"
        words = [*str(program).split(), "reconstruct", tmp_path / "ct.nii", "-o", output]
        words += ["--engine", engine, "--dtype", "float32", "--json", tmp_path / "report.json"]
        done = subprocess.run(
            [sys.executable, *map(str, words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f'"engine": "{engine}"' in (tmp_path / "report.json").read_text()
        made.append(np.asarray(nibabel.load(output).dataobj))
    np.testing.assert_allclose(*made, rtol=0, atol=0.05)
    assert made[0].std() > 100


def test_doctor_lists_an_engine_that_a_program_added():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "  reference    runs: fp32\n" in done.stdout
    assert "reference --device" not in done.stdout
