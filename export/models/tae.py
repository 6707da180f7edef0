"""The tiny autoencoders (TAESD, TAEF1, TAEF2, ...) from their author's files, slice by slice.

    x [1, C, k, H, W]  -- encode0, encode1, ... -->  z [1, D, k, h, w]  -- decode0, ... -->  x

Ollin Boer Bohan's files hold the tensors of two plain sequences of layers, named by the layers'
indices; no configuration comes with them, so the layers are told from names and shapes:

    encoder    0 convolution; blocks; a convolution of stride 2; ...; the last one a convolution
    decoder    0 convolution, 1 ReLU; blocks; an index without tensors is a doubling; ...

That covers all published ones. TAEF2, for FLUX.2's latents, is the one that diffusers does not
have: its blocks at the latent's resolution begin with x + pool(x), where pool has a group
normalisation. Its statistics are those of the whole slice, so the stage at that resolution takes
the whole plane, at 1/64 of the pixels; all other stages run in exact tiles (docs/adr/0025).

Stages and foldings are those of `tiny_autoencoder`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Averaging, Geometry, LatentNormalisation
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.models.slicewise import channels_of
from fvae_deploy.export.models.tiny_autoencoder import INTENSITY, LIMIT, stages_of

GROUPS = 4  # of the normalisation in a pool
Layers = Sequence[Sequence[Any]]  # like ["conv", 3, 64, 1, True], ["block", 64, 64, 256], ["relu"]


class Block(nn.Module):
    """ReLU(skip(x) + three convolutions with ReLU between), after x + pool(x) if it has a pool."""

    def __init__(self, inside: int, outside: int, pool: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
        )
        same = inside == outside
        self.skip = nn.Identity() if same else nn.Conv2d(inside, outside, 1, bias=False)
        self.pool = (
            nn.Sequential(
                nn.Conv2d(inside, pool, 1, bias=False),
                nn.GroupNorm(GROUPS, pool),
                nn.ReLU(),
                nn.Conv2d(pool, inside, 1, bias=False),
            )
            if pool
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [k, C, H, W] to [k, D, H, W]."""
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + self.skip(x))


class Tae(nn.Module):
    """The network as its author runs it: slices [k, 3, H, W] in [0, 1], latents [k, D, h, w]."""

    def __init__(self, encoder: Layers, decoder: Layers) -> None:
        super().__init__()
        self.config = {"encoder": encoder, "decoder": decoder}
        self.encoder, self.decoder = _sequence(encoder), _sequence(decoder)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents of slices."""
        z: Tensor = self.encoder(x)
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Return the slices of latents, not clamped."""
        x: Tensor = self.decoder(LIMIT * torch.tanh(z / LIMIT))
        return x


def layers_of(shapes: Mapping[str, Sequence[int]], decoder: bool) -> list[list[Any]]:
    """Return the layers that tensors named "0.weight", "1.conv.0.weight", ... belong to.

    Raises ValueError for tensors that are not those of such a sequence.
    """
    last = max(int(name.partition(".")[0]) for name in shapes)
    layers: list[list[Any]] = []
    for i in range(last + 1):
        weight, block = shapes.get(f"{i}.weight"), shapes.get(f"{i}.conv.0.weight")
        if weight is not None:
            # The convolutions that halve, and those after a doubling, have no bias.
            end = i in (0, last)
            layers.append(["conv", weight[1], weight[0], 1 if end or decoder else 2, end])
        elif block is not None:
            pool = shapes.get(f"{i}.pool.0.weight", (0,))
            layers.append(["block", block[1], block[0], pool[0]])
        elif decoder and i:
            layers.append(["relu"] if i == 1 else ["double"])
        else:
            raise ValueError(f"no layer {i} of {'a decoder' if decoder else 'an encoder'}")
    return layers


def tae_model(model: Tae, channels: int | None = None, clamped: bool = False) -> Model:
    """Cut the network into stages, folding it in place; `channels` is 1 for gray.

    With `clamped`, output channels are clamped to the model's range before they are averaged.
    Raises ValueError if the two halves do not belong together.
    """
    encoder, decoder = model.config["encoder"], model.config["decoder"]
    halvings = sum(layer[0] == "conv" and layer[3] == 2 for layer in encoder)
    doublings = sum(layer[0] == "double" for layer in decoder)
    latents = (encoder[-1][2], decoder[0][1])
    if halvings != doublings or latents[0] != latents[1]:
        raise ValueError(
            f"an encoder to {latents[0]} channels with {halvings} halvings and a decoder from "
            f"{latents[1]} channels with {doublings} doublings"
        )
    colours = {"in_channels": encoder[0][1], "out_channels": decoder[-1][2]}
    geometry = Geometry(
        temporal=1,
        spatial=2**halvings,
        latent_channels=latents[0],
        channels=channels_of(colours, channels),
        window=65,
    )
    latent = LatentNormalisation((0.0,) * latents[0], (1.0,) * latents[0])
    averaging = Averaging(clamped and colours["out_channels"] > 1)
    return Model(
        network=Network("tae", json.loads(json.dumps(model.config))),
        geometry=geometry,
        intensity=INTENSITY,
        latent=latent,
        stages=stages_of(model.encoder, model.decoder, geometry, latent, averaging),
        kinds=("step",),
        any_step=True,
        averaging=averaging,
    )


def rebuild(
    config: Mapping[str, Any],
    geometry: Geometry,
    latent: LatentNormalisation,
    averaging: Averaging,
) -> dict[str, nn.Module]:
    """Build the stages of an exported bundle, without weights."""
    model = Tae(**config)
    return stages_of(model.encoder, model.decoder, geometry, latent, averaging)


def _sequence(layers: Layers) -> nn.Sequential:
    return nn.Sequential(*(_layer(*layer) for layer in layers))


def _layer(kind: str, *sizes: Any) -> nn.Module:
    """Build one layer of the description in `layers_of`."""
    if kind == "conv":
        inside, outside, stride, bias = sizes
        return nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=bias)
    if kind == "block":
        return Block(*sizes)
    return nn.ReLU() if kind == "relu" else nn.Upsample(scale_factor=2)
