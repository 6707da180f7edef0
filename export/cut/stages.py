"""Cut the stages of a network that would need the whole plane otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fvae_deploy.errors import BundleError
from fvae_deploy.export.bundle import Part
from fvae_deploy.export.cut.cutter import Cut, cut_part
from fvae_deploy.export.cut.plain import run_plain
from fvae_deploy.export.program import Program

PLANE, TILE = (3, 4), 2  # a plane of latent cells, and the cells of a tile, that confirm a cut
TOLERANCE = 1e-4  # of the largest value, in float32

Stages = tuple[tuple[Part, ...], tuple[Program, ...], dict[str, nn.Module]]


def cut_whole_stages(stages: Mapping[str, nn.Module], parts: Sequence[Part]) -> Stages:
    """Cut every stage that needs the whole plane and has no state.

    Returns the parts, the programs, and the segments' modules by the names of their parts. A stage
    that cannot be cut stays whole: its part then says why.
    """
    described, programs = list(parts), []
    segments: dict[str, nn.Module] = {}
    for number, part in enumerate(parts):
        alone = [p for p in parts if p.stage == part.stage] == [part]
        if not part.whole or not alone or len(part.inputs) > 1:
            continue
        network = stages[part.stage]
        try:
            cut = cut_part(network, part)
            confirm(network, part, cut)
        except BundleError as error:
            reason = str(error).partition(", found")[2].lstrip(": ")
            described[number] = dataclasses.replace(
                part, whole=f"{part.whole}; it is not cut: {reason}"
            )
            continue
        programs.append(cut.program)
        segments.update(cut.modules)
    return tuple(described), tuple(programs), segments


def confirm(network: nn.Module, part: Part, cut: Cut) -> None:
    """Raise BundleError unless segments in small tiles give what the whole stage gives."""
    h, w = (part.scale * n for n in PLANE)
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(part.inputs[0].sized(1, h, w), generator=seeded)
    x = x.to(next(network.parameters()).dtype)
    with torch.no_grad():
        expected = network(x)[0]
    try:
        found = run_plain(cut, x, tuple(expected.shape), PLANE, TILE)
    except RuntimeError as error:  # of torch
        reason = str(error).splitlines()[0]
        raise BundleError(f"expected segments of {part.stage} that run, found: {reason}") from error
    if not bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max()):
        raise BundleError(
            f"expected segments of {part.stage} that give what the stage gives, found others"
        )
