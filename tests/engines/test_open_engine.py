"""The table of engines: requests run or are refused, and `auto` reports its choice."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from fake_engine import write_fake_bundle

from fvae_deploy.engines import base, devices
from fvae_deploy.engines.base import choose, open_engine, precision_problem, precisions
from fvae_deploy.errors import EngineError
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.codec import open_codec

Absent = Callable[..., None]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Absent:
    """Make packages look as if they were not installed."""
    real = importlib.util.find_spec

    def pretend(*names: str) -> None:
        def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
            return None if name in names else real(name, package)

        monkeypatch.setattr(base.importlib.util, "find_spec", find_spec)

    return pretend


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every package look as if it were installed."""
    spec = ModuleSpec("any", None)
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: spec)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_fake_bundle(tmp_path)


def test_an_unknown_engine_is_refused_with_the_known_ones(
    tmp_path: Path, manifest: Manifest
) -> None:
    with pytest.raises(EngineError, match=r"openvino, onnxruntime, torch.*found engine 'tflite'"):
        open_engine(tmp_path, manifest, "tflite")


@pytest.mark.parametrize("engine", ["fake", "openvino"])
def test_an_unknown_precision_is_refused_with_the_known_ones(
    tmp_path: Path, manifest: Manifest, engine: str
) -> None:
    with pytest.raises(EngineError, match=r"fp32, bf16, fp16(, int8)?, found precision 'int4'"):
        open_engine(tmp_path, manifest, engine, precision="int4")


@pytest.mark.parametrize(
    ("engine", "package", "remedy"),
    [
        ("openvino", "openvino", r"pip install openvino"),
        ("onnxruntime", "onnxruntime", r"pip install 'fvae-deploy\[cpu\]'"),
        ("torch", "torch", r"pip install 'fvae-deploy\[export\]'"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, manifest: Manifest, absent: Absent, engine: str, package: str, remedy: str
) -> None:
    absent(package)
    with pytest.raises(EngineError, match=rf"engine {engine} .* package {package}: {remedy}$"):
        open_engine(tmp_path, manifest, engine)


@pytest.mark.parametrize(
    ("engine", "content", "reason"),
    [
        ("openvino", "raise ImportError('libtbb.so.12: cannot open')", "libtbb.so.12: cannot open"),
        ("torch", "raise OSError('libc10.so: wrong ELF class')", "libc10.so: wrong ELF class"),
        ("onnxruntime", "", "module 'onnxruntime' has no attribute"),  # two packages, one removed
    ],
)
def test_a_runtime_that_does_not_import_is_reported_with_the_remedy_and_skipped(
    tmp_path: Path, engine: str, content: str, reason: str
) -> None:
    (tmp_path / engine).mkdir()
    (tmp_path / engine / "__init__.py").write_text(content, encoding="utf-8")
    code = (
        "from fvae_deploy.engines.base import load, obstacle\n"
        "from fvae_deploy.engines.devices import problems\n"
        f"assert obstacle({engine!r}) in problems({engine!r})\n"
        f"try:\n    load({engine!r})\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith(f"EngineError engine {engine} cannot run here: it needs {engine} ")
    assert f"found {reason}" in run.stdout
    assert f": pip uninstall -y {engine} && pip install " in run.stdout


@pytest.mark.usefixtures("present")
def test_auto_takes_openvino_first() -> None:
    assert choose() == ("openvino", "openvino is installed")


def test_auto_says_why_it_skipped_an_engine(
    absent: Absent, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent("openvino", "torch")
    pytest.importorskip("onnxruntime", reason="needs the cpu extra")
    engine, why = choose()
    assert engine == "onnxruntime"
    assert why == (
        "openvino needs the package openvino: pip install openvino; onnxruntime is installed"
    )


def test_auto_never_takes_the_fake(absent: Absent) -> None:
    absent("openvino", "onnxruntime", "torch")
    with pytest.raises(EngineError, match=r"found none: openvino .*; onnxruntime .*; torch .*pip"):
        choose()


def test_the_package_offers_no_fake_engine() -> None:
    code = "from fvae_deploy.engines.base import ENGINES; print(*ENGINES)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["tensorrt", "openvino", "onnxruntime", "torch"]
    assert not (ROOT / "engines" / "fake.py").exists()


def test_a_process_that_a_test_starts_has_the_fake_engine() -> None:
    code = "from fvae_deploy.engines.base import load; print(load('fake').precisions())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "['fp32']\n"


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_a_precision_that_an_engine_lacks_is_explained_without_a_bundle(engine: str) -> None:
    if base.missing(engine):
        pytest.skip(f"{engine} is not installed")
    able = precisions(engine)
    assert precision_problem(engine, "fp32") is None
    for precision in base.PRECISIONS:
        problem = precision_problem(engine, precision)
        assert (problem is None) == (precision in able)
        if problem is not None:
            assert problem == (
                f"does not compute in {precision} on device cpu, only in {', '.join(able)}"
            )


def test_the_explanation_agrees_with_what_opening_a_bundle_says(small_bundle: Path) -> None:
    manifest = Manifest.load(small_bundle)
    for engine in ("openvino", "onnxruntime", "torch"):
        for precision in base.PRECISIONS:
            if precision_problem(engine, precision) is None:
                open_engine(small_bundle, manifest, engine, "cpu", precision).close()
            else:
                with pytest.raises(EngineError, match=precision):
                    open_engine(small_bundle, manifest, engine, "cpu", precision)


@pytest.mark.parametrize("engine", ["tensorrt", "openvino", "onnxruntime", "torch", "fake"])
def test_a_device_that_an_engine_does_not_have_offers_no_precision(engine: str) -> None:
    if base.obstacle(engine):
        pytest.skip(f"{engine} cannot run here")
    expected = "does not run on device abacus of this machine"
    assert precision_problem(engine, "fp32", "abacus") == expected


def test_tensorrt_offers_on_a_gpu_all_that_can_be_built() -> None:
    if base.obstacle("tensorrt"):
        pytest.skip("TensorRT cannot run here")
    assert precisions("tensorrt") == []
    assert precisions("tensorrt", "cuda:1") == ["fp32", "bf16", "fp16", "int8", "fp8"]


def test_auto_on_a_gpu_takes_tensorrt_then_onnx_runtime_then_torch() -> None:
    assert choose("cuda", lambda name: None)[0] == "tensorrt"
    engine, why = choose("cuda", lambda name: "is not built" if name == "tensorrt" else None)
    assert (engine, why) == ("onnxruntime", "tensorrt is not built; onnxruntime is installed")
    with pytest.raises(EngineError, match="tensorrt no; onnxruntime no; torch no"):
        choose("cuda:0", lambda name: "no")


def test_without_a_gpu_the_error_says_so_once_and_not_for_every_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "target", lambda: None)
    with pytest.raises(EngineError, match="found none: install the driver") as caught:
        open_codec("tiny", device="cuda")
    assert str(caught.value).count("NVIDIA") == 1


def test_onnx_runtime_for_a_gpu_is_another_package_than_for_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "_installed", lambda entry: [])
    cpu, gpu = base.obstacle("onnxruntime"), devices.problems("onnxruntime")[0]
    assert cpu == "needs the package onnxruntime: pip install 'fvae-deploy[cpu]'"
    assert gpu == ("needs the package onnxruntime-gpu: pip install 'onnxruntime-gpu[cuda,cudnn]'")
