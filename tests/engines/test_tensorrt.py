"""The TensorRT engine on a GPU if there is one, on a stand-in everywhere, and its errors."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_contract import EngineContract, Stream, error, sample

from fvae_deploy.engines.base import open_engine
from fvae_deploy.errors import EngineError, PlanError
from fvae_deploy.export.manifest import Manifest

pytest.importorskip("onnxruntime", reason="needs the cpu extra")
ROOT = Path(__file__).parents[2]


def has_gpu() -> bool:
    from fvae_deploy.engines.devices import problems

    return not problems("tensorrt")


def copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "bundle"))


@pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU, its driver and TensorRT")
class TestTensorRT(EngineContract):
    """The real engine, built here and run on the GPU."""

    engine_name, device, tolerance = "tensorrt", "cuda", 2e-3  # not yet run

    @pytest.fixture(scope="class")
    @classmethod
    def bundle(cls, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from fvae_deploy.engines.cuda import Gpu
        from fvae_deploy.make.engines import make_engines

        bundle = copied(small_bundle, tmp_path_factory.mktemp("tensorrt"))
        options: dict[str, Any] = {"planes": [(64, 64)], "any_size": True, "step": 3}
        make_engines(bundle, [Gpu().target], ["fp32"], **options)
        return bundle


class TestOnAStandIn(EngineContract):
    """The engine's own logic, with stand-ins for the device and the runtime."""

    engine_name, device = "tensorrt", "cuda"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def cuda(cls) -> Iterator[Any]:
        from stand_in_gpu import install

        with pytest.MonkeyPatch.context() as patch:
            yield install(patch)

    @pytest.fixture(scope="class")
    @classmethod
    def bundle(
        cls, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory, cuda: Any
    ) -> Path:
        from stand_in_gpu import write_engines

        bundle = copied(small_bundle, tmp_path_factory.mktemp("stand_in"))
        for precision in ("fp32", "fp16"):
            write_engines(bundle, Manifest.load(bundle), precision)
        return bundle

    def test_a_stream_allocates_nothing_and_launches_graphs_after_its_first_steps(
        self, bundle: Path, manifest: Manifest, cuda: Any, direction: str
    ) -> None:
        engine = open_engine(bundle, manifest, "tensorrt", "cuda")
        stream = Stream(engine, manifest, direction)
        data = sample(manifest, direction, 9, 3, 5)
        stride = 4 if direction == "encode" else 1
        stream.push(np.ascontiguousarray(data[:, :, :1]), first=True)
        counts = []
        for i in range(9):
            piece = data[:, :, 1 + stride * i : 1 + stride * (i + 1)]
            stream.push(np.ascontiguousarray(piece))
            counts.append((cuda.calls["cudaMalloc"], cuda.calls.get("cudaGraphLaunch", 0)))
        allocated, launched = zip(*counts, strict=True)
        assert len(set(allocated[2:])) == 1
        assert [b - a for a, b in pairwise(launched[2:])] == [1] * 6
        engine.close()

    def test_sizes_in_turn_are_launched_once_before_they_become_a_graph(
        self, bundle: Path, manifest: Manifest, cuda: Any
    ) -> None:
        engine = open_engine(bundle, manifest, "tensorrt", "cuda")
        small, large = (sample(manifest, "decode", 0, 2, w) for w in (3, 4))
        first = [engine.run("decode_first", {"z": z})["x"].copy() for z in (small, large)]
        before = cuda.calls.get("cudaGraphLaunch", 0)
        for z, expected in zip((small, large, small, small), (*first, *first[:1] * 2), strict=True):
            np.testing.assert_array_equal(engine.run("decode_first", {"z": z})["x"], expected)
        assert cuda.calls["cudaGraphLaunch"] > before
        engine.close()

    def test_closing_returns_all_device_memory(
        self, bundle: Path, manifest: Manifest, cuda: Any
    ) -> None:
        engine: Any = open_engine(bundle, manifest, "tensorrt", "cuda")
        Stream(engine, manifest, "decode").push_all(sample(manifest, "decode", 2, 2, 3), (1, 1))
        owned = set(engine._gpu._owned)
        assert owned <= set(cuda.memory)
        engine.close()
        assert not owned & set(cuda.memory)

    def test_half_precision_keeps_its_states_in_half(
        self, bundle: Path, manifest: Manifest, reference: Any, direction: str
    ) -> None:
        engine = open_engine(bundle, manifest, "tensorrt", "cuda", "fp16")
        stream, data = Stream(engine, manifest, direction), sample(manifest, direction, 2, 3, 4)
        result = stream.push_all(data, (1, 1))
        assert 0 < error(result, getattr(reference, direction)(data)) < 1e-2
        assert {state.kind for state in stream.state.values()} == {"float16"}
        assert engine.host(next(iter(stream.state.values()))).dtype == np.float16
        engine.close()

    def test_results_outlive_the_engine(self, bundle: Path, manifest: Manifest) -> None:
        engine = open_engine(bundle, manifest, "tensorrt", "cuda")
        data = sample(manifest, "decode", 0, 2, 2)
        result = engine.run("decode_first", {"z": data})["x"]
        copy = result.copy()
        engine.close()
        np.testing.assert_array_equal(result, copy)

    def test_the_cpu_is_refused_with_the_option_that_runs_it(
        self, bundle: Path, manifest: Manifest
    ) -> None:
        with pytest.raises(EngineError, match="found 'cpu': use --device cuda"):
            open_engine(bundle, manifest, "tensorrt")


