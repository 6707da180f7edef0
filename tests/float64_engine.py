"""Stages in float64 torch as an engine: no rounding for a wrong halo or state to hide in."""

from __future__ import annotations

from typing import Any

import torch

from fvae_deploy.export.bundle import SCHEMA, Source
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.models.family import Model
from fvae_deploy.export.probe import parts_of


class Float64:
    name, precision = "float64 torch", "fp64"

    def __init__(self, model: Model) -> None:
        self.stages = {name: stage.double() for name, stage in model.stages.items()}
        self.manifest = Manifest(
            schema=SCHEMA,
            kind=Manifest.KIND,
            fvae_version="0",
            name="float64",
            description="",
            licence="",
            source=Source("", "", ""),
            precision="fp64",
            files={},
            network=model.network,
            geometry=model.geometry,
            intensity=model.intensity,
            latent=model.latent,
            parts=parts_of(model),
        )

    def run(self, part: str, inputs: dict[str, Any]) -> dict[str, Any]:
        spec = self.manifest.part(part)
        given = [torch.as_tensor(inputs[i.name]) for i in spec.inputs]
        given = [t.double() if t.is_floating_point() else t for t in given]
        with torch.inference_mode():
            outputs = self.stages[spec.stage](*given)
        return {o.name: value.numpy() for o, value in zip(spec.outputs, outputs, strict=True)}

    def host(self, state: Any) -> Any:
        return state

    def release(self, part: str, compiled: bool) -> None:
        pass

    def close(self) -> None:
        pass
