"""Build engines on this CPU with TensorRT for RTX; none of them is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fvae_deploy.engines import devices
from fvae_deploy.errors import EngineError, UsageError
from fvae_deploy.export import tensorrt_worker
from fvae_deploy.export.built import ANY, find, folder_of, read_engine
from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.precision import halve
from fvae_deploy.export.quantize import quantize
from fvae_deploy.export.to_tensorrt import _in_worker, check_request
from fvae_deploy.make.calibration import record
from fvae_deploy.make.engines import make_engines
from fvae_deploy.stream.codec import bundle_path

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the cpu extra")
ARRAYS = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A writable copy of a bundle."""
    return Path(shutil.copytree(small_bundle, tmp_path / "small"))


def session(model: onnx.ModelProto | Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    given = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        pytest.param("tiny", Manifest, {"k": 2, "h": 5, "w": 3}, id="tiny"),
        pytest.param(
            "tiny-ldm", GeneratorManifest, {"k": 3, "h": 1, "w": 2, "n": 5}, id="tiny-ldm"
        ),
    ],
)
def test_graphs_in_half_precision_are_close_to_float32(
    name: str, kind: Any, sizes: dict[str, int]
) -> None:
    path, random = bundle_path(name), np.random.default_rng(0)
    for part in kind.load(path).parts:
        half, whole = session(halve(path / part.file, part, "fp16")), session(path / part.file)
        given = {
            spec.name: random.normal(0, 0.5, spec.sized(**sizes)).astype(np.float32)
            if spec.type == "float32"
            else random.integers(0, 9, spec.sized(**sizes))
            for spec in part.inputs
        }
        rounded = {i.name: given[i.name].astype(ARRAYS[i.type]) for i in half.get_inputs()}
        for a, b in zip(half.run(None, rounded), whole.run(None, given), strict=True):
            assert np.abs(a - b).max() < 3e-3 * np.abs(b).max(), part.name
        states = {spec.name for spec in (*part.state_inputs, *part.state_outputs)}
        for value in (*half.get_inputs(), *half.get_outputs()):
            halved = value.type == "tensor(float16)"
            assert halved == (value.name in states and bool(part.state_outputs))


def test_norms_of_large_values_and_of_zeros_stay_finite_in_half_precision() -> None:
    path = bundle_path("tiny")
    part = Manifest.load(path).part("encode_first")
    model = halve(path / part.file, part, "fp16")
    for value in (0.0, 300.0):  # its squares lie beyond float16
        (z, *_) = session(model).run(None, {"x": np.full((1, 1, 1, 16, 16), value, np.float32)})
        assert np.isfinite(z).all()


def test_group_norms_of_large_values_stay_close_in_half_precision() -> None:
    path = bundle_path("tiny-ldm")
    part = GeneratorManifest.load(path).part("denoise")
    random = np.random.default_rng(0)
    sizes = {"k": 2, "h": 1, "w": 1, "n": 3}
    given = {
        spec.name: random.normal(0, 1, spec.sized(**sizes)).astype(np.float32)
        for spec in part.inputs
    }
    given["x"] *= 3000  # squares and sums of channels lie beyond float16
    half, whole = session(halve(path / part.file, part, "fp16")), session(path / part.file)
    (a,), (b,) = half.run(None, given), whole.run(None, given)
    assert np.abs(a - b).max() < 0.01 * np.abs(b).max()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantised_graphs_are_close_on_their_calibration_ct(
    bundle: Path, tmp_path: Path, write_ct: Any, precision: str
) -> None:
    write_ct(tmp_path / "ct.nii", (16, 24, 9))
    manifest = Manifest.load(bundle)
    seen = record(bundle, [tmp_path / "ct.nii"])
    graphs = quantize(bundle, manifest, seen, tmp_path, precision)
    for part in manifest.parts:
        nodes = onnx.load(graphs[part.name], load_external_data=False).graph.node
        assert sum(node.op_type == "DequantizeLinear" for node in nodes) > 5
        given = seen[part.name][0]
        a = session(graphs[part.name]).run(None, given)[0]
        b = session(bundle / part.file).run(None, given)[0]
        assert 0 < np.abs(a - b).mean() < 0.2 * np.abs(b).mean(), part.name


@pytest.mark.parametrize("target", ["banana", "../../outside", "sm_", "sm_9x", "sm_90/../x", ""])
@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_a_target_is_the_name_of_an_architecture(package: str, target: str) -> None:
    with pytest.raises(UsageError, match=f"found '{target}'"):
        check_request(package, target, "fp32")