class TestStreams:
    """Volumes through engines that were built for one tile size."""

    def test_a_ct_runs_in_tiles_of_the_size_that_was_built(
        self, small_bundle: Path, tmp_path: Path, write_ct: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from stand_in_gpu import install, write_engines

        from fvae_deploy.api import encode
        from fvae_deploy.engines import devices
        from fvae_deploy.storage.latents import LatentReader

        install(monkeypatch)
        monkeypatch.setattr(devices, "target", lambda: "sm_89")
        bundle = copied(small_bundle, tmp_path)
        halo = Manifest.load(bundle).part("encode_step").halo
        assert halo is not None
        side = 2 * halo + 3
        write_engines(bundle, Manifest.load(bundle), cells=(side, side))
        write_ct(tmp_path / "ct.nii", (8 * side + 13, 8 * side + 20, 6))
        results = []
        for engine, device in (("auto", "cuda"), ("onnxruntime", "cpu")):
            path = tmp_path / f"{engine}.zarr"
            options: dict[str, Any] = {"model": bundle, "engine": engine, "device": device}
            report = encode(tmp_path / "ct.nii", path, **options)
            reader = LatentReader(path)
            results.append(reader.read(0, 3))
            if engine == "auto":
                assert report["plan"]["tile_cells"] == {"encode": [side, side]}
                assert report["plan"]["tiles"]["encode"] > 1
                assert report["engine"] == "tensorrt"
        assert error(*results) < 2e-5

    def test_slices_smaller_than_what_was_built_are_refused_with_the_option(
        self, small_bundle: Path, tmp_path: Path, write_ct: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from stand_in_gpu import install, write_engines

        from fvae_deploy.api import encode

        install(monkeypatch)
        bundle = copied(small_bundle, tmp_path)
        write_engines(bundle, Manifest.load(bundle), cells=(8, 8))
        write_ct(tmp_path / "ct.nii", (32, 32, 5))
        with pytest.raises(PlanError, match=r"within 4x4 cells, found 8x8: .*--any-size"):
            encode(
                tmp_path / "ct.nii",
                tmp_path / "z.zarr",
                model=bundle,
                engine="tensorrt",
                device="cuda",
            )


class TestRefusals:
    """Errors in one line, each with a remedy; none needs a GPU."""

    @pytest.fixture
    def bundle(self, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        from stand_in_gpu import install, write_engines

        install(monkeypatch)
        bundle = copied(small_bundle, tmp_path)
        write_engines(bundle, Manifest.load(bundle))
        return bundle

    def error_of(self, bundle: Path, run: bool = False) -> str:
        def use() -> None:
            engine = open_engine(bundle, Manifest.load(bundle), "tensorrt", "cuda")
            if run:
                engine.run("encode_first", {"x": np.zeros((1, 1, 1, 16, 16), np.float32)})

        with pytest.raises(EngineError) as caught:
            use()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_engines_of_another_bundle_are_stale(self, bundle: Path) -> None:
        from stand_in_gpu import change

        change(bundle / "engines/sm_89/fp32/encode_step.any.json", bundle="0" * 64)
        message = self.error_of(bundle)
        pattern = r"for 000000000000: it is stale, run fvae build .* --target sm_89"
        assert re.search(pattern, message)

    def test_engines_of_another_gpu_are_named(self, bundle: Path) -> None:
        (bundle / "engines/sm_89").rename(bundle / "engines/sm_86")
        message = self.error_of(bundle)
        assert re.search(r"found engines/sm_86/fp32: run fvae build .* --target sm_89", message)

    def test_engines_in_the_wrong_folder_are_detected(self, bundle: Path) -> None:
        from stand_in_gpu import change

        change(bundle / "engines/sm_89/fp32/decode_step.any.json", target="sm_120")
        assert "architecture sm_89, found" in self.error_of(bundle)

    def test_a_truncated_engine_is_never_loaded(self, bundle: Path) -> None:
        path = bundle / "engines/sm_89/fp32/encode_first.any.engine"
        path.write_bytes(path.read_bytes()[:-1])
        assert re.search(r"the file is damaged, run fvae build", self.error_of(bundle, run=True))

    def test_another_version_of_tensorrt_is_refused_with_both_remedies(self, bundle: Path) -> None:
        from stand_in_gpu import change

        for path in (bundle / "engines/sm_89/fp32").glob("*.json"):
            change(path, version="1.2.3")
        message = self.error_of(bundle)
        assert message.endswith(
            "found 0.stand.in: pip install tensorrt-rtx==1.2.3, or run fvae build again"
        )

    def test_a_missing_part_and_a_damaged_description_are_refused(self, bundle: Path) -> None:
        folder = bundle / "engines/sm_89/fp32"
        (folder / "encode_first.any.json").write_text("{}")
        assert "description of an engine" in self.error_of(bundle)
        (folder / "encode_first.any.json").unlink()
        assert "an engine of encode_first" in self.error_of(bundle)

    def test_sizes_that_nothing_was_built_for_name_the_option(self, bundle: Path) -> None:
        from stand_in_gpu import change

        shape = [1, 1, 1, 24, 24]
        change(bundle / "engines/sm_89/fp32/encode_first.any.json", profile={"x": [shape] * 3})
        assert re.search(
            r"found \[1, 1, 1, 16, 16\]: .*--any-size", self.error_of(bundle, run=True)
        )


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_an_error_with_the_remedy(small_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt extra")
    pytest.importorskip("cuda.bindings", reason="needs the tensorrt extra")
    with pytest.raises(EngineError, match=r"NVIDIA GPU number 0, found cudaError\w+: install"):
        open_engine(small_bundle, Manifest.load(small_bundle), "tensorrt", "cuda")


class TestNames:
    """The installed packages have the names and arguments that the code uses."""

    def test_the_cuda_runtime_has_all_names(self) -> None:
        runtime = pytest.importorskip("cuda.bindings", reason="needs the tensorrt extra").runtime
        text = (ROOT / "engines/cuda.py").read_text(encoding="utf-8")
        names = set(re.findall(r"\bcuda[A-Z]\w+", text)) - {"cudaMemcpy", "cudaSuccess"}
        assert len(names) > 20
        groups = (runtime, runtime.cudaDeviceAttr, runtime.cudaStreamCaptureMode)
        for name in names:
            assert any(hasattr(group, name) for group in groups), name
        for direction in ("HostToDevice", "DeviceToHost"):
            assert hasattr(runtime.cudaMemcpyKind, f"cudaMemcpy{direction}")

    @pytest.mark.parametrize(
        ("owner", "name", "arguments"),
        [
            ("IExecutionContext", "set_input_shape", r"name: str, shape: "),
            ("IExecutionContext", "set_tensor_address", r"name: str, memory: "),
            ("IExecutionContext", "execute_async_v3", r"stream_handle: "),
            ("ICudaEngine", "create_execution_context", r"strategy: .*STATIC"),
            ("Runtime", "deserialize_cuda_engine", r"serialized_engine: .*ICudaEngine"),
            ("Runtime", "__init__", r"logger: "),
            ("OnnxParser", "parse_from_file", r"model: str\) -> bool"),
            ("Builder", "create_network", r"flags: "),
            ("Builder", "build_serialized_network", r"network: .*config: .*IHostMemory"),
            ("IBuilderConfig", "create_timing_cache", r"serialized_timing_cache: "),
            ("IBuilderConfig", "set_timing_cache", r"cache: .*ignore_mismatch: bool"),
            ("IBuilderConfig", "add_optimization_profile", r"profile: .* -> int"),
            ("IOptimizationProfile", "set_shape", r"input: str, min: .*opt: .*max: "),
        ],
    )
    def test_tensorrt_has_all_arguments(self, owner: str, name: str, arguments: str) -> None:
        trt = pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt extra")
        text = getattr(getattr(trt, owner), name).__doc__ or ""
        assert re.search(arguments, text), text.splitlines()[:4]
