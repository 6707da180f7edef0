"""VAEs of foreign code: geometry, errors, export, and comparison with running them by hand."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
from safetensors.torch import save_file  # noqa: E402

import fvae_deploy as fvae  # noqa: E402
from fvae_deploy.errors import BundleError, EngineError, LatentError, PlanError, UsageError  # noqa: E402
from fvae_deploy.export import to_onnx  # noqa: E402
from fvae_deploy.export.draft import LoadedModel  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402
from fvae_deploy.export.models.any_torch import load  # noqa: E402
from fvae_deploy.export.probe import parts_of  # noqa: E402
from fvae_deploy.export.to_onnx import export_bundle, trace  # noqa: E402
from fvae_deploy.stream.codec import open_codec  # noqa: E402
from fvae_deploy.stream.plan import plan  # noqa: E402
from fvae_deploy.stream.tiles import Grid  # noqa: E402

ENGINES = ("torch", "onnxruntime", "openvino")

THEIRS = '''
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal
from types import SimpleNamespace


class Causal(nn.Conv3d):
    def __init__(self, inside, outside, stride=1):
        super().__init__(inside, outside, 3, stride)

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1, 0, 0))
        return super().forward(torch.cat([x[:, :, :1], x[:, :, :1], x], 2))


class Local(nn.Module):
    """1 + 4n slices to 1 + n, 4x4 pixels to a cell, causal convolutions alone."""

    def __init__(self, channels=3, width=4, latent=2):
        super().__init__()
        self.encoder = nn.Sequential(
            Causal(channels, width, 2), nn.SiLU(), Causal(width, width, 2), nn.SiLU(),
            Causal(width, 2 * latent),
        )
        self.decoder = nn.ModuleList(Causal(n, width) for n in (latent, width, width))
        self.out = nn.Conv3d(width, channels, 1)
        self.loss = nn.Linear(2, 2)

    def encode(self, x):
        return self.encoder(x).chunk(2, 1)[0]

    def decode(self, z):
        x = F.silu(self.decoder[0](z))
        for layer in self.decoder[1:]:
            x = torch.cat([x[:, :, :1], x[:, :, 1:].repeat_interleave(2, 2)], 2)
            x = F.silu(layer(F.interpolate(x, scale_factor=(1, 2, 2))))
        return self.out(x)


class Blocks(nn.Module):
    """4n slices to n, 2x2 pixels to a cell; sees the whole plane."""

    def __init__(self, norm=True, attention=True):
        super().__init__()
        self.down = nn.Conv3d(3, 8, (4, 2, 2), (4, 2, 2))
        self.norm = nn.GroupNorm(2, 8) if norm else nn.Identity()
        self.attention = attention
        self.mean, self.out = nn.Conv3d(8, 4, 1), nn.Conv3d(4, 3 * 16, 1)

    def middle(self, x):
        x = self.norm(x)
        if not self.attention:
            return x
        q = x[0].permute(1, 2, 3, 0).flatten(1, 2)  # three axes, as many write it
        y = F.scaled_dot_product_attention(q, q, q, None)
        return x + y.unflatten(1, x.shape[3:]).permute(3, 0, 1, 2)[None]

    def encode(self, x):
        return self.mean(self.middle(self.down(x)))

    def decode(self, z):
        y = self.out(z)
        b, _, t, h, w = y.shape
        y = y.reshape(b, 3, 4, 2, 2, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return y.reshape(b, 3, 4 * t, 2 * h, 2 * w)


def seeded(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs)


def local():
    return seeded(Local)


def gray():
    return seeded(Local, channels=1)


def blocks():
    return seeded(Blocks)


def attention():
    return seeded(Blocks, norm=False)


def returning(encode=lambda z: z, decode=lambda x: x):
    vae = local()
    plain_encode, plain_decode = vae.encode, vae.decode
    vae.encode = lambda x: encode(plain_encode(x))
    vae.decode = lambda z: decode(plain_decode(z))
    return vae


class Moments:
    def __init__(self, mean):
        self.mean = mean

    def mode(self):
        return self.mean

    def sample(self):
        return self.mean + torch.randn_like(self.mean)


def object_of_diffusers():
    return returning(
        lambda z: SimpleNamespace(latent_dist=Moments(z)), lambda x: SimpleNamespace(sample=x)
    )


def tuples():
    return returning(lambda z: (Moments(z),), lambda x: (x, None))


def a_normal_distribution():
    return returning(lambda z: Normal(z, 1.0))


def a_mean_alone():
    return returning(lambda z: [SimpleNamespace(mean=z)])


class Shared(Local):
    """One convolution under two names, used by both directions."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv3d(2, 2, 1, bias=False)
        self.again = self.mix

    def encode(self, x):
        return self.again(self.mix(super().encode(x)))

    def decode(self, z):
        return super().decode(self.mix(z))


