"""Write a bundle as a model repository for NVIDIA's Triton Inference Server.

    DIR/tiny-encode/config.pbtxt        ONNX Runtime: one model per stage; Triton keeps its state
        tiny-encode/1/model.onnx        between the requests of a sequence, and the input START
                      weights.safetensors   selects the first or the step part
    DIR/tiny-encode_step/config.pbtxt   TensorRT: one model per part; requests carry the states
        tiny-encode_step/1/model.plan

For ONNX Runtime, the first and the step part become branches of one graph, and Triton keeps the
states: a client sends frames and receives latents. A TensorRT plan has no branches, and Triton
initialises states with zeros, which is wrong for a first frame. So with TensorRT the client passes
the states from one request to the next. So it does with a decoder that looks ahead: one graph takes
every step, the states are zeros at first, and the client counts the clock (see `bundle.Part`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from fvae_deploy.errors import BundleError, EngineError
from fvae_deploy.export.built import ANY, BuiltEngine, find, folder_of, read_engine
from fvae_deploy.export.bundle import Bundle, Part, TensorSpec

WEIGHTS = "weights.safetensors"
IDLE = 600_000_000  # microseconds without a request after which Triton ends a sequence
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}
TYPES["int64"] = "TYPE_INT64"


def write_repository(
    bundle: Path, manifest: Bundle, folder: Path, *, target: str = "", precision: str = "fp32"
) -> list[str]:
    """Write the repository to a new folder, which appears when it is complete.

    With a `target`, Triton serves the engines built for it, else the graphs with ONNX Runtime.
    Returns the names of the models. Raises BundleError if the folder exists, and EngineError if
    no engine that Triton can load was built.
    """
    if folder.exists():
        raise BundleError(f"expected a new folder, found {folder}: remove it or choose another")
    if not folder.absolute().parent.is_dir():
        raise BundleError(f"expected a folder {folder.parent}, found none: create it")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        if target:
            names = list(_plans(bundle, manifest, temporary, target, precision))
        else:
            names = list(_graphs(bundle, manifest, temporary))
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return names


def _graphs(bundle: Path, manifest: Bundle, folder: Path) -> Iterator[str]:
    """Write an ONNX Runtime model for every stage; yields the names."""
    by_name = {part.name: part for part in manifest.parts}
    weights: Path | None = None
    for stage in dict.fromkeys(part.stage for part in manifest.parts):
        first, step = by_name.get(f"{stage}_first"), by_name.get(f"{stage}_step")
        name = f"{manifest.name}-{stage}"
        version = folder / name / "1"
        version.mkdir(parents=True)
        if first is not None and step is not None and step.state_inputs:
            onnx.save(branched(bundle, first, step), str(version / "model.onnx"))
            config = _config(name, "onnxruntime", step, states=True, x=_open(step.inputs[0]))
        else:
            part = by_name.get(stage) or first or step
            assert part is not None
            shutil.copyfile(bundle / part.file, version / "model.onnx")
            config = _config(name, "onnxruntime", part)
        # onnx refuses weights files with several hard links, so the bundle's own file is copied.
        if weights is None:
            shutil.copyfile(bundle / WEIGHTS, version / WEIGHTS)
            weights = version / WEIGHTS
        else:
            _link(weights, version / WEIGHTS)
        (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
        yield name


def _plans(
    bundle: Path, manifest: Bundle, folder: Path, target: str, precision: str
) -> Iterator[str]:
    """Write a TensorRT model for every part, from its engine for any size or else the first."""
    for part_name, engines in find(bundle, manifest, target, precision).items():
        built = engines[-1] if engines[-1].variant == ANY else engines[0]
        if built.package != "tensorrt":
            raise EngineError(
                f"expected engines built with tensorrt for Triton, found {built.package}: run on a "
                f"machine with that GPU, fvae build {bundle} --target {target} --package tensorrt"
            )
        name = f"{manifest.name}-{part_name}"
        version = folder / name / "1"
        version.mkdir(parents=True)
        read_engine(bundle, built)  # raises if the file is damaged
        source = folder_of(bundle, target, precision) / f"{built.file}.engine"
        _link(source, version / "model.plan")
        config = _config(name, "tensorrt", manifest.part(part_name), built=built)
        (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
        yield name


def branched(bundle: Path, first: Part, step: Part) -> onnx.ModelProto:
    """Join both parts of a stage in one graph; START selects the first, which needs no state."""
    shared: dict[tuple[str, ...], str] = {}
    weights: list[TensorProto] = []
    branches = []
    for part in (first, step):
        model = onnx.load(bundle / part.file, load_external_data=False)
        inputs = {spec.name for spec in part.inputs}
        renamed = _share_weights(model.graph, shared, weights)
        branches.append(_branch(model.graph, f"{part.name}.", inputs, renamed))
    choice = helper.make_node(
        "If",
        ["START"],
        [spec.name for spec in step.outputs],
        then_branch=branches[0],
        else_branch=branches[1],
    )
    start = helper.make_tensor_value_info("START", TensorProto.BOOL, [1])
    x = helper.make_tensor_value_info(step.inputs[0].name, TensorProto.FLOAT, _open(step.inputs[0]))
    graph = helper.make_graph(
        [choice],
        step.stage,
        [start, x, *(_info(spec) for spec in step.state_inputs)],
        [
            helper.make_tensor_value_info(
                step.outputs[0].name, TensorProto.FLOAT, _open(step.outputs[0])
            ),
            *(_info(spec) for spec in step.state_outputs),
        ],
        weights,
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _share_weights(
    graph: onnx.GraphProto, shared: dict[tuple[str, ...], str], weights: list[TensorProto]
) -> dict[str, str]:
    """Move external weights to the joined graph, each only once; returns their new names."""
    renamed = {}
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            place = (*(entry.value for entry in tensor.external_data), str(list(tensor.dims)))
            if place not in shared:
                shared[place] = f"weights.{len(shared)}"
                weights.append(TensorProto())
                weights[-1].CopyFrom(tensor)
                weights[-1].name = shared[place]
            renamed[tensor.name] = shared[place]
    kept = [t for t in graph.initializer if t.name not in renamed]
    graph.ClearField("initializer")
    graph.initializer.extend(kept)
    return renamed


def _branch(
    graph: onnx.GraphProto, prefix: str, inputs: set[str], renamed: dict[str, str]
) -> onnx.GraphProto:
    """Turn a graph into a branch: it takes the outer graph's inputs; other names get a prefix."""

    def name(old: str) -> str:
        return old if old in inputs or not old else renamed.get(old, prefix + old)

    for node in graph.node:
        node.input[:] = [name(n) for n in node.input]
        node.output[:] = [name(n) for n in node.output]
        node.name = prefix + node.name
    for tensor in (*graph.initializer, *graph.output):
        tensor.name = name(tensor.name)
    graph.ClearField("input")
    graph.ClearField("value_info")
    graph.name = prefix.rstrip(".")
    return graph


