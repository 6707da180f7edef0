"""Compile kernels ahead of time for chips that this machine lacks; nothing is run."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="specifications are tensors of torch")
pytest.importorskip("triton", reason="kernels need triton: pip install 'fvae-deploy[kernels]'")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

from fvae_deploy.cli.main import app  # noqa: E402
from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.kernels import attention, causal_conv3d, timing  # noqa: E402
from fvae_deploy.kernels.aot import compile_for, planned  # noqa: E402
from fvae_deploy.kernels.blocks import Blocks  # noqa: E402
from fvae_deploy.kernels.chips import CHIPS  # noqa: E402
from fvae_deploy.kernels.dispatch import KERNELS  # noqa: E402
from fvae_deploy.kernels.record import Recorder, Spec, record  # noqa: E402


@pytest.mark.parametrize("target", CHIPS)
@pytest.mark.parametrize("module", [causal_conv3d, attention], ids=["convolution", "attention"])
def test_the_heaviest_kernels_fit_every_chip_and_use_its_matrix_units(module, target):
    spec, kernel = next(module.specs())
    compiled = compile_for("k", spec, kernel, CHIPS[target])
    assert compiled.wrong == ()
    assert compiled.spills == 0
    assert compiled.shared <= compiled.limit
    assert any(name in compiled.matrix for name in CHIPS[target].matrix)
    assert compiled.vector_loads > 0


@pytest.mark.parametrize("name", KERNELS)
def test_every_launch_compiles_for_an_edge_gpu(name):
    specs = list(KERNELS[name].specs())
    assert specs
    for spec, kernel in specs:
        compiled = compile_for(name, spec, kernel, CHIPS["sm_89"])
        assert compiled.wrong == (), spec.name
        assert compiled.moved > 0
        assert compiled.flops > 0
        assert compiled.plain >= compiled.moved, "the kernel saves no memory traffic"


def _attention(blocks: Blocks) -> Spec:
    q, k, v = (torch.empty(1, 4096, 1, 512, dtype=torch.float16, device="meta") for _ in range(3))
    return Spec(
        "wide",
        lambda run, target, choose: attention.launch(
            q, k, v, choose=lambda key, offered, launch: launch(blocks), target=target, run=run
        ),
        partial(attention.eager, q, k, v),
        1.0,
        1.0,
    )


def test_a_config_that_spills_and_takes_too_much_memory_is_found():
    greedy = Blocks(rows=128, columns=128, depth=512, warps=4, stages=3)
    chip = CHIPS["sm_86"]
    assert not attention.needs(greedy, 2, chip).fit(chip), "`offered` would not leave it out"
    compiled = compile_for("attention", _attention(greedy), attention.kernel, chip)
    assert any(reason.startswith("spills") for reason in compiled.wrong)
    assert any("bytes of shared memory" in reason for reason in compiled.wrong)


def test_a_kernel_that_misses_the_matrix_units_of_its_chip_is_found():
    small = Blocks(rows=32, columns=16, depth=512, warps=8, stages=1)
    compiled = compile_for("attention", _attention(small), attention.kernel, CHIPS["sm_90"])
    assert "has no HGMMA" in compiled.wrong


def test_a_kernel_with_narrow_loads_is_found():
    x = torch.empty(4, 64, 64, 97, dtype=torch.float16, device="meta")
    weight = torch.empty(1, 1, 1, 97, 97, dtype=torch.float16, device="meta")
    narrow, eager = (partial(f, x, weight) for f in (causal_conv3d.launch, causal_conv3d.reference))
    spec = Spec("odd", narrow, eager, 1.0, 1.0)
    compiled = compile_for("odd", spec, causal_conv3d.kernel, CHIPS["sm_89"])
    assert "has no load of 128 bits" in compiled.wrong


def test_bytes_are_counted_once_each():
    q, k, v = (torch.empty(1, 64, 1, 64, dtype=torch.float16, device="meta") for _ in range(3))
    launch, eager = (partial(f, q, k, v) for f in (attention.launch, attention.eager))
    spec = Spec("s", launch, eager, 1.0, 1.0)
    compiled = compile_for("attention", spec, attention.kernel, CHIPS["sm_89"])
    assert compiled.moved == 4 * 64 * 64 * 2


@pytest.mark.parametrize("name", KERNELS)
def test_torch_computes_the_same_shapes_as_the_launch_it_is_compared_with(name):
    specs = list(KERNELS[name].specs())
    assert specs
    for spec, kernel in specs:
        pair = spec.launch(run=Recorder(kernel), target="sm_90"), spec.eager()
        results = (each if isinstance(each, tuple) else (each,) for each in pair)
        for result, expected in zip(*results, strict=True):
            assert result.dtype == expected.dtype
            # A kernel returns statistics in chunks of positions, torch for all positions.
            axes = 2 if spec.name.startswith("channels") else 4
            assert result.shape[:axes] == expected.shape[:axes]


def test_all_launches_of_a_doubling_are_counted():
    spec, kernel = next(KERNELS["upsample2x_conv"].specs())
    four = record(spec, kernel, "sm_90")
    assert len(four) == 4
    compiled = compile_for("upsample2x_conv", spec, kernel, CHIPS["sm_90"])
    assert compiled.moved == sum(launch.moved for launch in four)


def test_a_roofline_is_the_slower_of_arithmetic_and_memory():
    chip = CHIPS["sm_89"]
    assert chip.seconds(121e12, 1, half=True) == pytest.approx(1)
    assert chip.seconds(1, 300e9, half=True) == pytest.approx(1)
    assert chip.seconds(30.3e12, 1, half=False) == pytest.approx(1)


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    out = tmp_path / "kernels.json"
    done = CliRunner(env={"COLUMNS": "200"}).invoke(
        app,
        ["kernels", "check", "-t", "sm_89", "-k", "depthwise_conv3d", "--json", str(out)],
    )
    assert done.exit_code == 0, done.output
    assert "nothing was run" in done.output
    assert re.search(r"LeanVAE 512 float16\s+│ sm_89", done.output)
    rows = json.loads(out.read_text())
    assert [row["spec"] for row in rows] == [s.name for s, _ in KERNELS["depthwise_conv3d"].specs()]
    assert {row["target"] for row in rows} == {"sm_89"}


@pytest.mark.parametrize(
    ("kernels", "targets", "message"),
    [
        (["winograd"], ["sm_89"], "expected one of causal_conv3d, .*, found 'winograd'"),
        (["attention"], ["sm_11"], "expected one of sm_80, .*, found 'sm_11'"),
    ],
    ids=["kernel", "chip"],
)
def test_unknown_names_are_refused(kernels, targets, message):
    with pytest.raises(EngineError, match=message):
        planned(kernels, targets, every=False)


def test_commands_that_need_a_gpu_say_so_without_one():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for verb in ("test", "bench"):
        done = CliRunner().invoke(app, ["kernels", verb])
        assert isinstance(done.exception, EngineError)
        assert "expected a GPU" in str(done.exception)


def test_a_launch_that_cannot_be_timed_is_reported_and_stops_nothing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    failed = timing.median(lambda: None, Blocks(64, 64))
    assert failed.seconds is None
    assert failed.failure
    assert "\n" not in failed.failure
    timed = timing.Median(2.0, blocks=Blocks(32, 32)), timing.Median(1.0, blocks=Blocks(16, 16))
    row = timing.Timed("k", "s", (failed, *timed), failed, flops=1.0, moved=1, roofline=None)
    assert row.best == timed[1]
    assert row.failures == [f"{Blocks(64, 64)}: {failed.failure}"]
    assert timing.Timed("k", "s", (failed,), failed, 1.0, 1, None).best is None
