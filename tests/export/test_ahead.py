"""Streams that look ahead are found in windows: late steps give what the whole window gives."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
from ahead_layers import AHEAD, DOUBLED, MIRRORED, Doubling  # noqa: E402
from causal_layers import AHEAD as ALL_SLICES  # noqa: E402
from cut_layers import apart, seeded  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.bundle import Source  # noqa: E402
from fvae_deploy.export.cut.causal import AheadStage, Pace, ahead_stage, causal_stage  # noqa: E402
from fvae_deploy.export.cut.timing import NotCausal  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.models.any_torch import load  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.stream.codec import open_codec  # noqa: E402

PACE = Pace(encode=False, channels=2, spatial=1, temporal=2)


def stream(stage: AheadStage, z: Any, past: tuple[Any, ...] = ()) -> Any:
    """Run all steps over the latent frames z; what comes after the last one does not matter."""
    frames, found = z.shape[2], []
    for step in range(frames + stage.lag // 2):
        given_ = z[:, :, step : step + 1] if step < frames else torch.randn_like(z[:, :, :1])
        x, *past = stage(given_, torch.tensor((step, step - frames + 1)), *past)
        found.append(x)
    return torch.cat(found, 2)[:, :, stage.lag : stage.lag + 1 + 2 * (frames - 1)]


def agrees(network: Any, lengths: Any, plane: tuple[int, int] = (2, 3)) -> AheadStage:
    stage = ahead_stage(network, PACE, check=False)
    for frames in lengths:
        z = torch.randn(1, 2, frames, *plane, dtype=torch.float64)
        assert apart(stream(stage, z), network(z)[0]) < 1e-10, frames
    return stage


@given(
    before=st.lists(st.sampled_from(list(AHEAD)), max_size=3),
    doubled=st.sampled_from(list(DOUBLED)),
    after=st.lists(st.sampled_from(list(AHEAD)), max_size=3),
    residual=st.booleans(),
    plane=st.tuples(*[st.integers(1, 3)] * 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_a_stream_that_looks_ahead_equals_its_window_of_any_length(
    before: list[str],
    doubled: str,
    after: list[str],
    residual: bool,
    plane: tuple[int, int],
    seed: int,
) -> None:
    before = [*before, "zeros"]  # at least one layer looks ahead
    network = seeded(
        lambda: Doubling(
            [AHEAD[n](4) for n in before],
            DOUBLED[doubled](4),
            [AHEAD[n](4) for n in after],
            residual,
        ),
        seed,
    )
    agrees(network, (1, 2, 3, 4, 6, 11, 20), plane)


@pytest.mark.parametrize("name", AHEAD)
@pytest.mark.parametrize("doubled", DOUBLED)
def test_each_layer_streams(name: str, doubled: str) -> None:
    network = seeded(
        lambda: Doubling([AHEAD["zeros"](4)], DOUBLED[doubled](4), [AHEAD[name](4)], True)
    )
    agrees(network, range(1, 10))


@pytest.mark.parametrize("name", MIRRORED)
def test_mirrored_ends_stream_where_the_network_can_mirror(name: str) -> None:
    network = seeded(
        lambda: Doubling([MIRRORED[name](4)], DOUBLED["repeated"](4), [MIRRORED[name](4)], True)
    )
    agrees(network, range(3, 12))
    with pytest.raises(NotCausal, match="a window of 1 latent frames does not run"):
        ahead_stage(network, PACE)


def test_a_deep_stream_is_as_late_as_its_layers() -> None:
    network = seeded(
        lambda: Doubling(
            [AHEAD["replicated"](4) for _ in range(9)],
            DOUBLED["repeated"](4),
            [AHEAD["ends repeated"](4) for _ in range(5)],
            True,
        )
    )
    stage = agrees(network, (1, 5, 30))
    assert stage.lag == 2 * 9 + 1 + 5


@pytest.mark.parametrize("name", ["group norm", "reversed", "mean of frames", "position in time"])
def test_what_needs_all_frames_is_no_stream(name: str) -> None:
    network = seeded(
        lambda: Doubling([ALL_SLICES[name](4)], DOUBLED["repeated"](4), [AHEAD["zeros"](4)], False)
    )
    for find in (causal_stage, ahead_stage):
        with pytest.raises(NotCausal):
            find(network, PACE)


VAE = """
import torch
import torch.nn.functional as F
from torch import nn


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.past = nn.Conv3d(1, 4, 3, (2, 2, 2))
        self.mean = nn.Conv3d(4, 2, 1)
        self.inner, self.outer = nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 1, 3)

    def encode(self, x):
        x = F.pad(x, (0, 1, 0, 1, 0, 0))
        return self.mean(F.silu(self.past(torch.cat([x[:, :, :1], x[:, :, :1], x], 2))))

    def decode(self, z):
        y = self.inner(z)
        if z.shape[2] > 1:
            rest = F.interpolate(y[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear")
            y = torch.cat([y[:, :, :1], rest], 2)
        y = F.interpolate(F.silu(y), scale_factor=(1, 2, 2))
        return self.outer(F.pad(y, (1, 1, 1, 1, 1, 1), mode="replicate"))


def load():
    torch.manual_seed(0)
    network = VAE()
    network.as_stream = True
    return network
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "ahead_vae.py").write_text(VAE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        model, source = load("ahead_vae:load", window=9)
        loaded = LoadedModel(model, Source(source.id, "", ""), "n", "d", "l")
        export_bundle(loaded, folder / "bundle", version="0")
        yield folder / "bundle", importlib.import_module("ahead_vae").load()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_an_exported_stream_that_looks_ahead_equals_the_code(exported: Any, engine: str) -> None:
    pytest.importorskip(engine)
    bundle, network = exported
    with open_codec(bundle, engine=engine) as codec, torch.no_grad():
        manifest = codec.manifest
        assert manifest.geometry.protocols == ("windows", "causal")
        assert [p.name for p in manifest.parts] == ["encode_first", "encode_step", "decode_step"]
        assert manifest.lag > 4
        assert manifest.parts[-1].halo is not None
        for slices in (1, 3, 5, 21):
            x = np.random.default_rng(0).standard_normal((1, slices, 12, 16), dtype=np.float32)
            z = codec.encode(x)
            assert np.abs(z - network.encode(torch.as_tensor(x)[None])[0].numpy()).max() < 1e-5
            y = codec.decode(z)
            assert np.abs(y - network.decode(torch.as_tensor(z)[None])[0].numpy()).max() < 1e-5


def test_an_encoder_that_looks_ahead_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    code = VAE.replace("torch.cat([x[:, :, :1], x[:, :, :1], x], 2)", "F.pad(x, [0] * 4 + [1, 1])")
    (tmp_path / "ahead_encoder_vae.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BundleError, match=r"found encode: .*later slices.*remove as_stream"):
        load("ahead_encoder_vae:load", window=9)
