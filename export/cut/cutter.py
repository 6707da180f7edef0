"""Cut a stage into a program: local segments, passes over maps, and what keeps the whole plane."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils._pytree import tree_flatten

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import CLOCK, Dimension, Part, TensorSpec
from fvae_deploy.export.cut import local, passes, views  # noqa: F401  (they register their rules)
from fvae_deploy.export.cut.emit import Emitter
from fvae_deploy.export.cut.lower import BundleMisfit, Op, lower
from fvae_deploy.export.cut.parts import costs_of, part_of, spec
from fvae_deploy.export.cut.phases import Phase, depth_first, is_spatial, split
from fvae_deploy.export.cut.storage import Storage
from fvae_deploy.export.cut.trace import Ref, trace_stage
from fvae_deploy.export.cut.writes import joined
from fvae_deploy.export.program import Pass, Program, Segment


@dataclass(frozen=True)
class Cut:
    """A program, and the torch modules of its segments by the names of their parts."""

    program: Program
    modules: Mapping[str, nn.Module]


def cut_part(network: nn.Module, part: Part, name: str) -> Cut:
    """Cut what a part runs, for one slice or one window or one step of a stream at a time.

    The program is called `name`.
    """
    return cut_stage(network, name, *(_in_latent_cells(t, part.scale) for t in part.inputs))


def _in_latent_cells(tensor: TensorSpec, scale: int) -> TensorSpec:
    """Return an input's spec, whose sizes are in cells of `scale` each, for one latent frame."""
    shape: list[Dimension] = []
    for dimension in tensor.shape:
        factor, _, symbol = str(dimension).rpartition("*")
        size = int(factor or 1) * (scale if symbol in ("h", "w") else 1)
        if symbol == "k":
            dimension = size
        elif symbol in ("h", "w"):
            dimension = f"{size}*{symbol}" if size > 1 else symbol
        shape.append(dimension)
    return TensorSpec(tensor.name, tuple(shape), tensor.type)


def cut_stage(network: nn.Module, stage: str, data: TensorSpec, *states: TensorSpec) -> Cut:
    """Cut a function of data, and of a clock and states from the step before if there are any.

    Specs are in latent cells. The first result is the data, and all others are states. Parts are
    called STAGE-0, STAGE-1 and so on; segments that compute the same, as those of every chunk of
    frames do, share one. Raises BundleError, with the reason, if the stage cannot be traced or its
    numbers depend on the plane in a way that parts cannot follow.
    """
    graph = joined(trace_stage(network, data, *states))
    try:
        ops, results = lower(graph)
        phases, storage = split(ops, results), Storage.of(ops, "x", results[0])
        kinds = [_kind(phase, storage) for phase in phases]
        distinct: dict[Hashable, Phase] = {}
        for kind, phase in zip(kinds, phases, strict=True):
            distinct.setdefault(kind, phase)
        modules: dict[str, nn.Module] = {}
        parts: dict[Hashable, Part] = {}
        for i, (kind, phase) in enumerate(distinct.items()):
            parts[kind] = part_of(phase, f"{stage}-{i}", storage)
            modules[f"{stage}-{i}"] = Emitter(phase, storage).module()
    except BundleMisfit as error:
        raise BundleError(f"expected a stage {stage} that can be cut, found: {error}") from error
    named = [(phase, parts[kind]) for phase, kind in zip(phases, kinds, strict=True)]
    past = tuple(spec.name for spec in states if spec.name != CLOCK)
    return Cut(_program(stage, ops, named, results, past, storage), modules)


def _kind(phase: Phase, storage: Storage) -> Hashable:
    """Return what a phase computes: equal for phases that differ in nothing but names."""
    made = {op.name: op for op in (*phase.inputs, *phase.ops)}
    taken = {op.name for op in phase.inputs}
    needs = {name: [] if name in taken else op.inputs for name, op in made.items()}
    numbers: dict[str, int] = {}
    described: list[Hashable] = []
    for name in (n for op in phase.outputs for n in depth_first(needs, op.name)):
        if name in numbers:
            continue
        op = made[name]
        leaves, structure = tree_flatten(((), {}) if name in taken else (op.args, dict(op.kwargs)))
        given = tuple(numbers[v.name] if isinstance(v, Ref) else repr(v) for v in leaves)
        target = op.target == "gather" if name in taken else str(op.target)
        stored = storage.axes(op) if op.axes else ()
        described.append((target, op.axes, stored, given, str(structure)))
        numbers[name] = len(numbers)
    ends = tuple(numbers[op.name] for op in phase.outputs)
    return tuple(described), tuple(numbers[op.name] for op in phase.inputs), ends, phase.whole


def _program(
    stage: str, ops: Mapping[str, Op], phases: list[tuple[Phase, Part]], results: Sequence[str],
    past: Sequence[str], storage: Storage,
) -> Program:  # fmt: skip
    given = [op for op in ops.values() if op.target == "input"]
    used = {op.name: op for phase, _ in phases for op in phase.inputs}
    kept = {_stored(op) for op in used.values() if op.target != "reduce"}.union(results, past)
    written = [op for phase, _ in phases for op in phase.outputs]
    maps = [op for op in (*given, *written) if op.name in kept and is_spatial(op)]
    last = {_stored(op): i for i, (phase, _) in enumerate(phases) for op in phase.inputs}
    segments = []
    for i, (phase, part) in enumerate(phases):
        done = (op.name for op in maps if last.get(op.name) == i and op.name not in results)
        costs = costs_of(phase, part.scale)
        segments.append(
            Segment(
                part,
                tuple(_input_name(op) for op in phase.inputs),
                tuple(op.name for op in phase.outputs),
                tuple(done),
                cell_bytes=costs.cell_bytes,
                plane_bytes=costs.plane_bytes,
                pair_bytes=costs.pair_bytes,
                pair_mac=costs.pair_mac,
                weight_bytes=_weight_bytes([phase]),
            )
        )
    return Program(
        stage=stage,
        data=given[0].name,
        result=results[0],
        maps=tuple(spec(op.name, storage.axes(op)) for op in maps),
        segments=tuple(segments),
        passes=tuple(_pass(op, ops, storage) for op in used.values() if op.target == "reduce"),
        weight_bytes=_weight_bytes([phase for phase, _ in phases]),
        past=tuple(past),
        next=tuple(results[1:]),
    )


def _weight_bytes(phases: Sequence[Phase]) -> int:
    """Return the bytes of all weights that phases use."""
    weights = {op.name: op.value for phase in phases for op in phase.ops if op.value is not None}
    return sum(value.nbytes for value in weights.values())


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
