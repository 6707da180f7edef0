"""Bundles on disk are complete or absent; graphs hold no weights and no paths of the exporter."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

onnx = pytest.importorskip("onnx", reason="needs the export extra")
torch = pytest.importorskip("torch", reason="needs the export extra")
from random_lean_vae import SMALL_SCALE  # noqa: E402

from fvae_deploy.errors import BundleError, EngineError  # noqa: E402
from fvae_deploy.export import exporter, to_onnx  # noqa: E402
from fvae_deploy.export.bundle import Source, sha256  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.manifest import LatentNormalisation, Manifest, Parity  # noqa: E402
from fvae_deploy.export.models.lean_vae import LeanVAE  # noqa: E402
from fvae_deploy.export.models.lean_vae_parts import lean_vae_model  # noqa: E402
from fvae_deploy.export.probe import parts_of  # noqa: E402
from fvae_deploy.export.to_onnx import ExportOptions, export_bundle, trace  # noqa: E402
from fvae_deploy.make import bundle as make_bundle  # noqa: E402

PARTS = ["encode_first", "encode_step", "decode_first", "decode_step"]
TINY = Path(__file__).parents[2] / "tools" / "train_tiny" / "tiny.safetensors"


def loaded(model: LeanVAE, name: str = "n") -> LoadedModel:
    stages = lean_vae_model(model, 1, SMALL_SCALE)
    return LoadedModel(stages, Source("s", "r", "0"), name, "d", "l")


def export(model: LeanVAE, folder: Path, **options: Any) -> Manifest:
    return export_bundle(loaded(model), folder, version="0", options=ExportOptions(**options))


def test_the_folder_holds_the_manifest_one_weights_file_and_four_graphs(
    small_bundle: Path,
) -> None:
    manifest = Manifest.load(small_bundle)
    names = {"weights.safetensors", *(f"{part}.onnx" for part in PARTS)}
    assert {p.name for p in small_bundle.iterdir()} == names | {"manifest.json"}
    assert manifest.files.keys() == names
    assert [part.name for part in manifest.parts] == PARTS
    assert manifest.latent.scale == tuple(SMALL_SCALE)
    assert manifest.geometry.channels == 1
    for path in small_bundle.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
    assert small_bundle.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("part", PARTS)
def test_a_graph_holds_no_weights_of_its_own(small_bundle: Path, part: str) -> None:
    graph = onnx.load(small_bundle / f"{part}.onnx", load_external_data=False).graph
    external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert external
    size = (small_bundle / "weights.safetensors").stat().st_size
    for tensor in external:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "weights.safetensors"
        assert int(entries["offset"]) + int(entries["length"]) <= size
    own = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    own += [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
    # The exporter folds the reshape that makes a strided convolution of the patches' weights.
    folded = [t for t in own if t.name.startswith("reshape") and list(t.dims[2:]) == [8, 8]]
    assert len(folded) == part.startswith("encode")
    for tensor in own:
        assert tensor in folded or len(tensor.SerializeToString()) < 200, tensor.name


@pytest.mark.parametrize("part", PARTS)
def test_a_graph_is_valid_at_the_requested_opset(small_bundle: Path, part: str) -> None:
    path = small_bundle / f"{part}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    opsets = {o.domain: o.version for o in onnx.load(path, load_external_data=False).opset_import}
    assert opsets == {"": 18}


@pytest.mark.parametrize("part", PARTS)
def test_a_graph_has_the_inputs_and_outputs_of_the_manifest(small_bundle: Path, part: str) -> None:
    graph = onnx.load(small_bundle / f"{part}.onnx", load_external_data=False).graph
    spec = Manifest.load(small_bundle).part(part)
    assert [value.name for value in graph.input] == [t.name for t in spec.inputs]
    assert [value.name for value in graph.output] == [t.name for t in spec.outputs]
    for value, tensor in zip(graph.input, spec.inputs, strict=True):
        dimensions = value.type.tensor_type.shape.dim
        fixed = [d.dim_value if d.HasField("dim_value") else None for d in dimensions]
        assert fixed == [d if isinstance(d, int) else None for d in tensor.shape]


def test_no_file_contains_paths_of_the_exporting_machine(small_bundle: Path) -> None:
    places = [Path.cwd(), Path.home(), Path(__file__).parents[2], Path(torch.__file__).parents[1]]
    for path in small_bundle.iterdir():
        content = path.read_bytes()
        for place in places:
            assert len(place.parts) == 1 or str(place).encode() not in content, path.name
        assert b".py" not in content, path.name


@pytest.mark.parametrize("opset", [18, 20])
def test_a_part_traced_again_has_the_same_bytes_and_the_requested_opset(
    small_model: LeanVAE, small_bundle: Path, opset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The optimizer rule that is switched off to save time would not change anything.
    monkeypatch.setattr(exporter, "_without_slice_split_rule", contextlib.nullcontext)
    model = lean_vae_model(small_model, 1, SMALL_SCALE)
    encode, spec = model.stages["encode"], parts_of(model)[0]
    proto = trace(encode, spec, opset)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    if opset == 18:
        offsets = to_onnx._offsets(small_bundle / "weights.safetensors")
        to_onnx._point_into(proto, offsets, "encode.")
        assert proto.SerializeToString() == (small_bundle / spec.file).read_bytes()


def test_the_weights_file_has_the_same_bytes_each_time(
    small_model: LeanVAE, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "trace", lambda *_: onnx.ModelProto())  # slow, tested above
    export(small_model, tmp_path / "again")
    name = "weights.safetensors"
    assert sha256(tmp_path / "again" / name) == sha256(small_bundle / name)


@pytest.mark.parametrize(
    ("prepare", "folder", "message"),
    [
        pytest.param(
            lambda p: (p / "b").mkdir(), "b", "expected a new folder, found .*: remove", id="is"
        ),
        pytest.param(
            lambda p: (p / "b").write_text("mine"), "b", "expected a new folder", id="is a file"
        ),
        pytest.param(lambda p: None, "a/b", "found none: create it", id="no parent"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_created(
    small_model: LeanVAE,
    tmp_path: Path,
    prepare: Callable[[Path], object],
    folder: str,
    message: str,
) -> None:
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=message):
        export(small_model, tmp_path / folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the graphs, which take seconds; these tests open none."""
    monkeypatch.setattr(to_onnx, "trace", lambda *_: onnx.ModelProto())