def _info(spec: TensorSpec) -> onnx.ValueInfoProto:
    shape = [size if isinstance(size, int) else None for size in spec.shape]
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, shape)


def _open(spec: TensorSpec) -> list[int | None]:
    """Return the shape of data with open T, H and W; T differs between first and later steps."""
    return [*(s if isinstance(s, int) else None for s in spec.shape[:2]), None, None, None]


def _config(
    name: str,
    backend: str,
    part: Part,
    *,
    states: bool = False,
    x: Sequence[int | None] = (),
    built: BuiltEngine | None = None,
) -> str:
    """Return a model's configuration in protobuf's text format."""
    data_in = part.inputs[:1] if states else part.inputs
    data_out = part.outputs[:1] if states else part.outputs
    half = built.state if built is not None and part.state_outputs else "float32"
    carried = {spec.name for spec in (*part.state_inputs, *part.state_outputs)}

    def tensor(spec: TensorSpec) -> str:
        dims = x if states and spec is part.inputs[0] else spec.shape
        if states and spec is part.outputs[0]:
            dims = _open(spec)
        kind = half if spec.name in carried else spec.type
        return f'{{ name: "{spec.name}" data_type: {TYPES[kind]} dims: {_dims(dims)} }}'

    lines = [f'name: "{name}"', f'backend: "{backend}"', "max_batch_size: 0"]
    lines += [f"input {tensor(spec)}" for spec in data_in]
    lines += [f"output {tensor(spec)}" for spec in data_out]
    if states:
        lines += [
            "sequence_batching {",
            f"  max_sequence_idle_microseconds: {IDLE}",
            '  control_input { name: "START" control {',
            "    kind: CONTROL_SEQUENCE_START bool_false_true: [ false, true ] } }",
        ]
        lines += [
            f'  state {{ input_name: "{old.name}" output_name: "{new.name}" '
            f"data_type: TYPE_FP32 dims: {_dims(old.shape)} }}"
            for old, new in zip(part.state_inputs, part.state_outputs, strict=True)
        ]
        lines += ["  direct { }", "}"]
    lines.append("instance_group { kind: KIND_GPU count: 1 }")
    return "\n".join(lines) + "\n"


def _dims(shape: Sequence[int | str | None]) -> str:
    return "[ " + ", ".join(str(s) if isinstance(s, int) else "-1" for s in shape) + " ]"


def _link(source: Path, target: Path) -> None:
    """Hard-link a file to a second path, or copy it if the file system cannot link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
