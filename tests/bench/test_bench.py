"""`fvae bench`: peers need the bundle's weights, rows report how they ran, errors are one line."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fvae_deploy.bench import run as bench
from fvae_deploy.bench import worker as bench_worker
from fvae_deploy.bench.run import Case, Work
from fvae_deploy.bench.run import ceiling as measured
from fvae_deploy.cli import main as cli
from fvae_deploy.cli.tables import bench_table
from fvae_deploy.errors import BundleError, EngineError, PlanError
from fvae_deploy.export.bundle import Source
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.plan import plan

SHORT = Work(size=64, slices=5, rounds=1, repeats=0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in the test's own process; the numbers do not matter here."""
    monkeypatch.setattr(bench, "ceiling", lambda *key: 1e11)
    monkeypatch.setattr(bench, "in_process", lambda **job: bench_worker.window(job))


@pytest.fixture
def fvae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `fvae bench` without any measurement; returns the exit code and stderr."""

    def fail(**job: Any) -> None:
        raise AssertionError(f"{job} was measured")

    monkeypatch.setattr(bench, "in_process", fail)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["fvae", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of LeanVAE: `small.ckpt`, and `other.ckpt` of another latent."""
    torch = pytest.importorskip("torch", reason="needs the export extra")
    from random_lean_vae import SMALL, random_lean_vae

    folder = tmp_path_factory.mktemp("weights")
    for name, config in (("small", SMALL), ("other", replace(SMALL, latent_dim=6))):
        state = random_lean_vae(config, seed=0).state_dict()
        torch.save({"args": asdict(config), "state_dict": state}, folder / f"{name}.ckpt")
    return folder


