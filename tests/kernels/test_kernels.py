"""Compare kernels in Triton's interpreter with their references, and check their errors.

Triton selects the interpreter when it is imported, so the interpreter runs in its own process.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="kernels' references are torch's")
pytest.importorskip("triton", reason="kernels need triton: pip install 'fvae-deploy[kernels]'")

from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.kernels import (  # noqa: E402
    attention,
    causal_conv3d,
    depthwise_conv3d,
    gated_linear,
    trials,
)
from fvae_deploy.kernels.blocks import Blocks  # noqa: E402
from fvae_deploy.kernels.causal_conv3d import SAME, Window  # noqa: E402
from fvae_deploy.kernels.comparisons import Trial  # noqa: E402
from fvae_deploy.kernels.dispatch import KERNELS, Kernels  # noqa: E402
from fvae_deploy.kernels.norm_silu import Activation  # noqa: E402
from fvae_deploy.kernels.trials import TOLERANCE, TRIALS, worst  # noqa: E402

# The blocks of all chips, with a limit for every trial. Half types get the same blocks.
EVERY = """
import json, torch
from fvae_deploy.kernels.chips import CHIPS
from fvae_deploy.kernels.trials import TRIALS, worst
trials = [trial for of_kernel in TRIALS.values() for trial in of_kernel]
found = {{t.name: worst(t, "cpu", torch.{kind}, tuple(CHIPS), every={every}) for t in trials}}
print(json.dumps(found))
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


# The interpreter multiplies bfloat16 wrongly; kernels multiply in float32 there.
@pytest.mark.parametrize(
    ("kind", "every"), [("float32", True), ("float16", True), ("bfloat16", False)]
)
def test_kernels_equal_their_references_and_stay_inside_their_tensors(kind, every):
    errors = json.loads(interpreted(EVERY.format(kind=kind, every=every)))
    assert list(errors) == [trial.name for each in TRIALS.values() for trial in each]
    limit = TOLERANCE[getattr(torch, kind)]
    assert {name: error for name, error in errors.items() if not error <= limit} == {}


def test_every_tensor_that_a_kernel_gets_in_a_trial_lies_between_guards():
    bare = interpreted(
        """
import torch
from triton.runtime.interpreter import GridExecutor
from fvae_deploy.kernels.guards import Guarded, Source
from fvae_deploy.kernels.trials import TRIALS

launches = []

def check(self, *tensors, **more):
    launches.append(self.fn.__name__)
    for value in (*tensors, *more.values()):
        if torch.is_tensor(value) and value.numel() and not source.encloses(value):
            print(trial.name, self.fn.__name__, tuple(value.shape))

GridExecutor.__call__ = check
for trials in TRIALS.values():
    for trial in trials:
        source, before = Source("cpu", torch.float32), len(launches)
        with Guarded(source):
            list(trial.run(source))
        assert len(launches) > before, trial.name
"""
    )
    assert bare == ""


def _before(view: torch.Tensor, offset: int) -> torch.Tensor:
    """Return the element `offset` places before a view's first one."""
    return view.as_strided((1,), (1,), view.storage_offset() - offset)


def _reads(source, offset):
    view = source.normal(2, 3, 4)
    yield view + _before(view, offset), view


def _reads_and_drops_nan(source, offset):
    view = source.normal(2, 3, 4)
    yield view.fmax(_before(view, offset)).fmax(_before(view, offset + 1)), view


def _writes_outside(source, value):
    view = source.blank(2, 3, 4).fill_(1)
    _before(view, 1).fill_(value)
    yield view, torch.ones(2, 3, 4)


def _writes_far_outside(source, value):
    view = torch.empty(2, 3, 4).fill_(1)  # as launchers allocate
    view.as_strided((300,), (1,), view.storage_offset() + view.numel()).fill_(value)
    yield view, torch.ones(2, 3, 4)


def _writes_to_an_input(source, value):
    view = source.normal(2, 3, 4)
    expected = view.clone()
    view[1, 1, 1] = value
    yield expected, expected


def _writes_another_part(source, value):
    view = source.blank(2, 3, 4, part=(slice(None), slice(0, 1)))
    view[:, :1] = 1
    view[0, 2, 0] = value
    yield view[:, :1], torch.ones(2, 1, 4)


@pytest.mark.parametrize("value", [math.nan, 0.0, 1.0])
@pytest.mark.parametrize(
    "bad",
    [_writes_outside, _writes_far_outside, _writes_to_an_input, _writes_another_part],
)
def test_a_trial_notices_what_is_written_where_it_must_not_be(bad, value):
    assert worst(Trial("", partial(bad, value=value)), "cpu", torch.float32) == math.inf


