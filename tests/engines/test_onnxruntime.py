from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_contract import EngineContract

from fvae_deploy.engines.base import open_engine
from fvae_deploy.errors import EngineError
from fvae_deploy.export.manifest import Manifest

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the cpu extra")

from fvae_deploy.engines.onnx_runtime import check_placement  # noqa: E402


class TestONNXRuntime(EngineContract):
    engine_name = "onnxruntime"

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_a_precision_other_than_the_bundles_is_refused_with_the_remedy(
        self, bundle: Path, manifest: Manifest, precision: str
    ) -> None:
        with pytest.raises(EngineError, match=f"found {precision}: .* use openvino or torch"):
            open_engine(bundle, manifest, "onnxruntime", precision=precision)

    @pytest.mark.parametrize("device", ["cuda", "tensorrt"])
    def test_a_provider_that_this_build_lacks_is_refused_with_the_remedy(
        self, bundle: Path, manifest: Manifest, device: str
    ) -> None:
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has CUDA")
        with pytest.raises(EngineError, match=r"Provider, found .*CPU.*: pip .*onnxruntime-gpu"):
            open_engine(bundle, manifest, "onnxruntime", device)

    @pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
    def test_a_provider_that_does_not_load_is_an_error_instead_of_a_run_on_the_cpu(
        self, bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has CUDA")
        claimed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime, "get_available_providers", lambda: claimed)
            engine = open_engine(bundle, manifest, "onnxruntime", "cuda")
        part = manifest.part("encode_first")
        data = {t.name: np.zeros(t.sized(1, 2, 2), np.float32) for t in part.inputs}
        with pytest.raises(EngineError, match=r"CUDA|CPU EP"):
            engine.run(part.name, data)
        engine.close()

    def test_a_convolution_that_is_left_to_the_cpu_is_refused(
        self, bundle: Path, manifest: Manifest
    ) -> None:
        if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
            pytest.skip("this version of ONNX Runtime does not report where it computes")
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        graph = str(bundle / manifest.part("encode_first").file)
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        with pytest.raises(EngineError, match=r"leaves .*Conv.* to the CPU: use --engine torch"):
            check_placement(session, "encode_first")
