"""A manifest is loaded as it was saved, and damage is reported in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import write_fake_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import FILENAME, TensorSpec, kind_of, sha256
from fvae_deploy.export.manifest import Manifest, Memory, Parity


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with a graph file, parity and memory, so that every field has a value."""
    folder = tmp_path / "bundle"
    manifest = write_fake_bundle(folder)
    graph = folder / "encode_first.onnx"
    graph.write_bytes(b"a graph")
    first = dataclasses.replace(manifest.parts[0], file=graph.name)
    dataclasses.replace(
        manifest,
        parts=(first, *manifest.parts[1:]),
        files={**manifest.files, graph.name: sha256(graph)},
        parity=(Parity("openvino", "fp32", 1e-5, 0.01, 0.2),),
        memory=(Memory("openvino", "fp32", "encode", 1000, 10),),
    ).save(folder)
    return folder


def test_a_manifest_is_loaded_as_it_was_saved(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(bundle)
    manifest.save(tmp_path)
    again = Manifest.load(tmp_path, verify=False)
    assert again == manifest
    assert again.parity[0].hu_max == 0.2
    assert again.part("encode_step").state_inputs[0].shape == (1, "h", "w", 1)
    assert manifest.identity == sha256(bundle / "weights.safetensors")[:16]


def test_fields_of_a_later_fvae_are_ignored(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    edit(bundle, lambda content: content.update(colour="blue"))
    assert Manifest.load(bundle) == manifest


def edit(bundle: Path, change: Callable[[Any], object]) -> None:
    path = bundle / FILENAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edited(change: Callable[[Any], object]) -> Callable[[Path], object]:
    return lambda bundle: edit(bundle, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda b: (b / FILENAME).unlink(), "found no manifest.json: make one with", id="none"
        ),
        pytest.param(lambda b: (b / FILENAME).write_bytes(b"{"), "expected JSON", id="cut short"),
        pytest.param(lambda b: (b / FILENAME).write_bytes(b""), "expected JSON", id="empty"),
        pytest.param(
            lambda b: (b / FILENAME).write_bytes(b"\xff\xfe\x00"), "expected JSON", id="no text"
        ),
        pytest.param(
            lambda b: (b / FILENAME).write_bytes(b"[" * 99999), "expected JSON", id="deep nesting"
        ),
        pytest.param(
            lambda b: (b / FILENAME).write_bytes(b"9" * 9999), "expected JSON", id="a huge number"
        ),
        pytest.param(
            lambda b: (b / FILENAME).write_bytes(b"[]"), "schema 3, found None", id="a list"
        ),
        pytest.param(
            edited(lambda c: c.update(schema=4)),
            "schema 3, found 4 .*install the version that made it",
            id="later schema",
        ),
        pytest.param(
            edited(lambda c: c.update(schema=True)),
            "schema 3, found True",
            id="a truth for a number",
        ),
        pytest.param(
            edited(lambda c: c["geometry"].pop("spatial")),
            "field spatial at manifest.geometry",
            id="field left out",
        ),
        pytest.param(
            edited(lambda c: c.update(name=3)), "expected str at manifest.name", id="wrong type"
        ),
        pytest.param(
            edited(lambda c: c.update(parts={})), "at manifest.parts", id="wrong container"
        ),
        pytest.param(
            edited(lambda c: c["intensity"].update(hu_min=10**400)),
            "expected float at manifest.intensity.hu_min",
            id="number beyond floats",
        ),
        pytest.param(
            edited(lambda c: c["intensity"].update(hu_max=-1000)),
            "ranges in ascending order",
            id="empty HU window",
        ),
        pytest.param(
            edited(lambda c: c["geometry"].update(temporal=0)), "at least 1", id="stride of 0"
        ),
        pytest.param(
            edited(lambda c: c["latent"]["scale"].pop()), "every latent channel", id="short scale"
        ),
        *(
            pytest.param(
                edited(lambda c, n=number: c["latent"]["scale"].__setitem__(0, n)),
                "scales other than 0",
                id=f"scale {number}",
            )
            for number in (0.0, float("nan"), float("inf"))
        ),
        pytest.param(
            edited(lambda c: c["parts"][0]["inputs"][0].update(shape=["8*q"])),
            r"like 8\*h",
            id="unknown symbol",
        ),
        pytest.param(
            edited(lambda c: c["parts"][0].update(file="other.onnx")),
            "sha256 of every part's file",
            id="part without a hash",
        ),
        pytest.param(
            edited(lambda c: c["files"].pop("weights.safetensors")),
            "sha256 of weights",
            id="weights without a hash",
        ),
        pytest.param(
            edited(lambda c: c["files"].update({"../../key": "0"})),
            "plain file names",
            id="file outside the bundle",
        ),
        *(
            pytest.param(
                edited(lambda c, n=name: c.update(name=n)), "a plain name", id=f"named {name}"
            )
            for name in ("../../escaped/evil", "a/b", "..", "")
        ),
        pytest.param(
            lambda b: (b / "weights.safetensors").write_bytes(b"other"),
            "sha256 .* of weights.safetensors .* changed or damaged",
            id="changed weights",
        ),
        pytest.param(
            lambda b: (b / "encode_first.onnx").unlink(),
            "expected encode_first.onnx in bundle",
            id="missing graph",
        ),
    ],
)
def test_a_damaged_bundle_is_refused_with_the_remedy(
    bundle: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.load(bundle)
    assert "\n" not in str(caught.value)
    assert "export" in str(caught.value)


def test_the_kind_of_a_file_that_is_not_json_is_empty(bundle: Path) -> None:
    assert kind_of(bundle) == "vae"
    for content in (b"[" * 99999, b"{", b"[]", b"\xff"):
        (bundle / FILENAME).write_bytes(content)
        assert kind_of(bundle) == ""


def test_a_path_that_is_not_a_folder_is_refused(bundle: Path) -> None:
    for path in (bundle / FILENAME, bundle / "absent"):
        with pytest.raises(BundleError, match="expected a bundle at"):
            Manifest.load(path)


def test_without_verification_the_files_are_not_read(bundle: Path) -> None:
    (bundle / "weights.safetensors").unlink()
    assert Manifest.load(bundle, verify=False).name == "fake"


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to every value in a JSON document, except the document itself."""
    keys = content if isinstance(content, dict) else range(len(content))
    found = []
    for key in keys:
        found.append((*path, key))
        if isinstance(content[key], dict | list):
            found += places(content[key], (*path, key))
    return found


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["4*k", "h", "", "fake", "encode_step", "0*k"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_json_loads_or_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    manifest = write_fake_bundle(folder)
    manifest = dataclasses.replace(
        manifest,
        parity=(Parity("openvino", "fp32", 1e-5, 0.01, 0.2),),
        memory=(Memory("openvino", "fp32", "encode", 1000, 10),),
    )
    content = json.loads(json.dumps(dataclasses.asdict(manifest)))
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = data.draw(st.sampled_from(places(content)))
        parent = content
        for key in way:
            parent = parent[key]
        if data.draw(st.booleans()):
            del parent[last]
        else:
            parent[last] = copy.deepcopy(data.draw(values))
    (folder / FILENAME).write_text(json.dumps(content))
    refused = None
    try:
        loaded = Manifest.load(folder)
    except BundleError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused
        return
    # A manifest that loads must be usable.
    assert loaded.identity == manifest.identity
    for part in loaded.parts:
        for tensor in (*part.inputs, *part.outputs):
            assert tensor.accepts(tensor.sized(1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "accepted"),
    [
        ((1, 1, 4, 16, 24), True),
        ((1, 1, 12, 8, 8), True),
        ((1, 1, 6, 16, 24), False),
        ((1, 1, 4, 0, 24), False),
        ((2, 1, 4, 16, 24), False),
        ((1, 1, 4, 16), False),
    ],
)
def test_a_tensor_accepts_the_shapes_of_some_k_h_and_w(
    shape: tuple[int, ...], accepted: bool
) -> None:
    spec = TensorSpec("x", (1, 1, "4*k", "8*h", "8*w"))
    assert spec.accepts(shape) is accepted
    assert spec.sized(1, 2, 3) == (1, 1, 4, 16, 24)
