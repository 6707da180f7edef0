"""Tiny autoencoders in their author's files equal his formulation, in stages and in tiles."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
from diffusers import AutoencoderTiny  # noqa: E402
from float64_engine import Float64  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export import author_files  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402
from fvae_deploy.export.models.tae import tae_model  # noqa: E402
from fvae_deploy.export.peer import REFERENCE, check_peer, peers  # noqa: E402
from fvae_deploy.export.sources import load  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle  # noqa: E402
from fvae_deploy.stream.stages import CausalStream, whole_grids  # noqa: E402
from fvae_deploy.stream.tiles import Grid  # noqa: E402

PUBLISHED = Path(__file__).parents[3] / "shared" / "weights"
published = pytest.mark.skipif(
    not (PUBLISHED / "taef2_encoder.pth").is_file(),
    reason=f"needs the published files of taef2 in {PUBLISHED}",
)


class Limit(nn.Module):
    def forward(self, z: Any) -> Any:
        return 3 * torch.tanh(z / 3)


class Residual(nn.Module):
    """The block as it is described, apart from the product's."""

    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        three = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(three[0], nn.ReLU(), three[1], nn.ReLU(), three[2])
        if pooled:
            wide = 4 * width
            self.pool = nn.Sequential(
                nn.Conv2d(width, wide, 1, bias=False),
                nn.GroupNorm(4, wide),
                nn.ReLU(),
                nn.Conv2d(wide, width, 1, bias=False),
            )

    def forward(self, x: Any) -> Any:
        x = x + self.pool(x) if hasattr(self, "pool") else x
        return torch.relu(x + self.conv(x))


