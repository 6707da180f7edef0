"""Reach and cost of small networks for which they are known by hand."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
from torch import nn  # noqa: E402

from fvae_deploy.export.reach import PLANE, analyse  # noqa: E402


class Stateful(nn.Module):
    """Two causal convolutions over time, of kernel 3, each with the two frames of its past."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(2, 2, 3, padding=(0, 1, 1)) for _ in range(2))

    def forward(self, x: Any, *past: Any) -> Any:
        following = []
        for layer, state in zip(self.layers, past, strict=True):
            x = torch.cat([state, x], dim=2)
            following.append(x[:, :, -2:])
            x = layer(x)
        return x, *following


class Attention(nn.Module):
    def forward(self, x: Any) -> Any:
        tokens = x.flatten(2).transpose(1, 2)
        return (nn.functional.scaled_dot_product_attention(tokens, tokens, tokens),)


class Only(nn.Module):
    """One layer as a stage."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return (self.layers(x),)


def conv(kernel: int, stride: int = 1, padding: int = 0, inside: int = 2) -> nn.Conv2d:
    return nn.Conv2d(inside, 2, kernel, stride, padding)


@pytest.mark.parametrize(
    ("stage", "pixels", "halo"),
    [
        pytest.param(Only(conv(1)), 1, 0, id="pointwise"),
        pytest.param(Only(conv(3, padding=1)), 1, 1, id="3x3"),
        pytest.param(Only(conv(3, padding=1), conv(3, padding=1)), 1, 2, id="3x3 twice"),
        pytest.param(Only(conv(5, padding=2)), 1, 2, id="5x5"),
        pytest.param(Only(conv(8, stride=8)), 8, 0, id="patches"),
        pytest.param(Only(nn.ZeroPad2d((0, 1, 0, 1)), conv(3, stride=2)), 2, 1, id="strided 3x3"),
        pytest.param(Only(*[conv(3, padding=1)] * 4), 2, 2, id="four at twice the resolution"),
        pytest.param(Only(*[conv(3, padding=1)] * 5), 2, 3, id="five at twice the resolution"),
        pytest.param(
            Only(conv(3, padding=1), nn.Upsample(scale_factor=2), conv(3, padding=1)),
            1,
            2,
            id="one at each side of an upsampling",
        ),
        pytest.param(Only(nn.ConvTranspose2d(2, 2, 4, 2, 1)), 1, 1, id="transposed"),
    ],
)
def test_halos_are_the_sum_of_the_kernels_overhang(
    stage: nn.Module, pixels: int, halo: int
) -> None:
    found = analyse(stage, [torch.randn(1, 2, pixels * PLANE, pixels * PLANE)], False, 1)
    assert (found.halo, found.context, found.whole) == (halo, 0, "")


@pytest.mark.parametrize(("rate", "context"), [(1, 4), (2, 2), (4, 1)])
def test_states_reach_back_by_their_length_in_latent_frames(rate: int, context: int) -> None:
    x = torch.randn(1, 2, rate, PLANE, PLANE)
    found = analyse(Stateful(), [x, *(torch.randn(1, 2, 2, PLANE, PLANE) for _ in "ab")], False, 1)
    assert (found.halo, found.context) == (2, context)
    assert found.mac_per_cell == 2 * rate * 2 * 2 * 27


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        pytest.param(Only(nn.GroupNorm(1, 2)), "group normalisation", id="group norm"),
        pytest.param(Attention(), "attention", id="attention"),
    ],
)
def test_layers_that_need_the_whole_plane_are_reported_with_the_reason(
    stage: nn.Module, reason: str
) -> None:
    found = analyse(stage, [torch.randn(1, 2, PLANE, PLANE)], False, 1)
    assert found.halo is None
    assert reason in found.whole