@pytest.mark.parametrize("offset", [1, 2])  # NaN and large numbers take turns
@pytest.mark.parametrize("bad", [_reads, _reads_and_drops_nan])
def test_a_trial_notices_a_read_outside(bad, offset):
    assert worst(Trial("", partial(bad, offset=offset)), "cpu", torch.float32) > 1000


def test_a_trial_notices_what_is_not_written():
    def first_alone(source):
        view = source.blank(2, 3, 4)
        view[0] = 1
        yield view, torch.ones(2, 3, 4)

    assert worst(Trial("", first_alone), "cpu", torch.float32) == math.inf


def test_a_trial_notices_a_wrong_value():
    def wrong(source):
        view = source.normal(2, 3, 4)
        yield view, view + 0.1

    assert 0.01 < worst(Trial("", wrong), "cpu", torch.float32) < 1


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


def test_a_trial_of_all_blocks_launches_each_of_them_on_any_chip():
    seen = []
    of_chip = {"sm_80": [Blocks(16, 16), Blocks(32, 16)], "sm_90": [Blocks(16, 16), Blocks(8, 16)]}

    def run(source):
        view = source.normal(2, 3, 4)
        source.how["choose"]("alike", of_chip[source.how["target"]], seen.append)
        source.how["choose"]("other", [Blocks(64, 16)], seen.append)
        yield view, view

    worst(Trial("", run), "cpu", torch.float32, ("sm_80", "sm_90"), every=True)
    assert [blocks.rows for blocks in seen] == [16, 64, 32, 64, 8, 64]
    seen.clear()
    worst(Trial("", run), "cpu", torch.float32)
    assert [blocks.rows for blocks in seen] == [16, 64]


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


@pytest.mark.parametrize(
    "tensors",
    [
        {"k": (1, 9, 2, 16)},
        {"k": (1, 9, 3, 32)},
        {"v": (1, 8, 2, 32)},
        {"k": (2, 9, 2, 32)},
        {"out": (1, 7, 2, 32)},
        {"out": (3, 7, 1, 32)},
    ],
    ids=str,
)
def test_attention_refuses_tensors_of_other_shapes(tensors):
    shapes = {"q": (3, 7, 2, 32), "k": (1, 9, 2, 32), "v": (1, 9, 2, 32), "out": (3, 7, 2, 32)}
    given = {name: torch.zeros(shape) for name, shape in (shapes | tensors).items()}
    with pytest.raises(ValueError, match=rf"expected {next(iter(tensors))} \[.*\], found \["):
        attention.launch(**given)


def _every_second(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", torch.zeros(3, 3, 3, 16, 32)[..., :16]),
        ("bias", _every_second(16)),
        ("bias", torch.zeros(8)),
        ("after", torch.zeros(2, 8, 8, 32)[..., :16]),
        ("scale", Activation(torch.zeros(8), inverse=torch.zeros(1, 8, 8))),
        ("inverse", Activation(torch.zeros(16), inverse=_every_second(1, 8, 8))),
        ("shift", Activation(torch.zeros(1, 16), shift=_every_second(1, 16))),
    ],
)
def test_tensors_that_the_kernel_takes_for_contiguous_are_refused_unless_they_are(name, tensor):
    x, weight = torch.zeros(1, 8, 8, 16), torch.zeros(3, 3, 3, 16, 16)
    key = "activation" if isinstance(tensor, Activation) else name
    with pytest.raises(ValueError, match=f"expected {name} (contiguous|.* found)"):
        causal_conv3d.launch(x, **({"weight": weight, "window": SAME} | {key: tensor}))
    if name in ("bias", "after"):
        given = {"weight": torch.zeros(27, 16), "bias": torch.zeros(16), name: tensor}
        with pytest.raises(ValueError, match=f"expected {name} (contiguous|.* found)"):
            depthwise_conv3d.launch(x, **given)


@pytest.mark.parametrize("name", ["x", "value", "gate", "value_bias", "gate_bias"])
def test_gated_layers_refuse_tensors_that_are_not_contiguous_or_of_other_shapes(name):
    shapes = {"x": (5, 16), "value": (16, 24), "gate": (16, 24)}
    shapes |= {"value_bias": (24,), "gate_bias": (24,)}
    given = {each: torch.zeros(shape) for each, shape in shapes.items()}
    with pytest.raises(ValueError, match=f"expected {name} contiguous, found strides"):
        gated_linear.launch(**(given | {name: _every_second(*shapes[name])}))
    if name != "x":
        with pytest.raises(ValueError, match=rf"expected {name} \[.*\], found \["):
            gated_linear.launch(**(given | {name: torch.zeros(17, 24)}))


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