def halves(
    width: int = 8, latent: int = 3, levels: int = 3, blocks: int = 1, pooled: bool = True
) -> tuple[nn.Sequential, nn.Sequential]:
    """The author's encoder and decoder, [k, 3, H, W] in [0, 1] to latents and back."""

    def convolution(inside: int, outside: int, **options: Any) -> nn.Conv2d:
        return nn.Conv2d(inside, outside, 3, padding=1, **options)

    def row(last: bool) -> list[nn.Module]:
        return [Residual(width, pooled and last) for _ in range(blocks)]

    encoder = [convolution(3, width), Residual(width, False)]
    decoder = [Limit(), convolution(latent, width), nn.ReLU()]
    for level in range(levels):
        encoder.append(convolution(width, width, stride=2, bias=False))
        encoder += row(level == levels - 1)
        decoder += row(level == 0)
        decoder += [nn.Upsample(scale_factor=2), convolution(width, width, bias=False)]
    encoder.append(convolution(width, latent))
    decoder += [Residual(width, False), convolution(width, 3)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


def random_halves(seed: int = 0, **sizes: Any) -> tuple[nn.Sequential, nn.Sequential]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = halves(**sizes)
        for half in made:
            half.eval().requires_grad_(False)
            for parameter in half.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
    return made


def write_pair(folder: Path, name: str, made: Any, suffix: str = ".pth") -> Path:
    folder.mkdir(exist_ok=True)
    for half, network in zip(("encoder", "decoder"), made, strict=True):
        path = folder / f"{name}_{half}{suffix}"
        if suffix == ".safetensors":
            save_file(network.state_dict(), path)
        else:
            torch.save(network.state_dict(), path)
    return folder


def write_both(path: Path, made: Any) -> Path:
    """One file; its decoder is counted without the layer that limits latents."""
    state = {f"encoder.layers.{k}": v for k, v in made[0].state_dict().items()}
    for name, tensor in made[1].state_dict().items():
        index, _, rest = name.partition(".")
        state[f"decoder.layers.{int(index) - 1}.{rest}"] = tensor
    save_file(state, path)
    return path


def engine_of(path: Path, channels: int | None = None, clamped: bool = False) -> Float64:
    files = author_files.find(path)
    assert files is not None
    return Float64(tae_model(author_files.load(files).double(), channels, clamped))


def run(
    engine: Any, direction: str, data: np.ndarray, grids: dict[str, Grid] | None = None
) -> np.ndarray:
    factor = engine.manifest.geometry.spatial if direction == "encode" else 1
    plane = (data.shape[2] // factor, data.shape[3] // factor)
    grids = whole_grids(engine.manifest, (direction,), plane) | (grids or {})
    return CausalStream(engine, engine.manifest, direction, grids).run(data, False)


def by_hand(half: Any, data: np.ndarray, decode: bool) -> np.ndarray:
    """Pass [C, k, H, W] in [-1, 1] through one of the author's halves."""
    x = torch.from_numpy(data).transpose(0, 1)
    y = 2 * half(x) - 1 if decode else half((x + 1) / 2)
    return y.transpose(0, 1).numpy()


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


SIZES = {
    "like TAEF2": {},
    "like TAESD": {"pooled": False, "latent": 4, "blocks": 3},
    "of one level": {"levels": 1, "width": 4},
}


@given(
    st.data(),
    st.sampled_from(list(SIZES)),
    st.integers(1, 2),
    st.tuples(*[st.integers(1, 9)] * 2),
    st.integers(0, 99),
)
@settings(max_examples=8)
def test_stages_and_tiles_equal_the_authors_formulation_in_float64(
    tmp_path_factory: Any, data: Any, name: str, k: int, plane: tuple[int, int], seed: int
) -> None:
    made = random_halves(seed, **SIZES[name])
    engine = engine_of(write_pair(tmp_path_factory.mktemp("pair"), "t", made))
    g, random = engine.manifest.geometry, np.random.default_rng(seed)
    x = random.uniform(-1, 1, (3, k, g.spatial * plane[0], g.spatial * plane[1]))
    z = random.normal(0, 2, (g.latent_channels, k, *plane))
    for half, direction, given_data in ((0, "encode", x), (1, "decode", z)):
        expected = by_hand(copy.deepcopy(made[half]).double(), given_data, direction == "decode")
        assert apart(run(engine, direction, given_data), expected) < 1e-10
        grids = {}
        for stage, grid in whole_grids(engine.manifest, (direction,), plane).items():
            halo = engine.manifest.stage_part(stage, first=False).halo
            if halo is not None:
                extent = data.draw(st.tuples(*[st.integers(2 * halo + 1, 2 * halo + 9)] * 2))
                grids[stage] = Grid(grid.height, grid.width, extent, halo)
        assert apart(run(engine, direction, given_data, grids), expected) < 1e-10


def test_only_the_stages_with_a_norm_need_the_whole_plane(tmp_path: Path) -> None:
    manifest = engine_of(write_pair(tmp_path, "t", random_halves()), 1).manifest
    whole = [part for part in manifest.parts if part.halo is None]
    assert [part.stage for part in whole] == ["encode3", "decode0"]
    assert all(part.scale == 1 and "group normalisation" in part.whole for part in whole)
    plain = engine_of(write_pair(tmp_path / "p", "t", random_halves(pooled=False)), 1).manifest
    assert all(part.halo is not None for part in plain.parts)


@pytest.mark.parametrize(
    "of",
    [
        pytest.param(lambda folder, made: write_pair(folder / "a", "t", made), id="folder"),
        pytest.param(
            lambda folder, made: write_pair(folder / "a", "t", made, ".safetensors") / "t",
            id="name in a folder",
        ),
        pytest.param(
            lambda folder, made: write_pair(folder / "a", "t", made, ".pt") / "t_decoder.pt",
            id="one file of the pair",
        ),
        pytest.param(
            lambda folder, made: write_both(folder / "t.safetensors", made), id="one file"
        ),
    ],
)
def test_every_way_to_name_the_files_gives_the_same_network(
    tmp_path: Path, of: Callable[[Path, Any], Path]
) -> None:
    made = random_halves()
    loaded = load(str(of(tmp_path, made)))
    assert loaded.name == "t"
    again = load(str(write_pair(tmp_path / "again", "t", made))).model
    for name, stage in loaded.model.stages.items():
        for key, value in again.stages[name].state_dict().items():
            assert torch.equal(stage.state_dict()[key], value)


def test_an_authors_taesd_equals_diffusers_class(tmp_path: Path) -> None:
    made = random_halves(width=64, latent=4, blocks=3, pooled=False)
    both = write_both(tmp_path / "t.safetensors", made)
    network = AutoencoderTiny().eval()
    from safetensors.torch import load_file

    network.load_state_dict(load_file(both))
    x = np.random.default_rng(0).uniform(-1, 1, (3, 2, 16, 24))
    engine = engine_of(both)
    batch = torch.from_numpy(x).transpose(0, 1)
    with torch.no_grad():
        z = network.double().encode(batch).latents
        y = network.decode(z).sample
    assert apart(run(engine, "encode", x), z.transpose(0, 1).numpy()) < 1e-10
    assert (
        apart(run(engine, "decode", z.transpose(0, 1).numpy()), y.transpose(0, 1).numpy()) < 1e-10
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A bundle, its weights and the network."""
    folder, made = tmp_path_factory.mktemp("small"), random_halves(width=16, latent=4)
    weights = write_pair(folder / "weights", "small", made)
    export_bundle(load(str(weights)), folder / "bundle", version="0")
    return folder / "bundle", weights, made


def same_as_by_hand(bundle: Path, made: Any, engine: str) -> None:
    encoder, decoder = (copy.deepcopy(half).double() for half in made)
    with fvae.open_codec(bundle, engine=engine) as codec, torch.no_grad():
        for k, t, h, w in ((1, 2, 24, 40), (3, 3, 16, 8)):
            x = np.random.default_rng(t).uniform(-1, 1, (1, t, h, w)).astype(np.float32)
            z = codec.encode(x, k=k)
            expected = by_hand(encoder, x.astype(np.float64).repeat(3, axis=0), False)
            assert apart(z, expected) < 1e-5
            y = by_hand(decoder, z.astype(np.float64), True).clip(-1, 1).mean(0, keepdims=True)
            # A difference in [0, 1], the range in which the author's decoder ends.
            assert np.abs(codec.decode(z, k=k) - y).max() / 2 < 1e-5


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_every_engine_equals_the_authors_formulation(small: Any, engine: str) -> None:
    pytest.importorskip(engine)
    same_as_by_hand(small[0], small[2], engine)


@published
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_the_published_taef2_equals_the_authors_formulation(
    tmp_path_factory: pytest.TempPathFactory, engine: str
) -> None:
    pytest.importorskip(engine)
    made = halves(width=64, latent=32, blocks=3)
    for half, name in zip(made, ("encoder", "decoder"), strict=True):
        half.load_state_dict(torch.load(PUBLISHED / f"taef2_{name}.pth", weights_only=True))
        half.eval().requires_grad_(False)
    bundle = tmp_path_factory.getbasetemp() / "published-taef2"
    if not bundle.exists():
        export_bundle(load(str(PUBLISHED)), bundle, version="0")
    same_as_by_hand(bundle, made, engine)


def test_the_peer_is_the_authors_formulation(small: Any) -> None:
    from fvae_deploy.export.peer import peer_window

    bundle, weights, made = small
    manifest = Manifest.load(bundle)
    assert peers(weights) == (REFERENCE,)
    check_peer(weights, manifest)
    check_peer(weights / "small_decoder.pth", manifest)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 2, 16, 24)).astype(np.float32)
    z = peer_window(weights, REFERENCE, "encode", x, "fp32")()
    assert apart(z, by_hand(made[0], x.repeat(3, axis=0), False)) < 1e-5
    y = peer_window(weights, REFERENCE, "decode", z, "fp32", limits=(-1, 1))()
    expected = by_hand(made[1], z, True).clip(-1, 1).mean(0, keepdims=True)
    assert np.abs(y - expected).max() < 1e-5
    other = write_pair(weights.parent / "other", "small", random_halves(1, width=16, latent=4))
    with pytest.raises(BundleError, match="found others in"):
        check_peer(other, manifest)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change(half: str, function: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / f"t_{half}.pth"
        torch.save(function(torch.load(path, weights_only=True)), path)

    return apply


def swap(folder: Path) -> None:
    (folder / "t_encoder.pth").rename(folder / "x.pth")
    (folder / "t_decoder.pth").rename(folder / "t_encoder.pth")
    (folder / "x.pth").rename(folder / "t_decoder.pth")


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("t_decoder.pth"), r"expected t_encoder\S* and t_decoder\S* in .*, found only one"),
        (drop("t_encoder.pth"), r"expected t_encoder\S* and t_decoder\S* in .*, found only one"),
        (lambda f: write_pair(f, "u", random_halves()), r"expected one pair .*, found t, u: name"),
        (swap, "expected the tensors of a tiny autoencoder"),
        (change("encoder", without("0.weight")), "no layer 0 of an encoder"),
        (change("encoder", without("1.conv.2.bias")), r"1 keys missing \(encoder.1.conv.2.bias\)"),
        (change("decoder", without("1.bias")), r"1 keys missing \(decoder.0.bias\)"),
        (change("encoder", without("0.bias")), r"1 keys missing \(encoder.0.bias\)"),
        (change("encoder", without("2.weight")), "no layer 2 of an encoder"),
        (change("decoder", without("5.weight")), "3 halvings and a decoder from 3 channels with 4"),
        (
            change("encoder", lambda s: {**s, "2.bias": s["0.bias"]}),
            r"1 keys of another network \(encoder.2.bias\)",
        ),
        (change("decoder", lambda s: {**s, "loss.weight": s["1.weight"]}), "found 'loss.weight'"),
        (change("decoder", lambda s: {**s, "0.weight": s["1.weight"]}), "found '0.weight'"),
        (change("decoder", lambda s: {}), "no tensors of the decoder"),
        (change("decoder", lambda s: [1]), "found a list in t_decoder.pth"),
        (
            change("decoder", lambda s: random_halves(latent=5)[1].state_dict()),
            "found an encoder to 3 channels with 3 halvings and a decoder from 5 channels",
        ),
        (
            change("decoder", lambda s: random_halves(levels=2)[1].state_dict()),
            "3 halvings and a decoder from 3 channels with 2 doublings",
        ),
        (lambda f: (f / "t_decoder.pth").write_bytes(b"damaged"), "only tensors"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = write_pair(tmp_path / "weights", "t", random_halves())
    load(str(folder))
    damage(folder)
    with pytest.raises(BundleError, match=message) as refused:
        load(str(folder))
    assert re.fullmatch("[^\n]+", str(refused.value))


def test_the_preferred_format_of_a_pair_that_is_there_twice(tmp_path: Path) -> None:
    folder = write_pair(tmp_path, "t", random_halves(1))
    write_pair(folder, "t", random_halves(2), ".safetensors")
    assert load(str(folder)).source.id == "t_encoder.safetensors + t_decoder.safetensors"
    assert load(str(folder / "t_encoder.pth")).source.id == "t_encoder.pth + t_decoder.pth"
