"""Check model repositories for Triton Inference Server against its schema and in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from fvae_deploy.errors import BundleError, EngineError
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.to_triton import write_repository
from fvae_deploy.stream.codec import bundle_path, open_codec
from fvae_deploy.stream.intensity import ClippingTally, to_model
from fvae_deploy.volume.open import open_volume

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the cpu extra")
schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient")
ROOT = Path(__file__).parents[2]


def config_of(folder: Path) -> Any:
    from google.protobuf import text_format

    text = (folder / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, schema.ModelConfig())


class Server:
    """Runs a model with implicit state as Triton's documentation describes it."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.sessions: dict[str, Any] = {}
        self.states: dict[tuple[str, int], dict[str, Any]] = {}

    def infer(
        self,
        model: str,
        inputs: list[Any],
        outputs: list[Any],
        sequence_id: int,
        sequence_start: bool,
        sequence_end: bool,
    ) -> Any:
        folder, key = self.repository / model, (model, sequence_id)
        config = config_of(folder)
        if model not in self.sessions:
            self.sessions[model] = onnxruntime.InferenceSession(
                str(folder / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
            )
        states = config.sequence_batching.state
        if sequence_start:  # not initialised: sizes that vary are 1
            shapes = {s.input_name: [max(d, 1) for d in s.dims] for s in states}
            self.states[key] = {n: np.full(d, 7, np.float32) for n, d in shapes.items()}
        (start,) = config.sequence_batching.control_input
        given = {i.name: i.array for i in inputs}
        given |= self.states[key] | {start.name: np.array([sequence_start])}
        names = [o.name for o in self.sessions[model].get_outputs()]
        made = dict(zip(names, self.sessions[model].run(None, given), strict=True))
        self.states[key] = {s.input_name: made[s.output_name] for s in states}
        if sequence_end:
            del self.states[key]
        return SimpleNamespace(as_numpy=made.get)


class Tensor(SimpleNamespace):
    def set_data_from_numpy(self, array: Any) -> None:
        self.array = array


CLIENT = SimpleNamespace(
    InferInput=lambda name, shape, kind: Tensor(name=name, shape=shape, kind=kind),
    InferRequestedOutput=lambda name: SimpleNamespace(name=name),
)


def test_the_bundle_stays_readable(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundle_path("tiny"), tmp_path / "tiny"))
    write_repository(bundle, Manifest.load(bundle), tmp_path / "models")
    onnx.load(bundle / "encode_first.onnx")  # weights in two places it would refuse
    copies = list((tmp_path / "models").glob("*/1/weights.safetensors"))
    assert len(copies) == 2
    assert len({path.stat().st_ino for path in copies}) == 1


@pytest.fixture(scope="module")
def example() -> Any:
    path = ROOT / "examples" / "triton_client.py"
    spec = importlib.util.spec_from_file_location("triton_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_client_streams_a_ct_to_the_same_latents_as_fvae(
    tmp_path: Path, write_ct: Any, example: Any
) -> None:
    write_ct(tmp_path / "ct.nii", (21, 16, 11))
    with open_codec("tiny", engine="onnxruntime") as codec:
        manifest = codec.manifest
        frames = next(open_volume(tmp_path / "ct.nii").slabs(11))
        wanted = codec.encode(to_model(frames, manifest.intensity, 24, 16, ClippingTally()))
        names = write_repository(codec.bundle, manifest, tmp_path / "models")
    assert names == ["tiny-encode", "tiny-decode"]
    server = Server(tmp_path / "models")
    for sequence in (1, 2):
        found = example.encode(server, CLIENT, manifest, tmp_path / "ct.nii", sequence)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert not server.states


def test_configurations_fit_the_schema_and_the_graphs(tmp_path: Path) -> None:
    for model in ("tiny", "tiny-ldm"):
        from fvae_deploy.make.engines import open_bundle

        path, manifest = open_bundle(model)
        names = write_repository(path, manifest, tmp_path / model)
        assert set(names) == {folder.name for folder in (tmp_path / model).iterdir()}
        for name in names:
            folder = tmp_path / model / name
            config = config_of(folder)
            session = onnxruntime.InferenceSession(
                str(folder / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
            )
            assert (config.name, config.backend) == (name, "onnxruntime")
            batching = config.sequence_batching
            inputs = {i.name for i in config.input} | {s.input_name for s in batching.state}
            inputs |= {c.name for c in batching.control_input}
            outputs = {o.name for o in config.output} | {s.output_name for s in batching.state}
            assert inputs == {i.name for i in session.get_inputs()}
            assert outputs == {o.name for o in session.get_outputs()}
            for tensor in config.input:
                (real,) = (i for i in session.get_inputs() if i.name == tensor.name)
                assert len(real.shape) == len(tensor.dims)


def test_plans_are_configured_for_tensorrt_with_their_states(
    small_bundle: Path, tmp_path: Path
) -> None:
    from stand_in_gpu import change, write_engines

    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    manifest = Manifest.load(bundle)
    write_engines(bundle, manifest, "fp16")
    with pytest.raises(EngineError, match=r"found tensorrt_rtx: .*--package tensorrt"):
        write_repository(bundle, manifest, tmp_path / "no", target="sm_89", precision="fp16")
    for path in (bundle / "engines/sm_89/fp16").glob("*.json"):
        change(path, package="tensorrt")
    names = write_repository(
        bundle, manifest, tmp_path / "models", target="sm_89", precision="fp16"
    )
    assert names == [f"small-{part.name}" for part in manifest.parts]
    config = config_of(tmp_path / "models" / "small-encode_step")
    kinds = {t.name: schema.DataType.Name(t.data_type) for t in config.input}
    assert (config.backend, kinds["x"], kinds["past0"]) == ("tensorrt", "TYPE_FP32", "TYPE_FP16")
    assert (tmp_path / "models/small-encode_step/1/model.plan").stat().st_size > 1000


def test_a_damaged_plan_is_refused(small_bundle: Path, tmp_path: Path) -> None:
    from stand_in_gpu import change, write_engines

    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    manifest = Manifest.load(bundle)
    write_engines(bundle, manifest, "fp16")
    for path in (bundle / "engines/sm_89/fp16").glob("*.json"):
        change(path, package="tensorrt")
    (bundle / "engines/sm_89/fp16/decode_step.any.engine").write_bytes(b"damaged")
    with pytest.raises(
        EngineError, match=r"decode_step.any.engine.*the file is damaged, run fvae build"
    ):
        write_repository(bundle, manifest, tmp_path / "models", target="sm_89", precision="fp16")
    assert not (tmp_path / "models").exists()


def test_an_existing_folder_is_left_unchanged(tmp_path: Path) -> None:
    from fvae_deploy.make.engines import open_bundle

    with pytest.raises(BundleError, match="expected a new folder"):
        write_repository(*open_bundle("tiny"), tmp_path)
