from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fvae_deploy.export.models.lean_vae import LeanVAE

pytest.register_assert_rewrite("engine_contract")


@pytest.fixture(scope="session")
def small_model() -> LeanVAE:
    """A three-channel LeanVAE of random weights, small enough to export in seconds."""
    pytest.importorskip("torch", reason="needs the export extra")
    from random_lean_vae import SMALL, random_lean_vae

    return random_lean_vae(SMALL, seed=0)


@pytest.fixture(scope="session")
def small_bundle(small_model: LeanVAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model exported for CT, once for all tests: read only."""
    pytest.importorskip("onnxscript", reason="needs the export extra")
    from random_lean_vae import SMALL_SCALE

    from fvae_deploy.export.manifest import Source
    from fvae_deploy.export.to_onnx import export_bundle

    folder = tmp_path_factory.mktemp("bundles") / "small"
    export_bundle(
        small_model,
        folder,
        name="small",
        description="random weights",
        licence="Apache-2.0",
        source=Source("random", "0", "0" * 64),
        version="0.1.0",
        channels=1,
        scale=SMALL_SCALE,
    )
    return folder
