"""Checkpoints of generators: their bundles, and the errors for those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("torch", "transformers", "diffusers", "onnxscript"):
    pytest.importorskip(package, reason="needs the export extra")
import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from small_generator import TEXT_CONFIG, UNET_CONFIG, facts, state, tokenizer, write_weights  # noqa: E402
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from fvae_deploy.cli.main import app  # noqa: E402
from fvae_deploy.errors import BundleError, ConditionError, UsageError  # noqa: E402
from fvae_deploy.export.generator import GeneratorManifest, timestep_embedding  # noqa: E402
from fvae_deploy.export.generators import is_generator, load_generator  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402
from fvae_deploy.export.models.denoiser import DenoiserConfig, UNet  # noqa: E402
from fvae_deploy.export.to_onnx import write_bundle  # noqa: E402
from fvae_deploy.generation.denoiser import open_denoiser  # noqa: E402
from fvae_deploy.organs import PUBLISHED_FINDINGS  # noqa: E402

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
ENGINES = ["openvino", "onnxruntime", "torch"]


def load(path: Path, **options: Any) -> Any:
    return load_generator(path, version="0", **options)


def test_the_bundle_has_the_facts_of_the_file_and_the_parity_of_every_engine(small_generator):
    found = GeneratorManifest.load(small_generator)
    assert [part.name for part in found.parts] == ["text", "context", "denoise"]
    assert (found.window, found.plane, found.steps, found.tokens) == (3, (32, 32), 2, 10)
    assert found.latent.shift == (0.1,) * 16
    assert found.masks.offset == 200
    assert found.masks.palette["5"] == -825.0
    assert {row.engine for row in found.parity} == set(ENGINES)
    exact = {row.engine: row.max for row in found.parity if row.precision == "fp32"}
    assert exact.keys() == set(ENGINES)
    assert max(exact.values()) < 1e-4
    assert max(row.max for row in found.parity) < 0.5


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_denoises_like_the_published_network(small_generator, engine):
    pytest.importorskip({"torch": "torch"}.get(engine, engine))
    weights = state()
    network = UNet(DenoiserConfig.read(UNET_CONFIG)).eval()
    network.load_state_dict(
        {k.partition("diffusion_model.")[2]: v for k, v in weights.items() if "diffusion" in k}
    )
    text = BertModel(BertConfig(**TEXT_CONFIG), add_pooling_layer=False).eval()
    text.load_state_dict(
        {k.removeprefix("text_transformer."): v for k, v in weights.items() if "text_" in k}
    )
    ids = torch.tensor([tokenizer().encode("no nodule").ids])
    random = np.random.default_rng(0)
    x, mask = random.standard_normal((2, 5, 16, 4, 6), dtype=np.float32)
    with torch.no_grad():
        context = text(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state[0]
        wanted = network(
            torch.from_numpy(x),
            torch.from_numpy(mask),
            torch.from_numpy(timestep_embedding(333, 32)),
            *network.keys_values(context),
        ).numpy()
    with open_denoiser(small_generator, engine=engine) as denoiser:
        given = denoiser.context("no nodule")
        np.testing.assert_allclose(given, context.numpy(), atol=1e-5)
        found = denoiser.denoise(x, mask_latent=mask, t=333, context=given)
        again = denoiser.denoise(x, mask_latent=mask, t=333, context=given)
    assert np.abs(found - wanted).max() < 2e-5 * wanted.std()
    np.testing.assert_array_equal(found, again)


@pytest.fixture(scope="module", params=["unet_a", "unet_b"])
def golden(request, tmp_path_factory) -> tuple[str, Path]:
    """A published network's name and its bundle, exported once for all engines."""
    if not (GOLDEN / f"{request.param}.ckpt").is_file():
        pytest.skip("golden tensors are not here: expected ../shared/golden beside the checkout")
    folder = tmp_path_factory.mktemp("golden") / request.param
    found = load(GOLDEN / f"{request.param}.ckpt")
    write_bundle(found, folder)
    return request.param, folder


