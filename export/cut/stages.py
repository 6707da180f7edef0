"""Cut the stages of a network that would need the whole plane otherwise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Part
from fvae_deploy.export.cut.cutter import Cut, cut_part
from fvae_deploy.export.cut.plain import run_plain
from fvae_deploy.export.program import Program

TOLERANCE = 1e-4  # of the largest value, in float32

Stages = tuple[tuple[Part, ...], tuple[Program, ...], dict[str, nn.Module]]


def cut_whole_stages(
    stages: Mapping[str, nn.Module], parts: Sequence[Part], streams: bool
) -> Stages:
    """Cut every stage that needs the whole plane; one with states only with `streams`.

    Returns the parts, the programs, and the segments' modules by the names of their parts. A stage
    that cannot be cut stays whole: its parts then say why.
    """
    described, programs = list(parts), []
    segments: dict[str, nn.Module] = {}
    for stage, network in stages.items():
        own = [part for part in parts if part.stage == stage]
        with_states = len(own) > 1 or len(own[0].inputs) > 1
        if not own[0].whole or (with_states and not streams):
            continue
        try:
            cuts = cut_steps(network, own)
            confirm(network, own, cuts)
        except BundleError as error:
            reason = str(error).partition(", found")[2].lstrip(": ")
            for i, part in enumerate(described):
                if part in own:
                    whole = f"{part.whole}; it is not cut: {reason}"
                    described[i] = dataclasses.replace(part, whole=whole)
            continue
        for cut in cuts:
            programs.append(cut.program)
            segments.update(cut.modules)
    return tuple(described), tuple(programs), segments


def cut_steps(network: nn.Module, parts: Sequence[Part]) -> list[Cut]:
    """Cut a stage without state as a whole, or the first step and the others of one with states.

    Raises BundleError, with the reason, if it cannot be cut.
    """
    states = len(parts) > 1 or parts[0].looks_ahead
    cuts = [cut_part(network, part, part.name if states else part.stage) for part in parts]
    if not all(cuts[-1].program.continues(cut.program) for cut in cuts):
        raise BundleError("expected states that every step stores alike, found others")
    return cuts


def confirm(network: nn.Module, parts: Sequence[Part], cuts: Sequence[Cut]) -> None:
    """Raise BundleError unless segments in small tiles give what the whole stage gives.

    Of a stage with states, three steps are compared.
    """
    segments = [segment.part for cut in cuts for segment in cut.program.segments]
    far = max(1, *(math.ceil((part.halo or 0) / part.scale) for part in segments))
    for plane in planes(far):
        _confirm_on(plane, far + 1, network, parts, cuts)


def planes(far: int) -> list[tuple[int, int]]:
    """Return planes of latent cells on which no tile of far + 1 cells with its halo sees all."""
    return [(3, 4)] if far == 1 else [(3, 2 * far + 2), (2 * far + 2, 3)]


def _confirm_on(
    plane: tuple[int, int],
    tile: int,
    network: nn.Module,
    parts: Sequence[Part],
    cuts: Sequence[Cut],
) -> None:
    stage, seeded = parts[0].stage, torch.Generator().manual_seed(0)
    dtype = next(network.parameters()).dtype
    past: list[Tensor] = []
    kept = _zeros(cuts[0].program, plane, dtype)
    for number in range(3 if cuts[-1].program.past else 1):
        place = min(number, len(parts) - 1)
        part, cut = parts[place], cuts[place]
        h, w = (part.scale * n for n in plane)
        x = torch.randn(part.inputs[0].sized(1, h, w), generator=seeded).to(dtype)
        clock = torch.tensor((number, number - 2)) if part.looks_ahead else None
        with torch.no_grad():
            expected, *past = network(x, *([] if clock is None else [clock]), *past)
        try:
            found, kept = run_plain(cut, x, tuple(expected.shape), plane, tile, kept, clock)
        except RuntimeError as error:  # of torch
            reason = str(error).splitlines()[0]
            raise BundleError(f"expected segments of {stage} that run, found: {reason}") from error
        if not bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max()):
            raise BundleError(
                f"expected segments of {stage} that give what the stage gives, found others"
            )


def _zeros(program: Program, plane: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Return what a program takes as states if there was no step before."""
    specs = [spec for name in program.past if (spec := program.map(name))]
    return [torch.zeros(spec.sized(1, *plane), dtype=dtype) for spec in specs]
