"""What the cutter cannot take is a BundleError with a reason, found before a bundle is written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
import torch.nn.functional as F  # noqa: E402
from cut_layers import FINE, Layer, Network, Window, cut_of, seeded  # noqa: E402
from torch import nn  # noqa: E402

from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.bundle import Part, TensorSpec  # noqa: E402
from fvae_deploy.export.cut.cutter import Cut, cut_stage  # noqa: E402
from fvae_deploy.export.cut.stages import confirm  # noqa: E402


def products_of_channels(m: Any, x: Any) -> Any:
    """Attention among channels, divided by the number of places."""
    y = x.flatten(2)
    return (torch.bmm(y, y.transpose(1, 2)) / y.shape[2]).softmax(-1) @ y


def share(m: Any, x: Any) -> Any:
    """A mean over the plane, written as a sum and as many ones."""
    return x - x.sum((3, 4), keepdim=True) / torch.ones_like(x).sum((3, 4), keepdim=True)


def circular(m: Any, x: Any) -> Any:
    """Torch pads in a circle by writes of its own, which a trace does not show."""
    return F.pad(x, (0, 0, 0, 0, 1, 1), mode="circular")[:, :, 1:-1]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda m, x: products_of_channels(m, x).reshape(x.shape),
            "an operation without a map takes the size of the plane",
        ),
        (share, "an operation without a map takes the size of the plane"),
        (circular, "aten.copy_ inside another operation, a write in place"),
    ],
)
def test_a_network_that_cannot_be_cut_is_refused_with_the_reason(
    function: Any, reason: str
) -> None:
    network = seeded(lambda: Window([Layer(function)], [False]))
    with pytest.raises(BundleError, match=reason):
        cut_of(network, 1, 4)


def as_part(shape: tuple[Any, ...]) -> Part:
    return Part("encode_first", "f", (TensorSpec("x", shape),), (), 1, None, 0, 1)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda m, x: torch.where((x > 0).any(-1, keepdim=True), x, -x), "bool"),
        (lambda m, x: x + x.argmax(1, keepdim=True), "int64"),
    ],
)
def test_maps_of_other_numbers_are_refused(function: Any, kind: str) -> None:
    network = seeded(lambda: Network([Layer(function)], [False], False))
    cut = cut_of(network, 1)
    part = as_part((1, 1, f"{FINE}*h", f"{FINE}*w"))
    with pytest.raises(BundleError, match=f"maps of floating-point numbers, found a map of {kind}"):
        confirm(network, [part], [cut])


class Latents(nn.Module):
    """Convolutions on latents, whose pixels are as large as latent cells."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1) for _ in range(5)])

    def forward(self, x: Any) -> tuple[Any]:
        return (self.layers(x),)


@pytest.mark.parametrize("less", [0, 1])
def test_a_wide_halo_of_latents_is_confirmed_on_a_wider_plane(less: int) -> None:
    network = seeded(Latents)
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(0.5)
    cut = cut_stage(network, "encode", TensorSpec("x", (1, 1, "h", "w")))
    (segment,) = cut.program.segments
    assert segment.part.halo == 5
    narrow = dataclasses.replace(segment.part, halo=5 - less)
    program = dataclasses.replace(
        cut.program, segments=(dataclasses.replace(segment, part=narrow),)
    )
    if not less:
        confirm(network, [as_part((1, 1, "h", "w"))], [Cut(program, cut.modules)])
        return
    with pytest.raises(BundleError, match="segments of encode that give what the stage gives"):
        confirm(network, [as_part((1, 1, "h", "w"))], [Cut(program, cut.modules)])