@pytest.fixture(scope="module", params=["gray", "rgb"])
def exported(request: Any, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `small.ckpt`."""
    pytest.importorskip("onnxscript", reason="needs the export extra")
    from fvae_deploy.export.sources import load
    from fvae_deploy.export.to_onnx import export_bundle

    loaded = load(
        str(weights / "small.ckpt"), channels="published" if request.param == "gray" else "rgb"
    )
    folder = tmp_path_factory.mktemp("bundles") / str(request.param)
    export_bundle(loaded, folder, version="0.1.0")
    return folder


@pytest.mark.usefixtures("here")
def test_a_peer_with_the_same_weights_gives_the_same_results(exported: Path, weights: Path) -> None:
    cases = [Case("torch"), Case("reference")]
    manifest = Manifest.load(exported)
    row, _ = bench.bench(exported, manifest, cases, SHORT, weights=weights / "small.ckpt")
    assert 0 < row["encode_error_max"] < 1e-4  # rounding, of folded weights
    assert 0 < row["decode_error_max"] < 1e-4


@pytest.mark.parametrize("name", ["other.ckpt", "absent.ckpt", "."])
def test_a_peer_with_other_weights_is_refused(
    exported: Path, weights: Path, fvae: Any, name: str
) -> None:
    options = ("--engines", "torch", "--peer", weights / name)
    code, stderr = fvae("-m", exported, *options)
    assert code == 4
    assert re.match(r"fvae: expected .*, found (others|nothing)\b.*\n$", stderr)


def test_without_a_hash_a_peer_is_checked_by_its_geometry(exported: Path, weights: Path) -> None:
    from fvae_deploy.export.peer import check_peer

    manifest = replace(Manifest.load(exported), source=Source("module:factory", "", ""))
    check_peer(weights / "small.ckpt", manifest)
    with pytest.raises(BundleError, match=r"expected a peer with .*=4.*, found .*=6"):
        check_peer(weights / "other.ckpt", manifest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engines", "tflite"], r"--engines among .*openvino.*, found 'tflite'"),
        (["--engines", "torch,"], r"--engines among .*, found ''"),
        (["--engines", "openvino:int4"], r"openvino among fp32, bf16, fp16.*, found 'int4'"),
        (["--engines", "fake", "--step", "2"], r"1 latent frame per step of fake, found 2"),
        (["--device", "gpu"], r"--engines with --device gpu, found none"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(
    fake_bundle: Path, tmp_path: Path, fvae: Any, options: list[str], message: str
) -> None:
    text = (fake_bundle / "manifest.json").read_text(encoding="utf-8")
    text = text.replace('"4*k"', "4").replace('"k"', "1")  # one latent frame per step
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    (tmp_path / "weights.safetensors").write_bytes(
        (fake_bundle / "weights.safetensors").read_bytes()
    )
    code, err = fvae("-m", tmp_path, *options)
    assert code == 2
    assert re.match(f"fvae: expected .*{message}", err)
    assert err.count("\n") == 1


def test_named_engines_may_use_any_device_and_peers_are_not_quantised(
    fvae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Case] = []

    def measure(bundle: Path, manifest: Manifest, cases: list[Case], *of: Any, **more: Any) -> Any:
        seen.extend(cases)
        raise EngineError("nothing is measured here")

    monkeypatch.setattr(bench, "bench", measure)
    peer = Path(__file__).parents[2] / "tools" / "train_tiny" / "tiny.safetensors"
    asked = "tensorrt:int8,tensorrt:fp16"
    assert fvae("--engines", asked, "--device", "cuda:0", "--peer", peer)[0] == 5
    assert [(case.engine, case.precision) for case in seen] == [
        ("tensorrt", "int8"),
        ("tensorrt", "fp16"),
        ("reference", "fp32"),
        ("reference", "fp16"),
    ]
    assert [case.ceiling for case in seen[:2]] == 2 * [("cuda:0", "fp16")]
    assert fvae("--engines", "openvino", "--device", "gpu")[0] == 5
    assert seen[-1] == Case("openvino", device="gpu")


def test_torch_in_half_precision_on_a_cpu_runs_only_on_request(
    fvae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="needs the export extra")
    seen: list[Case] = []

    def measure(path: Path, manifest: Manifest, cases: list[Case], *more: Any, **said: Any) -> Any:
        seen.extend(cases)
        raise EngineError("enough")

    monkeypatch.setattr(bench, "bench", measure)
    assert fvae()[0] == 5
    assert [case.precision for case in seen if case.engine == "torch"] == ["fp32"]
    assert fvae("--engines", "torch:bf16")[0] == 5
    assert seen[-1] == Case("torch", "bf16")


def least(manifest: Manifest) -> int:
    """Return the smallest memory budget, in bytes, that can encode and decode."""

    def needed(direction: str) -> int:
        with pytest.raises(PlanError) as found:
            plan(manifest, (direction,), (8, 8), engine="fake", precision="fp32", memory=1)
        return int(re.findall(r"at least (\d+) MiB", str(found.value))[0]) << 20

    return max(map(needed, bench.DIRECTIONS))


@pytest.mark.usefixtures("here")
def test_rows_report_how_they_ran(fake_bundle: Path) -> None:
    manifest = Manifest.load(fake_bundle)
    cases = [Case("fake"), Case("fake", memory=2**30), Case("fake", memory=least(manifest))]
    plain, roomy, tight = json.loads(json.dumps(bench.bench(fake_bundle, manifest, cases, SHORT)))
    whole = {"encode": 1, "decode": 1}
    assert (plain["engine"], plain["memory"], plain["tiles"]) == ("fake", None, whole)
    assert (roomy["engine"], roomy["memory"], roomy["tiles"]) == ("fake whole", 2**30, whole)
    assert tight["engine"] == "fake tiled"
    assert max(tight["tiles"].values()) > 1
    for row in (plain, roomy):
        assert row["spilled"] == row["lean"] == []
    assert set(tight["spilled"]) <= whole.keys()
    assert set(tight["lean"]) <= whole.keys()


@pytest.mark.usefixtures("here")
def test_a_row_without_a_ceiling_is_shown_without_one(
    fake_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**job: Any) -> Any:
        raise EngineError("torch knows no such device")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "in_process", refused)
        assert measured("gpu") is None
        assert (measured() or 0) > 1e8  # numpy's
    monkeypatch.setattr(bench, "ceiling", lambda *of: None)
    rows = bench.bench(fake_bundle, Manifest.load(fake_bundle), [Case("fake")], SHORT)
    assert rows[0]["share_of_ceiling"] is rows[0]["ceiling_gflop_per_second"] is None
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(bench_table(rows))
    assert "%" not in screen.export_text()


def test_an_error_in_the_worker_is_reported_without_its_class(tmp_path: Path) -> None:
    job = {"task": "window", "bundle": str(tmp_path), "engine": "fake", "precision": "fp32"}
    with pytest.raises(EngineError, match="engine fake fp32 failed in its own process: expected"):
        bench_worker.in_process(**job)


def test_random_weights_exist_for_every_listed_name(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the export extra")
    script = Path(__file__).parents[2] / "benchmarks" / "random_weights.py"
    command = [sys.executable, str(script), "leanvae", str(tmp_path / "x.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"usage: random_weights.py .*\|leanvae16\|.* TARGET\n", done.stderr)
