"""Kernels in Triton's interpreter against their references, and what refuses.

The interpreter is chosen when Triton is imported, so it has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="kernels' references are torch's")
pytest.importorskip("triton", reason="kernels need triton: pip install 'fvae-deploy[kernels]'")

from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.kernels import causal_conv3d  # noqa: E402
from fvae_deploy.kernels.causal_conv3d import SAME, Window  # noqa: E402
from fvae_deploy.kernels.dispatch import Kernels  # noqa: E402
from fvae_deploy.kernels.trials import TOLERANCE, TRIALS  # noqa: E402

ALL = """
import json, torch
from fvae_deploy.kernels.trials import TOLERANCE, TRIALS, worst
print(json.dumps({str(d): {t.name: worst(t, "cpu", d) for t in TRIALS} for d in TOLERANCE}))
"""


def interpreted(code: str) -> str:
    """Run code in a process where kernels are interpreted; its output."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(interpreted(ALL))
    return found


# bfloat16: the interpreter's own products are wrong, so that they are taken in float32 there.
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [trial.name for trial in TRIALS])
def test_a_kernel_equals_its_reference_and_stays_inside_its_tensors(errors, name, dtype):
    assert errors[str(dtype)][name] <= TOLERANCE[dtype]


def test_a_trial_notices_a_write_outside_and_a_wrong_value():
    out = interpreted(
        """
import torch
from fvae_deploy.kernels.trials import Trial, worst

def outside(source):
    view = source.normal(2, 3, 4)
    view.as_strided((1,), (1,), view.storage_offset() - 1).fill_(0)
    yield view, view

def wrong(source):
    view = source.normal(2, 3, 4)
    yield view, view + 0.1

for bad in (outside, wrong):
    print(worst(Trial("", bad), "cpu", torch.float32))
"""
    )
    past, off = map(float, out.split())
    assert past == float("inf")
    assert 0.01 < off < 1


def test_a_box_outside_the_image_is_refused():
    x, weight = torch.zeros(1, 8, 8, 16), torch.zeros(3, 3, 3, 16, 16)
    with pytest.raises(ValueError, match="expected a box inside 8x8, found"):
        causal_conv3d.launch(x, weight, window=SAME, box=(0, 9, 0, 8))


def test_channels_that_are_not_last_are_refused():
    x = torch.zeros(1, 16, 8, 8).movedim(1, -1)
    with pytest.raises(ValueError, match="expected x with channels last"):
        causal_conv3d.launch(x, torch.zeros(1, 1, 1, 16, 16), window=Window())


def test_the_reference_computes_where_there_is_no_gpu():
    kernels = Kernels("cpu")
    assert not kernels.triton
    x, weight = torch.randn(2, 5, 6, 4), torch.randn(3, 3, 3, 4, 8)
    y, state = kernels.causal_conv3d(x, weight, window=SAME)
    assert y.shape == (2, 5, 6, 8)
    assert torch.equal(state, x)


def test_kernels_are_not_run_on_a_cpu():
    with pytest.raises(EngineError, match="expected a GPU for Triton kernels, found device cpu"):
        Kernels("cpu", "triton")


def test_an_unknown_backend_is_refused():
    with pytest.raises(EngineError, match="expected kernels auto, reference, triton, found 'cuda'"):
        Kernels("cpu", "cuda")
