from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from engine_contract import EngineContract, Reference, Stream, error, sample

from fvae_deploy.engines.base import open_engine
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Network
from fvae_deploy.export.manifest import Manifest

torch = pytest.importorskip("torch", reason="needs the export extra")


class TestEager(EngineContract):
    engine_name = "torch"

    def test_bfloat16_computes_in_bfloat16(
        self, bundle: Path, manifest: Manifest, reference: Reference, direction: str
    ) -> None:
        engine = open_engine(bundle, manifest, "torch", precision="bf16")
        assert engine.precision == "bf16"
        data = sample(manifest, direction, 2, 3, 4)
        result = Stream(engine, manifest, direction).push_all(data, (1, 1))
        # The 8 bits of mantissa cause an error that float32 would not have.
        assert 1e-4 < error(result, getattr(reference, direction)(data)) < 0.05
        engine.close()

    def test_a_network_it_cannot_build_is_refused(self, bundle: Path, manifest: Manifest) -> None:
        other = dataclasses.replace(manifest, network=Network("fake", {}))
        with pytest.raises(
            EngineError, match=r"family .*lean_vae.*, found fake: use another engine"
        ):
            open_engine(bundle, other, "torch")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch computes on")
class TestEagerOnAGpu(EngineContract):
    """Runs on kernels if Triton is installed, with a copy of the bundle for its tuning files."""

    engine_name, device = "torch", "cuda"

    @pytest.fixture(scope="class")
    @classmethod
    def bundle(cls, small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return Path(shutil.copytree(small_bundle, tmp_path_factory.mktemp("gpu") / "bundle"))

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.05), ("fp16", 0.01)])
    def test_half_precision_is_near(
        self,
        bundle: Path,
        manifest: Manifest,
        reference: Reference,
        direction: str,
        monkeypatch: pytest.MonkeyPatch,
        backend: str,
        precision: str,
        limit: float,
    ) -> None:
        monkeypatch.setenv("FVAE_KERNELS", backend)
        engine = open_engine(bundle, manifest, "torch", "cuda", precision)
        data = sample(manifest, direction, 2, 3, 4)
        result = Stream(engine, manifest, direction).push_all(data, (1, 1))
        assert error(result, getattr(reference, direction)(data)) < limit
        engine.close()