@pytest.mark.parametrize("engine", ENGINES)
def test_the_bundle_reproduces_published_tensors(golden, engine):
    name, folder = golden
    with safe_open(GOLDEN / f"{name}.io.safetensors", "np") as file:
        of = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with open_denoiser(folder, engine=engine) as denoiser:
        found = denoiser.denoise(
            of["x"], mask_latent=of["mask_latent"], t=float(of["t"][0]), context=of["context"][0]
        )
        assert np.abs(found - of["eps"]).max() < 1e-5 * of["eps"].std()
        with pytest.raises(BundleError, match=r"expected a text encoder.*--text"):
            denoiser.context("a nodule")


def test_a_checkpoint_without_facts_gets_those_of_the_published_generator(tmp_path):
    weights = {k: v for k, v in state().items() if "diffusion" in k}
    torch.save({"state_dict": weights, "unet_config": UNET_CONFIG}, tmp_path / "a.ckpt")
    assert is_generator(tmp_path / "a.ckpt")
    found = load(tmp_path / "a.ckpt").manifest
    assert (found.vae, found.window, found.plane, found.eta) == ("leanvae16", 17, (512, 512), 1.0)
    assert found.latent.scale == (1.52,) * 16
    assert found.masks.palette["30"] == pytest.approx(30 / 300 * 2000 - 1000)
    assert (found.masks.offset, found.tokens) == (100, 0)
    assert {f.number: f.name for f in found.masks.findings} == PUBLISHED_FINDINGS
    assert (found.as_published, found.trained_without_text) == (("stretch", "text"), False)
    assert found.masks.body


