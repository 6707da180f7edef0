"""Cut a stage into a program: local segments, passes over maps, and what keeps the whole plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Dimension, Part, TensorSpec
from fvae_deploy.export.cut import local, passes, views  # noqa: F401  (they register their rules)
from fvae_deploy.export.cut.emit import Emitter
from fvae_deploy.export.cut.lower import BundleMisfit, Op, lower
from fvae_deploy.export.cut.parts import costs_of, part_of, spec
from fvae_deploy.export.cut.phases import Phase, is_spatial, scale_of, split
from fvae_deploy.export.cut.storage import Storage
from fvae_deploy.export.cut.trace import trace_stage
from fvae_deploy.export.program import Pass, Program, Segment


@dataclass(frozen=True)
class Cut:
    """A program, and the torch modules of its segments by the names of their parts."""

    program: Program
    modules: Mapping[str, nn.Module]


def cut_part(network: nn.Module, part: Part) -> Cut:
    """Cut the stage that a part runs without state, for one slice or one window at a time."""
    data = part.inputs[0]
    shape: list[Dimension] = []
    for dimension in data.shape:
        factor, _, symbol = str(dimension).rpartition("*")
        size = int(factor or 1) * (part.scale if symbol in ("h", "w") else 1)
        if symbol == "k":
            dimension = size
        elif symbol in ("h", "w"):
            dimension = f"{size}*{symbol}" if size > 1 else symbol
        shape.append(dimension)
    return cut_stage(network, part.stage, TensorSpec(data.name, tuple(shape)))


def cut_stage(network: nn.Module, stage: str, data: TensorSpec) -> Cut:
    """Cut a stage of one input and one result; `data` is its input's spec in latent cells.

    Its parts are called STAGE-0, STAGE-1 and so on. Raises BundleError, with the reason, if the
    stage cannot be traced or its numbers depend on the plane in a way that parts cannot follow.
    """
    graph = trace_stage(network, data)
    try:
        ops, result = lower(graph)
        phases, storage = split(ops, result), Storage.of(ops, result)
        made = [Emitter(phase, storage).module() for phase in phases]
    except BundleMisfit as error:
        raise BundleError(f"expected a stage {stage} that can be cut, found: {error}") from error
    modules = {f"{stage}-{i}": module for i, module in enumerate(made)}
    return Cut(_program(stage, ops, phases, result, storage), modules)


def _program(
    stage: str, ops: Mapping[str, Op], phases: list[Phase], result: str, storage: Storage
) -> Program:
    source = next(op for op in ops.values() if op.target == "input")
    used = {op.name: op for phase in phases for op in phase.inputs}
    kept = {_stored(op) for op in used.values() if op.target != "reduce"} | {result}
    written = [op for phase in phases for op in phase.outputs]
    maps = [op for op in (source, *written) if op.name in kept and is_spatial(op)]
    last = {_stored(op): i for i, phase in enumerate(phases) for op in phase.inputs}
    segments = []
    for i, phase in enumerate(phases):
        done = (op.name for op in maps if last.get(op.name) == i and op.name != result)
        costs = costs_of(phase, scale_of(phase))
        names = tuple(_input_name(op) for op in phase.inputs)
        outputs = tuple(op.name for op in phase.outputs)
        part = part_of(phase, f"{stage}-{i}", storage)
        segments.append(
            Segment(
                part,
                names,
                outputs,
                tuple(done),
                cell_bytes=costs.cell_bytes,
                plane_bytes=costs.plane_bytes,
                pair_bytes=costs.pair_bytes,
                pair_mac=costs.pair_mac,
            )
        )
    return Program(
        stage=stage,
        data=source.name,
        result=result,
        maps=tuple(spec(op.name, storage.axes(op)) for op in maps),
        segments=tuple(segments),
        passes=tuple(_pass(op, ops, storage) for op in used.values() if op.target == "reduce"),
        weight_bytes=sum(
            op.value.nbytes for phase in phases for op in phase.ops if op.value is not None
        ),
    )


def _stored(op: Op) -> str:
    """Return the name of the map or small array that an input of a phase comes from."""
    return op.inputs[0] if op.target in ("gather", "reduce") else op.name


def _input_name(op: Op) -> str:
    return op.inputs[0] if op.target == "gather" else op.name


def _pass(op: Op, ops: Mapping[str, Op], storage: Storage) -> Pass:
    ref, kind, axes, at, groups, *other = op.args
    source = ops[ref.name]
    if kind == "product":
        return Pass(op.name, ref.name, kind, tuple(axes), at, groups, other[0].name)
    axes = sorted(storage.place(source, axis) for axis in axes)
    at = storage.place(source, at) if groups > 1 else at
    return Pass(op.name, ref.name, kind, tuple(axes), at, groups)
