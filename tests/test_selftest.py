from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fvae_deploy import selftest
from fvae_deploy.cli import main as cli
from fvae_deploy.engines import devices
from fvae_deploy.engines.base import precisions
from fvae_deploy.engines.devices import target
from fvae_deploy.errors import EngineError


@pytest.mark.skipif(target() is not None, reason="this machine has a GPU")
def test_without_a_gpu_the_error_is_one_line() -> None:
    with pytest.raises(
        EngineError, match="expected a GPU to test, found none: fvae needs"
    ) as caught:
        selftest.selftest(gpu=True)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5


def test_the_checks_run_on_the_cpu_and_return_one_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    monkeypatch.setattr(selftest, "SIDE", 64)
    monkeypatch.setattr(selftest, "ROUNDS", 2)
    monkeypatch.setattr(selftest, "cases", lambda device: [("onnxruntime", "fp32")])
    report = json.loads(json.dumps(selftest.selftest(gpu=False, suites=False)))
    (row,) = (row for row in report["checks"] if row["passed"] is not None)
    assert report["passed"]
    assert row["against"] in ("torch", "openvino")  # never with itself
    assert row["parity"]["hu_max"] < 0.01
    assert row["tiled_difference"] < 1e-5
    assert row["throughput"]["decode"]["slices_per_second"] > 0


def test_with_one_engine_float32_has_no_parity_and_bfloat16_is_compared_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [("openvino", precision) for precision in precisions("openvino") if precision != "int8"]
    monkeypatch.setattr(selftest, "SIDE", 64)
    monkeypatch.setattr(selftest, "ROUNDS", 2)
    monkeypatch.setattr(selftest, "cases", lambda device: pairs)
    monkeypatch.setattr(
        selftest, "obstacle", lambda name: None if name == "openvino" else "is missing"
    )
    monkeypatch.setattr(sys, "argv", ["fvae", "selftest", "--no-suites", "--json", "-"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    rows = {row["name"]: row for row in json.loads(out)["checks"]}
    assert rows["openvino fp32"]["passed"]
    assert rows["openvino fp32"]["parity"] is None
    assert "of which none is installed: pip install 'fvae-deploy[cpu]'" in err
    if "bf16" in precisions("openvino"):
        assert rows["openvino bf16"]["against"] == "openvino"
        assert 0 < rows["openvino bf16"]["parity"]["hu_max"] < 250


def test_a_failing_check_is_reported_and_the_others_still_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check_engine(bundle: Path, engine: str, precision: str, device: str) -> dict[str, Any]:
        if engine == "broken":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"passed": True}

    monkeypatch.setattr(selftest, "check_engine", check_engine)
    monkeypatch.setattr(selftest, "cases", lambda device: [("broken", "fp32"), ("sound", "fp16")])
    report = selftest.selftest(gpu=False, suites=False)
    broken, sound = (row for row in report["checks"] if row["passed"] is not None)
    assert not broken["passed"]
    assert "illegal memory access" in broken["error"]
    assert sound["passed"]
    assert not report["passed"]


def test_engines_that_are_not_installed_are_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    why = {"tensorrt": "needs the package tensorrt_rtx: pip", "onnxruntime": "needs CUDA: pip"}
    monkeypatch.setattr(selftest, "require_gpu", lambda: "sm_90")
    monkeypatch.setattr(selftest, "lacking", lambda name, device: why.get(name))
    monkeypatch.setattr(selftest, "check_engine", lambda *case: {"passed": True})
    monkeypatch.setattr(selftest, "run_kernels", lambda verb, folder: {"passed": True})
    report = selftest.selftest(gpu=True, suites=False)
    rows = {row["name"]: row for row in report["checks"]}
    assert list(rows) == [
        "tensorrt",
        "onnxruntime",
        *(f"torch {precision}" for precision in ("fp32", "bf16", "fp16")),
        "kernels equal their references",
        "kernels timed",
    ]
    for name, reason in why.items():
        assert rows[name]["passed"] is None
        assert rows[name]["left_out"] == f"not installed: {reason}"
    assert report["passed"]
    assert report["gpu"]["target"] == "sm_90"


def test_an_installed_wheel_leaves_out_the_test_suites_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "ROOT", tmp_path)
    monkeypatch.setattr(selftest, "cases", lambda device: [])
    report = selftest.selftest(gpu=False)
    assert report["passed"]
    assert "in a checkout" in report["checks"][-1]["left_out"]


def test_without_pytest_the_test_suites_are_left_out_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selftest, "RUNNERS", ("pytest", "no_such_runner"))
    report = selftest.run_test_suites()
    assert report["passed"] is None
    assert report["left_out"] == "the tests need no_such_runner: pip install 'fvae-deploy[dev]'"


def test_the_stderr_of_the_test_suites_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "ROOT", tmp_path)
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    broken = "raise RuntimeError('a library is missing')"
    (tmp_path / "tests" / "kernels" / "conftest.py").write_text(broken, encoding="utf-8")
    report = selftest.run_test_suites()
    assert report["passed"] is False
    assert "a library is missing" in report["output"]


def test_without_triton_torch_runs_on_a_gpu_but_the_kernel_checks_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="needs the export extra")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "triton" else real(name)
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "target", lambda: "sm_89")
    assert devices.unfit("torch") is None
    (remark,) = devices.remarks("torch")
    assert selftest.run_kernels("test", tmp_path) == {"passed": None, "left_out": remark}


def test_a_failing_kernel_run_is_reported_with_its_output(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs the kernels extra")
    if target() is not None:
        pytest.skip("this machine has a GPU")
    report = selftest.run_kernels("test", tmp_path)
    assert not report["passed"]
    assert report["rows"] == []
    assert "expected a GPU" in report["output"]
