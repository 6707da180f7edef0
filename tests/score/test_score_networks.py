"""Networks of others in fvae score: how inputs are prepared, and what is refused."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from phantom_sets import write_i3d, write_picture_network

torch = pytest.importorskip("torch", reason="needs the export extra")

from fvae_deploy.errors import BundleError, EngineError  # noqa: E402
from fvae_deploy.organs import FINDINGS  # noqa: E402
from fvae_deploy.score import networks  # noqa: E402
from fvae_deploy.score.adapters import Adapters, open_adapter  # noqa: E402
from fvae_deploy.score.cases import Beside  # noqa: E402
from fvae_deploy.score.features import (  # noqa: E402
    LatentFeatures,
    clip_features,
    picture_features,
)
from fvae_deploy.score.grid import CommonGrid  # noqa: E402
from fvae_deploy.score.networks import FeatureNetwork, load_script, open_features, open_i3d  # noqa: E402
from fvae_deploy.score.planes import Cuts  # noqa: E402
from fvae_deploy.stream.codec import open_codec  # noqa: E402
from fvae_deploy.volume.base import Geometry  # noqa: E402
from fvae_deploy.volume.open import create_volume  # noqa: E402

WINDOW = (-1000.0, 1000.0)


def test_a_clip_reaches_i3d_as_in_the_published_evaluation(tmp_path):
    """Bilinear to a short side of 224, the centre, -1 to 1; here by hand, pixel by pixel."""
    clip = np.random.default_rng(0).uniform(-1200, 1200, (17, 40, 50)).astype(np.float32)
    seen = []

    class Spy:
        def __call__(self, batch):
            seen.append(batch.numpy())
            return batch.mean(dim=(2, 3, 4))

    found = clip_features(FeatureNetwork("spy", Spy(), None), clip, WINDOW)
    (batch,) = seen
    assert batch.shape == (1, 3, 17, 224, 224)
    assert found.shape == (1, 3)
    grey = (clip.clip(-1000, 1000) + 1000) / 2000
    scale = 40 / 224
    for row, column in ((0, 0), (100, 37), (223, 223), (11, 200)):
        y, x = (row + 0.5) * scale - 0.5, (column + (280 - 224) // 2 + 0.5) * 50 / 280 - 0.5
        y, x = max(y, 0), max(x, 0)
        r, c = int(y), int(x)
        r1, c1 = min(r + 1, 39), min(c + 1, 49)
        top = grey[:, r, c] * (1 - (x - c)) + grey[:, r, c1] * (x - c)
        low = grey[:, r1, c] * (1 - (x - c)) + grey[:, r1, c1] * (x - c)
        expected = 2 * (top * (1 - (y - r)) + low * (y - r)) - 1
        np.testing.assert_allclose(batch[0, 0, :, row, column], expected, atol=1e-4)
    np.testing.assert_array_equal(batch[0, 0], batch[0, 2])


def test_the_published_i3d_gets_the_arguments_that_switch_its_own_preparation_off(tmp_path):
    network = open_i3d(write_i3d(tmp_path / "i3d.pt"))
    clip = np.zeros((17, 30, 30), np.float32)
    assert clip_features(network, clip, WINDOW).shape == (1, 6)
    assert len(network.sha256) == 64


def test_maps_of_features_are_averaged_over_their_places(tmp_path):
    network = open_features(str(write_picture_network(tmp_path / "net.pt")))
    slices = np.random.default_rng(0).uniform(-1000, 1000, (11, 20, 24)).astype(np.float32)
    cuts = Cuts({"axial": slices}, None, slices, ())
    found = picture_features(network, cuts, WINDOW)["axial"]
    module, _ = load_script(tmp_path / "net.pt", "--features")
    grey = torch.from_numpy((slices + 1000) / 2000)[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        expected = module(grey).mean(dim=(2, 3)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_latents_are_pooled_in_two_windows():
    slices = np.random.default_rng(0).uniform(-1000, 1000, (2, 20, 17)).astype(np.float32)
    with open_codec("tiny", threads=1) as codec:
        found = LatentFeatures(codec).features(slices)
        assert found.shape == (2, 64)
        padded = np.pad(slices[1], ((0, 4), (0, 7)), mode="edge")
        for k, (low, high) in enumerate(((-1000, 1000), (-160, 240))):
            x = (padded.clip(low, high) - low) / (high - low) - 0.5
            z = codec.encode(x[None, None].astype(np.float32))[:, 0]
            here = found[1, 32 * k : 32 * (k + 1)]
            expected = np.concatenate([z.mean(axis=(1, 2)), z.std(axis=(1, 2))])
            np.testing.assert_allclose(here, expected, atol=1e-4)


def answers(output):
    return FeatureNetwork("net", lambda batch: output(len(batch)), None)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda n: torch.full((n, 3), np.nan), "found NaN"),
        (lambda n: torch.zeros(n), "expected features [2, d]"),
        (lambda n: torch.zeros(1, 3), "expected features [2, d]"),
        (lambda n: [torch.zeros(n, 3), torch.zeros(n, 3)], "a list, not a tensor"),
        (lambda n: np.zeros((n, 3)), "a ndarray, not a tensor"),
        (lambda n: torch.zeros(n, 3) @ torch.zeros(2, 2), "to take an array of shape"),
    ],
)
def test_what_is_no_vector_for_each_input_is_refused(output, words):
    with pytest.raises(EngineError) as caught:
        answers(output).features(np.zeros((2, 3, 8, 8), np.float32))
    assert words in str(caught.value)


def test_a_list_of_one_tensor_is_taken_and_another_length_refused():
    network = FeatureNetwork("net", lambda batch: [batch.mean(dim=(1, 2))], None)
    assert network.features(np.zeros((2, 3, 8, 5), np.float32)).shape == (2, 5)
    with pytest.raises(EngineError, match="expected 5 features from net as before, found 6"):
        network.features(np.zeros((2, 3, 8, 6), np.float32))


def test_files_that_are_no_torchscript_are_refused(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no network")
    whole = write_i3d(tmp_path / "i3d.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("weights.pt", "text.pt", "cut.pt", "none.pt"):
        with pytest.raises(BundleError, match="expected a TorchScript file for --i3d"):
            open_i3d(tmp_path / name)


def test_a_pickle_in_place_of_torchscript_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "ran", "yes"))

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(BundleError, match="TorchScript"):
        open_features(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def test_inception_is_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pip install pytorch-fid"):
        open_features("inception")
    package = types.ModuleType("pytorch_fid.inception")
    package.InceptionV3 = lambda blocks: torch.nn.Flatten()
    monkeypatch.setitem(sys.modules, "pytorch_fid", types.ModuleType("pytorch_fid"))
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", package)
    monkeypatch.setattr(networks, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(BundleError, match="fvae downloads nothing: fetch https://"):
        open_features("inception")
    (tmp_path / "checkpoints").mkdir()
    weights = tmp_path / "checkpoints" / networks.INCEPTION_FILE
    weights.write_bytes(b"other")
    with pytest.raises(BundleError, match="another SHA-256"):
        open_features("inception")


class Adapter:
    """Adapters as a user would write them; `weights` is the path that was passed."""

    def __init__(self, weights=None):
        self.weights = weights

    def image(self, hu, spacing):
        assert hu.dtype == np.float32
        return torch.tensor([[hu.mean(), hu.std(), spacing[2]]])

    def text(self, text):
        return [len(text), 1.0, 2.0]

    def findings(self, hu, spacing):
        return np.full(18, 0.25)


def module_of(monkeypatch, **functions):
    module = types.ModuleType("their_code")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "their_code", module)


@pytest.fixture
def volume(tmp_path):
    hu = np.random.default_rng(0).integers(-900, 900, (9, 8, 7)).astype(np.int16)
    geometry = Geometry((8, 7, 9), np.diag([-2.0, -2.0, 3.0, 1.0]))
    with create_volume(tmp_path / "ct.nii", geometry) as writer:
        writer.write(hu)
    return hu, CommonGrid(geometry, (2.0, 2.0, 3.0)), tmp_path / "ct.nii"


def test_adapters_judge_cts_of_the_table_alone(monkeypatch, tmp_path, volume):
    module_of(monkeypatch, make=Adapter)
    hu, grid, path = volume
    (tmp_path / "w.pt").write_bytes(b"")
    clip = open_adapter("their_code:make", tmp_path / "w.pt", "--clip")
    assert clip.weights == tmp_path / "w.pt"
    table = {"a": Beside("nodule", {"Emphysema": True}), "b": Beside(None, {})}
    adapters = Adapters(clip, open_adapter("their_code:make", None, "--classifier"), table)
    found = adapters.judge("a", grid, path)
    image, text = np.array([hu.mean(), hu.std(), 3.0]), np.array([6.0, 1, 2])
    cosine = image @ text / np.linalg.norm(image) / np.linalg.norm(text)
    assert found.similarity == pytest.approx(cosine, rel=1e-4)
    np.testing.assert_array_equal(found.probabilities, np.full(len(FINDINGS), 0.25))
    assert adapters.judge("b", grid, path).similarity is None
    assert adapters.judge("c", grid, path).probabilities is None


@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        ("image", lambda self, hu, mm: np.zeros((2, 3)), "expected a vector [d] from image()"),
        ("text", lambda self, text: np.ones(4), "expected a vector [3] from text()"),
        ("image", lambda self, hu, mm: [np.nan, 1, 2], "expected finite numbers"),
        ("image", lambda self, hu, mm: 1 / 0, "found ZeroDivisionError"),
        ("findings", lambda self, hu, mm: np.ones(17), "expected a vector [18]"),
        ("findings", lambda self, hu, mm: np.full(18, 4.0), "apply a sigmoid"),
    ],
)
def test_answers_of_an_adapter_are_checked(monkeypatch, volume, name, function, words):
    kind = type("Wrong", (Adapter,), {name: function})
    adapters = Adapters(kind(), kind(), {"a": Beside("nodule", {"Emphysema": True})})
    with pytest.raises(EngineError) as caught:
        adapters.judge("a", volume[1], volume[2])
    assert words in str(caught.value)


def test_factories_that_make_no_adapter_are_refused(monkeypatch, tmp_path):
    module_of(monkeypatch, nothing=lambda: None, fails=lambda: 1 / 0)
    for factory, words in (
        ("their_code:nothing", "found no image"),
        ("their_code:fails", "ZeroDivisionError"),
        ("their_code:absent", "AttributeError"),
        ("no_such_module:make", "ModuleNotFoundError"),
        ("their code", "like package.module:function"),
    ):
        with pytest.raises(BundleError) as caught:
            open_adapter(factory, None, "--clip")
        assert words in str(caught.value)
    with pytest.raises(BundleError, match="correct --clip-weights"):
        open_adapter("their_code:nothing", tmp_path / "none", "--clip")
