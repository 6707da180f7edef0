"""Compare kernels in Triton's interpreter with their references, and check their errors.

Triton selects the interpreter when it is imported, so the interpreter runs in its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="kernels' references are torch's")
pytest.importorskip("triton", reason="kernels need triton: pip install 'fvae-deploy[kernels]'")

from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.kernels import attention, causal_conv3d, depthwise_conv3d, trials  # noqa: E402
from fvae_deploy.kernels.blocks import Blocks  # noqa: E402
from fvae_deploy.kernels.causal_conv3d import SAME, Window  # noqa: E402
from fvae_deploy.kernels.dispatch import KERNELS, Kernels  # noqa: E402
from fvae_deploy.kernels.trials import TOLERANCE, TRIALS, Trial, worst  # noqa: E402

ALL = """
import json, torch
from fvae_deploy.kernels.trials import TOLERANCE, TRIALS, worst
trials = [trial for of_kernel in TRIALS.values() for trial in of_kernel]
print(json.dumps({str(d): {t.name: worst(t, "cpu", d) for t in trials} for d in TOLERANCE}))
"""


def interpreted(code: str) -> str:
    """Run code in a process with interpreted kernels; return its output."""
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
    largest: dict[str, dict[str, float]] = json.loads(interpreted(ALL))
    return largest


# The interpreter multiplies bfloat16 wrongly; kernels multiply in float32 there.
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [trial.name for each in TRIALS.values() for trial in each])
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


def test_trials_that_break_or_are_wrong_are_reported_and_the_others_run(monkeypatch):
    def broken(source):
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")
        yield

    def sound(source):
        view = source.normal(2, 3, 4)
        yield view, view

    def poisoned(source):
        view = source.blank(2, 3, 4)
        yield view, view

    three = tuple(Trial(f.__name__, f) for f in (broken, sound, poisoned))
    monkeypatch.setattr(trials, "TRIALS", {"attention": three})
    results = [f for f in trials.run_trials(["attention"], "cpu", "sm_80") if f.type == "float32"]
    assert [f.passed for f in results] == [False, True, False]
    assert results[0].failure == "RuntimeError: out of resource: shared memory Required: 300000"
    assert "NaN" in results[2].failure


def test_a_trial_of_all_blocks_launches_each_of_them():
    seen = []

    def run(source):
        view = source.normal(2, 3, 4)
        source.how["choose"]("alike", [Blocks(16, 16), Blocks(32, 16)], seen.append)
        source.how["choose"]("other", [Blocks(64, 16)], seen.append)
        yield view, view

    worst(Trial("", run), "cpu", torch.float32, every=True)
    assert [blocks.rows for blocks in seen] == [16, 64, 32, 64]


def test_every_kernel_has_trials():
    assert set(TRIALS) == set(KERNELS)


@pytest.mark.parametrize(
    ("hip", "architecture", "chip"),
    [
        (None, "NVIDIA H100 80GB HBM3", "sm_90"),  # the name in torch 2.11
        ("7.0", "gfx942:sramecc+:xnack-", "gfx942"),
    ],
)
def test_a_gpu_is_known_by_its_architecture(monkeypatch, hip, architecture, chip):
    properties = SimpleNamespace(gcnArchName=architecture, major=9, minor=0)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert Kernels("cuda", "auto").target == chip


def test_float32_is_float32_on_a_gpu():
    code = """
import warnings; warnings.simplefilter("error")
import torch
from fvae_deploy.kernels.dispatch import compute_in_float32
compute_in_float32()
assert getattr(torch.backends.cudnn, "conv", None) is None or (
    torch.backends.cudnn.conv.fp32_precision != "tf32"
)
# torch.export reads these settings, and fails if they contradict the newer ones.
assert not torch.backends.cudnn.allow_tf32
assert not torch.backends.cuda.matmul.allow_tf32
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_box_outside_the_image_is_refused():
    x, weight = torch.zeros(1, 8, 8, 16), torch.zeros(3, 3, 3, 16, 16)
    with pytest.raises(ValueError, match="expected a box inside 8x8, found"):
        causal_conv3d.launch(x, weight, window=SAME, box=(0, 9, 0, 8))


def test_channels_that_are_not_last_are_refused():
    x = torch.zeros(1, 16, 8, 8).movedim(1, -1)
    with pytest.raises(ValueError, match="expected x with channels last"):
        causal_conv3d.launch(x, torch.zeros(1, 1, 1, 16, 16), window=Window())


@pytest.mark.parametrize(
    ("name", "shape"),
    [("state", (2, 8, 7, 16)), ("state", (1, 8, 8, 16)), ("residual", (1, 8, 8, 8))],
)
def test_tensors_of_other_shapes_are_refused_before_a_kernel_reads_past_them(name, shape):
    x, weight, tensor = torch.zeros(1, 8, 8, 16), torch.zeros(3, 3, 3, 16, 16), torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"expected {name} \[.*\], found \[{shape[0]}, "):
        causal_conv3d.launch(x, weight, window=SAME, **{name: tensor})
    if name == "state":
        taps, bias = torch.zeros(27, 16), torch.zeros(16)
        with pytest.raises(ValueError, match=r"expected state \[2, 8, 8, 16\], found"):
            depthwise_conv3d.launch(x, taps, bias, state=tensor)


def test_the_reference_computes_where_there_is_no_gpu():
    kernels = Kernels("cpu")
    assert not kernels.triton
    x, weight = torch.randn(2, 5, 6, 4), torch.randn(3, 3, 3, 4, 8)
    y, state = kernels.causal_conv3d(x, weight, window=SAME)
    assert y.shape == (2, 5, 6, 8)
    assert torch.equal(state, x)


@pytest.mark.parametrize("width", [8, 24, 224, 640, 1024])
def test_torch_computes_heads_that_the_kernel_does_not_take(width):
    kernels = Kernels("cpu")
    kernels.triton = True  # launching a kernel would fail on this CPU
    q, k, v = torch.randn(3, 1, 5, 2, width)
    expected = attention.reference(q, k, v)
    torch.testing.assert_close(kernels.attention(q, k, v), expected)
    with pytest.raises(ValueError, match=f"sum of two of these, found {width}"):
        attention.launch(q, k, v)


def test_kernels_are_not_run_on_a_cpu():
    with pytest.raises(EngineError, match="expected a GPU for Triton kernels, found device cpu"):
        Kernels("cpu", "triton")


def test_an_unknown_backend_is_refused():
    with pytest.raises(EngineError, match="expected kernels auto, reference, triton, found 'cuda'"):
        Kernels("cpu", "cuda")