def test_the_configuration_may_be_the_reference_s_yaml(tmp_path):
    torch.save({"state_dict": state()}, tmp_path / "a.ckpt")
    with pytest.raises(BundleError, match=r"unet_config.*--config"):
        load(tmp_path / "a.ckpt")
    content = {
        "model": {
            "params": {
                "unet_config": {"target": "ldm.UNetModel", "params": UNET_CONFIG},
                "scale_factor": 2.5,
                "linear_start": 0.001,
            }
        }
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    found = load(tmp_path / "a.ckpt", config=tmp_path / "a.yaml").manifest
    assert found.latent.scale == (2.5,) * 16
    assert found.schedule["beta_start"] == 0.001
    (tmp_path / "a.yaml").write_text("model: [1, 2]")
    with pytest.raises(BundleError, match=r"expected model.params.unet_config.params"):
        load(tmp_path / "a.ckpt", config=tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("dataset", "option", "divisor", "words"),
    [
        (
            "ldm.data.ct_clip_data_inference_eval.CTReportDatasetinfer",
            None,
            300,
            "taken as the mul",
        ),
        (
            "ldm.data.ct_clip_data_evaluation.CTReportDatasetinfer",
            None,
            400,
            "taken as the healthy",
        ),
        ("ldm.data.ct_clip_data_inference.CTReportDatasetinfer", None, 300, "--generator healthy"),
        (
            "ldm.data.ct_clip_data_inference.CTReportDatasetinfer",
            "healthy",
            400,
            "taken as the hea",
        ),
        (None, "healthy", 400, "taken as the healthy"),
        (None, None, 300, "does not say which"),
    ],
)
def test_the_two_published_generators_are_told_apart(tmp_path, dataset, option, divisor, words):
    torch.save({"state_dict": state()}, tmp_path / "a.ckpt")
    params = {"unet_config": {"params": UNET_CONFIG}}
    content: dict[str, Any] = {"model": {"params": params}}
    if dataset:
        content["data"] = {"params": {"validation": {"target": dataset, "params": {}}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    said: list[str] = []
    found = load(
        tmp_path / "a.ckpt", config=tmp_path / "a.yaml", generator=option, progress=said.append
    ).manifest
    assert found.masks.palette["117"] == pytest.approx(117 / divisor * 2000 - 1000, abs=1e-3)
    assert bool(found.masks.findings) == (divisor == 300)
    assert words in said[0]
    assert f"label / {divisor}" in found.description


def test_a_file_that_describes_itself_is_no_published_generator(tmp_path):
    path = write_weights(tmp_path / "a.safetensors")
    found = load(path).manifest
    assert (found.as_published, found.trained_without_text, found.masks.body) == ((), True, False)
    assert len(found.masks.findings) == 18
    with pytest.raises(UsageError, match=r"no --generator with .*found healthy"):
        load(path, generator="healthy")
    torch.save({"state_dict": state(), "unet_config": UNET_CONFIG}, tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match=r"multi-disease, healthy, found 'other'"):
        load(tmp_path / "a.ckpt", generator="other")


def test_the_text_encoder_may_be_a_folder_of_transformers(tmp_path):
    weights = {k: v for k, v in state().items() if "diffusion" in k}
    torch.save({"state_dict": weights, "unet_config": UNET_CONFIG}, tmp_path / "a.ckpt")
    BertModel(BertConfig(**TEXT_CONFIG)).save_pretrained(tmp_path / "text")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "text")
    found = load(tmp_path / "a.ckpt", text=str(tmp_path / "text"))
    assert found.manifest.tokens == 10
    assert [part.name for part in found.manifest.parts] == ["text", "context", "denoise"]
    with pytest.raises(BundleError, match=r"BERT-class encoder.*--text"):
        load(tmp_path / "a.ckpt", text=str(tmp_path))
    (tmp_path / "text" / "tokenizer.json").rename(tmp_path / "whole.json")
    (tmp_path / "text" / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match=r"BERT-class encoder.*--text"):
        load(tmp_path / "a.ckpt", text=str(tmp_path / "text"))
    (tmp_path / "whole.json").rename(tmp_path / "text" / "tokenizer.json")
    BertModel(BertConfig(**{**TEXT_CONFIG, "hidden_size": 32})).save_pretrained(tmp_path / "text")
    with pytest.raises(BundleError, match="width 24, found 32"):
        load(tmp_path / "a.ckpt", text=str(tmp_path / "text"))


@pytest.mark.parametrize(
    "option",
    [["--channels", "rgb"], ["--weights", "w.pt"], ["--window", "33"], ["--range", "0,1"]],
    ids=lambda option: option[0],
)
def test_options_for_vaes_are_refused(tmp_path, option):
    torch.save({"state_dict": state(), "unet_config": UNET_CONFIG}, tmp_path / "a.ckpt")
    asked = ["export", "-m", str(tmp_path / "a.ckpt"), "-o", str(tmp_path / "b"), *option]
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, UsageError)
    assert str(done.exception).startswith(f"expected no {option[0]} with a generator")
    assert not (tmp_path / "b").exists()


def test_a_missing_text_encoder_is_not_searched_on_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state(), "unet_config": UNET_CONFIG}, tmp_path / "a.ckpt")
    with pytest.raises(BundleError, match=r"folder .* or hf:OWNER/NAME, found some/bert: check"):
        load(tmp_path / "a.ckpt", text="some/bert")


