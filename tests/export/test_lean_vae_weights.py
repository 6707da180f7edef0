"""Published checkpoints can be loaded; weights that do not fit are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
from random_lean_vae import SMALL, random_lean_vae  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from fvae_deploy.errors import BundleError  # noqa: E402
from fvae_deploy.export.models.lean_vae import LeanVAE, LeanVAEConfig  # noqa: E402
from fvae_deploy.export.sources import load, load_lean_vae  # noqa: E402

ARGS = {
    "embedding_dim": 32,
    "latent_dim": 4,
    "ista_iter_num": 1,
    "ista_layer_num": 1,
    "l_dim": 8,
    "h_dim": 24,
    "sep_num_layer": 1,
    "fusion_num_layer": 1,
    # The published args contain these too; they do not define the network.
    "use_tile_inference": False,
    "chunksize_enc": 9,
    "note": "any",
}


@pytest.fixture(scope="module")
def model() -> LeanVAE:
    return random_lean_vae(SMALL, 3)


@pytest.fixture
def state(model: LeanVAE) -> dict[str, torch.Tensor]:
    extra = {"std_layer.weight": torch.zeros(4, 32), "std_layer.bias": torch.zeros(4)}
    return {**model.state_dict(), **extra}


def test_args_that_do_not_define_the_network_are_ignored() -> None:
    assert LeanVAEConfig.from_args(ARGS) == SMALL


def test_the_unused_deviation_layer_is_left_out(
    model: LeanVAE, state: dict[str, torch.Tensor]
) -> None:
    loaded = LeanVAE(SMALL)
    loaded.load(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param({**ARGS, "l_dim": 9}, "9 \\+ 24 != 32", id="widths that do not add up"),
        pytest.param({**ARGS, "latent_dim": "4"}, "integer latent_dim", id="text for a number"),
        pytest.param({**ARGS, "h_dim": 24.0}, "integer h_dim", id="a fraction for a number"),
    ],
)
def test_args_that_do_not_fit_a_network_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        LeanVAEConfig.from_args(args)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(lambda s: s.pop("latent_bottleneck.phi"), "phi", id="one left out"),
        pytest.param(lambda s: s.update(more=torch.zeros(1)), "more", id="one too many"),
        pytest.param(
            lambda s: s.update({"latent_bottleneck.Q": torch.zeros(2, 2)}), "Q", id="other shape"
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(
    state: dict[str, torch.Tensor], change: Callable[[dict[str, torch.Tensor]], None], names: str
) -> None:
    change(state)
    with pytest.raises(
        BundleError, match=f"weights of this LeanVAE, found 1 keys .*{names}"
    ) as caught:
        LeanVAE(SMALL).load(state)
    assert "\n" not in str(caught.value)


def test_a_published_checkpoint_gets_its_channels_from_the_weights(
    tmp_path: Path, model: LeanVAE, state: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "LeanVAE-dim4.ckpt"
    torch.save({"args": ARGS, "state_dict": state}, path)
    loaded, _ = load_lean_vae(path)
    source = load(str(path)).source
    assert loaded.config == SMALL
    assert (source.id, len(source.sha256)) == ("LeanVAE-dim4.ckpt", 64)
    x = torch.randn(1, 3, 5, 16, 16)
    assert torch.equal(loaded.encode(x), model.encode(x))


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code in a checkpoint ran",)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"args": ARGS, "state_dict": {}}, id="no weights"),
        pytest.param({"state_dict": {}}, id="no args"),
        pytest.param({"args": [1], "state_dict": {}}, id="args that are a list"),
        pytest.param({"args": ARGS, "state_dict": [1]}, id="weights that are a list"),
        pytest.param([1, 2], id="a list"),
        pytest.param({"args": Code(), "state_dict": {}}, id="code"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(
    tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(BundleError) as caught:
        load_lean_vae(path)
    assert "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def put(name: Any, value: Any) -> Callable[[dict[Any, Any]], None]:
    return lambda content: content.update({name: value})


@pytest.mark.parametrize(
    ("part", "change"),
    [
        pytest.param("args", put("latent_dim", -4), id="a negative width"),
        pytest.param("args", put("latent_dim", 10**12), id="a huge width"),
        pytest.param(
            "args", lambda a: a.update(embedding_dim=0, l_dim=0, h_dim=0), id="widths of 0"
        ),
        pytest.param("state", put("encoder.image_low_proj.1.weight", 3), id="a number"),
        pytest.param(
            "state", put("encoder.image_low_proj.1.weight", torch.tensor(1.0)), id="a scalar"
        ),
        pytest.param("state", put("encoder.video_low_proj.1.weight", [1, 2]), id="a list"),
        pytest.param("state", put(5, torch.zeros(1)), id="a number for a name"),
    ],
)
def test_numbers_and_weights_that_do_not_fit_a_network_are_refused_in_one_line(
    tmp_path: Path, state: dict[str, torch.Tensor], part: str, change: Callable[[Any], None]
) -> None:
    content = {"args": {**ARGS}, "state": {**state}}
    change(content[part])
    torch.save({"args": content["args"], "state_dict": content["state"]}, tmp_path / "w.ckpt")
    with pytest.raises(BundleError) as caught:
        load_lean_vae(tmp_path / "w.ckpt")
    assert "\n" not in str(caught.value)


def save(model: LeanVAE, path: Path, **said: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, said)


@pytest.mark.parametrize(
    "scale", ["[1.0, 2.0]", '"abc"', "abc", "[0, 0, 0, 0]", "[1, 1, 1, NaN]", "2.0"]
)
def test_a_latent_scale_that_is_not_one_factor_per_channel_is_refused(
    tmp_path: Path, model: LeanVAE, scale: str
) -> None:
    save(model, tmp_path / "w.safetensors", args=json.dumps(ARGS), latent_scale=scale)
    with pytest.raises(BundleError, match="expected 4 numbers other than 0 as latent_scale"):
        load(str(tmp_path / "w.safetensors"))


def test_other_metadata_need_not_be_json(tmp_path: Path, model: LeanVAE) -> None:
    save(model, tmp_path / "w.safetensors", args=json.dumps(ARGS), description="of mine")
    assert load(str(tmp_path / "w.safetensors")).description == "of mine"
    save(model, tmp_path / "w.safetensors", args="{")
    with pytest.raises(BundleError, match='configuration as JSON under "args"'):
        load(str(tmp_path / "w.safetensors"))


def test_a_class_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": ["AutoencoderKL"]}')
    with pytest.raises(BundleError, match=r"expected a VAE of class .*found \['AutoencoderKL'\]"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["cut.ckpt", "cut.safetensors", "empty.ckpt", "weights.bin"])
def test_files_that_hold_no_weights_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "cut.ckpt":
        torch.save({"args": ARGS, "state_dict": {"a": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(b"" if name.startswith("empty") else b"\x08\0\0\0")
    with pytest.raises(BundleError, match=name):
        load_lean_vae(path)
    with pytest.raises(BundleError, match="found nothing"):
        load_lean_vae(tmp_path / "absent.ckpt")
