from __future__ import annotations

from pathlib import Path

import pytest
from engine_contract import EngineContract, Reference, Stream, error, sample

from fvae_deploy.engines.base import open_engine
from fvae_deploy.errors import EngineError
from fvae_deploy.export.manifest import Manifest

ov = pytest.importorskip("openvino", reason="needs the cpu extra")


class TestOpenVINO(EngineContract):
    engine_name = "openvino"

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_half_precision_is_computed_or_refused_but_never_replaced(
        self, bundle: Path, manifest: Manifest, reference: Reference, precision: str
    ) -> None:
        able = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision.upper() not in able:
            with pytest.raises(EngineError, match=f"{precision}.*use --precision fp32"):
                open_engine(bundle, manifest, "openvino", precision=precision)
            return
        engine = open_engine(bundle, manifest, "openvino", precision=precision)
        x = sample(manifest, "encode", 2, 3, 4)
        result = Stream(engine, manifest, "encode").push_all(x, (1, 1))
        assert 1e-6 < error(result, reference.encode(x)) < 0.05
        engine.close()
