"""The table of network families, and the interface between them, export and the torch engine.

A family is a module of this folder with a function

    rebuild(config, ...) -> dict[str, nn.Module]     the stages, without weights

of the configuration and, for a VAE, of geometry, latent normalisation and averaging.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fvae_deploy.errors import BundleError, EngineError
from fvae_deploy.export.bundle import Bundle, Network
from fvae_deploy.export.manifest import (
    AVERAGED,
    Averaging,
    Geometry,
    Intensity,
    LatentNormalisation,
    Manifest,
)

if TYPE_CHECKING:
    from fvae_deploy.kernels.dispatch import Kernels

# Families that can run on hand-written kernels, and the modules with their `on_kernels`.
ON_KERNELS = {"lean_vae": "lean_vae_kernels", "wan": "wan_kernels"}

FAMILIES = {
    "lean_vae": "lean_vae_parts",
    "wan": "wan",
    "kl": "kl",
    "tiny": "tiny_autoencoder",
    "tae": "tae",
    "ltx": "ltx",
    "vidtok": "vidtok",
    "any_torch": "any_torch",
    "denoiser": "denoiser_parts",
}


@dataclass(frozen=True)
class Model:
    """A frozen VAE cut into stages, ready for export.

    `stages` are in order, `encode…` then `decode…`. Each is a function (data, *state) -> (data,
    *state) that takes no state with the first frames. `kinds` are the parts of every stage: a
    causal network has "first" and "step", one without state has one of them. `any_step` says
    whether a step may take several latent frames at once. `foreign` marks other people's code:
    if it proves not to be local, it gets the whole plane instead of an error. `context` is how many
    latent frames back its results reach, where that does not follow from its convolutions. `lags`
    are the stages that look ahead, functions (data, clock, *state) -> (data, *state), with the
    frames by which their results come late (see `bundle.Part`).
    """

    network: Network
    geometry: Geometry
    intensity: Intensity
    latent: LatentNormalisation
    stages: Mapping[str, nn.Module]
    kinds: tuple[str, ...] = ("first", "step")
    any_step: bool = False
    foreign: bool = False
    averaging: Averaging = AVERAGED
    context: int | None = None
    lags: Mapping[str, int] = field(default_factory=dict)

    @property
    def lag(self) -> int:
        """How many slices late the decoder returns what it decodes."""
        return list(self.lags.values())[-1] if self.lags else 0


def rebuild(manifest: Bundle) -> dict[str, nn.Module]:
    """Build an exported network's stages again, without weights; `fill` loads them.

    Raises EngineError for a family that torch cannot build, and BundleError for a configuration
    that does not fit the family.
    """
    network = manifest.network
    if network.family not in FAMILIES:
        raise EngineError(
            f"expected a network of family {', '.join(FAMILIES)}, found {network.family}: "
            "use another engine"
        )
    module = importlib.import_module(f"fvae_deploy.export.models.{FAMILIES[network.family]}")
    try:
        with torch.device("meta"):
            facts: tuple[object, ...] = ()
            if isinstance(manifest, Manifest):
                facts = (manifest.geometry, manifest.latent, manifest.averaging)
            stages: dict[str, nn.Module] = module.rebuild(network.config, *facts)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise _misfit(manifest, error) from error
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}


def fill(stage: nn.Module, weights: Mapping[str, Tensor], manifest: Bundle) -> None:
    """Load a stage's weights; raises BundleError if they do not fit."""
    try:
        stage.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise _misfit(manifest, error) from error
    stage.requires_grad_(False)


def on_kernels(stage: nn.Module, manifest: Bundle, kernels: Kernels) -> nn.Module:
    """Return the form of a stage, weights loaded, that runs on hand-written kernels.

    The stage is returned unchanged if `kernels` computes without Triton. Raises EngineError if the
    user requested kernels and the family has none.
    """
    family = manifest.network.family
    if not kernels.triton:
        return stage
    if family not in ON_KERNELS:
        if not kernels.asked:
            return stage
        raise EngineError(
            f"expected a network of family {', '.join(ON_KERNELS)} for kernels, found {family}: "
            "use FVAE_KERNELS=auto"
        )
    module = importlib.import_module(f"fvae_deploy.export.models.{ON_KERNELS[family]}")
    replaced: nn.Module = module.on_kernels(stage, kernels)
    return replaced.eval().requires_grad_(False)


def _misfit(manifest: Bundle, error: Exception) -> BundleError:
    """Return the error for a configuration or weights that do not fit the network."""
    reason = (str(error).splitlines() or [""])[-1].strip()
    return BundleError(
        f"expected a network that fits bundle {manifest.name}'s weights, found: {reason}; "
        "export the bundle again"
    )
