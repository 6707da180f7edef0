from __future__ import annotations

from pathlib import Path

import pytest
from engine_contract import EngineContract

from fvae_deploy.engines.base import open_engine
from fvae_deploy.errors import EngineError
from fvae_deploy.export.manifest import Manifest

pytest.importorskip("onnxruntime", reason="needs the cpu extra")


class TestONNXRuntime(EngineContract):
    engine_name = "onnxruntime"

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_a_precision_other_than_the_bundles_is_refused_with_the_remedy(
        self, bundle: Path, manifest: Manifest, precision: str
    ) -> None:
        with pytest.raises(EngineError, match=f"found {precision}: .* use openvino or torch"):
            open_engine(bundle, manifest, "onnxruntime", precision=precision)