def shared():
    return seeded(Shared)


class Cropping(Local):
    def decode(self, z):
        return super().decode(z)[:, :, :-4]


class Fewer(Local):
    def encode(self, x):
        return super().encode(x)[:, :, :, :-1]


class Uneven(Local):
    def encode(self, x):
        return super().encode(x[:, :, :8].repeat_interleave(2, 2))


class Drawing(Local):
    def encode(self, x):
        return Moments(super().encode(x)).sample()


class Telling(Local):
    def encode(self, x):
        return {"z": super().encode(x)}


class Failing(Local):
    def decode(self, z):
        raise ZeroDivisionError("no decoding today")


class Flat(Local):
    def encode(self, x):
        return super().encode(x).flatten()


class OneWay(nn.Linear):
    def encode(self, x):
        return x


def one_way():
    return OneWay(2, 2)


def nothing():
    return None


THE_ONE = Local()


def the_one():
    return THE_ONE


class Hiding(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = [Local()]

    def encode(self, x):
        return self.hidden[0].encode(x)

    def decode(self, z):
        return self.hidden[0].decode(z)


def without_files():
    raise FileNotFoundError("weights.pth")


class ByHand(Local):
    """Statistics over the plane that no normalisation layer shows."""

    def encode(self, x):
        z = super().encode(x)
        return z - z.mean((3, 4), keepdim=True)


class Placed(Local):
    def encode(self, x):
        z = super().encode(x)
        return z + torch.arange(z.shape[4]).to(z) / 10


class Deciding(Local):
    def encode(self, x):
        return super().encode(x) if x.sum() > -1e9 else x


class Looping(Local):
    """Its own tiles of 8 pixels."""

    def encode(self, x):
        rows = [x[:, :, :, i : i + 8] for i in range(0, x.shape[3], 8)]
        return super().encode(torch.cat(rows, 3))
'''


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module of networks in the current directory, like a user's code."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "their_vae.py").write_text(THEIRS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        load("their_vae:local", window=9)
        yield sys.modules["their_vae"]
        sys.modules.pop("their_vae", None)


def export(folder: Path, factory: str, **options: Any) -> Manifest:
    model, source = load(f"their_vae:{factory}", **options)
    return export_bundle(LoadedModel(model, source, "theirs", "d", "l"), folder, version="0")


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the graphs, which take seconds and are not needed by the torch engine or by plans."""
    monkeypatch.setattr(to_onnx, "trace", lambda *_: to_onnx.onnx.ModelProto())


@pytest.fixture(scope="module")
def local_bundle(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "local"
    export(folder, "local", window=5, channels=1)
    return folder


@pytest.fixture(scope="module")
def blocks_bundle(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "blocks"
    export(folder, "blocks", window=8, intensity=(0.0, 1.0))
    return folder


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def by_hand(network: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstruction of one window x [1 or 3, T, H, W] replicated to 3 channels."""
    with torch.no_grad():
        z = network.encode(torch.from_numpy(np.broadcast_to(x, (3, *x.shape[1:])).copy())[None])
        return z[0].numpy(), network.decode(z)[0].numpy()


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("factory", "window", "channels", "geometry"),
    [
        pytest.param("local", 9, 1, (4, 4, 2, 1, 9, 9, 3), id="1 + 4n slices, gray"),
        pytest.param("local", 5, None, (4, 4, 2, 3, 5, 5, 2), id="1 + 4n slices, rgb"),
        pytest.param("gray", 9, None, (4, 4, 2, 1, 9, 9, 3), id="a network of one channel"),
        pytest.param("gray", 9, 1, (4, 4, 2, 1, 9, 9, 3), id="a network of one channel, gray"),
        pytest.param("blocks", 8, 1, (4, 2, 4, 1, 8, 8, 2), id="4n slices"),
        pytest.param("blocks", 16, 1, (4, 2, 4, 1, 16, 16, 4), id="16 slices to 4, not 5 each"),
        pytest.param("blocks", 4, 1, (4, 2, 4, 1, 4, 4, 1), id="a window of one latent frame"),
    ],
)
def test_geometry_is_measured_by_running_the_network(
    theirs: Any, factory: str, window: int, channels: int | None, geometry: tuple[int, ...]
) -> None:
    model, source = load(f"their_vae:{factory}", window=window, channels=channels)
    assert tuple(vars(model.geometry).values())[:7] == geometry
    assert model.geometry.protocols == ("windows",)
    assert model.kinds == ("first",)
    assert source.id == f"their_vae:{factory}"


@pytest.mark.parametrize(
    "factory", ["object_of_diffusers", "tuples", "a_normal_distribution", "a_mean_alone"]
)
def test_what_encode_and_decode_return_is_unwrapped(theirs: Any, factory: str) -> None:
    model, _ = load(f"their_vae:{factory}", window=5)
    x = torch.from_numpy(random(1, 3, 5, 8, 8))
    with torch.no_grad():
        z = model.stages["encode"](x)[0]
        assert torch.equal(z, theirs.local().encode(x))
        assert torch.equal(model.stages["decode"](z)[0], theirs.local().decode(z))


def test_a_stage_holds_only_the_weights_that_it_uses(theirs: Any) -> None:
    model, _ = load("their_vae:local", window=5)
    names = {name: set(stage.state_dict()) for name, stage in model.stages.items()}
    assert {name.split(".")[1] for name in names["encode"]} == {"encoder"}
    assert {name.split(".")[1] for name in names["decode"]} == {"decoder", "out"}
    without = model.network.config["without"]
    assert without == {"encode": ["decoder", "out", "loss"], "decode": ["encoder", "loss"]}


def test_a_weight_with_two_names_used_by_both_stages_is_saved_and_loaded(
    theirs: Any, without_onnx: None, tmp_path: Path
) -> None:
    export(tmp_path / "b", "shared", window=5)
    x = random(3, 5, 8, 8)
    z, y = by_hand(theirs.shared(), x)
    with open_codec(tmp_path / "b", engine="torch") as codec:
        assert apart(codec.encode(x), z) < 1e-6
        assert apart(codec.decode(z), y) < 1e-6


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        pytest.param("their_vae", "expected a factory like package.module:f", id="no colon"),
        pytest.param("their vae:x;y", "expected a factory like package.module:f", id="no names"),
        pytest.param(
            "no_vae:local",
            "a module no_vae to import, found ModuleNotFoundError.*PYTHONPATH",
            id="not importable",
        ),
        pytest.param("their_vae:lokal", "expected lokal in their_vae, found none", id="a typo"),
        pytest.param("their_vae:Local.x", "expected Local.x in Local, found", id="no attribute"),
        pytest.param("their_vae:F", "expected a function .*, found a module", id="no function"),
        pytest.param("their_vae:nothing", "encode and decode, found a NoneType", id="None"),
        pytest.param("their_vae:one_way", "found a OneWay without decode", id="no decode"),
        pytest.param("their_vae:OneWay", "found TypeError: .*missing", id="wants arguments"),
        pytest.param("their_vae:without_files", "FileNotFoundError: weights.pth", id="fails"),
        pytest.param("their_vae:Cropping", "9 slices .* found 5: try --window 5", id="length"),
        pytest.param("their_vae:Fewer", "whole squares of pixels, found 7x16 for", id="cells"),
        pytest.param("their_vae:Uneven", "slices per latent frame, found 4 frames for 9", id="t"),
        pytest.param("their_vae:Drawing", "found a random draw: .*the mean", id="random"),
        pytest.param("their_vae:Telling", "found a dict: wrap it in the factory", id="a dict"),
        pytest.param("their_vae:Flat", r"latents \[1, D, t, h, w\] .* found \[", id="flat"),
        pytest.param("their_vae:the_one", "a new network from every call of", id="one for all"),
        pytest.param("their_vae:Hiding", "that encode uses, found none: .*attribute", id="hidden"),
        pytest.param("their_vae:Failing", "ZeroDivisionError: no decoding today", id="raises"),
    ],
)
def test_an_object_that_is_not_a_vae_is_refused_with_the_reason(
    theirs: Any, factory: str, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        load(factory, window=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"window": 0}, "a window of at least 1 slice, found 0", id="window"),
        pytest.param({"intensity": (1.0, -1.0)}, "an ascending range", id="descending range"),
        pytest.param({"intensity": (0.0, float("nan"))}, "an ascending range", id="nan"),
    ],
)
def test_numbers_outside_their_range_are_refused(
    theirs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load("their_vae:local", **{"window": 5, **options})


@pytest.mark.parametrize("form", ["safetensors", "plain", "state_dict", "model", "with a loss"])
def test_weights_of_every_form_are_loaded(theirs: Any, form: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = theirs.Local()
    state: dict[str, Any] = other.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.ckpt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "with a loss":
        torch.save({"state_dict": {**state, "discriminator.weight": torch.ones(3)}}, path)
    else:
        torch.save(state if form == "plain" else {form: state, "epoch": 3}, path)
    model, source = load("their_vae:local", path, window=5)
    x = torch.from_numpy(random(1, 3, 5, 8, 8))
    with torch.no_grad():
        assert torch.equal(model.stages["encode"](x)[0], other.encode(x))
    assert source.id == path.name
    assert len(source.sha256) == 64


class Trap:
    """Unpickling this creates a folder, which is harmless but can be detected."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            lambda s: {**s, "out.weight": s["out.weight"][:1]},
            "1 keys with other shapes "
            r"\(out.weight\)",
            id="shapes",
        ),
        pytest.param(
            lambda s: {"out.weight": s["out.weight"]},
            r"15 keys missing \(decoder.0.bias, "
            r"decoder.0.weight, decoder.1.bias, …\)",
            id="missing",
        ),
        pytest.param(
            lambda s: {**s, "out.gain": s["out.bias"]},
            "1 keys of another network "
            r"\(out.gain\).*check the factory",
            id="foreign",
        ),
        pytest.param(lambda s: {"epoch": 3, "net": s}, "found a int at 'epoch'", id="nested"),
        pytest.param(lambda s: [s["out.bias"]], "tensors by name .*found list", id="a list"),
        pytest.param(lambda s: {}, "tensors by name .*found dict", id="empty"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    theirs: Any, content: Any, message: str, tmp_path: Path
) -> None:
    torch.save(content(theirs.local().state_dict()), tmp_path / "w.pt")
    with pytest.raises(BundleError, match=message):
        load("their_vae:local", tmp_path / "w.pt", window=5)


@pytest.mark.parametrize("protocol", [2, 4], ids=["as torch writes it", "newer than torch reads"])
def test_a_pickle_with_code_is_refused_without_running_it(
    theirs: Any, protocol: int, tmp_path: Path
) -> None:
    torch.save({"x": Trap(tmp_path / "trapped")}, tmp_path / "w.pt", pickle_protocol=protocol)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap(tmp_path / "trapped"), protocol))
    for name in ("w.pt", "raw.pt"):
        with pytest.raises(BundleError, match=r"contains only tensors, found .*again as"):
            load("their_vae:local", tmp_path / name, window=5)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not", b"\x08" * 99])
def test_a_damaged_or_missing_file_is_refused(
    theirs: Any, name: str, content: bytes | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=r"nothing|contains only tensors|a safetensors file"):
        load("their_vae:local", tmp_path / name, window=5)


def test_a_local_network_has_the_halo_of_its_convolutions(theirs: Any) -> None:
    model, _ = load("their_vae:local", window=5)
    assert [(part.name, part.halo, part.whole) for part in parts_of(model)] == [
        ("encode_first", 2, ""),
        ("decode_first", 2, ""),
    ]


@pytest.mark.parametrize(
    ("factory", "window", "reason"),
    [
        ("blocks", 4, "group normalisation takes its statistics over the whole plane"),
        ("attention", 4, "attention looks at the whole plane"),
        ("ByHand", 5, "a cell is felt farther than its convolutions reach (2 cells)"),
        ("Placed", 5, "its values depend on the place in the plane"),
    ],
)
def test_a_network_that_is_not_local_takes_the_whole_plane_with_the_reason(
    theirs: Any, factory: str, window: int, reason: str
) -> None:
    encode, decode = parts_of(load(f"their_vae:{factory}", window=window)[0])
    assert (encode.halo, encode.whole) == (None, reason)
    assert decode.halo is not None


def test_a_budget_that_would_need_tiles_names_the_reason(
    theirs: Any, without_onnx: None, tmp_path: Path
) -> None:
    manifest = export(tmp_path / "b", "blocks", window=8)
    with pytest.raises(PlanError, match=r"encode cannot be tiled: group normalisation takes"):
        plan(manifest, ("encode",), (256, 256), engine="torch", precision="fp32", memory=1 << 28)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_local_network_has_equal_results_in_every_engine(
    theirs: Any, local_bundle: Path, engine: str
) -> None:
    x = random(1, 5, 20, 28)
    z, y = by_hand(theirs.local(), x)
    with open_codec(local_bundle, engine=engine) as codec:
        assert apart(codec.encode(x), z) < 1e-5
        assert apart(codec.decode(z), y.mean(0, keepdims=True)) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_of_the_whole_plane_has_equal_results_in_every_engine(
    theirs: Any, blocks_bundle: Path, engine: str
) -> None:
    x = random(3, 8, 10, 14)
    z, y = by_hand(theirs.blocks(), x)
    with open_codec(blocks_bundle, engine=engine) as codec:
        assert codec.manifest.geometry.channels == 3
        assert apart(codec.encode(x), z) < 1e-5
        assert apart(codec.decode(z), y) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_tiles_equal_the_whole(local_bundle: Path, engine: str) -> None:
    h, w = 13, 11
    x = random(1, 7, 4 * h, 4 * w)  # a second window begins
    with open_codec(local_bundle, engine=engine) as codec:
        tiles = {"encode": Grid(h, w, (7, 6), 2), "decode": Grid(h, w, (6, 8), 2)}
        z = codec.encode(x)
        assert apart(codec.encode(x, grids=tiles), z) < 1e-5
        assert apart(codec.decode(z, grids=tiles), codec.decode(z)) < 1e-5


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("slices", [4, 8, 19])
def test_a_volume_equals_running_the_network_by_hand_on_each_window(
    theirs: Any, blocks_bundle: Path, write_ct: Any, engine: str, slices: int, tmp_path: Path
) -> None:
    _compare_volume(theirs.blocks(), blocks_bundle, write_ct, engine, slices, 8, 2, tmp_path)


def test_a_gray_volume_equals_running_the_network_by_hand(
    theirs: Any, local_bundle: Path, write_ct: Any, tmp_path: Path
) -> None:
    _compare_volume(theirs.local(), local_bundle, write_ct, "onnxruntime", 12, 5, 4, tmp_path)


def _compare_volume(
    network: Any,
    bundle: Path,
    write_ct: Any,
    engine: str,
    slices: int,
    window: int,
    spatial: int,
    folder: Path,
) -> None:
    """Reconstruct a NIfTI with fvae and by hand; the last window repeats the last slice."""
    ct = write_ct(folder / "ct.nii.gz", (13, 9, slices)).astype(np.float32)
    intensity = Manifest.load(bundle).intensity
    span = intensity.model_max - intensity.model_min
    frames = intensity.model_min + span * (ct.clip(-1000, 1000).transpose(2, 0, 1) + 1000) / 2000
    frames = np.pad(frames, ((0, -slices % window), (0, -13 % spatial), (0, -9 % spatial)), "edge")
    decoded = [
        by_hand(network, frames[None, start : start + window])[1].mean(0)
        for start in range(0, slices, window)
    ]
    share = (np.concatenate(decoded)[:slices, :13, :9] - intensity.model_min) / span
    expected = (2000 * share - 1000).clip(-1000, 1000).transpose(1, 2, 0)
    out = folder / "out.nii.gz"
    fvae.reconstruct(folder / "ct.nii.gz", out, model=bundle, engine=engine, dtype="float32")
    found = nibabel.load(out).get_fdata()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.02  # 1e-5 of the range
    exact = {"model": bundle, "engine": engine, "latent_dtype": "float32"}
    fvae.encode(folder / "ct.nii.gz", folder / "z.zarr", **exact)
    fvae.decode(
        folder / "z.zarr",
        folder / "crop.nii.gz",
        model=bundle,
        engine=engine,
        slices=(slices - 2, slices),
        dtype="float32",
    )
    crop = nibabel.load(folder / "crop.nii.gz").get_fdata()
    assert np.abs(crop - expected[..., -2:]).max() < 0.02


def test_windows_of_one_latent_frame_are_decoded(
    theirs: Any, without_onnx: None, tmp_path: Path
) -> None:
    export(tmp_path / "b", "attention", window=4, channels=1)
    x = random(1, 8, 6, 8)
    with open_codec(tmp_path / "b", engine="torch") as codec:
        found = codec.decode(codec.encode(x))
    windows = [by_hand(theirs.attention(), x[:, i : i + 4])[1].mean(0) for i in (0, 4)]
    assert apart(found[0], np.concatenate(windows)) < 1e-5


def test_only_the_engine_torch_needs_the_foreign_code(
    local_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", [p for p in sys.path if not (Path(p) / "their_vae.py").exists()]
    )
    monkeypatch.delitem(sys.modules, "their_vae")
    importlib.invalidate_caches()
    for engine in ("onnxruntime", "openvino"):
        with open_codec(local_bundle, engine=engine) as codec:
            assert codec.encode(random(1, 5, 8, 8)).shape == (2, 2, 2, 2)
    message = "module their_vae to import.*PYTHONPATH.*use --engine openvino or onnxruntime"
    with pytest.raises(EngineError, match=message):
        open_codec(local_bundle, engine="torch")
    assert "their_vae" not in sys.modules


def test_foreign_code_that_has_changed_is_refused(
    theirs: Any, local_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theirs, "local", lambda: theirs.Local(width=5))
    with pytest.raises(BundleError, match=r"bundle theirs.*found: size mismatch for network"):
        open_codec(local_bundle, engine="torch").encode(random(1, 5, 8, 8))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Deciding", "expected encode_first to export to ONNX, found .*data-dependent.*--debug"),
        ("Looping", "a graph of encode_first for slices of any size.*switch it off in the factory"),
    ],
)
def test_code_that_cannot_be_exported_gives_an_error_of_one_line(
    theirs: Any, factory: str, message: str
) -> None:
    model, _ = load(f"their_vae:{factory}", window=5)
    with pytest.raises(BundleError, match=message) as error:
        trace(model.stages["encode"], parts_of(model)[0], 18, foreign=True)
    assert len(str(error.value)) < 500


def test_the_network_can_be_rebuilt_from_the_manifest(local_bundle: Path) -> None:
    manifest = Manifest.load(local_bundle)
    assert manifest.network.family == "any_torch"
    assert manifest.network.config["factory"] == "their_vae:local"
    assert manifest.network.config["channels"] == 3
    assert manifest.latent.scale == (1.0, 1.0)
    assert (manifest.intensity.model_min, manifest.intensity.model_max) == (-1.0, 1.0)


def test_another_range_or_window_gives_another_identity(
    theirs: Any, without_onnx: None, tmp_path: Path, write_ct: Any
) -> None:
    made: dict[str, dict[str, Any]] = {
        "bundle": {"window": 5},
        "again": {"window": 5},
        "range": {"window": 5, "intensity": (0.0, 1.0)},
        "window": {"window": 9},
    }
    identity = {
        name: export(tmp_path / name, "local", channels=1, **options).identity
        for name, options in made.items()
    }
    assert identity["bundle"] == identity["again"]
    assert len(set(identity.values())) == 3
    write_ct(tmp_path / "ct.nii", (8, 8, 5))
    of = {"engine": "torch"}
    fvae.encode(tmp_path / "ct.nii", tmp_path / "z.zarr", model=tmp_path / "bundle", **of)
    fvae.decode(tmp_path / "z.zarr", tmp_path / "same.nii", model=tmp_path / "again", **of)
    with pytest.raises(LatentError, match="expected latents of model theirs"):
        fvae.decode(tmp_path / "z.zarr", tmp_path / "other.nii", model=tmp_path / "range", **of)