def test_a_tokenizer_with_another_padding_token_is_refused(tmp_path):
    path = write_weights(tmp_path / "a.safetensors")
    other = tokenizer()
    other.enable_padding(pad_id=1, pad_token="[UNK]", length=10)
    other = json.loads(other.to_str())
    write_weights(tmp_path / "b.safetensors", tokenizer=other)
    assert load(path).manifest.tokens == 10
    with pytest.raises(BundleError, match="pads with token 0, found 1"):
        load(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": "x"}, "ValueError: .*'x'"),
        ({"plane": [512]}, "IndexError"),
        ({"palette": [1]}, "AttributeError"),
        ({"palette": {"1": None}}, "TypeError"),
        ({"tokenizer": {}}, "KeyError: 'padding'"),
        ({"steps": None}, "TypeError"),
        ({"latent_shift": [1, 2]}, "2 and 16 numbers of latent for 16 channels"),
        ({"mask_scale": 1.0}, "TypeError"),
        ({"schedule": 5}, "TypeError"),
        ({"text_config": {"hidden_size": "a"}}, "a configuration of a BERT-class encoder"),
        ({"text_config": 5}, "a configuration of a BERT-class encoder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_malformed_facts_are_refused_in_one_line(tmp_path, changes, words):
    path = write_weights(tmp_path / "a.safetensors", **changes)
    with pytest.raises(BundleError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_named(tmp_path):
    weights = state()
    lost = "model.diffusion_model.out.2.weight"
    torch.save(
        {"state_dict": {k: v for k, v in weights.items() if k != lost}, "unet_config": UNET_CONFIG},
        tmp_path / "a.ckpt",
    )
    with pytest.raises(BundleError, match=r"with out\.2\.weight"):
        load(tmp_path / "a.ckpt")
    torch.save(
        {"state_dict": weights, "unet_config": {**UNET_CONFIG, "context_dim": 40}},
        tmp_path / "b.ckpt",
    )
    with pytest.raises(BundleError, match=r"attn2.to_k.weight \[64, 40\].*found \[64, 24\]"):
        load(tmp_path / "b.ckpt")


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"no checkpoint")
    assert not is_generator(tmp_path / "a.ckpt")
    assert not is_generator(tmp_path / "absent.safetensors")
    with pytest.raises(BundleError, match="expected a file that contains only tensors"):
        load(tmp_path / "a.ckpt")
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert not is_generator(tmp_path / "a.safetensors")


def test_bundles_of_the_other_kind_are_refused(small_generator):
    with pytest.raises(BundleError, match=r"kind vae.*found 'generator'.*fvae generate"):
        Manifest.load(small_generator)
    with pytest.raises(BundleError, match=r"kind generator.*found 'vae'.*encode"):
        open_denoiser("tiny")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"window": 1}, "window of at least 2", id="a window of one frame"),
        pytest.param({"tokens": 0}, "text encoder with its tokenizer", id="text without tokens"),
        pytest.param({"plane": [0, 32]}, "a plane", id="no plane"),
        pytest.param(
            {"mask": {"shift": [0.0], "scale": [1.0]}}, "a shift and a scale", id="channels"
        ),
        pytest.param(
            {"masks": {"palette": {"x": 1.0}, "offset": 3}}, "whole numbers", id="no labels"
        ),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(small_generator, tmp_path, change, words):
    content = json.loads((small_generator / "manifest.json").read_text()) | change
    for file in small_generator.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=words):
        GeneratorManifest.load(tmp_path)


X = np.zeros((3, 16, 4, 4), np.float32)
CONTEXT = np.zeros((5, 24), np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"x": X[:1]}, "at least 2 frames", id="one frame"),
        pytest.param({"x": X[..., :3]}, "multiples of 2", id="an odd plane"),
        pytest.param({"x": X[:, :4]}, r"\[frames, 16, h, w\]", id="channels"),
        pytest.param({"mask_latent": X[:2]}, "mask latent", id="another mask"),
        pytest.param({"context": CONTEXT[:, :3]}, r"\[tokens, 24\]", id="another context"),
        pytest.param({"x": X + np.nan}, "finite latents", id="NaN"),
    ],
)
def test_invalid_numbers_of_steps_are_refused(small_generator, changes, words):
    given = {"x": X, "mask_latent": X, "context": CONTEXT, **changes}
    if "x" in changes and "mask_latent" not in changes:
        given["mask_latent"] = given["x"]
    with (
        open_denoiser(small_generator, engine="torch") as denoiser,
        pytest.raises(ConditionError, match=words),
    ):
        denoiser.denoise(
            given["x"], mask_latent=given["mask_latent"], t=5, context=given["context"]
        )


def test_a_text_that_is_too_long_is_refused_with_its_length(small_generator):
    with (
        open_denoiser(small_generator, engine="torch") as denoiser,
        pytest.raises(ConditionError, match="at most 10 tokens, found 14"),
    ):
        denoiser.context("no nodule " * 6)


def test_facts_of_the_file_reach_the_manifest(tmp_path):
    path = write_weights(tmp_path / "a.safetensors", steps=7, eta=0.25)
    found = load(path).manifest
    assert (found.steps, found.eta, found.findings) == (7, 0.25, facts()["findings"])
