from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fvae_deploy import selftest
from fvae_deploy.engines.devices import target
from fvae_deploy.errors import EngineError


@pytest.mark.skipif(target() is not None, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    with pytest.raises(EngineError, match="expected a GPU to test, found that fvae needs") as found:
        selftest.selftest(gpu=True)
    assert "\n" not in str(found.value)
    assert found.value.exit_code == 5


def test_the_checks_run_on_the_cpu_and_make_one_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    monkeypatch.setattr(selftest, "SIDE", 64)
    monkeypatch.setattr(selftest, "ROUNDS", 2)
    monkeypatch.setattr(selftest, "cases", lambda device: [("onnxruntime", "fp32")])
    found = json.loads(json.dumps(selftest.selftest(gpu=False, suites=False)))
    (row,) = (row for row in found["checks"] if row["passed"] is not None)
    assert found["passed"]
    assert row["against"] == "onnxruntime"
    assert row["parity"]["hu_max"] < 0.01
    assert row["tiled_difference"] < 1e-5
    assert row["throughput"]["decode"]["slices_per_second"] > 0


def test_a_check_that_breaks_is_reported_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one(bundle: Path, engine: str, precision: str, device: str) -> dict[str, Any]:
        if engine == "broken":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"passed": True}

    monkeypatch.setattr(selftest, "one", one)
    monkeypatch.setattr(selftest, "cases", lambda device: [("broken", "fp32"), ("sound", "fp16")])
    found = selftest.selftest(gpu=False, suites=False)
    broken, sound = (row for row in found["checks"] if row["passed"] is not None)
    assert not broken["passed"]
    assert "illegal memory access" in broken["error"]
    assert sound["passed"]
    assert not found["passed"]


def test_what_is_not_installed_is_left_out_with_the_reason_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    why = {"tensorrt": "needs the package tensorrt_rtx: pip", "onnxruntime": "needs CUDA: pip"}
    monkeypatch.setattr(selftest, "require_gpu", lambda: "sm_90")
    monkeypatch.setattr(selftest, "lacking", lambda name, device: why.get(name))
    monkeypatch.setattr(selftest, "one", lambda *case: {"passed": True})
    monkeypatch.setattr(selftest, "kernels", lambda verb, folder: {"passed": True})
    found = selftest.selftest(gpu=True, suites=False)
    rows = {row["name"]: row for row in found["checks"]}
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
    assert found["passed"]
    assert found["gpu"]["target"] == "sm_90"


def test_a_report_of_a_kernel_that_fails_has_the_rows_of_the_others(tmp_path: Path) -> None:
    if target() is not None:
        pytest.skip("this machine has a GPU")
    found = selftest.kernels("test", tmp_path)
    assert not found["passed"]
    assert found["rows"] == []
    assert "expected a GPU" in found["output"]
