"""Kernels compiled ahead of time for chips that are not here; nothing is run."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="specifications are tensors of torch")
pytest.importorskip("triton", reason="kernels need triton: pip install 'fvae-deploy[kernels]'")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

from fvae_deploy.cli import app  # noqa: E402
from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.kernels import attention, causal_conv3d  # noqa: E402
from fvae_deploy.kernels.aot import Spec, compile_for, planned  # noqa: E402
from fvae_deploy.kernels.blocks import Blocks  # noqa: E402
from fvae_deploy.kernels.chips import CHIPS  # noqa: E402
from fvae_deploy.kernels.dispatch import KERNELS  # noqa: E402


@pytest.mark.parametrize("target", CHIPS)
@pytest.mark.parametrize("module", [causal_conv3d, attention], ids=["convolution", "attention"])
def test_the_heaviest_kernels_fit_every_chip_and_use_its_matrix_units(module, target):
    spec, kernel = next(module.specs())
    found = compile_for("k", spec, kernel, CHIPS[target])
    assert found.wrong == ()
    assert found.spills == 0
    assert found.shared <= found.limit
    assert any(name in found.matrix for name in CHIPS[target].matrix)
    assert found.vector_loads > 0


@pytest.mark.parametrize("name", KERNELS)
def test_every_launch_compiles_for_an_edge_gpu(name):
    for spec, kernel in KERNELS[name].specs():
        found = compile_for(name, spec, kernel, CHIPS["sm_89"])
        assert found.wrong == (), spec.name
        assert found.moved > 0
        assert found.flops > 0
        assert found.plain >= found.moved, "a kernel by hand that saves nothing"


def _attention(blocks: Blocks) -> Spec:
    q, k, v = (torch.empty(1, 4096, 1, 512, dtype=torch.float16, device="meta") for _ in range(3))
    return Spec(
        "wide",
        lambda run, target, choose: attention.launch(
            q, k, v, choose=lambda alike, offered, launch: launch(blocks), target=target, run=run
        ),
        1.0,
        1.0,
    )


def test_a_config_that_spills_and_takes_too_much_memory_is_found():
    greedy = Blocks(rows=128, columns=128, depth=512, warps=4, stages=3)
    chip = CHIPS["sm_86"]
    assert not attention.needs(greedy, 2, chip).fit(chip), "it would be left out before"
    found = compile_for("attention", _attention(greedy), attention.kernel, chip)
    assert any(reason.startswith("spills") for reason in found.wrong)
    assert any("bytes of shared memory" in reason for reason in found.wrong)


def test_a_kernel_that_misses_the_matrix_units_of_its_chip_is_found():
    small = Blocks(rows=32, columns=16, depth=512, warps=8, stages=1)
    found = compile_for("attention", _attention(small), attention.kernel, CHIPS["sm_90"])
    assert "has no HGMMA" in found.wrong


def test_a_kernel_with_narrow_loads_is_found():
    def narrow(**how):
        x = torch.empty(4, 64, 64, 97, dtype=torch.float16, device="meta")
        weight = torch.empty(1, 1, 1, 97, 97, dtype=torch.float16, device="meta")
        causal_conv3d.launch(x, weight, **how)

    found = compile_for("odd", Spec("odd", narrow, 1.0, 1.0), causal_conv3d.kernel, CHIPS["sm_89"])
    assert "has no load of 128 bits" in found.wrong


def test_bytes_are_counted_once_each():
    q, k, v = (torch.empty(1, 64, 1, 64, dtype=torch.float16, device="meta") for _ in range(3))
    spec = Spec("s", lambda **how: attention.launch(q, k, v, **how), 1.0, 1.0)
    found = compile_for("attention", spec, attention.kernel, CHIPS["sm_89"])
    assert found.moved == 4 * 64 * 64 * 2


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


def test_what_needs_a_gpu_says_so_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    for verb in ("test", "bench"):
        done = CliRunner().invoke(app, ["kernels", verb])
        assert isinstance(done.exception, EngineError)
        assert "expected a GPU" in str(done.exception)
