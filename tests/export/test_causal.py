"""Causal streams are found in windows: first and step give what the whole window gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
from causal_layers import AHEAD, CAUSAL, Halving, Turns  # noqa: E402
from cut_layers import apart, seeded  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.bundle import Source  # noqa: E402
from fvae_deploy.export.cut.causal import CausalStage, Pace, causal_stage  # noqa: E402
from fvae_deploy.export.cut.timing import NotCausal  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.models.any_torch import load  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.stream import schedule  # noqa: E402
from fvae_deploy.stream.codec import open_codec  # noqa: E402

PACE = Pace(encode=True, channels=1, spatial=4, temporal=2)


def stream(stage: CausalStage, x: Any) -> Any:
    """Run first and steps over the slices of x."""
    z, *state = stage(x[:, :, :1])
    found = [z]
    for i in range(1, x.shape[2], 2):
        z, *state = stage(x[:, :, i : i + 2], *state)
        found.append(z)
    return torch.cat(found, 2)


def agrees(network: Any, frames: int = 15, plane: tuple[int, int] = (8, 12)) -> None:
    stage = causal_stage(network, PACE, check=False)
    x = torch.randn(1, 1, frames, *plane, dtype=torch.float64)
    assert apart(stream(stage, x), network(x)[0]) < 1e-10


@given(
    layers=st.lists(st.sampled_from(list(CAUSAL)), min_size=1, max_size=4),
    residual=st.lists(st.booleans(), min_size=4, max_size=4),
    frames=st.integers(1, 7),
    plane=st.tuples(*[st.integers(1, 3)] * 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_a_stream_equals_its_window(
    layers: list[str], residual: list[bool], frames: int, plane: tuple[int, int], seed: int
) -> None:
    network = seeded(lambda: Halving([CAUSAL[n](4) for n in layers], residual[: len(layers)]), seed)
    agrees(network, 1 + 2 * frames, (4 * plane[0], 4 * plane[1]))


@pytest.mark.parametrize("name", CAUSAL)
def test_each_causal_layer_streams(name: str) -> None:
    agrees(seeded(lambda: Halving([CAUSAL[name](4)], [True])))


def test_a_loop_with_a_cache_streams() -> None:
    agrees(seeded(Turns))


@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_is_no_stream(name: str) -> None:
    network = seeded(lambda: Halving([CAUSAL["zeros in front"](4), AHEAD[name](4)], [False] * 2))
    with pytest.raises(NotCausal):
        causal_stage(network, PACE)


def test_a_network_without_influence_between_slices_is_no_stream() -> None:
    network = seeded(lambda: torch.nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1)))

    class Alone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Any) -> Any:
            return (torch.cat([self.network(x[:, :, :1]), self.network(x[:, :, 1::2])], 2),)

    with pytest.raises(NotCausal, match="do not influence each other"):
        causal_stage(Alone().eval().requires_grad_(False), PACE)


def test_code_that_works_otherwise_in_its_own_window_is_no_stream() -> None:
    class Chunks(Halving):
        def forward(self, x: Any) -> tuple[Any]:
            if x.shape[2] < 17:
                return super().forward(x)
            parts = [super().forward(x[:, :, :9])[0]]
            parts.append(super().forward(x[:, :, 8:])[0][:, :, 1:])
            return (torch.cat(parts, 2),)

    network = seeded(lambda: Chunks([CAUSAL["zeros in front"](4)], [True]))
    causal_stage(network, PACE)
    with pytest.raises(NotCausal, match="another result than its windows"):
        causal_stage(network, PACE, own=9)


VAE = '''
import torch
import torch.nn.functional as F
from torch import nn


class Causal(nn.Conv3d):
    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1, 0, 0))
        return super().forward(torch.cat([x[:, :, :1], x[:, :, :1], x], 2))


class Frame(nn.Module):
    """Attention within a frame."""

    def __init__(self, c):
        super().__init__()
        self.qkv = nn.Conv2d(c, 3 * c, 1)

    def forward(self, x):
        b, c, t, h, w = x.shape
        y = x.transpose(1, 2).reshape(b * t, c, h, w)
        q, k, v = (p.flatten(2).transpose(1, 2)[:, None] for p in self.qkv(y).chunk(3, 1))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + y.reshape(b, t, c, h, w).transpose(1, 2)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            Causal(1, 4, 3), nn.SiLU(), Causal(4, 4, 3, (2, 2, 2)), Frame(4), nn.Conv3d(4, 2, 1)
        )
        self.inner, self.outer = Causal(2, 4, 3), Causal(4, 1, 3)

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        y = self.inner(z)
        rest = F.interpolate(y[:, :, 1:], scale_factor=(2, 1, 1))
        y = F.interpolate(torch.cat([y[:, :, :1], rest], 2), scale_factor=(1, 2, 2))
        return self.outer(y)


def load():
    torch.manual_seed(0)
    network = VAE()
    network.as_stream = True
    return network
'''


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import importlib

    folder = tmp_path_factory.mktemp("causal")
    (folder / "causal_vae.py").write_text(VAE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        model, source = load("causal_vae:load", window=5)
        loaded = LoadedModel(model, Source(source.id, "", ""), "n", "d", "l")
        export_bundle(loaded, folder / "bundle", version="0")
        yield folder / "bundle", importlib.import_module("causal_vae").load()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_an_exported_stream_equals_the_code(exported: Any, engine: str) -> None:
    pytest.importorskip(engine)
    bundle, network = exported
    x = np.random.default_rng(0).standard_normal((1, 9, 16, 12), dtype=np.float32)
    with open_codec(bundle, engine=engine) as codec, torch.no_grad():
        assert codec.manifest.geometry.protocols == ("windows", "causal")
        z = codec.encode(x)
        assert np.abs(z - network.encode(torch.as_tensor(x)[None])[0].numpy()).max() < 1e-5
        y = codec.decode(z)
        assert np.abs(y - network.decode(torch.as_tensor(z)[None])[0].numpy()).max() < 1e-5


def test_windows_stay_the_default_and_equal_the_code(exported: Any) -> None:
    bundle, network = exported
    with open_codec(bundle, engine="onnxruntime") as codec:
        geometry = codec.manifest.geometry
        planned = schedule.steps(10, geometry.protocols[0], 1, geometry)
        assert [step.first for step in planned] == [True, False, False] * 2
        x = np.random.default_rng(1).standard_normal((1, 10, 8, 8), dtype=np.float32)
        found = np.concatenate([codec.encode(x[:, i : i + 5]) for i in (0, 5)], axis=1)
    with torch.no_grad():
        windows = [network.encode(torch.as_tensor(x[None, :, i : i + 5]))[0] for i in (0, 5)]
    assert np.abs(found - torch.cat(windows, 1).numpy()).max() < 1e-5


def test_a_stream_is_entered_at_its_start(exported: Any) -> None:
    bundle, _ = exported
    with open_codec(bundle, engine="onnxruntime") as codec:
        geometry, context = codec.manifest.geometry, codec.manifest.context("decode")
    planned = schedule.steps(61, "causal", 1, geometry)
    assert schedule.enter(planned, 20, context) == 0


def test_a_stream_that_is_none_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    code = VAE.replace("return self.outer(y)", "return self.outer(y) + y.mean((1, 2), True)")
    (tmp_path / "window_only_vae.py").write_text(code)
    (tmp_path / "window_vae_too.py").write_text(code.replace("network.as_stream", "network.other"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BundleError, match=r"decode: .* slices.*remove as_stream"):
        load("window_only_vae:load", window=5)
    model, _ = load("window_vae_too:load", window=5)
    assert (model.kinds, model.geometry.protocols) == (("first",), ("windows",))