def test_the_folder_appears_after_everything_is_measured(
    small_model: LeanVAE, tmp_path: Path, without_graphs: None
) -> None:
    row = Parity("torch", "fp32", 0.0, 0.0, 0.0)

    def measure(folder: Path, manifest: Manifest) -> Manifest:
        assert Manifest.load(folder) == manifest
        assert not (tmp_path / "bundle").exists()  # so a killed export leaves no bundle
        return dataclasses.replace(manifest, parity=(row,))

    manifest = export(small_model, tmp_path / "bundle", measure=measure)
    assert Manifest.load(tmp_path / "bundle").parity == manifest.parity == (row,)


def test_make_bundle_measures_before_the_folder_appears(
    tmp_path: Path, without_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, manifest: Manifest, *more: object) -> Manifest:
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        assert folder.name.startswith(".bundle.")
        raise KeyboardInterrupt

    monkeypatch.setattr(make_bundle, "measure_bundle", fail)
    with pytest.raises(KeyboardInterrupt):
        make_bundle.make_bundle(TINY, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_exports_to_one_folder_is_refused(
    small_model: LeanVAE, tmp_path: Path, without_graphs: None
) -> None:
    def measure(folder: Path, manifest: Manifest) -> Manifest:
        export(small_model, tmp_path / "bundle")
        return manifest

    with pytest.raises(BundleError, match=r"expected a new folder, found .*: remove"):
        export(small_model, tmp_path / "bundle", measure=measure)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["../../escaped/evil", "a/b", "..", ""])
def test_a_name_that_is_a_path_is_refused(small_model: LeanVAE, tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="expected a plain name"):
        export_bundle(loaded(small_model, name), tmp_path / "bundle", version="0")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_could_not_be_opened_is_refused(
    small_model: LeanVAE, tmp_path: Path, without_graphs: None
) -> None:
    network = loaded(small_model)
    model = dataclasses.replace(network.model, latent=LatentNormalisation((0.0,), (1.0,)))
    wrong = dataclasses.replace(network, model=model)
    with pytest.raises(BundleError, match="a scale for every latent channel"):
        export_bundle(wrong, tmp_path / "bundle", version="0")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_is_written_completely_or_not_at_all(
    fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    manifest = Manifest.load(fake_bundle)
    manifest.save(tmp_path)
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(manifest, description="another").save(tmp_path)
    assert Manifest.load(tmp_path, verify=False) == manifest


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_export_that_fails_leaves_nothing(
    small_model: LeanVAE,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: type[BaseException],
) -> None:
    seen = []

    def fail(*_: Any) -> None:
        seen.extend(tmp_path.rglob("weights.safetensors"))
        raise failure

    monkeypatch.setattr(to_onnx, "trace", fail)
    with pytest.raises(failure):
        export(small_model, tmp_path / "bundle")
    assert seen, "the failure must come after the first file"
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_overflows_is_left_out_and_reported(
    small_model: LeanVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_bundle, "MEASURED", ("torch",))
    monkeypatch.setattr(make_bundle, "memory_lines", lambda *arguments: [])
    model = copy.deepcopy(small_model)
    for name in ("image_low", "video_low", "image_high", "video_high"):
        model.encoder.projection(name).weight.data *= 1e6  # float16 ends at 65504
    messages: list[str] = []
    manifest = make_bundle.measure_bundle(
        tmp_path / "b",
        export(model, tmp_path / "b"),
        messages.append,
        make_bundle.measurable(None),
    )
    assert [p.precision for p in manifest.parity] == ["fp32", "bf16"]
    assert any(
        "left out: expected finite values from encode in torch fp16" in line for line in messages
    )


def test_only_the_engines_that_were_asked_for_are_measured(
    small_model: LeanVAE, tmp_path: Path
) -> None:
    pairs = make_bundle.measurable([("torch", "bf16")])
    assert pairs == [("torch", "fp32"), ("torch", "bf16")]
    manifest = make_bundle.measure_bundle(
        tmp_path / "b", export(small_model, tmp_path / "b"), lambda message: None, pairs
    )
    assert [(p.engine, p.precision) for p in manifest.parity] == pairs
    assert {(m.engine, m.precision) for m in manifest.memory} == {("torch", "fp32")}


@pytest.mark.parametrize(
    ("engines", "calibrated"),
    [([("tensorrt", "fp32")], False), ([("openvino", "int8")], False), ([("torch", "int8")], True)],
)
def test_engines_that_cannot_be_measured_are_refused_before_the_export(
    tmp_path: Path, engines: list[tuple[str, str]], calibrated: bool
) -> None:
    with pytest.raises(EngineError, match=r"can measure here .*: name one of these"):
        make_bundle.measurable(engines, calibrated=calibrated)
    with pytest.raises(EngineError, match="can measure here"):
        make_bundle.make_bundle(tmp_path / "none", tmp_path / "b", engines=engines)
    with pytest.raises(EngineError, match="can measure here"):
        make_bundle.make_generator_bundle(tmp_path / "none", tmp_path / "b", engines=engines)
