"""A network ready for export: its stages, and its manifest as far as it is known before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import nn

from fvae_deploy.export.bundle import SCHEMA, Bundle, Source
from fvae_deploy.export.cut.stages import cut_whole_stages
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.probe import parts_of

Kind = TypeVar("Kind", bound=Bundle)


@dataclass(frozen=True)
class LoadedModel:
    """A VAE that was loaded for export, with the origin and licence of its weights."""

    model: Model
    source: Source
    name: str
    description: str
    licence: str


@dataclass(frozen=True)
class BundleDraft(Generic[Kind]):
    """Everything that a bundle is written from; the manifest still lacks the files' hashes.

    `texts` are further text files by name. `foreign` is `Model.foreign`. `segments` are the modules
    of a VAE's programs by the names of their parts.
    """

    manifest: Kind
    stages: Mapping[str, nn.Module]
    texts: Mapping[str, str] = field(default_factory=dict)
    foreign: bool = False
    segments: Mapping[str, nn.Module] = field(default_factory=dict)


def draft_vae(loaded: LoadedModel, version: str) -> BundleDraft[Manifest]:
    """Run a VAE's stages to find their shapes and reach, and describe them in a manifest.

    `version` is that of fvae. Raises BundleError if the network cannot be cut into parts.
    """
    model = loaded.model
    parts, programs, segments = cut_whole_stages(model.stages, parts_of(model), model.foreign)
    manifest = Manifest(
        schema=SCHEMA,
        kind=Manifest.KIND,
        fvae_version=version,
        name=loaded.name,
        description=loaded.description,
        licence=loaded.licence,
        source=loaded.source,
        network=model.network,
        precision="fp32",
        parts=parts,
        files={},
        geometry=model.geometry,
        intensity=model.intensity,
        latent=model.latent,
        averaging=model.averaging,
        programs=programs,
        exact_norms=True,
    )
    return BundleDraft(manifest, model.stages, foreign=model.foreign, segments=segments)
