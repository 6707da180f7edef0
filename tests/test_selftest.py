from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fvae_deploy import selftest
from fvae_deploy.engines.devices import problems
from fvae_deploy.errors import EngineError


@pytest.mark.skipif(not problems("tensorrt"), reason="this machine has a GPU")
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
    (row,) = found["checks"]
    assert found["passed"]
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
    assert [row["passed"] for row in found["checks"]] == [False, True]
    assert "illegal memory access" in found["checks"][0]["error"]
    assert not found["passed"]
