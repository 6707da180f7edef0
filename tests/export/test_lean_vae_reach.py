"""Halo and context in the manifest equal those measured with an impulse.

One pixel block, or one latent cell, is changed. The resulting changes must be within the halo
and the context and never earlier in time. They must also reach the edge of both, since a halo
that is too wide wastes work in every tile.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
from random_lean_vae import random_lean_vae  # noqa: E402

from fvae_deploy.export.models.lean_vae import LeanVAE, LeanVAEConfig  # noqa: E402
from fvae_deploy.export.models.lean_vae_parts import lean_vae_model  # noqa: E402
from fvae_deploy.export.probe import parts_of  # noqa: E402

START = 2  # the latent frame that is changed
BEYOND = 2  # cells and frames watched outside the reach


def config(sep: int, fusion: int, iterations: int, layers: int) -> LeanVAEConfig:
    return LeanVAEConfig(
        embedding_dim=12,
        latent_dim=3,
        ista_iter_num=iterations,
        ista_layer_num=layers,
        l_dim=4,
        h_dim=8,
        sep_num_layer=sep,
        fusion_num_layer=fusion,
        in_channels=1,
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(config(1, 1, 1, 1), id="one layer of each kind"),
        pytest.param(config(0, 2, 1, 1), id="no separate layers"),
        pytest.param(config(1, 2, 1, 2), id="two layers an iteration"),
        pytest.param(config(1, 1, 2, 1), id="two iterations"),
    ],
)
def model(request: pytest.FixtureRequest) -> LeanVAE:
    return random_lean_vae(request.param, 0, torch.float64)


def reach(model: LeanVAE, direction: str) -> tuple[int, int]:
    """Return halo and context, on which both parts of a direction must agree."""
    parts = [p for p in parts_of(lean_vae_model(model, 1)) if p.name.startswith(direction)]
    (found,) = {(part.halo, part.context) for part in parts}
    return found


def changed_cells(difference: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
    """Map [1, C, T, H, W] to the largest change in each latent cell, [t, h, w]."""
    temporal, spatial = stride
    plane = difference.abs().amax((0, 1))  # [T, H, W]
    height, width = (n // spatial for n in plane.shape[1:])
    first = plane[:1].reshape(1, 1, height, spatial, width, spatial)
    rest = plane[1:].reshape(-1, temporal, height, spatial, width, spatial)
    return torch.cat([first.amax((1, 3, 5)), rest.amax((1, 3, 5))])


def impulse(model: LeanVAE, direction: str, start: int) -> torch.Tensor:
    """Change the middle cell of latent frame `start`; returns which cells change, [t, h, w]."""
    halo, context = reach(model, direction)
    side, frames = 2 * (halo + BEYOND) + 1, start + context + 1 + BEYOND
    middle = halo + BEYOND
    generator = torch.Generator().manual_seed(1)
    if direction == "encode":
        shape: tuple[int, ...] = (1, 1, 1 + 4 * (frames - 1), 8 * side, 8 * side)
    else:
        shape = (1, model.config.latent_dim, frames, side, side)
    before = torch.randn(shape, generator=generator, dtype=torch.float64)
    after = before.clone()
    if direction == "encode":
        block = slice(0, 1) if start == 0 else slice(4 * start - 3, 4 * start + 1)
        after[:, :, block, 8 * middle : 8 * middle + 8, 8 * middle : 8 * middle + 8] += 1
        return changed_cells(model.encode(after) - model.encode(before), (1, 1))
    after[:, :, start, middle, middle] += 1
    return changed_cells(model.decode(after) - model.decode(before), (4, 8))


@pytest.mark.parametrize("start", [0, START], ids=["first frame", "later frame"])
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_an_impulse_reaches_halo_and_context_and_no_further(
    model: LeanVAE, direction: str, start: int
) -> None:
    halo, context = reach(model, direction)
    change = impulse(model, direction, start)
    touched = change > 0
    inside = torch.zeros_like(touched)
    cells = slice(BEYOND, BEYOND + 2 * halo + 1)
    inside[start : start + context + 1, cells, cells] = True
    assert not touched[:start].any(), "an output before the change has changed"
    assert not (touched & ~inside).any()
    reached = touched[start : start + context + 1].any(0)[cells, cells]
    assert reached[0].all()
    assert reached[-1].all()
    assert reached[:, 0].all()
    assert reached[:, -1].all()
    assert touched[start + context].any(), "the context is longer than the network's memory"
