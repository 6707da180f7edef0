"""What every family of networks gives to export and to the torch engine, and their table.

A family is a module of this folder with

    rebuild(config, ...) -> dict[str, nn.Module]     stages, weights to be loaded

given the configuration, and of a VAE geometry and latent normalisation.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fvae_deploy.errors import BundleError, EngineError
from fvae_deploy.export.bundle import Bundle, Network
from fvae_deploy.export.manifest import Geometry, Intensity, LatentNormalisation, Manifest

if TYPE_CHECKING:
    from fvae_deploy.kernels.dispatch import Kernels

# Families whose stages have a form on hand-written kernels, `on_kernels` of these modules.
ON_KERNELS = {"lean_vae": "lean_vae_kernels", "wan": "wan_kernels"}

FAMILIES = {
    "lean_vae": "lean_vae_parts",
    "wan": "wan",
    "kl": "kl",
    "tiny": "tiny_autoencoder",
    "any_torch": "any_torch",
    "denoiser": "denoiser_parts",
}


@dataclass(frozen=True)
class Model:
    """A frozen VAE cut into stages, ready for export.

    `stages` are in order, `encode…` then `decode…`, each a function (data, *state) -> (data,
    *state) that is given no state with the first frames. `kinds` are the parts of every
    stage: a causal network has "first" and "step", one without state either of them.
    `any_step` says whether a step may take several latent frames at once. `foreign` marks code
    of others: where it proves not to be local it is taken whole, not refused.
    """

    network: Network
    geometry: Geometry
    intensity: Intensity
    latent: LatentNormalisation
    stages: Mapping[str, nn.Module]
    kinds: tuple[str, ...] = ("first", "step")
    any_step: bool = False
    foreign: bool = False


def rebuild(manifest: Bundle) -> dict[str, nn.Module]:
    """Build an exported network's stages again, without weights; `fill` gives them theirs.

    Raises EngineError for a family that is not torch's, BundleError for a configuration that
    builds nothing.
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
            given = (manifest.geometry, manifest.latent) if isinstance(manifest, Manifest) else ()
            stages: dict[str, nn.Module] = module.rebuild(network.config, *given)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise _unfit(manifest, error) from error
    return {name: stage.eval().requires_grad_(False) for name, stage in stages.items()}


def fill(stage: nn.Module, weights: Mapping[str, Tensor], manifest: Bundle) -> None:
    """Give a stage its weights; raises BundleError when they are not its own."""
    try:
        stage.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise _unfit(manifest, error) from error
    stage.requires_grad_(False)


def on_kernels(stage: nn.Module, manifest: Bundle, kernels: Kernels) -> nn.Module:
    """Give a stage, its weights loaded, the form that runs on hand-written kernels.

    It stays as it is where `kernels` computes references. Raises EngineError for a family
    without such a form that was asked for it.
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
    made: nn.Module = module.on_kernels(stage, kernels)
    return made.eval().requires_grad_(False)


def _unfit(manifest: Bundle, error: Exception) -> BundleError:
    reason = (str(error).splitlines() or [""])[-1].strip()
    return BundleError(
        f"expected a network that fits bundle {manifest.name}'s weights, found: {reason}; "
        "export the bundle again"
    )