def test_tensorrt_builds_only_for_the_gpu_of_this_machine(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for own, message in ((None, "a GPU in this machine for"), ("sm_90", "expected sm_90 for")):
        monkeypatch.setattr(devices, "target", lambda own=own: own)
        with pytest.raises(UsageError, match=f"{message} --package tensorrt, found 'sm_89'"):
            make_engines(bundle, ["sm_89"], ["fp32"], package="tensorrt")
    assert not (bundle / "engines").exists()


def test_a_killed_builder_is_reported_as_killed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(tensorrt_worker, "__file__", str(worker))
    request = {"target": "sm_89", "package": "tensorrt_rtx"}
    part = Manifest.load(bundle).parts[0]
    ends = {"os.kill(os.getpid(), 9)": "the builder killed by SIGKILL;", "os._exit(3)": "a word;"}
    for end, reason in ends.items():
        worker.write_text(f"import os, sys\nprint('a word', file=sys.stderr, flush=True)\n{end}\n")
        with pytest.raises(EngineError, match=f"found {reason}"):
            _in_worker(part, request)


class TestBuilt:
    """Tests that need the builder."""

    @pytest.fixture(autouse=True)
    def _needs_tensorrt(self) -> None:
        pytest.importorskip("tensorrt_rtx", reason="needs pip install tensorrt-rtx")

    def test_two_builds_give_the_same_bytes_and_describe_themselves(self, bundle: Path) -> None:
        options: dict[str, Any] = {"planes": [(32, 48)], "step": 2}
        hashes = []
        for _ in range(2):
            rows = make_engines(bundle, ["sm_89"], ["fp16", "bf16"], **options)
            hashes.append([row.built.sha256 for row in rows])
        assert hashes[0] == hashes[1]
        manifest = Manifest.load(bundle)
        for precision in ("fp16", "bf16"):
            built = find(bundle, manifest, "sm_89", precision)
            assert list(built) == [part.name for part in manifest.parts]
            (step,) = built["encode_step"]
            assert step.variant == "2x4x6"
            assert step.takes({t.name: t.sized(2, 4, 6) for t in manifest.part(step.part).inputs})
            assert not step.takes({"x": (1, 1, 4, 32, 48)})
            assert len(read_engine(bundle, step)) == step.bytes > 100_000

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_two_builds_of_a_denoiser_give_the_same_bytes(
        self, tmp_path: Path, precision: str
    ) -> None:
        path = shutil.copytree(bundle_path("tiny-ldm"), tmp_path / "ldm")
        builds = [make_engines(path, ["sm_120"], [precision]) for _ in range(2)]
        first, second = ([(row.built.part, row.built.sha256) for row in rows] for rows in builds)
        assert first == second

    def test_engines_for_any_size_are_stored_beside_those_for_one(self, bundle: Path) -> None:
        make_engines(bundle, ["sm_120"], ["fp32"], planes=[(24, 16)], any_size=True)
        one, every = find(bundle, Manifest.load(bundle), "sm_120", "fp32")["decode_first"]
        assert (one.variant, every.variant) == ("1x3x2", ANY)
        assert every.takes({"z": (1, 4, 1, 1, 2)})
        assert not one.takes({"z": (1, 4, 1, 1, 2)})

    @pytest.mark.parametrize("precision", ["int8", "fp8"])
    def test_quantised_engines_build_from_a_ct(
        self, bundle: Path, tmp_path: Path, write_ct: Any, precision: str
    ) -> None:
        write_ct(tmp_path / "ct.nii", (16, 24, 9))
        rows = make_engines(
            bundle, ["sm_89"], [precision], planes=[(16, 24)], calibration=[tmp_path / "ct.nii"]
        )
        assert {row.built.precision for row in rows} == {precision}
        assert {row.built.state for row in rows} == {"float32"}

    def test_a_part_that_does_not_parse_raises_the_parsers_message(self, bundle: Path) -> None:
        model = onnx.load(bundle / "decode_step.onnx", load_external_data=False)
        node = next(n for n in model.graph.node if n.op_type == "Erf")
        node.op_type = "Errorfunction"
        onnx.save(model, bundle / "decode_step.onnx")
        manifest = Manifest.load(bundle, verify=False)
        repaired = {**manifest.files}
        repaired["decode_step.onnx"] = _sha256(bundle / "decode_step.onnx")
        _change(bundle, files=repaired)
        with pytest.raises(EngineError, match=r"decode_step to build for sm_89.*Errorfunction"):
            make_engines(bundle, ["sm_89"], ["fp32"], planes=[(16, 16)])
        assert not list((bundle / "engines" / "sm_89").glob("*fp32*"))

    def test_an_interrupted_build_keeps_the_old_engines(self, bundle: Path) -> None:
        from fvae_deploy.export.to_tensorrt import build
        from fvae_deploy.make.engines import variants

        manifest = Manifest.load(bundle)
        make_engines(bundle, ["sm_89"], ["fp16"], planes=[(16, 16)])
        before = _content(folder_of(bundle, "sm_89", "fp16").parent)
        wanted = variants(manifest, [(24, 24)], False, 1, "1GiB")
        running = build(bundle, manifest, wanted, target="sm_89", precision="fp16")
        next(running)
        running.close()  # what Ctrl-C comes to
        assert _content(folder_of(bundle, "sm_89", "fp16").parent) == before

    @pytest.mark.parametrize(
        ("targets", "precision", "wanted"),
        [
            ([], "fp16", "expected --target"),
            (["sm_90"], "fp16", "sm_120, sm_121, found 'sm_90'.*--package tensorrt"),
            (["sm_75"], "bf16", "use fp16"),
            (["sm_89"], "fp12", "expected one of fp32, fp16, bf16, int8, fp8"),
            (["sm_86"], "fp8", "expected sm_89 or later for fp8, found sm_86"),
            (["sm_89"], "int8", "expected --calibrate CT"),
        ],
    )
    def test_options_that_do_not_fit_are_refused_before_any_work(
        self, bundle: Path, targets: list[str], precision: str, wanted: str
    ) -> None:
        with pytest.raises(UsageError, match=wanted):
            make_engines(bundle, targets, [precision])
        assert not (bundle / "engines").exists()

    def test_sizes_that_are_not_multiples_are_refused(self, bundle: Path) -> None:
        with pytest.raises(UsageError, match="multiples of 8, found 20,16"):
            make_engines(bundle, ["sm_89"], ["fp16"], planes=[(20, 16)])


def _sha256(path: Path) -> str:
    from fvae_deploy.export.bundle import sha256

    return sha256(path)


def _change(bundle: Path, **fields: Any) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
